"""A model whose reply is written beforehand, and which records how it was asked."""

from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from typing import Any

from magistral_mlx import generate
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import Reply, Usage
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.streams import Progress, streamed
from magistral_mlx.tokenizer.segments import Segment, Text

USAGE = Usage(
    prompt_tokens=20,
    completion_tokens=11,
    reasoning_tokens=6,
    cached_tokens=4,
    forward_passes=12,
    prefill_seconds=0.5,
    decode_seconds=2.0,
    peak_memory_bytes=1_500_000_000,
    max_tokens=99,
    seed=7,
)
REPLY = Reply("8+6=14", "It is 124.", (), "stop", "model", USAGE)
SEGMENTS = [
    Progress(16, 20),
    Text("reasoning", "8+6"),
    Text("reasoning", "=14"),
    Text("answer", "It is "),
    Text("answer", "124."),
]


@dataclass
class Scripted:
    """A model with scripted segments that records how it was asked."""

    segments: list[Segment] = field(default_factory=lambda: list(SEGMENTS))
    reply: Reply = REPLY
    interrupt_after: int | None = None
    asked: list[Any] = field(default_factory=list)
    loaded: dict[str, Any] = field(default_factory=dict)
    is_closed: bool = False
    tokens_so_far: int = 0

    @streamed
    def loading(self, model: str, options: LoadOptions) -> Generator[Progress, None, "Scripted"]:
        self.loaded = {"model": model} | asdict(options)
        yield Progress(1, 2)
        yield Progress(2, 2)
        return self

    @streamed
    def stream(
        self, messages: Any, sampling: SamplingParams, **options: Any
    ) -> Generator[Segment, None, Reply]:
        self.asked.append((messages, sampling, options))
        try:
            for i, segment in enumerate(self.segments):
                if i == self.interrupt_after:
                    raise KeyboardInterrupt
                yield segment
            return self.reply
        finally:
            self.is_closed = True

    def chat(self, **options: Any) -> None:
        self.asked.append(options)

    @streamed
    def stream_samples(
        self, messages: Any, sampling: SamplingParams, *, n: int, **options: Any
    ) -> Generator[Reply, None, None]:
        self.asked.append((messages, sampling, options))
        for i in range(n):
            if i == self.interrupt_after:
                raise KeyboardInterrupt
            yield self.reply


def run(*arguments: str) -> int:
    """Ask a question on the command line."""
    return generate.main(["--model", "m", "--prompt", "What is 48 + 76?", *arguments])
