"""The conversation at the prompt: commands, Ctrl-C, files."""

import builtins
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from magistral_mlx import chat
from magistral_mlx.display import Display
from tests.tiny import DEMO

GREEDY = ["--model", str(DEMO), "--temp", "0"]


def pipe_in(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch) -> object:
    """``type_in(lines)``: a terminal at which these are typed; an exception class is raised instead; then Ctrl-D."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def type_lines(*lines: str | type[BaseException]) -> None:
        waiting: Iterator[str | type[BaseException]] = iter((*lines, EOFError))

        def read(prompt: str) -> str:
            line = next(waiting)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr(builtins, "input", read)

    return type_lines


def test_each_line_of_a_pipe_is_a_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pipe_in(monkeypatch, "What is 48 + 76?\n\nWhat is 7 * 8?\n")
    assert chat.main([*GREEDY, "--hide-reasoning"]) == 0
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert "124" in first
    assert "56" in second
    assert err.count("tok/s") == 4
    assert "(0 cached)" not in err
    assert " cached)" in err.splitlines()[1]


def test_a_line_that_is_not_utf_8(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pipe_in(monkeypatch, b"What is 1 + 1?\nO\xf9 ?\n")
    assert chat.main(GREEDY) == 2
    out, err = capsys.readouterr()
    assert "2" in out
    assert "line 2 of stdin is not UTF-8" in err


def test_commands(type_in, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    type_in("What is 48 + 76?", "/help", "/hello", KeyboardInterrupt, "/reset", "What is 7 * 8?", "/quit", "never read")
    assert chat.main(GREEDY) == 0
    out, err = capsys.readouterr()
    assert "124" in out
    assert err.count("/reset  begin") == 2
    assert "/hello: no such command" in err
    assert "Ctrl-D ends" in err
    prompts = [line.split()[1] for line in err.splitlines() if line.startswith("prompt ")]
    assert len(prompts) == 2
    type_in("What is 7 * 8?")  # Ctrl-D
    assert chat.main(GREEDY) == 0
    fresh = [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("prompt ")]
    assert fresh == prompts[1:]


def test_ctrl_c_stops_the_reply_not_the_program(  # type: ignore[no-untyped-def]
    type_in, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Display.show
    pieces = iter(range(1000))

    def interrupted(self: Display, segment: object) -> None:
        if next(pieces) == 3:
            raise KeyboardInterrupt
        shown(self, segment)  # type: ignore[arg-type]

    monkeypatch.setattr(Display, "show", interrupted)
    type_in("How many r's are in strawberry?", "What is 48 + 76?")
    assert chat.main(GREEDY) == 0
    out, err = capsys.readouterr()
    assert "\nstopped\n" in err
    assert "124" in out


def test_ctrl_c_ends_a_pipe_and_the_turns_before_it_are_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Display.show
    replies: list[Display] = []

    def interrupted(self: Display, segment: object) -> None:
        if not any(self is reply for reply in replies):
            replies.append(self)
        if len(replies) == 2:
            raise KeyboardInterrupt
        shown(self, segment)  # type: ignore[arg-type]

    monkeypatch.setattr(Display, "show", interrupted)
    pipe_in(monkeypatch, "What is 48 + 76?\nWhat is 7 * 8?\nWhat is 9 * 8?\n")
    assert chat.main([*GREEDY, "--prompt-cache-file", str(tmp_path / "talk.cache")]) == 130
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert (tmp_path / "talk.cache").exists()


def test_a_pipe_drops_no_message_silently(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pipe_in(monkeypatch, "/usr/bin is what?\nWhat is 7 * 8?\n")
    assert chat.main(GREEDY) == 2
    out, err = capsys.readouterr()
    assert "/usr/bin is what?: no such command" in err
    assert out == ""


def test_an_error_ends_the_turn_at_a_terminal_and_the_program_in_a_pipe(  # type: ignore[no-untyped-def]
    type_in, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    too_long = "1 + 1 " * 3000
    type_in(too_long, "What is 48 + 76?")
    assert chat.main(GREEDY) == 0
    out, err = capsys.readouterr()
    assert "error: the prompt is" in err
    assert "124" in out
    pipe_in(monkeypatch, too_long + "\nWhat is 48 + 76?\n")
    assert chat.main(GREEDY) == 2
    assert capsys.readouterr().out == ""


def test_a_conversation_goes_on_from_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ["--prompt-cache-file", str(tmp_path / "talk.cache")]
    pipe_in(monkeypatch, "")
    assert chat.main([*GREEDY, *file]) == 0
    assert not (tmp_path / "talk.cache").exists()
    pipe_in(monkeypatch, "What is 48 + 76?")
    assert chat.main([*GREEDY, *file, "--keep-reasoning", "all", "--system-prompt", "Be brief."]) == 0
    capsys.readouterr()
    pipe_in(monkeypatch, "What is 7 * 8?")
    assert chat.main([*GREEDY, *file]) == 0
    out, err = capsys.readouterr()
    assert "56" in out
    assert " cached)" in err
    pipe_in(monkeypatch, "What is 7 * 8?")
    assert chat.main([*GREEDY, *file, "--system-prompt", "Be long."]) == 2
    assert "leave --system-prompt out" in capsys.readouterr().err
