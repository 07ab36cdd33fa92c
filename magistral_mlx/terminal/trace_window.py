"""A trace on a terminal, folded: its last lines while it grows, one line once it is closed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from rich.cells import chop_cells

from magistral_mlx.terminal.window import Window, dim, width
from magistral_mlx.tokenizer.reasoning import visible

ROWS = 6
FOLDED = "▸ thought for {seconds:.1f} s, {characters:,} characters; /trace shows them"


@dataclass
class TraceWindow:
    """Takes a trace in any pieces."""

    stream: TextIO
    clock: Callable[[], float] = time.monotonic
    text: str = ""
    _window: Window = field(init=False)
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._window, self._started = Window(self.stream, self.clock), self.clock()

    def push(self, text: str) -> None:
        self.text += text
        if self._window.is_due():
            self._window.draw(lambda: ([], self._last_lines()))

    def fold(self) -> None:
        """The trace is closed: one line is left of it."""
        said = FOLDED.format(seconds=self._seconds(), characters=len(self.text))
        self._window.draw(lambda: ([dim(row) for row in chop_cells(said, width())], []))

    def _seconds(self) -> float:
        return self.clock() - self._started

    def _last_lines(self) -> Sequence[str]:
        lines = visible(self.text.rstrip("\n")).expandtabs(4).split("\n")[-ROWS:]
        return [dim(row) for line in lines for row in chop_cells(line, width()) or [""]][-ROWS:]
