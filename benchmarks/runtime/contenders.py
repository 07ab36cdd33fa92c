"""What is timed side by side: ours, mlx-lm, llama.cpp; each reads a prompt and decodes greedily after it."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.measure import Lap, Run, Stopwatch
from magistral_mlx.checkpoint.folder import Checkpoint
from magistral_mlx.generation.decoding import Stepper, decode, prefill
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.sampling import Sampler
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.loader import load_model


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt, and how many ids are decoded after the first."""

    prompt: Sequence[int]
    decode_tokens: int

    @property
    def total(self) -> int:
        return self.decode_tokens + 1


@dataclass(frozen=True, slots=True)
class Loaded:
    """A contender in memory."""

    run: Run
    close: Callable[[], None] = lambda: None


@dataclass
class Memory:
    """The contenders that are loaded: all of them, or where they do not fit together one at a time."""

    one_at_a_time: bool
    _loaded: dict[str, Loaded] = field(default_factory=dict)

    def runs(self, contenders: Mapping[str, Callable[[], Loaded]]) -> dict[str, Run]:
        return {name: self._run(name, load) for name, load in contenders.items()}

    def _run(self, name: str, load: Callable[[], Loaded]) -> Run:
        def act() -> Mapping[str, Lap]:
            if name not in self._loaded:
                if self.one_at_a_time:
                    self.clear()
                self._loaded[name] = load()
                if self.one_at_a_time:
                    self._loaded[name].run()  # what a first pass alone pays
            return self._loaded[name].run()

        return act

    def clear(self) -> None:
        for loaded in self._loaded.values():
            loaded.close()
        self._loaded.clear()
        gc.collect()
        mx.clear_cache()


def ours(checkpoint: Checkpoint, job: Job, chunk: int, reply: list[int]) -> Loaded:
    """``chunk``: ids a pass of the prompt."""
    model = load_model(checkpoint).result()
    greedy = Sampler(SamplingParams(temperature=0), seed=0)

    def run() -> Mapping[str, Lap]:
        watch = Stopwatch()
        cache = KVCache(checkpoint.config, limit=len(job.prompt) + job.total)
        step = Stepper(model, cache)
        logits = prefill(step, list(job.prompt), chunk=chunk).result()
        tokens = decode(step, logits, greedy, stop=frozenset(), max_tokens=job.total)
        return timed((token.id for token in tokens), len(job.prompt), watch, reply)

    return Loaded(run)


def mlx_lm(folder: Path, dtype: mx.Dtype | None, job: Job, reply: list[int]) -> Loaded:
    """``dtype``: of its arrays that are not packed, where they are cast."""
    from mlx_lm.generate import generate_step, generation_stream
    from mlx_lm.utils import load_model as load_theirs

    model, _ = load_theirs(folder)
    if dtype is not None:
        model.set_dtype(dtype)
        mx.eval(model.parameters())

    def run() -> Mapping[str, Lap]:
        watch = Stopwatch()
        ids = (
            identity
            for identity, _ in generate_step(
                mx.array(list(job.prompt)), model, max_tokens=job.total
            )
        )
        laps = timed(ids, len(job.prompt), watch, reply)
        mx.synchronize(generation_stream)  # it has queued a pass more than it yields
        return laps

    return Loaded(run)


def timed(
    ids: Iterator[Any], prompt_tokens: int, watch: Stopwatch, reply: list[int]
) -> dict[str, Lap]:
    """Prefill lasts until the first id is there, decode from then to the last."""
    reply[:] = [next(ids)]
    laps = {"prefill": watch.lap(prompt_tokens)}
    reply.extend(ids)
    return laps | {"decode": watch.lap(len(reply) - 1)}
