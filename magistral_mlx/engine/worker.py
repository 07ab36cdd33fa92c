"""The worker: the one thread that makes every MLX call, since arrays belong to their thread."""

import atexit
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

import mlx.core as mx

from magistral_mlx.errors import MagistralError
from magistral_mlx.streams import Stream

Result = TypeVar("Result")


class EndingError(MagistralError):
    """Work for the worker while the program ends, or in a process that has none."""


class Task(Protocol):
    """Work in steps."""

    def step(self) -> bool:
        """Take one step and return True if it was the last. Never raises."""
        ...


SomeTask = TypeVar("SomeTask", bound=Task)


class _Call(Generic[Result]):
    """The steps of a stream, up to its result."""

    def __init__(self, work: Stream[Any, Result]) -> None:
        self.future: Future[Result] = Future()
        # A task of asyncio that is cancelled would otherwise cancel the future as well.
        self.future.set_running_or_notify_cancel()
        self._work = work

    def step(self) -> bool:
        try:
            for _ in self._work:
                return False
            self.future.set_result(self._work.result())
        except BaseException as error:
            self.future.set_exception(error)
        return True


class Worker:
    """Steps the first task of every queue in turn, and waits when there is none.

    The thread starts with the first task and stays, parked, until the interpreter ends: MLX 0.32
    keeps a thread of its own for each thread that ever computed, so a worker for each load would
    leak a thread for each load.

    Attributes:
        lock: guards all state that other threads and the worker share. Never held during work.
        is_ending: the program ends, so that nothing can be started.
    """

    def __init__(self) -> None:
        """Make a worker without a thread."""
        self.lock = threading.RLock()
        # Wakes the worker. The garbage collector may drop a stream, which adds work, amid the
        # steps of a wait; a Condition could lose that signal.
        self._wakes: SimpleQueue[None] = SimpleQueue()
        self._turns: deque[deque[Any]] = deque()
        self._thread: threading.Thread | None = None
        self._process = 0
        self._endings: list[Callable[[], None]] = []
        self.is_ending = False

    @property
    def is_current(self) -> bool:
        """True on the worker's own thread."""
        return self._thread is not None and self._thread.ident == threading.get_ident()

    def at_exit(self, end: Callable[[], None]) -> None:
        """Let a function end what is open, before the interpreter and the worker end."""
        self._endings.append(end)

    def add(self, tasks: deque[SomeTask], task: SomeTask) -> None:
        """Put a task at the end of a queue, whose tasks run one after another.

        Raises:
            EndingError: the interpreter is ending, or this process was forked off another's worker.
        """
        with self.lock:
            if self.is_ending:
                raise EndingError("the program is ending; nothing can be started any more")
            if self._thread is None:
                self._start()
            elif self._process != os.getpid():
                raise EndingError(
                    "this process was forked after a model was loaded, and MLX's threads stayed "
                    "behind; load the model in the process that uses it, or start processes by "
                    "'spawn'"
                )
            if not tasks:
                self._turns.append(tasks)
            tasks.append(task)
        self._wakes.put(None)

    def submit(self, work: Stream[Any, Result]) -> "Future[Result]":
        """Take the steps of a stream beside other tasks; return the future of its result."""
        call = _Call(work)
        self.add(deque(), call)
        return call.future

    def _start(self) -> None:
        # A daemon, because the interpreter waits for other threads before it calls atexit.
        thread = threading.Thread(target=self._run, name="magistral-worker", daemon=True)
        thread.start()
        self._thread, self._process = thread, os.getpid()
        atexit.register(self._end)

    def _run(self) -> None:
        _hold_standard_files()
        while (tasks := self._next()) is not None:
            has_ended = tasks[0].step()
            with self.lock:
                if has_ended:
                    tasks.popleft()
                if tasks:
                    self._turns.append(tasks)
        # Only daemons still wait for what is left, and they end with the interpreter.
        # MLX cleans up a thread after `join` has returned, which aborted processes at their end.
        mx.clear_streams()

    def _next(self) -> deque[Any] | None:
        """Return the queue whose turn it is, or None when the interpreter ends."""
        while not self.is_ending:
            with self.lock:
                if self._turns:
                    return self._turns.popleft()
            self._wakes.get()
        return None

    def _end(self) -> None:
        # A forked process has nothing to end.
        if self._thread is None or self._process != os.getpid():
            return
        for end in self._endings:
            end()
        with self.lock:
            self.is_ending = True
        self._wakes.put(None)
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


# The worker of this process, for the library and the bridge alike.
WORKER = Worker()
