"""One reply: read the part of the prompt that is not cached, then decode to the end."""

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx

from magistral_mlx.engine.prefix_cache import PrefixCache
from magistral_mlx.engine.request import Job
from magistral_mlx.errors import CancelledError
from magistral_mlx.generation.decoding import Stepper, decode, prefill
from magistral_mlx.generation.reply import FinishReason, Reply, ReplyBuilder, Usage
from magistral_mlx.generation.sampling import Sampler
from magistral_mlx.generation.speculation import Speculation
from magistral_mlx.model.transformer import Transformer
from magistral_mlx.streams import Progress, Stream
from magistral_mlx.tokenizer.segments import Segment
from magistral_mlx.tokenizer.tekken import Tokenizer

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """The parts of a loaded model that make replies.

    Attributes:
        chunk: prompt ids a pass.
    """

    model: Transformer
    tokenizer: Tokenizer
    prefix_cache: PrefixCache
    speculation: Speculation
    chunk: int


class ReplyRun:
    """One reply in progress. It stays in the prefix cache, where the next prompt finds it."""

    def __init__(self, runtime: Runtime, job: Job) -> None:
        self.runtime, self.job = runtime, job
        self.builder = ReplyBuilder(runtime.tokenizer, job.sampling, job.max_tokens)
        self.builders = [self.builder]
        self.passes = self.cached = 0
        self.started = self.first_token = 0.0

    def segments(self) -> Generator[Segment, None, Reply]:
        """Yield the reply's segments as they come and return the reply.

        A reply that is cancelled before its first step leaves the prefix cache alone.
        """
        mx.reset_peak_memory()
        self.started = time.perf_counter()
        finish_reason: FinishReason = "cancelled"
        if not self.job.cancellation.is_requested:
            finish_reason = yield from self._run()
        return self.builder.reply(finish_reason, self._usage())

    def _run(self) -> Generator[Segment, None, FinishReason]:
        """Read and decode with the prefix cache; a cancelled reply keeps what there is of it."""
        job, prefix_cache = self.job, self.runtime.prefix_cache
        self.cached = prefix_cache.acquire(self, job.prompt)
        if job.sampling.max_tokens is not None:
            prefix_cache.cache.reserve(len(job.prompt) + job.max_tokens)
        step = Stepper(self.runtime.model, prefix_cache.cache)
        finish_reason: FinishReason = "cancelled"
        with prefix_cache.held_by(self):
            try:
                finish_reason = yield from self._read_and_decode(step)
            except CancelledError:
                pass
            except RuntimeError:
                self.runtime.speculation.reset()
                raise
            finally:
                self.passes = step.passes
            yield from self.builder.flush()
        return finish_reason

    def _read_and_decode(self, step: Stepper) -> Generator[Segment, None, FinishReason]:
        job, runtime = self.job, self.runtime
        sampler = Sampler(job.sampling, job.seed)
        unread = job.prompt[self.cached :]
        logits = yield from self._read(prefill(step, unread, chunk=runtime.chunk), self.cached)
        drafting = runtime.speculation.drafter_for(job.prompt, sampler, chunk=runtime.chunk)
        drafter = yield from self._read(drafting)
        decoding = Stream(
            decode(
                step,
                logits,
                sampler,
                stop=runtime.tokenizer.stop_ids,
                max_tokens=job.max_tokens,
                steer=self.builder.forced,
                drafter=drafter,
            )
        )
        for token in decoding:
            self.first_token = self.first_token or time.perf_counter()
            runtime.prefix_cache.ids.append(token.id)
            yield from self.builder.push(token)
            if self.builder.is_stopped:
                return "stop"
            self._check()
        return decoding.result()

    def _read(
        self, reading: Stream[int, Result], done: int = 0
    ) -> Generator[Progress, None, Result]:
        """Yield the progress of reading the prompt, of which ``done`` ids were read before."""
        for ids in reading:
            yield Progress(done + ids, len(self.job.prompt))
            self._check()
        self._check()
        return reading.result()

    def _check(self) -> None:
        """Raise CancelledError, or OptionError where a newer reply has the cache."""
        self.runtime.prefix_cache.check_holder(self)
        self.job.cancellation.check()

    def _usage(self) -> Usage:
        ended = time.perf_counter()
        first_token = self.first_token or ended
        return Usage(
            prompt_tokens=len(self.job.prompt),
            completion_tokens=self.builder.tokens,
            reasoning_tokens=self.builder.reasoning_tokens,
            cached_tokens=self.cached,
            forward_passes=self.passes,
            prefill_seconds=first_token - self.started,
            decode_seconds=ended - first_token,
            peak_memory_bytes=mx.get_peak_memory(),
            max_tokens=self.job.max_tokens,
            seed=self.job.seed,
        )
