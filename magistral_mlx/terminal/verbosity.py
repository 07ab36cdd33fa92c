"""Verbosity of a command (``-q``, ``-v``, ``--log-level``), and the line of its status."""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Thread

import click

from magistral_mlx.errors import visible
from magistral_mlx.terminal.window import can_draw, width

LOG_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
FLAGS = ("quiet", "verbose", "log_level")
# Seconds between two lines where no line can be drawn over, as in a log file.
BETWEEN_LINES = 30.0
# Seconds between two looks at work that says nothing by itself.
BETWEEN_LOOKS = 0.5
QUIET, VERBOSE = f"{__name__}.quiet", f"{__name__}.verbose"


def verbosity_options(taken: frozenset[str] = frozenset()) -> list[click.Option]:
    """Make the options, without the short flags that a command has ``taken``."""
    return [
        click.Option(
            [flag for flag in ("-q", "--quiet") if flag not in taken],
            is_flag=True,
            help="Show only the result and errors.",
        ),
        click.Option(
            [flag for flag in ("-v", "--verbose") if flag not in taken],
            is_flag=True,
            help="Show every log message"
            + (", and each of the --samples." if "--samples" in taken else "."),
        ),
        click.Option(
            ["--log-level"],
            type=click.Choice(list(LOG_LEVELS)),
            help="Least important log messages to show; info by default, error with --quiet, "
            "debug with --verbose.",
        ),
    ]


def take_verbosity(ctx: click.Context) -> None:
    """Take the options out of a command's parameters, and keep what they say for its run.

    Raises:
        click.UsageError: both quiet and verbose are asked for.
    """
    quiet, verbose, level = (ctx.params.pop(name, None) for name in FLAGS)
    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose contradict each other; keep one", ctx)
    default = "error" if quiet else "debug" if verbose else "info"
    ctx.meta.update({QUIET: bool(quiet), VERBOSE: bool(verbose)})
    # The command line's run restores the level.
    logging.getLogger("magistral_mlx").setLevel(LOG_LEVELS[level or default])


def is_quiet() -> bool:
    """Return True if the command that runs may show only its result and errors."""
    return _asked(QUIET)


def is_verbose() -> bool:
    """Return True if the command that runs is asked for details."""
    return _asked(VERBOSE)


def _asked(key: str) -> bool:
    ctx = click.get_current_context(silent=True)
    return ctx is not None and bool(ctx.meta.get(key))


@dataclass
class Status:
    """One line on stderr about the work under way.

    A terminal shows each text in place of the last one. Elsewhere one line is written every 30
    seconds. With ``--quiet`` nothing is shown.
    """

    clock: Callable[[], float] = time.monotonic
    is_silent: bool = field(default_factory=is_quiet)
    is_shown: bool = False
    _due: float = field(init=False)

    def __post_init__(self) -> None:
        self._due = self.clock() + BETWEEN_LINES

    def show(self, text: str) -> None:
        """Say how far the work is."""
        if self.is_silent:
            return
        if can_draw(sys.stderr):
            # A line that wraps could not be removed.
            self._draw(visible(text)[: width()])
            self.is_shown = True
        elif (now := self.clock()) >= self._due:
            self._due = now + BETWEEN_LINES
            sys.stderr.write(f"{visible(text)}\n")
            sys.stderr.flush()

    def clear(self) -> None:
        """Remove the line from a terminal."""
        if self.is_shown:
            self._draw("")
            self.is_shown = False

    def _draw(self, text: str) -> None:
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


@contextmanager
def ticking(text: Callable[[], str], status: Status | None = None) -> Iterator[None]:
    """Show a text as the status twice a second for the block, however long its steps take."""
    status, ended = status or Status(), Event()

    def tick() -> None:
        while not ended.wait(BETWEEN_LOOKS):
            status.show(text())

    thread = Thread(target=tick, name="status", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        status.clear()


@contextmanager
def waiting(what: str, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """In a log, say every 30 seconds that a block of work goes on which says nothing there."""
    started = clock()
    if can_draw(sys.stderr):
        yield
        return
    with ticking(lambda: f"{what}, {duration(clock() - started)} so far", Status(clock)):
        yield


def duration(seconds: float) -> str:
    """Format a duration as hours, minutes and seconds, rounded up."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
