"""A KV cache on disk: one safetensors file with the ids it holds, what it belongs to, and a hash over all of it."""

import errno
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
from magistral_mlx.errors import CheckpointError, OptionError, in_units, quoted
from magistral_mlx.files import check_writable, replacing, write_all
from magistral_mlx.model.kv_cache import KVCache

FORMAT = "magistral-mlx prompt cache 3"
HASH, HASH_BYTES = (
    "sha256",
    32,
)  # the last tensor: SHA-256 over those of all pieces before it, header first
PIECE_BYTES = (
    32 * 2**20
)  # of a tensor, hashed by themselves: one core alone is slower than a Mac's drive
HASHERS = 4
FLOAT_KV = "16"  # what --kv-bits calls a cache that is not packed


def save_cache(
    path: Path,
    cache: KVCache,
    ids: Sequence[int],
    *,
    fingerprint: str,
    dtype: mx.Dtype,
    chat: str = "",
) -> None:
    """Write the cache of ``ids`` atomically: the file is the old one or the new one, never half of one.

    Args:
        fingerprint: the checkpoint's, without which the keys and values mean nothing.
        dtype: the activations'.
        chat: a conversation's own state, as JSON.
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
    kind = {"fingerprint": fingerprint, "kv_bits": str(cache.bits), "type": TYPE_NAMES[dtype]}
    head = _head(arrays, {"format": FORMAT} | kind)
    try:
        with replacing(path) as descriptor, ThreadPoolExecutor(HASHERS) as beside:
            write_all(descriptor, memoryview(head))
            digests = [_digest(head)]
            for array in (
                arrays.values()
            ):  # one copy at a time; mx.save_safetensors holds one of the whole cache
                data = _bytes(array)
                pieces = _hash(data, beside)
                write_all(descriptor, data)
                digests += [piece.result() for piece in pieces]
                del data, pieces  # before the next copy is made
            write_all(descriptor, memoryview(_digest(b"".join(digests))))
    except (OSError, RuntimeError) as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        size = sum(a.nbytes for a in arrays.values())
        why = (
            f"the disk is full, it takes {in_units(size)}; free some space, or"
            if is_full
            else f"{error};"
        )
        raise OptionError(
            f"{path}: the prompt cache could not be written: {why} name a file elsewhere. What was there is unchanged"
        ) from None


def check_cache_file(path: Path) -> None:
    """Raises OptionError, before a reply that may take hours, where its cache could not be written afterwards."""
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
    bits: int | None,
    dtype: mx.Dtype,
) -> tuple[KVCache, list[int], str]:
    """Read a cache back: the cache, its ids, the conversation's state.

    Args:
        dtype: the activations', which keys and values, or their scales, have too.
    Raises:
        OptionError: there is no such file, or it is of another checkpoint or kind of cache, or longer than ``limit``.
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
    cache = KVCache(config, limit=limit, bits=bits)
    length = math.prod(shard.header["ids"].shape) if "ids" in shard.header else 0
    names = _names(cache) if length else []
    kind = {"fingerprint": fingerprint, "kv_bits": str(cache.bits), "type": TYPE_NAMES[dtype]}
    for key, wanted in kind.items():
        if shard.metadata.get(key) != wanted:
            found, own = (
                FLOAT_KV if value == "0" else quoted(value)
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
            f"{path} holds {length} positions, but the context is {limit}; load with a larger context"
        )
    try:
        ids, chat = _read(shard, cache, names, length)
    except (ValueError, OSError) as error:
        raise _damaged(path, str(error)) from None
    return cache, ids, chat


def _read(shard: Shard, cache: KVCache, names: list[str], length: int) -> tuple[list[int], str]:
    """Everything, hashed by other threads meanwhile; two layers are in memory at most. Returns ids and chat."""
    with ThreadPoolExecutor(HASHERS) as beside, shard.path.open("rb") as file:
        hashed = [[beside.submit(_digest, file.read(shard.data_start))]]
        buffer = bytearray(max(entry.nbytes for entry in shard.header.values()))

        def read(name: str) -> mx.array:
            for pieces in hashed[: -cache.layers[0].parts]:
                wait(pieces)
            array = shard.read(name, buffer=buffer)
            hashed.append(_hash(_bytes(array), beside))
            return array

        def layers() -> Iterator[list[mx.array]]:
            parts = cache.layers[0].parts
            for i in range(0, len(names), parts):
                yield [read(name) for name in names[i : i + parts]]

        if names:
            cache.restore(layers(), length)
        ids, chat = np.array(read("ids")), np.array(read("chat"))
        found = _digest(b"".join(piece.result() for pieces in hashed for piece in pieces))
    if found != bytes(np.array(shard.read(HASH))):
        raise ValueError("what it holds is not what was written")
    return [int(identity) for identity in ids], chat.tobytes().decode()


def _names(cache: KVCache) -> list[str]:
    return [f"layer.{i}.{j}" for i, layer in enumerate(cache.layers) for j in range(layer.parts)]


def _bytes(array: mx.array) -> memoryview:
    return memoryview(mx.contiguous(array).view(mx.uint8).reshape(-1))  # type: ignore[arg-type]  # it is a buffer


def _hash(data: memoryview, beside: ThreadPoolExecutor) -> list[Future[bytes]]:
    """SHA-256 of each piece."""
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
