"""How many passes drafting saves, counted: no clock, so every machine gives the same figures.

The cost of a pass over M rows is that of a chip given as a table. Target texts are scripted, except for the
embedded model's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from magistral_mlx.decoding import decode
from magistral_mlx.drafting import Drafter, Ngrams, Source
from magistral_mlx.sampling import Sampler, SamplingParams

# M4 Pro, 4 bit, relative to one row: published for 1 to 4 and 8 rows (of a range the upper end), linear between.
M4_PRO = (1.0, 1.0, 1.13, 1.45, 1.8125, 2.175, 2.5375, 2.9)
VOCABULARY = 2048
STOP = 2


@dataclass(frozen=True, slots=True)
class Count:
    """What a reply took after its first id; that one comes with the prompt."""

    tokens: int  # the stop id included
    passes: int
    cost: float  # of these, in plain passes

    @property
    def cost_per_token(self) -> float:
        return self.cost / self.tokens


class _Noted(Drafter):
    """A drafter that notes the rows of every pass it waited for."""

    def __init__(self, source: Source, costs: Sequence[float], *, prompt_tokens: int) -> None:
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
    """Stands for a model and its cache: whatever it is fed, it is certain of the next id of its text."""

    def __init__(self, text: Sequence[int], prompt_tokens: int) -> None:
        self.text = text
        self.cache = _Cache()
        self.cache.length = prompt_tokens
        self.rows: list[int] = []  # of every pass

    def __call__(self, ids: mx.array, wanted: int = 1) -> mx.array:
        self.rows.append(wanted)
        self.cache.length += ids.shape[1]
        return self.logits(self.cache.length, wanted)

    def logits(self, length: int, wanted: int) -> mx.array:
        """[M, V] for the ids after the last ``wanted`` of ``length`` positions."""
        following = [self.text[i] if i < len(self.text) else STOP for i in range(length - wanted + 1, length + 1)]
        return 10 * (mx.arange(VOCABULARY) == mx.array(following)[:, None]).astype(mx.float32)


def count(prompt: Sequence[int], reply: Sequence[int], costs: Sequence[float] = M4_PRO) -> Count:
    """Decode a scripted reply, whose stop id is left out, with an n-gram drafter."""
    script = Script([*prompt, *reply, STOP], len(prompt))
    drafter = _Noted(Ngrams(prompt), costs, prompt_tokens=len(prompt))
    decoding = decode(
        script,  # type: ignore[arg-type]
        script.logits(len(prompt), 1),
        Sampler(SamplingParams(temperature=0), 0),
        stop=frozenset({STOP}),
        max_tokens=len(reply) + 2,
        drafter=drafter,
    )
    seen = [identity for identity, _ in decoding]
    assert seen == list(reply), "drafting changed the ids"
    ahead = len(script.rows) - len(drafter.waited)  # also the one that the stop id leaves behind
    return Count(len(reply), len(script.rows), ahead + sum(costs[rows - 1] for rows in drafter.waited))
