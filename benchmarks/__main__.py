"""``python -m benchmarks``: parse, measure, show. Progress goes to stderr, the table to stdout."""

import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import mlx.core as mx
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Interval, circumstances
from benchmarks.speed import OURS, Comparison, Workload, compare_models, compare_samplers
from benchmarks.synthetic import NARROW, TRUE_WIDTH, write_slice
from magistral_mlx.checkpoint import resolve
from magistral_mlx.demo import demo_checkpoint
from magistral_mlx.errors import MagistralError, OptionError

# A pass at true width takes seconds on a CPU, and mlx-lm's in bf16 ten times as many.
WHOLE = Workload(prompt_tokens=256, decode_tokens=128, repeats=9)
SLICE_ON_CPU = Workload(prompt_tokens=8, decode_tokens=4, repeats=5)
QUICK = Workload(prompt_tokens=9, decode_tokens=6, repeats=2)


@click.group()
def benchmarks() -> None:
    """Measure what the project claims, on this machine."""


@benchmarks.command()
@click.option("--model", metavar="demo|PATH", help="A checkpoint in MLX layout, or the embedded one in 4 bit.")
@click.option("--synthetic", type=click.IntRange(1, 40), metavar="LAYERS", help="Layers of the true width, random.")
@click.option("--peer", type=click.Choice(["mlx-lm"]), help="Measure this beside ours, and the ratio.")
@click.option("--prompt-tokens", type=int, help="Length of the prompt.")
@click.option("--tokens", type=int, help="Ids decoded after the first.")
@click.option("--repeats", type=int, help="Repeats counted, after one warm-up.")
@click.option("--quick", is_flag=True, help="A few ids, two repeats, and a narrow model: does it run?")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write every repeat here.")
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
    if peer is not None and importlib.util.find_spec("mlx_lm") is None:
        raise OptionError("--peer mlx-lm needs mlx-lm; install it with: pip install 'magistral-mlx[bench]'")
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
    if json_file is not None:
        results = {"circumstances": facts, "command": sys.argv[1:], "speed": [c.as_dict() for c in comparisons]}
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    _show(facts["chip"], comparisons)


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(chip: str, comparisons: Sequence[Comparison]) -> None:
    table = Table(title=f"{chip}, {mx.default_device()}; median (slowest to fastest repeat); ratio with 95 % interval")
    for column in ("what", "phase", "who", "a second", "weights read", "CPU ms each", f"{OURS} is"):
        table.add_column(column, justify="left" if column in ("what", "phase", "who") else "right")
    for comparison in comparisons:
        for phase, name, per_second, cpu_seconds, ratio in comparison.rows():
            read = (
                f"{per_second.median * comparison.facts['bytes_per_token'] / 1e9:.3g} GB/s" if phase == "decode" else ""
            )
            times = "" if ratio is None else f"{_show_interval(ratio)} times as fast"
            row = (comparison.title, phase, name, _show_interval(per_second), read, f"{1000 * cpu_seconds:.3g}", times)
            table.add_row(*row)
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _show_interval(interval: Interval) -> str:
    return f"{interval.median:.3g} ({interval.low:.3g} to {interval.high:.3g})"


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
    sys.exit(main())
