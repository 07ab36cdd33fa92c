"""GPTQ: columns are rounded one by one, and those to come make up for the error, as far as the inputs let them.

Its grid is that of ``search``, found for each group on the weights as they are when its turn comes.
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

DAMPING = 0.01  # of the mean of the diagonal, added to it: few inputs leave a Hessian without rank
SLAB = 512  # columns whose errors reach the columns after them in one product
LEAF = 128  # columns of a triangular matrix that are inverted at once


@dataclass(frozen=True, slots=True)
class Curvature:
    """What the inputs of some neighbouring columns say about their errors.

    Attributes:
        importance: ``[columns]``, diagonal of the damped Hessian H.
        upper: ``[columns, columns]`` float32, U with H^-1 = U^T U.
    """

    importance: mx.array
    upper: mx.array

    @classmethod
    def of(cls, hessian: mx.array) -> "Curvature":
        """``hessian``: ``[columns, columns]``, the mean over tokens of the products of inputs. In float64, whose time
        is small beside what follows; a channel without input gets the mean of the others."""
        h: NDArray[np.float64] = np.array(hessian, dtype=np.float64)
        diagonal = h.diagonal().copy()
        mean = float(diagonal.mean()) or 1.0
        np.fill_diagonal(h, np.where(diagonal > 0, diagonal, mean) + DAMPING * mean)
        # H = R R^T with R upper triangular: the lower factor of H with rows and columns in reverse. U is R^-1.
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
        weight: ``[rows, columns]`` in bfloat16, float16 or float32.
        curvatures: of runs of columns one after the other, whole groups each, that together are all columns.
        quant: an affine format.
        name: of the tensor, for messages.
    Returns:
        As ``quantize``.
    Raises:
        ConversionError: as ``quantize``.
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
    """The groups of some columns, in order. Weights lie as ``[columns, rows]`` here."""
    size, upper, dtype = quant.group_size, curvature.upper, weight.dtype
    shares = as_shares(curvature.importance, size)
    columns = as_groups(weight, size).reshape(-1, weight.shape[0])
    slabs = [columns[start : start + SLAB] for start in range(0, len(columns), SLAB)]
    done = []
    for i, slab in enumerate(slabs):
        own = upper[i * SLAB : i * SLAB + len(slab)]  # [slab, columns]
        errors: list[mx.array] = []  # of the groups before in this slab
        for first in range(0, len(slab), size):
            here = i * SLAB + first  # in the columns of ``upper``
            group = slab[first : first + size]
            if errors:
                group = group - matmul(own[:first, here : here + size].T, mx.concatenate(errors))
            g = here // size
            grid = best_grid(group[None], shares[g : g + 1], quant, dtype, name=name)
            codes, error = _round_columns(
                group, grid, own[first : first + size, here : here + size], quant.bits
            )
            errors.append(error)
            done.append(stored_parts(codes[None], grid, quant.bits, dtype))
            mx.eval(done[-1], error)
        after = (i + 1) * SLAB
        if after < len(columns):
            together = mx.concatenate(errors)  # [slab, rows]
            for j in range(i + 1, len(slabs)):
                slabs[j] = slabs[j] - matmul(own[:, j * SLAB : (j + 1) * SLAB].T, together)
            mx.eval(slabs)
    return done


def _round_columns(
    group: mx.array, grid: Grid, upper: mx.array, bits: int
) -> tuple[mx.array, mx.array]:
    """Round the columns of one group ``[size, rows]`` in turn, each after the errors of those before it.

    Returns:
        Codes and, in units of U's diagonal, errors, both ``[size, rows]``.
    """
    within = Grid(*(part[0] for part in grid))  # [1, rows]
    pivots, codes, errors = mx.diagonal(upper), [], []
    for j in range(len(group)):
        column, group = group[:1], group[1:]
        code = nearest_codes(column, within, bits)
        error = (column - (within.scales * code + within.biases)) / pivots[j]
        group = group - upper[j, j + 1 :, None] * error
        codes.append(code)
        errors.append(error)
    return mx.concatenate(codes), mx.concatenate(errors)


def inverse_upper(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of an upper triangular matrix, by halves: as fast as matrix products are."""
    n = len(matrix)
    if n <= LEAF:
        return np.triu(np.linalg.inv(matrix))
    half = n // 2
    first, last = inverse_upper(matrix[:half, :half]), inverse_upper(matrix[half:, half:])
    inverse = np.zeros_like(matrix)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -first @ (matrix[:half, half:] @ last)
    return inverse
