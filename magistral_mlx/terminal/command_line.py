"""What all command lines share: exit codes, and errors as one message on stderr."""

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

DONE, BUG, WRONG, INTERRUPTED = (
    0,
    1,
    2,
    130,
)  # exit codes; BUG is Python's own for an exception that escapes


class Command(click.Command):
    """A click command that answers another tool's flags with ours, and lets a reader of its output go away."""

    foreign_flags: Mapping[str, str] = {}  # mlx-lm's flag -> what to do instead

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
def leaving_in_order() -> Iterator[None]:
    """While a closed terminal and SIGTERM end the program as ``sys.exit`` does: what is to be saved at the end is."""

    def leave(number: int, _: object) -> None:
        for each in before:  # a shell passes on what the terminal has sent already
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)  # as a shell states it

    before = {number: signal.signal(number, leave) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _discard_output() -> None:
    """Of what could not be written: Python would flush into it once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stand_in_for_closed_streams() -> None:
    """A caller may have closed some (``>&-``): what we open next must not get their numbers, nor ``print`` fail."""
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
    """Run a command line to its exit code; errors a user can change are one message on stderr.

    ``loggers``: whose notes go to stderr meanwhile.
    """
    _stand_in_for_closed_streams()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    levels = {logging.getLogger(logger): logging.getLogger(logger).level for logger in loggers}
    for log in levels:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # where it cannot encode a letter, an escape is better than nothing
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        result = command.main(None if argv is None else list(argv), name, standalone_mode=False)
        return result if isinstance(result, int) else DONE
    except click.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return WRONG
    except (
        MagistralError,
        OSError,
    ) as error:  # an OSError: a full disk behind stdout, a folder not to be read
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
