"""Requests: the arguments of ask, stream, sample and stream_samples, declared once."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from magistral_mlx.errors import OptionError, quoted
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.options import refused
from magistral_mlx.streams import Cancellation

Messages = str | Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of a request for one reply.

    Attributes:
        messages: the user's text, or [{"role": ..., "content": ...}, ...].
        sampling: how ids are chosen; the model card's values by default.
        tools: functions the model may call, as OpenAI's tool definitions.
        system_prompt_only: a system message replaces the checkpoint's instead of joining it; the
            model may then stop reasoning.
        prompt_cache_file: reuse the part of the prompt that this file holds, and write the cache
            there at the end.

    Raises:
        OptionError: ``sampling`` is something else.
    """

    messages: Messages
    sampling: SamplingParams | None = None
    _: KW_ONLY
    tools: Tools | None = None
    system_prompt_only: bool = False
    prompt_cache_file: str | Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, SamplingParams | None):
            raise OptionError(
                f"sampling is {quoted(self.sampling)}; use SamplingParams(...), or leave it out"
            )

    @property
    def params(self) -> SamplingParams:
        """The sampling that was asked for, or the default."""
        return self.sampling or SamplingParams()


@dataclass(frozen=True, slots=True)
class SampleRequest(Request):
    """A request for ``n`` replies.

    Raises:
        OptionError: ``n`` is no number of replies.
    """

    _: KW_ONLY
    n: int

    def __post_init__(self) -> None:
        Request.__post_init__(self)
        if type(self.n) is not int or self.n < 1:
            raise refused("n", self.n, "a whole number of at least 1")


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
