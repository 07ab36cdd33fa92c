"""The weights of a conversion: blocks of rows, each read, quantized and written by one of several threads."""

import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx

from magistral_mlx.config import QuantFormat

from . import disk
from .parallel import unordered
from .planning import Plan, PlannedShard
from .quantize import check_finite, quantize
from .source import FLOAT_TYPES, Source
from .staging import Staging
from .streaming import HubStream
from .supply import Supply
from .writer import ShardWriter

log = logging.getLogger(__name__)

BLOCK_BYTES = 4 * 2**20  # of the source: larger ones cost page faults, smaller ones calls


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is, in bytes of the source."""

    bytes_done: int
    bytes_total: int
    name: str  # of the tensor, or file, just done
    bytes_fetched: int = 0  # from the hub so far


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of one tensor of the source."""

    name: str
    rows: slice
    nbytes: int  # in the source
    files: frozenset[str]  # of the source that they are in


@dataclass(slots=True)
class WeightsWork:
    """What there is to do for the weights of a plan, in the folder of ``staging``.

    Quantizing is MLX's on the CPU, whatever the default device is: every core has a block of its own, memory
    stays small, and the same source gives the same bytes on every machine.
    """

    source: Source
    plan: Plan
    staging: Staging
    stream: HubStream | None = None  # that the source's files come from, one after the other
    at_last: Callable[[], None] = lambda: None  # work of its own, done beside the last tensor's
    _supply: Supply | None = None
    _writers: list[ShardWriter] = field(default_factory=list)

    def run(self) -> Generator[Progress, None, None]:
        """Write every shard that is not finished yet."""
        sizes = {shard.file: sum(map(self.source.nbytes_of, shard.sources)) for shard in self.plan.shards}
        done, total = 0, sum(sizes.values())
        try:
            with closing(unordered(partial(self._recheck, file) for file in list(self.staging.finished))) as checked:
                for file in filter(None, checked):
                    done += sizes[file]
                    yield Progress(done, total, file)
            if self.stream is not None:
                uses = Counter(f for shard in self._unfinished() for block in self._blocks(shard) for f in block.files)
                self._supply = Supply(self.stream, uses)
            name = ""
            with closing(unordered(self._jobs())) as converted:
                for block in converted:
                    if block is not None:
                        done, name = done + block.nbytes, block.name
                    yield Progress(done, total, name, 0 if self._supply is None else self._supply.received)
        finally:
            if self._supply is not None:
                self._supply.close()
            for writer in self._writers:
                writer.close()

    def _recheck(self, file: str) -> str | None:
        """The file, if it is still what an earlier process wrote."""
        if disk.sha256_of(self.staging.folder / file) == self.staging.finished[file]["sha256"]:
            return file
        log.warning("%s changed since it was written; it is written again", self.staging.folder / file)
        self.staging.forget(file)
        return None

    def _unfinished(self) -> list[PlannedShard]:
        return [shard for shard in self.plan.shards if shard.file not in self.staging.finished]

    def _blocks(self, shard: PlannedShard) -> Iterator[_Block]:
        """What a file is made of, in the order of the model."""
        shapes = self.source.config.parameter_shapes()
        for name in shard.sources:
            files = frozenset(place.path.name for place, _ in self.source.places(name))
            count, step = shapes[name][0], self.source.row_step(name, BLOCK_BYTES)
            for row in range(0, count, step):
                rows = slice(row, min(row + step, count))
                yield _Block(name, rows, self.source.nbytes_of(name) * (rows.stop - row) // count, files)

    def _jobs(self) -> Iterator[Callable[[], _Block | None]]:
        shards = self._unfinished()
        for shard in shards:
            writer = ShardWriter(self.staging.folder / shard.file, shard.entries)
            self._writers.append(writer)
            for block in self._blocks(shard):
                if shard is shards[-1] and block.name == shard.sources[-1] and not block.rows.start:
                    yield self.at_last
                if self._supply is not None:
                    for file in block.files:
                        while not self._supply.has(file):
                            yield partial(self._supply.wait, file)
                yield partial(self._convert, block, writer)
        if not shards:
            yield self.at_last

    def _convert(self, block: _Block, writer: ShardWriter) -> _Block:
        """Convert a block, and finish its file where it was the last one missing."""
        quant, dtype = self.plan.formats.get(block.name.removesuffix(".weight")), FLOAT_TYPES[self.plan.float_type][1]
        with mx.stream(mx.cpu):
            rows = self.source.read(block.name, block.rows)
            for part, array in packed(block.name, rows, quant, dtype):
                if writer.write(part, array, block.rows.start):
                    self.staging.record(writer.path.name, writer.finish())
        if self._supply is not None:
            for file in block.files:
                self._supply.done(file)
        return block


def packed(name: str, rows: mx.array, quant: QuantFormat | None, dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    """Rows of a tensor of the source -> the same rows of each tensor that is written for it."""
    cast = rows.astype(dtype)
    if cast.dtype != rows.dtype:
        check_finite(name, rows)
        check_finite(name, cast, what=f"holds values too large for {dtype}, which config.json states")
    if quant is None:
        check_finite(name, cast)
        yield name, cast
        return
    for part, array in quantize(cast, quant, name=name).items():
        yield f"{name.removesuffix('.weight')}.{part}", array
