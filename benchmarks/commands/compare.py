"""``compare``: two result files."""

import json
from pathlib import Path
from typing import Any

import click

from benchmarks.commands.shared import json_option, report, write_file
from benchmarks.report.compare import compare as compare_results
from benchmarks.report.compare import differences, only_in_one
from benchmarks.report.tables_counted import show_changes
from magistral_mlx.errors import OptionError

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
REGRESSION = 1


@click.command()
@click.argument("before", metavar="A.json", type=FILE)
@click.argument("after", metavar="B.json", type=FILE)
@click.option(
    "--margin",
    default=0.05,
    show_default=True,
    help="What a measure may lose before it is a regression.",
)
@click.option("--all", "everything", is_flag=True, help="Show what stayed the same too.")
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
    """Ratios of B to A with a 95 % bootstrap interval; exit code 1 where ours got worse beyond noise.

    A measure got worse where the whole interval is below 1 less the margin; what is counted, where it got worse at
    all. Takes what any command here that measures wrote with --json; take both on the same machine, with nothing else
    running.

    \b
    python -m benchmarks compare before.json after.json
    """
    if (
        json_file is not None
        and json_file.exists()
        and any(map(json_file.samefile, (before, after)))
    ):
        raise OptionError(f"--json {json_file} is one of the files that are compared; name another")
    one, other = _read(before), _read(after)
    try:
        changes, found = compare_results(one, other, margin), differences(one, other)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise OptionError(f"{before} or {after} is damaged ({error!r}); measure it again") from None
    for difference in found:
        report(f"not the same in both: {difference}")
    if json_file is not None:
        write_file(json_file, {"compare": [c.as_dict() for c in changes], "margin": margin})
    show_changes(changes, margin, everything=everything)
    alone = only_in_one(one, other)
    if any(alone):
        report(
            f"{alone[0]} figures are in {before.name} alone and {alone[1]} in {after.name}: of other work, or weights"
        )
    if any(change.is_regression for change in changes):
        context.exit(REGRESSION)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path} is no JSON: {error}") from None
