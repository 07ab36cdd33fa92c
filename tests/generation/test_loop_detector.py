"""The loop detector finds every loop of a built corpus, and none in honest repetitive text."""

import itertools
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

import magistral_mlx as mm
from magistral_mlx.demo import demo_checkpoint
from magistral_mlx.generation.decoding import Token
from magistral_mlx.generation.loop_detector import EXACT_TOKENS, LONGEST, LoopDetector
from magistral_mlx.generation.reply import ReplyBuilder
from magistral_mlx.tokenizer.tekken import Tokenizer
from magistral_mlx.training.demo.problems import KINDS, held_out_problems
from tests.support.tekken import write_tekken
from tests.support.tiny import make_config, make_weights, write_checkpoint

WORDS = (
    *("wait", "let", "me", "check", "whether", "the", "sum", "of", "both", "is", "even"),
    *("so", "that", "we", "can", "go", "on", "with", "this", "proof", "again"),
)
SENTENCES = {
    "en": "Wait, let me try {} again, because the product of both has to be even.",
    "de": "Moment, ich versuche {} noch einmal, weil das Produkt der beiden gerade sein muss.",
    "fr": "Attends, j'essaie encore {} parce que le produit des deux doit être pair.",
    "ru": "Подожди, попробую ещё раз {} потому что произведение обоих должно быть чётным.",
    "hi": "रुको, मैं फिर से {} आज़माता हूँ क्योंकि दोनों का गुणनफल सम होना चाहिए।",
}


def pieces(text: str) -> list[str]:
    """Split a text roughly as Tekken does: words with their space, single digits and marks."""
    return re.findall(r" ?(?:[^\W\d]|[\u0900-\u0963])+|\d|\s|[^\w\s]", text)


def found_at(tokens: Iterable[str]) -> int | None:
    """Return how many tokens the detector needed; None if it found nothing."""
    detector = LoopDetector()
    return next((n for n, token in enumerate(tokens, start=1) if detector.push(token)), None)


def distinct(count: int, seed: int) -> list[str]:
    """Return a block without a repetition of its own."""
    rng = random.Random(seed)
    endings = [f"{a}{b}{c}" for c in "uvwxyz" for b in "klmnopqrst" for a in "abcdefghij"]
    return [f" {rng.choice(WORDS)}{endings[i % 600]}" for i in range(count)]


@pytest.mark.parametrize("period", [20, 21, 37, 100, 333, 599])
@pytest.mark.parametrize("before", [0, 1, 50])
def test_an_exact_loop_is_found_with_its_third_block(period: int, before: int) -> None:
    block = distinct(period, period)
    tokens = [f"{n}." for n in range(before)] + 5 * block
    assert found_at(tokens) == before + 3 * period


@pytest.mark.parametrize("period", [3, 7, 19])
def test_a_short_block_is_found_at_60_tokens(period: int) -> None:
    tokens = [".", *itertools.islice(itertools.cycle(distinct(period, period)), 200)]
    assert found_at(tokens) == 61


@pytest.mark.parametrize("block", [[" wait"], [" no", ","], ["0"], ["=", "="], ["\n"]])
def test_a_block_of_few_words_is_found_at_400_tokens(block: list[str]) -> None:
    assert found_at(itertools.islice(itertools.cycle(block), 399)) is None
    assert found_at(itertools.islice(itertools.cycle(block), 500)) == 400


def test_the_longest_block_and_no_longer() -> None:
    block = [f" w{n}x" for n in range(LONGEST + 1)]
    assert found_at(4 * block[:-1]) == 3 * LONGEST
    assert found_at(4 * block) is None


@pytest.mark.parametrize("language", SENTENCES)
@pytest.mark.parametrize("start", [0, 7, 95])
def test_a_loop_in_which_only_numbers_change(language: str, start: int) -> None:
    """Let the numbers change their lengths, too: 9 is followed by 10, and 99 by 100."""
    blocks = [pieces(SENTENCES[language].format(n) + "\n") for n in range(start, start + 40)]
    at = found_at(itertools.chain(*blocks))
    ends = list(itertools.accumulate(map(len, blocks)))
    eighth = next(n for n, end in enumerate(ends, start=1) if n >= 8 and end >= 200)
    assert at is not None
    assert at <= ends[eighth - 1]
    assert at >= 200
    assert at > ends[6]


def test_a_pause_in_a_loop_begins_it_anew() -> None:
    block = distinct(30, 1)
    assert found_at(2 * block + [" but"] + 2 * block + [" now"] + block) is None


def code() -> Iterator[str]:
    for n in range(40):
        yield f"    if values[{n}] > limit:\n        total += values[{n}] * {n * n}\n    }}\n"
    yield "}\n" * 12
    yield "assert encode(decode(ids)) == ids\n" * 2


def table() -> Iterator[str]:
    yield "| n | n squared | even |\n|---|---|---|\n"
    for n in range(60):
        yield f"| {n} | {n * n} | {'yes' if n % 2 == 0 else 'no'} |\n"
    yield "+-------" * 10 + "\n" + ("| 0 | 0 | 0 | 0 |\n" * 8)
    yield "=" * 120 + "\n" + "0" * 120


def numbered() -> Iterator[str]:
    rng = random.Random(2)
    for n in range(1, 60):
        yield f"{n}. {' '.join(rng.sample(WORDS, 6))}\n"
    for n in range(1, 60):
        yield f"- r: {n}\n"


def counting() -> Iterator[str]:
    for n in range(1, 61):
        yield f"{n} x 7 = {n * 7}\n"
    yield ", ".join(map(str, range(300)))


@pytest.mark.parametrize("text", [code, table, numbered, counting])
def test_text_that_repeats_itself_honestly_is_no_loop(text: object) -> None:
    assert callable(text)
    assert found_at(pieces("".join(text()))) is None


@pytest.mark.slow
def test_the_sources_of_this_project_are_no_loop() -> None:
    files = sorted(Path(__file__).parents[2].glob("magistral_mlx/**/*.py"))
    assert len(files) > 20
    assert [path.name for path in files if found_at(pieces(path.read_text())) is not None] == []


@pytest.mark.slow
def test_500_traces_of_the_demo_are_no_loop() -> None:
    tokenizer = Tokenizer.from_folder(demo_checkpoint())
    problems = held_out_problems(500, 7, tokenizer.pieces, KINDS)
    looping = [
        p.trace
        for p in problems
        if found_at(b.decode(errors="replace") for b in tokenizer.pieces(p.trace))
    ]
    assert looping == []


# A reply with a loop


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)


def build(text: str, on_loop: str) -> tuple[ReplyBuilder, list[int]]:
    """Push a reply's ids until it stops or forces ids; return these."""
    tokenizer = Tokenizer.from_folder(demo_checkpoint())
    builder = ReplyBuilder(tokenizer, mm.SamplingParams(on_loop=on_loop), 10_000)  # type: ignore[arg-type]
    for identity in ids_of(tokenizer, text):
        builder.push(Token(identity, mx.zeros((1, 1))))
        forced = builder.forced(mx.zeros((1, 1)), mx.zeros(1))
        if forced or builder.is_stopped:
            return builder, list(forced)
    return builder, []


LOOP = 30 * "Let me think about the sum of both numbers again and again.\n"


def test_a_loop_in_the_trace_closes_it() -> None:
    builder, forced = build(f"<think>\n{LOOP}", "close")
    assert builder.tokenizer.decode(forced) == "\n</think>\n\n"
    assert builder.tokens < 200
    assert not builder.is_stopped


def test_a_loop_in_the_answer_stops_the_reply() -> None:
    for text, on_loop in ((f"<think>\nA\n</think>\n{LOOP}", "close"), (f"<think>\n{LOOP}", "stop")):
        builder, forced = build(text, on_loop)
        assert builder.is_stopped
        assert forced == []
        assert builder.reply("stop", None).finish_reason == "loop"  # type: ignore[arg-type]


def test_a_loop_is_ignored_when_that_is_asked_for() -> None:
    builder, forced = build(f"<think>\n{LOOP}", "ignore")
    assert (builder.is_stopped, forced) == (False, [])


@pytest.fixture(scope="module", params=["v11", "v13"])
def looping(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> mm.Magistral:
    """Write a checkpoint whose trace repeats itself for ever.

    Each id's logits are largest for the next id of a chain. The layers add nothing, and lm_head
    reads the next id off the embedding.
    """
    folder = write_tekken(tmp_path_factory.mktemp("model"), version=request.param)
    tokenizer = Tokenizer.from_folder(folder)
    opening = [34] if request.param == "v13" else tokenizer.encode("<think>\n")
    loop, closed = (
        tokenizer.encode(" so we can go on with this and then with that"),
        tokenizer.closing("a")[-1],
    )
    chains = [[4, *opening, *loop, loop[0]], [closed, *tokenizer.encode(ANSWER), 2]]
    following = dict(pair for chain in reversed(chains) for pair in itertools.pairwise(chain))
    config = make_config(vocab_size=2048, num_layers=1)
    assert len(following) <= config.hidden_size
    weights = {n: w if w.ndim == 1 else mx.zeros_like(w) for n, w in make_weights(config).items()}
    for i, (identity, then) in enumerate(following.items()):
        weights["model.embed_tokens.weight"][identity, i] = 1
        weights["lm_head.weight"][then, i] = 1
    return mm.load(write_checkpoint(folder, config, weights))


ANSWER = "42!"


@pytest.mark.slow
def test_a_model_that_loops_answers_or_stops_as_asked(looping: mm.Magistral) -> None:
    sampling = mm.SamplingParams(temperature=0, max_tokens=600)
    closed = looping.ask("x", sampling)
    assert (closed.answer, closed.reasoning_closed_by, closed.finish_reason) == (
        ANSWER,
        "loop",
        "stop",
    )
    assert EXACT_TOKENS <= closed.usage.reasoning_tokens < 2 * EXACT_TOKENS
    stopped = looping.ask("x", replace(sampling, on_loop="stop"))
    assert (stopped.answer, stopped.reasoning_closed_by, stopped.finish_reason) == (
        "",
        None,
        "loop",
    )
    assert closed.reasoning.startswith(stopped.reasoning)
    ignored = looping.ask("x", replace(sampling, on_loop="ignore"))
    assert (ignored.answer, ignored.finish_reason, ignored.usage.completion_tokens) == (
        "",
        "length",
        600,
    )
    budgeted = looping.ask("x", replace(sampling, on_loop="ignore", think_budget=10_000))
    assert (budgeted.answer, budgeted.reasoning_closed_by, budgeted.finish_reason) == (
        ANSWER,
        "budget",
        "stop",
    )
    together = looping.sample("x", replace(sampling, seed=1), n=2).replies
    assert {(r.reasoning, r.answer, r.reasoning_closed_by) for r in together} == {
        (closed.reasoning, ANSWER, "loop")
    }


@pytest.mark.slow
def test_500_replies_of_the_demo_are_no_loop() -> None:
    """Sample the demo's traces at the card's settings."""
    magistral = mm.load("demo")
    problems = held_out_problems(500, 23, magistral.tokenizer.pieces, KINDS)
    replies = [
        magistral.ask(p.question, mm.SamplingParams(seed=seed)) for seed, p in enumerate(problems)
    ]
    assert {(r.reasoning_closed_by, r.finish_reason) for r in replies} == {("model", "stop")}


def test_on_loop_is_one_of_three() -> None:
    with pytest.raises(mm.OptionError, match="on_loop is 'maybe'; use one of close, stop, ignore"):
        mm.SamplingParams(on_loop="maybe")  # type: ignore[arg-type]
