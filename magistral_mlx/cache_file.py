"""A KV cache on disk: one safetensors file with the ids it holds and what it belongs to."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from magistral_mlx.cache import KVCache
from magistral_mlx.config import ModelConfig
from magistral_mlx.errors import CheckpointError, OptionError
from magistral_mlx.safetensors_header import Shard

FORMAT = "magistral-mlx prompt cache 2"
TYPES = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.uint32: "U32", mx.int32: "I32"}


def save_cache(path: Path, cache: KVCache, ids: Sequence[int], *, fingerprint: str, chat: str = "") -> None:
    """Write the cache of ``ids`` atomically: the file is the old one or the new one, never half of one.

    Args:
        fingerprint: the checkpoint's, without which the keys and values mean nothing.
        chat: a conversation's own state, as JSON.
    """
    arrays = {f"layer.{i}.{j}": a for i, parts in enumerate(cache.state()) for j, a in enumerate(parts)}
    arrays["ids"] = mx.array(list(ids), dtype=mx.int32)
    metadata = {"format": FORMAT, "fingerprint": fingerprint, "kv_bits": str(cache.bits), "chat": chat}
    partial = path.parent / f".{path.name}.{os.getpid()}.safetensors"
    try:
        with partial.open("wb") as file:
            file.write(_head(arrays, metadata))
            for array in arrays.values():  # one copy at a time; mx.save_safetensors holds one of the whole cache
                file.write(memoryview(mx.contiguous(array).view(mx.uint8)))  # type: ignore[arg-type]  # it is a buffer
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        raise OptionError(f"{path}: the prompt cache could not be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def load_cache(
    path: Path, config: ModelConfig, *, limit: int, fingerprint: str, bits: int | None
) -> tuple[KVCache, list[int], str]:
    """Read a cache back: the cache, its ids, the conversation's state.

    Raises:
        OptionError: the file is of another checkpoint or kind of cache, or longer than ``limit``.
        CheckpointError: it is damaged, or no such file.
    """
    if not path.is_file():
        raise OptionError(f"{path}: no such prompt cache; check the path, or leave it out to start anew")
    shard = Shard.open(path)
    metadata = shard.metadata
    if metadata.get("format") != FORMAT:
        raise OptionError(f"{path} is not a prompt cache of this software; name another file")
    cache = KVCache(config, limit=limit, bits=bits)
    for key, wanted in {"fingerprint": fingerprint, "kv_bits": str(cache.bits)}.items():
        if metadata[key] != wanted:
            raise OptionError(
                f"{path} was made with {key} {metadata[key]}, this model has {wanted}; "
                "load the checkpoint and kind of cache it was made with, or name another file"
            )
    parts = (len(shard.header) - 1) // config.num_layers
    try:
        length = shard.header["ids"].shape[0]
        if length > limit:
            raise OptionError(
                f"{path} holds {length} positions, but the context is {limit}; load with a larger context"
            )
        ids = [int(i) for i in np.array(shard.read("ids"))]
        state = ([shard.read(f"layer.{i}.{j}") for j in range(parts)] for i in range(config.num_layers))
        cache.restore(state, length)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it to start anew") from None
    return cache, ids, metadata["chat"]


def _head(arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> bytes:
    """What stands before the arrays' bytes in a safetensors file that holds them in this order."""
    table: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, array in arrays.items():
        offsets = [position, position := position + array.nbytes]
        table[name] = {"dtype": TYPES[array.dtype], "shape": array.shape, "data_offsets": offsets}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
