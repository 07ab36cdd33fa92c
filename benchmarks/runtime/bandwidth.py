"""This machine's own bandwidth: bytes a second while a matrix that no cache holds is streamed through once."""

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.measure import Finding

ROWS = 4096
MATRIX_BYTES = {"cpu": 2**28, "gpu": 2**30}  # both are larger than any chip's caches
REPEATS = 9


def bandwidth(*, repeats: int = REPEATS, matrix_bytes: int | None = None) -> Finding:
    """Of a matrix times a vector, the fastest of ``repeats``.

    On a GPU through MLX in bf16; on a CPU through NumPy in float32, whose product keeps up with the memory, where
    MLX's does not.
    """
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    kind = "cpu" if on_cpu else "gpu"
    itemsize = 4 if on_cpu else 2
    columns = (matrix_bytes or MATRIX_BYTES[kind]) // (ROWS * itemsize)
    act = _numpy(columns) if on_cpu else _mlx(columns)
    act()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
    nbytes = ROWS * columns * itemsize
    facts: dict[str, Any] = {
        "matrix_bytes": nbytes,
        "by": "numpy, float32" if on_cpu else "mlx, bfloat16",
        "bytes_per_second": nbytes / min(seconds),
        "seconds": seconds,
    }
    return Finding("streaming matvec", facts)


def _numpy(columns: int) -> Callable[[], object]:
    matrix = np.ones((ROWS, columns), np.float32)
    vector = np.ones(columns, np.float32)
    return lambda: matrix @ vector


def _mlx(columns: int) -> Callable[[], object]:
    matrix = mx.ones((ROWS, columns), mx.bfloat16)
    vector = mx.ones((columns, 1), mx.bfloat16)
    mx.eval(matrix, vector)

    def act() -> None:
        mx.eval(matrix @ vector)

    return act
