"""Write the weights by GPTQ: each layer is quantized on what the quantized layers before give."""

import logging
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx

from magistral_mlx.convert.calibration.resumable_pass import ResumablePass
from magistral_mlx.convert.calibration.statistics import outlier_ratio
from magistral_mlx.convert.methods.error import OutputError
from magistral_mlx.convert.methods.sequential import Parts, Sequential
from magistral_mlx.convert.output.shards import ShardSet
from magistral_mlx.convert.packing import cast, round_rows
from magistral_mlx.convert.pipeline.rowwise import files_of_step, rechecked, with_fetched
from magistral_mlx.convert.recipe.layout import Plan, in_order
from magistral_mlx.convert.source.hub_stream import HubStream
from magistral_mlx.convert.source.prefetcher import Prefetcher
from magistral_mlx.convert.source.source import FLOAT_TYPES, Source
from magistral_mlx.files import discard
from magistral_mlx.streams import Progress

log = logging.getLogger(__name__)


@dataclass(slots=True)
class LayerwiseConversion:
    """Quantizes and writes every tensor of a plan, layer after layer.

    A stage of the pass is kept once everything before it is in finished files.
    """

    source: Source
    plan: Plan
    output: ShardSet
    stages: Path  # folder of the pass
    ids: mx.array  # [B, T], for the pass
    stream: HubStream | None = None

    def run(self) -> Generator[Progress, None, None]:
        """Write every file that is not finished yet."""
        steps = in_order(self.source.config)
        total = sum(map(self.source.nbytes_of, self.source.config.shapes))
        done = yield from rechecked(self.output, self.source, total)
        staged = self._begin()
        if any(map(self._unfinished, steps[: staged.steps_done])):
            log.warning(
                "a file changed that later layers were quantized on; they are quantized again"
            )
            discard(self.stages)
            staged = self._begin()
        last = max(
            (step for step, names in enumerate(steps) if self._unfinished(names)), default=-1
        )
        ahead = range(staged.steps_done, last + 1)
        uses = Counter(file for step in ahead for file in sorted(files_of_step(self.source, step)))
        supply = None if self.stream is None else Prefetcher(self.stream, uses)
        try:
            for step in ahead:
                if supply is not None:
                    for file in sorted(files_of_step(self.source, step)):
                        while not supply.has(file):
                            supply.wait(file)
                            yield Progress(done, total, with_fetched(file, supply))
                names = self._unfinished(steps[step])
                staged.advance()
                for name in names:
                    self._write_unpacked(name)
                if not any(self._unfinished(before) for before in steps[: step + 1]):
                    staged.keep()
                if supply is not None:
                    for file in files_of_step(self.source, step):
                        supply.done(file)
                done += sum(map(self.source.nbytes_of, names))
                last_name = (names or steps[step] or [""])[-1]
                yield Progress(done, total, with_fetched(last_name, supply))
        finally:
            if supply is not None:
                supply.close()
            self.output.close()

    def _unfinished(self, names: list[str]) -> list[str]:
        return [name for name in names if not self.output.is_finished(name)]

    def _begin(self) -> ResumablePass:
        """Begin the pass, at the last stage that was kept."""
        squares: dict[str, mx.array] = {}
        emit = partial(self._emit, squares)
        visitor = Sequential(self.source, self.plan.formats, emit, squares)
        return ResumablePass(self.stages, self.source, self.ids, visitor)

    def _emit(
        self,
        squares: Mapping[str, mx.array],
        module: str,
        row: int,
        parts: Parts,
        error: OutputError | None,
    ) -> None:
        tensors = {f"{module}.{part}": array for part, array in parts.items()}
        outliers = 0.0 if error is None else outlier_ratio(squares[module])
        self.output.add(f"{module}.weight", row, tensors, error, outliers)

    def _write_unpacked(self, name: str) -> None:
        """Write a norm, or a matrix that stays in floats: the pass emits neither."""
        if self.plan.formats.get(name.removesuffix(".weight")) is not None:
            return
        for row, rows in self.source.blocks(name):
            self.output.add(
                name,
                row,
                round_rows(name, cast(name, rows, FLOAT_TYPES[self.plan.float_type][1]), None),
            )
