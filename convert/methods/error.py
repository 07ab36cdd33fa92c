"""Measure how quantizing a linear's weight changes its outputs.

Letters: n rows, m columns, t tokens. For rows w and their quantized values v:
error = mean over tokens of |(v - w) x|^2, summed over rows.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.convert.calibration.host import matmul
from magistral_mlx.convert.packing import dequantize


class OutputError(NamedTuple):
    """Sums of squares over the outputs of a linear, per token of the calibration.

    Attributes:
        rounded: error of the weight that ``mx.quantize`` gives.
        found: error of the weight that is written.
        signal: the outputs themselves.
    """

    rounded: float
    found: float
    signal: float

    @classmethod
    def weighted(
        cls,
        weight: mx.array,
        parts: Mapping[str, mx.array],
        rounded: Mapping[str, mx.array],
        quant: QuantFormat,
        importance: mx.array,
    ) -> "OutputError":
        """Estimate from mean squares of the inputs ``[m]``, as if inputs were independent."""

        def squares(rows: mx.array) -> float:  # [n, m]
            return _total(mx.square(rows) @ importance)

        return cls(*map(squares, _differences(weight, parts, rounded, quant)))

    @classmethod
    def sampled(
        cls,
        weight: mx.array,
        parts: Mapping[str, mx.array],
        rounded: Mapping[str, mx.array],
        quant: QuantFormat,
        x: mx.array,
    ) -> "OutputError":
        """Measure on inputs ``x`` ``[t, m]``."""

        def squares(rows: mx.array) -> float:  # [n, m]
            return _total(mx.square(matmul(x, rows.T)).sum(axis=0)) / len(x)

        return cls(*map(squares, _differences(weight, parts, rounded, quant)))

    @classmethod
    def together(cls, parts: Iterable["OutputError"]) -> "OutputError":
        """Add up the errors of blocks of rows, exactly, so that their order does not matter."""
        found = list(parts)
        return cls(*(math.fsum(values) for values in zip(*found, strict=True)))


def as_read(parts: Mapping[str, mx.array], quant: QuantFormat) -> mx.array:
    """Dequantize rows to float32; affine formats are computed in float32."""
    if quant.mode == "affine":
        parts = {
            kind: part if kind == "weight" else part.astype(mx.float32)
            for kind, part in parts.items()
        }
    return dequantize(parts, quant, mx.float32)


def _differences(
    weight: mx.array,
    parts: Mapping[str, mx.array],
    rounded: Mapping[str, mx.array],
    quant: QuantFormat,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return v - w of ``rounded``, v - w of ``parts``, and w; all ``[n, m]`` float32."""
    w = weight.astype(mx.float32)
    return as_read(rounded, quant) - w, as_read(parts, quant) - w, w


def _total(values: mx.array) -> float:
    return float(np.array(values).sum(dtype=np.float64))
