"""Logits to the next id: temperature, then top-p, exact and without sorting the vocabulary.

Letters: B rows, V vocabulary, C blocks of the vocabulary, n candidates.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from magistral_mlx.generation.params import SamplingParams

INVALID = -1  # instead of an id: the row holds NaN or +infinity, or nothing finite
SPILLED = (
    -2
)  # instead of an id: the nucleus is wider than the candidates; draw_exact sorts everything

BLOCK = 32  # ids a block
LEADERS = 256  # blocks whose ids are candidates
CANDIDATES = 512  # ids sorted, the best of those blocks

# Probability mass is counted in whole units of 2**-44 of the most probable id, in int64: such sums are exact and
# associative, so the candidates, a full sort, one row or many, a CPU and a GPU agree on where the nucleus ends.
# 2**61 units at most, for V up to 2**17.
UNIT = 2.0**44
FRACTION_BITS = 31
LOW_32 = 2**32 - 1
FLOAT32_RANGE = (2.0**-126, 2.0**127)


class Nucleus(NamedTuple):
    """Candidates of each row, most probable first, equals by their id; what is not kept has weight 0."""

    ids: mx.array  # [B, n] int64
    weights: mx.array  # [B, n] int64, in proportion to the probability
    spilled: mx.array  # [B, 1] bool: ids that are kept may be missing


class Sampler:
    """Draws ids. What it draws is a function of the logits, the seed, the step and the row alone."""

    def __init__(self, params: SamplingParams, seed: int) -> None:
        self.params = params
        self.seed = seed

    def draw(self, logits: mx.array, step: int) -> mx.array:
        """Ids [B] int32 from logits [B, V]: lazy, nothing is read back.

        A row may hold INVALID or SPILLED instead of an id. The set kept is exact: an id is kept while the
        mass before it, most probable first and equals by lower id, is under top_p. At temperature 0 it is
        the most probable id, the lowest among equals.
        """
        return self._draw(
            logits, [(self.seed, step, row) for row in range(len(logits))], exact=False
        )

    def draw_run(self, logits: mx.array, step: int) -> mx.array:
        """Ids [M] of M steps in a row from logits [M, V], each as ``draw`` would draw it alone."""
        return self._draw(
            logits, [(self.seed, step + i, 0) for i in range(len(logits))], exact=False
        )

    def draw_each(
        self, logits: mx.array, step: int, seeds: Sequence[int], *, exact: bool = False
    ) -> mx.array:
        """As ``draw`` or ``draw_exact``, every row as if it were alone and its own of ``seeds`` the sampler's."""
        return self._draw(logits, [(seed, step, 0) for seed in seeds], exact=exact)

    def draw_exact(self, logits: mx.array, step: int) -> mx.array:
        """As ``draw``, by sorting all ids: never SPILLED, and the same id wherever ``draw`` has one."""
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
        """[B, 1] int64, uniform below 2**31, one a (seed, step, row). A hash, not mx.random: rows are independent."""
        words = [
            hashlib.blake2b(f"{seed} {step} {row}".encode(), digest_size=4)
            for seed, step, row in places
        ]
        return mx.array([[int.from_bytes(word.digest()) >> 1] for word in words], dtype=mx.int64)


def nucleus(
    x: mx.array, best: mx.array, temperature: float, top_p: float, *, exact: bool
) -> Nucleus:
    """What top-p keeps of logits x [B, V] float32, whose maxima are best [B, 1].

    Temperature over 0, top_p under 1; ``exact`` sorts all ids instead of the candidates.
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
    """The k most probable ids of logits [B, V], without temperature: ids [B, k] int32 and their logprobs, lazy."""
    x = logits.astype(mx.float32)
    best = mx.max(x, axis=-1, keepdims=True)
    ids = _leaders(x, k, k)[0][:, :k] & LOW_32
    # mx.logsumexp adds up in float32, one after the other: 3e-5 off at 5,000 ids.
    logs = mx.log(_total(_weights(x, best, 1.0)).astype(mx.float32) / UNIT)
    return ids.astype(mx.int32), mx.take_along_axis(x, ids, axis=-1) - best - logs


def _weights(x: mx.array, best: mx.array, temperature: float) -> mx.array:
    """Probabilities [B, V] at a temperature, in units: int64, 2**44 for the best id."""
    # Differences are taken first: exact near the best, and no temperature can make them NaN. Powers of two,
    # because on a CPU mx.power takes a third of mx.exp's time, which would be most of the whole draw.
    sharpness = min(max(math.log2(math.e) / temperature, FLOAT32_RANGE[0]), FLOAT32_RANGE[1])
    return (mx.power(2.0, (x - best) * sharpness) * UNIT).astype(mx.int64)


def _total(weights: mx.array) -> mx.array:
    return mx.sum(weights, axis=-1, keepdims=True)


def _share(units: mx.array, numerator: mx.array | int) -> mx.array:
    """floor(units * numerator / 2**31) for a numerator under 2**31, without leaving int64."""
    high, low = units >> FRACTION_BITS, units & (2**FRACTION_BITS - 1)
    return high * numerator + ((low * numerator) >> FRACTION_BITS)


def _inverse(weights: mx.array, fractions: mx.array) -> mx.array:
    """The place [B, 1] that the inverse of the distribution ``weights`` [B, n] has at fractions / 2**31."""
    through = mx.cumsum(weights, axis=-1)
    passed = through <= _share(through[:, -1:], fractions)
    # A row that is not numbers has no such place; it must still be one that can be indexed.
    return mx.minimum(mx.sum(passed, axis=-1, keepdims=True), weights.shape[-1] - 1)


def _keys(x: mx.array, ids: mx.array) -> mx.array:
    """Distinct int64 that sort as the ids do: larger x first, equals by lower id. The id is the lower half."""
    bits = (x + 0.0).view(mx.int32)  # + 0.0 makes -0.0 the same as 0.0
    ranks = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # increases with x
    return ids - (ranks.astype(mx.int64) << 32)


def _sorted(x: mx.array) -> tuple[mx.array, mx.array]:
    """The keys of all ids [B, V] in order, and a key [1] none of them reaches."""
    keys = _keys(x, mx.arange(x.shape[-1], dtype=mx.int64))
    return mx.sort(keys, axis=-1), mx.array([2**63 - 1], dtype=mx.int64)


def _leaders(x: mx.array, blocks: int, count: int) -> tuple[mx.array, mx.array]:
    """The keys of the best ids in order, from those blocks of 32 ids that have the highest maxima.

    Returns keys [B, count] and a boundary [B, 1]: the keys under it are those of the first ids of all, in
    order and without a gap. There are at least min(blocks, count) of these. Proof: the boundary is the key
    of the best block left out, its maximum with its first id. Whatever was left out is no larger than that
    maximum, and where it is equal its block, hence its id, is no lower: its key does not come before the
    boundary. So an id whose key does is a candidate, and the best ``count`` candidates lose only keys that
    come after theirs. Each chosen block has a candidate before the boundary, its maximum: if larger, plainly;
    if equal, the block lies before the boundary's block.
    """
    B, V = x.shape
    C = V // BLOCK
    if 2 * blocks >= C:  # so small that blocks gain nothing
        return _sorted(x)
    maxima = mx.max(x[:, : C * BLOCK].reshape(B, C, BLOCK), axis=-1)  # [B, C]
    order = mx.partition(
        _keys(maxima, mx.arange(0, C * BLOCK, BLOCK, dtype=mx.int64)), blocks, axis=-1
    )
    first_ids = order[:, :blocks, None] & LOW_32
    ids = (first_ids + mx.arange(BLOCK, dtype=mx.int64)).reshape(B, -1)  # [B, 32 blocks]
    rest = mx.broadcast_to(mx.arange(C * BLOCK, V, dtype=mx.int64), (B, V - C * BLOCK))
    ids = mx.concatenate([ids, rest], axis=-1)  # what fills no block is always a candidate
    keys = _keys(mx.take_along_axis(x, ids, axis=-1), ids)
    return mx.sort(mx.partition(keys, count - 1, axis=-1)[:, :count], axis=-1), order[
        :, blocks : blocks + 1
    ]
