"""The files of a streamed source, each there from shortly before its first tensor is read until its last is done."""

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from magistral_mlx.convert.source.hub_stream import HubStream

PATIENCE_SECONDS = 0.5


class Prefetcher:
    """Fetches files in the order they are needed, one ahead, on a thread of its own; deletes what is done with.

    Attributes:
        received: bytes that arrived so far.
    """

    def __init__(self, stream: HubStream, uses: Mapping[str, int]) -> None:
        """``uses``: how often each file is used, in the order of their first use."""
        self.received = 0
        self._stream, self._order, self._left = stream, list(uses), dict(uses)
        self._fetched: dict[str, Future[Path]] = {}
        self._counting = threading.Lock()
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fetch")

    def has(self, file: str) -> bool:
        """Whether a file is there; it and the one after it are on their way from now on.

        Raises:
            HubError, CheckpointError, OSError: as ``HubStream.fetch``.
        """
        at = self._order.index(file)
        for name in self._order[at : at + 2]:
            if name not in self._fetched:
                fetch = self._stream.fetch
                self._fetched[name] = self._pool.submit(
                    fetch, name, report=self._count, cancelled=self._closed.is_set
                )
        return self._fetched[file].done() and bool(self._fetched[file].result())

    def wait(self, file: str) -> None:
        """Return when a file is there, or in a while."""
        wait([self._fetched[file]], PATIENCE_SECONDS)

    def done(self, file: str) -> None:
        """Say that one use of a file is over. Safe from any thread."""
        with self._counting:
            self._left[file] -= 1
            is_over = not self._left[file]
        if is_over:
            self._stream.release(file)

    def close(self) -> None:
        """End what is being fetched; what arrived of it stays."""
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _count(self, nbytes: int) -> None:
        self.received += nbytes
