"""Divergence of a checkpoint from a reference: KL per token, perplexity, top-1 agreement.

The reference runs first. For each position that counts, a file keeps its K largest
log-probabilities, and the mass and entropy of all others together. In a vocabulary of more than K
ids, KL is then known within bounds. The lower one, called KL here, takes the others as one event,
which is never more than the truth (https://en.wikipedia.org/wiki/Log_sum_inequality). The upper one
takes every other id to be as unlikely to the candidate as the unlikeliest of them.
"""

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import report
from benchmarks.quality.logits import layers_then_inputs, logits_of, open_streamed
from benchmarks.quality.texts import Texts
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.convert.calibration.corpus import digest
from magistral_mlx.convert.calibration.statistics import from_file, to_bytes
from magistral_mlx.errors import CheckpointError, OptionError

LEAST_KL = 1e-9  # float32 logits resolve no less
KEPT = 2048  # log-probabilities of each position; 16 KB with their ids
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Reference:
    """The reference's predictions for each of N ids that count.

    Attributes:
        ids: ``[N, K]`` uint32, the most probable first.
        logprobs: ``[N, K]`` float32.
        rest: ``[N]`` log of the mass of all others, -inf if there are none.
        rest_entropy: ``[N]`` minus the sum of p log p over them.
        target: ``[N]`` log-probability of the id that came.
    """

    ids: mx.array
    logprobs: mx.array
    rest: mx.array
    rest_entropy: mx.array
    target: mx.array


@dataclass(frozen=True, slots=True)
class Scores:
    """A candidate against the reference, for each of N ids that count.

    ``kl`` is in nats, and the lower bound. ``nll`` is minus the log-probability of the id that
    came. ``agrees`` is true where both find the same id most probable.
    """

    kl: Array
    kl_upper: Array
    nll: Array
    reference_nll: Array
    agrees: NDArray[np.bool_]
    sequence: NDArray[np.intp]
    part: NDArray[np.int8]

    def of_part(self, part: int) -> "Scores":
        chosen = self.part == part
        return Scores(*(getattr(self, each.name)[chosen] for each in fields(self)))

    def by_sequence(self, values: Array) -> Array:
        """Return means of ``values`` [N] over the ids of each sequence."""
        counts = np.bincount(self.sequence)
        sums = np.bincount(self.sequence, values)
        return np.asarray(sums[counts > 0] / counts[counts > 0], np.float64)

    def summary(self) -> dict[str, Any]:
        """Return means over ids, and standard errors between sequences.

        The ids of a sequence are not independent draws.
        """
        kl = self.by_sequence(self.kl)
        return {
            "tokens": len(self.kl),
            "sequences": len(kl),
            "perplexity": math.exp(self.nll.mean()),
            "reference_perplexity": math.exp(self.reference_nll.mean()),
            "kl": float(self.kl.mean()),
            "kl_error": float(kl.std(ddof=1) / len(kl) ** 0.5) if len(kl) > 1 else None,
            "kl_upper_bound": float(self.kl_upper.mean()),
            "top1_agreement": float(self.agrees.mean()),
        }


def make_reference(folder: Path, texts: Texts) -> Reference:
    """Run the reference; raise the errors of ``open_source`` and ``visit_linears``."""
    parts: list[Reference] = []
    for logits, target in _predictions(folder, texts):
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        count = min(KEPT, logits.shape[-1])
        ids = mx.argpartition(-logprobs, count - 1, axis=-1)[:, :count]
        best = mx.take_along_axis(logprobs, ids, axis=-1)
        order = mx.argsort(-best, axis=-1)
        ids = mx.take_along_axis(ids, order, axis=-1)
        others = _without(logprobs, ids)
        entropy = -mx.where(others > -mx.inf, mx.exp(others) * others, 0.0).sum(axis=-1)
        part = Reference(
            ids.astype(mx.uint32),
            mx.take_along_axis(best, order, axis=-1),
            mx.logsumexp(others, axis=-1),
            entropy,
            mx.take_along_axis(logprobs, target[:, None], axis=-1)[:, 0],
        )
        mx.eval(*_arrays(part).values())
        parts.append(part)
    return Reference(
        *(mx.concatenate([getattr(p, each.name) for p in parts]) for each in fields(Reference))
    )


def reference_of(folder: Path, texts: Texts, cache: Path) -> Reference:
    """Return the reference from ``cache``, or run it on these texts and put it there."""
    key = f"{open_checkpoint(folder).fingerprint()} {digest(texts.ids)} {KEPT} "
    name = hashlib.sha256(key.encode() + texts.parts.tobytes()).hexdigest()[:16]
    path = cache / f"reference-{name}.safetensors"
    if path.is_file():
        try:
            return Reference(**from_file(path))
        except CheckpointError:
            report(f"{path} is damaged; the reference runs again")
    reference = make_reference(folder, texts)
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(to_bytes(_arrays(reference)))
    unfinished.replace(path)
    return reference


def score(folder: Path, texts: Texts, reference: Reference) -> Scores:
    """Run a candidate and compare it with the reference."""
    found: list[tuple[Array, Array, Array, NDArray[np.bool_]]] = []
    start = 0
    for logits, target in _predictions(folder, texts):
        V = logits.shape[-1]
        if reference.ids.shape[-1] > V or int(np.array(reference.ids.max())) >= V:
            raise OptionError(f"{folder} has {V} ids, fewer than the reference; name another")
        rows = slice(start, start + len(target))
        start += len(target)
        ids, p = reference.ids[rows], _float64(reference.logprobs[rows])
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        others = _without(logprobs, ids)
        q = _float64(mx.take_along_axis(logprobs, ids, axis=-1))
        known = (np.exp(p) * (p - q)).sum(axis=-1)
        low, high = _bounds_of_rest(
            _float64(reference.rest[rows]),
            _float64(reference.rest_entropy[rows]),
            _float64(mx.logsumexp(others, axis=-1)),
            _float64(mx.where(others > -mx.inf, others, mx.inf).min(axis=-1)),
        )
        nll = -_float64(mx.take_along_axis(logprobs, target[:, None], axis=-1)[:, 0])
        agrees = np.array(logits.argmax(axis=-1) == ids[:, 0])
        found.append((known + low, known + high, nll, agrees))
    kl, kl_upper, nll, agrees = (np.concatenate(parts) for parts in zip(*found, strict=True))
    sequence, position = np.nonzero(texts.parts >= 0)
    part = texts.parts[sequence, position]
    return Scores(kl, kl_upper, nll, -_float64(reference.target), agrees, sequence, part)


@dataclass(frozen=True, slots=True)
class Ratio:
    """The ratio of two candidates' KL: geometric mean over sequences, and its error as a factor.

    The standard error reaches from mean / factor to mean * factor.
    """

    mean: float
    factor: float

    @classmethod
    def of(cls, one: Scores, other: Scores) -> "Ratio":
        """Return the KL of ``one`` over that of ``other``."""
        mine, others = (
            np.maximum(scores.by_sequence(scores.kl), LEAST_KL) for scores in (one, other)
        )
        logs = np.log(mine) - np.log(others)
        error = logs.std(ddof=1) / len(logs) ** 0.5 if len(logs) > 1 else math.nan
        return cls(float(np.exp(logs.mean())), float(np.exp(error)))


def _bounds_of_rest(
    mass: Array, entropy: Array, candidate_mass: Array, least: Array
) -> tuple[Array, Array]:
    """Return the least and the most that the ids which were not kept add to KL.

    All arrays are ``[n]``: logs of masses, entropy, and the candidate's least log-probability.
    """
    there = mass > -np.inf
    p = np.exp(mass[there])
    low, high = np.zeros_like(mass), np.zeros_like(mass)
    low[there] = p * (mass[there] - candidate_mass[there])
    high[there] = -entropy[there] - p * least[there]
    return low, high


def _predictions(folder: Path, texts: Texts) -> Iterator[tuple[mx.array, mx.array]]:
    """Yield logits ``[n, V]`` before the ids that count, and these ids ``[n]``."""
    source = open_streamed(folder)
    inputs = mx.zeros(0)
    for step in layers_then_inputs(source, texts.ids):
        if isinstance(step, int):
            report(f"{folder.name}: layer {step} of {source.config.num_layers}")
        else:
            inputs = step
    counted = mx.array(np.flatnonzero(texts.parts.reshape(-1) >= 0))
    targets = texts.ids[:, 1:].reshape(-1)[counted]
    inputs = inputs[:, :-1].reshape(-1, inputs.shape[-1])[counted]
    mx.eval(inputs)
    start = 0
    for logits in logits_of(source, inputs):
        yield logits, targets[start : start + len(logits)]
        start += len(logits)


def _without(logprobs: mx.array, ids: mx.array) -> mx.array:
    return mx.put_along_axis(logprobs, ids, mx.array(-mx.inf), axis=-1)


def _arrays(reference: Reference) -> dict[str, mx.array]:
    return {each.name: getattr(reference, each.name) for each in fields(reference)}


def _float64(array: mx.array) -> Array:
    return np.array(array).astype(np.float64)
