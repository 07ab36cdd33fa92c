"""Memory of a prefill into a float and a packed cache, its forecast, and what packing costs."""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.measure import OURS, Comparison, Finding, Lap, Stopwatch, report
from benchmarks.runtime.contenders import (
    load_mlx_lm,
    load_ours,
    random_ids,
    read_prompt,
    times_as_long,
)
from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import Checkpoint, open_checkpoint
from magistral_mlx.engine.load import load
from magistral_mlx.engine.magistral import Magistral
from magistral_mlx.errors import MemoryLimitError, OptionError
from magistral_mlx.generation.decoding import Stepper
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.kv_format import KVFormat
from magistral_mlx.model.load_options import KVBits, LoadOptions
from magistral_mlx.model.memory import MemoryPlan, plan_for
from magistral_mlx.model.transformer import Transformer
from magistral_mlx.training.demo.problems import ARITHMETIC, held_out_problems, is_correct

PHASE = "prefill"
KV_BITS: tuple[KVBits | None, ...] = (None, 8, 4)
STEPS = 16  # ids whose logits are compared with those of a float cache
SEED = 2026  # of the problems
ERROR_IDS = 1024  # prompt before those steps, at most


@dataclass(frozen=True, slots=True)
class Fill(Lap):
    """One prefill. ``count`` is the prompt's ids, the peak is MLX's above the weights."""

    peak_bytes: int

    @classmethod
    def measure(cls, act: Callable[[], object], count: int) -> "Fill":
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        watch = Stopwatch()
        act()
        lap = watch.lap(count)
        return cls(lap.seconds, lap.cpu_seconds, count, mx.get_peak_memory() - before)

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, {self.peak_bytes / 1e6:.0f} MB"


@dataclass(frozen=True, slots=True)
class Prefills:
    """Lengths of the prompts, and repeats of each; ``seconds`` is the longest that one may take."""

    lengths: Sequence[int]
    repeats: int
    seconds: float = math.inf

    def __post_init__(self) -> None:
        if min(self.lengths, default=0) < 1 or self.repeats < 1:
            lengths = ", ".join(map(str, self.lengths))
            raise OptionError(
                f"{self.repeats} prefills of {lengths} ids cannot be timed; use at least 1 of each"
            )


def compare_caches(
    title: str, folder: Path, prefills: Prefills, *, peer: bool
) -> Iterator[Comparison]:
    """Prefill a float, an 8-bit and a 4-bit cache, ours and mlx-lm's, as far as they fit.

    On a CPU both compute in float32.
    """
    checkpoint = open_checkpoint(folder)
    report(f"{title}: loading")
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    model = load_ours(checkpoint)
    theirs = load_mlx_lm(folder, mx.float32 if on_cpu else None) if peer else None
    last: tuple[int, float] | None = None
    for length in sorted({min(n, checkpoint.config.max_positions - 1) for n in prefills.lengths}):
        if last is not None:
            expected = last[1] * times_as_long(checkpoint.config, last[0], length)
            if expected > prefills.seconds:
                report(
                    f"{title}: prompts from {length:,} on are left out: one could take "
                    f"{expected / 60:.0f} minutes (--minutes)"
                )
                return
        watch = Stopwatch()
        prompt = random_ids(checkpoint.config, length)
        for bits in KV_BITS:
            try:
                plan = plan_for(checkpoint, LoadOptions(max_kv_size=length + 1, kv_bits=bits))
            except MemoryLimitError as error:
                report(f"{title}: {error}")
                continue
            contenders = {OURS: _ours(model, checkpoint, prompt, plan)}
            if theirs is not None:
                contenders["mlx-lm"] = _theirs(theirs, prompt, bits)
            facts = {
                "prompt_tokens": length,
                "kv_bits": bits,
                "repeats_by_each": prefills.repeats,
                "checkpoint": checkpoint.fingerprint(),
                "plan": asdict(plan),
            }
            comparison = Comparison(f"{title}, {kind_of_cache(bits)}", facts)
            comparison.run(contenders, prefills.repeats, warm_up=False)
            some = prompt[: max(1, min(length // 8, ERROR_IDS))]
            following = prompt[:STEPS]
            lost = logits_error(model, checkpoint.config, plan, some, following) if bits else 0.0
            yield _concluded(comparison, plan, lost)
        last = length, watch.lap(1).seconds


def _concluded(comparison: Comparison, plan: MemoryPlan, error: float) -> Comparison:
    """Add peaks and their ratios to the facts."""
    peaks = {
        name: max(fill.peak_bytes for fill in fills if isinstance(fill, Fill))
        for name, fills in comparison.laps[PHASE].items()
    }
    ours = peaks[OURS]
    comparison.facts |= {
        "peak_bytes_above_weights": peaks,
        "forecast_over_measured": (plan.kv_bytes + plan.workspace_bytes) / ours,
        "forecast_over_measured_in_all": plan.total_bytes / (plan.weights_bytes + ours),
        "ours_over_theirs": {n: ours / peak for n, peak in peaks.items() if n != OURS},
        "logits_error": error,
    }
    return comparison


def kind_of_cache(bits: int | None) -> str:
    return f"{bits}-bit cache" if bits else "float cache"


def logits_error(
    model: Transformer,
    config: ModelConfig,
    plan: MemoryPlan,
    prompt: list[int],
    following: list[int],
) -> float:
    """Return the RMS error of a packed cache's logits over the RMS of the float cache's.

    The logits are those after each of the ids that follow a prompt.
    """
    found = []
    for bits in (None, plan.kv_bits):
        kv_format = KVFormat.of(bits, config.head_dim)
        cache = KVCache(config, limit=len(prompt) + len(following), kv_format=kv_format)
        step = Stepper(model, cache)
        read_prompt(step, prompt, plan.prefill_chunk)
        rows = [step(mx.array([[identity]])) for identity in following]
        found.append(np.array(mx.concatenate(rows).astype(mx.float32)))
    exact, packed = found
    return float(np.sqrt(np.mean((packed - exact) ** 2) / np.mean(exact**2)))


def answers(count: int) -> Iterator[Finding]:
    """Yield the share of problems that the embedded model solves with each kind of cache."""
    for bits in KV_BITS:
        title = f"demo, {kind_of_cache(bits)}"
        report(f"{title}: {count} problems")
        yield Finding(title, exact_answers(load("demo", kv_bits=bits), count))


def exact_answers(magistral: Magistral, count: int) -> dict[str, Any]:
    """Return the share of held-out problems that are solved greedily, with its standard error.

    The model must have closed the trace itself.
    """
    right = 0
    for problem in held_out_problems(count, SEED, magistral.tokenizer.pieces, ARITHMETIC):
        reply = magistral.ask(problem.question, SamplingParams(temperature=0))
        right += is_correct(problem, reply.answer) and reply.reasoning_closed_by == "model"
    share = right / count
    return {"problems": count, "exact": share, "exact_error": (share * (1 - share) / count) ** 0.5}


def _ours(
    model: Transformer, checkpoint: Checkpoint, prompt: list[int], plan: MemoryPlan
) -> Callable[[], Mapping[str, Fill]]:
    def act() -> None:
        kv_format = KVFormat.of(plan.kv_bits, checkpoint.config.head_dim)
        cache = KVCache(checkpoint.config, limit=plan.context, kv_format=kv_format)
        cache.reserve(plan.context)
        read_prompt(Stepper(model, cache), prompt, plan.prefill_chunk)

    return lambda: {PHASE: Fill.measure(act, len(prompt))}


def _theirs(model: Any, prompt: list[int], bits: int | None) -> Callable[[], Mapping[str, Fill]]:
    from mlx_lm.generate import generate_step, generation_stream

    def act() -> None:
        next(generate_step(mx.array(prompt), model, max_tokens=1, kv_bits=bits))

    def run() -> Mapping[str, Fill]:
        fill = Fill.measure(act, len(prompt))
        mx.synchronize(generation_stream)  # it queues one pass more than it yields
        return {PHASE: fill}

    return run
