"""Several replies over one prompt: bytes of their caches, passes, and time, against one reply after another."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import magistral_mlx as mm
from benchmarks.measure import OURS, Comparison, Lap, Run, Stopwatch, interleave
from benchmarks.runtime.speed import Workload
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.generation.batch import BatchStepper, decode_rows
from magistral_mlx.generation.decoding import Stepper, Token, decode, prefill
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.sampling import Sampler
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.loader import load_model
from magistral_mlx.model.shared_cache import SharedCache

ALONE = "one after another"
PHASE = "ids of all"
GOAL = 0.27  # of the bytes of separate caches


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes held for ``n`` replies in the end."""

    n: int
    prompt_tokens: int
    new_tokens: int  # of each
    kv_bits: int | None
    shared_bytes: int  # what the caches say
    separate_bytes: int  # n times a cache of its own, allocated for just this
    shared_active_bytes: int  # what MLX held beside the weights
    separate_active_bytes: int

    def as_dict(self) -> dict[str, Any]:
        ratios = {
            "ratio": self.shared_bytes / self.separate_bytes,
            "active_ratio": self.shared_active_bytes / self.separate_active_bytes,
            "goal": GOAL,
        }
        return asdict(self) | ratios


def hold(
    folder: Path,
    n: int,
    *,
    prompt_tokens: int,
    new_tokens: int,
    kv_bits: int | None,
    report: Callable[[str], None],
) -> Held:
    """Feed ``n`` replies of random ids to the end, and one alone, and count."""
    report(
        f"{n} replies of {new_tokens} to a prompt of {prompt_tokens}, {kv_bits or 'float'} cache"
    )
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint).result()
    ids = mx.array(
        np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (new_tokens, n))
    )

    def prefilled(positions: int) -> Stepper:
        step = Stepper(
            model, KVCache(checkpoint.config, limit=prompt_tokens + new_tokens, bits=kv_bits)
        )
        step.cache.reserve(positions)
        mx.eval(prefill(step, [1] * prompt_tokens, chunk=256).result())
        return step

    def alone() -> Stepper:
        step = prefilled(prompt_tokens + new_tokens)
        for i in range(new_tokens):
            mx.eval(step(ids[i, :1][None]))
        return step

    def together() -> BatchStepper:
        batch = BatchStepper(
            model, SharedCache(prefilled(prompt_tokens).cache, n, limit=new_tokens)
        )
        for i in range(new_tokens):
            mx.eval(batch(ids[i]))
        return batch

    def measured(act: Callable[[], Stepper | BatchStepper]) -> tuple[int, int]:
        gc.collect()
        before = mx.get_active_memory()
        step = act()
        return step.cache.nbytes, mx.get_active_memory() - before

    single, single_active = measured(alone)
    shared, shared_active = measured(together)
    return Held(
        n, prompt_tokens, new_tokens, kv_bits, shared, n * single, shared_active, n * single_active
    )


@dataclass
class _Row:
    """Takes every id."""

    seed: int
    ids: list[int]

    def take(self, token: Token) -> bool:
        self.ids.append(token.id)
        return True

    def forced(self, logits: mx.array, draw: mx.array) -> Sequence[int]:
        return ()


def compare_steps(
    title: str, folder: Path, n: int, workload: Workload, report: Callable[[str], None]
) -> Comparison:
    """Decoding ``n`` replies at once and one after another, from one prompt that is held already."""
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint).result()
    prompt = (
        np.random.default_rng(0)
        .integers(0, checkpoint.config.vocab_size, workload.prompt_tokens)
        .tolist()
    )
    step = Stepper(
        model, KVCache(checkpoint.config, limit=workload.prompt_tokens + workload.decode_tokens)
    )
    logits = prefill(step, prompt, chunk=256).result()
    mx.eval(logits)
    params, most = SamplingParams(), workload.decode_tokens
    found: dict[str, list[list[int]]] = {}

    def together() -> Mapping[str, Lap]:
        rows = [_Row(seed, []) for seed in range(n)]
        watch = Stopwatch()
        batch = BatchStepper(model, SharedCache(step.cache, n, limit=most))
        for _ in decode_rows(batch, logits, params, rows, stop=frozenset(), max_tokens=most):
            pass
        found[OURS] = [row.ids for row in rows]
        return {PHASE: watch.lap(n * most)}

    def alone() -> Mapping[str, Lap]:
        watch = Stopwatch()
        found[ALONE] = []
        for seed in range(n):
            tokens = decode(step, logits, Sampler(params, seed), stop=frozenset(), max_tokens=most)
            found[ALONE].append([token.id for token in tokens])
            step.cache.trim(step.cache.length - workload.prompt_tokens)
        return {PHASE: watch.lap(n * most)}

    comparison = Comparison(f"{title}, {n} replies", {"n": n, "workload": asdict(workload)})
    contenders: dict[str, Run] = (
        {OURS: together, ALONE: alone} if n > 1 else {OURS: alone}
    )  # as the library does
    for repeat, name, laps in interleave(contenders, workload.repeats):
        report(
            f"{comparison.title}: {repeat or 'warm-up'} {name}: {laps[PHASE].per_second:.3g} tokens/s"
        )
        if repeat:
            comparison.add(name, laps)
    comparison.facts["same_ids"] = n == 1 or found[OURS] == found[ALONE]
    return comparison


def count_passes(n: int, questions: Sequence[str], report: Callable[[str], None]) -> dict[str, Any]:
    """Passes of the embedded model for ``n`` replies to each question, and whether they are the single ones."""
    magistral = mm.load("demo")
    sampling = mm.SamplingParams(temperature=1.5, seed=0, max_tokens=300)
    together = alone = same = 0
    for number, question in enumerate(questions, start=1):
        samples = magistral.sample(question, sampling, n=n)
        together += samples.forward_passes
        for reply in samples.replies:
            single = magistral.ask(question, replace(sampling, seed=reply.usage.seed))
            alone += single.usage.forward_passes
            same += (single.reasoning, single.answer) == (reply.reasoning, reply.answer)
        report(
            f"embedded model, question {number} of {len(questions)}: {together} passes, {alone} alone"
        )
    replies = n * len(questions)
    return {
        "n": n,
        "questions": len(questions),
        "passes_a_reply": together / replies,
        "passes_a_reply_alone": alone / replies,
        "replies_equal_to_single_ones": same / replies,
    }
