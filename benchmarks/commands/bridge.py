"""``bridge``: what a host of the bridge feels."""

import tempfile
from pathlib import Path

import click

from benchmarks.commands.shared import json_option, write
from benchmarks.measure import circumstances
from benchmarks.report.tables import show_felt
from benchmarks.runtime.bridge import feel


@click.command()
@click.option("--model", default="demo", show_default=True, metavar="M", help="A folder, or demo.")
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="After one for warming up.",
)
@json_option
def bridge(*, model: str, repeats: int, json_file: Path | None) -> None:
    """How long each call of the bridge takes, how soon events come, and how long the GIL is held.

    \b
    python -m benchmarks bridge
    """
    facts = circumstances()
    with tempfile.TemporaryDirectory(prefix="magistral-bridge-") as name:
        felt = feel(model, repeats, Path(name))
    write("bridge", facts | {"model": model, "repeats": repeats}, [felt], json_file)
    show_felt(str(facts["chip"]), felt)
