"""Show the progress of long work: a bar at a terminal, a line every 30 seconds in a log."""

import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, ProgressColumn, Task
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from magistral_mlx.errors import in_units
from magistral_mlx.streams import Progress, Stream
from magistral_mlx.terminal.verbosity import Status, duration, is_quiet, ticking
from magistral_mlx.terminal.window import can_draw, has_styles

T = TypeVar("T")

# Steps from which the speed is estimated. Steps of one kind follow each other in a conversion.
RECENT = 16
BAR_WIDTH = 20


@dataclass
class Pace:
    """The speed of the work, and the time that is left.

    The first step of a stage tells no speed: it may be of another kind, as the embedding is.
    """

    clock: Callable[[], float] = time.monotonic
    _recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=RECENT))
    _total: int = 0
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._started = self.clock()

    def take(self, step: Progress) -> None:
        """Take note of the work that is done."""
        last = self._recent[-1][1] if self._recent else 0
        if step.total != self._total or step.done < last:
            # Another stage.
            self._recent.clear()
            self._total, last = step.total, 0
        if step.done > last:
            self._recent.append((self.clock(), step.done))

    def words(self) -> str:
        """Return the speed and the time left, or the time so far where neither is known."""
        # A bar asks from a thread of its own.
        now, recent = self.clock(), tuple(self._recent)
        if len(recent) > 1 and recent[-1][1] < self._total:
            (began, first), (last, done) = recent[0], recent[-1]
            seconds = max(last - began, 1e-3)
            speed = (done - first) / seconds
            # The step under way takes as long as those before it, or longer.
            step = min(now - last, seconds / (len(recent) - 1))
            left = max((self._total - done) / speed - step, 1.0)
            return f"{in_units(speed)}/s, about {duration(left)} left"
        ends = "finishing, " if recent and recent[-1][1] >= self._total else ""
        return f"{ends}{duration(now - self._started)} so far"


def run_with_bar(stream: Stream[Progress, T]) -> T:
    """Run a stream, show its progress on stderr, and return its result."""
    pace, status = Pace(), Status()
    columns = (
        BarColumn(bar_width=BAR_WIDTH),
        DownloadColumn(table_column=Column(no_wrap=True)),
        PaceColumn(pace),
        NameColumn(),
    )
    with Bar(
        *columns,
        console=Console(stderr=True, color_system="auto" if has_styles() else None),
        transient=True,
        disable=is_quiet() or not can_draw(sys.stderr),
    ) as bar:
        task = bar.add_task("", total=None)

        def line() -> str:
            shown = bar.tasks[task]
            done = f"{in_units(shown.completed)} of {in_units(shown.total or 0)}"
            return f"{done}, {pace.words()}: {shown.description}"

        # In a log a step may take minutes; a bar moves by itself.
        with ticking(line, status) if bar.disable else nullcontext():
            for step in stream:
                pace.take(step)
                bar.update(task, completed=step.done, total=step.total, description=step.name)
                if bar.disable:
                    status.show(line())
            return stream.result()


class PaceColumn(ProgressColumn):
    """A column with the speed and the time left."""

    def __init__(self, pace: Pace) -> None:
        super().__init__(Column(no_wrap=True))
        self.pace = pace

    def render(self, task: Task) -> Text:
        return Text(self.pace.words())


class NameColumn(ProgressColumn):
    """A column with the name of the step, cut off where the line ends."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")
