"""Thinking budgets of the demo: a trace that is cut off is closed, and an answer follows."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

import magistral_mlx as mm
from magistral_mlx.demo import demo_checkpoint
from magistral_mlx.generation import think_budget as budget_module
from magistral_mlx.generation.row_costs import LINEAR, RowCosts
from magistral_mlx.training.demo.phrases import PHRASES
from magistral_mlx.training.demo.problems import KINDS, held_out_problems

GREEDY = mm.SamplingParams(temperature=0)
LINE = "Time is up, so I answer now."
FREE = (1.0,) * 8  # what passes over more rows cost where rows cost nothing


@pytest.fixture(scope="module")
def magistral() -> mm.Magistral:
    return mm.load("demo")


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
    sampling = mm.SamplingParams(
        temperature=temperature, seed=4, think_budget=budget, max_tokens=90
    )
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


@pytest.mark.slow
@pytest.mark.usefixtures("every_line_is_enough")
def test_a_line_that_is_enough_in_a_packed_cache() -> None:
    packed = mm.load(demo_checkpoint(), kv_bits=8)
    sampling = replace(GREEDY, think_budget=30, seed=4, max_tokens=90)
    alone = packed.ask(QUESTION, sampling)
    assert alone.reasoning_closed_by == "budget"
    assert alone.usage.reasoning_tokens < 30 + len(packed.tokenizer.closing("\n"))
    (together, _) = packed.sample(QUESTION, sampling, n=2).replies
    assert (together.reasoning, together.answer) == (alone.reasoning, alone.answer)
