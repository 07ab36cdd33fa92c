"""What a reply looks like on a terminal, and that nothing the model says can command it."""

import io
import re
import sys
from collections.abc import Generator

import pytest

from magistral_mlx.display import Display, report, show_status
from magistral_mlx.reasoning import Segment
from magistral_mlx.reply import Reply, Usage

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
SEGMENTS = [
    Segment("progress", "16/20"),
    Segment("reasoning", "8+6"),
    Segment("reasoning", "=14"),
    Segment("answer", "It is "),
    Segment("answer", "124."),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What is seen in the end: a line holds what came after its last erasure; colours left out."""
        plain = re.sub(r"\x1b\[\d*m", "", self.getvalue())
        return [line.rpartition("\r\x1b[K")[2] for line in plain.split("\n")]


def make_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """One terminal that shows both streams. Not a fixture: pytest sets the streams again before the test."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    both = Terminal()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)
    return both


def stream(segments: list[Segment], *, is_interrupted: bool = False) -> Generator[Segment, None, Reply]:
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
    monkeypatch: pytest.MonkeyPatch, hides_reasoning: bool, hides_answer: bool, seen: list[str], is_interrupted: bool
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
    assert terminal.lines() == [[""], ["8+6", ""], ["8+6=14", ""], ["8+6=14", "", "It is ", ""]][count - 1]


def test_a_hidden_trace_shows_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    Display(hides_reasoning=True).show_all(stream(SEGMENTS[:3]))
    assert "reasoning: 6 characters" in terminal.getvalue()
    assert terminal.lines() == [""]


def test_nothing_a_terminal_would_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    evil = "a\x1b]0;b\x07\u202ec"
    segments = [Segment("reasoning", evil), Segment("answer", evil)]
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
    show_status("loading " + "x" * 100)
    assert terminal.lines() == ["loading xxxxxxxxxxx"]


def test_without_a_terminal_there_is_no_status(capsys: pytest.CaptureFixture[str]) -> None:
    show_status("loading")
    assert capsys.readouterr() == ("", "")


def test_a_rate_that_cannot_be_told_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    report(Reply("", "", (), "length", None, USAGE), "seed 7: ")
    assert capsys.readouterr().err == (
        "seed 7: ended by length; prompt 20 tokens, -; reply 1 tokens (0 reasoning), -; "
        "first token after 0.00 s; peak memory 1.00 GB\n"
    )
