"""``predict``: the figures that Macs should reach, and their check."""

from pathlib import Path

import click

from benchmarks.command_line import COUNT
from benchmarks.macs.predict import CHIPS, checks, counted_drafting, predict, read_results
from benchmarks.report.table import show

FAILED = 1


@click.command("predict")
@click.option("--prompt-tokens", type=COUNT, default=2048, show_default=True)
@click.option(
    "--check",
    "folder",
    type=click.Path(path_type=Path),
    help="Judge the predictions by a Mac's results.",
)
@click.pass_context
def forecast(context: click.Context, *, prompt_tokens: int, folder: Path | None) -> None:
    """Predict the 24B model's speed on Macs, or check predictions.

    Predicted are decode and first token in 4 bit.

    Decode is the share of the bandwidth that such chips were seen to reach, over the bytes of
    weights and cache that a token reads. The first token is the prompt's operations over the share
    of the chip's speed, or a pass over the weights if that takes longer. Sources are in
    benchmarks/macs/predict.py. With --check the exit code is 1 if a prediction failed.

    \b
    python -m benchmarks predict
    python -m benchmarks predict --check results

    The results are those of `all --model ~/magistral-4bit` on a Mac.
    """
    if folder is not None:
        found = list(checks(read_results(folder)))
        show(
            "Predictions beside the results of this Mac",
            "what",
            "predicted | measured | ",
            [
                (
                    one.name,
                    one.predicted,
                    f"{one.measured:.4g}",
                    "held" if one.has_held else "failed",
                )
                for one in found
            ],
        )
        failed = sum(not one.has_held for one in found)
        print(f"{len(found)} predictions checked, {failed} failed")
        if failed:
            context.exit(FAILED)
        return
    predictions = [predict(chip, prompt_tokens, counted_drafting()) for chip in CHIPS]
    show(
        "Prediction, measured on no Mac: Magistral Small in 4 bit, "
        f"after {prompt_tokens:,} tokens of prompt",
        "chip",
        "decode, tok/s | drafting, reasoning | drafting, edits | first token, s | a pass, s",
        [
            (
                one.chip.name,
                one.per_second,
                *one.drafted.values(),
                one.first_token_seconds,
                one.pass_seconds,
            )
            for one in predictions
        ],
    )
    print("To check them on a Mac:")
    print("  python -m benchmarks all --out results --model ~/magistral-4bit --peer mlx-lm")
    print("  python -m benchmarks predict --check results")
