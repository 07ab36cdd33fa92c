"""Run ``python -m magistral_mlx.convert.verify OUT [--hf-path SRC]``."""

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from magistral_mlx.convert.progress import run_with_bar
from magistral_mlx.convert.verification.verification import Report, stream_verification
from magistral_mlx.errors import visible
from magistral_mlx.library.known_folders import find_model
from magistral_mlx.options import FOLDER
from magistral_mlx.terminal import command_line
from magistral_mlx.terminal.flags_from_options import suggest

STATES = {True: "ok", False: "FAILED", None: "skipped"}
WORST = 10
EPILOG = """\b
Examples:
  magistral verify magistral-4bit
  magistral verify magistral-4bit --hf-path mistralai/Magistral-Small-2506
  magistral verify magistral-4bit --json

\b
Checks:
  files      every file has the size and sha256 of magistral_mlx.json, and
             there is no other file
  tensors    names, shapes and types are those that config.json implies
  config     config.json has everything that mlx-lm and mlx-swift read
  finite     no norm, scale or bias is NaN or infinite
  tokenizer  tokenizer.json encodes as tekken.json does
  template   chat_template.jinja encodes plain chats as mistral-common does
  source     with --hf-path: OUT was made from SRC
  rounding   with --hf-path: no weight differs from SRC's by more than the
             method explains

The table: relative error of the tensor, largest error of a weight, and the largest error divided by
the method's bound; over 1 the check fails.

\b
Exit codes: 0 all checks pass, 2 one fails, or something else to change,
130 interrupted, 1 a bug."""


@click.command("verify", cls=command_line.Command, epilog=EPILOG)
@click.argument("target", metavar="OUT", shell_complete=suggest(FOLDER))
@click.option(
    "--hf-path",
    metavar="SRC",
    shell_complete=suggest(FOLDER, "demo"),
    help="The source of OUT: a folder, a hub id or demo.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(*, target: str, hf_path: str | None, as_json: bool) -> int:
    """Check a converted checkpoint: every file, number and id of it."""
    started = time.perf_counter()
    report = run_with_bar(stream_verification(find_model(target), hf_path))
    seconds = time.perf_counter() - started
    print(in_json(report, seconds) if as_json else visible(in_words(report)))
    return command_line.DONE if report.passed else command_line.WRONG


def in_words(report: Report) -> str:
    lines = [
        f"{STATES[check.passed]:<8} {check.name:<10} {check.detail}" for check in report.checks
    ]
    if report.tensors:
        worst = report.tensors[:WORST]
        names = [t.name.removeprefix("model.").removesuffix(".weight") for t in worst]
        width = max(len("worst tensors"), *map(len, names))
        lines += ["", f"{'worst tensors':<{width}}  {'stored as':<20}  relative  largest  of bound"]
        lines += [
            f"{name:<{width}}  {t.stored_as:<20}  {t.relative:>8.5f}  {t.largest:>7.3g}"
            f"  {t.of_bound:>8.2f}"
            for name, t in zip(names, worst, strict=True)
        ]
    return "\n".join(lines)


def in_json(report: Report, seconds: float) -> str:
    found = {
        "target": str(report.target),
        "passed": report.passed,
        "checks": [asdict(check) for check in report.checks],
        "tensors": [_without_nan(asdict(tensor)) for tensor in report.tensors],
        "seconds": round(seconds, 3),
    }
    return json.dumps(found, ensure_ascii=False)


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity, which JSON does not have, by None."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
