"""A conversation: turns, their traces kept or dropped, and where they are saved."""

import json
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

from magistral_mlx.errors import OptionError
from magistral_mlx.past import Past
from magistral_mlx.reasoning import Segment
from magistral_mlx.reply import Reply
from magistral_mlx.sampling import SamplingParams
from magistral_mlx.tool_calls import stated

KeepReasoning = Literal["all", "last", "none"]
Question = str | Mapping[str, str]  # the user's text, or the results of calls by their ids
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

    past: Past

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
    ) -> Generator[Segment, None, Reply]: ...


class Chat:
    """A conversation: each question sees the turns before it, with their traces kept or dropped.

    ``keep_reasoning``: "all" keeps every trace, "last" the newest, "none" drops them. The live cache
    is reused up to where the ids differ. A turn whose stream is closed early, or that brought no text,
    is forgotten; one that was cut off before its answer keeps its trace, which is all there is of it.

    ``tools``: functions the model may call, as OpenAI's tool definitions. A reply with ``tool_calls`` waits for their
    results: ``ask({call.id: result, ...})``. Until the question is answered, all traces since it are kept.
    """

    def __init__(
        self,
        magistral: Model,
        keep_reasoning: KeepReasoning,
        messages: list[dict[str, Any]],
        tools: Tools | None = None,
    ) -> None:
        if keep_reasoning not in get_args(KeepReasoning):
            raise OptionError(f"keep_reasoning is {keep_reasoning!r}; use {', '.join(get_args(KeepReasoning))}")
        self.magistral = magistral
        self.keep_reasoning = keep_reasoning
        self.messages = messages
        self.tools = tools

    def ask(self, question: Question, sampling: SamplingParams | None = None) -> Reply:
        """The whole reply to the next question, or to the results of the calls that wait, by the calls' ids.

        Raises:
            OptionError: calls wait for results and there is none, or one for another call; else as Magistral.ask.
        """
        return result_of(self.stream(question, sampling))

    def stream(self, question: Question, sampling: SamplingParams | None = None) -> Generator[Segment, None, Reply]:
        """As ``ask``, in pieces: a generator of Segments that returns the Reply."""
        asked = self._asked(question)
        messages = [*self._history(is_answered=isinstance(question, str)), *asked]
        return self._turn(asked, self.magistral.stream(messages, sampling, tools=self.tools))

    def save(self, path: str | Path) -> None:
        """Write the conversation and its cache to a file, atomically; ``Magistral.resume`` reads it."""
        state = {"keep_reasoning": self.keep_reasoning, "messages": self.messages, "tools": self.tools}
        self.magistral.past.save(Path(path), json.dumps(state, ensure_ascii=False))

    def _asked(self, question: Question) -> list[dict[str, Any]]:
        if not isinstance(question, str):
            return [{"role": "tool", "tool_call_id": call, "content": result} for call, result in question.items()]
        if waiting := [call["id"] for call in self.messages[-1].get("tool_calls", ())] if self.messages else []:
            raise OptionError(
                f"the tool call {waiting[0]!r} waits for its result; ask with {{{waiting[0]!r}: result}} before any "
                "other question"
            )
        return [{"role": "user", "content": question}]

    def _turn(
        self, asked: list[dict[str, Any]], stream: Generator[Segment, None, Reply]
    ) -> Generator[Segment, None, Reply]:
        reply = yield from stream
        calls = reply.tool_calls if self.tools else ()  # what was not offered cannot have a result
        if reply.reasoning or reply.answer or calls:
            answer = {"role": "assistant", "content": reply.answer, "reasoning": reply.reasoning}
            self.messages += [*asked, answer | ({"tool_calls": [stated(call) for call in calls]} if calls else {})]
        return reply

    def _history(self, *, is_answered: bool) -> list[dict[str, Any]]:
        """The turns so far, with the traces that are kept.

        Args:
            is_answered: False while the newest question waits for results.
        """
        messages = self.messages
        asked = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=0)
        begun = range(len(messages) if is_answered else asked, len(messages))  # of the newest question, all is kept
        newest = max((i for i, message in enumerate(messages[: begun.start]) if message.get("reasoning")), default=-1)
        kept = {"all": range(len(messages)), "last": [newest], "none": ()}[self.keep_reasoning]
        return [
            message
            if i in kept or i in begun or not (message["content"] or message.get("tool_calls"))
            else {key: value for key, value in message.items() if key != "reasoning"}
            for i, message in enumerate(messages)
        ]
