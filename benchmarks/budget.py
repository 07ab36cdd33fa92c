"""What a thinking budget costs in right answers of the embedded model, by where it lets a trace end."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from magistral_mlx.api import Magistral
from magistral_mlx.budget import NEARING
from magistral_mlx.cache import KVCache
from magistral_mlx.decoding import Stepper
from magistral_mlx.demo.problems import KINDS, Problem, held_out_problems
from magistral_mlx.sampling import SamplingParams

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
        near = (place for place in self.places if budget - budget // NEARING <= place.tokens < budget)
        enough = (place for place in near if place.is_line_end and place.chance >= threshold)
        last = min(self.places, key=lambda place: abs(place.tokens - budget))
        return next(enough, last).is_right


def traces(magistral: Magistral, n: int, temperature: float, report: Callable[[str], None]) -> Iterator[Trace]:
    """Traces to held-out problems of all kinds, each closed at every place."""
    for number, problem in enumerate(held_out_problems(n, SEED, magistral.tokenizer.pieces, KINDS)):
        prompt = magistral.tokenizer.encode_chat(problem.question)
        reply = magistral.ask(problem.question, SamplingParams(temperature=temperature, seed=number))
        if reply.reasoning_closed_by == "model":
            yield Trace(problem.kind, tuple(_places(magistral, prompt, magistral.past.ids[len(prompt) :], problem)))
        report(f"{number + 1} of {n} problems")


def _places(magistral: Magistral, prompt: Sequence[int], reply: Sequence[int], problem: Problem) -> Iterator[Place]:
    tokenizer = magistral.tokenizer
    tag, answer = tokenizer.closing("\n"), [*tokenizer.encode(problem.answer), tokenizer.eos_id]
    step = Stepper(magistral.model, KVCache(magistral.config, limit=len(prompt) + len(reply) + len(answer) + 99))
    step(mx.array([prompt]))
    for tokens, identity in enumerate(reply, 1):
        if identity == tag[0]:
            return
        chances = mx.softmax(step(mx.array([[identity]])), axis=-1)
        text = tokenizer.decode(reply[:tokens])
        if not text.startswith("<think>"):
            continue
        forced = [*tokenizer.closing(text), *answer]
        best = mx.argmax(step(mx.array([forced[:-1]]), len(answer)), axis=-1)
        step.cache.trim(len(forced) - 1)
        yield Place(tokens, text.endswith("\n"), float(np.array(chances)[0, tag[0]]), np.array(best).tolist() == answer)


def counts(found: Sequence[Trace]) -> list[dict[str, Any]]:
    """For every threshold the right answers at each of the budgets, of all traces."""
    return [
        {"threshold": threshold, "right": [sum(t.right(_budget(t, s), threshold) for t in found) for s in SHARES]}
        for threshold in THRESHOLDS
    ]


def _budget(trace: Trace, share: float) -> int:
    return round(share * trace.places[-1].tokens)


def at_line_ends(found: Sequence[Trace]) -> list[dict[str, Any]]:
    """How often the answer is right where a trace is closed at the end of a line, by the tag's probability there."""
    places = [place for trace in found for place in trace.places if place.is_line_end]
    edges = [0.0, *(t for t in THRESHOLDS if 0 < t < 1), 1.01]
    rows = []
    for low, high in pairwise(edges):
        those = [place for place in places if low <= place.chance < high]
        rows.append({"from": low, "places": len(those), "right": sum(place.is_right for place in those)})
    inside = [place for trace in found for place in trace.places if not place.is_line_end]
    return [*rows, {"from": None, "places": len(inside), "right": sum(place.is_right for place in inside)}]
