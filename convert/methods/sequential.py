"""Quantize by GPTQ in the order of the model, on outputs of the quantized linears before."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx

from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.convert.calibration.forward import EMBEDDING
from magistral_mlx.convert.calibration.host import trim_heap
from magistral_mlx.convert.calibration.statistics import column_weights, hessian, mean_squares, runs
from magistral_mlx.convert.methods.error import OutputError, as_read
from magistral_mlx.convert.methods.gptq import Curvature, quantize_gptq
from magistral_mlx.convert.methods.search import quantize_weighted
from magistral_mlx.convert.packing import check_finite, quantize
from magistral_mlx.convert.source.source import FLOAT_TYPES, Source
from magistral_mlx.convert.threads import unordered

# Stored bytes per job; whole rows, because GPTQ takes all columns of a row at once.
GPTQ_BLOCK_BYTES = 32 * 2**20
# Tokens that output errors are measured on.
SAMPLE_TOKENS = 256
# The tensors stored for some rows: weight, scales, biases.
Parts = Mapping[str, mx.array]
# Takes module, first row, the parts of its rows, and their error (None if rounded).
Emit = Callable[[str, int, Parts, OutputError | None], None]


@dataclass(slots=True)
class Sequential:
    """A visitor that quantizes the weights, and supplies the quantized ones to the pass.

    A separate embedding is searched, weighted by ``column_weights``. A tied one is quantized last,
    on lm_head's inputs; the residual stream begins with its unquantized rows. Matrices without a
    format stay as they are, and formats that are not affine are rounded.

    Attributes:
        formats: by module path; None if the matrix is not packed.
        emit: called with every packed block, from any thread.
        squares: E[x_j^2], as in ``forward.MeanSquares``.
    """

    source: Source
    formats: Mapping[str, QuantFormat | None]
    emit: Emit
    squares: dict[str, mx.array] = field(default_factory=dict)
    # Quantized blocks that the pass has yet to multiply with, by module path and first row.
    _waiting: dict[str, dict[int, Parts]] = field(default_factory=dict)

    def see(self, modules: Sequence[str], x: mx.array) -> None:
        """Quantize modules on their shared input ``x`` ``[B, T, m]``."""
        self.squares |= dict.fromkeys(modules, mean_squares(modules, x))
        formats = [self.formats[module] for module in modules]
        curvatures: list[Curvature] = []
        if any(quant is not None and quant.mode == "affine" for quant in formats):
            curvatures = [Curvature.of(hessian(x, run)) for run in runs(x.shape[-1])]
        flat = x.reshape(-1, x.shape[-1])  # [B * T, m]
        sample = flat[:: -(-len(flat) // SAMPLE_TOKENS)]
        mx.eval(sample)
        for module, quant in zip(modules, formats, strict=True):
            if quant is None:
                continue
            method = partial(_by_gptq, curvatures) if quant.mode == "affine" else _by_rounding
            blocks = self._quantized(module, method, partial(OutputError.sampled, x=sample))
            if module.startswith("model.layers."):
                self._waiting[module] = blocks
        trim_heap()

    def rows(self, module: str) -> Iterator[tuple[int, mx.array]]:
        """Yield the quantized weight if there is one, else the source's rows."""
        quant = self.formats[module]
        if module == EMBEDDING and quant is not None and not self.source.config.tie_word_embeddings:
            weights = self.squares[module] = column_weights(self.source)
            method = partial(_by_search, weights) if quant.mode == "affine" else _by_rounding
            measure = partial(OutputError.weighted, importance=weights)
            self._waiting[module] = self._quantized(module, method, measure)
        if module not in self._waiting:
            for row, block in self.source.blocks(f"{module}.weight", GPTQ_BLOCK_BYTES):
                check_finite(f"{module}.weight", block)
                yield row, block.astype(self._dtype)
            return
        assert quant is not None
        blocks = self._waiting.pop(module)
        for row in sorted(blocks):
            yield row, as_read(blocks[row], quant)

    @property
    def _dtype(self) -> mx.Dtype:
        return FLOAT_TYPES[self.source.float_type][1]

    def _quantized(self, module: str, method: "Method", measure: "Measure") -> dict[int, Parts]:
        """Quantize and emit all rows, one block a core on a CPU."""
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        name, quant = f"{module}.weight", self.formats[module]
        assert quant is not None
        count = self.source.config.shapes[name][0]
        step = self.source.row_step(name, GPTQ_BLOCK_BYTES)

        def work(row: int) -> tuple[int, Parts]:
            rows = self.source.read(name, slice(row, min(row + step, count))).astype(self._dtype)
            parts, rounded = method(rows, quant, name)
            mx.eval(parts)
            error = measure(rows, parts, rounded, quant) if quant.mode == "affine" else None
            self.emit(module, row, parts, error)
            return row, parts

        jobs = (partial(work, row) for row in range(0, count, step))
        with closing(unordered(jobs, workers=(os.cpu_count() or 1) if on_cpu else 1)) as done:
            return dict(done)


# The parts to store, and those of rounding alone.
Method = Callable[[mx.array, QuantFormat, str], tuple[Parts, Parts]]
Measure = Callable[[mx.array, Parts, Parts, QuantFormat], OutputError]


def _by_gptq(
    curvatures: Sequence[Curvature], rows: mx.array, quant: QuantFormat, name: str
) -> tuple[Parts, Parts]:
    return quantize_gptq(rows, curvatures, quant, name=name), quantize(rows, quant, name=name)


def _by_search(
    importance: mx.array, rows: mx.array, quant: QuantFormat, name: str
) -> tuple[Parts, Parts]:
    return quantize_weighted(rows, importance, quant, name=name)


def _by_rounding(rows: mx.array, quant: QuantFormat, name: str) -> tuple[Parts, Parts]:
    rounded = quantize(rows, quant, name=name)
    return rounded, rounded
