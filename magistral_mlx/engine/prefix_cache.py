"""The KV cache of the newest reply and the ids it holds, for the next prompt to share."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import mlx.core as mx

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.errors import MemoryLimitError, NumericsError, OptionError, named
from magistral_mlx.model.cache_file import load_cache, never, save_cache
from magistral_mlx.model.cache_header import Stamp, kind_of, open_cache
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.kv_format import KVFormat
from magistral_mlx.streams import Cancellation

Item = TypeVar("Item")
Result = TypeVar("Result")


class PrefixCache:
    """One KV cache that belongs to the newest reply.

    Attributes:
        cache: keys and values of ``ids``.
        ids: the prompt and the reply so far.
        holder: the reply that may use the cache.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        limit: int,
        kv_format: KVFormat,
        fingerprint: str,
        dtype: mx.Dtype,
    ) -> None:
        """Start with an empty cache.

        Args:
            config: the model's.
            limit: the most positions it may hold.
            kv_format: how keys and values are stored.
            fingerprint: the checkpoint's; a cache file must have the same.
            dtype: the activations' type; a cache file must have the same.
        """
        self.config, self.limit, self.kv_format = config, limit, kv_format
        self.fingerprint, self.dtype = fingerprint, dtype
        self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that the cache has allocated."""
        return self.cache.nbytes

    def clear(self) -> None:
        """Drop the cache. A reply that still uses it must end."""
        self.cache = KVCache(self.config, limit=self.limit, kv_format=self.kv_format)
        self.ids: list[int] = []
        self.holder: object = None

    def acquire(self, holder: object, prompt: Sequence[int]) -> int:
        """Trim the cache to the longest prefix of a prompt that it holds, for a new holder.

        Returns:
            The prefix's length. It excludes the prompt's last id, whose logits are needed.
        """
        common = 0
        # A reply that is paused while it reads its prompt has cached a part of its ids.
        for ours, theirs in zip(self.ids[: self.cache.length], prompt[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        self.cache.trim(self.cache.length - common)
        self.holder, self.ids = holder, list(prompt)
        return common

    def check_holder(self, holder: object) -> None:
        """Raise OptionError if a newer reply has the cache by now."""
        if self.holder is not holder:
            raise OptionError(
                "a newer reply has begun on this model; "
                "finish or close a stream before the next one"
            )

    @contextmanager
    def held_by(self, holder: object) -> Iterator[None]:
        """Make the cache and its ids agree at the end of the block, however it ends.

        Raises:
            MemoryLimitError: memory ran out (MLX raises RuntimeError); the cache is dropped.
        """
        try:
            yield
        except NumericsError:
            # A file may have brought the values that are wrong; the next prompt must not meet them.
            self.clear()
            raise
        # After MLX's error the content of the arrays is unknown.
        except RuntimeError as error:
            self.clear()
            if "memory" not in str(error).lower():
                raise
            raise MemoryLimitError(
                f"there was not enough memory for this reply, and its cache was dropped ({error}); "
                "the model can be used on: load it with a smaller context "
                f"({named('max_kv_size')}) or {named('kv_bits', 8)}"
            ) from None
        finally:
            self.sync(holder)

    def sync(self, holder: object) -> None:
        """Make the cache and its ids agree; a look-ahead or an interruption leaves one apart."""
        if self.holder is holder:
            self.cache.trim(max(0, self.cache.length - len(self.ids)))
            del self.ids[self.cache.length :]

    def open(self, path: Path) -> tuple[str, Stamp]:
        """Replace the cache by a file's; return the conversation in it, and the file's stamp.

        Errors: ``load_cache``.
        """
        empty = KVCache(self.config, limit=self.limit, kv_format=self.kv_format)
        # A file that is not for this model leaves the cache as it is.
        open_cache(path, empty, self.config, kind_of(empty, self.fingerprint, self.dtype))
        self.clear()  # memory is planned for one cache
        self.cache, self.ids, conversation, stamp = load_cache(
            path,
            self.config,
            limit=self.limit,
            fingerprint=self.fingerprint,
            kv_format=self.kv_format,
            dtype=self.dtype,
        )
        return conversation, stamp

    def open_for_reply(self, path: Path) -> None:
        """Replace the cache by a file's, if the file exists.

        Raises:
            OptionError: the file holds a conversation; else as ``open``.
        """
        if path.exists() and self.open(path)[0]:
            raise OptionError(
                f"{path} holds a conversation, which a single reply would overwrite; continue it "
                "as a chat, or name another file"
            )

    def with_file(
        self,
        path: Path,
        work: Generator[Item, None, Result],
        holder: object,
        cancellation: Cancellation,
    ) -> Generator[Item, None, Result]:
        """Do a holder's work with a file's cache; write it back if it is still the holder's."""
        if not cancellation.is_requested:
            self.open_for_reply(path)
        result = yield from work
        if self.holder is holder:
            self.save(path)
        return result

    def save(
        self, path: Path, conversation: str = "", may_replace: Callable[[Stamp], bool] = never
    ) -> Stamp:
        """Write the cache and a conversation to a file. Arguments and errors: ``save_cache``."""
        return save_cache(
            path,
            self.cache,
            self.ids,
            fingerprint=self.fingerprint,
            dtype=self.dtype,
            chat=conversation,
            may_replace=may_replace,
        )
