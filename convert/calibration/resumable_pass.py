"""Run a forward pass whose state is saved after each layer, so that it can be resumed."""

import hashlib
import re
from collections.abc import Generator
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from magistral_mlx.convert.calibration.forward import PassState, Visitor, visit_linears
from magistral_mlx.convert.calibration.host import trim_heap
from magistral_mlx.convert.calibration.statistics import from_file, to_bytes
from magistral_mlx.convert.source.source import Source
from magistral_mlx.files import discard, is_own_file, sha256_of, write_file

STREAM = "stream"
# A file is complete only if its content has the hash in its name.
NAME = "layers-{layers:05}-{sha256}.safetensors"
NAMED = re.compile(r"layers-(\d{5})-([0-9a-f]{64})\.safetensors")


class Collector(Visitor, Protocol):
    """A visitor that keeps E[x_j^2] of its inputs, by module path."""

    squares: dict[str, mx.array]


class ResumablePass:
    """``visit_linears`` step by step, from the last state that is saved in a folder.

    Steps are the embedding, each layer, and the rest of the model. ``visitor.squares`` holds the
    statistics of all steps that are done.
    """

    def __init__(self, folder: Path, source: Source, ids: mx.array, visitor: Collector) -> None:
        self._folder, self._visitor = folder, visitor
        self._state, squares = _newest(folder)
        visitor.squares |= squares
        self.steps_done = 0 if self._state is None else self._state.layers + 1
        self._steps: Generator[PassState] = visit_linears(source, ids, visitor, self._state)

    def advance(self) -> None:
        """Take the next step; raise NumericsError if an input of a linear is not finite."""
        # Hold no reference to the stream, so that the next layer can free it.
        self._state = None
        self._state = next(self._steps, None)
        self.steps_done += 1
        trim_heap()

    def keep(self) -> None:
        """Save the state in place of the one before, except after the embedding and at the end."""
        if self._state is None or not self._state.layers:
            return
        content = to_bytes({**self._visitor.squares, STREAM: self._state.stream})
        name = NAME.format(layers=self._state.layers, sha256=hashlib.sha256(content).hexdigest())
        self._folder.mkdir(parents=True, exist_ok=True)
        before = list(self._folder.iterdir())
        write_file(self._folder / name, content)
        for path in before:
            if path.name != name:
                discard(path)


def _newest(folder: Path) -> tuple[PassState | None, dict[str, mx.array]]:
    """Return the last state with an undamaged file, and its statistics."""
    found = {
        path: match
        for path in folder.glob("*")
        if (match := NAMED.fullmatch(path.name)) and is_own_file(path)
    }
    for path in sorted(found, reverse=True):
        layers, sha256 = found[path].groups()
        if sha256_of(path) == sha256:
            arrays = from_file(path)
            return PassState(int(layers), arrays.pop(STREAM)), arrays
    return None, {}
