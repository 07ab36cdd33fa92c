"""The last lines on a terminal, drawn over while they may still change."""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

DIM = "\x1b[2m{}\x1b[22m"
BETWEEN_DRAWS = (
    0.05  # seconds; and ten times what a draw took, so that drawing never slows the reply down
)


def can_draw(stream: TextIO) -> bool:
    """Whether this is a terminal that moves its cursor."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def dim(text: str) -> str:
    return text if "NO_COLOR" in os.environ else DIM.format(text)


def width() -> int:
    """Columns to write to: not the last one, after which some terminals begin a new line."""
    return max(10, shutil.get_terminal_size().columns - 1)


def rows() -> int:
    """Lines that can be drawn over: the cursor's own, below them, and one of what was there before stay out of it."""
    return max(1, shutil.get_terminal_size().lines - 2)


@dataclass
class Window:
    """Lines at the end of a terminal's text; the cursor stands below them."""

    stream: TextIO
    clock: Callable[[], float] = time.monotonic
    height: int = 0
    _next: float = 0.0

    def is_due(self) -> bool:
        """Whether it is time to draw again."""
        return self.clock() >= self._next

    def draw(self, lines: Callable[[], tuple[Sequence[str], Sequence[str]]]) -> None:
        """Put lines in the place of those drawn last: some for good, and below them some that will be drawn over.

        In one write, each line over the old one and nothing erased before: so nothing flickers.
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
