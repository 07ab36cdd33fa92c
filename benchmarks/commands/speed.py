"""``speed``: prefill, decode and the sampler."""

import tempfile
from dataclasses import replace
from pathlib import Path

import click
import mlx.core as mx

from benchmarks.commands.shared import json_option, peer_option, report, require, write
from benchmarks.measure import circumstances
from benchmarks.speed import Workload, compare_models, compare_samplers, compare_turns
from benchmarks.synthetic import NARROW, TRUE_WIDTH, write_slice
from benchmarks.tables import show_speeds
from magistral_mlx.checkpoint import resolve
from magistral_mlx.demo import demo_checkpoint

# A pass at true width takes seconds on a CPU, and mlx-lm's in bf16 ten times as many.
WHOLE = Workload(prompt_tokens=256, decode_tokens=128, repeats=9)
SLICE_ON_CPU = Workload(prompt_tokens=8, decode_tokens=4, repeats=5)
QUICK = Workload(prompt_tokens=9, decode_tokens=6, repeats=2)
CONVERSATION_TOKENS = 2000


@click.command()
@click.option("--model", metavar="demo|PATH", help="A checkpoint in MLX layout, or the embedded one in 4 bit.")
@click.option("--synthetic", type=click.IntRange(1, 40), metavar="LAYERS", help="Layers of the true width, random.")
@peer_option
@click.option("--prompt-tokens", type=int, help="Length of the prompt.")
@click.option("--tokens", type=int, help="Ids decoded after the first.")
@click.option("--repeats", type=int, help="Repeats counted, after one warm-up.")
@click.option("--quick", is_flag=True, help="A few ids, two repeats, and a narrow model: does it run?")
@json_option
def speed(
    *,
    model: str | None,
    synthetic: int | None,
    peer: str | None,
    prompt_tokens: int | None,
    tokens: int | None,
    repeats: int | None,
    quick: bool,
    json_file: Path | None,
) -> None:
    """Prefill and decode in tokens a second, and the sampler.

    \b
    python -m benchmarks speed --peer mlx-lm                the demo and two layers of the true width
    python -m benchmarks speed --model ~/magistral-4bit     a checkpoint of your own
    python -m benchmarks speed --quick                      half a minute
    """
    require(peer)
    chosen = {"prompt_tokens": prompt_tokens, "decode_tokens": tokens, "repeats": repeats}
    given = {name: value for name, value in chosen.items() if value is not None}
    facts = circumstances()
    with_peer = peer is not None
    if model is None and synthetic is None:
        model, synthetic = "demo", 2
    comparisons = []
    if model is not None:
        workload = replace(QUICK if quick else WHOLE, **given)
        folder = demo_checkpoint() if model == "demo" else resolve(model, layout="hf")
        comparisons.append(compare_models(model, folder, workload, peer=with_peer, report=report))
        conversation = 64 if quick else CONVERSATION_TOKENS
        comparisons.append(compare_turns(model, folder, conversation, workload.repeats, report=report))
    if synthetic is not None:
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        workload = replace(QUICK if quick else SLICE_ON_CPU if on_cpu else WHOLE, **given)
        config = replace(NARROW if quick else TRUE_WIDTH, num_layers=synthetic)
        title = f"{synthetic} layers, {config.hidden_size} wide"
        with tempfile.TemporaryDirectory(prefix="magistral-slice-") as name:
            report(f"{title}: writing")
            write_slice(Path(name), config)
            comparisons.append(compare_models(title, Path(name), workload, peer=with_peer, report=report))
    sampler_repeats = QUICK.repeats if quick else 15
    comparisons += [compare_samplers(B, sampler_repeats, peer=with_peer, report=report) for B in (1, 8)]
    write("speed", facts, comparisons, json_file)
    show_speeds(facts["chip"], comparisons)
