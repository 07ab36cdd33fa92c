"""Streams whose steps the worker takes, for callers on any thread."""

from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from magistral_mlx.engine.line import Line, Turn
from magistral_mlx.engine.worker import WORKER, EndingError
from magistral_mlx.streams import Cancellation, Stream, without_items

Item = TypeVar("Item")
Result = TypeVar("Result")

# The work that has begun and not ended. Otherwise the garbage collector, where it finds a stream in
# a cycle, would close the work as well, on whatever thread it runs.
_BEGUN: dict[Turn, Stream[Any, Any]] = {}


def _cancel_all() -> None:
    for steps in list(_BEGUN.values()):
        steps.cancel()


# A step of several replies takes as long as the shortest of them.
WORKER.at_exit(_cancel_all)


def on_worker(
    work: Generator[Item, None, Result],
    line: Line,
    cancellation: Cancellation | None = None,
    *,
    replaces: bool = True,
    gives_rest: bool = False,
) -> Stream[Item, Result]:
    """Return a stream of work that only the worker may do. On the worker itself it is direct.

    Args:
        work: the steps.
        line: the callers who wait for the same model.
        cancellation: what the work itself looks at and honours.
        replaces: the work ends an older stream of the same caller.
        gives_rest: after Ctrl-C the work has more items, and then raises it.
    """
    if WORKER.is_current:
        return Stream(work, cancellation)
    return WorkerStream(work, Turn(line, replaces=replaces), cancellation, gives_rest=gives_rest)


def run_on_worker(work: Callable[[], Result], line: Line, *, replaces: bool = True) -> Result:
    """Do one thing on the worker, in turn, and return its result."""

    def steps() -> Generator[Any, None, Result]:
        yield from ()
        return work()

    return on_worker(steps(), line, replaces=replaces).result()


class WorkerStream(Stream[Item, Result]):
    """A stream whose steps the worker takes, in its caller's turn.

    Ctrl-C in a thread that waits for a step ends the work, and is raised once the step has ended.
    """

    def __init__(
        self,
        work: Generator[Item, None, Result],
        turn: Turn,
        cancellation: Cancellation | None = None,
        *,
        gives_rest: bool = False,
    ) -> None:
        """Wrap a generator; see ``on_worker``."""
        super().__init__(work, cancellation)
        self._turn, self._gives_rest = turn, gives_rest
        self._steps = Stream(_in_turn(work, turn), cancellation)
        self._cancellation.wake = turn.grant

    def __next__(self) -> Item:
        if not self._is_open:
            raise StopIteration(*self._results)
        for item in self._wait(self.pull):
            return item
        raise StopIteration(self.take_result(self._steps.result()))

    def result(self) -> Result:
        """Run the work to its end, all of it on the worker; else as ``Stream.result``."""
        if self._is_open:
            self.take_result(self._wait(self.drain))
        return super().result()

    def cancel(self) -> None:
        self._cancellation.request()

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            if closing := self.leave():
                closing.exception()

    def __del__(self) -> None:
        # Nobody waits where a stream is dropped: it may be anywhere.
        if self._is_open:
            self.leave()

    def begin(self) -> "Future[None]":
        """Wait in line; return what tells that the turn has come."""
        if not self._turn.has_begun:
            _BEGUN[self._turn] = self._steps
        begun = self._turn.begin()
        if self._cancellation.is_requested:
            self._turn.grant()
        return begun

    def pull(self) -> "Future[list[Item]]":
        """Take a step; return its item, or none at the end."""
        return WORKER.submit(without_items(self._pull))

    def drain(self) -> "Future[Result]":
        """Take all steps; return the result."""
        return WORKER.submit(self._steps)

    def take_result(self, result: Result) -> Result:
        """Remember the result; raise KeyboardInterrupt instead if Ctrl-C came too late."""
        self._is_open = False
        if self._cancellation.is_interrupted:
            raise KeyboardInterrupt
        self._results.append(result)
        return result

    def leave(self) -> "Future[None] | None":
        """Close the work on the worker; return what tells that it is done."""
        self._is_open = False
        if not self._turn.has_begun:
            self._steps.close()
            return None
        # The program's end closes it as well, and is no time to make an error.
        if WORKER.is_ending:
            return None
        with suppress(EndingError):
            return WORKER.submit(without_items(self._close))
        return None

    def _wait(self, start: Callable[[], "Future[Any]"]) -> Any:
        """Wait for the turn and for what ``start`` gives to the worker."""
        call: Future[Any] | None = None
        try:
            self.begin().exception()
            call = start()
            call.exception()
        except BaseException as error:
            # Ctrl-C, or what another signal's handler raises.
            self._cancellation.interrupt()
            if call is None or not (self._gives_rest and isinstance(error, KeyboardInterrupt)):
                self.close()
                raise
            self._wait_again(call)
        try:
            return call.result()
        except BaseException:
            # Ctrl-C may come here, too; work that has failed has ended.
            self.close()
            raise
        finally:
            # An error's frames would keep it alive.
            del call

    def _wait_again(self, call: "Future[Any]") -> None:
        """Wait for an interrupted step; a second Ctrl-C closes the work."""
        try:
            call.exception()
        except BaseException:
            self.close()
            raise

    def _pull(self) -> list[Item]:
        for item in self._steps:
            return [item]
        return []

    def _close(self) -> None:
        self._steps.close()
        _end(self._turn)


def _in_turn(work: Generator[Item, None, Result], turn: Turn) -> Generator[Item, None, Result]:
    try:
        return (yield from work)
    finally:
        _end(turn)


def _end(turn: Turn) -> None:
    _BEGUN.pop(turn, None)
    turn.leave()
