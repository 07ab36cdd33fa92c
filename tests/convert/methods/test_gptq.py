"""GPTQ against its definition in float64, with the inverse of each remaining Hessian."""

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from magistral_mlx.checkpoint.quant_format import AFFINE_BITS, QuantFormat
from magistral_mlx.convert.methods import gptq
from magistral_mlx.convert.methods.gptq import DAMPING, Curvature, inverse_upper, quantize_gptq
from magistral_mlx.convert.methods.search import quantize_weighted
from magistral_mlx.convert.packing import dequantize, quantize
from magistral_mlx.errors import ConversionError
from tests.convert.methods.test_search import exactly

Array = NDArray[np.float64]


def inputs(columns: int, tokens: int, seed: int = 0) -> Array:
    """Draw correlated inputs ``[tokens, columns]`` with outlier channels and a dead one."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, columns)) @ (
        np.eye(columns) + 0.5 * rng.normal(size=(columns, columns)) / 8
    )
    x[:, ::37] *= 12
    x[:, columns // 2 :: columns] = 0
    return x


def hessian_of(x: Array) -> Array:
    return x.T @ x / len(x)


def as_array(x: Array) -> mx.array:
    return mx.array(x.astype(np.float32))


def damped(hessian: Array) -> Array:
    diagonal = hessian.diagonal()
    return hessian + np.diag(np.where(diagonal > 0, 0, diagonal.mean()) + DAMPING * diagonal.mean())


def codes_of(parts: dict[str, mx.array], quant: QuantFormat) -> Array:
    ones = {"scales": mx.ones(parts["scales"].shape), "biases": mx.zeros(parts["scales"].shape)}
    return exactly(dequantize({"weight": parts["weight"]} | ones, quant))


def by_definition(
    weight: Array, hessian: Array, parts: dict[str, mx.array], quant: QuantFormat
) -> tuple[Array, Array]:
    """Return codes on the grid of ``parts``, and the weights that each group was rounded from.

    After each column the others change to minimize the output error, by the inverse of the
    remaining Hessian.
    """
    scales, biases = (
        np.repeat(exactly(parts[kind]), quant.group_size, axis=1) for kind in ("scales", "biases")
    )
    w, codes, updated = weight.copy(), np.zeros_like(weight), np.zeros_like(weight)
    columns = w.shape[1]
    for j in range(columns):
        if j % quant.group_size == 0:
            updated[:, j : j + quant.group_size] = w[:, j : j + quant.group_size]
        codes[:, j] = np.clip(
            np.round((w[:, j] - biases[:, j]) / scales[:, j]), 0, 2**quant.bits - 1
        )
        # The first row of the inverse.
        left = np.linalg.solve(hessian[j:, j:], np.eye(columns - j, 1)[:, 0])
        error = (w[:, j] - scales[:, j] * codes[:, j] - biases[:, j]) / left[0]
        w[:, j:] -= error[:, None] * left
    return codes, updated


@pytest.mark.parametrize("slab", [64, 512])
@pytest.mark.parametrize(
    ("bits", "columns", "group_size"), [(4, 128, 64), (3, 96, 32), (2, 256, 128), (8, 128, 32)]
)
def test_codes_are_those_of_the_dense_closed_form(
    bits: int, columns: int, group_size: int, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "SLAB", max(slab, group_size))
    quant = QuantFormat(bits, group_size)
    hessian = hessian_of(inputs(columns, 400))
    weight = mx.random.normal((8, columns), key=mx.random.key(bits)).astype(mx.bfloat16)
    parts = quantize_gptq(weight, [Curvature.of(as_array(hessian))], quant)
    codes, _ = by_definition(exactly(weight), damped(hessian), parts, quant)
    same = (codes == codes_of(parts, quant)).all(axis=1)
    # Of 8 rows: in float32 a tie may be rounded the other way, and then the rest of its row.
    assert same.sum() >= 7


def test_the_grid_of_a_group_is_searched_on_the_updated_weights() -> None:
    quant = QuantFormat(3, 32)
    hessian = hessian_of(inputs(128, 300))
    # In float32, so that scales are not rounded further.
    weight = mx.random.normal((16, 128), key=mx.random.key(0))
    parts = quantize_gptq(weight, [Curvature.of(as_array(hessian))], quant)
    _, updated = by_definition(exactly(weight), damped(hessian), parts, quant)
    importance = mx.array(damped(hessian).diagonal().astype(np.float32))
    wanted = quantize_weighted(as_array(updated), importance, quant).parts
    assert np.isclose(exactly(wanted["scales"]), exactly(parts["scales"]), rtol=1e-4).mean() >= 0.95
    not_updated = quantize_weighted(weight, importance, quant).parts
    assert (
        np.isclose(exactly(not_updated["scales"]), exactly(parts["scales"]), rtol=1e-4).mean()
        <= 0.3
    )


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_outputs_come_nearer_than_by_the_search_and_that_nearer_than_by_rounding(bits: int) -> None:
    quant, x = QuantFormat(bits, 64), inputs(192, 500, seed=bits)
    weight = mx.random.normal((32, 192), key=mx.random.key(bits)).astype(mx.bfloat16)
    hessian = hessian_of(x)
    ways = [
        quantize(weight, quant),
        quantize_weighted(weight, mx.array(hessian.diagonal().astype(np.float32)), quant).parts,
        quantize_gptq(weight, [Curvature.of(as_array(hessian))], quant),
    ]
    off = [
        np.square(x @ (exactly(dequantize(parts, quant, mx.float32)) - exactly(weight)).T).mean()
        for parts in ways
    ]
    assert off[1] < 0.75 * off[0]
    assert off[2] < 0.75 * off[1]


def test_without_correlation_it_is_the_search() -> None:
    quant = QuantFormat(4, 32)
    weight = mx.random.normal((5, 96), key=mx.random.key(1)).astype(mx.bfloat16)
    importance = np.linspace(0.1, 3, 96)
    curvature = Curvature.of(as_array(np.diag(importance)))
    parts = quantize_gptq(weight, [curvature], quant)
    searched = quantize_weighted(weight, curvature.importance, quant).parts
    assert all(mx.array_equal(parts[part], searched[part]) for part in parts)


def test_blocks_on_the_diagonal_are_quantized_by_themselves() -> None:
    quant, x = QuantFormat(4, 64), inputs(320, 300)
    weight = mx.random.normal((6, 320), key=mx.random.key(2)).astype(mx.bfloat16)
    runs = [slice(0, 128), slice(128, 320)]
    curvatures = [Curvature.of(as_array(hessian_of(x[:, run]))) for run in runs]
    whole = quantize_gptq(weight, curvatures, quant)
    alone = [
        quantize_gptq(weight[:, run], [c], quant) for run, c in zip(runs, curvatures, strict=True)
    ]
    assert all(
        mx.array_equal(whole[part], mx.concatenate([a[part] for a in alone], axis=1))
        for part in whole
    )


def test_few_tokens_and_dead_channels_leave_it_finite() -> None:
    x = inputs(128, 10)
    x[:, 64:] = 0
    for hessian in (hessian_of(x), np.zeros((128, 128))):
        curvature = Curvature.of(as_array(hessian))
        parts = quantize_gptq(
            mx.random.normal((3, 128), key=mx.random.key(3)), [curvature], QuantFormat(4, 64)
        )
        assert np.isfinite(exactly(dequantize(parts, QuantFormat(4, 64)))).all()


@pytest.mark.parametrize("n", [1, 127, 128, 129, 300])
def test_triangular_matrices_are_inverted_by_halves(n: int) -> None:
    matrix = np.triu(np.random.default_rng(n).normal(size=(n, n))) / n + np.eye(n)
    assert np.allclose(inverse_upper(matrix) @ matrix, np.eye(n), atol=1e-9)


def test_a_weight_that_cannot_be_quantized_is_named() -> None:
    curvature = Curvature.of(mx.eye(96))
    with pytest.raises(
        ConversionError, match="'x' has 96 columns, which groups of 64 do not divide"
    ):
        quantize_gptq(mx.zeros((2, 96)), [curvature], QuantFormat(4, 64), name="x")
    with pytest.raises(ConversionError, match="'x' holds NaN or infinity"):
        quantize_gptq(mx.full((2, 96), mx.nan), [curvature], QuantFormat(4, 32), name="x")
