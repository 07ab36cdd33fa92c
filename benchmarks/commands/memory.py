"""``memory``: peaks beside their forecast."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click

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
from benchmarks.commands.speed import CONTEXTS
from benchmarks.measure import OURS, Comparison, circumstances
from benchmarks.report.table import RATIO, TIMES, show
from benchmarks.runtime.memory import Prefills, answers, compare_caches
from benchmarks.synthetic import NARROW, TRUE_WIDTH, write_slice
from magistral_mlx.checkpoint.folder import resolve
from magistral_mlx.demo import demo_checkpoint
from magistral_mlx.errors import OptionError

QUICK_PROMPT = 96


@click.command()
@model_option
@synthetic_option
@peer_option
@prompt_option
@click.option("--repeats", default=1, show_default=True, help="Prefills by each.")
@click.option(
    "--minutes",
    type=MINUTES,
    default=30.0,
    show_default=True,
    help="Leave out contexts that could take longer.",
)
@quick_option
@json_option
def memory(
    *,
    model: str | None,
    synthetic: int | None,
    peer: bool,
    prompt_tokens: int | None,
    repeats: int,
    minutes: float,
    quick: bool,
    json_file: Path | None,
) -> None:
    """Measure a prefill's memory and its forecast by cache format.

    The caches are float, 8-bit and 4-bit; their errors are measured, too. Unless a model is named,
    the layers have the true width of attention and narrow matrices: a prompt of 8,192 through true
    ones takes an hour on a CPU.

    \b
    python -m benchmarks memory --peer mlx-lm      half an hour on two cores
    python -m benchmarks memory --model ~/magistral-4bit --repeats 3
    python -m benchmarks memory --quick            half a minute
    """
    if model is not None and synthetic is not None:
        raise OptionError("--model names a checkpoint and --synthetic makes one; use one of them")
    facts = circumstances()
    lengths = [QUICK_PROMPT] if quick else [context - 1 for context in CONTEXTS]
    prefills = Prefills([prompt_tokens] if prompt_tokens else lengths, repeats, 60 * minutes)
    with tempfile.TemporaryDirectory(prefix="magistral-slice-") as name:
        title, folder = _checkpoint(model, synthetic, Path(name), quick=quick)
        comparisons = list(compare_caches(title, folder, prefills, peer=peer))
    solved = list(answers(6 if quick else 200))
    write("memory", facts, [*comparisons, *solved], json_file)
    show(
        f"Prefill on {facts['chip']}; highest peak above the weights; {RATIO}",
        "what | prompt | who",
        f"tok/s | peak | ours/theirs | forecast/measured | in all | logits error | {TIMES}",
        _prefill_rows(comparisons),
    )
    show(
        "Answers with a packed cache",
        "model",
        "held-out problems | exact",
        [(one.title, one.facts["problems"], f"{one.facts['exact']:.1%}") for one in solved],
    )


def _checkpoint(
    model: str | None, synthetic: int | None, folder: Path, *, quick: bool
) -> tuple[str, Path]:
    """Return the named checkpoint, or one that is written into ``folder``."""
    if model is not None:
        return model, demo_checkpoint() if model == "demo" else resolve(model, layout="hf")
    config = replace(NARROW if quick else TRUE_WIDTH, num_layers=synthetic or 2)
    if synthetic is None and not quick:
        config = replace(config, hidden_size=1024, intermediate_size=1024, num_layers=4)
        config = replace(config, vocab_size=2048)
    write_slice(folder, config)
    return f"{config.num_layers} layers, {config.num_heads} heads", folder


def _prefill_rows(comparisons: Sequence[Comparison]) -> Iterator[tuple[object, ...]]:
    for comparison in comparisons:
        facts = comparison.facts
        own = (
            f"{facts['forecast_over_measured']:.3f}",
            f"{facts['forecast_over_measured_in_all']:.3f}",
            f"{facts['logits_error']:.2%}",
        )
        for _, name, per_second, _, ratio in comparison.rows():
            share = facts["ours_over_theirs"].get(name)
            yield (
                comparison.title,
                f"{facts['prompt_tokens']:,}",
                name,
                per_second,
                f"{facts['peak_bytes_above_weights'][name] / 1e6:,.0f} MB",
                share and f"{share:.3f}",
                *(own if name == OURS else (None, None, None)),
                ratio,
            )
