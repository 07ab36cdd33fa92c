"""A safetensors file whose header is known before its tensors, which stream to their places in any order."""

import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from magistral_mlx import files as durable
from magistral_mlx.checkpoint.config import Shape
from magistral_mlx.checkpoint.safetensors import DTYPES, Entry, Shard
from magistral_mlx.convert import disk

T = TypeVar("T")

MLX_TYPES = {
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "F32": mx.float32,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
METADATA = {"format": "mlx"}
FLUSH_BYTES = 128 * 2**20  # one thread waits for these while others go on; at the end nobody could
MAX_DATA_BYTES = (
    300_000_000  # of a file of several layers: an interruption loses a file, or a layer, at most
)


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
    table = {
        n: {"dtype": e.dtype, "shape": e.shape, "data_offsets": [e.begin, e.end]}
        for n, e in entries.items()
    }
    text = json.dumps({"__metadata__": METADATA} | table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def divide(units: Iterable[tuple[T, int]], limit: int = MAX_DATA_BYTES) -> list[list[T]]:
    """Put units of (what, bytes) into as few files as keep their order and ``limit``; a larger unit gets its own."""
    files: list[list[T]] = []
    filled = 0
    for unit, nbytes in units:
        if not files or filled + nbytes > limit:
            files.append([])
            filled = 0
        files[-1].append(unit)
        filled += nbytes
    return files


class ShardWriter:
    """Writes one safetensors file, from several threads at once; it has its name only when it is whole."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self.path, self.entries = path, entries
        self.temporary = path.with_name(path.name + disk.TEMPORARY)
        self._head = header_bytes(entries)
        self._unwritten = {name: entry.nbytes for name, entry in entries.items()}
        self._unflushed = 0
        self._counting = threading.Lock()
        self._descriptor: int | None = disk.create(self.temporary)
        disk.put(self._descriptor, memoryview(self._head), 0)

    def write(self, name: str, rows: mx.array, first_row: int = 0) -> bool:
        """Write rows of a tensor to their place; whether these were the last of the file that were missing.

        Every row must be written once, in any order.
        """
        assert self._descriptor is not None, f"{self.path} is closed"
        entry = self.entries[name]
        assert rows.dtype == MLX_TYPES[entry.dtype], f"{name}: {rows.dtype} is not {entry.dtype}"
        assert rows.shape[1:] == entry.shape[1:], f"{name}: {rows.shape} is not of {entry.shape}"
        offset = first_row * (entry.nbytes // entry.shape[0])
        assert offset + rows.nbytes <= entry.nbytes, f"{name}: more rows than {entry.shape}"
        data = memoryview(rows.view(mx.uint8))  # type: ignore[arg-type]  # it is a buffer, MLX's types do not say so
        disk.put(self._descriptor, data.cast("B"), len(self._head) + entry.begin + offset)
        with self._counting:
            self._unwritten[name] -= rows.nbytes
            if not self._unwritten[name]:
                del self._unwritten[name]
            self._unflushed += rows.nbytes
            flushes = self._unflushed >= FLUSH_BYTES and bool(self._unwritten)
            self._unflushed = 0 if flushes else self._unflushed
            is_last = not self._unwritten
        if flushes:
            os.fsync(self._descriptor)
        return is_last

    def finish(self) -> dict[str, Any]:
        """Flush, check, hash and name the file: its ``size`` and ``sha256``."""
        assert self._descriptor is not None, f"{self.path} is closed"
        assert not self._unwritten, f"{self.path}: tensors were left out"
        durable.flush(self._descriptor)
        self.close()
        Shard.open(self.temporary)  # our own strict reader and the safetensors library's
        entry = {"size": self.temporary.stat().st_size, "sha256": disk.sha256_of(self.temporary)}
        disk.rename(self.temporary, self.path)
        return entry

    def close(self) -> None:
        """Let go of the file, whole or not."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
