"""The thinking budget: a trace ends at the right place with a tag, and an answer follows."""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import pytest

import magistral_mlx as mm
from magistral_mlx.demo import demo_checkpoint
from magistral_mlx.generation import think_budget as budget_module
from magistral_mlx.generation.decoding import Token
from magistral_mlx.generation.reply import ReplyBuilder, Usage
from magistral_mlx.generation.row_costs import LINEAR, RowCosts
from magistral_mlx.generation.sampling import INVALID, SPILLED
from magistral_mlx.generation.think_budget import LIKELY_ENOUGH
from magistral_mlx.tokenizer.reasoning import TagSplitter, closing
from magistral_mlx.tokenizer.tekken import Tokenizer
from magistral_mlx.training.demo.phrases import PHRASES
from magistral_mlx.training.demo.problems import KINDS, held_out_problems
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


# The ids that close a trace


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


# The place where a trace is closed


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


# On the demo


def test_a_last_line_ends_the_trace_and_an_answer_follows(magistral: mm.Magistral) -> None:
    question, phrases = "What is 481 + 76?", PHRASES["en"]
    whole = magistral.ask(question, GREEDY)
    for budget in (8, 14, 19):
        reply = magistral.ask(
            question, replace(GREEDY, think_budget=budget, think_budget_message="Enough.")
        )
        before, _, last = reply.reasoning.rpartition("\n")
        assert last == "Enough."
        assert whole.reasoning.startswith(before)
        assert reply.answer.startswith(phrases.result.partition("{r}")[0])
        assert (reply.reasoning_closed_by, reply.finish_reason) == ("budget", "stop")


@pytest.mark.parametrize("problems", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_a_budget_that_is_not_used_up_changes_nothing(
    magistral: mm.Magistral, problems: int
) -> None:
    for problem in held_out_problems(problems, 3, magistral.tokenizer.pieces, KINDS):
        free = magistral.ask(problem.question, GREEDY)
        for more in (0, 5):
            budget = free.usage.reasoning_tokens + more
            reply = magistral.ask(problem.question, replace(GREEDY, think_budget=budget))
            assert (reply.reasoning, reply.answer) == (free.reasoning, free.answer)
            assert reply.reasoning_closed_by == "model"


def closes_and_answers(free: mm.Reply, reply: mm.Reply, budget: int) -> None:
    """Cut the trace of a reply without a budget, and answer; a budget of 0 has no trace."""
    assert budget or (reply.usage.reasoning_tokens == 0 and reply.reasoning == "")
    if free.usage.reasoning_tokens > budget:
        assert reply.reasoning_closed_by == "budget"
    assert reply.reasoning_closed_by in ("budget", "model")
    assert free.reasoning.startswith(reply.reasoning)
    assert reply.answer.strip()
    assert "think>" not in reply.answer
    assert reply.finish_reason == "stop"


@pytest.mark.parametrize(
    ("problems", "seeds", "budgets"),
    [
        (1, range(2), (0, 1, 2, 9, 18, 27, 36)),
        pytest.param(20, range(3), range(0, 40, 3), marks=pytest.mark.slow),
    ],
    ids=["quick", "many"],
)
def test_a_budget_below_the_trace_always_gives_a_closed_trace_and_an_answer(
    magistral: mm.Magistral, problems: int, seeds: Sequence[int], budgets: Sequence[int]
) -> None:
    for problem in held_out_problems(problems, 17, magistral.tokenizer.pieces, KINDS):
        for seed in seeds:
            sampling = mm.SamplingParams(temperature=0.7 * (seed > 0), seed=seed)
            free = magistral.ask(problem.question, sampling)
            for budget in budgets:
                reply = magistral.ask(problem.question, replace(sampling, think_budget=budget))
                closes_and_answers(free, reply, budget)


@pytest.fixture
def every_line_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "LIKELY_ENOUGH", 0.0)


QUESTION = "What is 481 - 47?"


@pytest.mark.usefixtures("every_line_is_enough")
@pytest.mark.parametrize(
    ("budget", "temperature"),
    [
        pytest.param(22, 0.7, marks=pytest.mark.slow),
        (30, 0),
        pytest.param(38, 0.7, marks=pytest.mark.slow),
    ],
)
def test_a_line_that_is_enough_is_so_in_fewer_passes_and_side_by_side(
    magistral: mm.Magistral, budget: int, temperature: float
) -> None:
    """Give the same ids drafted, among others or alone, and with a quantized cache."""
    sampling = mm.SamplingParams(temperature, seed=4, think_budget=budget, max_tokens=90)
    plain = [magistral.ask(QUESTION, replace(sampling, seed=seed)) for seed in (4, 5, 6)]
    hard = budget + len(magistral.tokenizer.closing("\n"))
    assert any(reply.usage.reasoning_tokens < hard for reply in plain)
    assert {reply.reasoning_closed_by for reply in plain} == {"budget"}
    together = magistral.sample(QUESTION, sampling, n=3).replies
    magistral.prefix_cache.clear()
    magistral.speculation.costs = RowCosts(0.02, FREE)
    try:
        drafted = magistral.ask(QUESTION, sampling)
    finally:
        magistral.speculation.costs = LINEAR
        magistral.prefix_cache.clear()
    assert drafted.usage.forward_passes < plain[0].usage.forward_passes
    said = [
        (r.reasoning, r.answer, r.reasoning_closed_by, r.usage.reasoning_tokens)
        for r in (*plain, drafted)
    ]
    assert [
        (r.reasoning, r.answer, r.reasoning_closed_by, r.usage.reasoning_tokens) for r in together
    ] == said[:3]
    assert said[3] == said[0]


@pytest.mark.usefixtures("every_line_is_enough")
def test_a_line_that_is_enough_in_a_packed_cache() -> None:
    packed = mm.load(demo_checkpoint(), kv_bits=8)
    sampling = replace(GREEDY, think_budget=30, seed=4, max_tokens=90)
    alone = packed.ask(QUESTION, sampling)
    assert alone.reasoning_closed_by == "budget"
    assert alone.usage.reasoning_tokens < 30 + len(packed.tokenizer.closing("\n"))
    (together, _) = packed.sample(QUESTION, sampling, n=2).replies
    assert (together.reasoning, together.answer) == (alone.reasoning, alone.answer)
