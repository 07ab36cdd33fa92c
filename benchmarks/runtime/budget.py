"""What a thinking budget costs in right answers of the embedded model, by where it lets a trace end."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from magistral_mlx.engine.magistral import Magistral
from magistral_mlx.generation.decoding import Stepper
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.think_budget import NEARING
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.training.demo.problems import KINDS, Problem, held_out_problems

SEED = 2027  # of the problems
SHARES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)  # budgets, of what the trace takes without one
NEVER = 2.0  # a probability that no closing tag has: only the budget's end closes
THRESHOLDS = (NEVER, 0.0, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.3)


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a trace where it may be closed."""

    tokens: int  # before it
    is_line_end: bool
    chance: float  # of the closing tag
    is_right: bool  # the most probable answer, where the trace is closed here


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace as the model writes it, up to its closing tag."""

    kind: str  # of the problem
    places: tuple[Place, ...]

    def right(self, budget: int, threshold: float) -> bool:
        """Whether the answer is right with this budget, where a line ends the trace from this probability on."""
        near = (
            place for place in self.places if budget - budget // NEARING <= place.tokens < budget
        )
        enough = (place for place in near if place.is_line_end and place.chance >= threshold)
        last = min(self.places, key=lambda place: abs(place.tokens - budget))
        return next(enough, last).is_right


def traces(
    magistral: Magistral, n: int, temperature: float, report: Callable[[str], None]
) -> Iterator[Trace]:
    """Traces to held-out problems of all kinds, each closed at the end of every line and of every budget."""
    for number, problem in enumerate(held_out_problems(n, SEED, magistral.tokenizer.pieces, KINDS)):
        prompt = magistral.tokenizer.encode_chat(problem.question)
        reply = magistral.ask(
            problem.question, SamplingParams(temperature=temperature, seed=number)
        )
        if reply.reasoning_closed_by == "model":
            yield Trace(
                problem.kind,
                _places(magistral, prompt, magistral.prefix_cache.ids[len(prompt) :], problem),
            )
        report(f"{number + 1} of {n} problems")


def _places(
    magistral: Magistral, prompt: Sequence[int], reply: Sequence[int], problem: Problem
) -> tuple[Place, ...]:
    tokenizer = magistral.tokenizer
    tag, answer = tokenizer.closing("\n"), [*tokenizer.encode(problem.answer), tokenizer.eos_id]
    trace = reply[: reply.index(tag[0])]
    step = Stepper(
        magistral.model,
        KVCache(magistral.config, limit=len(prompt) + len(trace) + len(answer) + 99),
    )
    chances = np.array(
        mx.softmax(step(mx.array([[*prompt, *trace]]), len(trace)), axis=-1)[:, tag[0]]
    )
    found = []
    for tokens in range(len(trace), 0, -1):
        text = tokenizer.decode(trace[:tokens])
        is_line_end = text.endswith("\n")
        if is_line_end or tokens in {_budget(len(trace), share) for share in (*SHARES, 1)}:
            forced = [*tokenizer.closing(text), *answer]
            step.cache.trim(step.cache.length - len(prompt) - tokens)
            best = mx.argmax(step(mx.array([forced[:-1]]), len(answer)), axis=-1).tolist()
            found.append(Place(tokens, is_line_end, float(chances[tokens - 1]), best == answer))
    return tuple(reversed(found))


def counts(found: Sequence[Trace]) -> list[dict[str, Any]]:
    """For every threshold the right answers at each of the budgets, of all traces."""
    return [
        {
            "threshold": threshold,
            "right": [
                sum(t.right(_budget(t.places[-1].tokens, s), threshold) for t in found)
                for s in SHARES
            ],
        }
        for threshold in THRESHOLDS
    ]


def _budget(tokens: int, share: float) -> int:
    return round(share * tokens)


def at_line_ends(found: Sequence[Trace]) -> list[dict[str, Any]]:
    """How often the answer is right where a trace is closed at the end of a line, by the tag's probability there."""
    places = [place for trace in found for place in trace.places if place.is_line_end]
    edges = [0.0, *(t for t in THRESHOLDS if 0 < t < 1), 1.01]
    rows = []
    for low, high in pairwise(edges):
        those = [place for place in places if low <= place.chance < high]
        rows.append(
            {"from": low, "places": len(those), "right": sum(place.is_right for place in those)}
        )
    inside = [place for trace in found for place in trace.places if not place.is_line_end]
    return [
        *rows,
        {"from": None, "places": len(inside), "right": sum(place.is_right for place in inside)},
    ]
