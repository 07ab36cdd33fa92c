"""A conversation: which turns and traces the model sees again, and where it is saved."""

import json
import logging
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from magistral_mlx.engine.request import Tools
from magistral_mlx.errors import CheckpointError, OptionError, quoted
from magistral_mlx.files import as_path
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import Reply
from magistral_mlx.model.memory import REPLY_ROOM, MemoryPlan
from magistral_mlx.streams import Stream
from magistral_mlx.tokenizer.segments import Segment
from magistral_mlx.tokenizer.tool_calls import as_message

log = logging.getLogger(__name__)

KeepReasoning = Literal["all", "last", "none"]
KEEP_FOR_BOOL: Mapping[bool, KeepReasoning] = {True: "all", False: "none"}
# 1/SHARE of the context is kept free for a reply. Dropping turns frees another 1/SHARE.
SHARE = 4
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

    def save_cache(self, path: str | Path, conversation: str = "") -> None:
        """Write the prefix cache and a conversation's state to a file."""
        ...


class Chat:
    """A conversation; each question is sent with the earlier turns, with or without their traces.

    The prefix cache is reused up to the first id that differs. A turn is not kept if its stream is
    closed early or its reply is empty. If a reply is cut off before its answer, its trace is kept.

    When the context is full, the oldest turns are dropped as a whole, but never the system prompt
    or the last question. The reply then has room for ``max_tokens``, or for a quarter of the
    context. Another quarter is freed as well, because dropping turns needs a new prefill. A log
    message and ``usage.dropped_turns`` say how many turns were dropped.

    Attributes:
        keep_reasoning: "all" or True keeps every trace, "last" the newest, "none" or False none.
            Until a question is answered, all traces since it are kept.
        messages: the conversation so far.
        tools: functions the model may call, as OpenAI's tool definitions. A reply with
            ``tool_calls`` waits for their results: see ``answer_calls``.
        dropped_turns: the oldest turns that the model no longer sees.
    """

    def __init__(
        self,
        magistral: Model,
        keep_reasoning: KeepReasoning | bool,
        messages: list[Message],
        tools: Tools | None = None,
    ) -> None:
        if isinstance(keep_reasoning, bool):
            keep_reasoning = KEEP_FOR_BOOL[keep_reasoning]
        if keep_reasoning not in get_args(KeepReasoning):
            raise OptionError(
                f"keep_reasoning is {keep_reasoning!r}; "
                f"use {', '.join(get_args(KeepReasoning))}, True or False"
            )
        self.magistral = magistral
        self.keep_reasoning: KeepReasoning = keep_reasoning
        self.messages = messages
        self.tools = tools
        self.dropped_turns = 0

    @classmethod
    def restored(cls, magistral: Model, state: str, path: Path) -> "Chat":
        """Return the conversation that ``save`` wrote to ``path``.

        Raises:
            CheckpointError: the state is something else.
        """
        try:
            found = json.loads(state)
            chat = cls(magistral, found["keep_reasoning"], found["messages"], found["tools"])
            chat.dropped_turns = max(0, min(found["forgotten"], len(_turns(chat.messages))))
        except (ValueError, KeyError, TypeError, RecursionError, OptionError) as error:
            raise CheckpointError(
                f"{path} holds no conversation that can be read ({error!r}); delete it"
            ) from None
        return chat

    @property
    def system_prompt(self) -> str | None:
        """The user's own system prompt, which joins the checkpoint's."""
        first = self.messages[0] if self.messages else {}
        return first["content"] if first.get("role") == "system" else None

    @system_prompt.setter
    def system_prompt(self, text: str | None) -> None:
        own = [] if text is None else [{"role": "system", "content": text}]
        self.messages[: self.system_prompt is not None] = own

    def ask(self, question: str, sampling: SamplingParams | None = None) -> Reply:
        """Return the whole reply to the next question.

        Raises:
            OptionError: calls wait for their results; else as ``Magistral.ask``.
            ContextError: not even the system prompt and the question fit.
        """
        return self.stream(question, sampling).result()

    def stream(
        self, question: str, sampling: SamplingParams | None = None
    ) -> Stream[Segment, Reply]:
        """Start the reply that ``ask`` gives."""
        if not isinstance(question, str):
            raise OptionError(
                f"the question is {quoted(question)}; ask with text, and give the results of calls "
                "with answer_calls"
            )
        calls = self.messages[-1].get("tool_calls", ()) if self.messages else ()
        if calls:
            waiting = calls[0]["id"]
            raise OptionError(
                f"the tool call {waiting!r} waits for its result; use "
                f"answer_calls({{{waiting!r}: result}}) before any other question"
            )
        asked = [{"role": "user", "content": question}]
        return self._stream(asked, self._history(is_answered=True), sampling)

    def answer_calls(
        self, results: Mapping[str, str], sampling: SamplingParams | None = None
    ) -> Reply:
        """Return the reply to the results of the calls that wait, by the calls' ids.

        Raises:
            OptionError: a call has no result, or there is no such call; else as ``ask``.
            ContextError: as ``ask``.
        """
        return self.stream_after_calls(results, sampling).result()

    def stream_after_calls(
        self, results: Mapping[str, str], sampling: SamplingParams | None = None
    ) -> Stream[Segment, Reply]:
        """Start the reply that ``answer_calls`` gives."""
        if not isinstance(results, Mapping):
            raise OptionError(f"the results are {quoted(results)}; give a text for each call's id")
        asked = [
            {"role": "tool", "tool_call_id": call, "content": result}
            for call, result in results.items()
        ]
        return self._stream(asked, self._history(is_answered=False), sampling)

    def undo(self) -> str | None:
        """Remove the newest turn and return its question; None where there is no turn."""
        turns = _turns(self.messages)
        if not turns:
            return None
        question: str = self.messages[turns[-1]]["content"]
        del self.messages[turns[-1] :]
        self.dropped_turns = min(self.dropped_turns, len(turns) - 1)
        return question

    def reset(self) -> None:
        """Remove all turns; the system prompt stays."""
        self.messages[:] = [message for message in self.messages if message["role"] == "system"]
        self.dropped_turns = 0

    def save(self, path: str | Path) -> None:
        """Write the conversation and its cache to a file, atomically; see ``Magistral.resume``.

        Raises:
            OptionError: it cannot be written; an older file is unchanged.
        """
        state = {
            "keep_reasoning": self.keep_reasoning,
            "messages": self.messages,
            "tools": self.tools,
            "forgotten": self.dropped_turns,
        }
        self.magistral.save_cache(as_path(path, "path"), json.dumps(state))

    def _stream(
        self, asked: list[Message], history: list[Message], sampling: SamplingParams | None
    ) -> Stream[Segment, Reply]:
        dropped = self._turns_to_drop(history, asked, sampling)
        messages = [*_without_oldest(history, dropped), *asked]
        stream = self.magistral.stream(messages, sampling, tools=self.tools)
        if dropped > self.dropped_turns:
            self.dropped_turns = dropped
            log.warning(
                f"the context of {self.magistral.plan.context:,} is full: of the conversation's "
                f"{len(_turns(history))} turns the oldest {dropped} are left out from here on"
            )
        return stream.then(partial(self._keep, asked, dropped))

    def _keep(self, asked: list[Message], dropped: int, reply: Reply) -> Reply:
        """Append a turn to the conversation, unless its reply is empty."""
        reply = replace(reply, usage=replace(reply.usage, dropped_turns=dropped))
        self.messages += turn_messages(asked, reply, has_tools=bool(self.tools))
        return reply

    def _turns_to_drop(
        self, history: list[Message], asked: list[Message], sampling: SamplingParams | None
    ) -> int:
        """Return how many of the oldest turns to drop, to make room for the reply."""
        context = self.magistral.plan.context
        wanted = None if sampling is None else sampling.max_tokens
        least = max(REPLY_ROOM, context // SHARE) if wanted is None else wanted
        is_answer_to_calls = any(message["role"] == "tool" for message in asked)
        # The last question must stay.
        droppable = len(_turns(history)) - is_answer_to_calls
        counts = range(self.dropped_turns, droppable + 1)

        def free(count: int) -> int:
            return self.magistral.free_context(
                [*_without_oldest(history, count), *asked], sampling, tools=self.tools
            )

        if len(counts) < 2 or free(self.dropped_turns) >= least:
            return self.dropped_turns
        return counts[min(bisect_left(counts, least + context // SHARE, key=free), len(counts) - 1)]

    def _history(self, *, is_answered: bool) -> list[Message]:
        """Return the turns so far, with the traces that are kept.

        Args:
            is_answered: False while the newest question waits for results of calls.
        """
        messages = self.messages
        asked = max(
            (i for i, message in enumerate(messages) if message["role"] == "user"), default=0
        )
        # All messages since the newest question keep their traces until it is answered.
        begun = range(len(messages) if is_answered else asked, len(messages))
        newest = max(
            (i for i, message in enumerate(messages[: begun.start]) if message.get("reasoning")),
            default=-1,
        )
        kept = {"all": range(len(messages)), "last": [newest], "none": ()}[self.keep_reasoning]
        return [
            message
            if i in kept or i in begun or not (message["content"] or message.get("tool_calls"))
            else {key: value for key, value in message.items() if key != "reasoning"}
            for i, message in enumerate(messages)
        ]


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


def _turns(messages: Sequence[Message]) -> list[int]:
    """Return where the turns begin: a turn is a question and all that follows up to the next."""
    roles = ["", *(message["role"] for message in messages)]
    return [i for i, role in enumerate(roles[1:]) if role == "user" != roles[i]]


def _without_oldest(messages: list[Message], count: int) -> list[Message]:
    """Return messages without the oldest ``count`` turns; what stands before the turns stays."""
    begin = [*_turns(messages), len(messages)]
    return messages[: begin[0]] + messages[begin[count] :]
