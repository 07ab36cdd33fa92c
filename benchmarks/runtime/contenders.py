"""The contenders: ours and mlx-lm. Each reads a prompt and then decodes greedily."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.measure import Lap, Run, Stopwatch
from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import Checkpoint
from magistral_mlx.errors import OptionError
from magistral_mlx.generation.decoding import Stepper, decode, prefill
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.sampling import Sampler
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.loader import load_model
from magistral_mlx.model.transformer import Transformer

ENDS = ("model.embed_tokens.weight", "lm_head.weight")  # a prefill uses a row of each


@dataclass(frozen=True, slots=True)
class Workload:
    """A prompt, the greedy ids after its first one, and the repeats."""

    prompt_tokens: int
    decode_tokens: int
    repeats: int

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.decode_tokens < 1 or self.repeats < 1:
            raise OptionError(f"{self} cannot be timed; every number must be at least 1")


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt, and how many ids are decoded after the first."""

    prompt: Sequence[int]
    decode_tokens: int

    @property
    def total(self) -> int:
        return self.decode_tokens + 1


@dataclass
class Pool:
    """The contenders in memory: all of them, or one at a time if they do not fit together."""

    one_at_a_time: bool
    _loaded: dict[str, Run] = field(default_factory=dict)

    def runs(self, contenders: Mapping[str, Callable[[], Run]]) -> dict[str, Run]:
        return {name: self._run(name, load) for name, load in contenders.items()}

    def _run(self, name: str, load: Callable[[], Run]) -> Run:
        def act() -> Mapping[str, Lap]:
            if name not in self._loaded:
                if self.one_at_a_time:
                    self.clear()
                self._loaded[name] = load()
                if self.one_at_a_time:
                    self._loaded[name]()  # the first pass compiles kernels
            return self._loaded[name]()

        return act

    def clear(self) -> None:
        self._loaded.clear()
        gc.collect()
        mx.clear_cache()


def random_ids(config: ModelConfig, count: int) -> list[int]:
    ids: list[int] = np.random.default_rng(0).integers(0, config.vocab_size, count).tolist()
    return ids


def load_ours(checkpoint: Checkpoint) -> Transformer:
    return load_model(checkpoint).result()


def load_mlx_lm(folder: Path, dtype: mx.Dtype | None = None) -> Any:
    """Load mlx-lm's model; ``dtype`` is what its arrays that are not packed are cast to."""
    from mlx_lm.utils import load_model as load_theirs

    model, _ = load_theirs(folder)
    if dtype is not None:
        model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def read_prompt(step: Stepper, prompt: Sequence[int], chunk: int) -> mx.array:
    """Return the logits after a prompt that is read ``chunk`` ids a pass."""
    logits = prefill(step, list(prompt), chunk=chunk).result()
    mx.eval(logits)
    return logits


def ours(checkpoint: Checkpoint, job: Job, chunk: int, reply: list[int]) -> Run:
    """Return our run of a job; ``chunk`` is the ids that a pass of the prompt reads."""
    model = load_ours(checkpoint)
    greedy = Sampler(SamplingParams(temperature=0), seed=0)

    def run() -> Mapping[str, Lap]:
        watch = Stopwatch()
        step = Stepper(model, KVCache(checkpoint.config, limit=len(job.prompt) + job.total))
        logits = read_prompt(step, job.prompt, chunk)
        tokens = decode(step, logits, greedy, stop=frozenset(), max_tokens=job.total)
        return timed((token.id for token in tokens), len(job.prompt), watch, reply)

    return run


def mlx_lm(folder: Path, dtype: mx.Dtype | None, job: Job, reply: list[int]) -> Run:
    from mlx_lm.generate import generate_step, generation_stream

    model = load_mlx_lm(folder, dtype)

    def run() -> Mapping[str, Lap]:
        watch = Stopwatch()
        steps = generate_step(mx.array(list(job.prompt)), model, max_tokens=job.total)
        laps = timed((identity for identity, _ in steps), len(job.prompt), watch, reply)
        mx.synchronize(generation_stream)  # it queues one pass more than it yields
        return laps

    return run


def timed(
    ids: Iterator[Any], prompt_tokens: int, watch: Stopwatch, reply: list[int]
) -> dict[str, Lap]:
    """Time prefill up to the first id, and decode from there to the last."""
    reply[:] = [next(ids)]
    laps = {"prefill": watch.lap(prompt_tokens)}
    reply.extend(ids)
    return laps | {"decode": watch.lap(len(reply) - 1)}


def times_as_long(config: ModelConfig, before: int, after: int) -> float:
    """Return the multiply-adds of a prefill of ``after`` ids over those of ``before`` ids.

    Every id meets all weights of the layers, and attends to each position up to its own.
    """
    weights = sum(prod(shape) for name, shape in config.shapes.items() if name not in ENDS)
    pair = config.num_layers * config.num_heads * config.head_dim
    return after * (weights + pair * after) / (before * (weights + pair * before))
