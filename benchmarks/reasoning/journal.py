"""What a run has graded so far, a line a reply, so that an interrupted one goes on where it was.

The first line says what the replies are of: checkpoint, sampling, problems. A journal of anything else is refused.
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


@dataclass(frozen=True, slots=True)
class Record:
    """One graded reply."""

    problem: str
    sample: int
    seed: int
    is_correct: bool
    stated: int | str | None  # what the answer was taken to say; of a program nothing
    answer: str
    finish_reason: str
    reasoning_closed_by: str | None
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    max_tokens: int


class Journal:
    """The records of one file, and more."""

    def __init__(self, path: Path, file: IO[bytes], records: list[Record]) -> None:
        self.path = path
        self.records = records
        self._file = file
        self._known = {(r.problem, r.sample) for r in records}

    def has(self, problem: str, sample: int) -> bool:
        return (problem, sample) in self._known

    def add(self, record: Record) -> None:
        """Returns once it is on the disk."""
        self._file.write(json.dumps(asdict(record), ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.append(record)
        self._known.add((record.problem, record.sample))


@contextmanager
def open_journal(path: Path, key: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal at ``path``, new if there is none; a last line that an interruption cut off is taken away,
    nothing else is, whatever the file is.

    Raises:
        OptionError: it is of another checkpoint, sampling or dataset; damaged; or in use.
    """
    with _opened(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OptionError(
                f"{path} is being written by another run; wait for it, or name another --journal"
            ) from None
        file.seek(0)
        content = file.read()
        head = json.dumps(dict(key)).encode() + b"\n"
        whole = content[: content.rfind(b"\n") + 1]
        if not whole and not head.startswith(content):
            raise OptionError(f"{path} is no journal of a run; name another --journal")
        records = _read(path, whole.splitlines(), key) if whole else []
        if len(whole) < len(content):  # only now, since it is a journal
            file.truncate(len(whole))
        journal = Journal(path, file, records)
        if not whole:
            file.write(head)
            file.flush()
        yield journal


def _opened(path: Path) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError("it is no plain file")
        return path.open("a+b")
    except OSError as error:
        raise OptionError(
            f"{path} cannot be a journal ({error.strerror or error}); name another --journal"
        ) from None


def _read(path: Path, lines: list[bytes], key: Mapping[str, Any]) -> list[Record]:
    names = {field.name for field in fields(Record)}
    try:
        found, *rows = [json.loads(line) for line in lines]
        stated = flat(found)
        records = [Record(**{name: row[name] for name in names}) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(
            f"{path} is no journal of a run, or is damaged ({error!r}); name another --journal"
        ) from None
    wanted = flat(json.loads(json.dumps(dict(key))))
    different = [
        name for name in sorted({*stated, *wanted}) if stated.get(name) != wanted.get(name)
    ]
    if different:
        ways = (
            f"{name} is {str(stated.get(name))[:16]} there, {str(wanted.get(name))[:16]} now"
            for name in different
        )
        raise OptionError(
            f"{path} holds replies of another run: {'; '.join(ways)}. "
            "Run it with what it was begun with, or name another --journal"
        )
    return records


def flat(key: Mapping[str, Any]) -> dict[str, Any]:
    """What is inside of what, by both names."""
    parts = (
        (name, value.items()) if isinstance(value, Mapping) else (name, None)
        for name, value in key.items()
    )
    found: dict[str, Any] = {}
    for name, inner in parts:
        found |= (
            {name: key[name]} if inner is None else {f"{name}.{own}": value for own, value in inner}
        )
    return found
