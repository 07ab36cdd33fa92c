"""The live KV cache and the ids it holds: what the next prompt may share with the last."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.errors import MemoryLimitError, OptionError
from magistral_mlx.model.cache_file import load_cache, save_cache
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.kv_format import KVFormat


class PrefixCache:
    """One cache, lent to one reply at a time; the newest reply has it."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        limit: int,
        kv_format: KVFormat,
        fingerprint: str,
        dtype: mx.Dtype,
    ) -> None:
        """``limit``: positions at most. ``fingerprint``: the checkpoint's, which a file's must equal, as must
        ``dtype``, the activations'."""
        self.config, self.limit, self.kv_format, self.fingerprint, self.dtype = (
            config,
            limit,
            kv_format,
            fingerprint,
            dtype,
        )
        self.cancel_requested = False  # the owner is to end; the one thing another thread may set
        self.clear()

    def clear(self) -> None:
        """Drop the cache. A reply that still uses it must end."""
        self.cache = KVCache(self.config, limit=self.limit, kv_format=self.kv_format)
        self.ids: list[int] = []
        self.owner: object = None

    def acquire(self, owner: object, prompt: Sequence[int]) -> int:
        """Trim the cache to the longest prefix of ``prompt`` it holds, and return that prefix's length.

        It is short of the prompt's last id at least, whose logits are needed.
        """
        common = 0
        for ours, theirs in zip(self.ids, prompt[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        self.cache.trim(self.cache.length - common)
        self.owner, self.ids = owner, list(prompt)
        return common

    def check_owner(self, owner: object) -> bool:
        """Whether ``owner`` is to go on. Raises OptionError if a newer reply has the cache by now."""
        if self.owner is not owner:
            raise OptionError(
                "a newer reply has begun on this model; finish or close a stream before the next one"
            )
        return not self.cancel_requested

    @contextmanager
    def held_by(self, owner: object) -> Iterator[None]:
        """While ``owner`` has the cache; in the end cache and ids agree, however it ends.

        Raises:
            MemoryLimitError: instead of MLX's RuntimeError when memory ran out; the cache is dropped.
        """
        try:
            yield
        except (
            RuntimeError
        ) as error:  # MLX: out of memory, or a device that failed; what the arrays hold is unknown
            self.clear()
            if "memory" not in str(error).lower():
                raise
            raise MemoryLimitError(
                f"there was not enough memory for this reply, and its cache was dropped ({error}); the model can be "
                "used on: load it with a smaller context (--max-kv-size) or --kv-bits 8"
            ) from None
        finally:
            self.sync(owner)

    def sync(self, owner: object) -> None:
        """Make cache and ids agree after a reply, which a look-ahead or an interruption leaves one apart."""
        if self.owner is owner:
            self.cache.trim(max(0, self.cache.length - len(self.ids)))
            del self.ids[self.cache.length :]

    def open(self, path: Path) -> str:
        """Make a cache file the live cache; returns the conversation's state in it. Errors as ``load_cache``."""
        self.clear()  # there is room planned for one
        self.cache, self.ids, chat = load_cache(
            path,
            self.config,
            limit=self.limit,
            fingerprint=self.fingerprint,
            kv_format=self.kv_format,
            dtype=self.dtype,
        )
        return chat

    def save(self, path: Path, chat: str = "") -> None:
        """Write the cache to a file. Errors as ``save_cache``."""
        save_cache(
            path, self.cache, self.ids, fingerprint=self.fingerprint, dtype=self.dtype, chat=chat
        )
