"""The worker: the one thread that makes every MLX call, since arrays belong to their thread."""

import atexit
import os
import threading
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass

import mlx.core as mx

from magistral_mlx.serving.event_queue import EventQueue
from magistral_mlx.serving.events import failed
from magistral_mlx.serving.failures import ClosedError

Steps = Generator[None, None, None]


@dataclass(slots=True)
class Job:
    """A generator that the worker steps, and the queue of its events; it must end its queue."""

    steps: Steps
    events: EventQueue

    def step(self) -> bool:
        """Take one step and return True if it was the last. Never raises."""
        try:
            for _ in self.steps:
                return False
            self.events.abort()  # no effect on a queue that has ended
        except BaseException as error:
            try:
                self.events.end(failed(error))
            except BaseException:  # no memory for an event either
                self.events.abort()
        return True


JobQueue = deque[Job]  # the jobs of one model, which run one after another


class MlxWorker:
    """Steps the first job of every queue in turn, and waits when there is none.

    The thread starts with the first job and stays, parked, until the interpreter ends: MLX 0.32
    keeps a thread of its own for each thread that ever computed, so a worker for each load would
    leak a thread for each load.

    Attributes:
        lock: guards all state that host threads and the worker share. Never held during work.
    """

    def __init__(self, at_exit: Callable[[], None]) -> None:
        """Make a worker without a thread.

        Args:
            at_exit: ends what is open, before the interpreter and the worker end.
        """
        self.lock = threading.RLock()
        self._work = threading.Condition(self.lock)
        self._turns: deque[JobQueue] = deque()
        self._thread: threading.Thread | None = None
        self._at_exit = at_exit
        self._is_ending = False

    def add(self, jobs: JobQueue, job: Job) -> None:
        """Put a job at the end of a queue."""
        with self.lock:
            if self._is_ending:
                raise ClosedError("the interpreter is ending; nothing can be started any more")
            if self._thread is None:
                # A daemon, because the interpreter waits for other threads before it calls atexit.
                thread = threading.Thread(target=self._run, name="magistral-worker", daemon=True)
                thread.start()
                self._thread = thread
                atexit.register(self._end)
            if not jobs:
                self._turns.append(jobs)
            jobs.append(job)
            self._work.notify()

    def _run(self) -> None:
        _hold_standard_files()
        while (jobs := self._next()) is not None:
            has_ended = jobs[0].step()
            with self.lock:
                if has_ended:
                    jobs.popleft()
                if jobs:
                    self._turns.append(jobs)
        # MLX cleans up a thread after `join` has returned, which aborted processes at their end.
        mx.clear_streams()

    def _next(self) -> JobQueue | None:
        """Return the queue whose turn it is, or None when the interpreter ends."""
        with self.lock:
            while not self._turns and not self._is_ending:
                self._work.wait()
            return self._turns.popleft() if self._turns else None

    def _end(self) -> None:
        self._at_exit()
        with self.lock:
            self._is_ending = True
            self._work.notify()
        if self._thread is not None:
            self._thread.join()


def _hold_standard_files() -> None:
    """Open the null device as stdin, stdout or stderr where a host has closed them.

    Otherwise the next open file gets that number: MLX takes file 0 for one that could not be
    opened, and what a library prints on stderr would go into a cache that is being written.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The file gets the lowest free number.
            os.open(os.devnull, os.O_RDWR)
