"""Several replies over one prompt against single ones: cache bytes, passes and time."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import magistral_mlx as mm
from benchmarks.measure import OURS, Comparison, Lap, Run, Stopwatch, report
from benchmarks.runtime.contenders import Workload, load_ours, random_ids, read_prompt
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.generation.batch import BatchStepper, decode_rows
from magistral_mlx.generation.decoding import Stepper, Token, decode
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.sampling import Sampler
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.kv_format import KVFormat
from magistral_mlx.model.shared_cache import SharedCache

ALONE = "one after another"
PHASE = "ids of all"
GOAL = 0.27  # of the bytes of separate caches
CHUNK = 256


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes that the caches of ``n`` finished replies hold.

    ``shared`` is one prompt with n continuations, ``separate`` n whole caches.
    """

    n: int
    prompt_tokens: int
    new_tokens: int
    kv_bits: int | None
    shared_bytes: int
    separate_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.shared_bytes / self.separate_bytes, "goal": GOAL}


def hold(folder: Path, n: int, *, prompt_tokens: int, new_tokens: int, kv_bits: int | None) -> Held:
    """Feed random ids to ``n`` replies together and to one alone, and count their bytes."""
    cache = f"{kv_bits} bit" if kv_bits else "float"
    report(f"{n} replies of {new_tokens} to a prompt of {prompt_tokens}, {cache} cache")
    checkpoint = open_checkpoint(folder)
    config, model = checkpoint.config, load_ours(checkpoint)
    kv_format = KVFormat.of(kv_bits, config.head_dim)
    ids = mx.array(np.random.default_rng(0).integers(0, config.vocab_size, (new_tokens, n)))

    def prefilled(positions: int) -> Stepper:
        limit = prompt_tokens + new_tokens
        step = Stepper(model, KVCache(config, limit=limit, kv_format=kv_format))
        step.cache.reserve(positions)
        read_prompt(step, [1] * prompt_tokens, CHUNK)
        return step

    single = prefilled(prompt_tokens + new_tokens)
    for row in ids:
        mx.eval(single(row[:1][None]))
    shared = SharedCache(prefilled(prompt_tokens).cache, n, limit=new_tokens)
    batch = BatchStepper(model, shared)
    for row in ids:
        mx.eval(batch(row))
    return Held(n, prompt_tokens, new_tokens, kv_bits, shared.nbytes, n * single.cache.nbytes)


@dataclass
class _Row:
    """A row of a batch that accepts every id."""

    seed: int
    ids: list[int]

    def take(self, token: Token) -> bool:
        self.ids.append(token.id)
        return True

    def forced(self, logits: mx.array, draw: mx.array) -> Sequence[int]:
        return ()


def compare_steps(title: str, folder: Path, n: int, workload: Workload) -> Comparison:
    """Time decoding of ``n`` replies at once and one after another, after the prompt was read."""
    checkpoint = open_checkpoint(folder)
    config, model = checkpoint.config, load_ours(checkpoint)
    most, params = workload.decode_tokens, SamplingParams()
    step = Stepper(model, KVCache(config, limit=workload.prompt_tokens + most))
    logits = read_prompt(step, random_ids(config, workload.prompt_tokens), CHUNK)
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

    contenders: dict[str, Run] = {OURS: together, ALONE: alone} if n > 1 else {OURS: alone}
    comparison = Comparison(f"{title}, {n} replies", {"n": n, "workload": asdict(workload)})
    comparison.run(contenders, workload.repeats)
    comparison.facts["same_ids"] = n == 1 or found[OURS] == found[ALONE]
    return comparison


def count_passes(n: int, questions: Sequence[str]) -> dict[str, Any]:
    """Count passes of the embedded model for ``n`` replies to each question, and compare texts."""
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
        report(f"embedded model, question {number} of {len(questions)}: {together} passes")
    replies = n * len(questions)
    return {
        "n": n,
        "questions": len(questions),
        "passes_a_reply": together / replies,
        "passes_a_reply_alone": alone / replies,
        "replies_equal_to_single_ones": same / replies,
    }
