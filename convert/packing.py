"""Quantize and dequantize weights with MLX; refuse weights that are not finite."""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from magistral_mlx.checkpoint.quant_format import AFFINE_GROUP_SIZES, QuantFormat
from magistral_mlx.errors import ConversionError

PARTS = ("weight", "scales", "biases")
# Bits of a float whose exponent is all ones: infinity, or above it NaN.
EXPONENTS = {mx.bfloat16: 0x7F80, mx.float16: 0x7C00, mx.float32: 0x7F80_0000}


def quantize(
    weight: mx.array, quant: QuantFormat, *, name: str = "the weight"
) -> dict[str, mx.array]:
    """Round a weight by its groups' scales, bit for bit as ``mx.quantize``.

    Rows are independent: blocks of rows, quantized one by one, give the same as the whole.

    Args:
        weight: ``[rows, columns]`` in bfloat16, float16 or float32.
        quant: the format.
        name: of the tensor, for messages.

    Returns:
        ``weight`` (packed in uint32), ``scales`` and, for affine formats, ``biases``, in the shapes
        of ``quant.packed_shapes``. Scales and biases of affine formats have the type of
        ``weight``, other scales are uint8.

    Raises:
        ConversionError: the groups do not divide the columns, or weight or scales are not finite.
    """
    check_divisible(name, weight.shape, quant)
    check_finite(name, weight)
    packed = mx.quantize(weight, quant.group_size, quant.bits, quant.mode)
    # Only affine formats have biases.
    parts = dict(zip(PARTS, packed, strict=False))
    if quant.mode == "affine":
        check_finite(
            name, *packed[1:], what="is so large that the scales of its groups hold NaN or infinity"
        )
    return parts


def dequantize(
    parts: Mapping[str, mx.array], quant: QuantFormat, dtype: mx.Dtype | None = None
) -> mx.array:
    """Unpack a weight; its type is that of the scales by default, or bfloat16 if they are uint8."""
    return mx.dequantize(
        parts["weight"],
        parts["scales"],
        parts.get("biases"),
        group_size=quant.group_size,
        bits=quant.bits,
        mode=quant.mode,
        dtype=dtype,
    )


def check_divisible(name: str, shape: tuple[int, ...], quant: QuantFormat) -> None:
    """Raise ConversionError unless the groups divide the columns of a matrix."""
    if shape[-1] % quant.group_size == 0:
        return
    fitting = (
        [size for size in AFFINE_GROUP_SIZES if shape[-1] % size == 0]
        if quant.mode == "affine"
        else []
    )
    module = name.removesuffix(".weight").split(".")[-1]
    way_out = (
        f"use a group size of {fitting[-1]}"
        if fitting
        else f'leave it in floats by a recipe with the rule {{"match": "*{module}", "bits": 16}}'
    )
    raise ConversionError(
        f"tensor {name!r} has {shape[-1]} columns, "
        f"which groups of {quant.group_size} do not divide; {way_out}"
    )


def check_finite(name: str, *arrays: mx.array, what: str = "holds NaN or infinity") -> None:
    """Raise ConversionError if a value is NaN or infinite: no runtime could use it."""
    if not all(map(is_finite, arrays)):
        raise ConversionError(f"tensor {name!r} {what}; the source is damaged: download it again")


def is_finite(array: mx.array) -> bool:
    """Tell whether no value is NaN or infinite."""
    # By the bits, in NumPy: mx.isfinite takes longer than quantizing.
    exponent = EXPONENTS[array.dtype]
    bits = np.array(array.view(mx.uint32 if array.dtype == mx.float32 else mx.uint16), copy=False)
    # The largest signed value is positive, the largest unsigned one negative, if there is one.
    signed = bits.view(f"i{bits.itemsize}")
    return (
        int(signed.max()) < exponent and int(bits.max()) < exponent + np.iinfo(signed.dtype).max + 1
    )


def cast(name: str, rows: mx.array, dtype: mx.Dtype) -> mx.array:
    """Cast source rows to the output's type; raise ConversionError if a value overflows."""
    found = rows.astype(dtype)
    if found.dtype != rows.dtype:
        check_finite(name, rows)
        check_finite(
            name, found, what=f"holds values too large for {dtype}, the type in config.json"
        )
    return found


def round_rows(name: str, rows: mx.array, quant: QuantFormat | None) -> Mapping[str, mx.array]:
    """Round rows of a source tensor; return the rows of every resulting tensor by name."""
    if quant is None:
        check_finite(name, rows)
        return {name: rows}
    module = name.removesuffix(".weight")
    return {f"{module}.{part}": array for part, array in quantize(rows, quant, name=name).items()}
