"""A KV cache on disk: one safetensors file with its ids and a hash of all of it."""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import mlx.core as mx
import numpy as np

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.documents import AGAIN
from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.checkpoint.safetensors_header import TYPE_NAMES, header_bytes, place
from magistral_mlx.disk_space import is_disk_full
from magistral_mlx.errors import CheckpointError, OptionError, in_units, quoted
from magistral_mlx.files import check_writable, replacing, write_all
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.kv_format import FLOAT_BITS, KVFormat

FORMAT = "magistral-mlx prompt cache 3"
# The last tensor is the SHA-256 of the SHA-256s of all pieces before it, header first.
HASH, HASH_BYTES = "sha256", 32
# Pieces of a tensor are hashed in parallel: one core alone is slower than a Mac's drive.
PIECE_BYTES = 32 * 2**20
HASHERS = 4
# Value of kv_bits in the file of a cache that is not quantized.
UNQUANTIZED_BITS = "0"


def save_cache(
    path: Path,
    cache: KVCache,
    ids: Sequence[int],
    *,
    fingerprint: str,
    dtype: mx.Dtype,
    chat: str = "",
) -> None:
    """Write the cache of ``ids`` atomically: the file is the old one or the new one.

    Args:
        path: file to write.
        cache: its last positions are left out if ``ids`` are fewer.
        ids: ids of its positions.
        fingerprint: of the checkpoint that the keys and values were computed with.
        dtype: type of the activations.
        chat: state of a conversation, as JSON.

    Raises:
        OptionError: the file cannot be written; what was there is unchanged.
    """
    ids = list(ids[: cache.length])
    state = cache.state(len(ids)) if ids else []
    arrays = dict(zip(_names(cache), (array for parts in state for array in parts), strict=False))
    arrays |= {
        "ids": mx.array(ids, dtype=mx.int32),
        "chat": mx.array(np.frombuffer(chat.encode(), np.uint8)),
    }
    kind = _kind(cache, fingerprint, dtype)
    head = _head(arrays, {"format": FORMAT} | kind)
    try:
        with replacing(path) as descriptor, ThreadPoolExecutor(HASHERS) as beside:
            write_all(descriptor, memoryview(head))
            digests = [_digest(head)]
            # One copy at a time; mx.save_safetensors would hold one of the whole cache.
            for array in arrays.values():
                data = _bytes(array)
                pieces = _hash(data, beside)
                write_all(descriptor, data)
                digests += [piece.result() for piece in pieces]
                del data, pieces
            write_all(descriptor, memoryview(_digest(b"".join(digests))))
    except (OSError, RuntimeError) as error:
        size = sum(a.nbytes for a in arrays.values())
        why = (
            f"the disk is full, it takes {in_units(size)}; free some space, or"
            if is_disk_full(error)
            else f"{error};"
        )
        raise OptionError(
            f"{path}: the prompt cache could not be written: {why} name a file elsewhere. "
            "What was there is unchanged"
        ) from None


def check_cache_file(path: Path) -> None:
    """Raise OptionError if no cache can be written to ``path``; a reply may take hours."""
    try:
        check_writable(path)
    except OSError as error:
        why = error.strerror or error
        raise OptionError(
            f"{path}: no prompt cache can be written there ({why}); name another file"
        ) from None


def load_cache(
    path: Path,
    config: ModelConfig,
    *,
    limit: int,
    fingerprint: str,
    kv_format: KVFormat,
    dtype: mx.Dtype,
) -> tuple[KVCache, list[int], str]:
    """Read a cache from a file.

    Args:
        path: file to read.
        config: of the model.
        limit: most positions that the cache may hold.
        fingerprint: of the checkpoint.
        kv_format: that the file must have.
        dtype: type of the activations; keys and values, or their scales, have it too.

    Returns:
        The cache, its ids, and the conversation's state.

    Raises:
        OptionError: there is no such file, it is of another checkpoint or kind of cache, or it is
            longer than ``limit``.
        CheckpointError: it is damaged.
    """
    if not os.path.lexists(path):
        raise OptionError(
            f"{path}: no such prompt cache; check the path, or leave it out to start anew"
        )
    if not os.path.isfile(path):
        raise OptionError(f"{path} is no plain file, and so no prompt cache; name another")
    try:
        shard = Shard.open(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{str(error).removesuffix(AGAIN)}. Delete it, or name another file"
        ) from None
    if shard.metadata.get("format") != FORMAT:
        raise OptionError(
            f"{path} is not a prompt cache of this version of this software; name another file"
        )
    cache = KVCache(config, limit=limit, kv_format=kv_format)
    length = math.prod(shard.header["ids"].shape) if "ids" in shard.header else 0
    names = _names(cache) if length else []
    for key, wanted in _kind(cache, fingerprint, dtype).items():
        if shard.metadata.get(key) != wanted:
            found, own = (
                str(FLOAT_BITS) if value == UNQUANTIZED_BITS else quoted(value)
                for value in (shard.metadata.get(key), wanted)
            )
            raise OptionError(
                f"{path} was made with {key} {found}, this model has {own}; "
                "load the checkpoint and kind of cache it was made with, or name another file"
            )
    if set(shard.header) != {*names, "ids", "chat", HASH}:
        raise _damaged(path, "its tensors are not those of such a cache")
    if length > limit:
        raise OptionError(
            f"{path} holds {length} positions, but the context is {limit}; "
            "load with a larger context"
        )
    try:
        ids, chat = _read(shard, cache, names, length)
    except (ValueError, OSError) as error:
        raise _damaged(path, str(error)) from None
    return cache, ids, chat


def _read(shard: Shard, cache: KVCache, names: list[str], length: int) -> tuple[list[int], str]:
    """Fill the cache and return ids and chat; at most two layers are in memory.

    Other threads hash what is read meanwhile.
    """
    with ThreadPoolExecutor(HASHERS) as beside, shard.path.open("rb") as file:
        hashed = [[beside.submit(_digest, file.read(shard.data_start))]]
        buffer = bytearray(max(entry.nbytes for entry in shard.header.values()))

        def read(name: str) -> mx.array:
            for pieces in hashed[: -cache.format.num_arrays]:
                wait(pieces)
            array = shard.read(name, buffer=buffer)
            hashed.append(_hash(_bytes(array), beside))
            return array

        def layers() -> Iterator[list[mx.array]]:
            parts = cache.format.num_arrays
            for i in range(0, len(names), parts):
                yield [read(name) for name in names[i : i + parts]]

        if names:
            cache.restore(layers(), length)
        ids, chat = np.array(read("ids")), np.array(read("chat"))
        found = _digest(b"".join(piece.result() for pieces in hashed for piece in pieces))
    if found != bytes(np.array(shard.read(HASH))):
        raise ValueError("what it holds is not what was written")
    return [int(token_id) for token_id in ids], chat.tobytes().decode()


def _names(cache: KVCache) -> list[str]:
    return [
        f"layer.{i}.{j}" for i in range(len(cache.layers)) for j in range(cache.format.num_arrays)
    ]


def _kind(cache: KVCache, fingerprint: str, dtype: mx.Dtype) -> dict[str, str]:
    """Return the metadata that a file and a model must agree on."""
    kv_bits = UNQUANTIZED_BITS if cache.format.bits is None else str(cache.format.bits)
    return {"fingerprint": fingerprint, "kv_bits": kv_bits, "type": TYPE_NAMES[dtype]}


def _bytes(array: mx.array) -> memoryview:
    # It is a buffer, which MLX's types do not say.
    return memoryview(mx.contiguous(array).view(mx.uint8).reshape(-1))  # type: ignore[arg-type]


def _hash(data: memoryview, beside: ThreadPoolExecutor) -> list[Future[bytes]]:
    """Start to compute the SHA-256 of each piece."""
    return [
        beside.submit(_digest, data[i : i + PIECE_BYTES]) for i in range(0, len(data), PIECE_BYTES)
    ]


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({what}); delete it to start anew")


def _head(arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> bytes:
    """Build the header of a file that holds the arrays in this order, and then the hash."""
    tensors = {name: (TYPE_NAMES[a.dtype], a.shape) for name, a in arrays.items()}
    return header_bytes(place(tensors | {HASH: ("U8", (HASH_BYTES,))}), metadata)
