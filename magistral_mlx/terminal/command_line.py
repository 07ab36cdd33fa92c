"""Run a command line: exit codes, and errors as one message on stderr."""

import io
import logging
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from magistral_mlx import startup
from magistral_mlx.errors import MagistralError, as_flags, visible
from magistral_mlx.terminal.standard_streams import (
    discard_output,
    lenient_stderr,
    open_closed_streams,
)
from magistral_mlx.terminal.verbosity import take_verbosity, verbosity_options

# Exit codes; BUG is Python's own for an exception that escapes.
DONE, BUG, WRONG, NO_ANSWER, INTERRUPTED = 0, 1, 2, 3, startup.INTERRUPTED
LONGEST = 1000  # characters of a message about the command line
SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


class Command(click.Command):
    """A click command with ``-q``, ``-v`` and ``--log-level``, which all our commands have.

    It names our flag for another tool's, and allows a closed output pipe.
    """

    # Flags of other programs, and what to do instead.
    foreign_flags: Mapping[str, str] = {}

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        taken = frozenset(flag for param in self.params for flag in param.opts)
        self.params += verbosity_options(taken)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            left = super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name not in self.foreign_flags:
                raise
            instead = self.foreign_flags[error.option_name]
            raise click.UsageError(
                f"{error.option_name} is another program's: {instead}", ctx
            ) from None
        take_verbosity(ctx)
        return left

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:  # as in `... | head -1`
            discard_output()
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
    open_closed_streams()
    with lenient_stderr(), _logging(loggers):
        # A letter that stdout cannot encode is written as an escape.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            startup.ready()
            result = command.main(
                None if argv is None else list(argv), name, standalone_mode=False, **SETTINGS
            )
            return result if isinstance(result, int) else DONE
        except (click.Abort, KeyboardInterrupt):
            return INTERRUPTED
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            return WRONG
        except click.ClickException as error:
            show_error(_with_help(error))
            return WRONG
        # OSError: a full disk, an unreadable folder.
        except (MagistralError, OSError) as error:
            try:
                sys.stdout.flush()
            except OSError:
                discard_output()
            show_error(as_flags(error))
            return WRONG


def show_error(message: str) -> None:
    """Print an error, in the one form that all command lines have."""
    print(f"error: {visible(message)}", file=sys.stderr)


def _with_help(error: click.ClickException) -> str:
    """Return the message of a wrong command line, and the command that shows the right one."""
    message, ctx = error.format_message(), getattr(error, "ctx", None)
    # It quotes what was typed, of whatever length.
    message = message if len(message) <= LONGEST else f"{message[:LONGEST]} ..."
    if ctx is None:
        return message
    return f"{message}\n{ctx.command_path} {SETTINGS['help_option_names'][-1]} shows the options"


class _Formatter(logging.Formatter):
    """Formats a message of a logger, which may quote a file, so that a terminal can show it."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


@contextmanager
def _logging(loggers: Sequence[str]) -> Iterator[None]:
    """Show the messages of some loggers on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(message)s"))
    levels = {logging.getLogger(logger): logging.getLogger(logger).level for logger in loggers}
    for log in levels:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        for log, level in levels.items():
            log.removeHandler(handler)
            log.setLevel(level)
