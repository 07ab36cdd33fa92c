"""Small files of a checkpoint, such as config.json and the index, read whole."""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from magistral_mlx.errors import CheckpointError, quoted

# Of a header, index or config. Magistral's largest takes 0.1 MB, a prompt cache's header a few MB.
MAX_JSON_BYTES = 10_000_000
# Values take 100 times their text in memory; Magistral's index has 1,100.
MAX_JSON_VALUES = 250_000
AGAIN = ". Fetch or convert it again"  # ends the message of a damaged file


def read_document(path: Path, most_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Return the content of a small file.

    Raises:
        CheckpointError: it is missing, no plain file, or far too large for a document.
    """
    try:
        with open_plain(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > most_bytes:
                raise CheckpointError(
                    f"{path} has {size} bytes, far too many for what it is; fetch it again"
                )
            # No more than that: some files of Linux's /proc have no size, and never end.
            return file.read(size)
    except OSError as error:
        raise unreadable(path, error) from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a small file.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    return parse_json(read_document(path), path)


def parse_json(text: bytes, source: Path) -> dict[str, Any]:
    """Parse a JSON object in UTF-8 in which no key occurs twice.

    Raises:
        CheckpointError: it is something else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {quoted(key)} occurs twice")
            found[key] = value
        return found

    if (values := sum(map(text.count, (b",", b"[", b"{")))) > MAX_JSON_VALUES:
        raise damaged(source, f"it holds up to {values} values, {MAX_JSON_VALUES} are allowed")
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise damaged(source, f"it is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise damaged(source, f"it holds a JSON {type(value).__name__}, expected an object")
    return value


def open_plain(path: Path, *, buffering: int = -1) -> BinaryIO:
    """Open a plain file for reading, and raise OSError for a pipe or device, which may not end.

    The file that was opened is the one that is checked. Nothing waits for a pipe's writer.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no plain file")
        return open(descriptor, "rb", buffering=buffering)
    except BaseException:
        os.close(descriptor)
        raise


def damaged(path: Path, what: str) -> CheckpointError:
    """Make the error for a file that contradicts itself."""
    return CheckpointError(f"{path} is damaged: {what}{AGAIN}")


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Make the error for a file that the system cannot read."""
    return CheckpointError(f"{path} cannot be read ({error}); check the file, or fetch it again")
