"""pass@1 of graded replies, how sure it is, and what a smaller budget of tokens would have left of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.reasoning.journal import Record

STEPS = (32, 40, 48, 56)  # the smallest budgets; the next are twice those, and so on


@dataclass(frozen=True, slots=True)
class Score:
    """Shares are of 1. Errors are standard errors.

    ``standard_error`` counts the problems as drawn from many such, each as a cluster of its samples
    (arxiv.org/abs/2411.00640); ``sampling_error`` takes them as given, and says how far other seeds would be from
    this; it needs two samples of every problem.
    """

    problems: int
    samples: int
    pass_at_1: float
    standard_error: float | None
    sampling_error: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def score(records: Sequence[Record], budget: int | None = None) -> Score:
    """Of replies that count as wrong where they took more than ``budget`` tokens.

    That is what a reply cut off there is: its ids are the same up to there, and its answer, if it has begun, has not
    ended.
    """
    groups = _by_problem(records, budget)
    means = np.array([np.mean(group) for group in groups.values()])
    P = len(means)
    within = [np.var(group, ddof=1) / len(group) for group in groups.values() if len(group) > 1]
    return Score(
        P,
        len(records),
        float(means.mean()),
        float(means.std(ddof=1) / P**0.5) if P > 1 else None,
        float(np.sqrt(np.sum(within)) / P) if len(within) == P else None,
    )


def against_budget(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The score at budgets from half the shortest reply to the longest, and at what replies were allowed."""
    tokens = [record.completion_tokens for record in records]
    allowed = max(record.max_tokens for record in records)
    steps = [step << doubled for doubled in range(16) for step in STEPS]
    least, most = min(tokens) // 2, max(tokens)
    budgets = [budget for budget in steps if least <= budget < allowed]
    used = [b for i, b in enumerate(budgets) if i == 0 or budgets[i - 1] < most] + [allowed]
    return [{"budget": budget, **score(records, budget).as_dict()} for budget in used]


def _by_problem(records: Sequence[Record], budget: int | None) -> Mapping[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for record in records:
        in_time = budget is None or record.completion_tokens <= budget
        groups.setdefault(record.problem, []).append(float(record.is_correct and in_time))
    return groups
