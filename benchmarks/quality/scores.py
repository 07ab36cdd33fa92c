"""How far a checkpoint's predictions are from a reference's: KL per token, perplexity, top-1 agreement.

The reference is run first, and what is kept of it on the disk are, for each position that counts, its K largest
log-probabilities, and of all others together their mass and their entropy. Where the vocabulary has more than K ids,
KL is then known within bounds, and the lower one is what is called KL here: it takes the others as one event
(https://en.wikipedia.org/wiki/Log_sum_inequality), which is never more than the truth. The upper one takes every other
id to be as unlikely to the candidate as the unlikeliest of them.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.logits import layers_then_inputs, logits_of, open_streamed
from benchmarks.quality.texts import Texts
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.convert.calibration.corpus import digest
from magistral_mlx.convert.calibration.statistics import from_file, to_bytes
from magistral_mlx.errors import CheckpointError, OptionError

LEAST_KL = 1e-9  # below which float32 logits show nothing
KEPT = 2048  # log-probabilities of each position; 16 KB with their ids
Report = Callable[[str], None]
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Reference:
    """What is kept of the reference's prediction for each of N ids that count."""

    ids: mx.array  # [N, K] uint32, the most probable first
    logprobs: mx.array  # [N, K] float32
    rest: mx.array  # [N] log of the mass of all others, -inf where there are none
    rest_entropy: mx.array  # [N] minus the sum of p log p over them
    target: mx.array  # [N] log-probability of the id that came


@dataclass(frozen=True, slots=True)
class Scores:
    """A candidate against the reference, for each of N ids that count."""

    kl: Array  # in nats, the lower bound
    kl_upper: Array
    nll: Array  # minus the log-probability of the id that came
    reference_nll: Array
    agrees: NDArray[np.bool_]  # the same id is the most probable
    sequence: NDArray[np.intp]
    part: NDArray[np.int8]

    def of_part(self, part: int) -> "Scores":
        chosen = self.part == part
        return Scores(*(getattr(self, each.name)[chosen] for each in fields(self)))

    def by_sequence(self, values: Array) -> Array:
        """Means of ``values`` [N] over the ids of each sequence."""
        counts = np.bincount(self.sequence)
        return np.asarray(
            np.bincount(self.sequence, values)[counts > 0] / counts[counts > 0], np.float64
        )

    def summary(self) -> dict[str, Any]:
        """Means over ids; errors are standard errors between sequences, whose ids are no independent draws."""
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


def make_reference(folder: Path, texts: Texts, *, report: Report) -> Reference:
    """Run the reference. Errors as ``open_source``'s and ``visit_linears``'s."""
    parts: list[Reference] = []
    for logits, target in _predictions(folder, texts, report):
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        count = min(KEPT, logits.shape[-1])
        ids = (
            mx.argpartition(-logprobs, count - 1, axis=-1)[:, :count]
            if count < logits.shape[-1]
            else None
        )
        best = logprobs if ids is None else mx.take_along_axis(logprobs, ids, axis=-1)
        order = mx.argsort(-best, axis=-1)
        ids = order if ids is None else mx.take_along_axis(ids, order, axis=-1)
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


def reference_of(folder: Path, texts: Texts, cache: Path, *, report: Report) -> Reference:
    """The reference as ``cache`` holds it from an earlier run on the same texts, else made and put there."""
    key = f"{open_checkpoint(folder).fingerprint()} {digest(texts.ids)} {KEPT} "
    name = hashlib.sha256(key.encode() + texts.parts.tobytes()).hexdigest()[:16]
    path = cache / f"reference-{name}.safetensors"
    if path.is_file():
        try:
            return Reference(**from_file(path))
        except CheckpointError:
            report(f"{path} is damaged; the reference runs again")
    reference = make_reference(folder, texts, report=report)
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(to_bytes(_arrays(reference)))
    unfinished.replace(path)
    return reference


def score(folder: Path, texts: Texts, reference: Reference, *, report: Report) -> Scores:
    """Run a candidate, and compare."""
    lows: list[Array] = []
    highs: list[Array] = []
    nlls: list[Array] = []
    agreements: list[NDArray[np.bool_]] = []
    start = 0
    for logits, target in _predictions(folder, texts, report):
        if (
            reference.ids.shape[-1] > logits.shape[-1]
            or int(np.array(reference.ids.max())) >= logits.shape[-1]
        ):
            raise OptionError(
                f"{folder} has {logits.shape[-1]} ids, fewer than the reference; compare like with like"
            )
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
        lows.append(known + low)
        highs.append(known + high)
        nlls.append(-_float64(mx.take_along_axis(logprobs, target[:, None], axis=-1)[:, 0]))
        agreements.append(np.array(logits.argmax(axis=-1) == ids[:, 0]))
    sequence, position = np.nonzero(texts.parts >= 0)
    return Scores(
        np.concatenate(lows),
        np.concatenate(highs),
        np.concatenate(nlls),
        -_float64(reference.target),
        np.concatenate(agreements),
        sequence,
        texts.parts[sequence, position],
    )


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of two candidates' KL: the geometric mean over sequences, and its standard error as a factor."""

    mean: float
    factor: float  # the mean lies between mean / factor and mean * factor

    @classmethod
    def of(cls, one: Scores, other: Scores) -> "Ratio":
        """``one``'s KL over ``other``'s."""
        mine, others = (
            np.maximum(scores.by_sequence(scores.kl), LEAST_KL) for scores in (one, other)
        )
        logs = np.log(mine) - np.log(others)
        error = logs.std(ddof=1) / len(logs) ** 0.5 if len(logs) > 1 else math.nan
        return cls(float(np.exp(logs.mean())), float(np.exp(error)))


def _bounds_of_rest(
    mass: Array, entropy: Array, candidate_mass: Array, least: Array
) -> tuple[Array, Array]:
    """The least and most that ids which were not kept add to KL: logs of masses, entropy, and the candidate's least
    log-probability among them, all ``[n]``."""
    there = mass > -np.inf
    p = np.exp(mass[there])
    low, high = np.zeros_like(mass), np.zeros_like(mass)
    low[there] = p * (mass[there] - candidate_mass[there])
    high[there] = -entropy[there] - p * least[there]
    return low, high


def _predictions(folder: Path, texts: Texts, report: Report) -> Iterator[tuple[mx.array, mx.array]]:
    """Logits ``[n, V]`` before the ids that count, and these ids ``[n]``."""
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
