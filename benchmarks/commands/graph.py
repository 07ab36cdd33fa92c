"""``graph``: the kernels of one decode step."""

import tempfile
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.command_line import LAYERS, json_option, peer_option, write
from benchmarks.measure import OURS, circumstances
from benchmarks.report.table import show
from benchmarks.runtime.graph import compare_graphs
from benchmarks.synthetic import NARROW, write_slice


@click.command()
@click.option("--layers", type=LAYERS, default=40, show_default=True, help="Of a narrow model.")
@peer_option
@json_option
def graph(*, layers: int, peer: bool, json_file: Path | None) -> None:
    """Count primitives and kernels of one decode step. Every machine gives the same counts.

    \b
    python -m benchmarks graph --peer mlx-lm
    """
    facts = circumstances()
    with tempfile.TemporaryDirectory(prefix="magistral-slice-") as name:
        write_slice(Path(name), replace(NARROW, num_layers=layers))
        comparison = compare_graphs(f"{layers} layers, 4 bit", Path(name), peer=peer)
    write("graph", facts, [comparison], json_file)
    rows = []
    for who, one in comparison.graphs.items():
        counts = one.primitives.total(), one.kernels.total(), f"{one.kernels_per_layer:.2f}"
        ratios = [f"{ratio:.3f}" for ratio in comparison.ratios(who)] if who != OURS else ["", ""]
        rows.append((who, *counts, *ratios))
    show(
        f"One decode step, {comparison.title}; counted, not timed",
        "who",
        "primitives, CPU | kernels, GPU | kernels a layer | primitives, ours/theirs | kernels",
        rows,
    )
