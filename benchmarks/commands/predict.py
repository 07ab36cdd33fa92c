"""``predict``: what Macs should reach."""

import json
from pathlib import Path

import click

from benchmarks.commands.shared import json_option
from benchmarks.macs.predict import CHIPS, as_dict, counted_drafting, predict
from benchmarks.report.tables_counted import show_predictions


@click.command("predict")
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="Length of the prompt.",
)
@json_option
def forecast(*, prompt_tokens: int, json_file: Path | None) -> None:
    """Decode and first token of the 24B model on Macs, predicted; and the command that checks it on one.

    Decode is the share of the bandwidth that such chips were seen to reach, over the bytes of weights and cache
    that a token reads; the first token is the prompt's operations over the share of the chip's speed, or a pass
    over the weights where that takes longer. Sources are in benchmarks/predict.py.
    """
    predictions = [predict(chip, prompt_tokens, counted_drafting()) for chip in CHIPS]
    if json_file is not None:
        json_file.write_text(
            json.dumps({"predict": [as_dict(p, prompt_tokens) for p in predictions]}, indent=1)
            + "\n"
        )
    show_predictions(predictions, prompt_tokens)
