"""``mac-check``: which predictions about Macs held."""

from pathlib import Path

import click

from benchmarks.commands.shared import json_option, report, require, write
from benchmarks.macs.claims import Judgement, claims, judge
from benchmarks.macs.mac_check import (
    drafting,
    is_magistral_small,
    measure_machine,
    measure_model,
    this_mac,
)
from benchmarks.measure import circumstances
from benchmarks.report.tables_counted import show_judgements
from benchmarks.runtime.speed import Workload
from benchmarks.synthetic import TRUE_WIDTH
from magistral_mlx.checkpoint.folder import open_checkpoint, resolve
from magistral_mlx.errors import OptionError

FAILED = 1


@click.command("mac-check")
@click.option(
    "--model",
    metavar="PATH",
    help="Magistral Small in 4 bit, in MLX layout; without it less is measured.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="Length of the prompt.",
)
@click.option(
    "--repeats", type=click.IntRange(1), default=5, show_default=True, help="Repeats counted."
)
@json_option
@click.pass_context
def mac_check(
    context: click.Context,
    *,
    model: str | None,
    prompt_tokens: int,
    repeats: int,
    json_file: Path | None,
) -> None:
    """Measure on a Mac what this project predicts of it, and say which predictions held; exit code 1 if one did not.

    \b
    python -m benchmarks mac-check                                  two minutes, two layers of the true width
    python -m benchmarks mac-check --model ~/magistral-4bit         a quarter of an hour; needs mlx-lm
    """
    machine = this_mac()
    facts = circumstances()
    folder = None if model is None else resolve(model, layout="hf")
    if folder is not None:
        require("mlx-lm")
        if not is_magistral_small(open_checkpoint(folder)):
            raise OptionError(
                f"{model} is not Magistral Small in 4 bit, which the predictions are about"
            )
    measured = measure_machine(TRUE_WIDTH, report)
    if folder is not None:
        measured |= measure_model(
            folder, Workload(prompt_tokens, 128, repeats), machine, report
        ) | drafting(folder, report)
    judgements: list[Judgement] = judge(claims(machine, prompt_tokens), measured)
    write("mac_check", facts, judgements, json_file)
    show_judgements(machine.chip, judgements)
    if any(judgement.verdict == "failed" for judgement in judgements):
        context.exit(FAILED)
