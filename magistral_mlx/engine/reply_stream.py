"""One reply to a prompt: what is new of it read, then ids drawn or guessed until it ends."""

import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from magistral_mlx.engine.prefix_cache import PrefixCache
from magistral_mlx.generation.decoding import Stepper, decode, prefill
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import FinishReason, Reply, ReplyBuilder, Usage
from magistral_mlx.generation.sampling import Sampler
from magistral_mlx.generation.speculation import Speculation
from magistral_mlx.model.transformer import Transformer
from magistral_mlx.streams import Progress
from magistral_mlx.tokenizer.segments import Segment
from magistral_mlx.tokenizer.tekken import Tokenizer


@dataclass(kw_only=True)
class ReplyRun:
    """A reply, and in the live cache the prompt with it, where the next request finds them."""

    model: Transformer
    tokenizer: Tokenizer
    prefix_cache: PrefixCache
    speculation: Speculation
    chunk: int  # prompt ids a pass
    prompt: list[int]
    sampling: SamplingParams
    seed: int
    max_tokens: int
    first: float = 0.0  # when its first id was there
    builder: ReplyBuilder = field(init=False)

    def __post_init__(self) -> None:
        self.builder = ReplyBuilder(self.tokenizer, self.sampling, self.max_tokens)

    def stream(self) -> Generator[Segment, None, Reply]:
        """Its segments as they come; returns the reply."""
        mx.reset_peak_memory()
        started = time.perf_counter()
        builder = self.builder
        cached = self.prefix_cache.acquire(self, self.prompt)
        if self.sampling.max_tokens is not None:
            self.prefix_cache.cache.reserve(len(self.prompt) + self.max_tokens)
        step = Stepper(self.model, self.prefix_cache.cache)
        with self.prefix_cache.held_by(self):
            try:
                finish_reason = yield from self._segments(step, cached, builder)
            except RuntimeError:
                self.speculation.reset()
                raise
        ended = time.perf_counter()
        first = self.first or ended
        usage = Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=builder.tokens,
            reasoning_tokens=builder.reasoning_tokens,
            cached_tokens=cached,
            forward_passes=step.passes,
            prefill_seconds=first - started,
            decode_seconds=ended - first,
            peak_memory_bytes=mx.get_peak_memory(),
            max_tokens=self.max_tokens,
            seed=self.seed,
        )
        return builder.reply(finish_reason, usage)

    def _segments(
        self, step: Stepper, cached: int, builder: ReplyBuilder
    ) -> Generator[Segment, None, FinishReason]:
        """Read, then draw until the reply ends or is cancelled; returns how it did."""
        finish_reason: FinishReason = "stop"
        reading = self._reading(step, cached, builder)
        decoding: Any = None  # until the prompt is read, or for good if it was cancelled before
        while decoding is None and self.prefix_cache.check_owner(self):
            try:
                done = next(reading)
                yield Progress(cached + done, len(self.prompt))
            except StopIteration as end:
                decoding = end.value
        while not builder.is_stopped:
            if not self.prefix_cache.check_owner(self):
                finish_reason = "cancelled"
                break
            try:
                identity, logits = next(decoding)
            except StopIteration as end:
                finish_reason = end.value
                break
            finally:
                self.first = self.first or time.perf_counter()
            self.prefix_cache.ids.append(identity)
            yield from builder.push(identity, logits)
        yield from builder.flush()
        return finish_reason

    def _reading(
        self, step: Stepper, cached: int, builder: ReplyBuilder
    ) -> Generator[int, None, Generator[tuple[int, mx.array], None, str]]:
        """Read what is new in the prompt; yields the ids done after each chunk but the last, returns what decodes."""
        new, sampler = self.prompt[cached:], Sampler(self.sampling, self.seed)
        logits = yield from prefill(step, new, chunk=self.chunk)
        drafter = yield from self.speculation.begin(
            self.prompt, sampler, chunk=self.chunk, done=len(new)
        )
        stop, most = self.tokenizer.stop_ids, self.max_tokens
        return decode(
            step, logits, sampler, stop=stop, max_tokens=most, steer=builder.forced, drafter=drafter
        )
