"""One safetensors file: its checked header, and its tensors one at a time."""

import hashlib
import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from magistral_mlx.checkpoint.documents import damaged, open_plain, unreadable
from magistral_mlx.checkpoint.safetensors_header import DTYPES, Entry, parse_header
from magistral_mlx.errors import CheckpointError, quoted
from magistral_mlx.files import leave_file_cache

READ_BYTES = 2**30  # a single read of 2 GiB or more fails on macOS
SAMPLE_BYTES = 256


@dataclass(frozen=True, slots=True)
class Shard:
    """File whose header holds no contradiction. None of it stays open or in memory.

    Attributes:
        header: place of each tensor, by name.
        data_start: first byte after the header.
    """

    path: Path
    header: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int
    header_sha256: str

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
                header = parse_header(path, file, os.fstat(file.fileno()).st_size)
            # The reference reader has to agree.
            with safe_open(path, framework="numpy"):
                pass
        except OSError as error:
            raise unreadable(path, error) from None
        except SafetensorError as error:
            raise damaged(
                path, f"the safetensors library refuses it ({quoted(str(error))})"
            ) from None
        return cls(path, *header)

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
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                while unread:
                    count = file.readinto(unread[:READ_BYTES])
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

    def sample_sha256(self) -> str:
        """Return the SHA-256, in hex, of a few bytes from the middle of every tensor.

        Fine-tunes of one model differ only in such bytes, and hashing all of them takes minutes.
        """
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            for entry in sorted(self.header.values(), key=lambda entry: entry.begin):
                file.seek(self.data_start + entry.begin + max(0, entry.nbytes - SAMPLE_BYTES) // 2)
                digest.update(file.read(min(entry.nbytes, SAMPLE_BYTES)))
        return digest.hexdigest()
