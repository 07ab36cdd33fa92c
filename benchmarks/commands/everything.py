"""``all``: every benchmark of this machine, one result file each."""

import json
import re
from pathlib import Path

import click

from benchmarks.command_line import (
    check_file,
    check_folder,
    model_option,
    peer_option,
    quick_option,
    typed,
    write_file,
)
from benchmarks.measure import circumstances, report
from magistral_mlx.errors import OptionError

COMMANDS = {  # with the options of a quick run
    "speed": ("--quick",),
    "memory": ("--quick",),
    "cache": ("--quick",),
    "convert": ("--quick",),
    "samples": ("--quick",),
    "graph": ("--layers", "2"),
    "quality": ("--quick",),
    "reasoning": ("--limit", "2"),
    "drafting": (),
}
ARGUMENTS = {"reasoning": ("--task", "demo-arithmetic", "--samples", "4")}
WITH_PEER = ("speed", "memory", "convert", "graph")
WITH_MODEL = ("speed", "memory", "reasoning")
EVERY_MACHINE = {"graph": "decode-step", "drafting": "drafting-counts"}  # counted, not timed


@click.command("all")
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the results.",
)
@model_option
@peer_option
@click.option("--only", multiple=True, type=click.Choice(list(COMMANDS)), help="Only these.")
@quick_option
@click.pass_context
def everything(
    context: click.Context,
    *,
    out: Path,
    model: str | None,
    peer: bool,
    only: tuple[str, ...],
    quick: bool,
) -> None:
    """Run all benchmarks of this machine; write a file for each.

    \b
    python -m benchmarks all --out results --quick           about 4 minutes
    python -m benchmarks all --out results --peer mlx-lm     some hours

    The times are those of two cores.
    """
    if model is not None and only and not {*only} & {*WITH_MODEL}:
        raise OptionError(
            f"--model is for {', '.join(WITH_MODEL)}, and --only names none of them; leave one out"
        )
    check_folder(out, "--out")
    stem = machine_name(circumstances())
    names = {one: EVERY_MACHINE.get(one, f"{stem}-{one}") for one in only or COMMANDS}
    files = {one: out / f"{name}.json" for one, name in names.items()}
    for file in files.values():
        check_file(file, "--out")
    parent = context.parent
    assert parent is not None
    assert isinstance(parent.command, click.Group)
    for one, file in files.items():
        report(f"== {one}, into {file}")
        arguments = [*ARGUMENTS.get(one, ()), *(COMMANDS[one] if quick else ())]
        arguments += ["--model", model] if model and one in WITH_MODEL else []
        arguments += ["--peer", "mlx-lm"] if peer and one in WITH_PEER else []
        arguments += ["--json", str(file)]
        command = parent.command.commands[one]
        command.main(arguments, prog_name=f"python -m benchmarks {one}", standalone_mode=False)
        results = json.loads(file.read_text())
        if "command" in results:
            write_file(file, results | {"command": typed([one, *arguments])})
    print("\n".join(map(str, files.values())))


def machine_name(facts: dict[str, object]) -> str:
    """Return a name for files, such as linux-amd-epyc-2-cores."""
    system = re.split(r"\W", str(facts["os"]))[0].lower().replace("darwin", "macos")
    chip = re.sub(r"\(\w+\)|@.*|\b(?:CPU|Processor)\b", " ", str(facts["chip"]))
    words = re.findall(r"[a-z0-9]+", chip.lower())
    return "-".join([system, *words, str(facts["cores"]), "cores"])
