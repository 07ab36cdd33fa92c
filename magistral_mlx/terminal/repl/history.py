"""The turns of a conversation, shown again."""

from pathlib import Path
from typing import Any

from magistral_mlx.engine.chat import Chat
from magistral_mlx.engine.turns import turn_starts
from magistral_mlx.errors import counted
from magistral_mlx.terminal.display import tell

# Of a conversation that goes on: the turns shown, and the characters of each text.
LAST_TURNS = 2
MAX_CHARACTERS = 600


def show_turns(chat: Chat, last: int | None = None) -> None:
    """Show the questions and answers on stderr: all, or the ``last`` turns in short."""
    starts = turn_starts(chat.messages)
    begin = starts[-last] if last is not None and last < len(starts) else 0
    for message in chat.messages[begin:]:
        if message["role"] == "system":
            continue
        text = _text(message["content"]) or _without_text(message)
        if last is not None and len(text) > MAX_CHARACTERS:
            text = f"{text[:MAX_CHARACTERS]} ..."
        tell(f"> {text}" if message["role"] == "user" else text, is_dim=True)


def show_resumed(chat: Chat, file: Path) -> None:
    """Say that a conversation goes on, and show its last turns."""
    turns = len(turn_starts(chat.messages))
    shown = "; /history shows all of it" if turns > LAST_TURNS else ""
    tell(f"{file} goes on after {counted(turns, 'turn')}{shown}")
    show_turns(chat, LAST_TURNS)


def last_answer(chat: Chat) -> str:
    """Return the newest answer, or "" if there is none."""
    answers = [_text(m["content"]) for m in chat.messages if m["role"] == "assistant"]
    return next((answer for answer in reversed(answers) if answer), "")


def _text(content: str | list[dict[str, Any]] | None) -> str:
    """Return the text of a message, whose content may be parts."""
    if isinstance(content, str) or content is None:
        return content or ""
    return "\n\n".join(part["text"] for part in content if part.get("type") == "text")


def _without_text(message: dict[str, Any]) -> str:
    return "(tool calls)" if message.get("tool_calls") else "(no answer)"
