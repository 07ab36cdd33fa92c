"""Jobs on threads: reading, quantizing and writing let go of the interpreter, so that they overlap."""

import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")

WORKERS = min(16, 4 * (os.cpu_count() or 1))  # of which most wait for the disk


def unordered(
    jobs: Iterable[Callable[[], T]], workers: int = WORKERS, ahead: int | None = None
) -> Generator[T, None, None]:
    """Run jobs, begun in order and at most ``workers`` at once; yields what they return, as it comes.

    After an error, or when closed, no job begins any more, and those begun are waited for.

    Args:
        ahead: jobs that are taken at most before they are done; so many that ``jobs`` may work while they run.
    """
    ahead = workers if ahead is None else ahead
    pool = ThreadPoolExecutor(workers, thread_name_prefix="convert")
    running: set[Future[T]] = set()
    try:
        for job in jobs:
            running.add(pool.submit(job))
            if len(running) == ahead:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
