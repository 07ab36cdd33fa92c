"""``convert``: a conversion beside mlx-lm's."""

import tempfile
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.command_line import (
    FOLDER,
    json_option,
    peer_option,
    quick_option,
    synthetic_option,
    write,
)
from benchmarks.converter.convert import Job, compare_conversions
from benchmarks.measure import circumstances
from benchmarks.report.table import RATIO, TIMES, show
from benchmarks.synthetic import NARROW, TRUE_WIDTH
from magistral_mlx.convert.recipe.options import METHODS

LAYERS = 4


@click.command()
@synthetic_option
@click.option("--vocab-size", type=click.IntRange(1256), metavar="N", help="Of the random layers.")
@click.option("--work", type=FOLDER, help="For temporary files; the system's folder if unset.")
@click.option("--q-bits", default=4, show_default=True, help="Bits a weight, in groups of 64.")
@click.option(
    "--q-method", type=click.Choice(METHODS), default="round", show_default=True, help="Ours."
)
@peer_option
@click.option("--repeats", type=int, help="Conversions by each; 3 if unset.")
@quick_option
@json_option
def convert(
    *,
    synthetic: int | None,
    vocab_size: int | None,
    work: Path | None,
    q_bits: int,
    q_method: str,
    peer: bool,
    repeats: int | None,
    quick: bool,
    json_file: Path | None,
) -> None:
    """Measure a conversion, and compare its tensors with mlx-lm's.

    Its time and memory are measured.

    \b
    python -m benchmarks convert --peer mlx-lm
    python -m benchmarks convert --synthetic 40 --repeats 1

    The first reads 4 layers, 7 GB, and writes 2 GB. The second reads all 40, 47 GB, and writes
    13 GB.
    """
    facts = circumstances()
    home = Path(tempfile.gettempdir()) if work is None else work.absolute()
    times = repeats if repeats is not None else 2 if quick else 3
    job = Job(work=home, bits=q_bits, repeats=times, peer=peer, method=q_method)
    config = replace(NARROW if quick else TRUE_WIDTH, num_layers=synthetic or LAYERS)
    config = replace(config, vocab_size=vocab_size or config.vocab_size)
    comparison = compare_conversions(config, job)
    write("convert", facts, [comparison], json_file)
    rows = []
    for _, name, per_second, _, ratio in comparison.rows():
        own = comparison.facts["contenders"][name]
        rows.append(
            (
                name,
                f"{own['seconds']:.2f}",
                f"{own['seconds_and_sync']:.2f}",
                f"{own['cpu_seconds']:.2f}",
                per_second.scaled(1e-9),
                f"{own['peak_bytes_above_interpreter'] / 1e6:,.0f} MB",
                f"{own['output_bytes'] / 1e6:,.0f} MB",
                "equal" if own["same_tensors"] else f"{len(own['different_tensors'])} differ",
                ratio,
            )
        )
    gigabytes = comparison.facts["source"]["bytes"] / 1e9
    show(
        f"{comparison.title}, {gigabytes:.2f} GB, to {q_bits} bit by {q_method} on "
        f"{facts['chip']}; median of {times}, highest peak; {RATIO}",
        "who",
        f"seconds | with sync | CPU s | GB/s | peak above imports | written | tensors | {TIMES}",
        rows,
    )
