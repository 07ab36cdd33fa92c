"""The benchmark of thinking budgets gives the library's own replies."""

import json
from pathlib import Path

import pytest

import magistral_mlx as mm
from benchmarks.__main__ import main
from benchmarks.runtime import budget as benchmark
from benchmarks.runtime.budget import (
    NEVER,
    SEED,
    SHARES,
    Place,
    Trace,
    at_line_ends,
    counts,
    traces,
)
from magistral_mlx.generation.think_budget import LIKELY_ENOUGH
from magistral_mlx.training.demo.problems import KINDS, held_out_problems, is_correct


def test_a_trace_ends_at_the_first_line_that_is_enough_or_with_its_budget() -> None:
    places = [Place(n, n % 4 == 0, n / 100, n == 12) for n in range(3, 17)]
    trace = Trace("add", tuple(places))
    # In the last quarter of 16 are the places 12 to 15; 12 ends a line, with a probability of 0.12.
    assert [trace.right(16, threshold) for threshold in (0.0, 0.12, 0.13, NEVER)] == [
        True,
        True,
        False,
        False,
    ]
    assert trace.right(12, NEVER)
    assert not trace.right(11, 0.0)
    assert sum(row["places"] for row in at_line_ends([trace])) == len(places)
    assert [row["places"] for row in at_line_ends([trace]) if row["from"] is None] == [10]
    assert all(len(row["right"]) == len(SHARES) for row in counts([trace]))


@pytest.mark.slow
def test_the_replies_are_the_librarys() -> None:
    magistral = mm.load("demo")
    n = 1
    problems = held_out_problems(n, SEED, magistral.tokenizer.pieces, KINDS)
    found = list(traces(magistral, n, 0, lambda _: None))
    assert len(found) == n
    for problem, trace in zip(problems, found, strict=True):
        for share in SHARES:
            budget = round(share * trace.places[-1].tokens)
            reply = magistral.ask(
                problem.question, mm.SamplingParams(temperature=0, think_budget=budget)
            )
            assert (
                trace.right(budget, LIKELY_ENOUGH)
                == (reply.answer == problem.answer)
                == is_correct(problem, reply.answer)
            )


@pytest.mark.slow
def test_the_command_counts(tmp_path: Path) -> None:
    file = tmp_path / "budget.json"
    assert main(["budget", "--problems", "3", "--temp", "0", "--json", str(file)]) == 0
    found = json.loads(file.read_text())["budget"]
    assert (found["problems"], found["traces"], len(found["budgets"])) == (
        3,
        3,
        len(benchmark.THRESHOLDS),
    )
