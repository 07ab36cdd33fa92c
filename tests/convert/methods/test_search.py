"""The weighted search against all assignments of codes, and against ``mx.quantize``."""

from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from magistral_mlx.checkpoint.quant_format import AFFINE_BITS, AFFINE_GROUP_SIZES, QuantFormat
from magistral_mlx.convert.methods import search
from magistral_mlx.convert.methods.search import (
    Grid,
    as_shares,
    nearest_codes,
    pack_codes,
    quantize_weighted,
)
from magistral_mlx.convert.packing import dequantize, quantize
from magistral_mlx.errors import ConversionError

Array = NDArray[np.float64]
LARGEST = {mx.bfloat16: 1e37, mx.float16: 3e4, mx.float32: 1e37}


def groups_of_all_kinds(count: int, size: int, largest: float, seed: int) -> Array:
    """Draw groups ``[count, size]`` of ten kinds.

    Normal, heavy-tailed, constant, zero, small, tiny, huge, one outlier, far from 0, in steps.
    """
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(count, size))
    outlier = 0.01 * normal
    outlier[np.arange(count), rng.integers(size, size=count)] = rng.normal(size=count) * 50
    kinds = np.stack(
        [
            normal,
            rng.standard_t(2, size=(count, size)),
            np.repeat(normal[:, :1], size, axis=1),
            np.zeros((count, size)),
            1e-6 * normal,
            1e-30 * normal,
            largest * np.tanh(normal),
            outlier,
            100 + 0.1 * normal,
            np.round(2 * normal) / 8,
        ]
    )
    return kinds[rng.integers(len(kinds), size=count), np.arange(count)]


def exactly(array: mx.array) -> Array:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def errors(
    weight: mx.array, importance: Array, parts: dict[str, mx.array], quant: QuantFormat
) -> Array:
    """Return each group's weighted error ``[rows, groups]`` by the stored parts, in float64."""
    rows, columns = weight.shape
    ones = {"scales": mx.ones(parts["scales"].shape), "biases": mx.zeros(parts["scales"].shape)}
    codes = exactly(dequantize({"weight": parts["weight"]} | ones, quant)).reshape(
        rows, -1, quant.group_size
    )
    values = exactly(parts["scales"])[..., None] * codes + exactly(parts["biases"])[..., None]
    off = values.reshape(rows, columns) - exactly(weight)
    return (importance * off**2).reshape(rows, -1, quant.group_size).sum(axis=-1)


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_codes_are_packed_as_mlx_does(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(2**bits, size=(3, 128))
    # With both extremes in each group, MLX's codes of these numbers are the numbers themselves.
    codes[:, ::32], codes[:, 1::32] = 0, 2**bits - 1
    words = pack_codes(mx.array(codes.T), bits)
    one, zero = mx.ones((3, 4)), mx.zeros((3, 4))
    restored = dequantize({"weight": words, "scales": one, "biases": zero}, QuantFormat(bits, 32))
    assert np.array_equal(np.array(restored), codes)
    ours, scales, biases = mx.quantize(mx.array(codes).astype(mx.float32), 32, bits)
    values = mx.dequantize(ours, scales, biases, 32, bits)
    assert np.array_equal(np.round(np.array(values)), codes)


@pytest.mark.parametrize(
    ("bits", "size", "at_most", "before"), [(2, 5, 1.15, 2.0), (2, 7, 1.15, 1.7), (3, 5, 1.6, 2.5)]
)
def test_the_search_comes_near_the_best_of_all_assignments(
    bits: int, size: int, at_most: float, before: float
) -> None:
    """Try every assignment of codes with its least-squares line, in float64.

    With so few weights the best one is a coincidence, so its mean error is met within a factor.
    """
    count, levels = 300, 2**bits - 1
    rng = np.random.default_rng(bits)
    w, h = rng.normal(size=(count, size)), rng.uniform(0.05, 1, size=size)
    h /= h.sum()
    centred = w - (w @ h)[:, None]
    # Other assignments are shifted copies of these.
    codes = np.array([c for c in product(range(levels + 1), repeat=size) if min(c) == 0 < max(c)])
    lines = codes - (codes @ h)[:, None]
    explained = (centred @ (lines * h).T) ** 2 / ((lines**2) @ h)  # [count, assignments]
    best = (centred**2) @ h - explained.max(axis=1)
    columns = mx.array(w.T[None].astype(np.float32))
    low, high = w.min(axis=1), w.max(axis=1)
    known = Grid(
        *(mx.array(x.astype(np.float32))[None, None] for x in ((high - low) / levels, low))
    )
    found = search.search(
        columns, as_shares(mx.array(h.astype(np.float32)), size), known, bits, mx.float32
    )
    errors = []
    for grid in (known, found):
        q = exactly(nearest_codes(columns, grid, bits))[0].T
        values = exactly(grid.scales)[0].T * q + exactly(grid.biases)[0].T
        errors.append(((values - w) ** 2) @ h)
    assert (errors[1] >= best * (1 - 1e-4) - 1e-12).all()
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert np.mean(errors[1]) <= at_most * np.mean(best)
    assert np.mean(errors[0]) >= before * np.mean(best)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_of_10_000_groups_none_is_worse_than_by_mlx(bits: int, dtype: mx.Dtype) -> None:
    quant = QuantFormat(bits, 64)
    rows = groups_of_all_kinds(10_000, 64, LARGEST[dtype], bits).reshape(1000, 640)
    weight = mx.array(rows.astype(np.float32)).astype(dtype)
    importance = np.exp(np.random.default_rng(1).normal(size=640)).astype(np.float32)
    # Outlier channels, a dead group and a dead channel.
    importance[::97] *= 300
    importance[64:128] = 0
    importance[200] = 0
    searched = errors(
        weight, importance, quantize_weighted(weight, mx.array(importance), quant).parts, quant
    )
    rounded = errors(weight, importance, quantize(weight, quant), quant)
    # Sums are in float32: an exact group leaves the rounding error of its largest weight.
    largest = np.abs(exactly(weight)).reshape(1000, 10, 64).max(axis=-1)
    rounding = 2.0**-22 * largest * np.sqrt(importance.reshape(10, 64).sum(axis=-1))
    assert (np.sqrt(searched) <= np.sqrt(rounded) * (1 + 1e-5) + rounding).all()
    assert (searched < 0.9 * rounded).mean() > 0.4
    assert np.isfinite(searched).all()


@pytest.mark.parametrize("group_size", AFFINE_GROUP_SIZES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_the_format_is_mlx_s_for_every_width_and_group(bits: int, group_size: int) -> None:
    quant = QuantFormat(bits, group_size)
    weight = mx.random.normal((9, 384), key=mx.random.key(3)).astype(mx.bfloat16)
    importance = mx.random.uniform(shape=(384,), key=mx.random.key(4))
    parts, rounded = quantize_weighted(weight, importance, quant).parts, quantize(weight, quant)
    assert [(k, p.shape, p.dtype) for k, p in parts.items()] == [
        (k, p.shape, p.dtype) for k, p in rounded.items()
    ]
    h = exactly(importance)
    assert (errors(weight, h, parts, quant) <= errors(weight, h, rounded, quant) * (1 + 1e-5)).all()
    assert errors(weight, h, parts, quant).sum() < 0.95 * errors(weight, h, rounded, quant).sum()


def test_how_many_groups_are_searched_at_once_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = mx.random.normal((7, 320), key=mx.random.key(5)).astype(mx.bfloat16)
    importance = mx.random.uniform(shape=(320,), key=mx.random.key(6))
    at_once = quantize_weighted(weight, importance, QuantFormat(3, 64)).parts
    monkeypatch.setattr(search, "BLOCK_WEIGHTS", 2 * 7 * 64)
    in_parts = quantize_weighted(weight, importance, QuantFormat(3, 64)).parts
    assert all(mx.array_equal(at_once[part], in_parts[part]) for part in at_once)


def test_only_the_proportions_of_importances_within_a_group_count() -> None:
    weight = mx.random.normal((5, 128), key=mx.random.key(7)).astype(mx.bfloat16)
    importance = mx.random.uniform(shape=(128,), key=mx.random.key(8))
    plain = quantize_weighted(weight, importance, QuantFormat(4, 64)).parts
    for factor in (2.0**-120, 2.0**100):
        scaled = quantize_weighted(weight, importance * factor, QuantFormat(4, 64)).parts
        assert all(mx.array_equal(plain[part], scaled[part]) for part in plain)


def test_a_weight_that_cannot_be_quantized_is_named() -> None:
    with pytest.raises(
        ConversionError, match="'x' has 96 columns, which groups of 64 do not divide"
    ):
        quantize_weighted(mx.zeros((2, 96)), mx.ones(96), QuantFormat(4, 64), name="x")
    weight = mx.zeros((3, 64))
    weight[2, 5] = mx.nan
    with pytest.raises(ConversionError, match="'x' holds NaN or infinity"):
        quantize_weighted(weight, mx.ones(64), QuantFormat(4, 64), name="x")
    with pytest.raises(ConversionError, match="'x' is so large"):
        quantize_weighted(
            mx.array([3e38, -3e38] * 16)[None].astype(mx.bfloat16),
            mx.ones(32),
            QuantFormat(4, 32),
            name="x",
        )
