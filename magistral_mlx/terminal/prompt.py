"""Read messages: typed at a terminal, with a history, or one line each from a pipe."""

import os
import signal
import stat
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from magistral_mlx.errors import OptionError
from magistral_mlx.files import PRIVATE
from magistral_mlx.terminal.window import PLAIN_TERMINALS

LEAVING = "/quit or Ctrl-D ends the conversation"


def is_interactive() -> bool:
    """Return True if a person types and sees the text."""
    return sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())


def read_terminal(history: Path, commands: Sequence[str]) -> Iterator[str]:
    """Yield messages typed at a terminal, until Ctrl-D; Ctrl-C discards an unfinished one.

    Enter sends. Alt-Enter, or a backslash before Enter, begins a new line. Pasted text keeps its
    lines.

    Args:
        history: the file that keeps them; its folder is created.
        commands: the words that Tab completes.
    """
    session = _make_session(history, commands)
    while True:
        try:
            text = session.prompt("> ")
        except KeyboardInterrupt:
            print(LEAVING, file=sys.stderr)
            continue
        except EOFError:
            return
        if text.strip():
            yield text.strip()


def read_pipe() -> Iterator[str]:
    """Yield messages from a pipe, one a line; a backslash at its end continues a line."""
    begun: list[str] = []
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            begun.append(line.decode().rstrip("\r\n"))
        except UnicodeDecodeError as error:
            raise OptionError(
                f"line {number} of stdin is not UTF-8 ({error}); convert it, e.g. with iconv"
            ) from None
        if goes_on(begun[-1]):
            begun[-1] = begun[-1][:-1]
            continue
        if text := "\n".join(begun).strip():
            yield text
        begun.clear()
    if text := "\n".join(begun).strip():
        yield text


def goes_on(line: str) -> bool:
    """Return True for a line that ends in an odd number of backslashes; LaTeX rows end in two."""
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1


@contextmanager
def interruptible(cancel: Callable[[], None]) -> Iterator[None]:
    """Let the first Ctrl-C call ``cancel`` and a second one raise; hide what is typed."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        cancel()

    before = signal.signal(signal.SIGINT, stop)
    try:
        with _without_echo():
            yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _without_echo() -> Iterator[None]:
    """Keep typed text for the next prompt, so that it does not stand within the reply."""
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):  # no terminal
        yield
        return
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(descriptor, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _make_session(history: Path, commands: Sequence[str]) -> Any:
    # The import takes a tenth of a second, and only a terminal needs it.
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output
    from prompt_toolkit.output.plain_text import PlainTextOutput

    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if goes_on(buffer.document.current_line_before_cursor):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    keys = KeyBindings()
    keys.add("enter")(send)
    keys.add("escape", "enter")(begin_line)

    is_plain = os.environ.get("TERM") in PLAIN_TERMINALS
    drawn = None if is_plain else create_output(always_prefer_tty=True)
    # A session without an output of its own draws nothing where TERM is dumb.
    plain = PlainTextOutput(sys.stdout if sys.stdout.isatty() else sys.stderr)
    with create_app_session(output=drawn or plain):
        return PromptSession(
            history=FileHistory(str(history)) if _is_kept(history) else InMemoryHistory(),
            multiline=True,
            prompt_continuation="  ",
            key_bindings=keys,
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            output=drawn,
        )


def _is_kept(history: Path) -> bool:
    """Create the file, readable by its user only; return True if it can be written."""
    # Opening a pipe would wait for its reader without O_NONBLOCK.
    access = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        history.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(history, access, PRIVATE)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError("it is no plain file")
            os.fchmod(descriptor, PRIVATE)
        finally:
            os.close(descriptor)
    except OSError as error:
        print(f"no history is kept: {history} cannot be written ({error})", file=sys.stderr)
        return False
    return True
