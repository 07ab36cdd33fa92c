"""The last answer is copied by a program or through the terminal, or the command says why not."""

import base64
import sys
from pathlib import Path

import pytest

import magistral_mlx as mm
from magistral_mlx.terminal.repl import clipboard
from magistral_mlx.terminal.repl.commands import answer
from magistral_mlx.terminal.repl.session import Session


class Terminal:
    """A stream that takes what is written, as a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...


@pytest.fixture
def no_clipboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return an empty folder, which is all of PATH."""
    for name in ("SSH_CONNECTION", "SSH_TTY", "WAYLAND_DISPLAY", "DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def add_program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_copied_with_a_program(
    no_clipboard: Path, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    add_program(no_clipboard, "pbcopy", f"exec /bin/cat > {no_clipboard}/copied")
    session.chat.messages += [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "é **1**"},
    ]
    answer(session, "/copy")
    assert (no_clipboard / "copied").read_text() == "é **1**"
    assert "the last answer is copied\n" in capsys.readouterr().err
    add_program(no_clipboard, "pbcopy", "exit 3")
    with pytest.raises(mm.OptionError, match="pbcopy failed"):
        answer(session, "/copy")


def test_copied_through_the_terminal(no_clipboard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(mm.OptionError, match="there is no clipboard"):
        clipboard.copy_text("one")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert "OSC 52" in clipboard.copy_text("é")
    code = base64.b64encode("é".encode()).decode()
    assert terminal.text == f"\x1b]52;c;{code}\x07"
    with pytest.raises(mm.OptionError, match="a terminal copies"):
        clipboard.copy_text("x" * 60_000)
    add_program(no_clipboard, "pbcopy", "exit 3")
    monkeypatch.setenv("SSH_TTY", "/dev/pts/1")
    assert "OSC 52" in clipboard.copy_text("é")  # the program's clipboard is elsewhere
