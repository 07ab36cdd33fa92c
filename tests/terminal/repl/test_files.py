"""Files of a conversation at the prompt: saved, loaded, and kept apart from other ones."""

import stat
from pathlib import Path

import pytest

import magistral_mlx as mm
from magistral_mlx import chat
from magistral_mlx.terminal.repl.commands import answer
from magistral_mlx.terminal.repl.session import Session

QUESTION = "What is 48 + 76?"


def run(session: Session, *texts: str) -> None:
    for text in texts:
        answer(session, text)


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
    session.save_at_end()  # nothing is new
    assert capsys.readouterr().err.count("saved to") == 1
    run(session, "What is 7 * 8?", "/reset")
    before = file.stat().st_mtime_ns
    assert len(session.magistral.resume(file).messages) == 4
    session.save_at_end()
    said = capsys.readouterr().err
    assert f"a new conversation begins; {file} keeps the old one" in said
    assert f"there is nothing new to save; {file} is unchanged" in said
    assert file.stat().st_mtime_ns == before


def test_a_copy_elsewhere_leaves_the_file_to_be_saved(session: Session, tmp_path: Path) -> None:
    session.file = file = tmp_path / "talk.cache"
    run(session, QUESTION, f"/save {tmp_path / 'copy'}")
    session.save_at_end()
    assert session.magistral.resume(file).messages == session.chat.messages


def test_two_chats_on_one_file_are_kept_apart(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session.file = file = tmp_path / "talk.cache"
    (tmp_path / "talk-2.cache").write_text("precious")
    run(session, QUESTION, f"/save {file}")
    other = Session(
        session.models, session.magistral, session.magistral.resume(file), session.sampling
    )
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
