"""A conversation: turns, their traces kept or dropped, those that no longer fit left out, and where they are saved."""

import json
import logging
from bisect import bisect_left
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

from magistral_mlx.engine.prefix_cache import PrefixCache
from magistral_mlx.errors import CheckpointError, OptionError, quoted
from magistral_mlx.files import as_path
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import Reply
from magistral_mlx.model.memory import REPLY_ROOM, MemoryPlan
from magistral_mlx.tokenizer.segments import Segment
from magistral_mlx.tokenizer.tool_calls import as_message

log = logging.getLogger(__name__)

KeepReasoning = Literal["all", "last", "none"]
SPELLED: Mapping[bool, KeepReasoning] = {True: "all", False: "none"}
SHARE = 4  # a reply has this part of the context to itself, and as much again is made free once turns are left out
Question = str | Mapping[str, str]  # the user's text, or the results of calls by their ids
Message = dict[str, Any]
Tools = Sequence[Mapping[str, Any]]
Result = TypeVar("Result")


def result_of(generator: Generator[Any, None, Result]) -> Result:
    """Run a generator to its end and give what it returns."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


class Model(Protocol):
    """What a conversation needs of a Magistral."""

    prefix_cache: PrefixCache
    plan: MemoryPlan

    def free_context(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
    ) -> int: ...

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
    ) -> Generator[Segment, None, Reply]: ...


class Chat:
    """A conversation: each question sees the turns before it, with their traces kept or dropped.

    ``keep_reasoning``: "all" or True keeps every trace, "last" the newest, "none" or False drops them. The live cache
    is reused up to where the ids differ. A turn whose stream is closed early, or that brought no text,
    is forgotten; one that was cut off before its answer keeps its trace, which is all there is of it.

    When the context is full, the oldest turns are left out of what the model reads, whole ones, never the system
    prompt nor the last question: so that the reply has ``max_tokens``, or a quarter of the context, and another
    quarter is free, for what is left out makes the model read the rest anew. ``dropped_turns`` is how many; a log
    message says it, and so does ``usage.dropped_turns``.

    ``tools``: functions the model may call, as OpenAI's tool definitions. A reply with ``tool_calls`` waits for their
    results: ``ask({call.id: result, ...})``. Until the question is answered, all traces since it are kept.
    """

    def __init__(
        self,
        magistral: Model,
        keep_reasoning: KeepReasoning | bool,
        messages: list[Message],
        tools: Tools | None = None,
    ) -> None:
        if isinstance(keep_reasoning, bool):
            keep_reasoning = SPELLED[keep_reasoning]
        if keep_reasoning not in get_args(KeepReasoning):
            raise OptionError(
                f"keep_reasoning is {keep_reasoning!r}; use {', '.join(get_args(KeepReasoning))}, True or False"
            )
        self.magistral = magistral
        self.keep_reasoning: KeepReasoning = keep_reasoning
        self.messages = messages
        self.tools = tools
        self.dropped_turns = 0

    @classmethod
    def restored(cls, magistral: Model, state: str, path: Path) -> "Chat":
        """What ``save`` wrote to ``path``. Raises CheckpointError where it is something else."""
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
        """The user's own, which joins the checkpoint's."""
        first = self.messages[0] if self.messages else {}
        return first["content"] if first.get("role") == "system" else None

    @system_prompt.setter
    def system_prompt(self, text: str | None) -> None:
        own = [] if text is None else [{"role": "system", "content": text}]
        self.messages[: self.system_prompt is not None] = own

    def ask(self, question: Question, sampling: SamplingParams | None = None) -> Reply:
        """The whole reply to the next question, or to the results of the calls that wait, by the calls' ids.

        Raises:
            OptionError: calls wait for results and there is none, or one for another call; else as Magistral.ask.
            ContextError: as Magistral.ask, if not even the system prompt and the question fit.
        """
        return result_of(self.stream(question, sampling))

    def stream(
        self, question: Question, sampling: SamplingParams | None = None
    ) -> Generator[Segment, None, Reply]:
        """As ``ask``, in pieces: a generator of Segments that returns the Reply."""
        asked = self._asked(question)
        history = self._history(is_answered=isinstance(question, str))
        dropped = self._turns_to_drop(history, asked, sampling)
        messages = [*_without_oldest(history, dropped), *asked]
        stream = self.magistral.stream(messages, sampling, tools=self.tools)
        if dropped > self.dropped_turns:
            self.dropped_turns = dropped
            log.warning(
                f"the context of {self.magistral.plan.context:,} is full: of the conversation's "
                f"{len(_turns(history))} turns the oldest {dropped} are left out from here on"
            )
        return self._turn(asked, stream)

    def undo(self) -> str | None:
        """Remove the newest turn; returns its question, None where there is no turn."""
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
        """Write the conversation and its cache to a file, atomically; ``Magistral.resume`` reads it.

        Raises:
            OptionError: it cannot be written; what was there is unchanged.
        """
        state = {
            "keep_reasoning": self.keep_reasoning,
            "messages": self.messages,
            "tools": self.tools,
            "forgotten": self.dropped_turns,
        }
        self.magistral.prefix_cache.save(as_path(path, "path"), json.dumps(state))

    def _asked(self, question: Question) -> list[Message]:
        if not isinstance(question, str | Mapping):
            raise OptionError(
                f"the question is {quoted(question)}; a conversation is asked with text, or with the results of calls "
                "by their ids"
            )
        if not isinstance(question, str):
            return [
                {"role": "tool", "tool_call_id": call, "content": result}
                for call, result in question.items()
            ]
        if (
            waiting := [call["id"] for call in self.messages[-1].get("tool_calls", ())]
            if self.messages
            else []
        ):
            raise OptionError(
                f"the tool call {waiting[0]!r} waits for its result; ask with {{{waiting[0]!r}: result}} before any "
                "other question"
            )
        return [{"role": "user", "content": question}]

    def _turn(
        self, asked: list[Message], stream: Generator[Segment, None, Reply]
    ) -> Generator[Segment, None, Reply]:
        dropped = self.dropped_turns
        reply = yield from stream
        reply = replace(reply, usage=replace(reply.usage, dropped_turns=dropped))
        calls = reply.tool_calls if self.tools else ()  # what was not offered cannot have a result
        if reply.reasoning or reply.answer or calls:
            answer = {"role": "assistant", "content": reply.answer, "reasoning": reply.reasoning}
            self.messages += [
                *asked,
                answer | ({"tool_calls": [as_message(call) for call in calls]} if calls else {}),
            ]
        return reply

    def _turns_to_drop(
        self, history: list[Message], asked: list[Message], sampling: SamplingParams | None
    ) -> int:
        """How many of the oldest turns to leave out, so that the reply has room."""
        context = self.magistral.plan.context
        asked_for = None if sampling is None else sampling.max_tokens
        least = max(REPLY_ROOM, context // SHARE) if asked_for is None else asked_for
        may_go = len(_turns(history)) - any(
            message["role"] == "tool" for message in asked
        )  # the last question stays
        counts = range(self.dropped_turns, may_go + 1)

        def free_context(count: int) -> int:
            return self.magistral.free_context(
                [*_without_oldest(history, count), *asked], sampling, tools=self.tools
            )

        if len(counts) < 2 or free_context(self.dropped_turns) >= least:
            return self.dropped_turns
        return counts[
            min(bisect_left(counts, least + context // SHARE, key=free_context), len(counts) - 1)
        ]

    def _history(self, *, is_answered: bool) -> list[Message]:
        """The turns so far, with the traces that are kept.

        Args:
            is_answered: False while the newest question waits for results.
        """
        messages = self.messages
        asked = max(
            (i for i, message in enumerate(messages) if message["role"] == "user"), default=0
        )
        begun = range(
            len(messages) if is_answered else asked, len(messages)
        )  # of the newest question, all is kept
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


def _turns(messages: Sequence[Message]) -> list[int]:
    """Where the turns begin: a turn is a question, and all that follows it up to the next."""
    roles = ["", *(message["role"] for message in messages)]
    return [i for i, role in enumerate(roles[1:]) if role == "user" != roles[i]]


def _without_oldest(messages: list[Message], count: int) -> list[Message]:
    """The messages without the oldest ``count`` turns; what stands before them stays."""
    begin = [*_turns(messages), len(messages)]
    return messages[: begin[0]] + messages[begin[count] :]
