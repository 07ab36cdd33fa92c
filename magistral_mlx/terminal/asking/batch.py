"""Many questions with one load of the model: JSON lines in, JSON lines out."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magistral_mlx.errors import OptionError, quoted, visible
from magistral_mlx.files import append_to_file, expanded, write_file
from magistral_mlx.options import FILE, option

KEYS = ("prompt", "id", "system_prompt")
# The first characters of a result.
BEGIN = b'{"index": '


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The files of many questions and of their results.

    Raises:
        OptionError: results are to be written, but no questions are named.
    """

    prompts_file: str | None = option(
        None,
        "Ask every prompt in F, a file of JSON lines, or - for stdin; see below.",
        metavar="F",
        completes=(FILE,),
    )
    output: str | None = option(
        None,
        "Append the results of --prompts-file to F, and ask only what F does not answer yet.",
        metavar="F",
        completes=(FILE,),
    )

    def __post_init__(self) -> None:
        if self.output is not None and self.prompts_file is None:
            raise OptionError("--output is for the results of --prompts-file; give both, or none")


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of a file of prompts; ``id`` is repeated in its result."""

    index: int
    prompt: str
    id: Any = None
    system_prompt: str | None = None

    @property
    def key(self) -> dict[str, Any]:
        """The part of a result that says which prompt it is of."""
        return {"index": self.index, "id": self.id, "prompt": self.prompt}

    def messages(self, system: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the conversation that asks it; ``system`` holds for entries without their own."""
        if self.system_prompt is not None:
            system = [{"role": "system", "content": self.system_prompt}]
        return [*system, {"role": "user", "content": self.prompt}]


def read_entries(name: str) -> list[Entry]:
    """Read a file of prompts, or stdin where its name is "-".

    Raises:
        OptionError: it cannot be read, or a line is no prompt.
    """
    try:
        path = expanded(Path(name))
        data = sys.stdin.buffer.read() if name == "-" else path.read_bytes()
    except OSError as error:
        raise OptionError(f"{visible(name)} cannot be read ({error.strerror})") from None
    lines = data.splitlines()
    entries = [
        _entry(f"line {number} of {visible(name)}", index, line)
        for index, (number, line) in enumerate(
            (number, line) for number, line in enumerate(lines, start=1) if line.strip()
        )
    ]
    if not entries:
        raise OptionError(
            f'{visible(name)} has no prompts; write lines such as {{"prompt": "..."}}'
        )
    return entries


def _entry(place: str, index: int, line: bytes) -> Entry:
    found = _json(line)
    if isinstance(found, str):
        found = {"prompt": found}
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise OptionError(f'{place} is no prompt; write {{"prompt": "..."}} in JSON on one line')
    if unknown := [key for key in found if key not in KEYS]:
        raise OptionError(f"{place} has the key {quoted(unknown[0])}; known are {', '.join(KEYS)}")
    if not found["prompt"].strip():
        raise OptionError(f"{place} has an empty prompt; write a question, or delete the line")
    if not isinstance(found.get("system_prompt"), str | None):
        raise OptionError(f"{place} has a system_prompt that is no text")
    return Entry(index, found["prompt"], found.get("id"), found.get("system_prompt"))


class ResultFile:
    """A file that results are appended to, each as a whole line."""

    def __init__(self, name: str, entries: Sequence[Entry], model: str) -> None:
        """Open or create the file, and drop results in it that are errors or were cut off.

        Raises:
            OptionError: it holds something else than results of these entries by this model.
        """
        # The results go to a link's target.
        self.path = expanded(Path(name)).resolve()
        self.finished: set[int] = set()
        exists = self.path.exists()
        if exists and not self.path.is_file():
            raise OptionError(f"{visible(name)} is no regular file; leave --output out, or use >")
        before = self.path.read_bytes() if exists else b""
        *lines, rest = before.split(b"\n")
        kept = []
        for line in lines:
            found = _json(line)
            if not _is_result(found, entries, model):
                raise self._foreign()
            if "error" not in found:
                self.finished.add(found["index"])
                kept.append(line + b"\n")
        # What has no end was cut off by a kill.
        if not (rest.startswith(BEGIN) or BEGIN.startswith(rest)):
            raise self._foreign()
        if not exists or before != b"".join(kept):
            write_file(self.path, b"".join(kept))

    def _foreign(self) -> OptionError:
        return OptionError(
            f"{visible(str(self.path))} holds something else than results of these prompts by this "
            "model; name another file"
        )

    def append(self, line: str) -> None:
        """Append a result."""
        append_to_file(self.path, f"{line}\n".encode())


def _is_result(found: Any, entries: Sequence[Entry], model: str) -> bool:
    """Return True if a line of a file is a result of one of the entries."""
    if not isinstance(found, dict) or found.get("model") != model:
        return False
    index = found.get("index")
    if type(index) is not int or not 0 <= index < len(entries):
        return False
    return all(found.get(name) == value for name, value in entries[index].key.items())


def _json(line: bytes) -> Any:
    """Return the value on a line of JSON, or None if it is none."""
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # half a character is a ValueError as well
        return None
    return value
