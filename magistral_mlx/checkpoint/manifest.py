"""The manifest magistral_mlx.json, by which a checkpoint converted here knows its own files."""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

from magistral_mlx.checkpoint.documents import read_document, read_json
from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.checkpoint.safetensors_header import INDEX
from magistral_mlx.errors import CheckpointError, quoted

log = logging.getLogger(__name__)

# How a release writes the tags of its trace: 2506 spells them, 2507 and 2509 have control ids.
ReasoningFormat = Literal["text", "control"]
REASONING_FORMAT = "reasoning_format"  # its key in the manifest

MANIFEST = "magistral_mlx.json"
# The documents that a model is made of. README.md is for readers and may change.
DOCUMENTS = ("config.json", INDEX, "tekken.json", "SYSTEM_PROMPT.txt")
NOT_COMPARED = frozenset({"README.md"})
MAX_HASHED_BYTES = 50_000_000  # takes a tenth of a second
ON_PURPOSE = f"Where that was on purpose, delete {MANIFEST}: without it nothing is compared"


class FileEntry(NamedTuple):
    """Size and hashes of one file.

    Attributes:
        size: bytes.
        header_sha256: of weights; a conversion of an earlier version has none.
    """

    size: int
    sha256: str
    header_sha256: str | None


@dataclass(frozen=True)
class Manifest:
    """Content of one magistral_mlx.json. Each part is checked when it is asked for."""

    path: Path
    raw: Mapping[str, Any]

    @classmethod
    def find(cls, folder: Path) -> "Manifest | None":
        """Read the manifest of a folder, or return None if there is none.

        Raises:
            CheckpointError: it cannot be read, or is not JSON.
        """
        path = folder / MANIFEST
        return cls(path, read_json(path)) if os.path.lexists(path) else None

    @cached_property
    def files(self) -> Mapping[str, FileEntry]:
        """Entry of each file, by name; raises CheckpointError if there is no such table."""
        table = self._table("files", "table of files")
        return {name: self._file_entry(name, raw) for name, raw in table.items()}

    @property
    def nbytes(self) -> int:
        """Size of all files together."""
        return sum(entry.size for entry in self.files.values())

    @property
    def reasoning_format(self) -> ReasoningFormat | None:
        """Format of the traces that the conversion found, if any."""
        found = self.raw.get(REASONING_FORMAT)
        if found is not None and found not in get_args(ReasoningFormat):
            raise self.damaged(f"{REASONING_FORMAT} is {quoted(found)}")
        return cast(ReasoningFormat | None, found)

    @property
    def source(self) -> dict[str, Any]:
        """Identity of the source that was converted."""
        return self._table("source", "source")

    @property
    def options(self) -> dict[str, Any]:
        """Options of the conversion."""
        return self._table("options", "options")

    def require_all(self) -> None:
        """Raise CheckpointError if a part is missing that every conversion writes."""
        _ = self.files, self.source, self.options

    def damaged(self, what: str) -> CheckpointError:
        """Make the error for a manifest that was not written by a conversion."""
        return CheckpointError(f"{self.path} is damaged: {what}. Convert again")

    def _table(self, key: str, what: str) -> dict[str, Any]:
        found = self.raw.get(key)
        if not isinstance(found, dict):
            raise self.damaged(f"it has no {what}")
        return found

    def _file_entry(self, name: str, raw: Any) -> FileEntry:
        size, sha256, header = (
            map(raw.get, FileEntry._fields) if isinstance(raw, dict) else (None, None, None)
        )
        if (
            not re.fullmatch(r"\w[\w.-]{,200}", name, re.ASCII)
            or type(size) is not int
            or not isinstance(sha256, str)
            or not all(found is None or _is_sha256(found) for found in (sha256, header))
        ):
            raise self.damaged(f"no name, size and sha256 is {quoted(name)}")
        return FileEntry(size, sha256, header)


def compare_manifest(folder: Path, shards: Iterable[Shard]) -> None:
    """Compare the files of a checkpoint with its manifest, if it has one.

    Documents are compared by their hash, weights by size and header. Only ``magistral verify``
    finds a flipped bit of a weight.

    Raises:
        CheckpointError: the manifest is damaged; a file is missing, changed or not in it.
    """
    manifest = Manifest.find(folder)
    if manifest is None:
        return
    headers = {shard.path.name: shard.header_sha256 for shard in shards}
    for name in (*DOCUMENTS, *headers):
        if name not in manifest.files and os.path.lexists(folder / name):
            raise CheckpointError(
                f"{folder / name} is not recorded in {MANIFEST}; convert again. {ON_PURPOSE}"
            )
    for name, entry in manifest.files.items():
        if name in NOT_COMPARED:
            continue
        if (fault := _fault(folder / name, entry, headers.get(name))) is not None:
            raise CheckpointError(
                f"{folder / name} {fault}; fetch or convert it again. {ON_PURPOSE}"
            )


def _fault(path: Path, entry: FileEntry, header_sha256: str | None) -> str | None:
    """Return what makes a file differ from its entry, if anything does."""
    try:
        if not path.is_file():
            return f"is missing, {MANIFEST} records it"
        if (size := path.stat().st_size) != entry.size:
            return f"has {size} bytes, {MANIFEST} records {entry.size}"
        if path.suffix == ".safetensors":
            what, found, expected = "header", header_sha256, entry.header_sha256
        else:
            what, expected, found = "sha256", entry.sha256, None
            if size <= MAX_HASHED_BYTES:
                found = hashlib.sha256(read_document(path, MAX_HASHED_BYTES)).hexdigest()
    except OSError as error:
        return f"cannot be read ({error})"
    if found is None or expected is None:
        log.info("%s: only its size, %d bytes, is compared with %s", path, size, MANIFEST)
        return None
    return None if found == expected else f"has another {what} than {MANIFEST} records"


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
