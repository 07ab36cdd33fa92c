"""Fetch the files of a streamed source one ahead of their use; delete used ones."""

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from magistral_mlx.convert.source.hub_stream import HubStream

# Longest wait for a file in one call, so that the caller can report progress.
WAIT_SECONDS = 0.5


class Prefetcher:
    """Fetches files in the order of use on its own thread, and deletes used ones.

    Attributes:
        received: bytes that have arrived.
    """

    def __init__(self, stream: HubStream, uses: Mapping[str, int]) -> None:
        """Prepare to fetch the files of ``uses``: number of uses by name, in order of first use."""
        self.received = 0
        self._stream, self._order, self._left = stream, list(uses), dict(uses)
        self._fetched: dict[str, Future[Path]] = {}
        self._counting = threading.Lock()
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fetch")

    def has(self, file: str) -> bool:
        """Tell whether a file has arrived; start to fetch it and the next one.

        Raises:
            HubError, CheckpointError, OSError: ``HubStream.fetch`` raised it.
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
        """Wait for a file, for ``WAIT_SECONDS`` at most."""
        wait([self._fetched[file]], WAIT_SECONDS)

    def done(self, file: str) -> None:
        """Count one use of a file, and delete it after the last. Safe from any thread."""
        with self._counting:
            self._left[file] -= 1
            is_over = not self._left[file]
        if is_over:
            self._stream.release(file)

    def close(self) -> None:
        """Stop fetching; the bytes that have arrived stay."""
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _count(self, nbytes: int) -> None:
        self.received += nbytes
