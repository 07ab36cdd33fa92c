"""``speed``: prefill, decode, the first token, passes, several replies, the sampler."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import mlx.core as mx

from benchmarks.commands.shared import (
    MINUTES,
    json_option,
    plot_option,
    plot_results,
    report,
    require,
    written,
)
from benchmarks.measure import Comparison, Finding, circumstances
from benchmarks.report.tables import show_findings, show_speeds
from benchmarks.runtime.bandwidth import bandwidth
from benchmarks.runtime.llama import check_llama
from benchmarks.runtime.samples import compare_steps
from benchmarks.runtime.speed import (
    Peers,
    Workload,
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
from magistral_mlx.errors import OptionError

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
REPLY_TOKENS = 256  # of which passes are counted


@click.command()
@click.option(
    "--model", metavar="demo|PATH", help="A checkpoint in MLX layout, or the embedded one in 4 bit."
)
@click.option(
    "--synthetic",
    type=click.IntRange(1, 40),
    metavar="LAYERS",
    help="Layers of the true width, random.",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    type=click.Choice(["mlx-lm", "llama.cpp"]),
    help="Measure this beside ours, and the ratio; may be repeated.",
)
@click.option("--gguf", type=click.Path(path_type=Path), help="The same model for llama.cpp.")
@click.option("--prompt-tokens", type=int, help="Length of the prompt, instead of all contexts.")
@click.option("--tokens", type=int, help="Ids decoded after the first.")
@click.option("--repeats", type=int, help="Repeats counted, after one warm-up.")
@click.option(
    "--minutes",
    type=MINUTES,
    default=5.0,
    show_default=True,
    help="Contexts that could take longer are left out.",
)
@click.option(
    "--quick", is_flag=True, help="A few ids, two repeats, and a narrow model: does it run?"
)
@json_option
@plot_option
def speed(
    *,
    model: str | None,
    synthetic: int | None,
    peers: tuple[str, ...],
    gguf: Path | None,
    prompt_tokens: int | None,
    tokens: int | None,
    repeats: int | None,
    minutes: float,
    quick: bool,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Prefill and decode in tokens a second at contexts of 512 to 40,960, beside the bandwidth that this takes.

    And the first token of a second turn, passes a token, several replies at once, the sampler. The bandwidth of this
    machine is measured first, by streaming a matrix.

    \b
    python -m benchmarks speed --peer mlx-lm                the demo and two layers of the true width
    python -m benchmarks speed --model ~/magistral-4bit     a checkpoint of your own
    python -m benchmarks speed --model ~/magistral-4bit --peer llama.cpp --gguf ~/Magistral-Q4_K_M.gguf
    python -m benchmarks speed --quick                      half a minute
    """
    require("mlx-lm" if "mlx-lm" in peers else None)
    if "llama.cpp" in peers:
        check_llama(gguf)
    elif gguf is not None:
        raise OptionError("--gguf is llama.cpp's; add --peer llama.cpp, or leave it out")
    chosen = {"prompt_tokens": prompt_tokens, "decode_tokens": tokens, "repeats": repeats}
    given = {name: value for name, value in chosen.items() if value is not None}
    facts = circumstances()
    if model is None and synthetic is None:
        model, synthetic = "demo", None if gguf else 2
    beside = Peers("mlx-lm" in peers, gguf)
    report("streaming a matrix")
    memory = bandwidth(matrix_bytes=2**24 if quick else None)
    comparisons: list[Comparison] = []
    counted: list[Finding] = []
    if model is not None:
        workload = replace(QUICK if quick else WHOLE, **given)
        folder = demo_checkpoint() if model == "demo" else resolve(model, layout="hf")
        contexts = () if quick or prompt_tokens else CONTEXTS
        several = list(workloads(open_checkpoint(folder), contexts, workload)) or [workload]
        comparisons += compare_contexts(
            model, folder, several, 60 * minutes, peers=beside, report=report
        )
        turns, counts = _conversations(model, folder, workload, quick=quick)
        comparisons += turns
        counted.append(counts)
    if synthetic is not None:
        comparisons.append(_slice(synthetic, given, Peers(beside.mlx_lm), quick=quick))
    sampler_repeats = QUICK.repeats if quick else 15
    comparisons += [
        compare_samplers(B, sampler_repeats, peer=beside.mlx_lm, report=report) for B in (1, 8)
    ]
    results = written("speed", facts, [memory, *comparisons, *counted], json_file)
    plot_results(results, plot)
    show_speeds(facts["chip"], comparisons, memory.facts["bytes_per_second"])
    show_findings([memory, *counted])


def _conversations(
    model: str, folder: Path, workload: Workload, *, quick: bool
) -> tuple[list[Comparison], Finding]:
    """The first token of a second turn, several replies at once, and passes a token."""
    magistral = load(folder)
    tokens = min(64 if quick else CONVERSATION_TOKENS, magistral.plan.context // 2)
    turns = compare_turns(model, magistral, tokens, workload.repeats, report=report)
    passes = count_passes_per_token(model, magistral, 16 if quick else REPLY_TOKENS, QUESTIONS)
    del magistral
    ns: Sequence[int] = SAMPLES[1:2] if quick else SAMPLES
    steps = replace(
        workload,
        prompt_tokens=min(256, workload.prompt_tokens),
        decode_tokens=min(64, workload.decode_tokens),
    )
    return [turns, *(compare_steps(model, folder, n, steps, report) for n in ns)], passes


def _slice(layers: int, given: dict[str, int], peers: Peers, *, quick: bool) -> Comparison:
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    workload = replace(QUICK if quick else SLICE_ON_CPU if on_cpu else WHOLE, **given)
    config = replace(NARROW if quick else TRUE_WIDTH, num_layers=layers)
    title = f"{layers} layers, {config.hidden_size} wide"
    with tempfile.TemporaryDirectory(prefix="magistral-slice-") as name:
        report(f"{title}: writing")
        write_slice(Path(name), config)
        return compare_models(title, Path(name), workload, peers=peers, report=report)
