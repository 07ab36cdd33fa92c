"""The last lines on a terminal, which are drawn over while they change; and a trace in them."""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from magistral_mlx.errors import visible

DIM = "\x1b[2m{}\x1b[22m"
# Values of TERM that promise no control sequence.
PLAIN_TERMINALS = ("dumb", "unknown")
# Least seconds between two draws; and ten times a draw's own, so that drawing slows nothing down.
BETWEEN_DRAWS = 0.05
# Lines of a trace that are shown while it grows.
TRACE_ROWS = 6
FOLDED = "▸ thought for {seconds:.1f} s, {characters:,} characters; /trace shows them"


def can_draw(stream: TextIO) -> bool:
    """Return True for a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM") not in PLAIN_TERMINALS


def has_styles() -> bool:
    """Return True if letters may be dim, bold or coloured: NO_COLOR is empty, TERM not dumb."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in PLAIN_TERMINALS


def dim(text: str) -> str:
    """Return text in dim letters, where letters may have styles."""
    return DIM.format(text) if has_styles() else text


def width() -> int:
    """Return the columns to write to: all but the last, after which some terminals wrap."""
    return max(10, shutil.get_terminal_size().columns - 1)


def rows() -> int:
    """Return how many lines can be drawn over: all but the cursor's and one of the older text."""
    return max(1, shutil.get_terminal_size().lines - 2)


@dataclass
class Window:
    """Lines at the end of a terminal's text, with the cursor below them."""

    stream: TextIO
    clock: Callable[[], float] = time.monotonic
    height: int = 0
    _next: float = 0.0

    def is_due(self) -> bool:
        """Return True if it is time to draw again."""
        return self.clock() >= self._next

    def draw(self, lines: Callable[[], tuple[Sequence[str], Sequence[str]]]) -> None:
        """Replace the lines drawn last: by some for good, and below them some that may change.

        All in one write, each line over the old one, so that nothing flickers.
        """
        started = self.clock()
        for_good, changing = lines()
        changing = changing[-rows() :]
        up = f"\x1b[{self.height}A" if self.height else ""
        text = "".join(f"{line}\x1b[K\n" for line in (*for_good, *changing))
        self.stream.write(f"{up}\r{text}\x1b[J")
        self.stream.flush()
        self.height = len(changing)
        ended = self.clock()
        self._next = ended + max(BETWEEN_DRAWS, 10 * (ended - started))


@dataclass
class TraceWindow:
    """A trace on a terminal: its last lines while it grows, one line once it is closed."""

    stream: TextIO
    clock: Callable[[], float] = time.monotonic
    text: str = ""
    _window: Window = field(init=False)
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._window, self._started = Window(self.stream, self.clock), self.clock()

    def push(self, text: str) -> None:
        """Show a piece of the trace."""
        self.text += text
        if self._window.is_due():
            self._window.draw(lambda: ([], self._last_lines()))

    def fold(self) -> None:
        """Replace the trace, which is closed, by one line."""
        from rich.cells import chop_cells

        line = FOLDED.format(seconds=self._seconds(), characters=len(self.text))
        self._window.draw(lambda: ([dim(row) for row in chop_cells(line, width())], []))

    def _seconds(self) -> float:
        return self.clock() - self._started

    def _last_lines(self) -> Sequence[str]:
        # rich takes a while to import, and only a terminal needs it.
        from rich.cells import chop_cells

        lines = visible(self.text.rstrip("\n")).expandtabs(4).split("\n")[-TRACE_ROWS:]
        return [dim(row) for line in lines for row in chop_cells(line, width()) or [""]][
            -TRACE_ROWS:
        ]
