"""``all``: every benchmark of this machine, one result file each, and the pictures."""

import json
import re
from pathlib import Path

import click

from benchmarks.commands.shared import check_file, check_folder, report, require, typed, write_file
from benchmarks.measure import chip_name, circumstances
from benchmarks.report.plots import check_matplotlib, draw
from magistral_mlx.errors import OptionError

# With a peer where one is asked for, or not; and what else they are asked for.
COMMANDS = {
    "speed": ("--peer",),
    "memory": ("--peer",),
    "convert": ("--peer",),
    "samples": (),
    "graph": ("--peer",),
    "quality": (),
    "reasoning": (),
    "drafting": (),
    "predict": (),
}
ARGUMENTS = {"reasoning": ("--task", "demo-arithmetic", "--samples", "4")}
QUICK_ARGUMENTS = {
    "reasoning": ("--limit", "2"),
    "graph": ("--layers", "2"),
    "drafting": (),
    "predict": (),
}
WITH_MODEL = ("speed", "memory", "reasoning")
EVERY_MACHINE = {
    "graph": "decode-step",
    "drafting": "drafting-counts",
    "predict": "predictions",
}  # counted, not timed


@click.command("all")
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the results.",
)
@click.option("--name", help="How the files begin; by default the system, the chip and its cores.")
@click.option(
    "--model",
    metavar="demo|PATH",
    help="A checkpoint in MLX layout, for speed, memory and reasoning.",
)
@click.option("--peer", type=click.Choice(["mlx-lm"]), help="Measure this beside ours.")
@click.option(
    "--only", multiple=True, type=click.Choice(list(COMMANDS)), help="These alone; may be repeated."
)
@click.option("--quick", is_flag=True, help="Little of each: does it run?")
@click.option("--plot", is_flag=True, help="Draw the pictures too, into the same folder.")
@click.pass_context
def everything(
    context: click.Context,
    *,
    out: Path,
    name: str | None,
    model: str | None,
    peer: str | None,
    only: tuple[str, ...],
    quick: bool,
    plot: bool,
) -> None:
    """Run the benchmarks of this machine, one after the other, and write a result file of each.

    \b
    python -m benchmarks all --out results --quick --plot            a minute or two
    python -m benchmarks all --out results --peer mlx-lm --plot      some hours on two cores
    """
    require(peer)
    if plot:
        check_matplotlib()
    if name is not None and not re.fullmatch(r"[\w.-]{1,100}", name):
        raise OptionError(f"--name is {name!r}; use letters, digits, dots, - and _, 100 at most")
    if model is not None and only and not {*only} & {*WITH_MODEL}:
        raise OptionError(
            f"--model is for {', '.join(WITH_MODEL)}, and --only names none of them; leave one out"
        )
    check_folder(out, "--out")
    stem = name or machine_name(chip_name(), circumstances())
    files = {
        one: out / f"{EVERY_MACHINE.get(one, f'{stem}-{one}')}.json" for one in only or COMMANDS
    }
    for file in files.values():
        check_file(file, "--out")
    parent = context.parent
    assert parent is not None
    assert isinstance(parent.command, click.Group)
    for one, file in files.items():
        report(f"== {one}, into {file}")
        command = parent.command.get_command(parent, one)
        assert command is not None, one
        arguments = [
            *ARGUMENTS.get(one, ()),
            *_chosen(one, model, peer, quick=quick),
            "--json",
            str(file),
        ]
        command.main(arguments, prog_name=f"python -m benchmarks {one}", standalone_mode=False)
        _state(file, [one, *arguments])
    if plot:
        for picture in draw([json.loads(file.read_text()) for file in files.values()], out):
            report(f"drew {picture}")
    print("\n".join(map(str, files.values())))


def machine_name(chip: str, facts: dict[str, object]) -> str:
    """linux-amd-epyc-2-cores."""
    system = (
        "macos"
        if str(facts["os"]).startswith(("macOS", "Darwin"))
        else str(facts["os"]).split("-")[0]
    )
    words = re.findall(
        r"[a-z0-9]+", re.sub(r"\(\w+\)|@.*|\b(?:CPU|Processor)\b", " ", chip).lower()
    )
    return "-".join([system.lower(), *words, str(facts["cores"]), "cores"])


def _chosen(one: str, model: str | None, peer: str | None, *, quick: bool) -> list[str]:
    arguments = ["--model", model] if model and one in WITH_MODEL else []
    arguments += ["--peer", peer] if peer and "--peer" in COMMANDS[one] else []
    return arguments + (list(QUICK_ARGUMENTS.get(one, ("--quick",))) if quick else [])


def _state(file: Path, arguments: list[str]) -> None:
    """The command that gives this file alone, instead of ``all``."""
    results = json.loads(file.read_text())
    if "command" in results:
        write_file(file, results | {"command": typed(arguments)})
