"""Many prompts with one load: JSON lines in, JSON lines out, and going on after a kill."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from magistral_mlx import generate
from magistral_mlx.errors import ContextError
from magistral_mlx.generation.reply import Reply
from magistral_mlx.terminal.asking.results import as_object
from tests.support.terminal.scripted import REPLY, USAGE, Scripted

PROMPTS = b"""{"prompt": "one", "id": 7}

"two"
{"prompt": "three", "system_prompt": "Be brief."}
"""
RESULTS = [
    {"index": 0, "id": 7, "prompt": "one"} | as_object(REPLY, "m"),
    {"index": 1, "id": None, "prompt": "two"} | as_object(REPLY, "m"),
    {"index": 2, "id": None, "prompt": "three"} | as_object(REPLY, "m"),
]
Asked = Callable[..., int]


@pytest.fixture
def ask(model: Scripted, tmp_path: Path) -> Asked:
    """Return a function that runs the command on the prompts."""

    def run(*flags: str, prompts: bytes = PROMPTS) -> int:
        file = tmp_path / "prompts.jsonl"
        file.write_bytes(prompts)
        return generate.main(["--model", "m", "--prompts-file", str(file), *flags])

    return run


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def fail_at(model: Scripted, monkeypatch: pytest.MonkeyPatch, call: int, error: Exception) -> None:
    """Let the model refuse one of the calls; calls are counted from 0 on."""
    stream = model.stream

    def scripted(*args: Any, **options: Any) -> Any:
        if len(model.asked) == call:
            model.asked.append(None)
            raise error
        return stream(*args, **options)

    monkeypatch.setattr(model, "stream", scripted)


def test_each_prompt_has_a_line(
    ask: Asked, model: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask("--system-prompt", "S") == 0
    assert lines(capsys.readouterr().out) == RESULTS
    assert [[message["content"] for message in asked[0]] for asked in model.asked] == [
        ["S", "one"],
        ["S", "two"],
        ["Be brief.", "three"],
    ]


def test_a_prompt_that_is_refused_leaves_the_others(
    ask: Asked,
    model: Scripted,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    fail_at(model, monkeypatch, 1, ContextError("too long"))
    output = tmp_path / "results.jsonl"
    assert ask("--output", str(output)) == 2
    assert "error: prompt 2 of 3: too long" in capsys.readouterr().err
    refused = {"index": 1, "id": None, "prompt": "two", "model": "m", "error": "too long"}
    assert lines(output.read_text()) == [RESULTS[0], refused, RESULTS[2]]
    assert ask("--output", str(output)) == 0  # and only the second is asked again
    assert len(model.asked) == 4
    assert lines(output.read_text()) == [RESULTS[0], RESULTS[2], RESULTS[1]]


def test_ctrl_c_keeps_the_results_so_far(ask: Asked, model: Scripted, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    model.interrupt_after = 1
    assert ask("--output", str(output)) == 130
    assert output.read_bytes() == b""
    model.interrupt_after = None
    assert ask("--output", str(output)) == 0
    assert lines(output.read_text()) == RESULTS


def test_one_without_an_answer_is_exit_3(ask: Asked, model: Scripted) -> None:
    model.reply = Reply("hm", "", (), "length", None, USAGE)
    assert ask() == 3


@pytest.mark.parametrize("cut", [0, 1, 5, 100, len(json.dumps(RESULTS[0])) + 1, 900])
def test_a_run_that_was_killed_goes_on(
    ask: Asked, model: Scripted, tmp_path: Path, cut: int
) -> None:
    output = tmp_path / "results.jsonl"
    assert ask("--output", str(output)) == 0
    whole = output.read_bytes()
    output.write_bytes(whole[:cut])
    model.asked.clear()
    assert ask("--output", str(output)) == 0
    assert output.read_bytes() == whole
    model.loaded.clear()
    assert ask("--output", str(output)) == 0
    assert model.loaded == {}
    assert len(model.asked) == 3 - whole[:cut].count(b"\n")


@pytest.mark.parametrize(
    "content",
    [b"my notes", b"my notes\n", b"{}\n", b'{"index": 0}\n', b"null\n", b'{"index": 9, "model"\n'],
)
def test_a_file_of_something_else_is_left_alone(
    ask: Asked, model: Scripted, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes
) -> None:
    output = tmp_path / "notes"
    output.write_bytes(content)
    assert ask("--output", str(output)) == 2
    assert f"{output} holds something else" in capsys.readouterr().err
    assert (output.read_bytes(), model.loaded) == (content, {})


def test_results_of_another_model_are_left_alone(ask: Asked, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    assert ask("--output", str(output)) == 0
    whole = output.read_bytes()
    assert ask("--output", str(output), "--model", "other") == 2
    assert ask("--output", str(output), prompts=b'"another prompt"\n') == 2
    assert output.read_bytes() == whole


def test_results_go_to_the_target_of_a_link(ask: Asked, tmp_path: Path) -> None:
    output, link = tmp_path / "results.jsonl", tmp_path / "link"
    link.symlink_to(output)
    assert [ask("--output", str(link)), ask("--output", str(link))] == [0, 0]
    assert link.is_symlink()
    assert len(lines(output.read_text())) == len(RESULTS)


@pytest.mark.parametrize("flag", ["--output", "--prompts-file", "--system-prompt-file"])
def test_an_unknown_home_folder_is_told(
    ask: Asked, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    assert ask(flag, "~nobody-of-this-name/file") == 2
    assert "there is no home folder ~nobody-of-this-name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (b"", "has no prompts"),
        (b'"a"\n[1]\n', "line 2 of "),
        (b'"a"\nnot json', "is no prompt; write"),
        (b'{"prompt": ""}', "has an empty prompt"),
        (b'{"prompt": "a", "temperature": 1}', "has the key 'temperature'; known are prompt"),
        (b'{"prompt": "a", "system_prompt": 1}', "has a system_prompt that is no text"),
        (b'{"prompt": "\\ud800"}', "is no prompt"),
        (b"[" * 100_000, "is no prompt"),
        (b'"\xff"', "is no prompt"),
    ],
)
def test_prompts_that_are_none_are_refused_before_the_load(
    ask: Asked, model: Scripted, capsys: pytest.CaptureFixture[str], prompts: bytes, message: str
) -> None:
    assert ask(prompts=prompts) == 2
    assert message in capsys.readouterr().err
    assert model.loaded == {}
