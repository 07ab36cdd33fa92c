"""``python -m benchmarks``: parse, measure, show. Progress goes to stderr, tables to stdout."""

import signal
import sys
from collections.abc import Sequence

import click

from benchmarks.commands.cache import cache
from benchmarks.commands.compare import compare
from benchmarks.commands.convert import convert
from benchmarks.commands.drafting import drafting
from benchmarks.commands.everything import everything
from benchmarks.commands.graph import graph
from benchmarks.commands.memory import memory
from benchmarks.commands.predict import forecast
from benchmarks.commands.quality import quality
from benchmarks.commands.reasoning import reasoning
from benchmarks.commands.samples import samples
from benchmarks.commands.speed import speed
from magistral_mlx.terminal import command_line


@click.group()
def benchmarks() -> None:
    """Measure this project's claims on this machine."""


COMMANDS = (cache, compare, convert, drafting, everything, forecast, graph, memory, quality)
for command in (*COMMANDS, reasoning, samples, speed):
    benchmarks.add_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0 is done, 1 a regression or a failed prediction, 2 something to change, 130 interrupted.
    """
    return command_line.run(benchmarks, argv, "python -m benchmarks")


if __name__ == "__main__":
    # Ended like Ctrl-C, so that 60 GB of temporary files are deleted.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
