"""The commands of a conversation at the prompt."""

import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from magistral_mlx.engine.turns import turn_starts
from magistral_mlx.errors import ForeignFileError, OptionError, OverwriteError, counted, in_units
from magistral_mlx.terminal.display import rate, tell, write
from magistral_mlx.terminal.repl import settings
from magistral_mlx.terminal.repl.clipboard import copy_text
from magistral_mlx.terminal.repl.history import last_answer, show_resumed, show_turns
from magistral_mlx.terminal.repl.lines import command_in, message_in, path_in, unknown_command
from magistral_mlx.terminal.repl.session import Session

KEYS = """\
Enter sends. Alt-Enter, or \\ before Enter, begins a new line. Pasted text keeps its lines.
Ctrl-C stops a reply: a partial answer stays, a partial trace is dropped. Ctrl-D ends.
//word sends a message that begins with /word; a path such as /etc/hosts is sent as it is."""


def answer(session: Session, text: str) -> None:
    """Run a command such as ``/budget 100``, or show the reply to a message.

    Raises:
        MagistralError: there is no such command, it cannot be done, or as ``Session.ask``.
    """
    found = command_in(text)
    if found is None:
        session.ask(message_in(text))
        return
    typed, rest = found
    name = ALIASES.get(typed.lower(), typed.lower())
    if name not in COMMANDS:
        raise unknown_command(typed, [*COMMANDS, *ALIASES])
    command = COMMANDS[name]
    if rest and not command.takes:
        raise OptionError(f"{typed} takes nothing after it")
    command.act(session, rest)


def help(session: Session, _: str) -> None:
    spelled = {name: f"{name} {command.takes}" for name, command in COMMANDS.items()}
    width = max(map(len, spelled.values()))
    for name, command in COMMANDS.items():
        others = [alias for alias, meant in ALIASES.items() if meant == name]
        also = f" (also {', '.join(others)})" if others else ""
        tell(f"{spelled[name]:{width}}  {command.help}{also}")
    tell(KEYS)


def retry(session: Session, _: str) -> None:
    before, dropped = [*session.chat.messages], session.unanswered
    question = dropped or session.chat.undo()
    if question is None:
        raise OptionError("/retry: there is no question yet")
    seed = None
    if session.sampling.seed is not None and session.usages:
        # The same seed would give the same reply.
        seed = session.usages[-1].seed + 1
    if session.sampling.temperature == 0:
        tell("at temperature 0 the same question has the same reply")
    try:
        session.ask(question, seed=seed)
    finally:
        if dropped is None and session.unanswered is not None:
            session.chat.messages[:], session.unanswered = before, None
            tell("the former answer stays")


def undo(session: Session, _: str) -> None:
    question = session.unanswered or session.chat.undo()
    if question is None:
        raise OptionError("/undo: there is no question yet")
    session.unanswered, session.trace = None, ""
    tell(f"removed: {question}")


def copy(session: Session, _: str) -> None:
    text = last_answer(session.chat)
    if not text:
        raise OptionError("/copy: there is no answer yet")
    tell(f"the last answer is {copy_text(text)}")


def save(session: Session, text: str) -> None:
    path = path_in("/save", text)
    try:
        session.save(path)
    except ForeignFileError:
        raise
    except OverwriteError:
        raise OptionError(
            f"{path} is not this conversation's file; /save! {path} replaces what it holds, or "
            "name another file"
        ) from None
    _tell_saved(path)


def save_over(session: Session, text: str) -> None:
    path = path_in("/save!", text)
    session.save(path, overwrite=True)
    _tell_saved(path)


def _tell_saved(path: Path) -> None:
    tell(f"saved to {path}; --prompt-cache-file {shlex.quote(str(path))} goes on from it")


def load(session: Session, text: str) -> None:
    path = path_in("/load", text)
    if session.is_unsaved and session.file is None:
        raise OptionError(
            f"/load: this conversation is not saved; /save F saves it, /load! {path} drops it"
        )
    session.keep()
    _go_on(session, path)


def load_over(session: Session, text: str) -> None:
    _go_on(session, path_in("/load!", text))


def _go_on(session: Session, path: Path) -> None:
    session.go_on_with(session.magistral.resume(path), path)
    show_resumed(session.chat, path)
    tell("this conversation is saved there again at its end")


def history(session: Session, _: str) -> None:
    if not turn_starts(session.chat.messages):
        raise OptionError("/history: there is no turn yet")
    show_turns(session.chat)


def trace(session: Session, _: str) -> None:
    if not session.trace:
        raise OptionError("/trace: the last reply has none")
    write(sys.stderr, session.trace + "\n", is_dim=True)


def reset(session: Session, _: str) -> None:
    session.reset()
    if session.file is not None and session.file.exists():
        tell(
            f"a new conversation begins; {session.file} keeps the old one until the new one has an "
            "answer and ends"
        )
    else:
        tell("a new conversation begins")


def quit(session: Session, _: str) -> None:
    session.is_over = True


def stats(session: Session, _: str) -> None:
    magistral, sampling, usages = session.magistral, session.sampling, session.usages

    def total(name: str) -> float:
        return sum(getattr(usage, name) for usage in usages)

    prompt, cached, replied = (
        int(total(f"{kind}_tokens")) for kind in ("prompt", "cached", "completion")
    )
    dropped = session.chat.dropped_turns
    left_out = f", the oldest {dropped:,} left out" if dropped else ""
    limit = sampling.think_budget
    budget = "none" if limit is None else counted(limit, "token")
    tell(f"model         {session.models.name}")
    tell(
        f"conversation  {counted(session.turns, 'turn')}{left_out}; "
        f"traces kept: {session.chat.keep_reasoning}"
    )
    tell(
        f"context       {magistral.cached_tokens:,} of {magistral.plan.context:,} positions "
        f"in the cache, {in_units(magistral.cache_bytes)}"
    )
    tell(
        f"read          {counted(prompt, 'token')}, of which {cached:,} were in the cache; "
        f"the rest at {rate(prompt - cached, total('prefill_seconds'))}"
    )
    tell(
        f"written       {counted(replied, 'token')} in {counted(len(usages), 'reply', 'replies')}, "
        f"of which {int(total('reasoning_tokens')):,} reasoning; "
        f"{rate(replied - len(usages), total('decode_seconds'))}"
    )
    seed = "" if sampling.seed is None else f", seed {sampling.seed}"
    tell(
        f"sampling      temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, "
        f"budget {budget}{seed}"
    )


@dataclass(frozen=True)
class Command:
    """A command: what it takes, its help, and what it does with the session and the text."""

    takes: str
    help: str
    act: Callable[[Session, str], None]


COMMANDS: Mapping[str, Command] = {
    "/retry": Command("", "ask the last question again", retry),
    "/undo": Command("", "remove the last question and its answer", undo),
    "/copy": Command("", "copy the last answer to the clipboard", copy),
    "/trace": Command("", "show the last trace", trace),
    "/history": Command("", "show the conversation so far", history),
    "/budget": Command("N|off", "reasoning tokens at most", settings.budget),
    "/think": Command("on|off", "turn the trace before an answer on or off", settings.think),
    "/temp": Command("T", "randomness of the replies; 0 is greedy", settings.temperature),
    "/top-p": Command("P", "probability mass kept, in (0, 1]", settings.top_p),
    "/seed": Command("N|off", "seed of the next replies", settings.seed),
    "/system": Command(
        "TEXT|off", "set a system prompt, added to the model's own", settings.system
    ),
    "/model": Command("M", "go on with another model, in place of this one", settings.model),
    "/fold": Command("on|off", "fold closed traces to one line", settings.fold),
    "/markdown": Command("on|off", "lay out Markdown in answers", settings.markdown),
    "/stats": Command("", "show the cost of the conversation", stats),
    "/save": Command("F", "write conversation and cache to a file", save),
    "/save!": Command("F", "the same, over another conversation's file", save_over),
    "/load": Command("F", "go on with the conversation in a file", load),
    "/load!": Command("F", "the same, without saving this one", load_over),
    "/reset": Command("", "begin a new conversation", reset),
    "/help": Command("", "show this", help),
    "/quit": Command("", "end", quit),
}
# Other names that people know from elsewhere.
ALIASES: Mapping[str, str] = {
    "/?": "/help",
    "/bye": "/quit",
    "/clear": "/reset",
    "/exit": "/quit",
    "/temperature": "/temp",
}
