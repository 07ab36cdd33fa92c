"""How fast groups are searched: blocks of rows of the true width, one a core, as a conversion has them."""

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from benchmarks.measure import Lap, Stopwatch, spread
from benchmarks.synthetic import TRUE_WIDTH
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.convert.methods.search import quantize_weighted
from magistral_mlx.convert.pipeline.rowwise import BLOCK_BYTES
from magistral_mlx.convert.threads import unordered

BLOCKS = 16  # a repeat: 34 million weights


@dataclass(frozen=True, slots=True)
class Finding:
    """The repeats of one format; ``count`` of each is the weights."""

    quant: QuantFormat
    streams: int  # MLX's, one a core
    laps: tuple[Lap, ...]

    def as_dict(self) -> dict[str, Any]:
        rate = spread(self.laps)
        return {
            "quantization": asdict(self.quant),
            "streams": self.streams,
            "columns": TRUE_WIDTH.hidden_size,
            "weights_per_second": asdict(rate),
            "repeats": [asdict(lap) for lap in self.laps],
        }


def time_search(quant: QuantFormat, repeats: int) -> Finding:
    """Search the same blocks again and again, after a warm-up."""
    columns, streams = TRUE_WIDTH.hidden_size, os.cpu_count() or 1
    rows = BLOCK_BYTES // (2 * columns)
    with mx.stream(mx.cpu):
        blocks = [
            mx.random.normal((rows, columns), key=mx.random.key(i)).astype(mx.bfloat16)
            for i in range(BLOCKS)
        ]
        importance = mx.exp(mx.random.normal((columns,), key=mx.random.key(BLOCKS)))
        mx.eval(blocks, importance)

    def work(block: mx.array) -> None:
        with mx.stream(mx.cpu):
            quantize_weighted(block, importance, quant)

    def laps() -> Iterator[Lap]:
        watch = Stopwatch()
        for _ in range(repeats + 1):
            with closing(
                unordered((partial(work, block) for block in blocks), workers=streams)
            ) as done:
                for _ in done:
                    pass
            yield watch.lap(BLOCKS * rows * columns)

    return Finding(quant, streams, tuple(laps())[1:])
