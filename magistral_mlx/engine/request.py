"""Requests: the arguments of ask, stream, sample and stream_samples, declared once."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from magistral_mlx.errors import OptionError, quoted
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.options import check_count, documented, explained, refused
from magistral_mlx.streams import Cancellation

Messages = str | Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
SAMPLING = "How ids are chosen: a SamplingParams, or its fields as keywords."


class Asked(SamplingParams):
    """A request, and its sampling: a SamplingParams, or its fields as keywords.

    Raises:
        OptionError: both are given, or ``sampling`` is something else.
    """

    __slots__ = ()
    sampling: SamplingParams | None

    def __new__(cls, *args: object, **keywords: object) -> Self:
        given = [found.name for found in fields(SamplingParams) if found.name in keywords]
        sampling = keywords.get("sampling", args[1] if len(args) > 1 else None)
        if given and sampling is not None:
            raise OptionError(
                f"both sampling and {given[0]} are given; put {given[0]} into the SamplingParams, "
                "or give keywords only"
            )
        return object.__new__(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, SamplingParams | None):
            raise OptionError(
                f"sampling is {quoted(self.sampling)}; use SamplingParams(...), or leave it out"
            )
        SamplingParams.__post_init__(self)

    @property
    def params(self) -> SamplingParams:
        """The sampling that was asked for, or the default."""
        own = {found.name: getattr(self, found.name) for found in fields(SamplingParams)}
        return self.sampling or SamplingParams(**own)


@documented
@dataclass(frozen=True, slots=True)
class Request(Asked):
    """A request for one reply."""

    messages: Messages = field(
        metadata=explained('The user\'s text, or [{"role": ..., "content": ...}, ...].')
    )
    sampling: SamplingParams | None = field(default=None, metadata=explained(SAMPLING))
    _: KW_ONLY
    tools: Tools | None = field(
        default=None,
        metadata=explained("Functions the model may call, as OpenAI's tool definitions."),
    )
    system_prompt: str | None = field(
        default=None, metadata=explained("A system prompt, added to the checkpoint's own.")
    )
    system_prompt_only: bool = field(
        default=False,
        metadata=explained(
            "The system prompt or message replaces the checkpoint's instead of joining it; the "
            "model may then stop reasoning."
        ),
    )
    prompt_cache_file: str | Path | None = field(
        default=None,
        metadata=explained(
            "Reuse the part of the prompt that this file holds, and write the cache there at the "
            "end."
        ),
    )

    @property
    def conversation(self) -> Messages:
        """The messages, after the system prompt if there is one."""
        if self.system_prompt is None:
            return self.messages
        asked = self.messages
        if isinstance(asked, str):
            asked = [{"role": "user", "content": asked}]
        elif not isinstance(asked, Sequence):
            return asked  # refused by the tokenizer
        return [{"role": "system", "content": self.system_prompt}, *asked]


@documented
@dataclass(frozen=True, slots=True)
class SampleRequest(Request):
    """A request for ``n`` replies.

    Raises:
        OptionError: ``n`` is no number of replies.
    """

    _: KW_ONLY
    n: int = field(metadata=explained("How many replies."))

    def __post_init__(self) -> None:
        Request.__post_init__(self)
        if type(self.n) is not int or self.n < 1:
            raise refused("n", self.n, "a whole number of at least 1")
        check_count("n", self.n, 1)


@dataclass(frozen=True, slots=True)
class Question(Asked):
    """The next question of a conversation."""

    question: str = field(metadata=explained("The text."))
    sampling: SamplingParams | None = field(default=None, metadata=explained(SAMPLING))


@dataclass(frozen=True, slots=True)
class CallResults(Asked):
    """The results of the tool calls that wait in a conversation."""

    results: Mapping[str, str] = field(metadata=explained("A text for the id of each call."))
    sampling: SamplingParams | None = field(default=None, metadata=explained(SAMPLING))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A checked request: ids to continue, and the limits of what continues them.

    Attributes:
        max_tokens: the most ids of the reply, or of each reply.
        cancellation: asks the reply to end; set from any thread.
    """

    prompt: list[int]
    sampling: SamplingParams
    seed: int
    max_tokens: int
    cancellation: Cancellation = field(default_factory=Cancellation)
