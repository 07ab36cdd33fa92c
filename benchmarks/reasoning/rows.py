"""Rows of a published dataset: parquet, JSON Lines, JSON or CSV, from this disk or the hub."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from magistral_mlx.errors import HubError, OptionError, quoted

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row of a JSON Lines file begins, in bytes: rows of LiveCodeBench are gigabytes together."""

    file: Path
    offset: int

    def row(self) -> Row:
        with self.file.open("rb") as lines:
            lines.seek(self.offset)
            return json.loads(lines.readline())


class PlacedRow(dict[str, Any]):
    """A row that can be read again."""

    place: Place


SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")  # of a folder that has several forms, the first


def read_dataset(
    source: str, patterns: Sequence[str], *, revision: str | None = None
) -> Iterator[Row]:
    """The rows of a file or folder, or of a dataset on the hub (``org/name``), in the order of its files' names.

    Files are found at once; rows come one by one, those of JSON Lines as a PlacedRow.

    Args:
        patterns: the files wanted, of a folder or the hub.
        revision: branch, tag or commit of the hub's.
    Raises:
        OptionError: there is no such file, or it is not in one of these forms.
        HubError: the hub could not be reached, or does not give it.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read(path)
    folder = path if path.is_dir() else _fetch(source, patterns, revision)
    files = _chosen(folder, patterns)
    return (row for file in files for row in _read(file))


def _chosen(folder: Path, patterns: Sequence[str]) -> list[Path]:
    every = sorted(
        p for p in folder.rglob("*") if any(fnmatch(p.name, pattern) for pattern in patterns)
    )
    for suffix in SUFFIXES:
        files = [file for file in every if file.suffix == suffix]
        if files:
            return files
    raise OptionError(
        f"{folder} has no file {' or '.join(patterns)}; name the dataset's folder, or one file of it"
    )


def _fetch(repo: str, patterns: Sequence[str], revision: str | None) -> Path:
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise OptionError(
            f"{repo}: no such file or folder, nor a dataset's name on the hub (org/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo, repo_type="dataset", revision=revision, allow_patterns=list(patterns)
            )
        )
    except GatedRepoError:
        raise HubError(
            f"the dataset {repo} is given to those who accept its terms: do so on its page, then `hf auth login`, "
            "or name a copy on this disk with --data"
        ) from None
    except RepositoryNotFoundError:
        raise HubError(
            f"the hub has no dataset {repo} that you may see; check the name, or `hf auth login`"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise HubError(
            f"the dataset {repo} could not be fetched ({type(error).__name__}: {error}); "
            "try again with a network, or name a copy on this disk with --data"
        ) from None


def _read(file: Path) -> Iterator[Row]:
    number = 0
    try:
        for number, row in enumerate(_rows_of(file), start=1):
            if not isinstance(row, Mapping):
                raise OptionError(
                    f"{file}: row {number} is {quoted(row)}; every row must have named columns"
                )
            yield row
    except (ValueError, OSError, csv.Error) as error:
        raise OptionError(
            f"{file} could not be read as {file.suffix or 'a dataset'}: {error}"
        ) from None
    if number == 0:
        raise OptionError(f"{file} has no rows")


def _rows_of(file: Path) -> Iterable[Any]:
    if file.suffix == ".parquet":
        return _parquet(file)
    if file.suffix == ".jsonl":
        return _lines(file)
    if file.suffix == ".json":
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, list):
            raise ValueError(f"it holds {quoted(found)}, not a list of rows")
        return found
    if file.suffix == ".csv":
        csv.field_size_limit(2**27)  # a row's tests may be megabytes
        with file.open(encoding="utf-8-sig", newline="") as lines:
            return list(csv.DictReader(lines))
    raise ValueError(f"the name must end in {', '.join(SUFFIXES)}")


def _lines(file: Path) -> Iterator[Any]:
    offset = 0
    with file.open("rb") as lines:
        for line in lines:
            if line.strip():
                found = json.loads(line)
                if isinstance(found, dict):
                    found = PlacedRow(found)
                    found.place = Place(file, offset)
                yield found
            offset += len(line)


def _parquet(file: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise OptionError(
            f"{file} is parquet, which needs pyarrow: pip install 'magistral-mlx[bench]', or take the dataset as "
            "JSON Lines, JSON or CSV"
        ) from None
    try:
        return parquet.read_table(file).to_pylist()
    except ArrowException as error:
        raise ValueError(str(error)) from None


def column(row: Row, names: Iterable[str], number: int) -> Any:
    """The first of these columns that a row has, whatever the case of its name.

    Raises:
        OptionError: it has none of them.
    """
    folded = {str(key).strip().casefold(): value for key, value in row.items() if key is not None}
    for name in names:
        if folded.get(name.casefold()) not in (None, ""):
            return folded[name.casefold()]
    raise OptionError(
        f"row {number} of the dataset has no {' or '.join(names)}; its columns are {', '.join(map(str, row))}. "
        "Name another file with --data; benchmarks/README.md lists the columns of each task"
    )
