"""Passes that drafting saves, counted without a clock, so every machine gives the same figures.

A table gives a chip's cost of a pass over M rows. The replies are scripted, except for those of
the embedded model.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

import magistral_mlx as mm
from magistral_mlx.generation.decoding import decode
from magistral_mlx.generation.drafting import Drafter, GuessSource, PromptLookup
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.sampling import Sampler
from magistral_mlx.tokenizer.tekken import Tokenizer
from magistral_mlx.training.demo.problems import KINDS, held_out_problems

# M4 Pro, 4 bit, relative to one row: published for 1 to 4 and 8 rows (the upper end of a range),
# linear between. Waiting for an id adds a millisecond to a pass of 57. LINEAR is a CPU, and nearly
# an M1 or M2.
M4_PRO = (1.0, 1.0, 1.13, 1.45, 1.8125, 2.175, 2.5375, 2.9)
M4_PRO_WAITING = tuple(cost + 0.02 for cost in M4_PRO)
LINEAR = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
TABLES = {"M4 Pro": M4_PRO, "M4 Pro, waiting 0.02": M4_PRO_WAITING, "a row costs a pass": LINEAR}
# Highest cost of a token in plain passes: GOALS with M4_PRO, and WORST in every other case.
GOALS = {"reasoning": 0.85, "copies": 0.45, "edits": 0.45}
WORST = 1.02
VOCABULARY = 2048
STOP = 2


@dataclass(frozen=True, slots=True)
class Count:
    """Tokens, passes and their cost in plain passes, after a reply's first id.

    The first id comes with the prompt. The stop id is counted.
    """

    tokens: int
    passes: int
    cost: float

    @property
    def cost_per_token(self) -> float:
        return self.cost / self.tokens


class _Noted(Drafter):
    """A drafter that records the rows of every pass it waited for."""

    def __init__(self, source: GuessSource, costs: Sequence[float], *, prompt_tokens: int) -> None:
        super().__init__(source, costs, prompt_tokens=prompt_tokens)
        self.waited: list[int] = []

    def propose(self, room: int) -> list[int]:
        guesses = super().propose(room)
        self.waited.append(1 + len(guesses))
        return guesses


class _Cache:
    length = 0

    def trim(self, count: int) -> None:
        self.length -= count


class Script:
    """A stand-in for a model and its cache that always predicts the next id of its text."""

    def __init__(self, text: Sequence[int], prompt_tokens: int) -> None:
        self.text = text
        self.cache = _Cache()
        self.cache.length = prompt_tokens
        self.rows: list[int] = []

    def __call__(self, ids: mx.array, wanted: int = 1) -> mx.array:
        self.rows.append(wanted)
        self.cache.length += ids.shape[1]
        return self.logits(self.cache.length, wanted)

    def logits(self, length: int, wanted: int) -> mx.array:
        """Return logits [M, V] after the last ``wanted`` of ``length`` positions."""
        following = [
            self.text[i] if i < len(self.text) else STOP
            for i in range(length - wanted + 1, length + 1)
        ]
        return 10 * (mx.arange(VOCABULARY) == mx.array(following)[:, None]).astype(mx.float32)


def count(prompt: Sequence[int], reply: Sequence[int], costs: Sequence[float] = M4_PRO) -> Count:
    """Decode a scripted reply, given without its stop id, with an n-gram drafter."""
    script = Script([*prompt, *reply, STOP], len(prompt))
    drafter = _Noted(PromptLookup(prompt), costs, prompt_tokens=len(prompt))
    decoding = decode(
        script,  # type: ignore[arg-type]
        script.logits(len(prompt), 1),
        Sampler(SamplingParams(temperature=0), 0),
        stop=frozenset({STOP}),
        max_tokens=len(reply) + 2,
        drafter=drafter,
    )
    seen = [token.id for token in decoding]
    assert seen == list(reply), "drafting changed the ids"
    ahead = len(script.rows) - len(drafter.waited)  # also the pass that the stop id leaves behind
    cost = ahead + sum(costs[rows - 1] for rows in drafter.waited)
    return Count(len(reply), len(script.rows), cost)


Text = tuple[list[int], list[int]]  # prompt and reply


def traces(magistral: mm.Magistral, problems: int = 120) -> Iterator[Text]:
    """Yield held-out problems and the embedded model's replies, greedy and sampled in turn."""
    tokenizer = magistral.tokenizer
    for seed, problem in enumerate(held_out_problems(problems, 2026, tokenizer.pieces, KINDS)):
        sampling = SamplingParams(seed=seed) if seed % 2 else SamplingParams(temperature=0)
        prompt = tokenizer.encode_chat(problem.question)
        reply = magistral.ask(problem.question, sampling)
        assert reply.finish_reason == "stop"
        yield prompt, magistral.prefix_cache.ids[len(prompt) :]


def numbers(rng: random.Random, length: int, least: int = 40, most: int = 2047) -> list[int]:
    return [rng.randint(least, most) for _ in range(length)]


def copies(edited: float, seed: int = 1) -> Iterator[Text]:
    """Yield texts of 300 ids that the reply repeats, with a share of ids changed or missing."""
    rng = random.Random(seed)
    for _ in range(10):
        text = numbers(rng, 300)
        reply: list[int] = []
        for identity in text:
            edit = rng.choice(["replace", "drop", "insert"]) if rng.random() < edited else ""
            new = numbers(rng, 1) if edit in ("replace", "insert") else []
            reply += new + ([] if edit in ("replace", "drop") else [identity])
        yield [3, *text, 4], reply


def hostile() -> Iterator[Text]:
    """Yield blocks that come twice, the second time with another end."""
    for block in (1, 2, 4, 9, 30):
        rng = random.Random(block)
        blocks = [numbers(rng, block) for _ in range(600 // block)]
        yield [3], [identity for b in blocks for identity in [*b, *b[:-1], *numbers(rng, 1, 3, 39)]]


def noise() -> Iterator[Text]:
    """Yield random ids out of two, ten and all."""
    for most in (4, 12, VOCABULARY - 1):
        rng = random.Random(most)
        yield numbers(rng, 50, 3, most), numbers(rng, 600, 3, most)


def prose(tokenizer: Tokenizer) -> Iterator[Text]:
    """Yield the licence, whose second half is the reply to the first."""
    ids = tokenizer.encode((Path(__file__).parents[2] / "LICENSE").read_text())
    yield ids[: len(ids) // 2], ids[len(ids) // 2 :]


def scripted(tokenizer: Tokenizer) -> dict[str, list[Text]]:
    """Return every kind of text that is made without a model."""
    return {
        "copies": list(copies(0)),
        "edits": list(copies(0.05)),
        "hostile": list(hostile()),
        "random": list(noise()),
        "prose": list(prose(tokenizer)),
    }


def count_all(
    texts: Mapping[str, list[Text]], tables: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, Any]]:
    """Count every kind of text with every table of costs."""
    found: dict[str, dict[str, Any]] = {}
    for name, costs in tables.items():
        for kind, pairs in texts.items():
            counts = [count(prompt, reply, costs) for prompt, reply in pairs]
            whole = Count(*map(sum, zip(*map(astuple, counts), strict=True)))
            found.setdefault(name, {})[kind] = {
                "replies": len(counts),
                "tokens": whole.tokens,
                "passes": whole.passes,
                "cost_per_token": round(whole.cost_per_token, 4),
                "highest_of_a_reply": round(max(c.cost_per_token for c in counts), 4),
                "goal": GOALS.get(kind, WORST) if costs is M4_PRO else WORST,
            }
    return found
