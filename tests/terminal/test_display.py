"""A reply on a terminal: its look, and that no text of the model controls the terminal."""

import io
import re
import sys
from collections.abc import Callable, Generator
from dataclasses import replace
from itertools import count
from threading import Event

import click
import pytest

from magistral_mlx.generation.reply import Reply, Usage
from magistral_mlx.streams import Progress, streamed
from magistral_mlx.terminal import verbosity
from magistral_mlx.terminal.display import Display, figures, report, tell
from magistral_mlx.terminal.verbosity import Status
from magistral_mlx.terminal.window import TraceWindow
from magistral_mlx.tokenizer.segments import Segment, Text
from tests.support.screen import Screen
from tests.support.terminal.scripted import SEGMENTS

USAGE = Usage(
    prompt_tokens=20,
    completion_tokens=1,
    reasoning_tokens=0,
    cached_tokens=0,
    forward_passes=1,
    prefill_seconds=0.0,
    decode_seconds=0.0,
    peak_memory_bytes=10**9,
    max_tokens=1,
    seed=7,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """Return the lines as seen at the end: after their last erasure, without colours."""
        plain = re.sub(r"\x1b\[\d*m", "", self.getvalue())
        return [line.rpartition("\r\x1b[K")[2] for line in plain.split("\n")]


def make_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make one terminal for both streams; no fixture, because pytest resets the streams."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    both = Terminal()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)
    return both


@streamed
def stream(
    segments: list[Segment], *, is_interrupted: bool = False
) -> Generator[Segment, None, Reply]:
    yield from segments
    if is_interrupted:
        raise KeyboardInterrupt
    return Reply("", "", (), "stop", None, USAGE)


@pytest.mark.parametrize("is_interrupted", [False, True])
@pytest.mark.parametrize(
    ("hides_reasoning", "hides_answer", "seen"),
    [
        (False, False, ["8+6=14", "", "It is 124.", ""]),
        (True, False, ["It is 124.", ""]),
        (True, True, [""]),
    ],
)
def test_the_reply_stays_and_no_status_does(
    monkeypatch: pytest.MonkeyPatch,
    hides_reasoning: bool,
    hides_answer: bool,
    seen: list[str],
    is_interrupted: bool,
) -> None:
    terminal = make_terminal(monkeypatch)
    display = Display(hides_reasoning=hides_reasoning, hides_answer=hides_answer)
    reply = display.show_all(stream(SEGMENTS, is_interrupted=is_interrupted))
    assert (reply is None) == is_interrupted
    assert terminal.lines() == seen
    assert "reading the prompt: 16/20 tokens" in terminal.getvalue()
    assert (display.reasoning, display.answer) == ("8+6=14", "It is 124.")


@pytest.mark.parametrize("count", range(1, len(SEGMENTS)))
def test_a_reply_cut_anywhere_ends_its_line(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    terminal = make_terminal(monkeypatch)
    Display().show_all(stream(SEGMENTS[:count]))
    assert (
        terminal.lines()
        == [[""], ["8+6", ""], ["8+6=14", ""], ["8+6=14", "", "It is ", ""]][count - 1]
    )


def test_a_hidden_trace_shows_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    Display(hides_reasoning=True).show_all(stream(SEGMENTS[:3]))
    assert "reasoning: 6 characters" in terminal.getvalue()
    assert terminal.lines() == [""]


def test_nothing_a_terminal_would_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    evil = "a\x1b]0;b\x07\u202ec"
    segments = [Text("reasoning", evil), Text("answer", evil)]
    Display().show_all(stream(segments))
    shown = "a\\x1b]0;b\\x07\\u202ec"
    assert terminal.getvalue() == f"\x1b[2m{shown}\x1b[22m\n\n{shown}\n"
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.truncate(terminal.seek(0))
    Display().show_all(stream(segments))
    assert terminal.getvalue() == f"{shown}\n\n{shown}\n"
    monkeypatch.setattr(sys, "stdout", plain := io.StringIO())
    Display().show_all(stream(segments))
    assert plain.getvalue() == evil + "\n"


def test_a_status_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "20")
    Status().show("loading " + "x" * 100)
    assert terminal.lines() == ["loading xxxxxxxxxxx"]


@pytest.mark.parametrize("term", [None, "dumb"])
def test_a_log_gets_a_line_of_status_every_30_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], term: str | None
) -> None:
    """A pipe and a terminal that cannot draw get lines; nothing is written to remove them."""
    if term is not None:
        terminal = make_terminal(monkeypatch)
        monkeypatch.setenv("TERM", term)
    now = 0.0
    status = Status(clock=lambda: now)
    for second in range(75):
        now = float(second)
        status.show(f"done {second}\x1b")
    status.clear()
    written = capsys.readouterr().err if term is None else terminal.getvalue()
    assert written == "done 30\\x1b\ndone 60\\x1b\n"


def test_a_rate_that_cannot_be_told_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    report(Reply("", "", (), "length", None, USAGE))
    assert capsys.readouterr().err == (
        "cut off at --max-tokens (1); prompt 20 tokens, -; reply 1 token (0 reasoning), -; "
        "first token after 0.00 s; peak memory 1.00 GB; seed 7\n"
    )


def test_work_that_says_nothing_has_a_status_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    monkeypatch.setattr(verbosity, "BETWEEN_LOOKS", 0.0)
    seen, looks = Event(), count(1)

    def text() -> str:
        if (look := next(looks)) == 3:
            seen.set()
        return f"look {look}"

    with verbosity.ticking(text):
        assert seen.wait(timeout=60)
    assert "look 1\r\x1b[Klook 2" in terminal.getvalue()
    assert terminal.lines() == [""]


@pytest.mark.parametrize("is_quiet", [False, True])
def test_work_that_is_waited_for_is_said_in_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_quiet: bool
) -> None:
    monkeypatch.setattr(verbosity, "BETWEEN_LOOKS", 0.0)
    seen, seconds = Event(), count(step=10)

    def clock() -> float:
        if (now := next(seconds)) >= 200:
            seen.set()
        return now

    with click.Context(click.Command("pull")) as ctx:
        ctx.meta[verbosity.QUIET] = is_quiet
        with verbosity.waiting("fetching org/name", clock):
            assert seen.wait(timeout=60)
    said = capsys.readouterr().err.splitlines()
    assert all(re.fullmatch(r"fetching org/name, [\d:]+ so far", line) for line in said)
    assert (len(said) > 1) == (not is_quiet)


def test_one_turn_is_singular() -> None:
    assert "; 1 oldest turn left out" in figures(replace(USAGE, dropped_turns=1))
    assert "; 2 oldest turns left out" in figures(replace(USAGE, dropped_turns=2))


TRACE = "".join(f"Step {i}: {'x' * i}\n" for i in range(40))


def show_on_screen(
    monkeypatch: pytest.MonkeyPatch, segments: list[Segment], *, is_interrupted: bool = False
) -> Screen:
    for name, value in (("TERM", "xterm"), ("COLUMNS", "31"), ("LINES", "10")):
        monkeypatch.setenv(name, value)
    screen = Screen(31, 10)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    Display(folds=True, renders=True).show_all(stream(segments, is_interrupted=is_interrupted))
    return screen


@pytest.mark.parametrize("size", [1, 50, 10_000])
@pytest.mark.parametrize("is_interrupted", [False, True])
def test_a_folded_trace_leaves_one_line_and_an_answer_is_laid_out(
    monkeypatch: pytest.MonkeyPatch, size: int, is_interrupted: bool
) -> None:
    monkeypatch.setattr(TraceWindow, "push", undelayed(TraceWindow.push))
    monkeypatch.setattr(TraceWindow, "_seconds", lambda self: 3.21)
    pieces = [Text("reasoning", TRACE[i : i + size]) for i in range(0, len(TRACE), size)]
    segments = [Progress(1, 2), *pieces, Text("answer", "It is **1"), Text("answer", "24**.")]
    screen = show_on_screen(monkeypatch, segments, is_interrupted=is_interrupted)
    folded = f"▸ thought for 3.2 s, {len(TRACE):,} characters; /trace shows them"
    assert screen.rows == [folded[:30], folded[30:], "It is 124.", ""]
    assert "Step 39" in screen.text
    assert ("Step 2: xx" in screen.text) == (size < 10_000)  # it was seen while it came


def undelayed(push: Callable[[TraceWindow, str], None]) -> Callable[[TraceWindow, str], None]:
    def wrapped(window: TraceWindow, text: str) -> None:
        window._window._next = 0.0
        push(window, text)

    return wrapped


def test_a_trace_without_an_answer_is_folded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        len(show_on_screen(monkeypatch, [Text("reasoning", TRACE)], is_interrupted=True).rows) == 3
    )


def test_a_folded_trace_commands_no_terminal_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """The screen refuses control sequences."""
    evil = "a\x1b]0;b\x07\x1b[2J\u202ec\t\rd日本語" * 9
    screen = show_on_screen(monkeypatch, [Text("reasoning", evil), Text("answer", evil)])
    assert "\\x1b]0;b" in screen.text


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_move_its_cursor_gets_plain_text(
    monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    terminal = make_terminal(monkeypatch)
    monkeypatch.setenv("TERM", term)
    Display(folds=True, renders=True).show_all(stream(SEGMENTS))
    assert terminal.getvalue() == "8+6=14\n\nIt is 124.\n"


def test_a_pipe_gets_the_model_s_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Display(folds=True, renders=True).show_all(
        stream([Text("reasoning", "**r**"), Text("answer", "**a**")])
    )
    assert capsys.readouterr() == ("**a**\n", "**r**\n\n")


def test_messages_are_wrapped_between_words_only_at_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "16")
    text = "/fold on|off  whether one\n\n  two\x1b"
    tell(text)
    assert capsys.readouterr().err == text + "\n"
    terminal = make_terminal(monkeypatch)
    tell(text)
    assert terminal.lines() == ["/fold on|off", "whether one", "", "  two\\x1b", ""]
