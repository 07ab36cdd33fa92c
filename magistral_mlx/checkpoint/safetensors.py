"""One safetensors file: its checked header, and its tensors one at a time."""

import hashlib
import io
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from magistral_mlx.checkpoint.documents import damaged, open_plain, unreadable
from magistral_mlx.checkpoint.safetensors_header import DTYPES, Entry, parse_header
from magistral_mlx.errors import CheckpointError, quoted
from magistral_mlx.files import leave_file_cache

READ_BYTES = 2**30  # a single read of 2 GiB or more fails on macOS
SAMPLE_BYTES = 256

Stamp = tuple[int, int]  # bytes, and nanoseconds of the last change


@dataclass(frozen=True, slots=True)
class Shard:
    """File whose header holds no contradiction. None of it stays open or in memory.

    Attributes:
        header: place of each tensor, by name.
        data_start: first byte after the header.
        stamp: size and time of the last change when it was opened, None if it had not arrived.
    """

    path: Path
    header: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int
    header_sha256: str
    stamp: Stamp | None = field(default=None, compare=False)

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Read and check the header.

        MLX's own reader accepts an overlap, a hole, and a shape whose product overflows to 0 and
        segfaults when indexed. So no file reaches ``mx.load`` before it has passed here.

        Raises:
            CheckpointError: the file is missing, cut short, or contradicts itself.
        """
        try:
            with open_plain(path) as file:
                stamp = _stamp(file)
                header = parse_header(path, file, stamp[0])
                # The reference reader has to agree.
                with safe_open(_name_of(file, path), framework="numpy"):
                    pass
        except OSError as error:
            raise unreadable(path, error) from None
        except SafetensorError as error:
            raise damaged(
                path, f"the safetensors library refuses it ({quoted(str(error))})"
            ) from None
        return cls(path, *header, stamp)

    @classmethod
    def parse(cls, path: Path, head: bytes, file_bytes: int) -> "Shard":
        """Check the header of a file that has not arrived yet, by its first bytes.

        Args:
            path: where the file will be.
            head: at least up to the end of the header; 8 bytes if the header is longer than
                allowed.
            file_bytes: size of the whole file.

        Raises:
            CheckpointError: it contradicts itself or the file's size.
        """
        return cls(path, *parse_header(path, io.BytesIO(head), file_bytes))

    def read(
        self,
        name: str,
        rows: slice | None = None,
        *,
        once: bool = False,
        buffer: bytearray | None = None,
    ) -> mx.array:
        """Read a tensor, or a block of its rows, bit for bit as ``mx.load`` gives it.

        Args:
            name: a key of ``header``.
            rows: a slice of the first axis, without a step.
            once: these bytes are not read again soon, see ``leave_file_cache``.
            buffer: memory to read through, large enough. A new one for each tensor costs more time
                than reading it.

        Raises:
            CheckpointError: the file changed since it was opened.
        """
        entry = self.header[name]
        numpy_dtype, mx_dtype = DTYPES[entry.dtype]
        shape, offset = entry.shape, self.data_start + entry.begin
        if rows is not None:
            start, stop, step = rows.indices(shape[0])
            assert step == 1, "rows are read as one run of bytes"
            offset += start * math.prod(shape[1:]) * numpy_dtype.itemsize
            shape = (max(0, stop - start), *shape[1:])
        if buffer is None:
            values = np.empty(shape, numpy_dtype)
        else:
            values = np.frombuffer(buffer, numpy_dtype, math.prod(shape)).reshape(shape)
        unread = values.reshape(-1).view(np.uint8).data
        try:
            with self._opened(buffering=0) as file:
                file.seek(offset)
                while unread:
                    count = os.readv(file.fileno(), [unread[:READ_BYTES]])
                    if not count:
                        raise damaged(
                            self.path,
                            f"it ends inside tensor {name!r}, and did not when it was opened",
                        )
                    unread = unread[count:]
                if once:
                    leave_file_cache(file.fileno(), offset, values.nbytes)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} cannot be read ({error}); check the disk"
            ) from None
        array = mx.array(values)
        return array if mx_dtype is None else array.view(mx_dtype)

    def load(self) -> dict[str, mx.array]:
        """Return every tensor by its stored name; it is read when first evaluated.

        Raises:
            CheckpointError: the file changed since it was opened.
        """
        try:
            with self._opened() as file:
                loaded = mx.load(_name_of(file, self.path), format="safetensors")
            self.check_unchanged()
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.path} cannot be loaded ({error}); check the disk, and fetch the file again"
            ) from None
        assert isinstance(loaded, dict)
        return loaded

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file changed since it was opened."""
        try:
            self._opened().close()
        except OSError as error:
            raise unreadable(self.path, error) from None

    def _opened(self, *, buffering: int = -1) -> BinaryIO:
        file = open_plain(self.path, buffering=buffering)
        if self.stamp is not None and _stamp(file) != self.stamp:
            file.close()
            raise self.changed()
        return file

    def changed(self) -> CheckpointError:
        """Make the error for a file that is not the one that was checked."""
        return CheckpointError(
            f"{self.path} was changed or replaced after it was checked; run the same command again "
            "when nothing writes to it"
        )

    def sample_sha256(self) -> str:
        """Return the SHA-256, in hex, of a few bytes from the middle of every tensor.

        Fine-tunes of one model differ only in such bytes, and hashing all of them takes minutes.
        """
        digest = hashlib.sha256()
        with self._opened() as file:
            for entry in sorted(self.header.values(), key=lambda entry: entry.begin):
                file.seek(self.data_start + entry.begin + max(0, entry.nbytes - SAMPLE_BYTES) // 2)
                digest.update(file.read(min(entry.nbytes, SAMPLE_BYTES)))
        return digest.hexdigest()


def _stamp(file: BinaryIO) -> Stamp:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _name_of(file: BinaryIO, path: Path) -> str:
    """Return the name by which a library opens a file that is open.

    On Linux it leads to the very file that was checked. A Mac has such names, too, but an app's
    sandbox may forbid them; there the file is checked again after it was opened.
    """
    return f"/proc/self/fd/{file.fileno()}" if sys.platform == "linux" else str(path)
