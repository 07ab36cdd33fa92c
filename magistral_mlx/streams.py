"""Streams: long work that reports what happens and ends in a result.

Inside a room, work is a generator that yields items and returns its result. What leaves a room
is a ``Stream``.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import wraps
from typing import Any, Generic, ParamSpec, TypeVar

from magistral_mlx.errors import CancelledError

Item = TypeVar("Item")
Result = TypeVar("Result")
Other = TypeVar("Other")
P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Progress:
    """The part of a stream's work that is done, in that stream's unit: bytes, tokens or tensors.

    ``name`` is what is being worked on.
    """

    done: int
    total: int
    name: str = ""


class Cancellation:
    """A request to end work early: any thread makes it, the work looks at it between two steps.

    Attributes:
        is_requested: the work is asked to end.
        is_interrupted: Ctrl-C asked for it.
        wake: called with every request, to end a wait.
    """

    def __init__(self) -> None:
        self.is_requested = self.is_interrupted = False
        self.wake: Callable[[], None] = lambda: None

    def request(self) -> None:
        """Ask the work to end."""
        self.is_requested = True
        self.wake()

    def interrupt(self) -> None:
        """Ask the work to end as if Ctrl-C had been pressed in its own thread."""
        self.is_interrupted = True
        self.request()

    def check(self) -> None:
        """Raise CancelledError if the work is asked to end, or KeyboardInterrupt after Ctrl-C."""
        if self.is_interrupted:
            raise KeyboardInterrupt
        if self.is_requested:
            raise CancelledError("the work was cancelled")


class Stream(Generic[Item, Result]):
    """Long work in steps: iterate over what happens, then take the result.

    ``result()`` runs what is left of the work. A stream is also a context manager, which closes
    it at the end of the block. Work whose stream is closed early stops at that step and has no
    result. ``yield from stream`` gives its result, as with a generator.

    Example::

        with magistral.stream("What is 48 + 76?") as stream:
            for segment in stream:
                show(segment)
        print(stream.result().usage)
    """

    def __init__(
        self, work: Generator[Item, None, Result], cancellation: Cancellation | None = None
    ) -> None:
        """Wrap a generator.

        Args:
            work: yields items and returns the result.
            cancellation: what the work itself looks at and honours. Without one, a cancelled
                stream raises CancelledError at its next step.
        """
        self._work = work
        self._cancellation = cancellation or Cancellation()
        self._is_cooperative = cancellation is not None
        self._results: list[Result] = []
        self._is_open = True

    @property
    def is_open(self) -> bool:
        """True until the work has ended, by itself or by ``close``."""
        return self._is_open

    def __iter__(self) -> "Stream[Item, Result]":
        return self

    def __repr__(self) -> str:
        ending = "with a result" if self._results else "without a result"
        return f"<{type(self).__name__}: {'open' if self._is_open else f'ended {ending}'}>"

    def __next__(self) -> Item:
        if not self._is_open:
            raise StopIteration(*self._results)
        if self._cancellation.is_requested and not self._is_cooperative:
            self.close()
            self._cancellation.check()
        try:
            return next(self._work)
        except StopIteration as end:
            self._results.append(end.value)
            self._is_open = False
            raise
        except BaseException:
            # Ctrl-C may come after the work's own step: then the work has not ended by itself.
            self.close()
            raise

    def __enter__(self) -> "Stream[Item, Result]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def result(self) -> Result:
        """Run the work to its end and return its result; later calls return that result again.

        Raises:
            CancelledError: the stream was closed or cancelled, or its work failed, before there
                was a result.
        """
        for _ in self:
            pass
        if not self._results:
            raise CancelledError("the stream ended early, so it has no result")
        return self._results[0]

    def then(self, finish: Callable[[Result], Other]) -> "Stream[Item, Other]":
        """Return a stream of the same items that ends in ``finish(result)``."""
        return FinishedStream(self, finish)

    def cancel(self) -> None:
        """Ask the work to end after the step under way. May be called from any thread."""
        self._cancellation.request()

    def close(self) -> None:
        """End the work now, at the step where it stands. Has no effect after its end."""
        self._is_open = False
        self._work.close()


class FinishedStream(Stream[Item, Other]):
    """A stream, and what becomes of its result.

    Attributes:
        before: the stream.
        finish: makes the new result of the old one.
    """

    def __init__(self, before: Stream[Item, Result], finish: Callable[[Result], Other]) -> None:
        def work() -> Generator[Item, None, Other]:
            # Not "yield from", which would close the other stream where this one is collected.
            for item in before:  # noqa: UP028
                yield item
            return finish(before.result())

        super().__init__(work(), before._cancellation)
        self.before: Stream[Item, Any] = before
        self.finish: Callable[[Any], Other] = finish

    def result(self) -> Other:
        try:
            # The other stream may have a faster way to its end than step by step.
            if self._is_open:
                self.before.result()
        except BaseException:
            self.close()
            raise
        return super().result()

    def cancel(self) -> None:
        self.before.cancel()

    def close(self) -> None:
        super().close()
        self.before.close()


def without_items(work: Callable[[], Result]) -> Stream[Any, Result]:
    """Return a stream that has no items, and the result of a call."""

    def steps() -> Generator[Any, None, Result]:
        yield from ()
        return work()

    return Stream(steps())


def streamed(work: Callable[P, Generator[Item, None, Result]]) -> Callable[P, Stream[Item, Result]]:
    """Make a generator function return a Stream."""

    @wraps(work)
    def stream(*args: P.args, **kwargs: P.kwargs) -> Stream[Item, Result]:
        return Stream(work(*args, **kwargs))

    return stream
