"""Rounding by MLX, and the weights that it refuses."""

import mlx.core as mx
import numpy as np
import pytest

from magistral_mlx.checkpoint.quant_format import (
    AFFINE_BITS,
    AFFINE_GROUP_SIZES,
    FP_FORMATS,
    QuantFormat,
)
from magistral_mlx.convert.packing import dequantize, quantize
from magistral_mlx.convert.recipe.layout import make_plan
from magistral_mlx.convert.recipe.options import ConvertOptions
from magistral_mlx.errors import ConversionError
from tests.support.tiny import make_config

FORMATS = [QuantFormat(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUP_SIZES]
FORMATS += [QuantFormat(bits, group, mode) for mode, (bits, group) in FP_FORMATS.items()]  # type: ignore[arg-type]


def same(a: mx.array, b: mx.array) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool(mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)))
    )


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("quant", FORMATS, ids=lambda q: f"{q.mode}-{q.bits}-{q.group_size}")
def test_rounding_is_mlx_s_own_in_whole_and_by_blocks_of_rows(
    quant: QuantFormat, dtype: mx.Dtype
) -> None:
    weight = mx.random.normal((7, 384), key=mx.random.key(1)).astype(dtype)
    weight[3] = 0
    expected = mx.quantize(weight, quant.group_size, quant.bits, quant.mode)
    parts = quantize(weight, quant)
    assert {kind: part.shape for kind, part in parts.items()} == quant.packed_shapes((7, 384))
    blocks = [quantize(weight[rows], quant) for rows in (slice(0, 1), slice(1, 6), slice(6, 7))]
    for (kind, part), whole in zip(parts.items(), expected, strict=True):
        assert same(part, whole)
        assert same(mx.concatenate([block[kind] for block in blocks]), whole)
    restored = mx.dequantize(
        *expected, group_size=quant.group_size, bits=quant.bits, mode=quant.mode
    )
    assert same(dequantize(parts, quant), restored)


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_the_inverse_is_off_by_half_a_step_at_most(bits: int) -> None:
    weight = mx.random.normal((16, 128), key=mx.random.key(2))
    quant = QuantFormat(bits, 32)
    groups = np.array(weight).reshape(16, 4, 32)
    # The step is the range over the levels. MLX moves it so that the extreme value is exact, which
    # can cost another half step at the other end.
    step = (groups.max(-1) - groups.min(-1)) / (2**bits - 1)
    error = np.abs(
        np.array(dequantize(quantize(weight, quant), quant)).reshape(16, 4, 32) - groups
    ).max(-1)
    assert (error <= 1.01 * step).all()


@pytest.mark.parametrize("value", [mx.nan, mx.inf, -mx.inf])
@pytest.mark.parametrize("quant", [QuantFormat(4, 64), QuantFormat(8, 32, "mxfp8")])
def test_a_weight_that_is_not_finite_is_named(value: float, quant: QuantFormat) -> None:
    weight = mx.zeros((3, 64))
    weight[2, 5] = value
    with pytest.raises(
        ConversionError, match=r"'lm_head\.weight' holds NaN or infinity; the source is damaged"
    ):
        quantize(weight, quant, name="lm_head.weight")


def test_a_weight_whose_scales_overflow_is_named() -> None:
    weight = mx.array([3e38, -3e38] * 16)[None].astype(mx.bfloat16)
    with pytest.raises(ConversionError, match="'x' is so large"):
        quantize(weight, QuantFormat(4, 32), name="x")


def test_columns_that_groups_do_not_divide_are_named() -> None:
    with pytest.raises(
        ConversionError,
        match=r"'x' has 96 columns, which groups of 64 do not divide; .* size of 32$",
    ):
        quantize(mx.zeros((2, 96)), QuantFormat(4, 64), name="x")
    with pytest.raises(
        ConversionError, match=r"'model\.layers\.0\.mlp\.down_proj\.weight' has 96 columns"
    ):
        make_plan(make_config(), "bfloat16", ConvertOptions())
