"""Measure how far a checkpoint's tensors are from the source's, and bound it by the method."""

import math
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from magistral_mlx.checkpoint.folder import Checkpoint
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.convert.packing import PARTS, dequantize
from magistral_mlx.convert.source.source import Source
from magistral_mlx.convert.threads import unordered

# Source bytes per job: float32 copies stay in a core's cache; larger blocks take twice as long.
COMPARE_BLOCK_BYTES = 2**20
# Largest relative change of a value by rounding to the type.
ROUNDOFF = {"BF16": 2**-8, "F16": 2**-11, "F32": 2**-24}
# The smallest positive value.
SMALLEST = {"BF16": 2**-133, "F16": 2**-24, "F32": 2**-149}
# Relative error of float32 arithmetic here and in MLX.
FLOAT32_NOISE = 2**-21
# Smallest scale that MLX gives an affine group.
LEAST_STEP = 1e-7
# Largest change by GPTQ, in spans (max - min) of a group; generous: only the inputs bound it.
GPTQ_SPANS = 4


@dataclass(frozen=True, slots=True)
class TensorError:
    """The error of one tensor of the source.

    Attributes:
        name: in the source.
        stored_as: its format in the checkpoint.
        relative: ||W - W'|| / ||W||, in Frobenius norms.
        largest: max |w - w'|.
        of_bound: largest error divided by the method's bound; over 1 means unexplained.
    """

    name: str
    stored_as: str
    relative: float
    largest: float
    of_bound: float

    @property
    def is_explained(self) -> bool:
        """Tell whether the method alone can explain the error."""
        return self.of_bound <= 1 and math.isfinite(self.relative)


@dataclass(frozen=True, slots=True)
class _Part:
    """The error of a block of rows."""

    name: str
    nbytes: int  # in the source
    squares: float
    squares_off: float
    largest: float
    of_bound: float


def measure_errors(
    checkpoint: Checkpoint, source: Source, method: str = "round"
) -> Generator[tuple[int, str], None, list[TensorError]]:
    """Compare every tensor with its source; return the errors, the worst relative error first.

    Yields the source bytes just compared, and the tensor's name. ``method`` is one of METHODS.
    """
    parts: dict[str, list[_Part]] = {name: [] for name in source.config.shapes}
    with closing(unordered(_jobs(checkpoint, source, method))) as measured:
        for part in measured:
            parts[part.name].append(part)
            yield part.nbytes, part.name
    found = [
        _together(name, _in_words(_format(checkpoint, name)), blocks)
        for name, blocks in parts.items()
    ]
    return sorted(found, key=lambda error: (error.is_explained, -error.relative, error.name))


def rounding_bound(groups: mx.array, quant: QuantFormat | None, dtype: str) -> mx.array:
    """Return the most by which rounding moves a value, ``[n, 1]``.

    Affine: a step is (max - min) / (2^bits - 1). The nearest code is half a step away. But MLX
    stretches the step so that the value of largest magnitude is a code, which may leave the other
    end one step short. Then scale and bias are rounded to ``dtype``; the scale's error counts up to
    all codes.
    mxfp4, mxfp8: the scale is a power of two, by MLX on Metal the nearest to max |w| over the
    largest code. So up to 1 - 1/sqrt(2) of max |w| is cut off, more than half of any gap between
    codes.
    nvfp4: the scale is an 8-bit float, off by 1/16 or, near zero, 2^-10, and 448 at most. Codes go
    to 6, after 4.

    Args:
        groups: values ``[n, group]`` float32.
        quant: None for values that are not packed; a group is one value then.
        dtype: of scales, biases and unpacked values, as safetensors spells it.
    """
    magnitude = mx.abs(groups).max(axis=-1, keepdims=True)
    roundoff, smallest = ROUNDOFF[dtype], SMALLEST[dtype]
    noise = FLOAT32_NOISE * magnitude
    if quant is None:
        return roundoff * magnitude + smallest + noise
    if quant.mode == "affine":
        codes = 2**quant.bits - 1
        span = groups.max(axis=-1, keepdims=True) - groups.min(axis=-1, keepdims=True)
        stored = roundoff * (1.5 * span + 2 * magnitude) + codes * smallest
        return mx.maximum(span / codes, LEAST_STEP) + stored + noise
    if quant.mode == "nvfp4":
        scale = magnitude / 6
        off = mx.maximum(scale / 16, 2**-10)
        packed = mx.maximum(mx.maximum(scale + off, 6 * off), magnitude - 6 * 448)
    else:
        packed = (1 - math.sqrt(0.5)) * magnitude
    return packed + 2 * roundoff * magnitude + smallest + noise


def _jobs(checkpoint: Checkpoint, source: Source, method: str) -> Iterator[partial[_Part]]:
    for name, (count, *_) in source.config.shapes.items():
        step = source.row_step(name, COMPARE_BLOCK_BYTES)
        for row in range(0, count, step):
            yield partial(
                _measure, checkpoint, source, name, slice(row, min(row + step, count)), method
            )


def _measure(checkpoint: Checkpoint, source: Source, name: str, rows: slice, method: str) -> _Part:
    quant = _format(checkpoint, name)
    size = 1 if quant is None else quant.group_size
    with mx.stream(mx.cpu):
        wanted = source.read(name, rows)
        whole = wanted.astype(mx.float32).reshape(-1, size)
        off = mx.abs(_restored(checkpoint, name, rows, quant).reshape(-1, size) - whole)
        bound = rounding_bound(whole, quant, _float_type(checkpoint, name))
        if quant is not None and quant.mode == "affine" and method != "round":
            bound = bound + GPTQ_SPANS * (
                whole.max(axis=-1, keepdims=True) - whole.min(axis=-1, keepdims=True)
            )
            if method == "importance":
                bound = mx.minimum(
                    bound, _nearest_bound(whole, _grid(checkpoint, name, rows), quant)
                )
        of_bound = off / bound
        squares, squares_off = (
            float(np.array(mx.square(x).sum(axis=-1)).sum(dtype=np.float64)) for x in (whole, off)
        )
        return _Part(
            name, wanted.nbytes, squares, squares_off, float(off.max()), float(of_bound.max())
        )


def _nearest_bound(
    groups: mx.array, grid: tuple[mx.array, mx.array], quant: QuantFormat
) -> mx.array:
    """Return the distances of values ``[n, group]`` from a stored grid's nearest codes.

    The search stores the nearest codes. Between two at equal distance, float32 noise decides.
    """
    scales, biases = grid
    steps = mx.where(scales == 0, 0, (groups - biases) / mx.where(scales == 0, 1, scales))
    nearest = mx.clip(mx.round(steps), 0, 2**quant.bits - 1)
    noise = FLOAT32_NOISE * (mx.abs(groups) + mx.abs(biases) + 2**quant.bits * mx.abs(scales))
    return mx.abs(scales * nearest + biases - groups) + noise


def _grid(checkpoint: Checkpoint, name: str, rows: slice) -> tuple[mx.array, mx.array]:
    """Read the scales and biases of rows, each ``[n, 1]`` in float32."""
    module = name.removesuffix(".weight")
    scales, biases = (
        checkpoint.read(f"{module}.{kind}", rows).astype(mx.float32) for kind in PARTS[1:]
    )
    return scales.reshape(-1, 1), biases.reshape(-1, 1)


def _restored(
    checkpoint: Checkpoint, name: str, rows: slice, quant: QuantFormat | None
) -> mx.array:
    """Read rows of a tensor as a runtime sees them, in float32."""
    if quant is None:
        return checkpoint.read(name, rows).astype(mx.float32)
    module = name.removesuffix(".weight")
    kinds = PARTS if quant.mode == "affine" else PARTS[:2]
    parts = {kind: checkpoint.read(f"{module}.{kind}", rows) for kind in kinds}
    if quant.mode == "affine":
        parts |= {kind: parts[kind].astype(mx.float32) for kind in kinds[1:]}
    return dequantize(parts, quant, mx.float32)


def _format(checkpoint: Checkpoint, name: str) -> QuantFormat | None:
    """Return the format of a tensor; None if it is not packed."""
    return checkpoint.formats.get(name.removesuffix(".weight"))


def _float_type(checkpoint: Checkpoint, name: str) -> str:
    """Return the float type of a tensor or its scales; the last norm's if scales are uint8."""
    quant = _format(checkpoint, name)
    if quant is not None:
        name = (
            f"{name.removesuffix('.weight')}.scales"
            if quant.mode == "affine"
            else "model.norm.weight"
        )
    return next(shard.header[name].dtype for shard in checkpoint.shards if name in shard.header)


def _together(name: str, stored_as: str, parts: list[_Part]) -> TensorError:
    squares, off = sum(part.squares for part in parts), sum(part.squares_off for part in parts)
    relative = math.sqrt(off / squares) if squares else math.sqrt(off)
    largest, of_bound = max(part.largest for part in parts), max(part.of_bound for part in parts)
    return TensorError(name, stored_as, relative, largest, of_bound)


def _in_words(quant: QuantFormat | None) -> str:
    if quant is None:
        return "float"
    kind = f"{quant.bits} bit" if quant.mode == "affine" else quant.mode
    return f"{kind}, groups of {quant.group_size}"
