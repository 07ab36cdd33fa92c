"""Measures on a Mac what is predicted of it. Whatever does not need a Mac to run is run by the tests elsewhere."""

import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np

from benchmarks.macs.claims import REPLIES, ROWS, SHORT_PROMPT, SOONER, Machine
from benchmarks.measure import OURS, Lap, chip_name, interleave, memory_bytes
from benchmarks.runtime.cache import OPEN, OPEN_COLD, compare_files
from benchmarks.runtime.contenders import Job, mlx_lm
from benchmarks.runtime.memory import Prefills, compare_caches
from benchmarks.runtime.samples import ALONE, PHASE, compare_steps
from benchmarks.runtime.speed import Peers, Workload, compare_models
from benchmarks.synthetic import FORMAT, TRUE_WIDTH, write_slice
from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import Checkpoint, open_checkpoint
from magistral_mlx.engine.load import load
from magistral_mlx.engine.magistral import Magistral
from magistral_mlx.errors import OptionError
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.row_costs import measure as measure_rows
from magistral_mlx.model.loader import load_model

SLICE_LAYERS = 2
SLICE_PROMPT = 2047
CACHE_TOKENS = 40_960
QUESTION = "A train leaves at 9:40 and arrives at 13:05, with two stops of 7 minutes. How long does it move?"
REPLY_TOKENS = 1024
COPIED_CHARACTERS = 2500
SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
)
Report = Callable[[str], None]
Measured = dict[str, float]


def this_mac() -> Machine:
    """Raises OptionError where this is none whose GPU MLX uses."""
    if sys.platform != "darwin" or platform.machine() != "arm64" or not mx.metal.is_available():
        raise OptionError(
            f"mac-check measures what is predicted of Macs with Apple silicon, by their GPU; this is {sys.platform} on "
            f"{platform.machine()}, of which nothing is predicted. What is measured here: speed, memory, convert, "
            "quality and reasoning; what is predicted: python -m benchmarks predict"
        )
    if mx.default_device().type != mx.DeviceType.gpu:
        raise OptionError(
            "mac-check measures the GPU, and MLX's default device is the CPU; leave MLX_DEVICE and such out"
        )
    return Machine(chip_name(), memory_bytes())


def is_magistral_small(checkpoint: Checkpoint) -> bool:
    """Whether predictions for Magistral Small in 4 bit are about this."""
    config, quantization = checkpoint.config, checkpoint.config.quantization
    same = all(getattr(config, name) == getattr(TRUE_WIDTH, name) for name in SHAPE)
    return same and quantization is not None and quantization.default.bits == FORMAT.bits


def measure_machine(config: ModelConfig, report: Report) -> Measured:
    """What needs no checkpoint: the working set, the plan's forecast, the joined matrices."""
    working_set = mx.device_info()["max_recommended_working_set_size"]
    found = {"working set": float(working_set) / 1e9}
    return found | forecasts(config, SLICE_PROMPT, report) | opening(report) | joined(config)


def forecasts(config: ModelConfig, prompt_tokens: int, report: Report) -> Measured:
    """Of a few layers, the plan over what a prefill took in all."""
    found: Measured = {}
    with tempfile.TemporaryDirectory(prefix="magistral-slice-") as name:
        write_slice(Path(name), replace(config, num_layers=SLICE_LAYERS))
        prefills = Prefills((prompt_tokens,), 2)
        for comparison in compare_caches("slice", Path(name), prefills, peer=False, report=report):
            kind = f"{comparison.facts['kv_bits']}-bit" if comparison.facts["kv_bits"] else "float"
            over = comparison.facts["forecast_over_measured_in_all"]
            found[f"memory forecast over measured, {kind} cache"] = over
    return found


def joined(config: ModelConfig) -> Measured:
    """The largest difference of a product with two packed matrices joined from that with each, for 1 to 8 rows."""
    rng = np.random.default_rng(0)
    D = config.hidden_size
    size, bits = FORMAT.group_size, FORMAT.bits

    def random(rows: int) -> mx.array:
        return mx.array(rng.normal(size=(rows, D)).astype(np.float32)).astype(mx.bfloat16)

    def product(x: mx.array, packed: Sequence[mx.array]) -> mx.array:
        weight, scales, biases = packed
        return mx.quantized_matmul(x, weight, scales, biases, group_size=size, bits=bits).astype(
            mx.float32
        )

    halves = [mx.quantize(random(1024), group_size=size, bits=bits) for _ in "ab"]
    both = [mx.concatenate(list(parts)) for parts in zip(*halves, strict=True)]
    largest = 0.0
    for M in range(1, 9):
        x = random(M)
        apart = mx.concatenate([product(x, half) for half in halves], axis=-1)
        largest = max(largest, float(mx.abs(product(x, both) - apart).max()))
    return {"joined matrices, largest difference": largest}


def measure_model(folder: Path, workload: Workload, machine: Machine, report: Report) -> Measured:
    """Of a checkpoint: its speed beside mlx-lm's, what rows cost, several replies, and on an M1 or M2 both types."""
    checkpoint = open_checkpoint(folder)
    comparison = compare_models("model", folder, workload, peers=Peers(mlx_lm=True), report=report)
    decode, prefill = (
        {name: _per_second(laps) for name, laps in comparison.laps[p].items()}
        for p in ("decode", "prefill")
    )
    found = {
        "decode": decode[OURS],
        "decode, over mlx-lm's": decode[OURS] / decode["mlx-lm"],
        "first token": workload.prompt_tokens / prefill[OURS],
    }
    short_prompt = replace(workload, prompt_tokens=SHORT_PROMPT)
    laps = compare_models(
        "model, short prompt", folder, short_prompt, peers=Peers(mlx_lm=True), report=report
    ).laps
    found[SOONER] = SHORT_PROMPT * (
        1 / _per_second(laps["prefill"]["mlx-lm"]) - 1 / _per_second(laps["prefill"][OURS])
    )
    report("model: what rows cost")
    costs = measure_rows(load_model(checkpoint).result(), checkpoint.config)
    found |= {f"cost of {rows} rows": costs.passes[rows - 1] for rows in ROWS}
    short = replace(
        workload,
        prompt_tokens=min(256, workload.prompt_tokens),
        decode_tokens=min(64, workload.decode_tokens),
    )
    steps = compare_steps("model", folder, REPLIES, short, report).laps[PHASE]
    found[f"{REPLIES} replies at once, over one by one"] = _per_second(steps[OURS]) / _per_second(
        steps[ALONE]
    )
    if 1 <= machine.generation <= 2:
        found |= half_precision(folder, checkpoint, workload)
    return found


def drafting(folder: Path, report: Report) -> Measured:
    """Decoding a reasoned reply, and one that copies a text with edits: with drafting, over without."""
    licence = (Path(__file__).parent.parent / "LICENSE").read_text()[:COPIED_CHARACTERS]
    asked = {
        "reasoning": QUESTION,
        "edits": f"Write this once more, with every 'License' in capitals:\n\n{licence}",
    }
    speeds: dict[int | None, dict[str, float]] = {}
    for most in (None, 0):
        report(f"model: replies {'without' if most == 0 else 'with'} drafting")
        magistral = load(folder, num_draft_tokens=most)
        speeds[most] = {kind: _reply_speed(magistral, text, kind) for kind, text in asked.items()}
        del magistral
    return {f"drafting, {kind}": speeds[None][kind] / speeds[0][kind] for kind in asked}


def _reply_speed(magistral: Magistral, text: str, kind: str) -> float:
    sampling = SamplingParams(
        seed=0, max_tokens=REPLY_TOKENS, think_budget=0 if kind == "edits" else None
    )
    usage = magistral.ask(text, sampling).usage
    return usage.completion_tokens / usage.decode_seconds


def opening(report: Report) -> Measured:
    """Gigabytes a second of opening a cache's file, that the system has let go of where it can be told to."""
    work = Path(tempfile.gettempdir())
    laps = compare_files(SLICE_LAYERS, CACHE_TOKENS, None, 3, work, report=report).laps
    phase = OPEN_COLD if OPEN_COLD in laps else OPEN
    report(f"cache file: {phase}")
    return {"opening a cache's file": _per_second(laps[phase][OURS]) / 1e9}


def half_precision(folder: Path, checkpoint: Checkpoint, workload: Workload) -> Measured:
    """float16 over bfloat16, by mlx-lm's model: ours takes float16 by itself."""
    rng = np.random.default_rng(0)
    job = Job(
        rng.integers(0, checkpoint.config.vocab_size, workload.prompt_tokens).tolist(),
        workload.decode_tokens,
    )
    contenders = {
        str(dtype): mlx_lm(folder, dtype, job, []).run for dtype in (mx.float16, mx.bfloat16)
    }
    laps: dict[str, dict[str, list[Lap]]] = {}
    for repeat, name, several in interleave(contenders, workload.repeats):
        for phase, lap in several.items() if repeat else ():
            laps.setdefault(phase, {}).setdefault(name, []).append(lap)
    half, brain = contenders
    return {
        f"float16 over bfloat16, {phase}": _per_second(several[half]) / _per_second(several[brain])
        for phase, several in laps.items()
    }


def _per_second(laps: list[Lap]) -> float:
    return median(lap.per_second for lap in laps)
