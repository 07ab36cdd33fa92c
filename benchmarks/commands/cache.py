"""``cache``: saving a conversation and opening it again."""

import tempfile
from pathlib import Path

import click

from benchmarks.command_line import COUNT, FOLDER, LAYERS, json_option, quick_option, write
from benchmarks.measure import circumstances
from benchmarks.report.table import RATIO, TIMES, show
from benchmarks.runtime.cache import TOKENS, compare_files


@click.command()
@click.option("--layers", type=LAYERS, default=6, show_default=True, help="Of the true width.")
@click.option("--work", type=FOLDER, help="A folder on the drive to measure; else the system's.")
@click.option("--repeats", type=COUNT, default=7, show_default=True, help="After a warm-up.")
@quick_option
@json_option
def cache(
    *, layers: int, work: Path | None, repeats: int, quick: bool, json_file: Path | None
) -> None:
    """Time saving and opening a KV cache, in bf16 and in 8 bit.

    It holds 40,960 positions.

    \b
    python -m benchmarks cache                1 GB of cache, two minutes
    python -m benchmarks cache --layers 40    the whole model: 6.7 GB, twice
    """
    facts = circumstances()
    home = Path(tempfile.gettempdir()) if work is None else work.absolute()
    tokens, times, layers = (300, 1, 2) if quick else (TOKENS, repeats, layers)
    found = [compare_files(layers, tokens, bits, times, home) for bits in (None, 8)]
    write("cache", facts, found, json_file)
    show(
        f"A cache's file on {facts['chip']}; median (slowest to fastest repeat); {RATIO}",
        "cache | phase | who",
        f"GB/s | CPU s a GB | {TIMES}",
        [
            (comparison.title, phase, name, speed.scaled(1e-9), f"{1e9 * cpu:.3g}", ratio)
            for comparison in found
            for phase, name, speed, cpu, ratio in comparison.rows()
        ],
    )
