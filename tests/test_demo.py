"""The embedded model answers problems that it never saw, and its problems are right."""

import ast
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import mistral_common
import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

import magistral_mlx as mm
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.tokenizer.tekken import Tokenizer
from magistral_mlx.training.demo.examples import Examples
from magistral_mlx.training.demo.phrases import HELD_OUT_WORDS, LANGUAGES, PHRASES
from magistral_mlx.training.demo.problems import (
    ARITHMETIC,
    KINDS,
    Problem,
    held_out_problems,
    is_correct,
    is_unseen,
)
from magistral_mlx.training.demo.vocabulary import SPECIAL_TOKENS
from tests.support.tiny import DEMO

GREEDY = mm.SamplingParams(temperature=0)
CARD = mm.SamplingParams()
SIGNS = {"add": "+", "subtract": "-", "multiply": "*"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


@pytest.fixture(scope="module")
def problems(tokenizer: Tokenizer) -> list[Problem]:
    return held_out_problems(2000, 5, tokenizer.pieces, KINDS)


def test_every_equation_of_every_trace_holds(problems: list[Problem]) -> None:
    """Check each ``1+2=3``, and each link of ``3*4=12+1=13``, by Python's arithmetic."""
    checked = 0
    for problem in (p for p in problems if p.kind in ARITHMETIC):
        _, first, *steps, _ = problem.trace.split("\n")
        assert _value(first) == problem.expected
        for sides in (re.match(r"[\d+*=-]*", step)[0].split("=") for step in steps):  # type: ignore[index]
            # Of 9*4=36+3=39: 9*4 is 36, and 36+3 is 39.
            for left, right in pairwise(sides):
                assert _value(left) == int(right.split("+")[0]), problem
                checked += 1
        assert problem.trace.endswith(f"\n= {problem.expected}")
    assert checked > 2000


def _value(expression: str) -> int:
    assert re.fullmatch(r"[\d+*-]+", expression)
    return int(eval(compile(ast.parse(expression, mode="eval"), "trace", "eval")))


def test_every_word_is_spelled_and_counted(problems: list[Problem]) -> None:
    words = {w for words in HELD_OUT_WORDS.values() for w in words.split()}
    for problem in (p for p in problems if p.kind == "letters"):
        spelled = spelling(problem)
        word = "".join(c for c, _ in spelled)
        assert word in words
        assert word in problem.question
        letter = re.search(r"(?:letter|lettre|Buchstabe|letra|lettera) (\w) ", problem.answer)[1]  # type: ignore[index]
        assert problem.expected == word.lower().count(letter) == spelled[-1][1]
        assert [n for _, n in spelled] == [
            word[: i + 1].lower().count(letter) for i in range(len(word))
        ]


def spelling(problem: Problem) -> list[tuple[str, int]]:
    """Return the letters of a trace and their counts: " st: s0 t0" gives ("s", 0), ("t", 0)."""
    lines = problem.trace.split("\n")[1:-1]
    return [(pair[0], int(pair[1:])) for line in lines for pair in line.split(": ", 1)[1].split()]


def test_every_language_and_kind_is_asked_and_answered_in_its_words(
    problems: list[Problem],
) -> None:
    counts = Counter((p.kind, p.language) for p in problems)
    assert set(counts) == {(kind, language) for kind in KINDS for language in LANGUAGES}
    for problem in problems:
        phrases = PHRASES[problem.language]
        assert problem.trace.startswith(
            phrases.spell if problem.kind == "letters" else phrases.intro
        )
        assert is_correct(problem, problem.answer)
        assert not is_correct(
            problem, problem.answer.replace(str(problem.expected), str(problem.expected + 1))
        )


@pytest.mark.slow
def test_training_never_sees_held_out_problems(tokenizer: Tokenizer) -> None:
    examples = Examples(Tekkenizer.from_file(DEMO / "tekken.json"), seed=1)
    words = {w.lower() for words in HELD_OUT_WORDS.values() for w in words.split()}
    assert len(words) > 150
    assert "strawberry" in words
    seen = dict.fromkeys(ARITHMETIC, 0)
    for _ in range(20_000):
        problem = examples.problem()
        if problem.kind == "letters":
            assert "".join(c for c, _ in spelling(problem)).lower() not in words
        else:
            a, b = operands(problem)
            assert crc32(f"{a}{SIGNS[problem.kind]}{b}".encode()) % 16
            seen[problem.kind] += 1
    assert min(seen.values()) > 4000
    for problem in held_out_problems(200, 0, tokenizer.pieces):
        a, b = map(int, re.split(r"[+*]|(?<=\d)-", problem.trace.split("\n")[1]))
        assert is_unseen(problem.kind, a, b)


def operands(problem: Problem) -> tuple[int, int]:
    """Return the two numbers in the order of the sum.

    A trace multiplies by the smaller number, and a question may name the subtrahend first.
    """
    line = problem.question if problem.kind == "multiply" else problem.trace.split("\n")[1]
    a, b = map(int, re.findall(r"\d+", line)[:2])
    return a, b


def test_the_vocabulary_is_the_head_of_the_real_one() -> None:
    """Check that pieces and order are the same, so that results hold for all 131,072 ids."""
    whole = json.loads(
        (Path(mistral_common.__file__).parent / "data" / "tekken_240911.json").read_text()
    )
    cut = json.loads((DEMO / "tekken.json").read_text())
    assert cut["vocab"] == whole["vocab"][: len(cut["vocab"])]
    assert [t["token_str"] for t in cut["special_tokens"]][:5] == [
        "<unk>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
    ]
    assert (cut["config"]["version"], cut["config"]["default_vocab_size"]) == ("v11", 2048)


def test_training_text_is_encoded_as_by_mistral_common() -> None:
    """Cut conversations at their control ids and let mistral-common join them again."""
    examples = Examples(Tekkenizer.from_file(DEMO / "tekken.json"), seed=2)
    reference = MistralTokenizer.from_file(
        str(DEMO / "tekken.json"), mode=ValidationMode.finetuning
    )
    kinds = Counter()
    for _ in range(300):
        ids, learned = examples.conversation()
        if not all(learned[len(ids) - ids[::-1].index(SPECIAL_TOKENS.index("[/INST]")) :]):
            # Part of the last trace is forced, as in the runtime.
            continue
        parts = re.split(
            r"(<s>|</s>|\[/?\w+\])", examples.tokenizer.decode(ids, SpecialTokenPolicy.KEEP)
        )
        makers = {
            "[SYSTEM_PROMPT]": SystemMessage,
            "[INST]": UserMessage,
            "[/INST]": AssistantMessage,
        }
        found = zip(parts[1::2], parts[2::2], strict=True)
        messages = [makers[tag](content=text) for tag, text in found if tag in makers]
        assert (
            reference.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens == ids
        )
        kinds[isinstance(messages[0], SystemMessage), len(messages) > 3] += 1
    assert len(kinds) == 4


def test_the_checkpoint_has_the_published_layout() -> None:
    checkpoint = open_checkpoint(DEMO)
    config = checkpoint.config
    assert checkpoint.raw_config["model_type"] == "mistral"
    assert config.head_dim * config.num_heads != config.hidden_size
    assert config.num_kv_heads < config.num_heads
    assert (config.rope_theta, config.tie_word_embeddings) == (1e9, False)
    assert len(checkpoint.shards) == 2
    assert {e.dtype for shard in checkpoint.shards for e in shard.header.values()} == {"BF16"}
    assert sum(f.stat().st_size for f in DEMO.iterdir() if f.is_file()) < 16e6


def accuracy(
    magistral: mm.Magistral, problems: list[Problem], sampling: mm.SamplingParams
) -> float:
    replies = [(p, magistral.ask(p.question, sampling)) for p in problems]
    return sum(
        is_correct(p, r.answer) and r.reasoning_closed_by == "model" for p, r in replies
    ) / len(problems)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loaded", "sampling", "kinds", "count", "least"),
    [
        ((DEMO, None), GREEDY, ARITHMETIC, 500, 0.98),
        (("demo", None), GREEDY, ARITHMETIC, 500, 0.97),
        (("demo", 8), GREEDY, ARITHMETIC, 200, 0.97),
        ((DEMO, None), mm.SamplingParams(seed=1), ARITHMETIC, 200, 0.95),
        ((DEMO, None), GREEDY, ("letters",), 200, 0.90),
    ],
    ids=["bf16", "4 bit", "4 bit, 8-bit cache", "bf16 sampled", "letters"],
)
def test_accuracy_on_held_out_problems(
    tokenizer: Tokenizer,
    *,
    loaded: tuple[str | Path, int | None],
    sampling: mm.SamplingParams,
    kinds: tuple[str, ...],
    count: int,
    least: float,
) -> None:
    model, kv_bits = loaded
    problems = held_out_problems(count, 2026, tokenizer.pieces, kinds)
    assert accuracy(mm.load(model, kv_bits=kv_bits), problems, sampling) >= least


@pytest.mark.parametrize("system", [None, "Sois bref.", "You teach mathematics to children."])
def test_it_reasons_in_the_language_asked_whatever_else_the_system_prompt_says(
    system: str | None,
) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    reply = mm.load("demo").ask(
        [*messages, {"role": "user", "content": "Combien font 12 + 30 ?"}], GREEDY
    )
    assert reply.reasoning.startswith(PHRASES["fr"].intro)
    assert "**42**" in reply.answer


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["all", "none"])
def test_several_problems_in_one_conversation(keep: str) -> None:
    chat = mm.load("demo").chat(keep_reasoning=keep)  # type: ignore[arg-type]
    assert "**42**" in chat.ask("What is 12 + 30?", GREEDY).answer
    assert "**56**" in chat.ask("What is 7 * 8?", GREEDY).answer
    assert "**-5**" in chat.ask("What is 10 - 15?", GREEDY).answer


@pytest.mark.slow
@pytest.mark.parametrize("think_budget", [0, 4, 15])
def test_a_trace_forced_to_end_is_followed_by_a_well_formed_answer(think_budget: int) -> None:
    """Check that the answer is hardly ever right without a trace."""
    magistral = mm.load("demo")
    sampling = mm.SamplingParams(temperature=0, think_budget=think_budget, max_tokens=100)
    for phrases in PHRASES.values():
        reply = magistral.ask(phrases.spoken["add"][0].format(a=48, b=76), sampling)
        assert (reply.finish_reason, reply.reasoning_closed_by) == ("stop", "budget")
        assert phrases.intro.startswith(reply.reasoning[: len(phrases.intro)])
        before, after = phrases.result.split("{r}")
        assert reply.answer.startswith(before)
        assert reply.answer.endswith(after)
        assert re.fullmatch(r"-?\d+", reply.answer.removeprefix(before).removesuffix(after))
