"""The options that several commands have, their checks, and the file that --json writes."""

import importlib.util
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import click

from magistral_mlx.atomic_files import check_writable, replacing
from magistral_mlx.errors import OptionError
from magistral_mlx.files import write_all

LAYERS = click.IntRange(1, 40)
COUNT = click.IntRange(1)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
PATH_OPTIONS = {"--json", "--work", "--journal"}


class Result(Protocol):
    """A measurement that can be written."""

    def as_dict(self) -> dict[str, Any]: ...


class _Minutes(click.FloatRange):
    """A positive number of minutes. click's own range accepts NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        return self.fail(f"{value} is no number.", param, ctx) if math.isnan(number) else number


MINUTES = _Minutes(0, 1e6, min_open=True)


def check_file(file: Path, option: str = "--json") -> None:
    """Raise OptionError before any work if the file could not be written after it."""
    try:
        check_writable(file)
    except OSError as error:
        reason = error.strerror or error
        raise OptionError(f"{option} {file} cannot be written ({reason}); name another") from None


def check_folder(folder: Path, option: str) -> None:
    """Make the folder, or raise OptionError if it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise OptionError(f"{option} {folder} cannot be made ({reason}); name another") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OptionError(f"{option} {folder} cannot be written to; name another")


def _check_json(_: click.Context, __: click.Parameter, file: Path | None) -> Path | None:
    if file is not None:
        check_file(file)
    return file


def _check_peer(_: click.Context, __: click.Parameter, peer: str | None) -> bool:
    if peer is not None and importlib.util.find_spec("mlx_lm") is None:
        raise OptionError(
            "--peer mlx-lm needs mlx-lm; install it with: pip install 'magistral-mlx[bench]'"
        )
    return peer is not None


json_option = click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_check_json,
    help="Write the results with every repeat to this file.",
)
peer_option = click.option(
    "--peer",
    type=click.Choice(["mlx-lm"]),
    callback=_check_peer,
    help="Measure this beside ours, and the ratio.",
)
model_option = click.option(
    "--model", metavar="demo|PATH", help="A checkpoint in MLX layout, or the embedded model."
)
synthetic_option = click.option(
    "--synthetic", type=LAYERS, metavar="LAYERS", help="Random layers of the true width."
)
prompt_option = click.option(
    "--prompt-tokens", type=int, help="One prompt of this length instead of all contexts."
)
quick_option = click.option("--quick", is_flag=True, help="Little work: only shows that it runs.")


def write(
    kind: str, facts: dict[str, Any], found: Sequence[Result] | Any, file: Path | None
) -> dict[str, Any]:
    """Return the results of a command with their circumstances; write them if a file is named.

    ``facts`` are ``circumstances()`` from before the work, whose load is then not our own.
    ``found`` is a list of results, or plain JSON.
    """
    if isinstance(found, list):
        found = [one if isinstance(one, dict) else one.as_dict() for one in found]
    results = {"circumstances": facts, "command": typed(sys.argv[1:]), kind: found}
    if file is not None:
        write_file(file, results)
    return results


def write_file(file: Path, results: Mapping[str, Any]) -> None:
    """Write JSON. The file is the old one or the new one, never half of one.

    Raises:
        OptionError: the file cannot be written. The message holds the results, which took hours.
    """
    text = json.dumps(results, indent=1) + "\n"
    try:
        with replacing(file) as descriptor:
            write_all(descriptor, memoryview(text.encode()))
    except OSError as error:
        raise OptionError(f"{file} could not be written ({error}); its text:\n{text}") from None


def typed(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without paths, which say nothing about the figures."""
    pairs = zip(arguments, ["", *arguments], strict=False)
    return [one for one, before in pairs if not {one, before} & PATH_OPTIONS]
