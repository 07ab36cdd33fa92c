"""GPTQ in the order of the model: every linear is quantized on the inputs that the quantized ones before it give."""

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

# Of a weight as it is stored. GPTQ takes all columns of a row at once, so blocks hold whole rows.
GPTQ_BLOCK_BYTES = 32 * 2**20
SAMPLE = 256  # tokens by which errors are measured
Parts = Mapping[str, mx.array]
Emit = Callable[
    [str, int, Parts, OutputError | None], None
]  # module, first row, what is stored for its rows, its errors


@dataclass(slots=True)
class Sequential:
    """A visitor of ``forward.visit_linears`` that quantizes; ``emit`` takes every packed block, from any thread.

    An embedding of its own is searched, weighted by ``column_weights``. One that is lm_head as well is quantized last,
    on lm_head's inputs, and the stream begins with it unquantized. What ``formats`` do not pack stays as it is; what is
    not affine is rounded.
    """

    source: Source
    formats: Mapping[str, QuantFormat | None]  # of each matrix, by module path
    emit: Emit
    squares: dict[str, mx.array] = field(
        default_factory=dict
    )  # E[x_j^2], as ``forward.MeanSquares``
    _waiting: dict[str, dict[int, Parts]] = field(
        default_factory=dict
    )  # quantized, not yet multiplied with

    def see(self, modules: Sequence[str], x: mx.array) -> None:
        self.squares |= dict.fromkeys(modules, mean_squares(modules, x))
        curvatures: list[Curvature] = []
        if any(
            quant is not None and quant.mode == "affine" for quant in map(self.formats.get, modules)
        ):
            curvatures = [Curvature.of(hessian(x, run)) for run in runs(x.shape[-1])]
        flat = x.reshape(-1, x.shape[-1])
        sample = flat[:: -(-len(flat) // SAMPLE)]
        mx.eval(sample)
        for module in modules:
            quant = self.formats[module]
            if quant is None:
                continue
            way = partial(_by_gptq, curvatures) if quant.mode == "affine" else _by_rounding
            blocks = self._quantized(module, way, partial(OutputError.sampled, x=sample))
            if module.startswith("model.layers."):
                self._waiting[module] = blocks
        trim_heap()

    def rows(self, module: str) -> Iterator[tuple[int, mx.array]]:
        quant = self.formats[module]
        if module == EMBEDDING and quant is not None and not self.source.config.tie_word_embeddings:
            own = self.squares[module] = column_weights(self.source)
            way = partial(_by_search, own) if quant.mode == "affine" else _by_rounding
            self._waiting[module] = self._quantized(
                module, way, partial(OutputError.weighted, importance=own)
            )
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

    def _quantized(self, module: str, way: "Way", measure: "Measure") -> dict[int, Parts]:
        """Quantize and emit all rows, on a CPU some on each core."""
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        name, quant = f"{module}.weight", self.formats[module]
        assert quant is not None
        count, step = (
            self.source.config.shapes[name][0],
            self.source.row_step(name, GPTQ_BLOCK_BYTES),
        )

        def work(row: int) -> tuple[int, Parts]:
            rows = self.source.read(name, slice(row, min(row + step, count))).astype(self._dtype)
            parts = way(rows, quant, name)
            mx.eval(parts)
            self.emit(
                module, row, parts, measure(rows, parts, quant) if quant.mode == "affine" else None
            )
            return row, parts

        jobs = (partial(work, row) for row in range(0, count, step))
        with closing(unordered(jobs, workers=(os.cpu_count() or 1) if on_cpu else 1)) as done:
            return dict(done)


Way = Callable[[mx.array, QuantFormat, str], Parts]
Measure = Callable[[mx.array, Parts, QuantFormat], OutputError]


def _by_gptq(
    curvatures: Sequence[Curvature], rows: mx.array, quant: QuantFormat, name: str
) -> Parts:
    return quantize_gptq(rows, curvatures, quant, name=name)


def _by_search(importance: mx.array, rows: mx.array, quant: QuantFormat, name: str) -> Parts:
    return quantize_weighted(rows, importance, quant, name=name)


def _by_rounding(rows: mx.array, quant: QuantFormat, name: str) -> Parts:
    return quantize(rows, quant, name=name)
