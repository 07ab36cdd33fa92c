"""A KV cache on disk: one safetensors file with its ids and a hash of all of it."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from magistral_mlx.atomic_files import check_writable, replacing
from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.documents import open_plain
from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.checkpoint.safetensors_header import TYPE_NAMES, header_bytes, place
from magistral_mlx.disk_space import is_disk_full
from magistral_mlx.errors import MagistralError, OptionError, in_units
from magistral_mlx.files import PRIVATE, write_all
from magistral_mlx.model.cache_header import (
    FORMAT,
    HASH,
    HASH_BYTES,
    Stamp,
    check_replaceable,
    damaged_cache,
    kind_of,
    names_of,
    open_cache,
)
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.kv_format import KVFormat

# Pieces of a tensor are hashed in parallel: one core alone is slower than a Mac's drive.
PIECE_BYTES = 32 * 2**20
HASHERS = 4


class Saved(NamedTuple):
    """The content of a file: the cache, its ids, the conversation's state, and the stamp."""

    cache: KVCache
    ids: list[int]
    chat: str
    stamp: Stamp


def never(_: Stamp) -> bool:
    """Let no conversation be replaced."""
    return False


def save_cache(
    path: Path,
    cache: KVCache,
    ids: Sequence[int],
    *,
    fingerprint: str,
    dtype: mx.Dtype,
    chat: str = "",
    may_replace: Callable[[Stamp], bool] = never,
) -> Stamp:
    """Write the cache of ``ids`` atomically: the file is the old one or the new one.

    Only its owner may read it. A file that is no prompt cache is never replaced. A cache without a
    conversation may always replace another one.

    Args:
        path: file to write.
        cache: its last positions are left out if ``ids`` are fewer.
        ids: ids of its positions.
        fingerprint: of the checkpoint that the keys and values were computed with.
        dtype: type of the activations.
        chat: state of a conversation, as JSON.
        may_replace: decides by its stamp whether the cache file that is there may be replaced.

    Returns:
        The stamp of the new file.

    Raises:
        OverwriteError: the file is another conversation, or something else.
        OptionError: the file cannot be written; what was there is unchanged.
    """

    def check(target: Path) -> None:
        check_replaceable(path, target, is_chat=bool(chat), may_replace=may_replace)

    ids = list(ids[: cache.length])
    state = cache.state(len(ids)) if ids else []
    arrays = dict(zip(names_of(cache), (array for parts in state for array in parts), strict=False))
    arrays |= {
        "ids": mx.array(ids, dtype=mx.int32),
        "chat": mx.array(np.frombuffer(chat.encode(), np.uint8)),
    }
    kind = kind_of(cache, fingerprint, dtype)
    head = _head(arrays, {"format": FORMAT} | kind)
    try:
        with (
            replacing(path, mode=PRIVATE, check=check) as descriptor,
            ThreadPoolExecutor(HASHERS) as beside,
        ):
            write_all(descriptor, memoryview(head))
            digests = [_digest(head)]
            # One copy at a time; mx.save_safetensors would hold one of the whole cache.
            for array in arrays.values():
                data = _bytes(array)
                pieces = _hash(data, beside)
                write_all(descriptor, data)
                digests += [piece.result() for piece in pieces]
                del data, pieces
            stamp = _digest(b"".join(digests))
            write_all(descriptor, memoryview(stamp))
    except (OSError, RuntimeError) as error:
        size = sum(a.nbytes for a in arrays.values())
        why = (
            f"the disk is full, it takes {in_units(size)}; free some space, or"
            if is_disk_full(error)
            else f"{(error.strerror if isinstance(error, OSError) else None) or error};"
        )
        raise OptionError(
            f"{path}: the prompt cache could not be written: {why} name a file elsewhere. "
            "What was there is unchanged"
        ) from None
    return stamp


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
) -> Saved:
    """Read a cache from a file, and check all that it holds.

    Args:
        path: file to read.
        config: of the model.
        limit: most positions that the cache may hold.
        fingerprint: of the checkpoint.
        kv_format: that the file must have.
        dtype: type of the activations; keys and values, or their scales, have it too.

    Raises:
        OptionError: there is no such file, it is of another checkpoint or kind of cache, or it is
            longer than ``limit``.
        CheckpointError: it is damaged.
    """
    while True:
        before = _state_of(path)
        cache = KVCache(config, limit=limit, kv_format=kv_format)
        try:
            shard = open_cache(path, cache, config, kind_of(cache, fingerprint, dtype))
            return _read(shard, cache, config)
        except (MagistralError, ValueError, OSError) as error:
            # Another process may have replaced the file in the middle.
            if _state_of(path) != before:
                continue
            if isinstance(error, MagistralError):
                raise
            raise damaged_cache(path, str(error)) from None


def _state_of(path: Path) -> tuple[int, ...]:
    """Return what differs between two files of one name; nothing where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _read(shard: Shard, cache: KVCache, config: ModelConfig) -> Saved:
    """Fill the cache and return all that the file holds; at most two layers are in memory.

    Other threads hash what is read meanwhile.

    Raises:
        ValueError: a value is not a number, an id not in the vocabulary, or the hash another one.
    """
    length = shard.header["ids"].shape[0]
    names = names_of(cache) if length else []
    with ThreadPoolExecutor(HASHERS) as beside, open_plain(shard.path) as file:
        hashed = [[beside.submit(_digest, file.read(shard.data_start))]]
        buffer = bytearray(max(entry.nbytes for entry in shard.header.values()))

        def read(name: str) -> mx.array:
            for pieces in hashed[: -cache.format.num_arrays]:
                wait(pieces)
            array = shard.read(name, buffer=buffer)
            if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
                raise ValueError(f"its tensor {name} holds values that are not numbers")
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
    if length and not 0 <= ids.min() <= ids.max() < config.vocab_size:
        raise ValueError(f"an id is not in the vocabulary of {config.vocab_size:,}")
    return Saved(cache, ids.tolist(), chat.tobytes().decode(), found)


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


def _head(arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> bytes:
    """Build the header of a file that holds the arrays in this order, and then the hash."""
    tensors = {name: (TYPE_NAMES[a.dtype], a.shape) for name, a in arrays.items()}
    return header_bytes(place(tensors | {HASH: ("U8", (HASH_BYTES,))}), metadata)
