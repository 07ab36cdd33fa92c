"""The header of a cache file: what it must say, and which files may be replaced."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.documents import AGAIN
from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.checkpoint.safetensors_header import TYPE_NAMES
from magistral_mlx.errors import (
    CheckpointError,
    ForeignFileError,
    OptionError,
    OverwriteError,
    named,
    quoted,
)
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.kv_format import FLOAT_BITS

FAMILY = "magistral-mlx prompt cache"
FORMAT = f"{FAMILY} 3"
# The last tensor is the SHA-256 of the SHA-256s of all pieces before it, header first.
HASH, HASH_BYTES = "sha256", 32
# Value of kv_bits in the file of a cache that is not quantized.
UNQUANTIZED_BITS = "0"
# The hash at the end of a file. It tells whether the file is the one that was read or written last.
Stamp = bytes


def open_cache(path: Path, cache: KVCache, config: ModelConfig, kind: dict[str, str]) -> Shard:
    """Check a file's header against an empty cache that is to hold its content.

    Args:
        path: file to read.
        cache: the cache, whose limit holds.
        config: of the model.
        kind: what the file's metadata must say; see ``kind_of``.

    Raises:
        OptionError: there is no such file, it is of another checkpoint or kind of cache, or it is
            longer than the cache's limit.
        CheckpointError: it is no cache file, or damaged.
    """
    if not os.path.lexists(path):
        raise OptionError(f"{path}: no such prompt cache; check the path")
    if not os.path.isfile(path):
        raise OptionError(f"{path} is no plain file, and so no prompt cache; name another")
    try:
        shard = Shard.open(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} is no prompt cache, or it is damaged "
            f"({_detail(path, error)}); name another file"
        ) from None
    if shard.metadata.get("format") != FORMAT:
        raise OptionError(
            f"{path} is not a prompt cache of this version of this software; name another file"
        )
    length = math.prod(shard.header["ids"].shape) if "ids" in shard.header else 0
    names = names_of(cache) if length else []
    for key, wanted in kind.items():
        if shard.metadata.get(key) != wanted:
            raise _of_another_kind(path, key, shard.metadata.get(key), wanted)
    if set(shard.header) != {*names, "ids", "chat", HASH}:
        raise damaged_cache(path, "its tensors are not those of such a cache")
    if length > cache.limit:
        raise OptionError(
            f"{path} holds {length} positions, but the context is {cache.limit}; "
            "load with a larger context"
        )
    try:
        _check_shapes(shard, cache, config, length)
    except ValueError as error:
        raise damaged_cache(path, str(error)) from None
    return shard


def check_replaceable(
    path: Path, target: Path, *, is_chat: bool, may_replace: Callable[[Stamp], bool]
) -> None:
    """Raise OverwriteError for a file that is not ours to replace.

    Args:
        path: as the user named it.
        target: the same, without links.
        is_chat: a conversation is about to be written.
        may_replace: see ``save_cache``.
    """
    if not os.path.lexists(target) or not target.stat().st_size:
        return
    try:
        shard = Shard.open(target)
    except CheckpointError:
        raise _foreign(path) from None
    if not shard.metadata.get("format", "").startswith(FAMILY) or HASH not in shard.header:
        raise _foreign(path)
    holds_chat = "chat" not in shard.header or shard.header["chat"].nbytes > 0
    if not is_chat and not holds_chat:
        return
    if not may_replace(bytes(np.array(shard.read(HASH)))):
        what = "another conversation" if holds_chat else "a prompt cache"
        raise OverwriteError(
            f"{path} holds {what}, which would be lost; name another file, or pass "
            f"{named('overwrite', True)}"
        )


def _foreign(path: Path) -> ForeignFileError:
    return ForeignFileError(
        f"{path} is something else than a prompt cache, and is left as it is; name another file"
    )


def _of_another_kind(path: Path, key: str, found: str | None, own: str) -> OptionError:
    """Make the error for a file that another model, or another kind of cache, wrote."""
    if key == "fingerprint":
        return OptionError(
            f"{path} was made with another model; load that one, or name another file"
        )
    found, own = (
        str(FLOAT_BITS) if value == UNQUANTIZED_BITS else quoted(value) for value in (found, own)
    )
    return OptionError(
        f"{path} was made with {key} {found}, this model has {own}; load the model as it was then, "
        "or name another file"
    )


def names_of(cache: KVCache) -> list[str]:
    """Return the names of the tensors of keys and values."""
    return [
        f"layer.{i}.{j}" for i in range(len(cache.layers)) for j in range(cache.format.num_arrays)
    ]


def kind_of(cache: KVCache, fingerprint: str, dtype: mx.Dtype) -> dict[str, str]:
    """Return the metadata that a file and a model must agree on."""
    kv_bits = UNQUANTIZED_BITS if cache.format.bits is None else str(cache.format.bits)
    return {"fingerprint": fingerprint, "kv_bits": kv_bits, "type": TYPE_NAMES[dtype]}


def _check_shapes(shard: Shard, cache: KVCache, config: ModelConfig, length: int) -> None:
    """Raise ValueError if a tensor has another type or shape than this model writes.

    A file that somebody made may have a right hash and wrong tensors.
    """
    dtype = next(t for t, name in TYPE_NAMES.items() if name == shard.metadata["type"])
    sample = mx.zeros((1, 2 * config.num_kv_heads, 1, config.head_dim), dtype)
    parts = [(TYPE_NAMES[a.dtype], a.shape) for a in cache.format.pack(sample)]
    expected = {
        name: (parts[i % len(parts)][0], (*shape[:2], length, shape[3]))
        for i, name in enumerate(names_of(cache) if length else [])
        for shape in [parts[i % len(parts)][1]]
    }
    expected |= {"ids": ("I32", (length,)), HASH: ("U8", (HASH_BYTES,))}
    expected["chat"] = ("U8", (shard.header["chat"].nbytes,))
    for name, wanted in expected.items():
        entry = shard.header[name]
        if (entry.dtype, entry.shape) != wanted:
            raise ValueError(
                f"its tensor {name} is {entry.dtype} {list(entry.shape)}, "
                f"expected {wanted[0]} {list(wanted[1])}"
            )


def damaged_cache(path: Path, what: str) -> CheckpointError:
    """Make the error for a cache file that holds something wrong."""
    return CheckpointError(f"{path} is damaged ({what}); name another file")


def _detail(path: Path, error: CheckpointError) -> str:
    """Return what is wrong, from the error of a checkpoint's file, which begins with its path."""
    text = str(error).removesuffix(AGAIN).removeprefix(f"{path} ")
    return text.removeprefix("is damaged: ").removeprefix("cannot be read ")
