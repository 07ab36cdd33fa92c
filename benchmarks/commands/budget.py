"""``budget``: right answers of the embedded model under a thinking budget."""

from pathlib import Path
from typing import Any

import click

from benchmarks.commands.shared import json_option, report, write_results
from benchmarks.measure import circumstances
from benchmarks.report.tables_counted import show_budgets
from benchmarks.runtime.budget import at_line_ends, counts, traces
from magistral_mlx.engine.load import load


@click.command()
@click.option(
    "--problems",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Held-out problems.",
)
@click.option(
    "--temp", type=float, default=0.7, show_default=True, help="Temperature of the traces."
)
@json_option
def budget(*, problems: int, temp: float, json_file: Path | None) -> None:
    """Right answers where a budget ends a trace at its last token, against at a line where the closing tag is likely.

    Every trace is closed at the end of each line and of each budget, and each answer is the most probable one there.

    \b
    python -m benchmarks budget                two minutes on two cores
    python -m benchmarks budget --problems 2   does it run?
    """
    facts = circumstances()
    found = list(traces(load("demo"), problems, temp, report))
    results: dict[str, Any] = {"problems": problems, "temperature": temp, "traces": len(found)}
    results |= {"budgets": counts(found), "places": at_line_ends(found)}
    write_results("budget", facts, results, json_file)
    show_budgets(results)
