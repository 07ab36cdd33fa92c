"""The command line in scripts: piped text, files, JSON lines, and how much is said."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from magistral_mlx import chat, generate
from magistral_mlx.errors import HubError
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.serving.events import event_of
from magistral_mlx.terminal import command_line, shared_flags
from magistral_mlx.terminal.asking.question import MAX_BYTES
from magistral_mlx.terminal.asking.results import as_object
from tests.support.terminal.scripted import REPLY, SEGMENTS, Scripted, run


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Return a function that makes stdin a pipe of the operating system with this text."""
    with ExitStack() as opened:

        def write(text: str) -> None:
            reading, writing = os.pipe()
            with open(writing, "w") as file:
                file.write(text)
            monkeypatch.setattr(sys, "stdin", opened.enter_context(open(reading)))

        yield write


def question(model: Scripted) -> str:
    return str(model.asked[-1][0][-1]["content"])


def test_piped_text_follows_the_prompt(model: Scripted, pipe: Callable[[str], None]) -> None:
    pipe("one\ntwo\n")
    assert run() == 0
    assert question(model) == "What is 48 + 76?\n\none\ntwo"
    pipe("What is it?\n")
    assert generate.main(["--model", "m"]) == 0
    assert question(model) == "What is it?"
    pipe("")
    assert run() == 0
    assert question(model) == "What is 48 + 76?"


def test_a_piped_question_goes_to_the_model_that_run_names(
    model: Scripted, pipe: Callable[[str], None]
) -> None:
    pipe("What is it?\n")
    assert command_line.run(generate.run, ["demo"]) == 0
    assert question(model) == "What is it?"
    assert model.loaded["model"] == "demo"
    pipe("one\n")
    assert command_line.run(generate.run, ["demo", "Sum it up."]) == 0
    assert question(model) == "Sum it up.\n\none"


def test_a_terminal_is_not_read(
    model: Scripted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outer, inner = os.openpty()
    with open(inner) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        assert run() == 0
        assert generate.main(["--model", "m"]) == 2
    os.close(outer)
    assert "the question is missing; give it with -p" in capsys.readouterr().err


def test_a_pipe_that_stays_silent_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    probe = (
        "import sys; from magistral_mlx.terminal.asking.question import read_stdin; "
        "print(read_stdin(patience=0), end='')"
    )
    done = subprocess.Popen(
        [sys.executable, "-c", probe], stdin=reading, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    os.close(reading)
    assert done.stderr is not None
    assert b"waiting for text on stdin" in done.stderr.readline()
    os.write(writing, b"late")
    os.close(writing)
    assert done.communicate()[0] == b"late"


def test_files_follow_the_prompt_under_their_names(
    model: Scripted, tmp_path: Path, pipe: Callable[[str], None]
) -> None:
    first, second = tmp_path / "a.py", tmp_path / "b.md"
    first.write_bytes(b"\xef\xbb\xbfx = 1\n")
    second.write_text("```\nb\n```\n")
    assert run("--file", str(first), "--file", str(second)) == 0
    assert question(model) == (
        f"What is 48 + 76?\n\n{first}:\n```\nx = 1\n```\n\n{second}:\n````\n```\nb\n```\n````"
    )
    assert run("--system-prompt-file", str(first), "--system-prompt-only") == 0
    assert model.asked[-1][0][0] == {"role": "system", "content": "x = 1"}


def test_a_chat_takes_its_system_prompt_from_a_file(
    model: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f").write_text("Be brief.\n")
    with pytest.raises(AttributeError):  # the chat is none
        chat.main(["--model", "demo", "--system-prompt-file", str(tmp_path / "f")])
    assert model.asked == [{"system_prompt": "Be brief."}]
    for flags, said in (
        (("--system-prompt-file", str(tmp_path)), "cannot be read"),
        (("--system-prompt", "a", "--system-prompt-file", "b"), "keep one"),
    ):
        assert chat.main(["--model", "demo", *flags]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\0b", "is binary"),
        (b"\xff", "is not UTF-8"),
        (b"\n", "is empty"),
        (b"x" * (MAX_BYTES + 1), "has over 4.0 MB"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_no_text_are_refused(
    model: Scripted,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    data: bytes | None,
    message: str,
) -> None:
    path = tmp_path / "f"
    if data is None:
        path.mkdir()
    else:
        path.write_bytes(data)
    for flag in ("--file", "--system-prompt-file"):
        assert run(flag, str(path)) == 2
        assert f"error: {path} {message}" in capsys.readouterr().err
    assert model.loaded == {}


def test_json_lines_while_it_runs_end_in_the_object_of_json(
    model: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--json-stream") == 0
    *events, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert events == [event_of(segment) for segment in SEGMENTS]
    assert last == as_object(REPLY, "m")
    assert run("--json-stream", "--samples", "2") == 0
    *replies, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert replies == [{"kind": "reply"} | as_object(REPLY, "m")] * 2
    assert last["votes"] == {"124": 2}
    model.interrupt_after = 1
    assert run("--json-stream") == 130
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["finish_reason"] == "cancelled"


def test_quiet_leaves_the_answer_and_errors(
    model: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("-q", "--system-prompt", "S", "--system-prompt-only") == 0
    assert capsys.readouterr() == ("It is 124.\n", "")
    assert run("-q", "--samples", "2") == 0
    assert capsys.readouterr() == ("It is 124.\n", "")


@pytest.mark.parametrize(
    ("flags", "least"),
    [
        ((), "INFO"),
        (("-q",), "ERROR"),
        (("-v",), "DEBUG"),
        (("--log-level", "warning"), "WARNING"),
        (("-q", "--log-level", "debug"), "DEBUG"),
    ],
)
def test_the_level_of_log_messages(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    least: str,
) -> None:
    levels = ["DEBUG", "INFO", "WARNING", "ERROR"]

    def loading(model: str, options: LoadOptions) -> Iterator[None]:
        for level in levels:
            logging.getLogger("magistral_mlx.any").log(getattr(logging, level), level)
        raise HubError("no network")

    monkeypatch.setattr(shared_flags, "loading", loading)
    assert run(*flags) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown == [*levels[levels.index(least) :], "error: no network"]
