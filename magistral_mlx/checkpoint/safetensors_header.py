"""The header of a safetensors file: read and checked, or written before the tensors."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import numpy as np

from magistral_mlx.checkpoint.documents import MAX_JSON_BYTES, damaged, parse_json
from magistral_mlx.checkpoint.quant_format import Shape
from magistral_mlx.errors import CheckpointError, quoted

MAX_DIMENSION = 2**31 - 1  # MLX keeps dimensions in 32 bits
MAX_DIMENSIONS = 8  # multiplying a million of them takes minutes
FP8 = "fp8: rounded already, with scales that no format of MLX has"
INDEX = "model.safetensors.index.json"
METADATA = {"format": "mlx"}

# What this software reads: the type in memory, and in MLX if NumPy has no such type.
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
FLOATS = frozenset({"BF16", "F16", "F32"})
# What this software writes.
MLX_TYPES = {
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "F32": mx.float32,
    "I32": mx.int32,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
TYPE_NAMES = {dtype: name for name, dtype in MLX_TYPES.items()}


def itemsize(dtype: str) -> int:
    """Return the bytes of one value of a type such as "BF16"."""
    return DTYPES[dtype][0].itemsize


class Entry(NamedTuple):
    """Type and place of one tensor.

    Attributes:
        dtype: as the file spells it, such as "BF16".
        begin: first byte, counted from the end of the header.
        end: byte after the last one, counted likewise.
    """

    dtype: str
    shape: Shape
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class Header(NamedTuple):
    """Header of one file; ``data_start`` is the first byte after it."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int
    sha256: str


def place(tensors: Mapping[str, tuple[str, Shape]]) -> dict[str, Entry]:
    """Place tensors one after the other, in the order in which they are given.

    Args:
        tensors: name -> (type as safetensors spells it, shape).
    """
    entries: dict[str, Entry] = {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * itemsize(dtype)
        entries[name] = Entry(dtype, shape, position, end)
        position = end
    return entries


def lay_out(tensors: Mapping[str, tuple[str, Shape]]) -> dict[str, Entry]:
    """Place tensors in one file: widest types first, so that all are aligned, then by name.

    Args:
        tensors: name -> (type as safetensors spells it, shape).
    """
    order = sorted(tensors, key=lambda name: (-itemsize(tensors[name][0]), name))
    return place({name: tensors[name] for name in order})


def header_bytes(entries: Mapping[str, Entry], metadata: Mapping[str, str] = METADATA) -> bytes:
    """Build everything before the data: the header's length in 8 bytes, the header, padding.

    The padding makes the length a multiple of 8.
    """
    table = {
        n: {"dtype": e.dtype, "shape": e.shape, "data_offsets": [e.begin, e.end]}
        for n, e in entries.items()
    }
    text = json.dumps({"__metadata__": metadata} | table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def parse_header(path: Path, file: BinaryIO, file_bytes: int) -> Header:
    """Read a header from the start of ``file`` and check it.

    Args:
        path: for messages.
        file: at its start.
        file_bytes: size of the whole file.

    Raises:
        CheckpointError: it contradicts itself or the file's size.
    """
    # A file without a size, such as some of Linux's /proc, may have no end.
    prefix = file.read(8) if file_bytes else b""
    num_bytes = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or 8 + num_bytes > file_bytes:
        raise damaged(
            path, f"its header should take {num_bytes} bytes, the whole file has {file_bytes}"
        )
    if num_bytes > MAX_JSON_BYTES:
        raise damaged(path, f"its header takes {num_bytes} bytes, {MAX_JSON_BYTES} are allowed")
    text = file.read(num_bytes)
    if not text.startswith(b"{"):
        raise damaged(path, "its header does not start with '{'")
    raw = parse_json(text, path)
    # MLX writes null if it was given none.
    metadata = raw.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise damaged(path, "__metadata__ is not a table of strings")
    entries = {name: _entry(path, name, value) for name, value in raw.items()}
    data_start = 8 + num_bytes
    _check_layout(path, entries, file_bytes - data_start)
    return Header(entries, metadata, data_start, hashlib.sha256(prefix + text).hexdigest())


def _entry(path: Path, name: str, raw: Any) -> Entry:
    """Check one tensor alone: its bytes must be what its shape and type need."""
    tensor = f"tensor {quoted(name)}"
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"{tensor} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        is_fp8 = isinstance(dtype, str) and dtype.startswith("F8_")
        what = f"which is {FP8}" if is_fp8 else "which no Magistral checkpoint for MLX uses"
        raise CheckpointError(
            f"{path}: {tensor} has dtype {quoted(dtype)}, {what}; start from the bf16 checkpoint"
        )
    is_shape = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    if not is_shape or not all(type(size) is int and 0 <= size <= MAX_DIMENSION for size in shape):
        raise damaged(path, f"{tensor} has the impossible shape {quoted(shape)}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int for offset in offsets)
    ):
        raise damaged(
            path, f"{tensor} has data_offsets {quoted(offsets)}, expected two whole numbers"
        )
    entry = Entry(dtype, tuple(shape), *offsets)
    # Python's integers do not overflow.
    needed = math.prod(shape) * itemsize(dtype)
    if entry.begin < 0 or entry.nbytes != needed:
        raise damaged(
            path,
            f"{tensor} ({dtype}, {shape}) needs {needed} bytes, its data_offsets are "
            f"{quoted(offsets)}",
        )
    return entry


def _check_layout(path: Path, entries: Mapping[str, Entry], data_bytes: int) -> None:
    """Check that the tensors fill the data exactly, one after the other."""
    expected = max((entry.end for entry in entries.values()), default=0)
    if expected > data_bytes:
        raise damaged(
            path, f"it is cut short: its tensors take {expected} bytes, {data_bytes} are there"
        )
    if expected < data_bytes:
        raise damaged(path, f"{data_bytes - expected} bytes follow the last tensor")
    position, previous = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != position:
            fault = "overlaps" if entry.begin < position else "leaves a hole after"
            raise damaged(path, f"tensor {quoted(name)} {fault} {previous}")
        position, previous = entry.end, quoted(name)
