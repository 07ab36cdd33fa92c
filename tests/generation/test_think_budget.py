"""The thinking budget: a trace ends at the right place with a tag, and an answer follows."""

from dataclasses import replace

import mlx.core as mx
import pytest

import magistral_mlx as mm
from magistral_mlx.generation.decoding import Token
from magistral_mlx.generation.reply import ReplyBuilder, Usage
from magistral_mlx.generation.sampling import INVALID, SPILLED
from magistral_mlx.generation.think_budget import LIKELY_ENOUGH
from magistral_mlx.tokenizer.reasoning import TagSplitter, closing
from magistral_mlx.tokenizer.tekken import Tokenizer
from tests.support.tekken import write_tekken

GREEDY = mm.SamplingParams(temperature=0)
LINE = "Time is up, so I answer now."
FREE = (1.0,) * 8  # what passes over more rows cost where rows cost nothing


@pytest.fixture(scope="module")
def magistral() -> mm.Magistral:
    return mm.load("demo")


@pytest.fixture(scope="module", params=["v11", "v13"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return Tokenizer.from_folder(
        write_tekken(tmp_path_factory.mktemp("tekken"), version=request.param)
    )


@pytest.mark.parametrize("line", ["", LINE])
@pytest.mark.parametrize(
    "trace", ["<think>\nOne.\nTwo\n</think>\n\n", "<think>\na < b </b> </\n</thin\n</think>\n\n"]
)
def test_a_trace_cut_anywhere_is_closed_by_one_tag(trace: str, line: str) -> None:
    opened, end = len("<think>"), trace.rindex("</think>") + len("</think>")
    for cut in range(opened, end):
        splitter = TagSplitter()
        parts = splitter.push(trace[:cut] + closing(trace[:cut], line) + "Four.") + splitter.flush()
        reasoning = "".join(s.text for s in parts if s.kind == "reasoning")
        assert [s.text for s in parts if s.kind == "answer"] == ["Four."]
        kept, _, last = (
            reasoning.rpartition("\n") if line and reasoning.endswith(line) else (reasoning, "", "")
        )
        assert last in ("", line)
        assert trace[opened:cut].removeprefix("\n").startswith(kept)
        assert "</think>" not in kept
        # Only a tag that was begun is lost of the trace.
        assert len(kept) >= len(trace[opened:cut].strip("\n").removesuffix("\n</")) - len(
            "</think>"
        )


def test_the_ids_that_close_a_trace(tokenizer: Tokenizer) -> None:
    """Close with the ids of the tests' vocabulary; see test_tekken.py for the published one."""
    line = tokenizer.encode(LINE)
    if tokenizer.version == "v13":
        assert tokenizer.closing("a") == tokenizer.closing("a\n") == [35]
        assert tokenizer.closing("a", LINE) == [*tokenizer.encode(f"\n{LINE}"), 35]
        assert tokenizer.closing("a\n", LINE) == tokenizer.closing("", LINE) == [*line, 35]
        return
    tag = tokenizer.encode("</think>\n\n")
    assert tokenizer.closing("a\n") == tag
    assert tokenizer.closing("a") == tokenizer.closing("a <") == [*tokenizer.encode("\n"), *tag]
    assert (
        tokenizer.closing("a\n</")
        == tokenizer.closing("a</")
        == tokenizer.closing("a\n</", LINE)
        == tag[1:]
    )
    assert tokenizer.decode(tokenizer.closing("a", LINE)) == f"\n{LINE}\n</think>\n\n"


def logits_of(tokenizer: Tokenizer, chance: float) -> mx.array:
    """Return logits [1, V] that give the closing tag a probability; other ids share the rest."""
    tag = tokenizer.closing("\n")[0]
    rest = (1 - chance) / (tokenizer.vocab_size - 1)
    return mx.log(mx.where(mx.arange(tokenizer.vocab_size) == tag, max(chance, 1e-30), rest))[None]


def closed_after(
    tokenizer: Tokenizer,
    text: str,
    budget: int,
    *,
    chance: float = 0,
    draws_tag: bool = False,
    max_tokens: int = 10_000,
) -> tuple[int, str]:
    """Return the tokens of a trace when ids are forced, 0 for never, and the forced text."""
    builder = ReplyBuilder(
        tokenizer, mm.SamplingParams(think_budget=budget, on_loop="ignore"), max_tokens
    )
    head = [] if tokenizer.open_id is None else [tokenizer.open_id]
    ids = [*head, *tokenizer.encode(text if head else f"<think>\n{text}")]
    drawn = mx.array([tokenizer.closing("\n")[0] if draws_tag else 0])
    logits = logits_of(tokenizer, chance)
    for count, identity in enumerate(ids, 1):
        builder.push(Token(identity, logits))
        if forced := builder.forced(logits, drawn):
            return count, tokenizer.decode(forced)
    return 0, ""


LINES = "a b c d e\n" * 20  # 6 tokens a line


def test_a_budget_that_nears_its_end_closes_where_a_line_does(tokenizer: Tokenizer) -> None:
    likely, tag = LIKELY_ENOUGH + 1e-4, "" if tokenizer.version == "v13" else "</think>\n\n"
    line = len(tokenizer.encode("a b c d e\n"))
    head = len(tokenizer.encode("<think>\n")) if tokenizer.open_id is None else 1
    ends = [head + n * line for n in range(21)]
    for budget in range(8, 100):
        near = [end for end in ends if budget - budget // 4 <= end < budget]
        soft = closed_after(tokenizer, LINES, budget, chance=likely)
        hard = budget, "" if tokenizer.version == "v13" else tag if budget in ends else f"\n{tag}"
        assert soft == ((near[0], tag) if near else hard)
        # If the tag is unlikely, or the model draws it itself, only the budget's end closes.
        assert closed_after(tokenizer, LINES, budget, chance=LIKELY_ENOUGH / 2) == hard
        assert closed_after(tokenizer, LINES, budget, chance=likely, draws_tag=True) == hard


def test_logits_are_read_at_the_end_of_a_line_only(tokenizer: Tokenizer) -> None:
    """Read neither logits nor draw far from the budget's end: both would wait for the device."""

    class Unread:
        def item(self) -> int:
            assert tokenizer.version == "v13"
            assert builder.tokens >= 68  # of 90
            return tokenizer.encode(" b")[0]

    builder = ReplyBuilder(tokenizer, mm.SamplingParams(think_budget=90, on_loop="ignore"), 10_000)
    for identity in [
        tokenizer.open_id or 0,
        *tokenizer.encode("<think>\n" + "a b c d e\n" * 9 + "a b c " * 9),
    ][:89]:
        is_near = builder.tokens > 60
        builder.push(Token(identity, mx.zeros((1, 1))))
        if not is_near or not tokenizer.decode([identity]).endswith("\n"):
            assert builder.forced(Unread(), Unread()) == []  # type: ignore[arg-type]


def test_a_line_ends_before_its_newline_where_the_tag_is_a_control_id(tokenizer: Tokenizer) -> None:
    """Close 2507's trace behind the last word, and 2506's on a line of its own."""
    newlines = {text: tokenizer.encode(text) for text in ("\n", "\n\n")}
    assert all(len(ids) == 1 for ids in newlines.values())
    builder = ReplyBuilder(tokenizer, mm.SamplingParams(think_budget=20), 10_000)
    for identity in [tokenizer.open_id or 0, *tokenizer.encode("<think>\n" + "a b c d " * 5)][:18]:
        builder.push(Token(identity, mx.zeros((1, 1))))
    likely = logits_of(tokenizer, 0.5)
    assert builder.forced(likely, mx.array(tokenizer.encode(" b"))) == []
    for unknown in (INVALID, SPILLED):
        assert builder.forced(likely, mx.array([unknown])) == []
    for ids in newlines.values():
        assert builder.forced(logits_of(tokenizer, LIKELY_ENOUGH / 2), mx.array(ids)) == []
    assert builder.forced(likely, mx.array(newlines["\n\n"])) == (
        [35] if tokenizer.version == "v13" else []
    )


def test_a_character_is_completed_first(tokenizer: Tokenizer) -> None:
    text = "🧑‍🚀🪐𓀀" * 4
    sizes = [len(piece) for piece in tokenizer.pieces(text)]
    assert min(sizes) == 1
    for budget in range(6, 40):
        builder = ReplyBuilder(tokenizer, mm.SamplingParams(think_budget=budget), 10_000)
        head = (
            [tokenizer.open_id] if tokenizer.open_id is not None else tokenizer.encode("<think>\n")
        )
        for identity in [*head, *tokenizer.encode(text)]:
            builder.push(Token(identity, mx.zeros((1, 1))))
            if forced := builder.forced(mx.zeros((1, tokenizer.vocab_size)), mx.zeros(1)):
                break
        assert budget <= builder.tokens <= budget + 3
        for identity in forced:
            builder.push(Token(identity, mx.zeros((1, 1))))
        builder.flush()
        reply = builder.reply("stop", Usage(0, 0, 0, 0, 0, 0.0, 0.0, 0, 0, 0))
        shown = reply.reasoning + reply.answer
        assert "\ufffd" not in shown
        assert text.startswith(shown)


@pytest.mark.parametrize(
    ("max_tokens", "reserved"), [(20, 5), (100, 25), (2047, 511), (2048, 512), (4000, 512)]
)
def test_the_answer_keeps_its_share_of_max_tokens(
    tokenizer: Tokenizer, max_tokens: int, reserved: int
) -> None:
    text = "a b c d e " * 900
    count, _ = closed_after(tokenizer, text, 10_000, max_tokens=max_tokens)
    assert max_tokens - count - len(tokenizer.closing("a")) == reserved


def test_a_last_line_that_leaves_nothing_is_refused_at_once(magistral: mm.Magistral) -> None:
    sampling = replace(GREEDY, think_budget=9, think_budget_message=LINE, max_tokens=20)
    for ask in (
        lambda: magistral.stream("What is 1 + 1?", sampling),
        lambda: magistral.stream_samples("x", sampling, n=2),
    ):
        with pytest.raises(
            mm.OptionError, match=r"think_budget_message and the closing tag take .* none is left"
        ):
            ask()
    for wrong in ("a\nb", "</think>", "<think>", "x" * 201, 3, None, "\x1b[2J"):
        with pytest.raises(
            mm.OptionError, match="use one line of at most 200 characters, without tags"
        ):
            mm.SamplingParams(think_budget_message=wrong)  # type: ignore[arg-type]
