"""``python -m benchmarks``: parse, measure, show. Progress goes to stderr, the table to stdout."""

import signal
import sys
from collections.abc import Sequence

import click

from benchmarks.commands.bridge import bridge
from benchmarks.commands.budget import budget
from benchmarks.commands.cache import cache
from benchmarks.commands.compare import compare
from benchmarks.commands.convert import convert
from benchmarks.commands.drafting import drafting
from benchmarks.commands.everything import everything
from benchmarks.commands.graph import graph
from benchmarks.commands.mac_check import mac_check
from benchmarks.commands.memory import memory
from benchmarks.commands.predict import forecast
from benchmarks.commands.quality import quality
from benchmarks.commands.reasoning import reasoning
from benchmarks.commands.samples import samples
from benchmarks.commands.search import search
from benchmarks.commands.speed import speed
from magistral_mlx.terminal import command_line


@click.group()
def benchmarks() -> None:
    """Measure what the project claims, on this machine."""


COMMANDS = (
    bridge,
    budget,
    cache,
    compare,
    convert,
    drafting,
    everything,
    forecast,
    graph,
    mac_check,
    memory,
    quality,
    reasoning,
    samples,
    search,
    speed,
)
for command in COMMANDS:
    benchmarks.add_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit code: 0 done, 1 a regression, 2 something to change, 130 interrupted."""
    return command_line.run(benchmarks, argv, "python -m benchmarks")


if __name__ == "__main__":
    for number in (
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # as Ctrl-C: else 60 GB of temporary files would stay
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
