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

KeepReasoning = Literal["all", "last", "none"]
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
        self, messages: Sequence[Mapping[str, Any]], sampling: SamplingParams | None = None
    ) -> Generator[Segment, None, Reply]: ...


class Chat:
    """A conversation: each question sees the turns before it, with their traces kept or dropped.

    ``keep_reasoning``: "all" keeps every trace, "last" the newest, "none" drops them. The live cache
    is reused up to where the ids differ. A turn whose stream is closed early, or that brought no text,
    is forgotten; one that was cut off before its answer keeps its trace, which is all there is of it.
    """

    def __init__(self, magistral: Model, keep_reasoning: KeepReasoning, messages: list[dict[str, Any]]) -> None:
        if keep_reasoning not in get_args(KeepReasoning):
            raise OptionError(f"keep_reasoning is {keep_reasoning!r}; use {', '.join(get_args(KeepReasoning))}")
        self.magistral = magistral
        self.keep_reasoning = keep_reasoning
        self.messages = messages

    def ask(self, text: str, sampling: SamplingParams | None = None) -> Reply:
        """The whole reply to the next question; errors as in Magistral.ask."""
        return result_of(self.stream(text, sampling))

    def stream(self, text: str, sampling: SamplingParams | None = None) -> Generator[Segment, None, Reply]:
        """As ``ask``, in pieces: a generator of Segments that returns the Reply."""
        question = {"role": "user", "content": text}
        return self._turn(question, self.magistral.stream([*self._history(), question], sampling))

    def save(self, path: str | Path) -> None:
        """Write the conversation and its cache to a file, atomically; ``Magistral.resume`` reads it."""
        state = {"keep_reasoning": self.keep_reasoning, "messages": self.messages}
        self.magistral.past.save(Path(path), json.dumps(state, ensure_ascii=False))

    def _turn(
        self, question: dict[str, Any], stream: Generator[Segment, None, Reply]
    ) -> Generator[Segment, None, Reply]:
        reply = yield from stream
        if reply.reasoning or reply.answer:
            answer = {"role": "assistant", "content": reply.answer, "reasoning": reply.reasoning}
            self.messages += [question, answer]
        return reply

    def _history(self) -> list[dict[str, Any]]:
        """The turns so far, with the traces that are kept."""
        last = max((i for i, m in enumerate(self.messages) if m["role"] == "assistant"), default=-1)
        kept = {"all": range(len(self.messages)), "last": [last], "none": ()}[self.keep_reasoning]
        return [
            m if i in kept or not m["content"] else {k: v for k, v in m.items() if k != "reasoning"}
            for i, m in enumerate(self.messages)
        ]
