"""What is lost in packed rows, and what rounding would lose."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.convert.calibration.host import matmul
from magistral_mlx.convert.packing import dequantize, quantize


class OutputError(NamedTuple):
    """Sums of squares over outputs of a linear, per token of the calibration.

    Attributes:
        rounded: of what ``mx.quantize`` would put off.
        found: of what is put off by the codes that are written.
        signal: of the outputs themselves.
    """

    rounded: float
    found: float
    signal: float

    @classmethod
    def weighted(
        cls,
        weight: mx.array,
        parts: Mapping[str, mx.array],
        quant: QuantFormat,
        importance: mx.array,
    ) -> "OutputError":
        """As if inputs were independent, with mean squares ``importance`` ``[columns]``, of rows ``weight``."""

        def squares(rows: mx.array) -> float:
            return _total(mx.square(rows) @ importance)

        return cls(*map(squares, _off(weight, parts, quant)))

    @classmethod
    def sampled(
        cls, weight: mx.array, parts: Mapping[str, mx.array], quant: QuantFormat, x: mx.array
    ) -> "OutputError":
        """Of inputs ``x`` ``[tokens, columns]``, and rows ``weight``."""

        def squares(rows: mx.array) -> float:
            return _total(mx.square(matmul(x, rows.T)).sum(axis=0)) / len(x)

        return cls(*map(squares, _off(weight, parts, quant)))

    @classmethod
    def together(cls, parts: Iterable["OutputError"]) -> "OutputError":
        """Of all rows, in the order given: that of floats changes their sum."""
        found = list(parts)
        return cls(*(math.fsum(values) for values in zip(*found, strict=True)))


def _off(
    weight: mx.array, parts: Mapping[str, mx.array], quant: QuantFormat
) -> tuple[mx.array, mx.array, mx.array]:
    w = weight.astype(mx.float32)
    return as_read(quantize(weight, quant), quant) - w, as_read(parts, quant) - w, w


def as_read(parts: Mapping[str, mx.array], quant: QuantFormat) -> mx.array:
    """The values of packed rows, computed in float32 as far as the format has floats."""
    if quant.mode == "affine":
        parts = {
            kind: part if kind == "weight" else part.astype(mx.float32)
            for kind, part in parts.items()
        }
    return dequantize(parts, quant, mx.float32)


def _total(values: mx.array) -> float:
    return float(np.array(values).sum(dtype=np.float64))
