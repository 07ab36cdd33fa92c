"""Streams: items, then one result; closing, failing and cancelling, from this thread or another."""

import threading
from collections.abc import Generator

import pytest

from magistral_mlx.errors import CancelledError
from magistral_mlx.streams import Cancellation, Stream, streamed


def counting(
    cancellation: Cancellation | None = None, ended: list[str] | None = None
) -> Generator[int, None, str]:
    """Yield 0 to 4 and return what was yielded; stop early if cancelled."""
    seen = ""
    try:
        for number in range(5):
            if cancellation is not None and cancellation.is_requested:
                return f"{seen} cancelled"
            seen += str(number)
            yield number
        return seen
    finally:
        if ended is not None:
            ended.append(seen)


def failing() -> Generator[int, None, str]:
    yield 0
    raise KeyError("work")


def cancel_elsewhere(stream: Stream[int, str]) -> None:
    thread = threading.Thread(target=stream.cancel)
    thread.start()
    thread.join()


def test_the_items_come_first_and_then_the_result() -> None:
    stream = Stream(counting())
    assert list(stream) == [0, 1, 2, 3, 4]
    assert stream.result() == stream.result() == "01234"
    assert list(stream) == []


@pytest.mark.parametrize("read", range(6))
def test_the_result_runs_what_is_left_of_the_work(read: int) -> None:
    stream = Stream(counting())
    assert [number for _, number in zip(range(read), stream, strict=False)] == [
        *range(min(read, 5))
    ]
    assert stream.result() == "01234"


@pytest.mark.parametrize("read", range(3))
def test_a_stream_closed_early_ends_its_work_there_and_has_no_result(read: int) -> None:
    ended: list[str] = []
    stream = Stream(counting(ended=ended))
    for _ in range(read):
        next(stream)
    stream.close()
    assert ended == (["0", "01"][read - 1 : read] if read else [])
    assert list(stream) == []
    with pytest.raises(CancelledError, match="ended early"):
        stream.result()


def test_closing_after_the_end_keeps_the_result() -> None:
    stream = Stream(counting())
    assert stream.result() == "01234"
    stream.close()
    stream.cancel()
    assert stream.result() == "01234"


def test_a_context_manager_closes_the_stream() -> None:
    ended: list[str] = []
    with Stream(counting(ended=ended)) as stream:
        assert next(stream) == 0
    assert ended == ["0"]
    with Stream(counting()) as whole:
        assert list(whole) == [0, 1, 2, 3, 4]
    assert whole.result() == "01234"


def test_an_error_of_the_work_comes_out_once_and_leaves_no_result() -> None:
    stream = Stream(failing())
    assert next(stream) == 0
    with pytest.raises(KeyError, match="work"):
        next(stream)
    assert list(stream) == []
    with pytest.raises(CancelledError):
        stream.result()
    with pytest.raises(KeyError, match="work"):
        Stream(failing()).result()


@pytest.mark.parametrize("read", range(5))
def test_work_that_looks_at_its_cancellation_ends_with_a_result(read: int) -> None:
    cancellation = Cancellation()
    stream = Stream(counting(cancellation), cancellation)
    for _ in range(read):
        next(stream)
    cancel_elsewhere(stream)
    assert list(stream) == []
    assert stream.result() == ("01234"[:read] + " cancelled" if read < 5 else "01234")


@pytest.mark.parametrize("read", range(5))
def test_other_work_is_closed_when_it_is_cancelled(read: int) -> None:
    ended: list[str] = []
    stream = Stream(counting(ended=ended))
    for _ in range(read):
        next(stream)
    cancel_elsewhere(stream)
    with pytest.raises(CancelledError, match="cancelled"):
        next(stream)
    assert ended == (["01234"[:read]] if read else [])
    assert list(stream) == []
    with pytest.raises(CancelledError):
        stream.result()


def test_a_generator_takes_the_result_by_yield_from() -> None:
    @streamed
    def outer() -> Generator[int, None, str]:
        first = yield from Stream(counting())
        second = yield from Stream(counting())
        return first + second

    stream = outer()
    assert list(stream) == [0, 1, 2, 3, 4] * 2
    assert stream.result() == "01234" * 2


def test_closing_an_outer_stream_closes_the_inner_one() -> None:
    ended: list[str] = []
    stream = Stream(counting(ended=ended)).then(len)
    assert next(stream) == 0
    stream.close()
    assert ended == ["0"]


@pytest.mark.parametrize("is_cooperative", [True, False])
def test_a_stream_with_a_last_step_shares_items_and_cancellation(is_cooperative: bool) -> None:
    assert Stream(counting()).then(len).result() == 5
    cancellation = Cancellation() if is_cooperative else None
    stream = Stream(counting(cancellation), cancellation).then(len)
    assert next(stream) == 0
    stream.cancel()
    if is_cooperative:
        assert stream.result() == len("0 cancelled")
    else:
        with pytest.raises(CancelledError, match="the work was cancelled"):
            stream.result()


def test_a_streamed_function_keeps_its_name_and_starts_no_work() -> None:
    begun: list[int] = []

    @streamed
    def work(start: int) -> Generator[int, None, int]:
        begun.append(start)
        yield start
        return start + 1

    stream = work(3)
    assert (work.__name__, begun) == ("work", [])
    assert (list(stream), stream.result(), begun) == ([3], 4, [3])


def test_an_interruption_after_the_work_s_step_ends_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(work: Generator[int, None, str]) -> int:
        work.__next__()
        raise KeyboardInterrupt

    ended: list[str] = []
    stream = Stream(counting(ended=ended))
    monkeypatch.setattr("magistral_mlx.streams.next", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert ended == ["0"]


def test_what_follows_a_closed_stream_has_no_result() -> None:
    stream = Stream(counting())
    length = stream.then(len)
    stream.close()
    with pytest.raises(CancelledError):
        length.result()
