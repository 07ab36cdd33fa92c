"""The turns of a conversation: which of them, and which traces, its model sees again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from magistral_mlx.engine.request import Tools
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import Reply
from magistral_mlx.model.memory import MemoryPlan
from magistral_mlx.streams import Stream
from magistral_mlx.tokenizer.segments import Segment
from magistral_mlx.tokenizer.tool_calls import as_message

KeepReasoning = Literal["all", "last", "none"]
Message = dict[str, Any]


class Model(Protocol):
    """The part of a Magistral that a conversation needs."""

    plan: MemoryPlan

    def free_context(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
    ) -> int:
        """Return the positions left for a reply."""
        ...

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
    ) -> Stream[Segment, Reply]:
        """Start a reply."""
        ...

    def save_cache(
        self, path: str | Path, conversation: str, *, overwrite: bool, replaces: bytes
    ) -> bytes:
        """Write the prefix cache and a conversation's state to a file; return its stamp."""
        ...


def turn_messages(
    asked: Sequence[Mapping[str, Any]], reply: Reply, *, has_tools: bool
) -> list[Message]:
    """Return the messages of a turn: the question and its reply; none if the reply is empty.

    Tool calls without tools are left out, because they cannot have a result.
    """
    calls = reply.tool_calls if has_tools else ()
    if not (reply.reasoning or reply.answer or calls):
        return []
    answer: Message = {"role": "assistant", "content": reply.answer, "reasoning": reply.reasoning}
    if calls:
        answer["tool_calls"] = [as_message(call) for call in calls]
    return [*map(dict, asked), answer]


def turn_starts(messages: Sequence[Message]) -> list[int]:
    """Return where the turns begin: a turn is a question and all that follows up to the next."""
    roles = ["", *(message["role"] for message in messages)]
    return [i for i, role in enumerate(roles[1:]) if role == "user" != roles[i]]


def without_oldest(messages: list[Message], count: int) -> list[Message]:
    """Return messages without the oldest ``count`` turns; what stands before the turns stays."""
    begin = [*turn_starts(messages), len(messages)]
    return messages[: begin[0]] + messages[begin[count] :]


def seen_again(
    messages: Sequence[Message], keep: KeepReasoning, *, is_answered: bool
) -> list[Message]:
    """Return the messages of a conversation, with the traces that are kept.

    Args:
        messages: the conversation so far.
        keep: which traces are kept.
        is_answered: False while the newest question waits for results of calls.
    """
    asked = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=0)
    # All messages since the newest question keep their traces until it is answered.
    begun = range(len(messages) if is_answered else asked, len(messages))
    newest = max(
        (i for i, message in enumerate(messages[: begun.start]) if message.get("reasoning")),
        default=-1,
    )
    kept = {"all": range(len(messages)), "last": [newest], "none": ()}[keep]
    return [
        message
        if i in kept or i in begun or not (message["content"] or message.get("tool_calls"))
        else {key: value for key, value in message.items() if key != "reasoning"}
        for i, message in enumerate(messages)
    ]
