"""Quantize by GPTQ, each layer on the outputs of the quantized layers before it."""

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
from magistral_mlx.convert.pipeline.rowwise import add_fetched, files_of_step, verify_finished
from magistral_mlx.convert.recipe.layout import Plan, in_order
from magistral_mlx.convert.source.hub_stream import HubStream
from magistral_mlx.convert.source.prefetcher import Prefetcher
from magistral_mlx.convert.source.source import FLOAT_TYPES, Source
from magistral_mlx.files import discard
from magistral_mlx.streams import Progress

log = logging.getLogger(__name__)


@dataclass(slots=True)
class LayerwiseConversion:
    """Quantizes layer by layer with GPTQ.

    A pass state is saved once every file before it is finished.
    """

    source: Source
    plan: Plan
    output: ShardSet
    states: Path  # folder of the saved pass states
    ids: mx.array  # [B, T], for the pass
    stream: HubStream | None = None

    def run(self) -> Generator[Progress, None, None]:
        """Write the unfinished files."""
        steps = in_order(self.source.config)
        total = sum(map(self.source.nbytes_of, self.source.config.shapes))
        done = yield from verify_finished(self.output, self.source, total)
        forward_pass = self._begin()
        if any(map(self._unfinished, steps[: forward_pass.steps_done])):
            log.warning(
                "a file changed after later layers were quantized on it; they are quantized again"
            )
            discard(self.states)
            forward_pass = self._begin()
        last = max(
            (step for step, names in enumerate(steps) if self._unfinished(names)), default=-1
        )
        ahead = range(forward_pass.steps_done, last + 1)
        uses = Counter(file for step in ahead for file in sorted(files_of_step(self.source, step)))
        supply = None if self.stream is None else Prefetcher(self.stream, uses)
        try:
            for step in ahead:
                if supply is not None:
                    for file in sorted(files_of_step(self.source, step)):
                        while not supply.has(file):
                            supply.wait(file)
                            yield Progress(done, total, add_fetched(file, supply))
                names = self._unfinished(steps[step])
                forward_pass.advance()
                for name in names:
                    self._write_unpacked(name)
                if not any(self._unfinished(before) for before in steps[: step + 1]):
                    forward_pass.keep()
                if supply is not None:
                    for file in files_of_step(self.source, step):
                        supply.done(file)
                done += sum(map(self.source.nbytes_of, names))
                last_name = (names or steps[step] or [""])[-1]
                yield Progress(done, total, add_fetched(last_name, supply))
        finally:
            if supply is not None:
                supply.close()
            self.output.close()

    def _unfinished(self, names: list[str]) -> list[str]:
        return [name for name in names if not self.output.is_finished(name)]

    def _begin(self) -> ResumablePass:
        """Begin the pass at its last saved state."""
        squares: dict[str, mx.array] = {}
        emit = partial(self._emit, squares)
        visitor = Sequential(self.source, self.plan.formats, emit, squares)
        return ResumablePass(self.states, self.source, self.ids, visitor)

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
        """Write a norm or an unquantized matrix: the pass emits neither."""
        if self.plan.formats.get(name.removesuffix(".weight")) is not None:
            return
        for row, rows in self.source.blocks(name):
            self.output.add(
                name,
                row,
                round_rows(name, cast(name, rows, FLOAT_TYPES[self.plan.float_type][1]), None),
            )
