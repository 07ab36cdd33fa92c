"""``drafting``: passes that guessing saves."""

import json
from pathlib import Path

import click

from benchmarks.commands.shared import json_option, report
from benchmarks.report.tables_counted import show_drafting
from benchmarks.runtime.drafting import TABLES, count_all, scripted, traces
from magistral_mlx.engine.load import load


@click.command()
@json_option
def drafting(*, json_file: Path | None) -> None:
    """What drafting saves: passes counted, at the published cost of rows, so the same on every machine."""
    magistral = load("demo")
    report("asking the embedded model")
    found = count_all(
        {"reasoning": list(traces(magistral)), **scripted(magistral.tokenizer)}, TABLES
    )
    if json_file is not None:
        results = {
            "row_costs": TABLES,
            "checkpoint": magistral.checkpoint.fingerprint()[:16],
            "drafting": found,
        }
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    show_drafting(found)
