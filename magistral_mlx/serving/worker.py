"""The one thread that makes every MLX call: arrays and streams of MLX belong to the thread that made them."""

import atexit
import os
import threading
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass

import mlx.core as mx

from magistral_mlx.serving.event_queue import Channel
from magistral_mlx.serving.events import failed
from magistral_mlx.serving.failures import ClosedError


@dataclass(slots=True)
class Job:
    """A generator that the owner steps, and where it puts its events; it must end its channel."""

    steps: Generator[None, None, None]
    channel: Channel

    def step(self) -> bool:
        """Take one step; whether that was the last. Nothing that is raised gets out."""
        try:
            next(self.steps)
            return False
        except StopIteration:
            self.channel.break_off()  # without effect on one that has ended
        except BaseException as error:
            try:
                self.channel.end(failed(error))
            except BaseException:  # no memory for an event either
                self.channel.break_off()
        return True


Line = deque[Job]  # jobs that follow each other


class Owner:
    """Steps the first job of every line in turn, and waits when there is none.

    The thread begins with the first job and then stays, parked, to the end of the interpreter: MLX 0.32 keeps a thread
    of its own for ever for each one that ever computed, so that one owner a load would leak one thread a load.

    Attributes:
        lock: guards all bookkeeping that the host's threads and the owner share. Never held during work.
    """

    def __init__(self, at_exit: Callable[[], None]) -> None:
        """``at_exit``: ends what is open, before the interpreter ends and the owner with it."""
        self.lock = threading.RLock()
        self._work = threading.Condition(self.lock)
        self._turns: deque[Line] = deque()
        self._thread: threading.Thread | None = None
        self._at_exit = at_exit
        self._is_ending = False

    def add(self, line: Line, job: Job) -> None:
        """Put a job at the end of a line."""
        with self.lock:
            if self._is_ending:
                raise ClosedError("the interpreter is ending; nothing can be begun any more")
            if self._thread is None:
                # A daemon, because the interpreter waits for other threads before it calls atexit.
                thread = threading.Thread(target=self._run, name="magistral-owner", daemon=True)
                thread.start()
                self._thread = thread
                atexit.register(self._end)
            if not line:
                self._turns.append(line)
            line.append(job)
            self._work.notify()

    def _run(self) -> None:
        _hold_standard_files()
        while (line := self._next()) is not None:
            has_ended = line[0].step()
            with self.lock:
                if has_ended:
                    line.popleft()
                if line:
                    self._turns.append(line)
        # MLX's own end of a thread runs after `join` has returned: at the process's end the two met, and aborted it.
        mx.clear_streams()

    def _next(self) -> Line | None:
        """The line whose turn it is, or None at the end of the interpreter."""
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

    Else the next file gets the number: MLX takes file 0 for one it could not open, and what a library prints on
    stderr would go into a cache that is being written.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
