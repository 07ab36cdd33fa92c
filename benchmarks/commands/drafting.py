"""``drafting``: the passes that guessing saves."""

from pathlib import Path

import click

from benchmarks.command_line import json_option, write_file
from benchmarks.measure import report
from benchmarks.report.table import show
from benchmarks.runtime.drafting import TABLES, count_all, scripted, traces
from magistral_mlx.engine.load import load


@click.command()
@json_option
def drafting(*, json_file: Path | None) -> None:
    """Count the passes that drafting saves, by published costs."""
    magistral = load("demo")
    report("asking the embedded model")
    texts = {"reasoning": list(traces(magistral)), **scripted(magistral.tokenizer)}
    found = count_all(texts, TABLES)
    if json_file is not None:
        checkpoint = magistral.checkpoint.fingerprint()[:16]
        results = {"row_costs": TABLES, "checkpoint": checkpoint, "drafting": found}
        write_file(json_file, results)
    keys = ("tokens", "passes", "cost_per_token", "highest_of_a_reply", "goal")
    show(
        "Drafting from the text so far; counted, not timed",
        "cost of rows | text",
        "tokens | passes | cost a token, in plain passes | highest of a reply | goal, at most",
        [
            (name, kind, *(row[key] for key in keys))
            for name, kinds in found.items()
            for kind, row in kinds.items()
        ],
    )
