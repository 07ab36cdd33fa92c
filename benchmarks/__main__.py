"""``python -m benchmarks``: parse, measure, show. Progress goes to stderr, the table to stdout."""

import importlib.util
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import mlx.core as mx

from benchmarks.convert import Job, compare_source, compare_synthetic
from benchmarks.drafting import TABLES, count_all, scripted, traces
from benchmarks.graph import GraphComparison, compare_graphs
from benchmarks.measure import Comparison, circumstances
from benchmarks.memory import Finding, answers, compare_caches, footprint
from benchmarks.predict import CHIPS, as_dict, counted_drafting, predict
from benchmarks.samples import compare_steps, count_passes, hold
from benchmarks.speed import Workload, compare_models, compare_samplers, compare_turns
from benchmarks.synthetic import NARROW, TRUE_WIDTH, write_slice
from benchmarks.tables import (
    show_conversions,
    show_drafting,
    show_graphs,
    show_memory,
    show_predictions,
    show_samples,
    show_speeds,
)
from magistral_mlx.api import load
from magistral_mlx.checkpoint import resolve
from magistral_mlx.demo import demo_checkpoint
from magistral_mlx.errors import MagistralError, OptionError

# A pass at true width takes seconds on a CPU, and mlx-lm's in bf16 ten times as many.
WHOLE = Workload(prompt_tokens=256, decode_tokens=128, repeats=9)
SLICE_ON_CPU = Workload(prompt_tokens=8, decode_tokens=4, repeats=5)
QUICK = Workload(prompt_tokens=9, decode_tokens=6, repeats=2)
CONVERSATION_TOKENS = 2000

QUESTIONS = ("What is 48 + 76?", "How many r's are in strawberry?", "What is 9 * 37?", "What is 905 - 388?")
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
peer_option = click.option("--peer", type=click.Choice(["mlx-lm"]), help="Measure this beside ours, and the ratio.")
json_option = click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write every repeat here."
)


@click.group()
def benchmarks() -> None:
    """Measure what the project claims, on this machine."""


@benchmarks.command()
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
    _require(peer)
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
        comparisons.append(compare_models(model, folder, workload, peer=with_peer, report=_report))
        conversation = 64 if quick else CONVERSATION_TOKENS
        comparisons.append(compare_turns(model, folder, conversation, workload.repeats, report=_report))
    if synthetic is not None:
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        workload = replace(QUICK if quick else SLICE_ON_CPU if on_cpu else WHOLE, **given)
        config = replace(NARROW if quick else TRUE_WIDTH, num_layers=synthetic)
        title = f"{synthetic} layers, {config.hidden_size} wide"
        with tempfile.TemporaryDirectory(prefix="magistral-slice-") as name:
            _report(f"{title}: writing")
            write_slice(Path(name), config)
            comparisons.append(compare_models(title, Path(name), workload, peer=with_peer, report=_report))
    sampler_repeats = QUICK.repeats if quick else 15
    comparisons += [compare_samplers(B, sampler_repeats, peer=with_peer, report=_report) for B in (1, 8)]
    _write("speed", facts, comparisons, json_file)
    show_speeds(facts["chip"], comparisons)


@benchmarks.command()
@click.option("--synthetic", type=click.IntRange(1, 40), metavar="LAYERS", help="Layers of the true width; 4 if unset.")
@click.option("--source", type=FOLDER, help="Convert this HF checkpoint, not a synthetic one.")
@click.option("--keep-source", type=click.Path(path_type=Path), help="Write the synthetic one here, and leave it.")
@click.option("--work", type=FOLDER, help="For temporary files, which are deleted; the system's folder if unset.")
@click.option("--q-bits", type=int, default=4, show_default=True, help="Bits a weight, in groups of 64.")
@peer_option
@click.option("--repeats", type=int, help="Conversions by each; 3 if unset.")
@click.option("--quick", is_flag=True, help="Two repeats of a narrow model: does it run?")
@json_option
def convert(
    *,
    synthetic: int | None,
    source: Path | None,
    keep_source: Path | None,
    work: Path | None,
    q_bits: int,
    peer: str | None,
    repeats: int | None,
    quick: bool,
    json_file: Path | None,
) -> None:
    """Time, memory and bytes of a conversion, and whether the tensors are those of mlx-lm.

    \b
    python -m benchmarks convert --peer mlx-lm                  4 layers of the true shapes: 7 GB in, 2 GB out
    python -m benchmarks convert --synthetic 40 --repeats 1     all 40: 47 GB in, 13 GB out
    python -m benchmarks convert --source ~/Magistral-Small-2506
    """
    if source is not None and (synthetic is not None or keep_source is not None or quick):
        raise OptionError("--source is converted as it is; leave --synthetic, --keep-source and --quick out")
    _require(peer)
    facts = circumstances()
    home = Path(tempfile.gettempdir()) if work is None else work.absolute()
    times = repeats if repeats is not None else 2 if quick else 3
    job = Job(work=home, bits=q_bits, repeats=times, peer=peer is not None)
    if source is None:
        config = replace(NARROW if quick else TRUE_WIDTH, num_layers=synthetic or 4)
        comparison = compare_synthetic(config, job, keep=keep_source, report=_report)
    else:
        comparison = compare_source(source, job, report=_report)
    _write("convert", facts, [comparison], json_file)
    show_conversions(facts["chip"], comparison)


@benchmarks.command()
@click.option("--layers", type=click.IntRange(1, 40), default=40, show_default=True, help="Layers of a narrow model.")
@peer_option
@json_option
def graph(*, layers: int, peer: str | None, json_file: Path | None) -> None:
    """Primitives and kernels of one decode step: counted, so the same on every machine.

    \b
    python -m benchmarks graph --peer mlx-lm
    """
    _require(peer)
    facts = circumstances()
    with tempfile.TemporaryDirectory(prefix="magistral-slice-") as name:
        write_slice(Path(name), replace(NARROW, num_layers=layers))
        comparison = compare_graphs(f"{layers} layers, 4 bit", Path(name), peer=peer is not None)
    _write("graph", facts, [comparison], json_file)
    show_graphs(comparison)


@benchmarks.command()
@json_option
def drafting(*, json_file: Path | None) -> None:
    """What drafting saves: passes counted, at the published cost of rows, so the same on every machine."""
    magistral = load("demo")
    _report("asking the embedded model")
    found = count_all({"reasoning": list(traces(magistral)), **scripted(magistral.tokenizer)}, TABLES)
    if json_file is not None:
        results = {"row_costs": TABLES, "checkpoint": magistral.checkpoint.fingerprint()[:16], "drafting": found}
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    show_drafting(found)


@benchmarks.command("predict")
@click.option("--prompt-tokens", type=click.IntRange(1), default=2048, show_default=True, help="Length of the prompt.")
@json_option
def forecast(*, prompt_tokens: int, json_file: Path | None) -> None:
    """Decode and first token of the 24B model on Macs, predicted; and the command that checks it on one.

    Decode is the share of the bandwidth that such chips were seen to reach, over the bytes of weights and cache
    that a token reads; the first token is the prompt's operations over the share of the chip's speed, or a pass
    over the weights where that takes longer. Sources are in benchmarks/predict.py.
    """
    predictions = [predict(chip, prompt_tokens, counted_drafting()) for chip in CHIPS]
    if json_file is not None:
        json_file.write_text(json.dumps({"predict": [as_dict(p, prompt_tokens) for p in predictions]}, indent=1) + "\n")
    show_predictions(predictions, prompt_tokens)


@benchmarks.command()
@peer_option
@click.option("--prompt-tokens", type=int, help="Length of the prompt; 8192 if unset.")
@click.option("--repeats", type=int, help="Prefills by each; 3 if unset.")
@click.option("--quick", is_flag=True, help="A short prompt and a narrow model: does it run?")
@json_option
def memory(
    *, peer: str | None, prompt_tokens: int | None, repeats: int | None, quick: bool, json_file: Path | None
) -> None:
    """Memory of a prefill into an 8- and a 4-bit cache, what was forecast of it, and what packing costs in answers.

    The layers have the true width of attention, and narrow matrices: a prompt of 8,192 through true ones would
    take an hour on a CPU.

    \b
    python -m benchmarks memory --peer mlx-lm      an hour on two cores; a third of it with --repeats 1
    python -m benchmarks memory --quick            half a minute
    """
    _require(peer)
    facts = circumstances()
    tokens, times = prompt_tokens or (96 if quick else 8192), repeats or (1 if quick else 3)
    attention = replace(TRUE_WIDTH, hidden_size=1024, intermediate_size=1024, num_layers=2, vocab_size=2048)
    config = replace(NARROW, num_layers=2) if quick else attention
    with tempfile.TemporaryDirectory(prefix="magistral-slice-") as name:
        write_slice(Path(name), config)
        title = f"{config.num_layers} layers, {config.num_heads} heads"
        found = compare_caches(title, Path(name), tokens, times, peer=peer is not None, report=_report)
        comparisons = list(found)
    with tempfile.TemporaryDirectory(prefix="magistral-slice-") as name:
        wide = replace(NARROW if quick else TRUE_WIDTH, num_layers=2, vocab_size=2048)
        write_slice(Path(name), wide)
        shutil.copy(demo_checkpoint() / "tekken.json", name)
        footprints = [footprint(f"2 layers, {wide.hidden_size} wide", Path(name), 16, report=_report)]
    solved = list(answers(6 if quick else 200, report=_report))
    _write("memory", facts, [*comparisons, *footprints, *solved], json_file)
    show_memory(facts["chip"], comparisons, footprints, solved)


@benchmarks.command()
@click.option("--quick", is_flag=True, help="A short prompt, two repeats: does it run?")
@json_option
def samples(*, quick: bool, json_file: Path | None) -> None:
    """Several replies over one prompt: bytes of their caches, passes, and the time of a step, against single ones.

    \b
    python -m benchmarks samples             ten minutes on two cores
    python -m benchmarks samples --quick     half a minute
    """
    facts = circumstances()
    with tempfile.TemporaryDirectory(prefix="magistral-slice-") as name:
        write_slice(Path(name), replace(NARROW, num_layers=1))
        prompt, new = (64, 16) if quick else (4096, 1000)
        held = [
            hold(Path(name), 16, prompt_tokens=prompt, new_tokens=new, kv_bits=bits, report=_report)
            for bits in (None, 8, 4)
        ]
    passes = count_passes(2 if quick else 16, QUESTIONS[: 1 if quick else None], _report)
    workload = QUICK if quick else replace(WHOLE, decode_tokens=64, repeats=7)
    steps = [compare_steps("demo", demo_checkpoint(), n, workload, _report) for n in ((2,) if quick else (2, 4, 8, 16))]
    if json_file is not None:
        found = {"held": [h.as_dict() for h in held], "passes": passes, "decode": [c.as_dict() for c in steps]}
        results = {"circumstances": facts, "command": _command(sys.argv[1:]), "samples": found}
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    show_samples(facts["chip"], held, passes, steps)


def _require(peer: str | None) -> None:
    if peer is not None and importlib.util.find_spec("mlx_lm") is None:
        raise OptionError("--peer mlx-lm needs mlx-lm; install it with: pip install 'magistral-mlx[bench]'")


def _write(
    kind: str,
    facts: dict[str, Any],
    comparisons: Sequence[Comparison | GraphComparison | Finding],
    file: Path | None,
) -> None:
    if file is not None:
        results = {"circumstances": facts, "command": _command(sys.argv[1:]), kind: [c.as_dict() for c in comparisons]}
        file.write_text(json.dumps(results, indent=1) + "\n")


def _command(arguments: Sequence[str]) -> list[str]:
    """What to type for the same figures; where files go says nothing about them, and is nobody's business."""
    pairs = zip(arguments, ["", *arguments], strict=False)
    return [one for one, before in pairs if not {one, before} & {"--json", "--work"}]


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit code: 0 done, 2 something to change, 130 interrupted."""
    try:
        benchmarks.main(
            args=None if argv is None else list(argv), prog_name="python -m benchmarks", standalone_mode=False
        )
    except (click.Abort, KeyboardInterrupt):
        return 130
    except click.ClickException as error:
        error.show()
        return 2
    except MagistralError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: else 60 GB of temporary files would stay
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
