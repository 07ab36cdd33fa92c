"""``cache``: saving a conversation and opening it again."""

import tempfile
from pathlib import Path

import click

from benchmarks.commands.shared import FOLDER, json_option, report, write
from benchmarks.measure import circumstances
from benchmarks.report.tables import show_cache_files
from benchmarks.runtime.cache import TOKENS, Prediction, compare_files


@click.command()
@click.option(
    "--layers",
    type=click.IntRange(1, 40),
    default=6,
    show_default=True,
    help="Of the true width; 40 on a Mac.",
)
@click.option(
    "--work",
    type=FOLDER,
    help="A folder on the drive to measure; the system's for temporary files if unset.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=7,
    show_default=True,
    help="Repeats counted, after a warm-up.",
)
@click.option("--quick", is_flag=True, help="A short cache, one repeat: does it run?")
@json_option
def cache(
    *, layers: int, work: Path | None, repeats: int, quick: bool, json_file: Path | None
) -> None:
    """Bytes a second of saving a KV cache of 40,960 positions and of opening it, and what a Mac should take.

    \b
    python -m benchmarks cache                 1 GB of cache, two minutes
    python -m benchmarks cache --layers 40     the whole model's: 6.7 GB on the drive, twice, and in memory
    """
    facts = circumstances()
    home = Path(tempfile.gettempdir()) if work is None else work.absolute()
    tokens, times, layers = (300, 1, 2) if quick else (TOKENS, repeats, layers)
    found = [compare_files(layers, tokens, bits, times, home, report=report) for bits in (None, 8)]
    predicted = [Prediction.of(TOKENS, bits) for bits in (None, 8, 4)]
    write("cache", facts, [*found, *predicted], json_file)
    show_cache_files(facts["chip"], found, predicted)
