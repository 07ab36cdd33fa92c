"""Logits to the next id: temperature, then top-p, exact and without sorting the vocabulary.

Letters: B rows, V vocabulary, C blocks of the vocabulary, n candidates.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from magistral_mlx.generation.params import SamplingParams

# Instead of an id: the row holds NaN or +infinity, or nothing finite.
INVALID = -1
# Instead of an id: the nucleus is wider than the candidates; draw_exact sorts all ids.
SPILLED = -2

# Ids of a block.
BLOCK = 32
# The blocks with the largest maxima; their ids are candidates.
LEADERS = 256
# The best ids of those blocks, which are sorted.
CANDIDATES = 512

# Probability mass is counted in whole units of 2**-44 of the most probable id, in int64. Such sums
# are exact and associative, so the candidates, a full sort, one row or many, a CPU and a GPU agree
# on where the nucleus ends. There are at most 2**61 units, for V up to 2**17.
UNIT = 2.0**44
FRACTION_BITS = 31
LOW_32 = 2**32 - 1
FLOAT32_RANGE = (2.0**-126, 2.0**127)


class Nucleus(NamedTuple):
    """Candidates of each row, most probable first, equals by id; ids not kept have weight 0."""

    ids: mx.array  # [B, n] int64
    weights: mx.array  # [B, n] int64, in proportion to the probability
    spilled: mx.array  # [B, 1] bool: the nucleus may have more ids


class Sampler:
    """Draws ids. A draw depends on the logits, the seed, the step and the row alone."""

    def __init__(self, params: SamplingParams, seed: int) -> None:
        self.params = params
        self.seed = seed

    def draw(self, logits: mx.array, step: int) -> mx.array:
        """Draw ids [B] int32 from logits [B, V], without evaluating them.

        A row may hold INVALID or SPILLED instead of an id. The nucleus is exact: an id is kept
        while the mass before it is under top_p, most probable first and equals by lower id. At
        temperature 0 the draw is the most probable id, the lowest among equals.
        """
        return self._draw(
            logits, [(self.seed, step, row) for row in range(len(logits))], exact=False
        )

    def draw_run(self, logits: mx.array, step: int) -> mx.array:
        """Draw ids [M] of M consecutive steps from logits [M, V], each as ``draw`` does alone."""
        return self._draw(
            logits, [(self.seed, step + i, 0) for i in range(len(logits))], exact=False
        )

    def draw_each(
        self, logits: mx.array, step: int, seeds: Sequence[int], *, exact: bool = False
    ) -> mx.array:
        """Draw every row as ``draw`` or ``draw_exact`` does alone, with a seed for each row."""
        return self._draw(logits, [(seed, step, 0) for seed in seeds], exact=exact)

    def draw_exact(self, logits: mx.array, step: int) -> mx.array:
        """Draw by sorting all ids: never SPILLED, and the same id where ``draw`` has one."""
        return self._draw(
            logits, [(self.seed, step, row) for row in range(len(logits))], exact=True
        )

    def _draw(
        self, logits: mx.array, places: list[tuple[int, int, int]], *, exact: bool
    ) -> mx.array:
        x = logits.astype(mx.float32)
        best = mx.max(x, axis=-1, keepdims=True)  # [B, 1]; NaN if any is
        if self.params.temperature == 0:
            ids = mx.argmax(x, axis=-1, keepdims=True)
        elif self.params.top_p == 1:
            weights = _weights(x, best, self.params.temperature)
            ids = _inverse(weights, self._fractions(places))
        else:
            kept = nucleus(x, best, self.params.temperature, self.params.top_p, exact=exact)
            place = _inverse(kept.weights, self._fractions(places))
            ids = mx.where(kept.spilled, SPILLED, mx.take_along_axis(kept.ids, place, axis=-1))
        return mx.where(mx.isfinite(best), ids.astype(mx.int32), INVALID)[:, 0]

    def _fractions(self, places: list[tuple[int, int, int]]) -> mx.array:
        """Return uniform numbers [B, 1] int64 below 2**31, one for each (seed, step, row).

        A hash makes rows independent of each other; mx.random would not.
        """
        words = [
            hashlib.blake2b(f"{seed} {step} {row}".encode(), digest_size=4)
            for seed, step, row in places
        ]
        return mx.array([[int.from_bytes(word.digest()) >> 1] for word in words], dtype=mx.int64)


def nucleus(
    x: mx.array, best: mx.array, temperature: float, top_p: float, *, exact: bool
) -> Nucleus:
    """Return the ids that top-p keeps of logits x [B, V] float32 with maxima best [B, 1].

    The temperature is over 0 and top_p under 1; ``exact`` sorts all ids instead of the candidates.
    """
    weights = _weights(x, best, temperature)
    keys, boundary = _sorted(x) if exact else _leaders(x, LEADERS, CANDIDATES)
    ids = keys & LOW_32  # [B, n]
    mass = mx.where(keys < boundary, mx.take_along_axis(weights, ids, axis=-1), 0)
    through = mx.cumsum(mass, axis=-1)
    # At least 1, so that the first id is kept at the smallest top_p.
    wanted = mx.maximum(_share(_total(weights), int(top_p * 2**FRACTION_BITS)), 1)  # [B, 1]
    return Nucleus(ids, mx.where(through - mass < wanted, mass, 0), through[:, -1:] < wanted)


def top_logprobs(logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Return the k most probable ids of logits [B, V] and their log-probabilities, lazily.

    Both are [B, k], the ids int32, without temperature.
    """
    x = logits.astype(mx.float32)
    best = mx.max(x, axis=-1, keepdims=True)
    ids = _leaders(x, k, k)[0][:, :k] & LOW_32
    # mx.logsumexp adds in float32, one after the other: 3e-5 off at 5,000 ids.
    logs = mx.log(_total(_weights(x, best, 1.0)).astype(mx.float32) / UNIT)
    return ids.astype(mx.int32), mx.take_along_axis(x, ids, axis=-1) - best - logs


def _weights(x: mx.array, best: mx.array, temperature: float) -> mx.array:
    """Return probabilities [B, V] at a temperature, in units: int64, 2**44 for the best id."""
    # Differences are taken first: exact near the best, and no temperature can make them NaN. On a
    # CPU powers of two take a third of the time of mx.exp, which would be most of the whole draw.
    sharpness = min(max(math.log2(math.e) / temperature, FLOAT32_RANGE[0]), FLOAT32_RANGE[1])
    return (mx.power(2.0, (x - best) * sharpness) * UNIT).astype(mx.int64)


def _total(weights: mx.array) -> mx.array:
    return mx.sum(weights, axis=-1, keepdims=True)


def _share(units: mx.array, numerator: mx.array | int) -> mx.array:
    """Return floor(units * numerator / 2**31) in int64, for a numerator under 2**31."""
    high, low = units >> FRACTION_BITS, units & (2**FRACTION_BITS - 1)
    return high * numerator + ((low * numerator) >> FRACTION_BITS)


def _inverse(weights: mx.array, fractions: mx.array) -> mx.array:
    """Return the place [B, 1] where the sum of weights [B, n] passes fractions / 2**31."""
    through = mx.cumsum(weights, axis=-1)
    passed = through <= _share(through[:, -1:], fractions)
    # A row that is not numbers has no such place, but its result must be a valid index.
    return mx.minimum(mx.sum(passed, axis=-1, keepdims=True), weights.shape[-1] - 1)


def _keys(x: mx.array, ids: mx.array) -> mx.array:
    """Return distinct int64 that sort by larger x, then lower id. Their lower half is the id."""
    # Adding 0.0 turns -0.0 into 0.0.
    bits = (x + 0.0).view(mx.int32)
    # Ranks increase with x.
    ranks = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ids - (ranks.astype(mx.int64) << 32)


def _sorted(x: mx.array) -> tuple[mx.array, mx.array]:
    """Return the keys of all ids [B, V] in order, and a key [1] above all of them."""
    keys = _keys(x, mx.arange(x.shape[-1], dtype=mx.int64))
    return mx.sort(keys, axis=-1), mx.array([2**63 - 1], dtype=mx.int64)


def _leaders(x: mx.array, blocks: int, count: int) -> tuple[mx.array, mx.array]:
    """Return the keys of the best ids in order, from the blocks with the highest maxima.

    Returns:
        Keys [B, count], and a boundary [B, 1]. The keys under the boundary are those of the best
        ids of all, in order and without a gap. There are at least min(blocks, count) of them.

    Proof: the boundary is the key of the best block left out, that is its maximum with its first
    id. An id left out is no larger than that maximum, and if it is equal, its block and hence its
    id is no lower: its key does not come before the boundary. So an id whose key does is a
    candidate, and the best ``count`` candidates lose only keys that come after theirs. Each chosen
    block has a candidate before the boundary, its maximum. If that is larger, this is plain; if it
    is equal, the block lies before the boundary's block.
    """
    B, V = x.shape
    C = V // BLOCK
    # Blocks gain nothing in a small vocabulary.
    if 2 * blocks >= C:
        return _sorted(x)
    maxima = mx.max(x[:, : C * BLOCK].reshape(B, C, BLOCK), axis=-1)  # [B, C]
    order = mx.partition(
        _keys(maxima, mx.arange(0, C * BLOCK, BLOCK, dtype=mx.int64)), blocks, axis=-1
    )
    first_ids = order[:, :blocks, None] & LOW_32
    ids = (first_ids + mx.arange(BLOCK, dtype=mx.int64)).reshape(B, -1)  # [B, 32 blocks]
    rest = mx.broadcast_to(mx.arange(C * BLOCK, V, dtype=mx.int64), (B, V - C * BLOCK))
    # Ids that fill no block are always candidates.
    ids = mx.concatenate([ids, rest], axis=-1)
    keys = _keys(mx.take_along_axis(x, ids, axis=-1), ids)
    best = mx.sort(mx.partition(keys, count - 1, axis=-1)[:, :count], axis=-1)
    return best, order[:, blocks : blocks + 1]
