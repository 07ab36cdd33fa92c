"""A safetensors file whose header is known before its tensors, which stream to their places in any order."""

import errno
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import mlx.core as mx

from magistral_mlx.config import Shape
from magistral_mlx.safetensors_header import DTYPES, Entry, Shard

WRITE_BYTES = 2**30  # a single write of 2 GiB or more fails on macOS
MLX_TYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U32": mx.uint32, "U8": mx.uint8}
METADATA = {"format": "mlx"}
MAX_DATA_BYTES = 5_000_000_000 - 2**20  # of a file, so that with its header it stays under 5 GB


def lay_out(tensors: Mapping[str, tuple[str, Shape]]) -> dict[str, Entry]:
    """The place of each tensor in one file: widest types first, so that all are aligned, then by name.

    Args:
        tensors: name -> (type as safetensors spells it, shape).
    """
    entries: dict[str, Entry] = {}
    position = 0
    for name in sorted(tensors, key=lambda name: (-DTYPES[tensors[name][0]][0].itemsize, name)):
        dtype, shape = tensors[name]
        end = position + math.prod(shape) * DTYPES[dtype][0].itemsize
        entries[name] = Entry(dtype, shape, position, end)
        position = end
    return entries


def header_bytes(entries: Mapping[str, Entry]) -> bytes:
    """What stands before the data: the header's length in 8 bytes, the header, padding to a multiple of 8."""
    table = {n: {"dtype": e.dtype, "shape": e.shape, "data_offsets": [e.begin, e.end]} for n, e in entries.items()}
    text = json.dumps({"__metadata__": METADATA} | table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def divide(units: Iterable[tuple[str, int]], limit: int = MAX_DATA_BYTES) -> list[list[str]]:
    """Put units of (name, bytes) into as few files as keep their order and ``limit``; a larger unit gets its own."""
    files: list[list[str]] = []
    filled = 0
    for name, nbytes in units:
        if not files or filled + nbytes > limit:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += nbytes
    return files


class ShardWriter:
    """Writes one new safetensors file; complete, on the drive and checked when the ``with`` block ends well."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self.path, self.entries = path, entries
        self.head = header_bytes(entries)
        self.unwritten = {name: entry.nbytes for name, entry in entries.items()}
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    def __enter__(self) -> "ShardWriter":
        self._put(memoryview(self.head), 0)
        return self

    def write(self, name: str, rows: mx.array, first_row: int = 0) -> None:
        """Write rows of a tensor to their place. Every row must be written once, in any order."""
        entry = self.entries[name]
        assert rows.dtype == MLX_TYPES[entry.dtype], f"{name}: {rows.dtype} is not {entry.dtype}"
        assert rows.shape[1:] == entry.shape[1:], f"{name}: {rows.shape} is not of {entry.shape}"
        offset = first_row * (entry.nbytes // entry.shape[0])
        assert offset + rows.nbytes <= entry.nbytes, f"{name}: more rows than {entry.shape}"
        data = memoryview(rows.view(mx.uint8))  # type: ignore[arg-type]  # it is a buffer, MLX's types do not say so
        self._put(data.cast("B"), len(self.head) + entry.begin + offset)
        self.unwritten[name] -= rows.nbytes

    def _put(self, data: memoryview, offset: int) -> None:
        while data:
            written = os.pwrite(self.descriptor, data[:WRITE_BYTES], offset)
            data, offset = data[written:], offset + written

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                flush_to_drive(self.descriptor)
        finally:
            os.close(self.descriptor)
        if kind is None:
            assert not any(self.unwritten.values()), f"{self.path}: tensors were left out"
            Shard.open(self.path)  # our own strict reader and the safetensors library's


def flush_to_drive(descriptor: int) -> None:
    """Return when a file's or folder's content is on the drive itself, on macOS too, where fsync alone does not."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:  # network and FAT file systems know no such thing
            if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                raise
    os.fsync(descriptor)


def flush_path(path: Path) -> None:
    """As ``flush_to_drive``, of a closed file, or of a folder: the names in it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flush_to_drive(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
