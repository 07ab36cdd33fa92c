"""The state of a conversation in its file: written as JSON, and checked when it is read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from magistral_mlx.engine.request import Tools
from magistral_mlx.engine.turns import KeepReasoning, Message
from magistral_mlx.errors import CheckpointError, OptionError, quoted


@dataclass(frozen=True, slots=True)
class ChatState:
    """The state of a conversation, as a file holds it."""

    keep_reasoning: KeepReasoning
    messages: list[Message]
    tools: list[Message] | None
    dropped_turns: int

    def next_messages(self) -> list[Message]:
        """Return messages that may follow: results of the calls that wait, or a question."""
        last = self.messages[-1] if self.messages else {}
        waiting = last.get("tool_calls") or ()
        return [
            {"role": "tool", "tool_call_id": call["id"], "content": "?"} for call in waiting
        ] or [{"role": "user", "content": "?"}]


def write_state(
    keep_reasoning: KeepReasoning,
    messages: Sequence[Message],
    tools: Tools | None,
    dropped_turns: int,
) -> str:
    """Write a conversation as JSON. Objects of mistral-common and OpenAI become plain values.

    Raises:
        OptionError: a message or a tool holds something else.
    """
    state = {
        "keep_reasoning": keep_reasoning,
        "messages": messages,
        "tools": tools,
        "forgotten": dropped_turns,
    }
    try:
        return json.dumps(state, default=_as_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(
            f"the conversation cannot be saved: a message or tool is no JSON ({error})"
        ) from None


def read_state(state: str, path: Path) -> ChatState:
    """Read what ``write_state`` wrote to ``path``.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        found = json.loads(state)
    except (ValueError, RecursionError) as error:
        raise no_conversation(path, str(error)) from None
    if not isinstance(found, dict):
        raise no_conversation(path, f"its state is {quoted(found)}")
    missing = {"keep_reasoning", "messages", "tools", "forgotten"} - set(found)
    if missing:
        raise no_conversation(path, f"its state has no {min(missing)}")
    keep, dropped = found["keep_reasoning"], found["forgotten"]
    if keep not in get_args(KeepReasoning):
        raise no_conversation(path, f"keep_reasoning is {quoted(keep)}")
    if type(dropped) is not int:
        raise no_conversation(path, f"the turns left out are {quoted(dropped)}")
    tools = found["tools"]
    messages = _tables(found["messages"], "messages", path)
    if not all(isinstance(message.get("role"), str) for message in messages):
        raise no_conversation(path, "a message has no role")
    return ChatState(
        keep,
        # OpenAI leaves the content out beside calls.
        [{"content": "", **message} for message in messages],
        None if tools is None else _tables(tools, "tools", path),
        dropped,
    )


def no_conversation(path: Path, why: str) -> CheckpointError:
    """Make the error for a file whose conversation cannot be used."""
    return CheckpointError(f"{path} holds no conversation that can be read ({why}); name another")


def _tables(value: Any, name: str, path: Path) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise no_conversation(path, f"its {name} are {quoted(value)}")
    return value


def _as_plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    dump = getattr(value, "model_dump", None)
    if not callable(dump):
        raise TypeError(f"{type(value).__name__} is no plain value")
    return dump()
