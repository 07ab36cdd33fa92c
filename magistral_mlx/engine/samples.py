"""Several replies to one prompt: what each may take, and how they come to be side by side."""

import time
from bisect import bisect_left
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.engine.prefix_cache import PrefixCache
from magistral_mlx.errors import MemoryLimitError, in_units
from magistral_mlx.generation.batch import BatchStepper, decode_rows
from magistral_mlx.generation.decoding import Stepper, prefill
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import FinishReason, Reply, ReplyBuilder, Usage
from magistral_mlx.model.kv_cache import STEP
from magistral_mlx.model.memory import REPLY_ROOM, MemoryPlan
from magistral_mlx.model.shared_cache import SharedCache
from magistral_mlx.model.transformer import Transformer
from magistral_mlx.tokenizer.tekken import Tokenizer


@dataclass(frozen=True, slots=True)
class SampleBudget:
    """What several replies may use."""

    max_tokens: int  # each
    prompt_bytes: int  # of the cache that holds their prompt


def plan_samples(
    plan: MemoryPlan, config: ModelConfig, prompt_tokens: int, n: int, asked: int | None
) -> SampleBudget:
    """Tokens for each of ``n`` replies: as asked, or as many as fit side by side of what one may take.

    The prompt is held once, and n continuations beside it; while these grow, one layer's are held twice.

    Raises:
        MemoryLimitError: what was asked for does not fit, or not 256 tokens each; the message names what would.
        ContextError: not even one reply fits the context; see ``MemoryPlan.reply_tokens``.
    """
    single = plan.reply_tokens(prompt_tokens, asked)
    if n == 1:
        return SampleBudget(single, plan.kv_bytes)
    position_bytes = plan.kv_bytes / plan.context
    prompt_bytes = -(-prompt_tokens // STEP) * STEP * position_bytes
    token_bytes = position_bytes * (1 + 2 / config.num_layers)
    row_bytes = (
        48 * config.vocab_size + 16 * config.num_heads * plan.context
    )  # sampling; scores and their softmax

    def left(count: int) -> float:
        """Bytes for the caches of ``count`` replies."""
        workspace = max(plan.workspace_bytes, count * row_bytes)
        return (
            plan.budget_bytes
            - (plan.total_bytes - plan.kv_bytes - plan.workspace_bytes)
            - workspace
        )

    def fitting(count: int) -> int:
        return max(0, int((left(count) - prompt_bytes) / (count * token_bytes)))

    wanted = min(REPLY_ROOM, single) if asked is None else asked
    if fitting(n) >= wanted:
        tokens = min(single, fitting(n))
        return SampleBudget(tokens, int(left(n) - n * tokens * token_bytes))
    fewer = 1 + bisect_left(
        range(2, min(n, 2**31)), True, key=lambda count: fitting(count) < wanted
    )
    ways = [f"{fewer} of them (--samples {fewer})"]
    ways += (
        []
        if asked is None or not fitting(n)
        else [f"{n} of {fitting(n)} tokens (--max-tokens {fitting(n)})"]
    )
    ways += [] if plan.kv_bits == 4 else ["a cache of fewer bits (--kv-bits)"]
    raise MemoryLimitError(
        f"{n} replies of {wanted} tokens need {in_units(n * wanted * token_bytes + left(1) - left(n))} beside a "
        f"prompt of {prompt_tokens}, and {in_units(max(0, left(1) - prompt_bytes))} are left; "
        f"what helps: {', or '.join(ways)}"
    )


@dataclass
class Candidate:
    """One reply under way."""

    seed: int
    builder: ReplyBuilder
    began: float = 0.0  # when its first id was there

    def take(self, identity: int, logits: mx.array) -> bool:
        self.began = self.began or time.perf_counter()
        self.builder.push(identity, logits)
        return not self.builder.is_stopped

    def forced(self, logits: mx.array, drawn: mx.array) -> Sequence[int]:
        return self.builder.forced(logits, drawn)


@dataclass(kw_only=True)
class SampleRun:
    """Replies to one prompt, with seeds of their own, each as it would be alone.

    The prompt is read once, into the live cache, where it stays for the next request; every pass then takes all
    of them one id further. Nothing is drafted: a pass has several rows already.
    """

    model: Transformer
    tokenizer: Tokenizer
    prefix_cache: PrefixCache
    chunk: int  # prompt ids a pass
    prompt: list[int]
    sampling: SamplingParams
    seeds: Sequence[int]
    share: SampleBudget
    started: float = 0.0
    cached: int = 0
    steps: list[Stepper | BatchStepper] = field(default_factory=list)
    candidates: list[Candidate] = field(init=False)

    def __post_init__(self) -> None:
        builders = [
            ReplyBuilder(self.tokenizer, self.sampling, self.share.max_tokens) for _ in self.seeds
        ]
        self.candidates = [Candidate(*pair) for pair in zip(self.seeds, builders, strict=True)]

    def replies(self) -> Generator[Reply, None, None]:
        """Each reply as soon as it has ended; once cancelled, what there is of the others.

        On Ctrl-C too: KeyboardInterrupt goes on after the last of them.
        """
        mx.reset_peak_memory()
        self.started = time.perf_counter()
        candidates = self.candidates
        waiting = list(candidates)
        self.cached = self.prefix_cache.acquire(self, self.prompt)
        interruption: KeyboardInterrupt | None = None
        with self.prefix_cache.held_by(self):
            try:
                for index, reason in self._ended(candidates):
                    waiting.remove(candidates[index])
                    yield self._finish(candidates[index], reason)
            except KeyboardInterrupt as error:
                interruption = error
        for candidate in waiting:
            yield self._finish(candidate, "cancelled")
        if interruption is not None:
            raise interruption

    def _ended(
        self, candidates: list[Candidate]
    ) -> Generator[tuple[int, FinishReason], None, None]:
        """Read the prompt, then draw: which candidate has ended and why, until all have or are cancelled."""
        cache = self.prefix_cache.cache
        cache.reserve(len(self.prompt))
        reading = Stepper(self.model, cache)
        self.steps.append(reading)
        chunks = prefill(reading, self.prompt[self.cached :], chunk=self.chunk)
        logits: mx.array | None = None
        while logits is None:
            if not self.prefix_cache.check_owner(self):
                return
            try:
                next(chunks)
            except StopIteration as end:
                logits = end.value
        if cache.nbytes > self.share.prompt_bytes:
            cache.shrink()
        most = self.share.max_tokens
        batch = BatchStepper(self.model, SharedCache(cache, len(candidates), limit=most))
        self.steps.append(batch)
        stop = self.tokenizer.stop_ids
        decoding = decode_rows(batch, logits, self.sampling, candidates, stop=stop, max_tokens=most)
        while self.prefix_cache.check_owner(self) and (ended := next(decoding, None)) is not None:
            yield from ended

    def _finish(self, candidate: Candidate, reason: FinishReason) -> Reply:
        builder = candidate.builder
        builder.flush()
        ended = time.perf_counter()
        began = candidate.began or ended
        usage = Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=builder.tokens,
            reasoning_tokens=builder.reasoning_tokens,
            cached_tokens=self.cached,
            forward_passes=sum(step.passes for step in self.steps),
            prefill_seconds=began - self.started,
            decode_seconds=ended - began,
            peak_memory_bytes=mx.get_peak_memory(),
            max_tokens=self.share.max_tokens,
            seed=candidate.seed,
        )
        return builder.reply(reason, usage)
