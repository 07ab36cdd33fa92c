"""``graph``: what one decode step launches."""

import tempfile
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.commands.shared import json_option, peer_option, require, write
from benchmarks.measure import circumstances
from benchmarks.report.tables_counted import show_graphs
from benchmarks.runtime.graph import compare_graphs
from benchmarks.synthetic import NARROW, write_slice


@click.command()
@click.option(
    "--layers",
    type=click.IntRange(1, 40),
    default=40,
    show_default=True,
    help="Layers of a narrow model.",
)
@peer_option
@json_option
def graph(*, layers: int, peer: str | None, json_file: Path | None) -> None:
    """Primitives and kernels of one decode step: counted, so the same on every machine.

    \b
    python -m benchmarks graph --peer mlx-lm
    """
    require(peer)
    facts = circumstances()
    with tempfile.TemporaryDirectory(prefix="magistral-slice-") as name:
        write_slice(Path(name), replace(NARROW, num_layers=layers))
        comparison = compare_graphs(f"{layers} layers, 4 bit", Path(name), peer=peer is not None)
    write("graph", facts, [comparison], json_file)
    show_graphs(comparison)
