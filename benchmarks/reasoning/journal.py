"""A journal of graded replies, a line each, from which an interrupted run goes on.

The first line names checkpoint, sampling and problems. A journal of another run is refused.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from magistral_mlx.errors import OptionError

OTHER = "name another --journal"


@dataclass(frozen=True, slots=True)
class Record:
    """One graded reply; ``stated`` is the value that was read from its answer."""

    problem: str
    sample: int
    seed: int
    is_correct: bool
    stated: int | str | None
    answer: str
    finish_reason: str
    reasoning_closed_by: str | None
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    max_tokens: int


class Journal:
    """The records of one file, to which more are added."""

    def __init__(self, path: Path, file: IO[bytes], records: list[Record]) -> None:
        self.path = path
        self.records = records
        self._file = file
        self._known = {(r.problem, r.sample) for r in records}

    def has(self, problem: str, sample: int) -> bool:
        return (problem, sample) in self._known

    def add(self, record: Record) -> None:
        """Write a record, and return when it is on the disk."""
        self._file.write(json.dumps(asdict(record), ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.append(record)
        self._known.add((record.problem, record.sample))


@contextmanager
def open_journal(path: Path, key: Mapping[str, Any]) -> Iterator[Journal]:
    """Open a journal, or begin one. A last line that was cut off is removed, and nothing else.

    Raises:
        OptionError: it is of another checkpoint, sampling or dataset; damaged; or in use.
    """
    with _opened(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OptionError(
                f"{path} is being written by another run; wait for it, or {OTHER}"
            ) from None
        file.seek(0)
        content = file.read()
        head = json.dumps(dict(key)).encode() + b"\n"
        whole = content[: content.rfind(b"\n") + 1]
        if not whole and not head.startswith(content):
            raise OptionError(f"{path} is no journal of a run; {OTHER}")
        records = _read(path, whole.splitlines(), key) if whole else []
        # Only a file that is known to be a journal is changed.
        if len(whole) < len(content):
            file.truncate(len(whole))
        if not whole:
            file.write(head)
            file.flush()
        yield Journal(path, file, records)


def _opened(path: Path) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError("it is no plain file")
        return path.open("a+b")
    except OSError as error:
        reason = error.strerror or error
        raise OptionError(f"{path} cannot be a journal ({reason}); {OTHER}") from None


def _read(path: Path, lines: list[bytes], key: Mapping[str, Any]) -> list[Record]:
    names = {field.name for field in fields(Record)}
    try:
        found, *rows = [json.loads(line) for line in lines]
        before = flat(found)
        records = [Record(**{name: row[name] for name in names}) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(
            f"{path} is no journal of a run, or is damaged ({error!r}); {OTHER}"
        ) from None
    now = flat(json.loads(json.dumps(dict(key))))
    ways = [
        f"{name} is {str(before.get(name))[:16]} there, {str(now.get(name))[:16]} now"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if ways:
        raise OptionError(
            f"{path} holds replies of another run: {'; '.join(ways)}. Run it with the options that "
            f"it was begun with, or {OTHER}"
        )
    return records


def flat(key: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping whose inner mappings' names are joined to the outer with a dot."""
    found: dict[str, Any] = {}
    for name, value in key.items():
        inner = value if isinstance(value, Mapping) else None
        found |= {name: value} if inner is None else {f"{name}.{k}": v for k, v in inner.items()}
    return found
