"""Write the header of a safetensors file, which is known before the tensors are."""

import json
import math
from collections.abc import Mapping

import mlx.core as mx

from magistral_mlx.checkpoint.quant_format import Shape
from magistral_mlx.checkpoint.safetensors import DTYPES, Entry

MLX_TYPES = {
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "F32": mx.float32,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
METADATA = {"format": "mlx"}


def lay_out(tensors: Mapping[str, tuple[str, Shape]]) -> dict[str, Entry]:
    """Place tensors in one file: widest types first, so that all are aligned, then by name.

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
    """Build everything before the data: the header's length in 8 bytes, the header, padding.

    The padding makes the length a multiple of 8.
    """
    table = {
        n: {"dtype": e.dtype, "shape": e.shape, "data_offsets": [e.begin, e.end]}
        for n, e in entries.items()
    }
    text = json.dumps({"__metadata__": METADATA} | table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
