"""The command line on a scripted model: its outputs, its refusals and its exit codes."""

import io
import json
import re
import sys
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from magistral_mlx import generate
from magistral_mlx.errors import HubError
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import Reply
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.streams import Progress, streamed
from magistral_mlx.terminal import shared_flags
from magistral_mlx.terminal.asking.results import as_object
from magistral_mlx.tokenizer.segments import Text
from tests.support.terminal.scripted import REPLY, USAGE, Scripted, run


def pipe_in(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_pipe_gets_the_answer_and_nothing_else(
    model: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    out, err = capsys.readouterr()
    assert out == "It is 124.\n"
    assert err == (
        "8+6=14\n\n"
        "prompt 20 tokens (4 cached), 32.0 tok/s; reply 11 tokens (6 reasoning), 5.0 tok/s; "
        "first token after 0.50 s; peak memory 1.50 GB; seed 7\n"
    )


def test_the_trace_can_be_hidden(model: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--hide-reasoning") == 0
    out, err = capsys.readouterr()
    assert out == "It is 124.\n"
    assert err.startswith("prompt 20 tokens")


def test_a_reply_cut_short_says_so(model: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    model.segments, model.reply = (
        [Text("reasoning", "hm")],
        Reply("hm", "", (), "length", None, USAGE),
    )
    assert run() == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("hm\nprompt 20 tokens")
    mend = "cut off at --max-tokens (99); there is no answer; raise --max-tokens"
    assert f"\nerror: {mend}" in err
    assert run("--json") == 3
    assert json.loads(capsys.readouterr().out)["answer"] == ""
    assert run("-q") == 3
    assert capsys.readouterr().err.startswith(f"error: {mend}")


def test_json_is_one_object_with_these_keys(
    model: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "reasoning": "8+6=14",
        "answer": "It is 124.",
        "finish_reason": "stop",
        "reasoning_closed_by": "model",
        "prompt_tokens": 20,
        "completion_tokens": 11,
        "reasoning_tokens": 6,
        "cached_tokens": 4,
        "forward_passes": 12,
        "prefill_seconds": 0.5,
        "decode_seconds": 2.0,
        "peak_memory_bytes": 1_500_000_000,
        "seed": 7,
        "model": "m",
    }


def test_samples(model: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--samples", "3") == 0
    out, err = capsys.readouterr()
    assert out == "It is 124.\n"
    assert err == (
        "3 of 3: 124\nprompt 20 tokens; 3 replies of 33 tokens in all (18 reasoning), "
        "15.0 tok/s; peak memory 1.50 GB; seeds 7 to 7\n"
    )
    assert run("--samples", "3", "-v") == 0
    assert capsys.readouterr().err.startswith("seed 7: 124; 11 tokens\n" * 3)
    assert run("--samples", "3", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"replies", "majority", "votes", "forward_passes"}
    assert [set(reply) for reply in printed["replies"]] == [{*as_object(REPLY, "m")}] * 3


def test_flags_reach_the_library(model: Scripted) -> None:
    flags = (
        "--temperature 0.1 --top-p 0.5 -m 9 --seed 3 --stop a --stop b --think-budget 5 "
        "--max-kv-size 512 --kv-bits 8 --prefill-step-size 64 --memory-gb 1.5 --wired "
        "--revision r --tokenizer t --system-prompt S --system-prompt-only --draft-model d "
        "--num-draft-tokens 3 --reasoning-format text --think-budget-message Enough. "
        "--prompt-cache-file f"
    )
    assert run(*flags.split()) == 0
    planned = {
        "max_kv_size": 512,
        "kv_bits": 8,
        "prefill_step_size": 64,
        "memory_gb": 1.5,
        "wired": True,
    }
    planned |= {"draft_model": "d", "num_draft_tokens": 3, "reasoning_format": "text"}
    assert model.loaded == {"model": "m", "revision": "r", "tokenizer": "t"} | planned
    messages, sampling, options = model.asked[0]
    assert [m["role"] for m in messages] == ["system", "user"]
    assert sampling == SamplingParams(
        temperature=0.1,
        top_p=0.5,
        max_tokens=9,
        seed=3,
        stop=("a", "b"),
        think_budget=5,
        think_budget_message="Enough.",
    )
    assert options == {"system_prompt_only": True, "prompt_cache_file": Path("f")}


def test_the_defaults_are_the_model_cards(model: Scripted) -> None:
    assert run() == 0
    assert model.asked[0][1] == SamplingParams()
    assert run("--no-think") == 0
    assert model.asked[1][1].think_budget == 0


@pytest.mark.parametrize("flags", [(), ("--no-think",), ("--think-budget", "0")])
def test_a_last_line_without_a_budget_is_refused(
    model: Scripted, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    assert run("--think-budget-message", "Enough.", *flags) == 2
    assert "give both" in capsys.readouterr().err
    assert model.asked == []


def test_replacing_the_system_prompt_is_warned_about(
    model: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--system-prompt", "Be brief.", "--system-prompt-only")
    assert "may not reason" in capsys.readouterr().err


def test_a_prompt_from_a_pipe(
    model: Scripted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in(monkeypatch, "Combien font 2 + 2 ? Évidemment…\n".encode())
    assert generate.main(["--model", "m", "-p", "-"]) == 0
    assert model.asked[0][0][0]["content"] == "Combien font 2 + 2 ? Évidemment…"
    pipe_in(monkeypatch, "Où ?".encode("latin-1"))
    assert generate.main(["--model", "m", "-p", "-"]) == 2
    assert "not UTF-8" in capsys.readouterr().err
    for empty in (b"", b" \n\n"):
        pipe_in(monkeypatch, empty)
        assert generate.main(["--model", "m", "-p", "-"]) == 2
        assert "the prompt is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temp", "-1"], "--temperature is -1"),
        (["--temp", "nan"], "--temperature is nan"),
        (["--top-p", "0"], "--top-p is 0"),
        (["--top-p", "1.1"], "--top-p is 1.1"),
        (["-m", "0"], "--max-tokens is 0"),
        (["--samples", "0"], "--samples"),
        (["--prompt", ""], "prompt is empty"),
        (["--no-think", "--think-budget", "3"], "keep one"),
        (["--stop", ""], "--stop is"),
        (["--prompt-cache-file", "no/such/folder/f"], "no folder"),
        (["--prompt-cache-file", "/"], "is a directory"),
        (["--system-prompt", "a", "--system-prompt-file", "b"], "keep one"),
        (["--json", "--json-stream"], "keep one"),
        (["--output", "f"], "--output is for the results of --prompts-file"),
        (["--prompts-file", "f"], "leave --prompt out"),
        (["-q", "-v"], "keep one"),
        (["--system-prompt-only"], "needs a --system-prompt"),
        (["--seed", "x"], "--seed"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_user_errors_are_exit_2(
    model: Scripted, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""
    assert model.loaded == {}


def test_every_flag_of_mlx_lm_is_ours_or_refused_with_a_reason() -> None:
    package = find_spec("mlx_lm")
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).with_name("generate.py").read_text()
    theirs = set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', source))
    ours = {name for param in generate.command.params for name in param.opts}
    assert "--min-p" in theirs
    assert theirs <= ours | set(shared_flags.MLX_LM_FLAGS)
    assert not ours & set(shared_flags.MLX_LM_FLAGS)


@pytest.mark.parametrize("flag", shared_flags.MLX_LM_FLAGS)
def test_flags_of_mlx_lm_are_refused_with_ours(
    model: Scripted, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    assert run(flag, "1") == 2
    assert f"{flag} is another program's: " in capsys.readouterr().err


def test_without_a_model_there_are_three_ways(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["-p", "hi"], ["-p", "-"], []):  # said before stdin is read
        assert generate.main(arguments) == 2
        err = capsys.readouterr().err
        assert all(
            way in err for way in ("MLX-4bit", "magistral convert --hf-path", "--model demo")
        )


def test_errors_of_the_library_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loading(model: str, options: LoadOptions) -> Iterator[None]:
        raise HubError("no network; name a folder")

    monkeypatch.setattr(shared_flags, "loading", loading)
    assert run() == 2
    assert capsys.readouterr().err == "error: no network; name a folder\n"


def test_ctrl_c_shows_the_partial_reply(
    model: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    model.interrupt_after = 4
    assert run() == 130
    assert capsys.readouterr().out == "It is \n"
    assert model.is_closed
    assert run("--json") == 130
    printed = json.loads(capsys.readouterr().out)
    assert (printed["reasoning"], printed["answer"]) == ("8+6=14", "It is ")
    assert (printed["finish_reason"], printed["seed"]) == ("cancelled", None)
    assert set(printed) == set(as_object(REPLY, "m"))


@pytest.mark.parametrize("finished", [0, 2])
def test_ctrl_c_during_samples_keeps_those_that_are_there(
    model: Scripted, capsys: pytest.CaptureFixture[str], finished: int
) -> None:
    model.interrupt_after = finished
    assert run("--samples", "3") == 130
    assert capsys.readouterr().out == ("It is 124.\n" if finished else "")
    assert run("--samples", "3", "--json") == 130
    printed = json.loads(capsys.readouterr().out)
    assert printed["finish_reason"] == "cancelled"
    assert (len(printed["replies"]), printed["votes"]) == (
        finished,
        {"124": finished} if finished else {},
    )


def test_a_terminal_of_few_letters_is_no_bug(
    model: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.segments = [Text("answer", "Évidemment")]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written := io.BytesIO(), "ascii"))
    assert run() == 0
    assert written.getvalue() == b"\\xc9videmment\n"


def test_ctrl_c_while_loading(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @streamed
    def loading(model: str, options: LoadOptions) -> Generator[Progress, None, None]:
        yield Progress(1, 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(shared_flags, "loading", loading)
    assert run() == 130
    assert capsys.readouterr().out == ""


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_flags, "loading", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # Python then exits with 1 and a traceback
        run()


def test_the_embedded_model_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--model", "demo", "-p", "What is 48 + 76?", "--temp", "0"]) == 0
    out, err = capsys.readouterr()
    assert "124" in out
    assert "think>" not in out + err
    assert "tok/s" in err
