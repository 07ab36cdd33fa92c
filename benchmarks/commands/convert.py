"""``convert``: a conversion beside mlx-lm's."""

import tempfile
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.commands.shared import FOLDER, json_option, peer_option, report, require, write
from benchmarks.converter.convert import Job, compare_source, compare_synthetic
from benchmarks.measure import circumstances
from benchmarks.report.tables import show_conversions
from benchmarks.synthetic import NARROW, TRUE_WIDTH
from magistral_mlx.convert.recipe.options import METHODS
from magistral_mlx.errors import OptionError


@click.command()
@click.option(
    "--synthetic",
    type=click.IntRange(1, 40),
    metavar="LAYERS",
    help="Layers of the true width; 4 if unset.",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(1256),
    metavar="N",
    help="Of the synthetic one, not the true 131,072.",
)
@click.option("--source", type=FOLDER, help="Convert this HF checkpoint, not a synthetic one.")
@click.option(
    "--keep-source",
    type=click.Path(path_type=Path),
    help="Write the synthetic one here, and leave it.",
)
@click.option(
    "--work",
    type=FOLDER,
    help="For temporary files, which are deleted; the system's folder if unset.",
)
@click.option(
    "--q-bits", type=int, default=4, show_default=True, help="Bits a weight, in groups of 64."
)
@click.option(
    "--q-method", type=click.Choice(METHODS), default="round", show_default=True, help="Ours."
)
@peer_option
@click.option("--repeats", type=int, help="Conversions by each; 3 if unset.")
@click.option("--quick", is_flag=True, help="Two repeats of a narrow model: does it run?")
@json_option
def convert(
    *,
    synthetic: int | None,
    vocab_size: int | None,
    source: Path | None,
    keep_source: Path | None,
    work: Path | None,
    q_bits: int,
    q_method: str,
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
    if source is not None and (
        synthetic is not None or vocab_size is not None or keep_source is not None or quick
    ):
        raise OptionError(
            "--source is converted as it is; leave --synthetic, --vocab-size, --keep-source, --quick out"
        )
    require(peer)
    facts = circumstances()
    home = Path(tempfile.gettempdir()) if work is None else work.absolute()
    times = repeats if repeats is not None else 2 if quick else 3
    job = Job(work=home, bits=q_bits, repeats=times, peer=peer is not None, method=q_method)
    if source is None:
        config = replace(NARROW if quick else TRUE_WIDTH, num_layers=synthetic or 4)
        config = config if vocab_size is None else replace(config, vocab_size=vocab_size)
        comparison = compare_synthetic(config, job, keep=keep_source, report=report)
    else:
        comparison = compare_source(source, job, report=report)
    write("convert", facts, [comparison], json_file)
    show_conversions(facts["chip"], comparison)
