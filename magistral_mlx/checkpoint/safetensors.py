"""One safetensors file: its header, checked strictly, and its tensors one at a time."""

import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from magistral_mlx.errors import CheckpointError, quoted
from magistral_mlx.files import leave_file_cache

# Of a header, index or config. Magistral's largest takes 0.1 MB, a conversation saved with its cache a few MB.
MAX_JSON_BYTES = 10_000_000
MAX_JSON_VALUES = 250_000  # they take 100 times their text in memory; Magistral's index has 1,100
MAX_DIMENSION = 2**31 - 1  # MLX keeps dimensions in 32 bits
MAX_DIMENSIONS = 8  # multiplying a million of them takes minutes
READ_BYTES = 2**30  # a single read of 2 GiB or more fails on macOS
SAMPLE_BYTES = 256
FP8 = "fp8: rounded already, with scales that no format of MLX has"

# What this software reads or writes: the type in memory, and in MLX where NumPy has no such type.
DTYPES: Mapping[str, tuple[np.dtype[Any], mx.Dtype | None]] = {
    "BF16": (np.dtype("<u2"), mx.bfloat16),
    "BOOL": (np.dtype(np.bool_), None),
    "F16": (np.dtype("<f2"), None),
    "F32": (np.dtype("<f4"), None),
    "I8": (np.dtype("i1"), None),
    "I16": (np.dtype("<i2"), None),
    "I32": (np.dtype("<i4"), None),
    "I64": (np.dtype("<i8"), None),
    "U8": (np.dtype("u1"), None),
    "U16": (np.dtype("<u2"), None),
    "U32": (np.dtype("<u4"), None),
    "U64": (np.dtype("<u8"), None),
}


class Entry(NamedTuple):
    """A tensor's line in the header."""

    dtype: str  # as the file spells it: "BF16", "U32", ...
    shape: tuple[int, ...]
    begin: int  # bytes after the header
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file whose header holds no contradiction. Nothing of it stays open or in memory."""

    path: Path
    header: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int  # bytes
    header_sha256: str

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Read and check the header.

        MLX's own reader takes files that it must not (an overlap, a hole, a shape whose product overflows
        to 0 and is a segfault when indexed), so no file reaches ``mx.load`` without having passed here.

        Raises:
            CheckpointError: the file is missing, cut short, or contradicts itself.
        """
        try:
            with _open_plain(path) as file:
                shard = _parse(path, file, os.fstat(file.fileno()).st_size)
            with safe_open(path, framework="numpy"):  # the reference reader has to agree
                pass
        except OSError as error:
            raise _unreadable(path, error) from None
        except SafetensorError as error:
            raise _damaged(
                path, f"the safetensors library refuses it ({quoted(str(error))})"
            ) from None
        return shard

    @classmethod
    def parse(cls, path: Path, head: bytes, file_bytes: int) -> "Shard":
        """Check the header of a file that is not there yet, by its first bytes.

        Args:
            path: where the file will be.
            head: up to the end of the header at least; 8 bytes of a header that is longer than allowed.
            file_bytes: of the whole file.
        Raises:
            CheckpointError: it contradicts itself or the file's size.
        """
        return _parse(path, io.BytesIO(head), file_bytes)

    def read(
        self,
        name: str,
        rows: slice | None = None,
        *,
        once: bool = False,
        buffer: bytearray | None = None,
    ) -> mx.array:
        """One tensor, or a block of its rows, read from disk now; bit for bit what ``mx.load`` gives.

        Args:
            name: a key of ``header``.
            rows: a slice of the first axis, without a step.
            once: nobody reads these bytes again soon: see ``leave_file_cache``.
            buffer: large enough, to pass through: for each tensor a new one costs more than reading it.
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
                        raise _damaged(
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
        """SHA-256, in hex, over a few bytes from the middle of every tensor.

        Fine-tunes of one model differ in nothing but such bytes, and to hash all of them would take minutes.
        """
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            for entry in sorted(self.header.values(), key=lambda entry: entry.begin):
                file.seek(self.data_start + entry.begin + max(0, entry.nbytes - SAMPLE_BYTES) // 2)
                digest.update(file.read(min(entry.nbytes, SAMPLE_BYTES)))
        return digest.hexdigest()


AGAIN = ". Fetch or convert it again"  # ends the message of a damaged file


def read_document(path: Path) -> bytes:
    """A small file such as config.json or the index.

    Raises:
        CheckpointError: it is missing, no plain file, or far too large for what it is.
    """
    try:
        with _open_plain(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_JSON_BYTES:
                raise CheckpointError(
                    f"{path} has {size} bytes, far too many for what it is; fetch it again"
                )
            return file.read(MAX_JSON_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from None


def parse_json(text: bytes, source: Path) -> dict[str, Any]:
    """A JSON object in UTF-8 in which no key occurs twice.

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
        raise _damaged(source, f"it holds up to {values} values, {MAX_JSON_VALUES} are allowed")
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(source, f"it is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise _damaged(source, f"it holds a JSON {type(value).__name__}, expected an object")
    return value


def _open_plain(path: Path) -> BinaryIO:
    """Open a file for reading, and nothing else: a pipe is waited for, a device has no end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no plain file")
    return path.open("rb")


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}{AGAIN}")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({error}); check the file, or fetch it again")


def _parse(path: Path, file: BinaryIO, file_bytes: int) -> Shard:
    prefix = file.read(8)
    header_bytes = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or 8 + header_bytes > file_bytes:
        raise _damaged(
            path, f"its header should take {header_bytes} bytes, the whole file has {file_bytes}"
        )
    if header_bytes > MAX_JSON_BYTES:
        raise _damaged(path, f"its header takes {header_bytes} bytes, {MAX_JSON_BYTES} are allowed")
    text = file.read(header_bytes)
    if not text.startswith(b"{"):
        raise _damaged(path, "its header does not start with '{'")
    raw = parse_json(text, path)
    metadata = raw.pop("__metadata__", None) or {}  # MLX writes null where it was given none
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _damaged(path, "__metadata__ is not a table of strings")
    header = {name: _entry(path, name, value) for name, value in raw.items()}
    data_start = 8 + header_bytes
    _check_layout(path, header, file_bytes - data_start)
    return Shard(path, header, metadata, data_start, hashlib.sha256(prefix + text).hexdigest())


def _entry(path: Path, name: str, raw: Any) -> Entry:
    """One tensor's line, alone: its bytes must be what its shape and type need."""
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(
            path, f"tensor {quoted(name)} is not described by dtype, shape and data_offsets"
        )
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        is_fp8 = isinstance(dtype, str) and dtype.startswith("F8_")
        what = f"which is {FP8}" if is_fp8 else "which no Magistral checkpoint for MLX uses"
        raise CheckpointError(
            f"{path}: tensor {quoted(name)} has dtype {quoted(dtype)}, {what}; start from the bf16 checkpoint"
        )
    is_shape = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    if not is_shape or not all(type(size) is int and 0 <= size <= MAX_DIMENSION for size in shape):
        raise _damaged(path, f"tensor {quoted(name)} has the impossible shape {quoted(shape)}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int for offset in offsets)
    ):
        raise _damaged(
            path,
            f"tensor {quoted(name)} has data_offsets {quoted(offsets)}, expected two whole numbers",
        )
    entry = Entry(dtype, tuple(shape), *offsets)
    needed = math.prod(shape) * DTYPES[dtype][0].itemsize  # Python's integers do not overflow
    if entry.begin < 0 or entry.nbytes != needed:
        raise _damaged(
            path,
            f"tensor {quoted(name)} ({dtype}, {shape}) needs {needed} bytes, its data_offsets are {quoted(offsets)}",
        )
    return entry


def _check_layout(path: Path, header: Mapping[str, Entry], data_bytes: int) -> None:
    """The tensors must fill the data exactly, one after the other."""
    expected = max((entry.end for entry in header.values()), default=0)
    if expected > data_bytes:
        raise _damaged(
            path, f"it is cut short: its tensors take {expected} bytes, {data_bytes} are there"
        )
    if expected < data_bytes:
        raise _damaged(path, f"{data_bytes - expected} bytes follow the last tensor")
    position, previous = 0, "the header"
    for name, entry in sorted(header.items(), key=lambda item: item[1][2:]):
        if entry.begin != position:
            fault = "overlaps" if entry.begin < position else "leaves a hole after"
            raise _damaged(path, f"tensor {quoted(name)} {fault} {previous}")
        position, previous = entry.end, quoted(name)
