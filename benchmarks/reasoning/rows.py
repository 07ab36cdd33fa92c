"""Rows of a published dataset: parquet, JSON Lines, JSON or CSV, from this disk or the hub."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from magistral_mlx.errors import HubError, OptionError, quoted

Row = Mapping[str, Any]
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")  # a folder's first form is read


def read_dataset(source: str, patterns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a file, a folder or a dataset on the hub, in the order of file names.

    ``patterns`` are the files to read in a folder or on the hub.

    Raises:
        OptionError: there is no such file, or it has another form.
        HubError: the hub cannot be reached, or refuses the dataset.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read(path)
    folder = path if path.is_dir() else _fetch(source, patterns)
    files = _chosen(folder, patterns)
    return (row for file in files for row in _read(file))


def _chosen(folder: Path, patterns: Sequence[str]) -> list[Path]:
    every = sorted(p for p in folder.rglob("*") if any(fnmatch(p.name, one) for one in patterns))
    for suffix in SUFFIXES:
        if files := [file for file in every if file.suffix == suffix]:
            return files
    raise OptionError(
        f"{folder} has no file {' or '.join(patterns)}; name the dataset's folder, or a file of it"
    )


def _fetch(repo: str, patterns: Sequence[str]) -> Path:
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise OptionError(f"{repo}: no file or folder, nor a dataset's name on the hub (org/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=[*patterns]))
    except GatedRepoError:
        raise HubError(
            f"the dataset {repo} is given to those who accept its terms: do so on its page, then "
            "`hf auth login`, or name a copy on this disk with --data"
        ) from None
    except RepositoryNotFoundError:
        raise HubError(
            f"the hub has no dataset {repo} that you may see; check the name, or `hf auth login`"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise HubError(
            f"the dataset {repo} could not be fetched ({type(error).__name__}: {error}); try again "
            "with a network, or name a copy on this disk with --data"
        ) from None


def _read(file: Path) -> Iterator[Row]:
    number = 0
    try:
        for number, row in enumerate(_rows_of(file), start=1):
            if not isinstance(row, Mapping):
                raise OptionError(f"{file}: row {number} is {quoted(row)}, without named columns")
            yield row
    except (ValueError, OSError, csv.Error) as error:
        kind = file.suffix or "a dataset"
        raise OptionError(f"{file} could not be read as {kind}: {error}") from None
    if number == 0:
        raise OptionError(f"{file} has no rows")


def _rows_of(file: Path) -> Iterable[Any]:
    if file.suffix == ".parquet":
        return _parquet(file)
    if file.suffix == ".csv":
        with file.open(encoding="utf-8-sig", newline="") as lines:
            return list(csv.DictReader(lines))
    if file.suffix not in SUFFIXES:
        raise ValueError(f"the name must end in {', '.join(SUFFIXES)}")
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        return (json.loads(line) for line in text.split("\n") if line.strip())
    found = json.loads(text)
    if not isinstance(found, list):
        raise ValueError(f"it holds {quoted(found)}, not a list of rows")
    return found


def _parquet(file: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise OptionError(
            f"{file} is parquet, which needs pyarrow: pip install 'magistral-mlx[bench]', or take "
            "the dataset as JSON Lines, JSON or CSV"
        ) from None
    try:
        return parquet.read_table(file).to_pylist()
    except ArrowException as error:
        raise ValueError(str(error)) from None


def column(row: Row, names: Iterable[str], number: int) -> Any:
    """Return the first of these columns that a row has; names ignore case.

    Raises:
        OptionError: the row has none of them.
    """
    folded = {str(key).strip().casefold(): value for key, value in row.items() if key is not None}
    for name in names:
        if folded.get(name.casefold()) not in (None, ""):
            return folded[name.casefold()]
    raise OptionError(
        f"row {number} of the dataset has no {' or '.join(names)}; its columns are "
        f"{', '.join(map(str, row))}. Name another file with --data; benchmarks/README.md lists "
        "the columns of each task"
    )
