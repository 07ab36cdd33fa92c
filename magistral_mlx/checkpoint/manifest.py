"""magistral_mlx.json, by which a checkpoint converted here knows its own files."""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from magistral_mlx.checkpoint.safetensors import Shard, parse_json, read_document
from magistral_mlx.errors import CheckpointError, quoted

log = logging.getLogger(__name__)

# How a release writes the tags of its trace: 2506 spells them, 2507 and 2509 have control ids for them.
ReasoningFormat = Literal["text", "control"]

MANIFEST = "magistral_mlx.json"
# What a model is made of, beside its weights. README.md is for readers: it may change, and no runtime fetches it.
READ = ("config.json", "model.safetensors.index.json", "tekken.json", "SYSTEM_PROMPT.txt")
NOT_COMPARED = frozenset({"README.md"})
MAX_HASHED_BYTES = 50_000_000  # takes a tenth of a second
ON_PURPOSE = f"Where that was on purpose, delete {MANIFEST}: without it nothing is compared"


class FileEntry(NamedTuple):
    """What is known of a file."""

    size: int  # bytes
    sha256: str
    header_sha256: str | None  # of weights; a conversion of an earlier version has none


def file_entries(raw: Mapping[str, Any], path: Path) -> dict[str, FileEntry]:
    """The table of files in a parsed record.

    Raises:
        CheckpointError: it is none.
    """
    stated = raw.get("files")
    if not isinstance(stated, dict):
        raise CheckpointError(f"{path} is damaged: it has no table of files. Convert again")
    files: dict[str, FileEntry] = {}
    for name, entry in stated.items():
        size, sha256, header = (
            map(entry.get, FileEntry._fields) if isinstance(entry, dict) else (None, None, None)
        )
        if (
            not re.fullmatch(r"\w[\w.-]{,200}", name, re.ASCII)
            or type(size) is not int
            or not isinstance(sha256, str)
            or not all(found is None or _is_sha256(found) for found in (sha256, header))
        ):
            raise CheckpointError(
                f"{path} is damaged: no name, size and sha256 is {quoted(name)}. Convert again"
            )
        files[name] = FileEntry(size, sha256, header)
    return files


def compare_manifest(folder: Path, shards: Iterable[Shard]) -> None:
    """Compare a checkpoint's files with its record, where it has one: documents by their hash, weights by size and
    header. A flipped bit of a weight is found by ``magistral verify`` alone.

    Raises:
        CheckpointError: the record is damaged; a file is missing, changed or not recorded.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return
    files = file_entries(parse_json(read_document(path), path), path)
    headers = {shard.path.name: shard.header_sha256 for shard in shards}
    for name in (*READ, *headers):
        if name not in files and os.path.lexists(folder / name):
            raise CheckpointError(
                f"{folder / name} is not recorded in {MANIFEST}; convert again. {ON_PURPOSE}"
            )
    for name, recorded in files.items():
        if (
            name not in NOT_COMPARED
            and (fault := _fault(folder / name, recorded, headers.get(name))) is not None
        ):
            raise CheckpointError(
                f"{folder / name} {fault}; fetch or convert it again. {ON_PURPOSE}"
            )


def _fault(path: Path, recorded: FileEntry, header_sha256: str | None) -> str | None:
    """What makes a file another than the recorded one."""
    try:
        if not path.is_file():
            return f"is missing, {MANIFEST} records it"
        if (size := path.stat().st_size) != recorded.size:
            return f"has {size} bytes, {MANIFEST} records {recorded.size}"
        if path.suffix == ".safetensors":
            what, found, expected = "header", header_sha256, recorded.header_sha256
        else:
            is_small = size <= MAX_HASHED_BYTES
            what, expected = "sha256", recorded.sha256
            found = hashlib.sha256(path.read_bytes()).hexdigest() if is_small else None
    except OSError as error:
        return f"cannot be read ({error})"
    if found is None or expected is None:
        log.info("%s: only its size, %d bytes, is compared with %s", path, size, MANIFEST)
        return None
    return None if found == expected else f"has another {what} than {MANIFEST} records"


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
