"""The conversation at the prompt: commands, Ctrl-C, files."""

import io
import itertools
import os
import pty
import re
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import magistral_mlx as mm
from magistral_mlx import chat
from magistral_mlx.terminal.display import Display
from magistral_mlx.terminal.repl.commands import COMMANDS
from magistral_mlx.tokenizer.segments import Segment
from tests.support.tiny import DEMO

TypeIn = Callable[..., None]
GREEDY = ["--model", str(DEMO), "--temp", "0"]


def pipe_in(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch) -> TypeIn:
    """Return ``type_in(*lines)``, which types lines and Ctrl-D; see test_prompt.py for editing."""

    def type_lines(*lines: str) -> None:
        monkeypatch.setattr(chat, "is_interactive", lambda: True)
        monkeypatch.setattr(chat, "read_terminal", lambda history, commands: iter(lines))

    return type_lines


def test_each_line_of_a_pipe_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in(monkeypatch, "What is 48 + 76?\n\nWhat is 7 * 8?\n")
    assert chat.main([*GREEDY, "--hide-reasoning"]) == 0
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert "124" in first
    assert "56" in second
    assert err.count("tok/s") == 4
    assert "(0 cached)" not in err
    assert " cached)" in err.splitlines()[1]


def test_commands_and_messages_of_several_lines_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in(monkeypatch, "/think off\nWhat is \\\n48 + 76?\n/stats\n/quit\nnever read")
    assert chat.main(GREEDY) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert "budget 0 tokens" in err
    assert "conversation  1 turn;" in err


def test_a_full_context_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in(monkeypatch, "/think off\n" + "What is 48 + 76?\n" * 6)
    assert chat.main([*GREEDY, "--max-kv-size", "420"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 6
    said = re.findall(
        r"the context of 420 is full: the oldest turns are left out from here on, (\d) of (\d)", err
    )
    assert said
    assert re.search(rf"; {said[-1][0]} oldest turns? left out; seed", err)


def test_a_line_that_is_not_utf_8(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in(monkeypatch, b"What is 1 + 1?\nO\xf9 ?\n")
    assert chat.main(GREEDY) == 2
    out, err = capsys.readouterr()
    assert "2" in out
    assert "line 2 of stdin is not UTF-8" in err


def prompts(err: str) -> list[str]:
    """Return the lengths of the prompts, from the lines of figures."""
    return [line.split()[1] for line in err.splitlines() if line.startswith("prompt ")]


def test_a_new_conversation(type_in: TypeIn, capsys: pytest.CaptureFixture[str]) -> None:
    type_in("What is 48 + 76?", "/reset", "What is 7 * 8?", "/quit", "never read")
    assert chat.main(GREEDY) == 0
    out, err = capsys.readouterr()
    assert "124" in out
    type_in("What is 7 * 8?")  # Ctrl-D
    assert chat.main(GREEDY) == 0
    assert prompts(err)[1:] == prompts(capsys.readouterr().err)


def test_every_command_is_in_the_help_and_understood_or_refused(
    type_in: TypeIn, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(
        "/help",
        "/hello\nthere",
        "/help me",
        *(command for command in COMMANDS if command != "/quit"),
    )
    assert chat.main(GREEDY) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert all(err.count(f"\n{command} ") == 2 or command == "/retry" for command in COMMANDS)
    assert "error: /hello: no such command; did you mean /help?" in err
    assert "error: /help takes nothing after it" in err
    assert "error: /retry: there is no question yet" in err
    assert "error: /save needs a file" in err
    assert "error: /trace: the last reply has none" in err


@pytest.mark.parametrize(
    "line", ["/budget -1", "/budget x", "/think maybe", "/fold 1", "/markdown no", "/save /none/x"]
)
def test_wrong_commands_are_refused(
    type_in: TypeIn, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    type_in(line)
    assert chat.main(GREEDY) == 0
    assert "error: " in capsys.readouterr().err


def test_budget_and_thinking(type_in: TypeIn, capsys: pytest.CaptureFixture[str]) -> None:
    question = "What is 48 + 76?"
    type_in(
        "/budget 10",
        question,
        "/reset",
        "/think off",
        question,
        "/reset",
        "/think on",
        "/budget",
        "/budget off",
        question,
        "/trace",
    )
    assert chat.main(GREEDY) == 0
    err = capsys.readouterr().err
    assert "traces have 10 tokens at most" in err
    assert "the model answers at once" in err
    assert (
        "the model thinks before it answers\n\n"
        "traces have 10 tokens at most\n\nthe model sets the length" in err
    )
    short, none, free = (int(reasoning) for reasoning in re.findall(r"\((\d+) reasoning\)", err))
    assert none == 0 < short < free
    assert err.count("8+6=14: 4 carry 1") == 2  # the trace, and the trace shown again


@pytest.mark.slow
def test_a_question_asked_again(type_in: TypeIn, capsys: pytest.CaptureFixture[str]) -> None:
    """The new turn replaces the old one, and a given seed is increased by one."""
    type_in("What is 48 + 76?", "/retry", "/stats")
    assert chat.main(["--model", str(DEMO), "--seed", "5", "--temp", "2"]) == 0
    out, err = capsys.readouterr()
    assert len(set(prompts(err))) == 1
    assert "conversation  1 turn;" in err
    magistral = mm.load(str(DEMO))
    expected = [
        magistral.ask("What is 48 + 76?", mm.SamplingParams(temperature=2, seed=5 + i)).answer
        for i in range(2)
    ]
    assert out == "".join(f"{answer}\n" for answer in expected)


def test_a_system_prompt_of_ones_own(type_in: TypeIn, capsys: pytest.CaptureFixture[str]) -> None:
    question = "What is 7 * 8?"
    type_in("/system", question, "/system Be brief.", "/retry", "/system", "/system off", "/retry")
    assert chat.main(GREEDY) == 0
    out, err = capsys.readouterr()
    plain, own, again = map(int, prompts(err))
    assert again == plain < own
    assert err.count("added to the model's own: Be brief.") == 2
    assert err.count("only the model's own") == 2
    assert len(out.splitlines()) == 3


@pytest.mark.slow
def test_saved_in_the_middle(
    type_in: TypeIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.cache"
    type_in("What is 48 + 76?", f"/save {file}", "/quit")
    assert chat.main(GREEDY) == 0
    assert f"--prompt-cache-file {file} goes on from it" in capsys.readouterr().err
    type_in("What is 7 * 8?", "/stats")
    assert chat.main([*GREEDY, "--prompt-cache-file", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "56" in out
    assert "conversation  2 turns; traces kept: none" in err


def interrupt_at(
    monkeypatch: pytest.MonkeyPatch, kind: str, count: int, act: Callable[[], None]
) -> None:
    """Call ``act`` once, after the given number of segments of a kind."""
    shown, seen = Display.show, itertools.count(1)

    def show(self: Display, segment: Segment) -> None:
        shown(self, segment)
        if getattr(segment, "kind", "progress") == kind and next(seen) == count:
            act()

    monkeypatch.setattr(Display, "show", show)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_terminal_that_closes_leaves_the_conversation_saved(
    number: int,
    type_in: TypeIn,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def close() -> None:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    arguments = [
        *GREEDY,
        "--think-budget",
        "0",
        "--prompt-cache-file",
        str(tmp_path / "talk.cache"),
    ]
    interrupt_at(monkeypatch, "answer", 12, close)
    type_in("What is 48 + 76?", "What is 7 * 8?", "What is 9 * 8?", "What is 905 - 388?")
    with pytest.raises(SystemExit) as ended:
        chat.main(arguments)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert (turns := len(capsys.readouterr().out.splitlines()) - 1) > 0
    type_in("/stats")
    assert chat.main(arguments) == 0
    assert f"conversation  {turns} turn" in capsys.readouterr().err


def test_ctrl_c_in_the_trace_drops_the_question_and_retry_asks_it(
    type_in: TypeIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(monkeypatch, "reasoning", 3, press_ctrl_c)
    type_in(
        "How many r's are in strawberry?",
        "/stats",
        "What is 48 + 76?",
        "/stats",
        "/retry",
        "/stats",
    )
    assert chat.main(GREEDY) == 0
    out, err = capsys.readouterr()
    assert out.count("124") == 2
    assert "stopped by you; prompt" in err
    assert "stopped before an answer: the question is dropped; /retry asks it again" in err
    assert re.findall(r"conversation  (\d)", err) == ["0", "1", "1"]


def test_ctrl_c_in_the_answer_keeps_the_partial_answer(
    type_in: TypeIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(monkeypatch, "answer", 2, press_ctrl_c)
    type_in("What is 48 + 76?", "/stats", "/retry", "/stats")
    assert chat.main(GREEDY) == 0
    out, err = capsys.readouterr()
    cut, whole = out.splitlines()
    assert whole.startswith(cut) and len(cut) < len(whole)  # noqa: PT018
    assert "stopped before an answer" not in err
    assert re.findall(r"conversation  (\d)", err) == ["1", "1"]


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_the_model(
    type_in: TypeIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(monkeypatch, "answer", 2, lambda: (press_ctrl_c(), press_ctrl_c()))  # type: ignore[arg-type,return-value]
    type_in("How many r's are in strawberry?", "What is 48 + 76?", "/stats")
    assert chat.main(GREEDY) == 0
    out, err = capsys.readouterr()
    assert "stopped before an answer" in err
    assert "124" in out
    assert "conversation  1" in err


def test_a_real_terminal_and_a_real_ctrl_c(tmp_path: Path) -> None:
    """In its own process, an endless reply of random ids is stopped, and the program continues."""
    pytest.importorskip("prompt_toolkit", reason="a new dependency, not yet installed here")
    command = [
        sys.executable,
        "-m",
        "magistral_mlx.chat",
        "--model",
        str(DEMO),
        "--temp",
        "9",
        "--top-p",
        "1",
    ]
    process, terminal = pty.fork()
    if not process:
        os.environ |= {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        os.environ |= {
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "MAGISTRAL_MLX_STATE": str(tmp_path),
        }  # nobody answers where it is
        os.execv(sys.executable, command)
    seen = ""

    def wait_for(text: str) -> None:
        nonlocal seen
        while text not in seen:
            assert select.select([terminal], [], [], 20)[0], (
                f"{text!r} does not come after {seen!r}"
            )
            seen += os.read(terminal, 10_000).decode(errors="replace")
        seen = seen.partition(text)[2]

    try:
        wait_for("\x1b[?2004h")  # the prompt
        os.write(terminal, b"go on\r")
        for _ in range(3):
            wait_for("\x1b[K\r\n")  # a line of the answer
        os.write(terminal, b"\x03")
        wait_for("stopped by you")
        wait_for("\x1b[?2004h")  # the prompt
        os.write(terminal, b"/stats\r")
        wait_for("conversation  1 turn;")
        wait_for("\x1b[?2004h")  # the prompt
        os.write(terminal, b"\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    except BaseException:
        os.kill(process, signal.SIGKILL)
        raise
    finally:
        os.close(terminal)
    assert (tmp_path / "chat-history").read_text().count("+") == 2


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


def test_a_pipe_drops_no_message_silently(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in(monkeypatch, "/usr is what?\nWhat is 7 * 8?\n")
    assert chat.main(GREEDY) == 2
    out, err = capsys.readouterr()
    assert "/usr: no such command; /help lists the commands. As a message, write it //usr" in err
    assert out == ""


def test_an_error_ends_the_turn_at_a_terminal_and_the_program_in_a_pipe(
    type_in: TypeIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    too_long = "1 + 1 " * 3000
    type_in(too_long, "What is 48 + 76?")
    assert chat.main(GREEDY) == 0
    out, err = capsys.readouterr()
    assert "error: the prompt " in err
    assert "124" in out
    monkeypatch.setattr(chat, "is_interactive", lambda: False)
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
    assert (
        chat.main([*GREEDY, *file, "--keep-reasoning", "all", "--system-prompt", "Be brief."]) == 0
    )
    capsys.readouterr()
    pipe_in(monkeypatch, "What is 7 * 8?")
    assert chat.main([*GREEDY, *file]) == 0
    out, err = capsys.readouterr()
    assert "56" in out
    assert " cached)" in err
    pipe_in(monkeypatch, "What is 7 * 8?")
    assert chat.main([*GREEDY, *file, "--system-prompt", "Be long."]) == 2
    assert "leave --system-prompt out" in capsys.readouterr().err
