"""What the sub-commands share: options, the check of a peer, the result file."""

import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import click

from benchmarks.plots import check_matplotlib, draw
from magistral_mlx.errors import OptionError

FILES = {"--json", "--work", "--plot", "--journal", "--out"}
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
peer_option = click.option("--peer", type=click.Choice(["mlx-lm"]), help="Measure this beside ours, and the ratio.")


def _in_a_folder(context: click.Context, parameter: click.Parameter, file: Path | None) -> Path | None:
    """Raises OptionError before any work where the file could not be written after it."""
    if file is not None and not os.access(file.absolute().parent, os.W_OK | os.X_OK):
        raise OptionError(f"{parameter.opts[0]} {file} cannot be written: make its folder, or name another")
    return file


json_option = click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_in_a_folder,
    help="Write every repeat here.",
)


def _checked(context: click.Context, parameter: click.Parameter, folder: Path | None) -> Path | None:
    """Raises OptionError before any work where pictures cannot be drawn."""
    if folder is not None:
        check_matplotlib()
    return folder


plot_option = click.option(
    "--plot",
    type=click.Path(file_okay=False, path_type=Path),
    callback=_checked,
    help="Write pictures into this folder, PNG and SVG.",
)


class Result(Protocol):
    """Anything measured that can be written."""

    def as_dict(self) -> dict[str, Any]: ...


def require(peer: str | None) -> None:
    """Raises OptionError where the peer is not installed."""
    if peer is not None and importlib.util.find_spec("mlx_lm") is None:
        raise OptionError("--peer mlx-lm needs mlx-lm; install it with: pip install 'magistral-mlx[bench]'")


def write(kind: str, facts: dict[str, Any], found: Sequence[Result], file: Path | None) -> None:
    """The results of a sub-command, with the circumstances they were taken in, if a file is wanted."""
    written(kind, facts, found, file)


def written(kind: str, facts: dict[str, Any], found: Sequence[Result], file: Path | None) -> dict[str, Any]:
    """As ``write``; also returns them."""
    return write_results(kind, facts, [one.as_dict() for one in found], file)


def write_results(kind: str, facts: dict[str, Any], found: Any, file: Path | None) -> dict[str, Any]:
    """As ``written``, for what is JSON already."""
    results = {"circumstances": facts, "command": typed(sys.argv[1:]), kind: found}
    if file is not None:
        file.write_text(json.dumps(results, indent=1) + "\n")
    return results


def plot_results(results: Mapping[str, Any], folder: Path | None) -> None:
    """Every picture that these results have the figures for, if a folder is wanted."""
    if folder is not None:
        files = draw([results], folder)
        for file in files:
            report(f"drew {file}")
        if not files:
            report("drew nothing: against context takes two contexts or more")


def typed(arguments: Sequence[str]) -> list[str]:
    """What to type for the same figures; where files go says nothing about them, and is nobody's business."""
    pairs = zip(arguments, ["", *arguments], strict=False)
    return [one for one, before in pairs if not {one, before} & FILES]


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
