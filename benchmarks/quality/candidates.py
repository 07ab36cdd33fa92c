"""The checkpoints that are compared with a reference: the user's, and conversions made for it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from benchmarks.measure import report
from benchmarks.quality.scores import Ratio, Scores
from benchmarks.quality.texts import Texts
from magistral_mlx.checkpoint.folder import open_checkpoint

ALL = "all"  # parts together
Method = Literal["round", "importance", "gptq"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True, slots=True)
class Conversions:
    """Conversions to all ``bits`` by all ``methods``; no calibration is the converter's own."""

    bits: tuple[int, ...]
    methods: tuple[Method, ...]
    calibration: str | None


def candidates(
    reference: Path, models: Mapping[str, Path], conversions: Conversions, work: Path
) -> Iterator[tuple[str, Path]]:
    """Yield titles and folders: ``models``, then conversions, written into ``work`` in turn.

    Raises:
        MagistralError: as ``convert_checkpoint``.
    """
    from magistral_mlx.convert import convert_checkpoint

    yield from models.items()
    for bits in conversions.bits:
        for method in conversions.methods:
            title = f"{bits} bit, {method}"
            report(f"{title}: converting")
            target = work / f"{bits}-{method}"
            convert_checkpoint(
                reference,
                target,
                q_bits=bits,
                q_method=method,
                calibration=None if method == "round" else conversions.calibration,
                tokenizer_json=False,
            )
            yield title, target


@dataclass(slots=True)
class Findings:
    """The figures of each candidate. KL ratios are to the first candidate of the same size."""

    texts: Texts
    found: list[dict[str, Any]] = field(default_factory=list)
    _first: dict[str, tuple[str, Scores]] = field(default_factory=dict)  # by size

    def add(self, title: str, folder: Path, scores: Scores) -> dict[str, Any]:
        checkpoint = open_checkpoint(folder)
        weights = sum(map(math.prod, checkpoint.config.shapes.values()))
        bits = 8 * checkpoint.nbytes / weights
        first_title, first = self._first.setdefault(f"{bits:.2f}", (title, scores))
        names = self.texts.names
        parts = {name: (scores.of_part(i), first.of_part(i)) for i, name in enumerate(names)}
        if len(parts) > 1:
            parts[ALL] = (scores, first)
        one = {
            "title": title,
            "checkpoint": checkpoint.fingerprint(),
            "bits_per_weight": bits,
            "kl_ratio_to": None if first is scores else first_title,
            "parts": {part: _part(*pair) for part, pair in parts.items()},
        }
        self.found.append(one)
        return one


def _part(scores: Scores, first: Scores) -> dict[str, Any]:
    ratio = Ratio.of(scores, first)
    return scores.summary() | {
        "kl_ratio": {"mean": ratio.mean, "factor": ratio.factor},
        "kl_by_sequence": scores.by_sequence(scores.kl).tolist(),
    }
