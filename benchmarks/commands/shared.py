"""What the sub-commands share: options, the check of a peer, the result file."""

import importlib.util
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import click

from benchmarks.report.plots import check_matplotlib, draw
from magistral_mlx.errors import OptionError
from magistral_mlx.files import check_writable, replacing, write_all

FILES = {"--json", "--work", "--plot", "--journal", "--out"}


class _Positive(click.FloatRange):
    """click's own lets NaN through every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        return self.fail(f"{value} is no number.", param, ctx) if math.isnan(number) else number


MINUTES = _Positive(0, 1e6, min_open=True)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
peer_option = click.option(
    "--peer", type=click.Choice(["mlx-lm"]), help="Measure this beside ours, and the ratio."
)


def check_file(file: Path, option: str = "--json") -> None:
    """Raises OptionError before any work where the file could not be written after it."""
    try:
        check_writable(file)
    except OSError as error:
        raise OptionError(
            f"{option} {file} cannot be written ({error.strerror or error}); name another"
        ) from None


def check_folder(folder: Path, option: str) -> None:
    """The same of a folder that is made where there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            f"{option} {folder} cannot be made ({error.strerror}); name another"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OptionError(f"{option} {folder} cannot be written to; name another")


def _checked_file(
    context: click.Context, parameter: click.Parameter, file: Path | None
) -> Path | None:
    if file is not None:
        check_file(file)
    return file


json_option = click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_checked_file,
    help="Write every repeat here.",
)


def _checked(
    context: click.Context, parameter: click.Parameter, folder: Path | None
) -> Path | None:
    """Raises OptionError before any work where pictures cannot be drawn."""
    if folder is not None:
        check_matplotlib()
        check_folder(folder, "--plot")
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
        raise OptionError(
            "--peer mlx-lm needs mlx-lm; install it with: pip install 'magistral-mlx[bench]'"
        )


def write(kind: str, facts: dict[str, Any], found: Sequence[Result], file: Path | None) -> None:
    """The results of a sub-command, with the circumstances they were taken in, if a file is wanted."""
    written(kind, facts, found, file)


def written(
    kind: str, facts: dict[str, Any], found: Sequence[Result], file: Path | None
) -> dict[str, Any]:
    """As ``write``; also returns them."""
    return write_results(kind, facts, [one.as_dict() for one in found], file)


def write_results(
    kind: str, facts: dict[str, Any], found: Any, file: Path | None
) -> dict[str, Any]:
    """As ``written``, for what is JSON already."""
    results = {"circumstances": facts, "command": typed(sys.argv[1:]), kind: found}
    if file is not None:
        write_file(file, results)
    return results


def write_file(file: Path, results: Mapping[str, Any]) -> None:
    """Write JSON: the file is the old one or the new one, never half of one.

    Raises:
        OptionError: it cannot be written, which was checked before; the message has all of it, since hours may.
    """
    text = json.dumps(results, indent=1) + "\n"
    try:
        with replacing(file) as descriptor:
            write_all(descriptor, memoryview(text.encode()))
    except OSError as error:
        raise OptionError(
            f"{file} could not be written ({error}); this is what it was to hold:\n{text}"
        ) from None


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
