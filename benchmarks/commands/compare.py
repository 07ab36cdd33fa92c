"""``compare``: two result files."""

import json
from pathlib import Path
from typing import Any

import click

from benchmarks.command_line import json_option, write_file
from benchmarks.measure import report
from benchmarks.report.compare import Change, differences, only_in_one
from benchmarks.report.compare import compare as compare_results
from benchmarks.report.table import RATIO, show
from magistral_mlx.errors import OptionError

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
REGRESSION = 1


@click.command()
@click.argument("before", metavar="A.json", type=FILE)
@click.argument("after", metavar="B.json", type=FILE)
@click.option("--margin", default=0.05, show_default=True, help="Share that a measure may lose.")
@click.option("--all", "everything", is_flag=True, help="Show unchanged figures too.")
@json_option
@click.pass_context
def compare(
    context: click.Context,
    *,
    before: Path,
    after: Path,
    margin: float,
    everything: bool,
    json_file: Path | None,
) -> None:
    """Show ratios of B to A; exit with 1 if a figure got worse.

    Only figures of ours count. Ratios have an interval of 95 %. A measure got worse if the whole
    interval is below 1 less the margin, and a count if it got worse at all. Take both files on the
    same machine with nothing else running.

    \b
    python -m benchmarks compare before.json after.json
    """
    if json_file and json_file.exists() and any(map(json_file.samefile, (before, after))):
        raise OptionError(f"--json {json_file} is one of the compared files; name another")
    one, other = _read(before), _read(after)
    try:
        changes, found = compare_results(one, other, margin), differences(one, other)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise OptionError(f"{before} or {after} is damaged ({error!r}); measure it again") from None
    for difference in found:
        report(f"not the same in both: {difference}")
    if json_file is not None:
        write_file(json_file, {"compare": [c.as_dict() for c in changes], "margin": margin})
    moved = [c for c in changes if c.is_regression or abs(c.ratio.median - 1) > margin]
    chosen = sorted(changes if everything else moved, key=lambda c: (not c.is_regression, c.name))
    show(
        f"B against A; over 1 is better; {RATIO}",
        "figure",
        "A | B | ratio | the machine | ",
        map(_row, chosen),
    )
    worse = sum(change.is_regression for change in changes)
    print(f"{len(changes)} figures in both; {worse or 'none'} worse beyond noise and {margin:.3g}")
    alone = only_in_one(one, other)
    if any(alone):
        report(f"{alone[0]} figures are only in {before.name}, {alone[1]} only in {after.name}")
    if worse:
        context.exit(REGRESSION)


def _row(change: Change) -> tuple[object, ...]:
    return (
        change.name,
        f"{change.before:.4g}",
        f"{change.after:.4g}",
        change.ratio,
        "" if change.machine == 1 else f"{change.machine:.3g}",
        "worse" if change.is_regression else "" if change.is_ours else "not ours",
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path} is no JSON: {error}") from None
