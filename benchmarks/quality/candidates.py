"""What is compared with a reference: checkpoints of the user's, and conversions of the reference made for it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality.scores import Ratio, Report, Scores
from benchmarks.quality.texts import Texts
from magistral_mlx.checkpoint.folder import open_checkpoint

ALL = "all"  # parts together
METHODS = ("round", "importance", "gptq")


@dataclass(frozen=True, slots=True)
class Conversions:
    """Every one of ``bits`` by every one of ``methods``."""

    bits: tuple[int, ...]
    methods: tuple[str, ...]
    calibration: str | None  # of those that calibrate; None: the converter's own


def candidates(
    reference: Path,
    models: Mapping[str, Path],
    conversions: Conversions,
    work: Path,
    *,
    report: Report,
) -> Iterator[tuple[str, Path]]:
    """Titles and folders: ``models``, then conversions, each written into ``work`` when its turn comes.

    Raises:
        MagistralError: as ``convert_checkpoint``'s.
    """
    from magistral_mlx.convert import convert_checkpoint

    yield from models.items()
    for bits in conversions.bits:
        for method in conversions.methods:
            title = f"{bits} bit, {method}"
            report(f"{title}: converting")
            target = work / f"{bits}-{method}"
            calibration = None if method == "round" else conversions.calibration
            convert_checkpoint(
                reference,
                target,
                q_bits=bits,
                q_method=method,
                calibration=calibration,
                tokenizer_json=False,
            )
            yield title, target


@dataclass(slots=True)
class Findings:
    """What is written and shown of each candidate; KL ratios are to the first one of the same size."""

    texts: Texts
    found: list[dict[str, Any]] = field(default_factory=list)
    _first: dict[str, tuple[str, Scores]] = field(default_factory=dict)  # by size

    def add(self, title: str, folder: Path, scores: Scores) -> dict[str, Any]:
        checkpoint = open_checkpoint(folder)
        weights = sum(map(math.prod, checkpoint.config.shapes.values()))
        bits = 8 * checkpoint.nbytes / weights
        name, first = self._first.setdefault(f"{bits:.2f}", (title, scores))
        parts = {
            name: (scores.of_part(i), first.of_part(i)) for i, name in enumerate(self.texts.names)
        }
        if len(parts) > 1:
            parts[ALL] = (scores, first)
        self.found.append(
            {
                "title": title,
                "checkpoint": checkpoint.fingerprint(),
                "bits_per_weight": bits,
                "kl_ratio_to": None if first is scores else name,
                "parts": {part: _part(*pair) for part, pair in parts.items()},
            }
        )
        return self.found[-1]


def _part(scores: Scores, first: Scores) -> dict[str, Any]:
    ratio = Ratio.of(scores, first)
    return scores.summary() | {
        "kl_ratio": {"mean": ratio.mean, "factor": ratio.factor},
        "kl_by_sequence": scores.by_sequence(scores.kl).tolist(),
    }
