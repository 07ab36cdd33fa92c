"""GPTQ: round columns one by one; later columns compensate for each error.

Letters: n rows, m columns, s group size. Weights W lie as ``[m, n]`` here, columns first.

    H        Hessian, the mean over tokens of x x^T, damped
    U        upper triangular, H^-1 = U^T U
    e_j      error of column j in units of U_jj: (w_j - value of its code) / U_jj
    w_k      -= U_jk e_j for every later column k

The grid of a group comes from ``search`` on its updated weights.
Source: https://arxiv.org/abs/2210.17323 (Frantar et al.).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.convert.calibration.host import matmul
from magistral_mlx.convert.methods.search import (
    Grid,
    as_groups,
    as_shares,
    best_grid,
    nearest_codes,
    stored_parts,
)
from magistral_mlx.convert.packing import check_divisible, check_finite

# Share of the mean diagonal added to it: few inputs leave a Hessian without full rank.
DAMPING = 0.01
# Columns whose errors reach the later columns in one product.
SLAB = 512
# Largest triangular matrix that is inverted at once.
LEAF = 128


@dataclass(frozen=True, slots=True)
class Curvature:
    """The damped Hessian of a run of columns.

    Attributes:
        importance: ``[m]`` float32, the diagonal of H.
        upper: ``[m, m]`` float32, U with H^-1 = U^T U.
    """

    importance: mx.array
    upper: mx.array

    @classmethod
    def of(cls, hessian: mx.array) -> "Curvature":
        """Factor a Hessian ``[m, m]`` in float64; a zero diagonal becomes its mean."""
        h: NDArray[np.float64] = np.array(hessian, dtype=np.float64)
        diagonal = h.diagonal().copy()
        mean = float(diagonal.mean()) or 1.0
        np.fill_diagonal(h, np.where(diagonal > 0, diagonal, mean) + DAMPING * mean)
        # H = R R^T with R upper triangular: the Cholesky factor of H with its rows and columns
        # reversed. U is R^-1.
        root: NDArray[np.float64] = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1].astype(
            np.float64, copy=False
        )
        upper = inverse_upper(root)
        return cls(mx.array(h.diagonal().astype(np.float32)), mx.array(upper.astype(np.float32)))


def quantize_gptq(
    weight: mx.array,
    curvatures: Sequence[Curvature],
    quant: QuantFormat,
    *,
    name: str = "the weight",
) -> dict[str, mx.array]:
    """Quantize by GPTQ. Rows are independent of each other.

    Args:
        weight: ``[n, m]`` in bfloat16, float16 or float32.
        curvatures: one for each run of columns, in order; runs hold whole groups.
        quant: an affine format.
        name: of the tensor, for messages.

    Returns:
        The tensors that ``quantize`` returns.

    Raises:
        ConversionError: ``quantize`` would refuse the weight.
    """
    check_divisible(name, weight.shape, quant)
    check_finite(name, weight)
    done: list[dict[str, mx.array]] = []
    start = 0
    for curvature in curvatures:
        end = start + len(curvature.importance)
        done += _sweep(weight[:, start:end], curvature, quant, name)
        start = end
    assert start == weight.shape[1], f"curvatures of {start} columns for {weight.shape[1]}"
    return {part: mx.concatenate([group[part] for group in done], axis=1) for part in done[0]}


def _sweep(
    weight: mx.array, curvature: Curvature, quant: QuantFormat, name: str
) -> list[dict[str, mx.array]]:
    """Quantize the columns that share a Hessian; return their groups in order."""
    size, upper, dtype = quant.group_size, curvature.upper, weight.dtype
    shares = as_shares(curvature.importance, size)  # [m / s, 1, s]
    columns = as_groups(weight, size).reshape(-1, weight.shape[0])  # [m, n]
    slabs = [columns[start : start + SLAB] for start in range(0, len(columns), SLAB)]
    done = []
    for i, slab in enumerate(slabs):
        u = upper[i * SLAB : i * SLAB + len(slab)]  # [slab, m]
        # e of the groups before in this slab, [s, n] each.
        errors: list[mx.array] = []
        for first in range(0, len(slab), size):
            here = i * SLAB + first
            w = slab[first : first + size]  # [s, n]
            if errors:
                w = w - matmul(u[:first, here : here + size].T, mx.concatenate(errors))
            g = here // size
            grid = best_grid(w[None], shares[g : g + 1], quant, dtype, name=name)
            u_group = u[first : first + size, here : here + size]  # [s, s]
            codes, error = _round_columns(w, grid, u_group, quant.bits)
            errors.append(error)
            done.append(stored_parts(codes[None], grid, quant.bits, dtype))
            mx.eval(done[-1], error)
        if (i + 1) * SLAB < len(columns):
            e = mx.concatenate(errors)  # [slab, n]
            for j in range(i + 1, len(slabs)):
                slabs[j] = slabs[j] - matmul(u[:, j * SLAB : (j + 1) * SLAB].T, e)
            mx.eval(slabs)
    return done


def _round_columns(
    w: mx.array, grid: Grid, upper: mx.array, bits: int
) -> tuple[mx.array, mx.array]:
    """Round the columns of a group ``[s, n]``, each updated by the errors before it.

    Returns:
        Codes and errors e, both ``[s, n]``.
    """
    scales, biases = (part[0] for part in grid)  # [1, n]
    pivots, codes, errors = mx.diagonal(upper), [], []
    for j in range(len(w)):
        column, w = w[:1], w[1:]
        code = nearest_codes(column, Grid(scales, biases), bits)
        error = (column - (scales * code + biases)) / pivots[j]
        w = w - upper[j, j + 1 :, None] * error
        codes.append(code)
        errors.append(error)
    return mx.concatenate(codes), mx.concatenate(errors)


def inverse_upper(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Invert an upper triangular matrix by halves, at the speed of matrix products."""
    n = len(matrix)
    if n <= LEAF:
        return np.triu(np.linalg.inv(matrix))
    half = n // 2
    first, last = inverse_upper(matrix[:half, :half]), inverse_upper(matrix[half:, half:])
    inverse = np.zeros_like(matrix)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -first @ (matrix[:half, half:] @ last)
    return inverse
