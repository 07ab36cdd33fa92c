"""``search``: how fast the quantizer finds scales and biases."""

from pathlib import Path

import click

from benchmarks.commands.shared import json_option, write
from benchmarks.converter.search import time_search
from benchmarks.measure import circumstances, spread
from magistral_mlx.checkpoint.quant_format import QuantFormat


@click.command()
@click.option(
    "--q-bits",
    type=int,
    multiple=True,
    default=(4,),
    show_default=True,
    help="Bits, in groups of 64.",
)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@json_option
def search(*, q_bits: tuple[int, ...], repeats: int, json_file: Path | None) -> None:
    """Weights a second that are searched by importance, on all cores.

    \b
    python -m benchmarks search --q-bits 4 --q-bits 3
    """
    facts = circumstances()
    found = [time_search(QuantFormat(bits, 64), repeats) for bits in q_bits]
    write("search", facts, found, json_file)
    for finding in found:
        rate = spread(finding.laps)
        print(
            f"{finding.quant.bits} bit: {rate.median / 1e6:.1f} million weights/s "
            f"({rate.low / 1e6:.1f} to {rate.high / 1e6:.1f}) on {finding.streams} streams"
        )
