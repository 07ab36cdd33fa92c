"""Streams for ``async`` code: a task that waits for a step leaves the event loop free."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from magistral_mlx.engine.worker_stream import WorkerStream
from magistral_mlx.streams import FinishedStream, Stream

Item = TypeVar("Item")
Result = TypeVar("Result")


class AsyncStream(Generic[Item, Result]):
    """A stream for ``async for``, with a result at its end.

    A task that is cancelled while it waits cancels the reply. Close a stream that is not read to
    its end, or use ``async with``; one that is dropped closes itself.

    Example::

        async with magistral.astream("What is 48 + 76?") as stream:
            async for segment in stream:
                show(segment)
        print((await stream.result()).usage)
    """

    def __init__(self, stream: Stream[Item, Result]) -> None:
        """Take over a stream that nobody has begun."""
        self._finishing: list[Callable[[Any], Any]] = []
        source: Stream[Item, Any] = stream
        while isinstance(source, FinishedStream):
            self._finishing.insert(0, source.finish)
            source = source.before
        assert isinstance(source, WorkerStream)
        self._stream: WorkerStream[Item, Any] = source
        self._results: list[Result] = []

    def __aiter__(self) -> "AsyncStream[Item, Result]":
        return self

    async def __anext__(self) -> Item:
        if self._stream.is_open:
            for item in await self._wait(self._stream.pull):
                return item
            # The worker has nothing left to do, so this does not wait.
            self._finish(await self._wait(self._stream.drain))
        raise StopAsyncIteration

    async def result(self) -> Result:
        """Do what is left of the work and return its result; later calls return it again.

        Raises:
            CancelledError: the stream was closed, or its work failed, before there was a result.
        """
        if self._stream.is_open:
            self._finish(await self._wait(self._stream.drain))
        # Raises if the stream was closed.
        return self._results[0] if self._results else self._stream.result()

    def cancel(self) -> None:
        """Ask the work to end after the step under way. May be called from any thread."""
        self._stream.cancel()

    async def aclose(self) -> None:
        """End the work at the step where it stands. Has no effect after its end."""
        # The import takes a tenth of a second, which callers that are not async need not wait for.
        import asyncio

        if self._stream.is_open and (closing := self._stream.leave()):
            await asyncio.wrap_future(closing)

    async def __aenter__(self) -> "AsyncStream[Item, Result]":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _finish(self, result: Any) -> None:
        result = self._stream.take_result(result)
        for finish in self._finishing:
            result = finish(result)
        self._results.append(result)

    async def _wait(self, start: Callable[[], "Future[Any]"]) -> Any:
        """Wait for the turn and for what ``start`` gives to the worker."""
        import asyncio

        try:
            await asyncio.wrap_future(self._stream.begin())
            return await asyncio.wrap_future(start())
        except BaseException:
            # The task was cancelled, or the work has failed; closing it once more does nothing.
            self._stream.cancel()
            self._stream.leave()
            raise
