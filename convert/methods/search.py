"""Search the scale and bias of each quantization group, weighted by mean squared inputs.

Letters: n rows, m columns, s group size, G = m / s groups. Weights of the search lie as
``[G, s, n]``, so that sums over a group are sums over axis 1. For one group of one row:

    w_i      weights
    h_i      importances, mean squares of the inputs, with sum 1 in each group
    a, b     scale and bias, in the type that is stored
    q_i      codes, round((w_i - b) / a) clipped to 0 .. 2^bits - 1
    d_i      residuals in steps, (w_i - b) / a - q_i
    error    |a| sqrt(sum h_i d_i^2) = sqrt(sum h_i (a q_i + b - w_i)^2), which the search lowers

Sources: least squares of the weights on their codes, https://arxiv.org/abs/1802.00150; weighting
by the inputs, https://arxiv.org/abs/2306.00978 (AWQ) and llama.cpp's importance matrix.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import mlx.core as mx

from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.convert.packing import quantize

# Weights searched at once: their float32 copies stay in a core's cache.
BLOCK_WEIGHTS = 2**17
# Shares of max - min that the codes span at the start: outliers are rarely worth their cost.
SPANS = (1.0, 0.85, 0.7, 0.55)
# Least-squares steps from each start, and from the best grid of them all.
STEPS_PER_START, FINAL_STEPS = 2, 2
# No line is fitted if the variance of the codes over their mean square is lower.
DEGENERATE = 1e-6
# From this number on, float32 has no halves, so adding it rounds to whole numbers.
ROUNDER = 1.5 * 2**23
# 32 codes of any width fill whole 32-bit words.
CODES_PER_PACK = 32


class Grid(NamedTuple):
    """Scale and bias of each group: code q is ``scales * q + biases``.

    Both are ``[G, 1, n]`` float32 and hold only numbers that the stored type has.
    """

    scales: mx.array
    biases: mx.array


class _Fit(NamedTuple):
    """A grid, its error and the sums that a least-squares step takes; all ``[G, 1, n]``."""

    grid: Grid
    error: mx.array  # |a| sqrt(sum h d^2)
    q: mx.array  # sum h q
    qq: mx.array  # sum h q^2
    d: mx.array  # sum h d
    dq: mx.array  # sum h d q


class Searched(NamedTuple):
    """Packed rows by the search and by rounding."""

    parts: dict[str, mx.array]
    rounded: dict[str, mx.array]


def quantize_weighted(
    weight: mx.array, importance: mx.array, quant: QuantFormat, *, name: str = "the weight"
) -> Searched:
    """Quantize with a low weighted error in each group, never over the error of ``mx.quantize``.

    The error is the sum of ``importance * (value - weight)^2``, where ``value`` is computed from
    the stored scale and bias, as runtimes do. Rows are independent of each other.

    Args:
        weight: ``[n, m]`` in bfloat16, float16 or float32.
        importance: ``[m]``, mean squares of the inputs. A group of zeros counts as one of ones.
        quant: an affine format.
        name: of the tensor, for messages.

    Raises:
        ConversionError: ``quantize`` refuses the weight.
    """
    rounded = quantize(weight, quant, name=name)
    size, (rows, columns) = quant.group_size, weight.shape
    shares = as_shares(importance, size)  # [G, 1, s]
    done: list[dict[str, mx.array]] = []
    step = max(1, BLOCK_WEIGHTS // (rows * size)) * size
    for start in range(0, columns, step):
        w = as_groups(weight[:, start : start + step], size)  # [step / s, s, n]
        groups = slice(start // size, (start + step) // size)
        grid = search(w, shares[groups], _grid_of(rounded, groups), quant.bits, weight.dtype)
        done.append(
            stored_parts(nearest_codes(w, grid, quant.bits), grid, quant.bits, weight.dtype)
        )
        mx.eval(done[-1])
    parts = {part: mx.concatenate([block[part] for block in done], axis=1) for part in done[0]}
    return Searched(parts, rounded)


def as_groups(weight: mx.array, size: int) -> mx.array:
    """Arrange weights ``[n, m]`` as float32 ``[G, s, n]``, one group along axis 1."""
    return mx.contiguous(weight.astype(mx.float32).T).reshape(-1, size, weight.shape[0])


def as_shares(importance: mx.array, size: int) -> mx.array:
    """Normalize importances ``[m]`` to h ``[G, 1, s]``, with sum 1 in each group."""
    groups = importance.astype(mx.float32).reshape(-1, 1, size)
    # Divide by the largest first, so that no sum overflows.
    groups = groups / mx.maximum(groups.max(axis=-1, keepdims=True), 1e-37)
    groups = mx.where(groups.sum(axis=-1, keepdims=True) > 0, groups, 1.0)
    return groups / groups.sum(axis=-1, keepdims=True)


def best_grid(
    w: mx.array, shares: mx.array, quant: QuantFormat, dtype: mx.Dtype, *, name: str = "the weight"
) -> Grid:
    """Search the grid of every group, starting from the grid of ``mx.quantize``.

    Args:
        w: weights ``[G, s, n]``, from ``as_groups``.
        shares: h ``[G, 1, s]``, from ``as_shares``.
        quant: an affine format.
        dtype: of the scales and biases that are stored.
        name: of the tensor, for messages.

    Raises:
        ConversionError: the weight is so large that the scales of ``mx.quantize`` overflow.
    """
    rows = w.reshape(-1, w.shape[-1]).T.astype(dtype)  # [n, G * s]
    rounded = quantize(mx.contiguous(rows), quant, name=name)
    return search(w, shares, _grid_of(rounded, slice(None)), quant.bits, dtype)


def _grid_of(parts: Mapping[str, mx.array], groups: slice) -> Grid:
    """Return the grid of some groups of packed rows."""
    scales, biases = (parts[kind][:, groups] for kind in ("scales", "biases"))
    return Grid(*(part.astype(mx.float32).T[:, None] for part in (scales, biases)))


def search(w: mx.array, shares: mx.array, known: Grid, bits: int, dtype: mx.Dtype) -> Grid:
    """Return the best grid found for groups ``w`` ``[G, s, n]``, or ``known`` if none is better.

    From several starts, codes and least-squares lines take turns. Then the neighbours of the best
    scale among the numbers of the stored type are tried.
    """
    fit = _fitter(w, shares, bits)
    best = fit(known)
    low, high = w.min(axis=1, keepdims=True), w.max(axis=1, keepdims=True)  # [G, 1, n]
    for part in SPANS:
        span = part * (high - low)
        trial = fit(_as_stored(span / (2**bits - 1), low + (high - low - span) / 2, dtype))
        best = _better(best, trial)
        for _ in range(STEPS_PER_START):
            trial = fit(_as_stored(*_least_squares(trial), dtype))
            best = _better(best, trial)
    for _ in range(FINAL_STEPS):
        best = _better(best, fit(_as_stored(*_least_squares(best), dtype)))
    a, b = best.grid
    q, d = best.q, best.d
    for scales in _neighbours(a, dtype):
        # Keep the codes: the weighted mean of a q + b - w is 0 at this bias.
        biases = b + a * d + (a - scales) * q
        best = _better(best, fit(_as_stored(scales, biases, dtype)))
    return best.grid


def nearest_codes(w: mx.array, grid: Grid, bits: int) -> mx.array:
    """Return the codes q, in float32, of weights ``w`` that broadcast with the grid."""
    return mx.clip(_rounded((w - grid.biases) * (1 / grid.scales)), 0, 2**bits - 1)


def stored_parts(codes: mx.array, grid: Grid, bits: int, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Return the tensors that are stored for codes ``[G, s, n]`` and their grid."""
    scales, biases = (part[:, 0].T.astype(dtype) for part in grid)  # [n, G]
    weight = pack_codes(codes.reshape(-1, codes.shape[-1]), bits)  # [n, m * bits / 32]
    return {"weight": weight, "scales": scales, "biases": biases}


def pack_codes(codes: mx.array, bits: int) -> mx.array:
    """Pack codes ``[m, n]`` into uint32 words ``[n, m * bits / 32]`` in the order of MLX.

    The codes of a row follow each other from the lowest bit of the first word.
    """
    columns, rows = codes.shape
    packs = columns // CODES_PER_PACK
    values = codes.astype(mx.uint32).reshape(packs, CODES_PER_PACK, rows)
    words = [mx.zeros((packs, rows), mx.uint32)] * bits
    for i in range(CODES_PER_PACK):
        word, shift = divmod(bits * i, 32)
        words[word] = words[word] | (values[:, i] << shift)
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | (values[:, i] >> (32 - shift))
    return mx.stack(words, axis=1).reshape(-1, rows).T


def _rounded(values: mx.array) -> mx.array:
    """Round float32 below 2^22, ties to even, in half the time of ``mx.round``."""
    return (values + ROUNDER) - ROUNDER


def _fitter(w: mx.array, shares: mx.array, bits: int) -> Callable[[Grid], _Fit]:
    # Sums of products take less time here than a matrix product.
    h = shares.swapaxes(1, 2)  # [G, s, 1]

    def total(x: mx.array) -> mx.array:  # [G, s, n] -> [G, 1, n]
        return x.sum(axis=1, keepdims=True)

    def fit(grid: Grid) -> _Fit:
        steps = (w - grid.biases) * (1 / grid.scales)  # [G, s, n]
        q = mx.clip(_rounded(steps), 0, 2**bits - 1)
        # About 1 for weights of any size, so that sums of squares lose nothing.
        d = steps - q
        hd, hq = h * d, h * q
        error = mx.abs(grid.scales) * mx.sqrt(total(hd * d))
        return _Fit(grid, error, total(hq), total(hq * q), total(hd), total(hd * q))

    return fit


def _least_squares(fit: _Fit) -> tuple[mx.array, mx.array]:
    """Fit the line of the weights over their codes; keep the grid where all codes are alike."""
    variance = fit.qq - fit.q * fit.q
    slope = mx.where(variance > DEGENERATE * fit.qq, (fit.dq - fit.d * fit.q) / variance, 0.0)
    a, b = fit.grid
    return a * (1 + slope), b + a * (fit.d - slope * fit.q)


def _better(a: _Fit, b: _Fit) -> _Fit:
    """Choose the better fit of each group; ``a`` if ``b`` is not better or not a number."""
    wins = b.error < a.error
    grid = Grid(*(mx.where(wins, y, x) for x, y in zip(a.grid, b.grid, strict=True)))
    return _Fit(grid, *(mx.where(wins, y, x) for x, y in zip(a[1:], b[1:], strict=True)))


def _as_stored(scales: mx.array, biases: mx.array, dtype: mx.Dtype) -> Grid:
    """Round a grid to the numbers that the stored type has."""
    return Grid(*(part.astype(dtype).astype(mx.float32) for part in (scales, biases)))


def _neighbours(values: mx.array, dtype: mx.Dtype) -> Iterator[mx.array]:
    """Yield the next numbers of a type, towards zero and away from it.

    Read as bits they are one less and one more.
    """
    bits = values.astype(dtype).view(mx.uint32 if dtype == mx.float32 else mx.uint16)
    for step in (-1, 1):
        yield (bits + mx.array(step).astype(bits.dtype)).view(dtype).astype(mx.float32)
