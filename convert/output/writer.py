"""Write a safetensors file whose tensors arrive in any order, once its header is known."""

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.checkpoint.safetensors_header import MLX_TYPES, Entry, header_bytes
from magistral_mlx.files import PARTIAL, create_file, flush, rename, sha256_of, write_at

# One thread flushes this much while others write; a single flush at the end would stall all.
FLUSH_BYTES = 128 * 2**20


class ShardWriter:
    """Writes a safetensors file from several threads; renames it to ``path`` when complete."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self.path, self.entries = path, entries
        self.temporary = path.with_name(path.name + PARTIAL)
        self._head = header_bytes(entries)
        self._unwritten = {name: entry.nbytes for name, entry in entries.items()}
        self._unflushed = 0
        self._counting = threading.Lock()
        self._descriptor: int | None = create_file(self.temporary)
        write_at(self._descriptor, memoryview(self._head), 0)

    def write(self, name: str, rows: mx.array, first_row: int = 0) -> bool:
        """Write rows of a tensor, each row once, in any order.

        Returns:
            True if the file is now complete.
        """
        assert self._descriptor is not None, f"{self.path} is closed"
        entry = self.entries[name]
        assert rows.dtype == MLX_TYPES[entry.dtype], f"{name}: {rows.dtype} is not {entry.dtype}"
        assert rows.shape[1:] == entry.shape[1:], f"{name}: {rows.shape} is not of {entry.shape}"
        offset = first_row * (entry.nbytes // entry.shape[0])
        assert offset + rows.nbytes <= entry.nbytes, f"{name}: more rows than {entry.shape}"
        # An array is a buffer, which MLX's types do not declare.
        data = memoryview(rows.view(mx.uint8))  # type: ignore[arg-type]
        write_at(self._descriptor, data.cast("B"), len(self._head) + entry.begin + offset)
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
        """Flush, check, hash and name the file; return its ``size`` and ``sha256``."""
        assert self._descriptor is not None, f"{self.path} is closed"
        assert not self._unwritten, f"{self.path}: tensors were left out"
        flush(self._descriptor)
        self.close()
        Shard.open(self.temporary)
        entry = {"size": self.temporary.stat().st_size, "sha256": sha256_of(self.temporary)}
        rename(self.temporary, self.path)
        return entry

    def close(self) -> None:
        """Close the file, complete or not."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
