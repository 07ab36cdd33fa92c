"""Run a command line: exit codes, and errors as one message on stderr."""

import io
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import click

from magistral_mlx.errors import MagistralError

# Exit codes; BUG is Python's own for an exception that escapes.
DONE, BUG, WRONG, INTERRUPTED = 0, 1, 2, 130


class Command(click.Command):
    """A click command that names our flag for another tool's, and allows a closed output pipe."""

    # mlx-lm's flags, and what to do instead.
    foreign_flags: Mapping[str, str] = {}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name not in self.foreign_flags:
                raise
            instead = self.foreign_flags[error.option_name]
            raise click.UsageError(f"{error.option_name} is mlx-lm's: {instead}", ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:  # as in `... | head -1`
            _discard_output()
            return DONE


@contextmanager
def exit_in_order() -> Iterator[None]:
    """Let a closed terminal and SIGTERM end the program as ``sys.exit`` does, so that it saves."""

    def leave(number: int, _: object) -> None:
        # A shell passes on a signal that the terminal has already sent.
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)  # as a shell reports a signal

    before = {number: signal.signal(number, leave) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _discard_output() -> None:
    """Discard unwritten output, which Python would flush once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> None:
    """Open the null device for streams that a caller has closed (``>&-``).

    Otherwise the next open file would get their numbers, and ``print`` would fail.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(descriptor, "w" if number else "r"))


def run(
    command: click.Command,
    argv: Sequence[str] | None,
    name: str | None = None,
    *,
    loggers: Sequence[str] = ("magistral_mlx",),
) -> int:
    """Run a command line and return its exit code; print a user's error as one message on stderr.

    Messages of ``loggers`` go to stderr.
    """
    _open_closed_streams()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    levels = {logging.getLogger(logger): logging.getLogger(logger).level for logger in loggers}
    for log in levels:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    # A letter that stdout cannot encode is written as an escape.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        result = command.main(None if argv is None else list(argv), name, standalone_mode=False)
        return result if isinstance(result, int) else DONE
    except click.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return WRONG
    # OSError: a full disk, an unreadable folder.
    except (MagistralError, OSError) as error:
        try:
            sys.stdout.flush()
        except OSError:
            _discard_output()
        with suppress(OSError):
            print(f"error: {error}", file=sys.stderr)
        return WRONG
    finally:
        for log, level in levels.items():
            log.removeHandler(handler)
            log.setLevel(level)
