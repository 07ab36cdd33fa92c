"""Run jobs on threads: reading, quantizing and writing release the interpreter's lock."""

import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")

# More than the cores, because most threads wait for the disk.
WORKERS = min(16, 4 * (os.cpu_count() or 1))


def unordered(
    jobs: Iterable[Callable[[], T]], workers: int = WORKERS, ahead: int | None = None
) -> Generator[T, None, None]:
    """Run jobs on threads, and yield their results as they come.

    After an error, or when the generator is closed, no job begins, and running jobs end.

    Args:
        jobs: started in this order. The iterator may compute while they run.
        workers: the most jobs that run at once.
        ahead: the most jobs that run or wait; ``workers`` by default.
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
