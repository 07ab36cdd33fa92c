"""Messages typed or piped: one line or several, a history, Ctrl-C."""

import io
import os
import pty
import signal
import stat
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from magistral_mlx.terminal.prompt import (
    goes_on,
    interruptible,
    is_interactive,
    read_pipe,
    read_terminal,
)

COMMANDS = ["/help", "/retry"]
ENTER, ALT_ENTER, CTRL_C, CTRL_D, UP, TAB = "\r", "\x1b\r", "\x03", "\x04", "\x1b[A", "\t"
PASTE, PASTED = "\x1b[200~", "\x1b[201~"


def messages(history: Path, *keys: str) -> list[str]:
    """Type keys and Ctrl-D at a terminal and return the messages."""
    pytest.importorskip("prompt_toolkit", reason="a new dependency, not yet installed here")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    found = []
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        coming, waiting = read_terminal(history, COMMANDS), [*keys, CTRL_D]
        while waiting:
            sent = waiting.index(ENTER) + 1 if ENTER in waiting else len(waiting)
            pipe.send_text(
                "".join(waiting[:sent])
            )  # all at once the rest would be typed before there is a prompt
            del waiting[:sent]
            found += [text for text in [next(coming, "")] if text]
    return found


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["one", ENTER, "two", ENTER], ["one", "two"]),
        (["one", ALT_ENTER, "two", ENTER], ["one\ntwo"]),
        (["one\\\r", "two", ENTER], ["one\ntwo"]),
        (["row \\\\", ENTER, "two", ENTER], ["row \\\\", "two"]),
        (
            [PASTE, "def f():\r\n\treturn 1\n\nf()\n", PASTED, ENTER],
            ["def f():\n\treturn 1\n\nf()"],
        ),
        (["discarded", CTRL_C, "two", ENTER], ["two"]),
        (["\r  \r one ", ENTER], ["one"]),
        (["日本語 🙂", ENTER], ["日本語 🙂"]),
        (["one", ENTER, UP, ENTER], ["one", "one"]),
        (["one", ALT_ENTER, "two", ENTER, UP, "!", ENTER], ["one\ntwo", "one\ntwo!"]),
        ([], []),
    ],
)
def test_typed_messages(tmp_path: Path, keys: list[str], expected: list[str]) -> None:
    assert messages(tmp_path / "history", *keys) == expected


def test_a_dumb_terminal_gets_no_control_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert messages(tmp_path / "history", "one", ENTER) == ["one"]
    out, err = capsys.readouterr()
    assert "> one" in out + err
    assert "\x1b" not in out + err


def test_the_history_is_readable_by_its_owner_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = tmp_path / "new" / "history"
    assert messages(history, "a secret", ENTER) == ["a secret"]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert messages(history, UP, ENTER) == ["a secret"]
    assert messages(tmp_path, "one", ENTER, UP, ENTER) == [
        "one",
        "one",
    ]  # a folder cannot hold it; but this process can
    assert "no history is kept" in capsys.readouterr().err


def test_an_old_history_is_tightened(tmp_path: Path) -> None:
    history = tmp_path / "history"
    history.touch(0o644)
    assert messages(history, "a secret", ENTER) == ["a secret"]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_a_history_that_is_a_pipe_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "history")
    assert messages(tmp_path / "history", "one", ENTER) == ["one"]
    reader = os.open(tmp_path / "history", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert messages(tmp_path / "history", "one", ENTER) == ["one"]
    finally:
        os.close(reader)
    assert capsys.readouterr().err.count("no history is kept") == 2


def piped_in(monkeypatch: pytest.MonkeyPatch, text: str) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    return list(read_pipe())


def test_piped_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "one\n\n two \r\nthree\\\nfour\\\n\nrow \\\\\nfive\\"
    assert piped_in(monkeypatch, text) == ["one", "two", "three\nfour", "row \\\\", "five"]
    assert piped_in(monkeypatch, "") == []


@pytest.mark.parametrize(
    ("line", "expected"), [("", False), ("a\\", True), ("a\\\\", False), ("\\\\\\", True)]
)
def test_a_line_goes_on_after_a_backslash_of_its_own(line: str, expected: bool) -> None:
    assert goes_on(line) == expected


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Make a pseudo-terminal stdin and return its descriptor."""
    above, below = pty.openpty()
    try:
        with os.fdopen(below, closefd=False) as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            yield below
    finally:
        os.close(above)
        os.close(below)


def test_ctrl_c_is_told_once_and_then_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    with terminal(monkeypatch) as descriptor:
        settings = termios.tcgetattr(descriptor)
        with pytest.raises(KeyboardInterrupt), interruptible(lambda: told.append(1)):  # noqa: PT012  # raised by the kernel
            assert not termios.tcgetattr(descriptor)[3] & termios.ECHO
            os.kill(os.getpid(), signal.SIGINT)
            assert told == [1]
            os.kill(os.getpid(), signal.SIGINT)
        assert termios.tcgetattr(descriptor) == settings
    assert (told, signal.getsignal(signal.SIGINT)) == ([1], before)


def test_a_terminal_that_shows_the_prompt_is_interactive(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stdin, stdout, stderr in ((1, 1, 1), (1, 0, 1), (1, 1, 0), (1, 0, 0), (0, 1, 1)):
        for name, is_terminal in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)):
            monkeypatch.setattr(sys, name, Terminal() if is_terminal else io.StringIO())
        assert is_interactive() == (stdin and (stdout or stderr))
