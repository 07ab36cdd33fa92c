"""Several replies to one prompt: the memory they may take, and their decoding together."""

import time
from bisect import bisect_left
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.engine.reply_stream import Runtime
from magistral_mlx.engine.request import Job
from magistral_mlx.errors import CancelledError, MemoryLimitError, in_units, named
from magistral_mlx.generation.batch import BatchStepper, decode_rows
from magistral_mlx.generation.decoding import Stepper, Token, prefill
from magistral_mlx.generation.reply import FinishReason, Reply, ReplyBuilder, Samples, Usage
from magistral_mlx.model.kv_cache import STEP
from magistral_mlx.model.memory import REPLY_ROOM, MemoryPlan
from magistral_mlx.model.shared_cache import SharedCache
from magistral_mlx.streams import Stream
from magistral_mlx.tokenizer.segments import Segment


@dataclass(frozen=True, slots=True)
class SampleBudget:
    """The memory that several replies may use.

    Attributes:
        max_tokens: tokens of each reply.
        prompt_bytes: bytes of the cache that holds their prompt.
    """

    max_tokens: int
    prompt_bytes: int


def plan_samples(
    plan: MemoryPlan, config: ModelConfig, prompt_tokens: int, n: int, asked: int | None
) -> SampleBudget:
    """Plan ``n`` replies of ``asked`` tokens, or of as many as fit side by side.

    The prompt is held once and n continuations beside it. While these grow, one layer of them is
    held twice.

    Raises:
        MemoryLimitError: the tokens asked for do not fit, or not 256 tokens each; the message
            names what would fit.
        ContextError: not even one reply fits the context; see ``MemoryPlan.reply_tokens``.
    """
    single = plan.reply_tokens(prompt_tokens, asked)
    if n == 1:
        return SampleBudget(single, plan.kv_bytes)
    position_bytes = plan.kv_bytes / plan.context
    prompt_bytes = -(-prompt_tokens // STEP) * STEP * position_bytes
    token_bytes = position_bytes * (1 + 2 / config.num_layers)
    # Sampling; attention scores and their softmax.
    row_bytes = 48 * config.vocab_size + 16 * config.num_heads * plan.context

    def left(count: int) -> float:
        """Return the bytes that the caches of ``count`` replies may take."""
        workspace = max(plan.workspace_bytes, count * row_bytes)
        others = plan.total_bytes - plan.kv_bytes - plan.workspace_bytes
        return plan.budget_bytes - others - workspace

    def fitting(count: int) -> int:
        """Return the tokens that each of ``count`` replies may have."""
        return max(0, int((left(count) - prompt_bytes) / (count * token_bytes)))

    wanted = min(REPLY_ROOM, single) if asked is None else asked
    if fitting(n) >= wanted:
        tokens = min(single, fitting(n))
        return SampleBudget(tokens, int(left(n) - n * tokens * token_bytes))
    fewer = 1 + bisect_left(
        range(2, min(n, 2**31)), True, key=lambda count: fitting(count) < wanted
    )
    ways = [f"{fewer} of them ({named('n', fewer)})"]
    if asked is not None and fitting(n):
        ways.append(f"{n} of {fitting(n)} tokens ({named('max_tokens', fitting(n))})")
    if plan.kv_bits != 4:
        ways.append(f"a cache of fewer bits ({named('kv_bits')})")
    needed = n * wanted * token_bytes + left(1) - left(n)
    raise MemoryLimitError(
        f"{n} replies of {wanted} tokens need {in_units(needed)} beside a prompt of "
        f"{prompt_tokens}, and {in_units(max(0.0, left(1) - prompt_bytes))} are left; "
        f"what helps: {', or '.join(ways)}"
    )


class Candidate:
    """One of the replies in progress."""

    def __init__(self, seed: int, builder: ReplyBuilder) -> None:
        self.seed, self.builder = seed, builder
        self.first_token = 0.0

    def take(self, token: Token) -> bool:
        """Take the next id; return False once a stop string or a loop has ended the reply."""
        self.first_token = self.first_token or time.perf_counter()
        self.builder.push(token)
        return not self.builder.is_stopped

    def forced(self, logits: mx.array, draw: mx.array) -> Sequence[int]:
        """Return the ids to force instead of the next id."""
        return self.builder.forced(logits, draw)


class SampleRun:
    """Replies to one prompt with consecutive seeds, each as it would be alone.

    The prompt is read once, into the prefix cache, where it stays for the next request. Every pass
    then takes all replies one id further. Nothing is drafted: a pass has several rows already.
    """

    def __init__(self, runtime: Runtime, job: Job, n: int, prompt_bytes: int) -> None:
        """Prepare ``n`` replies, with ``prompt_bytes`` for the cache that holds the prompt."""
        self.runtime, self.job, self.prompt_bytes = runtime, job, prompt_bytes
        self.candidates = [
            Candidate(seed, ReplyBuilder(runtime.tokenizer, job.sampling, job.max_tokens))
            for seed in range(job.seed, job.seed + n)
        ]
        self.builders = [candidate.builder for candidate in self.candidates]
        self.steps: list[Stepper | BatchStepper] = []
        self.started = 0.0
        self.cached = 0

    def replies(self) -> Generator[Reply, None, Samples]:
        """Yield each reply as soon as it has ended, and return all of them.

        Once cancelled, or interrupted by Ctrl-C, yield what there is of the others. After them
        KeyboardInterrupt goes on. A run that is cancelled before its first step leaves the prefix
        cache alone.
        """
        mx.reset_peak_memory()
        self.started = time.perf_counter()
        waiting = list(self.candidates)
        found: list[Reply] = []
        interruption: KeyboardInterrupt | None = None
        try:
            self.job.cancellation.check()
            self.cached = self.runtime.prefix_cache.acquire(self, self.job.prompt)
            with self.runtime.prefix_cache.held_by(self):
                for index, reason in self._decode():
                    waiting.remove(self.candidates[index])
                    found.append(self._finish(self.candidates[index], reason))
                    yield found[-1]
        except CancelledError:
            pass
        except KeyboardInterrupt as error:
            interruption = error
        for candidate in waiting:
            found.append(self._finish(candidate, "cancelled"))
            yield found[-1]
        if interruption is not None:
            raise interruption
        return Samples.from_replies(found)

    def _decode(self) -> Generator[tuple[int, FinishReason], None, None]:
        """Read the prompt, then yield (candidate, reason) as the replies end.

        Raises:
            CancelledError: the replies that have not ended are cancelled.
        """
        cache = self.runtime.prefix_cache.cache
        cache.reserve(len(self.job.prompt))
        reader = Stepper(self.runtime.model, cache)
        self.steps.append(reader)
        unread = self.job.prompt[self.cached :]
        reading = prefill(reader, unread, chunk=self.runtime.chunk)
        for _ in reading:
            self._check()
        logits = reading.result()
        if cache.nbytes > self.prompt_bytes:
            cache.shrink()
        shared = SharedCache(cache, len(self.candidates), limit=self.job.max_tokens)
        batch = BatchStepper(self.runtime.model, shared)
        self.steps.append(batch)
        self._check()
        for ended in decode_rows(
            batch,
            logits,
            self.job.sampling,
            self.candidates,
            stop=self.runtime.tokenizer.stop_ids,
            max_tokens=self.job.max_tokens,
        ):
            yield from ended
            self._check()

    def _check(self) -> None:
        """Raise CancelledError, or OptionError where a newer reply has the cache."""
        self.runtime.prefix_cache.check_holder(self)
        self.job.cancellation.check()

    def _finish(self, candidate: Candidate, reason: FinishReason) -> Reply:
        builder = candidate.builder
        builder.flush()
        ended = time.perf_counter()
        first_token = candidate.first_token or ended
        usage = Usage(
            prompt_tokens=len(self.job.prompt),
            completion_tokens=builder.tokens,
            reasoning_tokens=builder.reasoning_tokens,
            cached_tokens=self.cached,
            forward_passes=sum(step.passes for step in self.steps),
            prefill_seconds=first_token - self.started,
            decode_seconds=ended - first_token,
            peak_memory_bytes=mx.get_peak_memory(),
            max_tokens=self.job.max_tokens,
            seed=candidate.seed,
        )
        return builder.reply(reason, usage)


def only_sample(stream: Stream[Segment, Reply]) -> Generator[Reply, None, Samples]:
    """Yield the reply of a stream and return it as Samples."""
    reply = stream.result()
    yield reply
    return Samples.from_replies([reply])
