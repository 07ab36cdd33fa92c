"""A conversation: which turns and traces the model sees again, and where it is saved."""

import logging
import os
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

from magistral_mlx.engine.async_stream import AsyncStream
from magistral_mlx.engine.chat_state import no_conversation, read_state, write_state
from magistral_mlx.engine.request import CallResults, Question, Tools
from magistral_mlx.engine.turns import (
    KeepReasoning,
    Message,
    Model,
    seen_again,
    turn_messages,
    turn_starts,
    without_oldest,
)
from magistral_mlx.errors import OptionError, quoted
from magistral_mlx.files import as_path
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import Reply
from magistral_mlx.model.memory import REPLY_ROOM
from magistral_mlx.options import takes_keywords_of
from magistral_mlx.streams import Stream
from magistral_mlx.tokenizer.segments import Segment

log = logging.getLogger(__name__)

KEEP_FOR_BOOL: Mapping[bool, KeepReasoning] = {True: "all", False: "none"}
# 1/SHARE of the context is kept free for a reply. Dropping turns frees another 1/SHARE.
SHARE = 4


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
        messages: the conversation so far, as {"role": ..., "content": ...}.
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
                f"keep_reasoning is {quoted(keep_reasoning)}; "
                f"use {', '.join(get_args(KeepReasoning))}, True or False"
            )
        self.magistral = magistral
        self.keep_reasoning: KeepReasoning = keep_reasoning
        self.messages = messages
        self.tools = tools
        self.dropped_turns = 0
        # Of the files that hold this conversation.
        self._stamps: dict[Path, bytes] = {}

    @classmethod
    def restored(cls, magistral: Model, state: str, path: Path, stamp: bytes) -> "Chat":
        """Return the conversation that ``save`` wrote to ``path``.

        ``save`` may replace the file as long as it has this stamp.

        Raises:
            CheckpointError: the state is something else.
        """
        saved = read_state(state, path)
        chat = cls(magistral, saved.keep_reasoning, saved.messages, saved.tools)
        chat.dropped_turns = max(0, min(saved.dropped_turns, len(turn_starts(chat.messages))))
        chat._stamps[real_path(path)] = stamp
        try:
            magistral.free_context([*chat.messages, *saved.next_messages()], tools=chat.tools)
        except (OptionError, KeyError, TypeError, RecursionError) as error:
            raise no_conversation(path, str(error)) from None
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

    def __repr__(self) -> str:
        turns = len(turn_starts(self.messages))
        return f"Chat(<turns: {turns}>, keep_reasoning={self.keep_reasoning!r})"

    @takes_keywords_of(Question)
    def ask(self, asked: Question) -> Reply:
        """Return the whole reply to the next question.

        Raises:
            OptionError: calls wait for their results; else as ``Magistral.ask``.
            ContextError: not even the system prompt and the question fit.
        """
        return self._ask(asked).result()

    @takes_keywords_of(Question)
    def stream(self, asked: Question) -> Stream[Segment, Reply]:
        """Start the reply that ``ask`` gives."""
        return self._ask(asked)

    @takes_keywords_of(Question)
    async def aask(self, asked: Question) -> Reply:
        """Return the reply that ``ask`` gives, in ``async`` code; a cancelled task cancels it."""
        return await AsyncStream(self._ask(asked)).result()

    @takes_keywords_of(Question)
    def astream(self, asked: Question) -> AsyncStream[Segment, Reply]:
        """Start the reply that ``stream`` gives, for ``async for``."""
        return AsyncStream(self._ask(asked))

    def _ask(self, asked: Question) -> Stream[Segment, Reply]:
        question = asked.question
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
        messages = [{"role": "user", "content": question}]
        return self._stream(messages, self._history(is_answered=True), asked.params)

    @takes_keywords_of(CallResults)
    def answer_calls(self, answer: CallResults) -> Reply:
        """Return the reply to the results of the calls that wait, by the calls' ids.

        Raises:
            OptionError: a call has no result, or there is no such call; else as ``ask``.
            ContextError: as ``ask``.
        """
        return self._answer_calls(answer).result()

    @takes_keywords_of(CallResults)
    def stream_after_calls(self, answer: CallResults) -> Stream[Segment, Reply]:
        """Start the reply that ``answer_calls`` gives."""
        return self._answer_calls(answer)

    def _answer_calls(self, answer: CallResults) -> Stream[Segment, Reply]:
        results = answer.results
        if not isinstance(results, Mapping):
            raise OptionError(f"the results are {quoted(results)}; give a text for each call's id")
        asked = [
            {"role": "tool", "tool_call_id": call, "content": result}
            for call, result in results.items()
        ]
        return self._stream(asked, self._history(is_answered=False), answer.params)

    def undo(self) -> str | None:
        """Remove the newest turn and return its question; None where there is no turn."""
        turns = turn_starts(self.messages)
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

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the conversation and its cache to a file, atomically; see ``Magistral.resume``.

        A file is replaced if this conversation was resumed from it or saved to it, and nobody has
        changed it since.

        Args:
            path: the file.
            overwrite: replace another conversation's file as well.

        Raises:
            OverwriteError: the file holds another conversation, or is no prompt cache.
            OptionError: it cannot be written; an older file is unchanged.
        """
        path = as_path(path, "path")
        target = real_path(path)
        self._stamps[target] = self.magistral.save_cache(
            path,
            write_state(self.keep_reasoning, self.messages, self.tools, self.dropped_turns),
            overwrite=overwrite,
            replaces=self._stamps.get(target, b""),
        )

    def moved_to(self, magistral: Model) -> "Chat":
        """Return this conversation with another model, which reads it anew."""
        chat = Chat(magistral, self.keep_reasoning, self.messages, self.tools)
        chat.continue_files_of(self)
        return chat

    def continue_files_of(self, other: "Chat") -> None:
        """Let ``save`` replace the files that it may replace for another conversation."""
        self._stamps = other._stamps

    def _stream(
        self, asked: list[Message], history: list[Message], sampling: SamplingParams
    ) -> Stream[Segment, Reply]:
        dropped = self._turns_to_drop(history, asked, sampling)
        messages = [*without_oldest(history, dropped), *asked]
        stream = self.magistral.stream(messages, sampling, tools=self.tools)
        if dropped > self.dropped_turns:
            self.dropped_turns = dropped
            log.warning(
                f"the context of {self.magistral.plan.context:,} is full: the oldest turns are "
                f"left out from here on, {dropped:,} of {len(turn_starts(history)):,}"
            )
        return stream.then(partial(self._keep, asked, dropped))

    def _keep(self, asked: list[Message], dropped: int, reply: Reply) -> Reply:
        """Append a turn to the conversation, unless its reply is empty."""
        reply = replace(reply, usage=replace(reply.usage, dropped_turns=dropped))
        self.messages += turn_messages(asked, reply, has_tools=bool(self.tools))
        return reply

    def _turns_to_drop(
        self, history: list[Message], asked: list[Message], sampling: SamplingParams
    ) -> int:
        """Return how many of the oldest turns to drop, to make room for the reply."""
        context = self.magistral.plan.context
        wanted = sampling.max_tokens
        least = max(REPLY_ROOM, context // SHARE) if wanted is None else wanted
        is_answer_to_calls = any(message["role"] == "tool" for message in asked)
        # The last question must stay.
        droppable = len(turn_starts(history)) - is_answer_to_calls
        counts = range(self.dropped_turns, droppable + 1)

        def free(count: int) -> int:
            return self.magistral.free_context(
                [*without_oldest(history, count), *asked], sampling, tools=self.tools
            )

        if len(counts) < 2 or free(self.dropped_turns) >= least:
            return self.dropped_turns
        return counts[min(bisect_left(counts, least + context // SHARE, key=free), len(counts) - 1)]

    def _history(self, *, is_answered: bool) -> list[Message]:
        return seen_again(self.messages, self.keep_reasoning, is_answered=is_answered)


def real_path(path: Path) -> Path:
    """Return the path without links, which names a file in one way only."""
    return Path(os.path.realpath(path))
