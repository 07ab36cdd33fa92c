"""``speed``: prefill, decode, the first token, passes, several replies, the sampler."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import mlx.core as mx

from benchmarks.command_line import (
    MINUTES,
    json_option,
    model_option,
    peer_option,
    prompt_option,
    quick_option,
    synthetic_option,
    write,
)
from benchmarks.measure import Comparison, Finding, Interval, circumstances, report
from benchmarks.report.table import RATIO, TIMES, show
from benchmarks.runtime.bandwidth import bandwidth
from benchmarks.runtime.contenders import Workload
from benchmarks.runtime.samples import compare_steps
from benchmarks.runtime.speed import (
    SAMPLER_REPEATS,
    compare_contexts,
    compare_models,
    compare_samplers,
    compare_turns,
    count_passes_per_token,
    workloads,
)
from benchmarks.synthetic import NARROW, TRUE_WIDTH, write_slice
from magistral_mlx.checkpoint.folder import open_checkpoint, resolve
from magistral_mlx.demo import demo_checkpoint
from magistral_mlx.engine.load import load

CONTEXTS = (512, 4096, 16_384, 40_960)
SAMPLES = (1, 2, 4, 8, 16)
# A pass at true width takes seconds on a CPU, and mlx-lm's in bf16 ten times as many.
WHOLE = Workload(prompt_tokens=256, decode_tokens=128, repeats=9)
SLICE_ON_CPU = Workload(prompt_tokens=8, decode_tokens=4, repeats=5)
QUICK = Workload(prompt_tokens=9, decode_tokens=6, repeats=2)
CONVERSATION_TOKENS = 2000
QUESTIONS = (
    "What is 48 + 76?",
    "How many r's are in strawberry?",
    "What is 9 * 37?",
    "What is 905 - 388?",
)
REPLY_TOKENS = 256  # of the replies whose passes are counted


@click.command()
@model_option
@synthetic_option
@peer_option
@prompt_option
@click.option("--tokens", type=int, help="Ids decoded after the first.")
@click.option("--repeats", type=int, help="Repeats counted, after one warm-up.")
@click.option(
    "--minutes",
    type=MINUTES,
    default=5.0,
    show_default=True,
    help="Leave out contexts that could take longer.",
)
@quick_option
@json_option
def speed(
    *,
    model: str | None,
    synthetic: int | None,
    peer: bool,
    prompt_tokens: int | None,
    tokens: int | None,
    repeats: int | None,
    minutes: float,
    quick: bool,
    json_file: Path | None,
) -> None:
    """Time prefill and decode, and tell the bandwidth used.

    Contexts have 512 to 40,960 tokens. Also timed: the first token of a second turn, passes a
    token, several replies at once, and the sampler. The bandwidth of this machine is measured
    first, by reading a matrix.

    \b
    python -m benchmarks speed --peer mlx-lm
    python -m benchmarks speed --model ~/magistral-4bit
    python -m benchmarks speed --quick

    The first takes the demo and two layers of the true width; --quick takes half a minute.
    """
    chosen = {"prompt_tokens": prompt_tokens, "decode_tokens": tokens, "repeats": repeats}
    given = {name: value for name, value in chosen.items() if value is not None}
    facts = circumstances()
    if model is None and synthetic is None:
        model, synthetic = "demo", 2
    report("reading a matrix")
    memory = bandwidth(matrix_bytes=2**24 if quick else None)
    comparisons: list[Comparison] = []
    counted: list[Finding] = []
    if model is not None:
        workload = replace(QUICK if quick else WHOLE, **given)
        folder = demo_checkpoint() if model == "demo" else resolve(model, layout="hf")
        contexts = () if quick or prompt_tokens else CONTEXTS
        several = list(workloads(open_checkpoint(folder), contexts, workload)) or [workload]
        comparisons += compare_contexts(model, folder, several, 60 * minutes, peer=peer)
        turns, counts = _conversations(model, folder, workload, quick=quick)
        comparisons += turns
        counted.append(counts)
    if synthetic is not None:
        comparisons.append(_slice(synthetic, given, peer=peer, quick=quick))
    draws = QUICK.repeats if quick else SAMPLER_REPEATS
    comparisons += [compare_samplers(batch, draws, peer=peer) for batch in (1, 8)]
    write("speed", facts, [memory, *comparisons, *counted], json_file)
    show_speeds(facts["chip"], comparisons, memory.facts["bytes_per_second"])
    print(
        f"{memory.title} ({memory.facts['by']}): {memory.facts['bytes_per_second'] / 1e9:.2f} GB/s"
    )
    for one in counted:
        print(f"{one.title}: {one.facts['passes_per_token']:.3f} ({one.facts['tokens']} tokens)")


def _conversations(
    model: str, folder: Path, workload: Workload, *, quick: bool
) -> tuple[list[Comparison], Finding]:
    """Measure the first token of a second turn, passes a token, and several replies at once."""
    magistral = load(folder)
    tokens = min(64 if quick else CONVERSATION_TOKENS, magistral.plan.context // 2)
    turns = compare_turns(model, magistral, tokens, workload.repeats)
    passes = count_passes_per_token(model, magistral, 16 if quick else REPLY_TOKENS, QUESTIONS)
    del magistral
    prompt, decoded = min(256, workload.prompt_tokens), min(64, workload.decode_tokens)
    steps = replace(workload, prompt_tokens=prompt, decode_tokens=decoded)
    several = SAMPLES[1:2] if quick else SAMPLES
    return [turns, *(compare_steps(model, folder, n, steps) for n in several)], passes


def _slice(layers: int, given: dict[str, int], *, peer: bool, quick: bool) -> Comparison:
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    workload = replace(QUICK if quick else SLICE_ON_CPU if on_cpu else WHOLE, **given)
    config = replace(NARROW if quick else TRUE_WIDTH, num_layers=layers)
    title = f"{layers} layers, {config.hidden_size} wide"
    with tempfile.TemporaryDirectory(prefix="magistral-slice-") as name:
        report(f"{title}: writing")
        write_slice(Path(name), config)
        return compare_models(title, Path(name), workload, peer=peer)


def show_speeds(chip: str, comparisons: Sequence[Comparison], bandwidth: float) -> None:
    """Print a row for every phase and contender; ``bandwidth`` is the machine's, in bytes/s."""
    rows = []
    for comparison in comparisons:
        facts = comparison.facts
        context = facts.get("workload", {}).get("prompt_tokens")
        for phase, name, per_second, cpu_seconds, ratio in comparison.rows():
            read = None
            if phase == "decode":
                read = per_second.median * (facts["bytes_per_token"] + facts["kv_bytes_per_token"])
            rows.append(
                (
                    comparison.title,
                    context and f"{context:,}",
                    phase,
                    name,
                    speed_or_latency(phase, per_second),
                    read and f"{read / 1e9:.3g} GB/s",
                    read and f"{read / bandwidth:.0%}",
                    f"{1000 * cpu_seconds:.3g}",
                    ratio,
                )
            )
    show(
        f"{chip}, {mx.default_device()}; median (slowest to fastest repeat); {RATIO}",
        "what | prompt | phase | who",
        f"speed or latency | read | of bandwidth | CPU ms each | {TIMES}",
        rows,
    )


def speed_or_latency(phase: str, per_second: Interval) -> str:
    """Return tokens or draws a second, but milliseconds for a first token."""
    if phase == "first token":
        return f"{per_second.inverse().scaled(1000)} ms"
    return f"{per_second} {'draws' if phase == 'draw' else 'tok'}/s"
