"""The scale and bias of each group that lose least of what the model's inputs see, in ``mx.quantize``'s own format."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import mlx.core as mx

from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.convert.packing import check_divisible, check_finite, quantize

BLOCK_WEIGHTS = 2**17  # searched at once: their float32 copies stay in a core's cache
SPANS = (
    1.0,
    0.85,
    0.7,
    0.55,
)  # of max - min, of the codes of each start: outliers are rarely worth their cost
EACH, LAST = 2, 2  # times that least squares follow each start, and the best of them
DEGENERATE = (
    1e-6  # variance of the codes over their mean square, under which no line is fitted through them
)
ROUNDER = 1.5 * 2**23  # float32 has no halves from here on
PACK = 32  # codes of any width fill whole words


class Grid(NamedTuple):
    """What codes stand for: the value of code q is ``scales * q + biases``. Both ``[groups, 1, rows]`` float32, but of
    numbers that the stored type has."""

    scales: mx.array
    biases: mx.array


class _Fit(NamedTuple):
    """A grid, and sums over each group's importances of its codes q and their residuals d in steps."""

    grid: Grid
    error: mx.array  # root of sum h (scale q + bias - w)^2
    q: mx.array
    qq: mx.array
    d: mx.array
    dq: mx.array


def quantize_weighted(
    weight: mx.array, importance: mx.array, quant: QuantFormat, *, name: str = "the weight"
) -> dict[str, mx.array]:
    """Quantize so that each group's sum of ``importance * (value - weight)^2`` is small: never over ``mx.quantize``'s.

    Value is what runtimes compute from the stored scale and bias. Rows are independent of each other. Codes
    and least-squares lines take turns from several starts, then the scale's neighbours among the numbers of the stored
    type are tried.

    Args:
        weight: ``[rows, columns]`` in bfloat16, float16 or float32.
        importance: ``[columns]``, mean squares of the inputs; of a group in which all are 0, every weight counts alike.
        quant: an affine format.
        name: of the tensor, for messages.
    Returns:
        As ``quantize``.
    Raises:
        ConversionError: as ``quantize``.
    """
    check_divisible(name, weight.shape, quant)
    check_finite(name, weight)
    size, (rows, columns) = quant.group_size, weight.shape
    shares = as_shares(importance, size)
    done: list[dict[str, mx.array]] = []
    step = max(1, BLOCK_WEIGHTS // (rows * size)) * size
    for start in range(0, columns, step):
        groups = as_groups(weight[:, start : start + step], size)
        grid = best_grid(
            groups, shares[start // size : (start + step) // size], quant, weight.dtype, name=name
        )
        codes = nearest_codes(groups, grid, quant.bits)
        done.append(stored_parts(codes, grid, quant.bits, weight.dtype))
        mx.eval(done[-1])
    return {part: mx.concatenate([block[part] for block in done], axis=1) for part in done[0]}


def as_groups(weight: mx.array, size: int) -> mx.array:
    """``[rows, columns]`` -> ``[groups, size, rows]`` float32: what is of one group lies across, so that sums over it
    are products with its importances."""
    return mx.contiguous(weight.astype(mx.float32).T).reshape(-1, size, weight.shape[0])


def as_shares(importance: mx.array, size: int) -> mx.array:
    """Importances ``[columns]`` -> ``[groups, 1, size]`` float32, which sum to 1 in each group."""
    groups = importance.astype(mx.float32).reshape(-1, 1, size)
    groups = groups / mx.maximum(
        groups.max(axis=-1, keepdims=True), 1e-37
    )  # so that no sum overflows
    groups = mx.where(groups.sum(axis=-1, keepdims=True) > 0, groups, 1.0)
    return groups / groups.sum(axis=-1, keepdims=True)


def best_grid(
    w: mx.array, shares: mx.array, quant: QuantFormat, dtype: mx.Dtype, *, name: str = "the weight"
) -> Grid:
    """Search the grid of every group, from ``mx.quantize``'s on.

    Args:
        w: as ``as_groups``.
        shares: as ``as_shares``.
        dtype: of the scales and biases that will be stored.
    Raises:
        ConversionError: the weight is so large that ``mx.quantize``'s scales overflow.
    """
    rows = w.reshape(-1, w.shape[-1]).T.astype(dtype)
    rounded = quantize(mx.contiguous(rows), quant, name=name)
    known = Grid(*(rounded[kind].astype(mx.float32).T[:, None] for kind in ("scales", "biases")))
    return search(w, shares, known, quant.bits, dtype)


def search(w: mx.array, shares: mx.array, known: Grid, bits: int, dtype: mx.Dtype) -> Grid:
    """The best grid found for groups ``w`` ``[groups, size, rows]``, or ``known`` where none is better.

    Source: least squares of the weights on their codes, as in https://arxiv.org/abs/1802.00150; weighted by mean
    squares of the inputs, as in https://arxiv.org/abs/2306.00978 and llama.cpp's importance matrix.
    """
    fit = _fitter(w, shares, bits)
    best = fit(known)
    low, high = w.min(axis=1, keepdims=True), w.max(axis=1, keepdims=True)
    for part in SPANS:
        span = part * (high - low)
        trial = fit(_stored(span / (2**bits - 1), low + (high - low - span) / 2, dtype))
        best = _better(best, trial)
        for _ in range(EACH):
            trial = fit(_stored(*_least_squares(trial), dtype))
            best = _better(best, trial)
    for _ in range(LAST):
        best = _better(best, fit(_stored(*_least_squares(best), dtype)))
    centre = best
    for scales in _neighbours(centre.grid.scales, dtype):
        # The bias that suits the other scale, by the codes there are.
        biases = (
            centre.grid.biases
            + centre.grid.scales * centre.d
            + (centre.grid.scales - scales) * centre.q
        )
        best = _better(best, fit(_stored(scales, biases, dtype)))
    return best.grid


def _rounded(values: mx.array) -> mx.array:
    """Float32 to whole numbers, ties to even, in half of ``mx.round``'s time; exact below 2^22, far beyond codes."""
    return (values + ROUNDER) - ROUNDER


def nearest_codes(w: mx.array, grid: Grid, bits: int) -> mx.array:
    """The codes, in float32, of values ``w`` that broadcast with the grid."""
    return mx.clip(_rounded((w - grid.biases) * (1 / grid.scales)), 0, 2**bits - 1)


def stored_parts(codes: mx.array, grid: Grid, bits: int, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Codes ``[groups, size, rows]`` and their grid -> the tensors that are stored."""
    scales, biases = (part[:, 0].T.astype(dtype) for part in grid)
    return {
        "weight": pack_codes(codes.reshape(-1, codes.shape[-1]), bits),
        "scales": scales,
        "biases": biases,
    }


def pack_codes(codes: mx.array, bits: int) -> mx.array:
    """Codes ``[columns, rows]`` -> ``[rows, columns * bits / 32]`` uint32: a row's codes follow each other, each from
    its lowest bit, in words from their lowest bit."""
    columns, rows = codes.shape
    values = codes.astype(mx.uint32).reshape(columns // PACK, PACK, rows)
    words = [mx.zeros((columns // PACK, rows), mx.uint32)] * bits
    for i in range(PACK):
        word, shift = divmod(bits * i, 32)
        words[word] = words[word] | (values[:, i] << shift)
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | (values[:, i] >> (32 - shift))
    return mx.stack(words, axis=1).reshape(-1, rows).T


def _fitter(w: mx.array, shares: mx.array, bits: int) -> Callable[[Grid], _Fit]:
    shares = shares.swapaxes(
        1, 2
    )  # [groups, size, 1]: sums of products take less time than a matrix product

    def total(x: mx.array) -> mx.array:
        return x.sum(axis=1, keepdims=True)

    def fit(grid: Grid) -> _Fit:
        steps = (w - grid.biases) * (1 / grid.scales)
        q = mx.clip(_rounded(steps), 0, 2**bits - 1)
        d = (
            steps - q
        )  # of the order of 1 whatever the weights are: sums of its squares lose nothing
        own_d, own_q = shares * d, shares * q
        error = mx.abs(grid.scales) * mx.sqrt(total(own_d * d))
        return _Fit(grid, error, total(own_q), total(own_q * q), total(own_d), total(own_d * q))

    return fit


def _least_squares(fit: _Fit) -> tuple[mx.array, mx.array]:
    """The line through the weights over their codes; where all codes are alike, the grid there is."""
    variance = fit.qq - fit.q * fit.q
    slope = mx.where(variance > DEGENERATE * fit.qq, (fit.dq - fit.d * fit.q) / variance, 0.0)
    scales, biases = fit.grid
    return scales * (1 + slope), biases + scales * (fit.d - slope * fit.q)


def _better(a: _Fit, b: _Fit) -> _Fit:
    """Of each group the better fit; ``a`` where ``b`` is no better, or no number."""
    wins = b.error < a.error
    grid = Grid(*(mx.where(wins, y, x) for x, y in zip(a.grid, b.grid, strict=True)))
    return _Fit(grid, *(mx.where(wins, y, x) for x, y in zip(a[1:], b[1:], strict=True)))


def _stored(scales: mx.array, biases: mx.array, dtype: mx.Dtype) -> Grid:
    return Grid(*(part.astype(dtype).astype(mx.float32) for part in (scales, biases)))


def _neighbours(values: mx.array, dtype: mx.Dtype) -> Iterator[mx.array]:
    """The next numbers of a type towards zero and away from it: as bits, one less and one more."""
    bits = values.astype(dtype).view(mx.uint32 if dtype == mx.float32 else mx.uint16)
    for step in (-1, 1):
        yield (bits + mx.array(step).astype(bits.dtype)).view(dtype).astype(mx.float32)
