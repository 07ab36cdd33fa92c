"""A progress bar on a terminal's stderr."""

import sys
from collections.abc import Generator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from magistral_mlx.streams import Progress

T = TypeVar("T")

SPEED_SECONDS = (
    900.0  # of which the time left is estimated: GPTQ takes a while for each of its steps
)


def shown(steps: Generator[Progress, None, T]) -> T:
    """Run long work under a bar; what it returns."""
    text = TextColumn("{task.description}")
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), text)
    with Bar(
        *columns,
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
        speed_estimate_period=SPEED_SECONDS,
    ) as bar:
        task = bar.add_task("", total=None)
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                result: T = end.value
                return result
            bar.update(task, completed=step.done, total=step.total, description=step.name)
