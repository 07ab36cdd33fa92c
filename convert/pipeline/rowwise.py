"""Quantize and write a plan's weights in blocks of rows: all methods except GPTQ."""

import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from magistral_mlx.convert.calibration.forward import MeanSquares
from magistral_mlx.convert.calibration.resumable_pass import ResumablePass
from magistral_mlx.convert.calibration.statistics import outlier_ratio
from magistral_mlx.convert.methods.error import OutputError
from magistral_mlx.convert.methods.search import quantize_weighted
from magistral_mlx.convert.output.shards import ShardSet
from magistral_mlx.convert.packing import cast, round_rows
from magistral_mlx.convert.recipe.layout import Plan, in_order, read_in_order
from magistral_mlx.convert.source.hub_stream import HubStream
from magistral_mlx.convert.source.prefetcher import Prefetcher
from magistral_mlx.convert.source.source import FLOAT_TYPES, Source
from magistral_mlx.convert.threads import WORKERS, unordered
from magistral_mlx.errors import in_units
from magistral_mlx.streams import Progress

# Bytes read per job: larger blocks cause page faults, smaller ones add call overhead.
QUANTIZE_BLOCK_BYTES = 4 * 2**20
# Blocks queued for the search while the forward pass goes on.
MAX_QUEUED_BLOCKS = 512
# Layers that the pass is then ahead, at most: a layer of the 24B model has 278 blocks.
LAYERS_AHEAD = 2


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of one tensor of the source."""

    name: str
    rows: slice
    nbytes: int  # in the source
    files: frozenset[str]  # the source's files that hold them


@dataclass(slots=True)
class RowwiseConversion:
    """Quantizes and writes every tensor of a plan by rounding or by the weighted search.

    Weights are quantized with MLX on the CPU, whatever the default device: one block a core, and
    the same bytes on every machine. The forward pass uses the default device, and computes a layer
    while the blocks of the layer before are searched.

    Attributes:
        stream: download that supplies the source files; None if they are all there.
        statistics: weights of the search; None if every weight is rounded.
        forward_pass: pass that collects the statistics; None if complete.
    """

    source: Source
    plan: Plan
    output: ShardSet
    stream: HubStream | None = None
    statistics: MeanSquares | None = None
    forward_pass: ResumablePass | None = None
    _supply: Prefetcher | None = None

    def run(self) -> Generator[Progress, None, None]:
        """Write the unfinished files."""
        total = sum(map(self.source.nbytes_of, self.source.config.shapes))
        done = yield from verify_finished(self.output, self.source, total)
        try:
            if self.stream is not None:
                self._supply = Prefetcher(self.stream, self._uses())
            name = ""
            workers, ahead = (
                (WORKERS, None)
                if self.statistics is None
                else (os.cpu_count() or 1, MAX_QUEUED_BLOCKS)
            )
            with closing(unordered(self._jobs(), workers, ahead)) as converted:
                for block in converted:
                    if block is not None:
                        done, name = done + block.nbytes, block.name
                    yield Progress(done, total, add_fetched(name, self._supply))
        finally:
            if self._supply is not None:
                self._supply.close()
            self.output.close()

    def _steps(self) -> Iterator[tuple[int, bool, list[str]]]:
        """Yield the steps of the pass up to the last with tensors to write.

        Each is (number, True if the pass has not taken it yet, tensors to write after it).
        """
        steps = [
            [n for n in names if not self.output.is_finished(n)]
            for names in in_order(self.source.config)
        ]
        last = max((step for step, names in enumerate(steps) if names), default=-1)
        first = len(steps) if self.forward_pass is None else self.forward_pass.steps_done
        for step, names in enumerate(steps[: last + 1]):
            yield step, step >= first, names

    def _uses(self) -> Counter[str]:
        """Count the reads of each source file, in the order of first use."""
        uses: Counter[str] = Counter()
        for step, needs_pass, names in self._steps():
            uses.update(files_of_step(self.source, step) if needs_pass else ())
            uses.update(
                file for name in names for block in self._blocks(name) for file in block.files
            )
        return uses

    def _blocks(self, name: str) -> Iterator[_Block]:
        files = files_of(self.source, [name])
        count, step = (
            self.source.config.shapes[name][0],
            self.source.row_step(name, QUANTIZE_BLOCK_BYTES),
        )
        for row in range(0, count, step):
            rows = slice(row, min(row + step, count))
            yield _Block(
                name, rows, self.source.nbytes_of(name) * (rows.stop - row) // count, files
            )

    def _jobs(self) -> Iterator[Callable[[], _Block | None]]:
        for step, needs_pass, names in self._steps():
            if needs_pass:
                assert self.forward_pass is not None
                files = files_of_step(self.source, step)
                yield from self._wait_jobs(files)
                self.forward_pass.advance()
                self.forward_pass.keep()
                self._release_files(files)
            for block in (block for name in names for block in self._blocks(name)):
                yield from self._wait_jobs(block.files)
                yield partial(self._convert, block)

    def _wait_jobs(self, files: frozenset[str]) -> Iterator[Callable[[], None]]:
        if self._supply is not None:
            for file in sorted(files):
                while not self._supply.has(file):
                    yield partial(self._supply.wait, file)

    def _release_files(self, files: frozenset[str]) -> None:
        if self._supply is not None:
            for file in files:
                self._supply.done(file)

    def _convert(self, block: _Block) -> _Block:
        """Convert a block, and finish its output file if no other is missing."""
        module, row = block.name.removesuffix(".weight"), block.rows.start
        quant, dtype = self.plan.formats.get(module), FLOAT_TYPES[self.plan.float_type][1]
        with mx.stream(mx.cpu):
            rows = cast(block.name, self.source.read(block.name, block.rows), dtype)
            if self.statistics is None or quant is None or quant.mode != "affine":
                self.output.add(block.name, row, round_rows(block.name, rows, quant))
            else:
                importance = self.statistics.squares[module]
                found = quantize_weighted(rows, importance, quant, name=block.name)
                error = OutputError.weighted(rows, *found, quant, importance)
                tensors = {f"{module}.{part}": array for part, array in found.parts.items()}
                self.output.add(block.name, row, tensors, error, outlier_ratio(importance))
        self._release_files(block.files)
        return block


def verify_finished(output: ShardSet, source: Source, total: int) -> Generator[Progress, None, int]:
    """Verify files finished by an earlier run; return the source bytes they cover."""
    done = 0
    with closing(unordered(output.rechecks())) as checked:
        for shard in filter(None, checked):
            done += sum(map(source.nbytes_of, shard.sources))
            yield Progress(done, total, shard.file)
    return done


def files_of(source: Source, names: list[str]) -> frozenset[str]:
    """Return the source files that hold some tensors."""
    return frozenset(place.path.name for name in names for place, _ in source.places(name))


def files_of_step(source: Source, step: int) -> frozenset[str]:
    """Return the source files that a step of the forward pass reads."""
    return files_of(source, read_in_order(source.config)[step])


def add_fetched(name: str, supply: Prefetcher | None) -> str:
    """Put the bytes fetched from the hub so far before a step's name."""
    if supply is None or not supply.received:
        return name
    return f"{in_units(supply.received)} fetched  {name}"
