"""Standard streams that are closed, full, or whose reader has gone."""

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Lenient(io.RawIOBase):
    """Standard error that drops what cannot be written: a message must never cost the answer."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = left.nbytes
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError:
                break
        return size


@contextmanager
def lenient_stderr() -> Iterator[None]:
    """Drop messages that the process's standard error cannot take, such as on a full disk."""
    before = sys.stderr
    if isinstance(before, io.TextIOWrapper) and _descriptor(before) == 2:
        sys.stderr = io.TextIOWrapper(
            _Lenient(2),
            before.encoding,
            "backslashreplace",
            line_buffering=True,
            write_through=True,
        )
    try:
        yield
    finally:
        sys.stderr = before


def open_closed_streams() -> None:
    """Open the null device for streams that a caller has closed (``>&-``).

    Otherwise the next open file would get their numbers, and ``print`` would fail.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(descriptor, "w" if number else "r"))


def discard_output() -> None:
    """Discard unwritten output, which Python would flush once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _descriptor(stream: io.TextIOWrapper) -> int:
    try:
        return stream.fileno()
    except OSError:
        return -1
