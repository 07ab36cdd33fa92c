"""The bandwidth of this machine: bytes a second while a matrix that no cache holds is read."""

import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from benchmarks.measure import Finding

ROWS = 4096
CPU_BYTES, GPU_BYTES = 2**28, 2**30  # both are larger than any chip's caches
REPEATS = 9


def bandwidth(*, repeats: int = REPEATS, matrix_bytes: int | None = None) -> Finding:
    """Multiply a matrix by a vector and take the fastest of ``repeats``.

    On a GPU by MLX in bf16. On a CPU by NumPy in float32, whose product keeps up with the memory;
    MLX's does not.
    """
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    itemsize = 4 if on_cpu else 2
    nbytes = matrix_bytes or (CPU_BYTES if on_cpu else GPU_BYTES)
    columns = nbytes // (ROWS * itemsize)
    multiply = _by_numpy(columns) if on_cpu else _by_mlx(columns)
    multiply()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - began)
    nbytes = ROWS * columns * itemsize
    return Finding(
        "streaming matvec",
        {
            "matrix_bytes": nbytes,
            "by": "numpy, float32" if on_cpu else "mlx, bfloat16",
            "bytes_per_second": nbytes / min(seconds),
            "seconds": seconds,
        },
    )


def _by_numpy(columns: int) -> Callable[[], object]:
    matrix, vector = np.ones((ROWS, columns), np.float32), np.ones(columns, np.float32)
    return lambda: matrix @ vector


def _by_mlx(columns: int) -> Callable[[], object]:
    matrix, vector = mx.ones((ROWS, columns), mx.bfloat16), mx.ones((columns, 1), mx.bfloat16)
    mx.eval(matrix, vector)
    return lambda: mx.eval(matrix @ vector)
