"""``memory``: peaks beside what was forecast."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.commands.shared import (
    MINUTES,
    json_option,
    peer_option,
    plot_option,
    plot_results,
    report,
    require,
    written,
)
from benchmarks.measure import circumstances
from benchmarks.report.tables import show_memory
from benchmarks.runtime.memory import Prefills, answers, compare_caches, footprint
from benchmarks.synthetic import NARROW, TRUE_WIDTH, write_slice
from magistral_mlx.checkpoint.folder import resolve
from magistral_mlx.demo import demo_checkpoint
from magistral_mlx.errors import OptionError

CONTEXTS = (512, 4096, 16_384, 40_960)
FOOTPRINT_TOKENS = 16


@click.command()
@click.option(
    "--model",
    metavar="demo|PATH",
    help="A checkpoint in MLX layout, instead of one for this benchmark.",
)
@click.option(
    "--synthetic",
    type=click.IntRange(1, 40),
    metavar="LAYERS",
    help="Layers of the true width, random.",
)
@peer_option
@click.option("--prompt-tokens", type=int, help="Length of the prompt, instead of all contexts.")
@click.option("--repeats", default=1, show_default=True, help="Prefills by each.")
@click.option(
    "--minutes",
    type=MINUTES,
    default=30.0,
    show_default=True,
    help="Contexts that could take longer are left out.",
)
@click.option("--quick", is_flag=True, help="A short prompt and a narrow model: does it run?")
@json_option
@plot_option
def memory(
    *,
    model: str | None,
    synthetic: int | None,
    peer: str | None,
    prompt_tokens: int | None,
    repeats: int,
    minutes: float,
    quick: bool,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Memory of a prefill into a float, an 8- and a 4-bit cache, what was forecast of it, and what packing costs.

    Unless a model is named, the layers have the true width of attention, and narrow matrices: a prompt of 8,192
    through true ones would take an hour on a CPU.

    \b
    python -m benchmarks memory --peer mlx-lm                        half an hour on two cores
    python -m benchmarks memory --model ~/magistral-4bit --repeats 3
    python -m benchmarks memory --quick                              half a minute
    """
    require(peer)
    if model is not None and synthetic is not None:
        raise OptionError(
            "--model names a checkpoint and --synthetic makes one; leave one of them out"
        )
    facts = circumstances()
    lengths = (
        (prompt_tokens,)
        if prompt_tokens is not None
        else (96,)
        if quick
        else tuple(n - 1 for n in CONTEXTS)
    )
    prefills = Prefills(lengths, repeats, 60 * minutes)
    with tempfile.TemporaryDirectory(prefix="magistral-slice-") as name:
        title, folder = _checkpoint(model, synthetic, Path(name), quick=quick)
        comparisons = list(
            compare_caches(title, folder, prefills, peer=peer is not None, report=report)
        )
    footprints = []
    if model is None:
        with tempfile.TemporaryDirectory(prefix="magistral-slice-") as name:
            wide = replace(NARROW if quick else TRUE_WIDTH, num_layers=2, vocab_size=2048)
            write_slice(Path(name), wide)
            shutil.copy(demo_checkpoint() / "tekken.json", name)
            title = f"2 layers, {wide.hidden_size} wide"
            footprints.append(footprint(title, Path(name), FOOTPRINT_TOKENS, report=report))
    else:
        footprints.append(footprint(model, folder, FOOTPRINT_TOKENS, report=report))
    solved = list(answers(6 if quick else 200, report=report))
    plot_results(written("memory", facts, [*comparisons, *footprints, *solved], json_file), plot)
    show_memory(facts["chip"], comparisons, footprints, solved)


def _checkpoint(
    model: str | None, synthetic: int | None, folder: Path, *, quick: bool
) -> tuple[str, Path]:
    """The one named, or one written into ``folder``."""
    if model is not None:
        return model, demo_checkpoint() if model == "demo" else resolve(model, layout="hf")
    attention = replace(
        TRUE_WIDTH, hidden_size=1024, intermediate_size=1024, num_layers=4, vocab_size=2048
    )
    config = attention if synthetic is None else replace(TRUE_WIDTH, num_layers=synthetic)
    config = replace(NARROW, num_layers=synthetic or 2) if quick else config
    write_slice(folder, config)
    return f"{config.num_layers} layers, {config.num_heads} heads", folder
