"""Write the weight files of a plan."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import mlx.core as mx

from magistral_mlx.convert.methods.error import OutputError
from magistral_mlx.convert.output.staging import Staging
from magistral_mlx.convert.output.writer import ShardWriter
from magistral_mlx.convert.recipe.layout import Plan, PlannedShard
from magistral_mlx.files import sha256_of

log = logging.getLogger(__name__)


class ShardSet:
    """Writes rows of tensors from any thread, in any order; records each file when complete."""

    def __init__(self, plan: Plan, staging: Staging) -> None:
        self._plan, self._staging = plan, staging
        self._shards = {name: shard for shard in plan.shards for name in shard.sources}
        self._writers: dict[str, ShardWriter] = {}
        self._errors: dict[str, dict[int, OutputError]] = {}  # by source tensor and first row
        self._outliers: dict[str, float] = {}
        self._opening = threading.Lock()

    def rechecks(self) -> Iterator[Callable[[], PlannedShard | None]]:
        """Make a job for each finished file that returns its shard, or None if it changed."""
        return (
            partial(self._recheck, shard)
            for shard in self._plan.shards
            if shard.file in self._staging.finished
        )

    def _recheck(self, shard: PlannedShard) -> PlannedShard | None:
        path = self._staging.folder / shard.file
        if sha256_of(path) == self._staging.finished[shard.file]["sha256"]:
            return shard
        log.warning("%s changed since it was written; it is written again", path)
        self._staging.forget(shard.file)
        return None

    def is_finished(self, name: str) -> bool:
        """Tell whether the output file of a source tensor is complete."""
        return self._shards[name].file in self._staging.finished

    def add(
        self,
        name: str,
        row: int,
        tensors: Mapping[str, mx.array],
        error: OutputError | None = None,
        outliers: float = 0.0,
    ) -> None:
        """Write rows of the tensors made from a source tensor, unless their file is finished.

        Args:
            name: source tensor.
            row: first row.
            tensors: rows of each written tensor.
            error: measured output error of these rows, if any.
            outliers: outlier ratio of the tensor's inputs.
        """
        if self.is_finished(name):
            return
        if error is not None:
            self._errors.setdefault(name, {})[row] = error
            self._outliers[name] = outliers
        shard = self._shards[name]
        with self._opening:
            if shard.file not in self._writers:
                self._writers[shard.file] = ShardWriter(
                    self._staging.folder / shard.file, shard.entries
                )
        writer = self._writers[shard.file]
        for tensor, rows in tensors.items():
            if writer.write(tensor, rows, row):
                self._staging.record(shard.file, writer.finish() | self._report(shard))

    def close(self) -> None:
        """Close the files, complete or not."""
        for writer in self._writers.values():
            writer.close()

    def _report(self, shard: PlannedShard) -> dict[str, object]:
        found = {
            name.removesuffix(".weight"): [
                *OutputError.together(blocks for _, blocks in sorted(self._errors[name].items())),
                self._outliers[name],
            ]
            for name in shard.sources
            if name in self._errors
        }
        return {"errors": found} if found else {}
