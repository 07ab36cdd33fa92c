"""Commands of a conversation: its settings, its history, another model."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

import magistral_mlx as mm
from magistral_mlx import chat
from magistral_mlx.terminal.repl.commands import answer
from magistral_mlx.terminal.repl.lines import command_in, message_in, path_in
from magistral_mlx.terminal.repl.session import Session

QUESTION = "What is 48 + 76?"


def run(session: Session, *texts: str) -> None:
    for text in texts:
        answer(session, text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/budget 100", ("/budget", "100")),
        ("/system\nBe brief.", ("/system", "Be brief.")),
        ("/?", ("/?", "")),
        ("/", ("/", "")),
        ("/save! a b", ("/save!", "a b")),
        ("/etc/hosts is what?", None),
        ("/usr/bin", None),
        ("/* a comment */", None),
        ("/ 3 is what?", None),
        ("//etc/hosts", None),
        ("/3 of 9?", None),
        ("What is /budget?", None),
    ],
)
def test_a_command_is_told_from_a_path(text: str, expected: tuple[str, str] | None) -> None:
    assert command_in(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("//help me", "/help me"),
        ("///x", "//x"),
        ("// a comment", "// a comment"),
        ("//", "//"),
        ("/etc/hosts?", "/etc/hosts?"),
        ("one", "one"),
    ],
)
def test_two_slashes_are_sent_as_one(text: str, expected: str) -> None:
    assert message_in(text) == expected


def test_a_retry_that_is_refused_leaves_the_former_answer(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    run(session, "one", "two")
    before = list(session.chat.messages)
    session.sampling = replace(session.sampling, max_tokens=10**9)
    with pytest.raises(mm.ContextError):
        answer(session, "/retry")
    assert session.chat.messages == before
    assert session.unanswered is None
    assert "the former answer stays" in capsys.readouterr().err


def test_a_message_with_a_slash_reaches_the_model(session: Session) -> None:
    run(session, "//help me", "/etc/hosts?")
    asked = [m["content"] for m in session.chat.messages if m["role"] == "user"]
    assert asked == ["/help me", "/etc/hosts?"]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ('"a b.cache"', "a b.cache"),
        ("'a b.cache'", "a b.cache"),
        ("a b.cache", "a b.cache"),
        (r"a\ b.cache", "a b.cache"),
        ("it's.cache", "it's.cache"),
    ],
)
def test_a_path_may_be_in_quotes(text: str, path: str) -> None:
    assert path_in("/save", text) == Path(path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/sav x", "did you mean /save"),
        ("/HISTROY", "did you mean /history"),
        ("/xyzzy", "/help lists the commands. As a message, write it //xyzzy"),
        ("/", "no such command"),
        ("/save", "needs a file"),
        ("/save /", "no plain file"),
        ("/save ~nobody-of-this-name/x", "no home folder ~nobody-of-this-name"),
        ("/save a\0b", "use the path of a file"),
        ("/save \ud800", "use the path of a file"),
        ("/save /none/x", "could not be written"),
        ("/load /", "is no plain file"),
        ("/load /none/x", "no such prompt cache"),
        ("/load! ~nobody-of-this-name/x", "no home folder"),
        ("/budget " + "9" * 5000, "use a whole number, or off"),
        ("/budget ٣x", "use a whole number, or off"),
        ("/seed -1", "use a whole number, or off"),
        ("/seed " + "9" * 5000, "use a whole number, or off"),
        ("/temp hot", "use a number"),
        ("/temp nan", "temperature is nan"),
        ("/temp 1e999", "temperature is inf"),
        ("/top-p 0", "top_p is 0"),
        ("/undo", "no question yet"),
        ("/retry", "no question yet"),
        ("/copy", "no answer yet"),
        ("/history", "no turn yet"),
        ("/trace", "the last reply has none"),
        ("/undo it", "takes nothing after it"),
        ("/model demo", "is the model that is loaded"),
    ],
)
def test_what_cannot_be_done_is_refused(session: Session, line: str, says: str) -> None:
    with pytest.raises(mm.OptionError, match=says):
        answer(session, line)


def test_settings_of_the_next_replies(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    run(session, "/temp 0.25", "/top-p .5", "/seed 7", "/temp", "/seed", "/budget 1")
    assert session.sampling == mm.SamplingParams(
        temperature=0.25, top_p=0.5, max_tokens=2, seed=7, think_budget=1
    )
    run(session, "/seed off", "/temperature 0")
    assert (session.sampling.seed, session.sampling.temperature) == (None, 0)
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == ["the temperature is 0.25", "top-p is 0.5", "the seed is 7"]
    assert "traces have 1 token at most" in said
    assert said[-1] == "the temperature is 0, so replies are greedy"


def test_other_names_of_commands(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    run(session, "/?", "/clear", "/Bye")
    assert session.is_over
    said = capsys.readouterr().err
    assert "show this (also /?)" in said
    assert "end (also /bye, /exit)" in said


def test_undo_history_and_a_new_conversation(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    run(session, QUESTION, "What is 7 * 8?", "/undo")
    assert "removed: What is 7 * 8?\n" in capsys.readouterr().err
    run(session, "/history", "/stats")
    said = capsys.readouterr().err
    assert f"> {QUESTION}\nThe an" in said
    assert "7 * 8" not in said
    assert "conversation  1 turn; " in said
    assert "in 2 replies" in said
    session.trace = "8+6"
    run(session, "/reset", "/stats")
    assert "conversation  0 turns; " in capsys.readouterr().err
    with pytest.raises(mm.OptionError, match="the last reply has none"):
        answer(session, "/trace")


def test_a_question_without_an_answer_is_what_undo_removes(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    run(session, QUESTION)
    session.unanswered = "What is"
    run(session, "/undo")
    assert "removed: What is\n" in capsys.readouterr().err
    assert session.turns == 1


def test_another_model_goes_on_and_the_first_is_freed(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    first = mm.load("demo")
    freed = weakref.ref(first)
    session = Session(session.models, first, first.chat(), session.sampling)
    second = session.models.open("demo")
    del first
    run(session, QUESTION)

    def open_model(name: str) -> mm.Magistral:
        gc.collect()
        assert freed() is None
        return second

    session.models.open = open_model
    run(session, "/model other", "/model", "What is 7 * 8?")
    assert session.magistral is session.chat.magistral is second
    assert session.turns == 2
    assert "the model is other" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_leaves_the_one_before(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    run(session, QUESTION)
    loaded = session.magistral

    def refuse(name: str) -> None:
        raise mm.CheckpointError(f"{name}: no such folder")

    def damaged(name: str) -> mm.Magistral:
        if name == "other":
            raise mm.CheckpointError("a tensor is cut short")
        return loaded

    session.models.check = refuse
    with pytest.raises(mm.CheckpointError, match="no such folder"):
        answer(session, "/model other")
    session.models.check, session.models.open = (lambda name: None), damaged
    with pytest.raises(mm.CheckpointError, match="cut short"):
        answer(session, "/model other")
    assert "other is not loaded; demo is loaded again" in capsys.readouterr().err
    run(session, "What is 7 * 8?")
    assert (session.turns, session.models.name) == (2, "demo")


def test_a_conversation_without_a_model_is_shown_before_it_ends(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session.chat.messages += [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "It is 124."},
    ]
    session.file = file = tmp_path / "talk"
    loaded = session.magistral

    def gone(name: str) -> mm.Magistral:
        raise mm.CheckpointError("the drive is gone")

    session.models.open = gone
    with pytest.raises(mm.CheckpointError, match="the drive is gone"):
        answer(session, "/model other")
    session.save_at_end()
    assert session.is_over
    said = capsys.readouterr().err
    assert f"the conversation ends. It was:\n> {QUESTION}\nIt is 124.\n" in said
    assert loaded.resume(file).messages == session.chat.messages


def test_a_bug_ends_no_conversation(
    monkeypatch: pytest.MonkeyPatch, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(session: Session, text: str) -> None:
        if text == "fail":
            raise RuntimeError("\x1b]0;x")
        answer(session, text)

    monkeypatch.setattr(chat, "answer", fail)
    monkeypatch.setattr(chat, "read_terminal", lambda *_: iter(["fail", "/quit"]))
    chat.answer_terminal(session)
    said = capsys.readouterr().err
    assert r"error: RuntimeError: \x1b]0;x. This is a bug; the conversation goes on" in said
    assert session.is_over
