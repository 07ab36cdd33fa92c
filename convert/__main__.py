"""Run ``python -m magistral_mlx.convert --hf-path SRC --mlx-path OUT``."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.convert.output.staging import partial_of
from magistral_mlx.convert.pipeline.conversion import Summary, run_conversion
from magistral_mlx.convert.pipeline.prepare import Checked, check_conversion
from magistral_mlx.convert.progress import run_with_bar
from magistral_mlx.convert.recipe.named import AUTO, RECIPES
from magistral_mlx.convert.recipe.options import ConvertOptions
from magistral_mlx.convert.recipe.recipe_file import UNPACKED_BITS
from magistral_mlx.convert.source.source import FLOAT_TYPES
from magistral_mlx.errors import in_units
from magistral_mlx.library.details import by_kind
from magistral_mlx.library.known_folders import remember
from magistral_mlx.model.mac_table import contexts
from magistral_mlx.options import FOLDER
from magistral_mlx.terminal import command_line
from magistral_mlx.terminal.flags_from_options import click_options, suggest
from magistral_mlx.terminal.verbosity import waiting

# Flags of mlx-lm's convert that are refused, and what to do instead.
MLX_LM_FLAGS = {
    "--upload-repo": "upload the finished folder with: hf upload ORG/NAME OUT",
    "--trust-remote-code": "no code from a checkpoint is ever run",
}
EPILOG = """\b
Examples:
  magistral convert --hf-path mistralai/Magistral-Small-2506 \\
      --mlx-path magistral-4bit --stream
  magistral convert --hf-path ~/2506 --mlx-path head6 --recipe 4bit-head6
  magistral convert --hf-path ~/2506 --mlx-path 8bit --q-bits 8 --dry-run

\b
Methods (the same format, size and speed):
  importance  scales and biases of least error, weighted by a forward pass
              over a small input
  gptq        the same, and later columns make up for each error: closer, and
              much slower
  round       as mx.quantize, bit for bit; no forward pass

\b
Calibration (a small input of our own where it is left out):
  FILE        a UTF-8 text of 256 tokens or more; 4 windows of 512 from all
              over it, 16 for gptq
  self        SRC, rounded to 4 bit, first answers our questions in the model
              card's languages
  MODEL       the folder of a checkpoint of the same vocabulary answers them
The answers are kept in calibration.jsonl.

\b
Recipes:
{recipes}
  auto        --target-bits on average, spent where they lower the predicted
              error most
  FILE        your own, in JSON; the last rule that matches a matrix applies,
              and 16 bits pack nothing:
                {{"default": {{"bits": 4}},
                 "rules": [{{"match": "*.v_proj", "bits": 6}}]}}
              "group_size" and "mode" can stand beside "bits" in both

OUT appears complete or not at all. Until then OUT.partial holds the finished part, and the same
command resumes it. If OUT is complete, the command does nothing.

\b
Exit codes: 0 done, 2 something to change, 130 interrupted, 1 a bug.""".format(
    recipes="\n".join(f"  {name:<11} {what}" for name, (_, what) in RECIPES.items())
)


class Command(command_line.Command):
    """A command whose users know mlx-lm's convert."""

    foreign_flags = MLX_LM_FLAGS


@click.command("convert", cls=Command, epilog=EPILOG)
@click.option(
    "--hf-path",
    "--model",
    "hf_path",
    required=True,
    metavar="SRC",
    shell_complete=suggest(FOLDER, "demo"),
    help="A folder, a hub id such as org/name, or demo.",
)
@click.option(
    "--mlx-path",
    required=True,
    metavar="OUT",
    shell_complete=suggest(FOLDER),
    help="The folder to make.",
)
@click_options(ConvertOptions, "options")
@click.option(
    "-q", "--quantize", is_flag=True, help="As in mlx-lm; weights are quantized without it too."
)
@click.option("-d", "--dequantize", is_flag=True, help="As in mlx-lm; the same as --q-bits 16.")
@click.option(
    "--dtype",
    type=click.Choice(list(FLOAT_TYPES)),
    help="As in mlx-lm; tensors that are not packed keep SRC's type, and another is refused.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check all, print sizes and bits, write nothing (but fetch a hub id, unless --stream).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(
    *,
    hf_path: str,
    mlx_path: str,
    options: ConvertOptions,
    quantize: bool,
    dequantize: bool,
    dtype: str | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Quantize a published Magistral checkpoint for every MLX runtime."""
    if dequantize:
        options = _unpacked(options)
    if quantize and options.q_bits == UNPACKED_BITS:
        raise click.UsageError(
            f"-q quantizes, and --q-bits {UNPACKED_BITS} (or -d) does not; leave one of them out"
        )
    with waiting(f"opening {hf_path}"):
        checked = check_conversion(hf_path, mlx_path, options)
    if dtype not in (None, checked.plan.float_type):
        raise click.UsageError(
            f"--dtype is {dtype}, and tensors that are not packed keep the source's type, "
            f"{checked.plan.float_type}; leave --dtype out"
        )
    if dry_run:
        print(json.dumps(forecast(checked)) if as_json else forecast_in_words(checked))
        return command_line.DONE
    started = time.perf_counter()
    try:
        with run_conversion(checked) as stream:
            summary = run_with_bar(stream)
    except KeyboardInterrupt:
        print(f"interrupted; {_kept(partial_of(checked.target))}", file=sys.stderr)
        raise
    remember(summary.target)
    print(in_json(summary, time.perf_counter() - started) if as_json else in_words(summary))
    if options.recipe == AUTO and not as_json:
        config = checked.origin.source.config
        print("\n".join(by_kind(open_checkpoint(summary.target).formats, config.num_layers)))
        print(contexts_in_words(config, summary.bytes_out))
    return command_line.DONE


def _unpacked(options: ConvertOptions) -> ConvertOptions:
    if options.q_bits not in (None, UNPACKED_BITS):
        raise click.UsageError(
            f"-d packs nothing, and --q-bits {options.q_bits} does; leave one of them out"
        )
    return replace(options, q_bits=UNPACKED_BITS)


def _kept(partial: Path) -> str:
    if not partial.exists():
        return "nothing was finished yet, nothing is kept"
    return f"what is finished is kept in {partial}; run the same command to resume"


def in_words(summary: Summary) -> str:
    if summary.already_complete:
        return f"{summary.target}: already complete (magistral verify looks at its weights)"
    made = (
        f"{summary.target}: {in_units(summary.bytes_out)} of weights, "
        f"{summary.bits_per_weight:.2f} bits each, "
        f"from {in_units(summary.bytes_in)}"
    )
    if summary.gain is None:
        return made
    return (
        f"{made}\n  predicted error: {summary.gain.error_ratio:.2f} of rounding's\n"
        f"  largest outliers: {summary.gain.outliers:.0f} times the mean input, "
        f"at {summary.gain.outliers_at}"
    )


def in_json(summary: Summary, seconds: float) -> str:
    return json.dumps(
        {**asdict(summary), "target": str(summary.target), "seconds": round(seconds, 3)}
    )


def forecast(checked: Checked) -> dict[str, Any]:
    """Describe the planned result as JSON-compatible data."""
    plan = checked.plan
    most = checked.most_tensor_bytes
    return {
        "target": str(checked.target),
        "layout": checked.origin.source.layout,
        "bytes_in": checked.origin.source.nbytes,
        "bytes_out": plan.tensor_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "already_complete": checked.is_complete,
        "files": {shard.file: shard.nbytes for shard in plan.shards},
        "bits": plan.bits,
        "contexts": contexts(checked.origin.source.config, most),
    } | ({} if most == plan.tensor_bytes else {"most_bytes_out": most})


def forecast_in_words(checked: Checked) -> str:
    plan, config = checked.plan, checked.origin.source.config
    state = " (already complete)" if checked.is_complete else ""
    lines = [
        f"{checked.target}: {in_units(plan.tensor_bytes)} of weights, "
        f"{plan.bits_per_weight:.2f} bits each, "
        f"from {in_units(checked.origin.source.nbytes)}{state}",
        *by_kind(plan.formats, config.num_layers),
        f"  {'norms':<14}{plan.float_type}",
    ]
    if (most := checked.most_tensor_bytes) > plan.tensor_bytes:
        lines.append(f"  then raised where this lowers the error most, to {in_units(most)} at most")
    return "\n".join([*lines, contexts_in_words(config, most)])


def contexts_in_words(config: ModelConfig, weights_bytes: int) -> str:
    """Write a line for each Mac: the longest context that fits it."""
    lines = ["  context that fits, by a forecast:"]
    for memory_gb, context in contexts(config, weights_bytes).items():
        fits = "-" if context is None else f"{context:,} tokens"
        lines.append(f"  {f'{memory_gb} GB Mac':<14}{fits}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
