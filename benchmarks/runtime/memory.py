"""Prefill into a float and a packed cache against mlx-lm's: memory, its forecast, time, and what packing costs."""

import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.measure import OURS, Comparison, Finding, Lap, Stopwatch, interleave
from benchmarks.runtime.lengths import times_as_long
from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import Checkpoint, open_checkpoint
from magistral_mlx.engine.load import load
from magistral_mlx.errors import MemoryLimitError, OptionError
from magistral_mlx.generation.decoding import Stepper, prefill
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.load_options import KVBits, LoadOptions
from magistral_mlx.model.loader import load_model
from magistral_mlx.model.memory import MemoryPlan, plan_for
from magistral_mlx.model.transformer import Transformer
from magistral_mlx.training.demo.problems import ARITHMETIC, held_out_problems, is_correct

ROOT = Path(__file__).parent.parent
PHASE = "prefill"
KV_BITS: tuple[KVBits | None, ...] = (None, 8, 4)
STEPS = 16  # over which the logits of a packed cache are compared
SEED = 2026  # of the problems
TEXT_IDS = 1000
ERROR_IDS = 1024  # before those steps, at most


@dataclass(frozen=True, slots=True)
class Fill(Lap):
    """One prefill; ``count`` is the prompt's ids."""

    peak_bytes: int  # MLX's, above what was in memory before

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


@dataclass(frozen=True, slots=True)
class Prefills:
    """Prompts of every length, read so often; one that could take longer than ``seconds`` and the next are left out."""

    lengths: Sequence[int]
    repeats: int
    seconds: float = math.inf

    def __post_init__(self) -> None:
        if min(self.lengths, default=0) < 1 or self.repeats < 1:
            raise OptionError(
                f"{self.repeats} prefills of {', '.join(map(str, self.lengths))} ids cannot be timed; "
                "use at least 1 of each"
            )


def compare_caches(
    title: str, folder: Path, prefills: Prefills, *, peer: bool, report: Callable[[str], None]
) -> Iterator[Comparison]:
    """Prefill into a float, an 8- and a 4-bit cache, ours and mlx-lm's, in float32 on a CPU; as far as they fit."""
    checkpoint = open_checkpoint(folder)
    report(f"{title}: loading")
    model = load_model(checkpoint).result()
    theirs = _load_theirs(folder) if peer else None
    before: tuple[int, float] | None = None
    for length in sorted({min(n, checkpoint.config.max_positions - 1) for n in prefills.lengths}):
        if (
            before
            and (expected := before[1] * times_as_long(checkpoint.config, before[0], length))
            > prefills.seconds
        ):
            report(
                f"{title}: prompts from {length:,} on are left out: {expected / 60:.0f} minutes perhaps (--minutes)"
            )
            return
        watch = Stopwatch()
        for bits in KV_BITS:
            try:
                options = LoadOptions(max_kv_size=length + 1, kv_bits=bits)
                plan = plan_for(checkpoint, options)
            except MemoryLimitError as error:
                report(f"{title}: {error}")
                continue
            yield _compare_cache(
                title,
                model,
                checkpoint,
                length=length,
                repeats=prefills.repeats,
                plan=plan,
                theirs=theirs,
                report=report,
            )
        before = length, watch.lap(1).seconds


def _compare_cache(
    title: str,
    model: Transformer,
    checkpoint: Checkpoint,
    *,
    length: int,
    repeats: int,
    plan: MemoryPlan,
    theirs: Any,
    report: Callable[[str], None],
) -> Comparison:
    prompt = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, length).tolist()
    contenders = {OURS: _ours(model, checkpoint, prompt, plan)}
    if theirs is not None:
        contenders["mlx-lm"] = _theirs(theirs, prompt, plan.kv_bits)
    comparison = Comparison(
        f"{title}, {kind_of_cache(plan.kv_bits)}",
        {
            "prompt_tokens": length,
            "kv_bits": plan.kv_bits,
            "repeats_by_each": repeats,
            "checkpoint": checkpoint.fingerprint(),
            "plan": asdict(plan),
        },
    )
    fills: dict[str, list[Fill]] = {}
    for repeat, name, laps in interleave(contenders, repeats, warm_up=False):
        fill = laps[PHASE]
        assert isinstance(fill, Fill)
        report(
            f"{comparison.title}, prompt of {length:,}: {repeat}/{repeats} {name}: {fill.seconds:.1f} s, "
            f"{fill.peak_bytes / 1e6:.0f} MB"
        )
        fills.setdefault(name, []).append(fill)
        comparison.add(name, laps)
    peaks = {name: max(fill.peak_bytes for fill in several) for name, several in fills.items()}
    some = prompt[: max(1, min(length // 8, ERROR_IDS))]
    error = (
        0.0
        if plan.kv_bits is None
        else logits_error(model, checkpoint.config, plan, some, prompt[:STEPS])
    )
    comparison.facts |= {
        "peak_bytes_above_weights": peaks,
        "forecast_over_measured": (plan.kv_bytes + plan.workspace_bytes) / peaks[OURS],
        "forecast_over_measured_in_all": plan.total_bytes / (plan.weights_bytes + peaks[OURS]),
        "ours_over_theirs": {
            name: peaks[OURS] / peak for name, peak in peaks.items() if name != OURS
        },
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
    """RMS difference of the logits from those with a float cache, over their RMS, where ids follow a prompt."""
    found = []
    for bits in (None, plan.kv_bits):
        step = Stepper(model, KVCache(config, limit=len(prompt) + len(following), bits=bits))
        prefill(step, prompt, chunk=plan.prefill_chunk).result()
        rows = [step(mx.array([[identity]])) for identity in following]
        found.append(np.array(mx.concatenate(rows).astype(mx.float32)))
    exact, packed = found
    return float(np.sqrt(np.mean((packed - exact) ** 2) / np.mean(exact**2)))


def answers(count: int, *, report: Callable[[str], None]) -> Iterator[Finding]:
    """The embedded model with each kind of cache: the share of held-out problems it solves, and its logits' error.

    The latter at the end of the texts of the first problems, one after the other.
    """
    texts: list[int] = []
    for bits in KV_BITS:
        title = f"demo, {kind_of_cache(bits)}"
        report(f"{title}: {count} problems")
        magistral = load("demo", kv_bits=bits)
        exact = 0
        for problem in held_out_problems(count, SEED, magistral.tokenizer.pieces, ARITHMETIC):
            reply = magistral.ask(problem.question, SamplingParams(temperature=0))
            exact += is_correct(problem, reply.answer) and reply.reasoning_closed_by == "model"
            if bits is None and len(texts) < TEXT_IDS:
                texts += magistral.prefix_cache.ids
        error = logits_error(
            magistral.model, magistral.config, magistral.plan, texts[:-STEPS], texts[-STEPS:]
        )
        yield Finding(
            title,
            {"problems": count, "exact": exact / count, "ids": len(texts), "logits_error": error},
        )


def footprint(
    title: str, folder: Path, max_tokens: int, *, report: Callable[[str], None]
) -> Finding:
    """Raises OptionError where the reply fails."""
    report(f"{title}: one reply in a process of its own")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.runtime.footprint", str(folder), str(max_tokens)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = "".join(done.stderr.strip().splitlines()[-1:])
        raise OptionError(
            f"the reply of {title} ended with {done.returncode} (below 0 a signal): {said}"
        )
    found = json.loads(done.stdout.splitlines()[-1])
    for measure in ("mlx_peak_bytes", "rss_bytes_above_imports"):
        found[f"forecast_over_{measure}"] = found["forecast_bytes"] / found[measure]
    return Finding(title, found)


def _ours(
    model: Transformer, checkpoint: Checkpoint, prompt: list[int], plan: MemoryPlan
) -> Callable[[], Mapping[str, Fill]]:
    def act() -> None:
        cache = KVCache(checkpoint.config, limit=plan.context, bits=plan.kv_bits)
        cache.reserve(plan.context)
        mx.eval(prefill(Stepper(model, cache), prompt, chunk=plan.prefill_chunk).result())

    return lambda: {PHASE: Fill.measure(act, len(prompt))}


def _load_theirs(folder: Path) -> Any:
    from mlx_lm.utils import load_model as load_theirs

    model, _ = load_theirs(folder)
    if mx.default_device().type == mx.DeviceType.cpu:
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def _theirs(model: Any, prompt: list[int], bits: int | None) -> Callable[[], Mapping[str, Fill]]:
    from mlx_lm.generate import generate_step, generation_stream

    def act() -> None:
        next(generate_step(mx.array(prompt), model, max_tokens=1, kv_bits=bits))

    def run() -> Mapping[str, Fill]:
        fill = Fill.measure(act, len(prompt))
        mx.synchronize(generation_stream)  # it has queued a pass more than it yields
        return {PHASE: fill}

    return run
