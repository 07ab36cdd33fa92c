"""Show a progress bar on a terminal's stderr."""

import sys
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

from magistral_mlx.streams import Progress, Stream

T = TypeVar("T")

# Window of the speed estimate in seconds; long because GPTQ steps are slow.
SPEED_SECONDS = 900.0


def run_with_bar(stream: Stream[Progress, T]) -> T:
    """Run a stream under a progress bar, and return its result."""
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
        for step in stream:
            bar.update(task, completed=step.done, total=step.total, description=step.name)
        return stream.result()
