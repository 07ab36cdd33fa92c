"""pass@1 of graded replies, its standard errors, and the score with a smaller token budget."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.reasoning.journal import Record

STEPS = (32, 40, 48, 56)  # the smallest budgets; the next are twice those, and so on


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of 1, and their standard errors.

    ``standard_error`` takes the problems as drawn from many, each a cluster of its samples
    (https://arxiv.org/abs/2411.00640). ``sampling_error`` takes the problems as given and counts
    the seeds; it needs two samples of every problem.
    """

    problems: int
    samples: int
    pass_at_1: float
    standard_error: float | None
    sampling_error: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def score(records: Sequence[Record], budget: int | None = None) -> Score:
    """Score replies; one of more than ``budget`` tokens is wrong, as if it had been cut off."""
    groups = list(_by_problem(records, budget).values())
    means = np.array([np.mean(group) for group in groups])
    P = len(means)
    within = [np.var(group, ddof=1) / len(group) for group in groups if len(group) > 1]
    return Score(
        P,
        len(records),
        float(means.mean()),
        float(means.std(ddof=1) / P**0.5) if P > 1 else None,
        float(np.sqrt(np.sum(within)) / P) if len(within) == P else None,
    )


def against_budget(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Score budgets from half the shortest reply to the longest, and the budget of the run."""
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
