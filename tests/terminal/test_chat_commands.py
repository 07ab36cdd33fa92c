"""Commands of a conversation: its files, its settings, its history, another model."""

import base64
import gc
import stat
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

import magistral_mlx as mm
from magistral_mlx import chat
from magistral_mlx.terminal.repl import clipboard
from magistral_mlx.terminal.repl.commands import answer
from magistral_mlx.terminal.repl.lines import command_in, message_in, path_in
from magistral_mlx.terminal.repl.session import Models, Session

QUESTION = "What is 48 + 76?"
SAMPLING = mm.SamplingParams(temperature=0, think_budget=0, max_tokens=2)


@pytest.fixture(scope="module")
def loaded() -> mm.Magistral:
    return mm.load("demo")


@pytest.fixture
def session(loaded: mm.Magistral) -> Iterator[Session]:
    """Return a session that answers at once, with an empty conversation."""
    loaded.prefix_cache.clear()
    models = Models("demo", check=lambda name: None, open=lambda name: loaded)
    yield Session(models, loaded, loaded.chat(), SAMPLING)
    loaded.prefix_cache.clear()


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


def test_a_typed_save_replaces_no_other_file(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes, other = tmp_path / "n.txt", tmp_path / "a b"
    notes.write_text("precious")
    session.magistral.chat(system_prompt="Be brief.").save(other)
    run(session, QUESTION)
    for line in (f"/save {notes}", f"/save! {notes}"):
        with pytest.raises(mm.OptionError, match="is something else than a prompt cache"):
            answer(session, line)
    assert notes.read_text() == "precious"
    with pytest.raises(mm.OptionError, match=r"not this conversation's file; /save! .*a b replac"):
        answer(session, f"/save {other}")
    run(session, f"/save! '{other}'", f"/save {other}")
    assert f"--prompt-cache-file '{other}' goes on from it" in capsys.readouterr().err
    assert stat.S_IMODE(other.stat().st_mode) == 0o600
    assert session.magistral.resume(other).messages == session.chat.messages


def test_another_conversation_is_loaded_and_this_one_is_kept(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    run(session, QUESTION, f"/save {other}", "/reset", "What is 7 * 8?")
    with pytest.raises(mm.OptionError, match="this conversation is not saved; /save F saves it"):
        answer(session, f"/load {other}")
    session.file = mine
    run(session, f"/load {other}")
    said = capsys.readouterr().err
    assert f"{other} goes on after 1 turn\n> {QUESTION}\nThe an" in said
    assert (session.file, session.is_unsaved) == (other, False)
    assert session.magistral.resume(mine).messages[0]["content"] == "What is 7 * 8?"
    run(session, "What is 9 * 8?", f"/load! {mine}", "/history")
    assert session.turns == 1


def test_the_file_at_the_end(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session.file = file = tmp_path / "talk.cache"
    session.save_at_end()
    assert not file.exists()
    run(session, QUESTION)
    session.save_at_end()
    before = file.stat().st_mtime_ns
    session.save_at_end()  # nothing is new
    assert capsys.readouterr().err.count("saved to") == 1
    run(session, "/reset")
    session.save_at_end()
    said = capsys.readouterr().err
    assert f"a new conversation begins; {file} keeps the old one" in said
    assert f"there is nothing new to save; {file} is unchanged" in said
    assert file.stat().st_mtime_ns == before


def test_two_chats_on_one_file_are_kept_apart(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session.file = file = tmp_path / "talk.cache"
    (tmp_path / "talk-2.cache").write_text("precious")
    run(session, QUESTION, f"/save {file}")
    other = Session(session.models, session.magistral, session.magistral.resume(file), SAMPLING)
    other.file = file
    run(session, "What is 7 * 8?")
    run(other, "What is 9 * 8?")
    other.save_at_end()
    session.save_at_end()
    beside = tmp_path / "talk-3.cache"
    assert f"a newer state of this one; this one is saved to {beside}" in capsys.readouterr().err
    asked = [
        [m["content"] for m in session.magistral.resume(path).messages if m["role"] == "user"]
        for path in (file, beside)
    ]
    assert asked == [[QUESTION, "What is 9 * 8?"], [QUESTION, "What is 7 * 8?"]]
    with pytest.raises(mm.OverwriteError):
        session.magistral.chat().save(file)


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
    run(session, "/copy")
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


def test_another_model_goes_on_and_the_first_is_freed(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    first = mm.load("demo")
    freed = weakref.ref(first)
    session = Session(session.models, first, first.chat(), SAMPLING, session.file)
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


def test_a_conversation_that_goes_on_is_shown_again(
    monkeypatch: pytest.MonkeyPatch,
    session: Session,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    turns = [f"What is {i} + {i}?" for i in range(1, 4)]
    for turn in turns:
        session.chat.messages += [
            {"role": "user", "content": turn},
            {"role": "assistant", "content": "y" * 700},
        ]
    session.file = tmp_path / "talk"
    monkeypatch.setattr(chat, "read_terminal", lambda *_: iter(["/quit"]))
    chat.answer_terminal(session)
    said = capsys.readouterr().err
    assert f"{tmp_path}/talk goes on after 3 turns; /history shows all of it\n" in said
    assert turns[0] not in said
    assert f"> {turns[1]}\n{'y' * 600} ...\n> {turns[2]}\n" in said
