"""Matrix products and memory on the machine that calibrates."""

import ctypes
import sys

import mlx.core as mx
import numpy as np


def matmul(a: mx.array, b: mx.array) -> mx.array:
    """Multiply float32 ``[..., m, k]`` by ``[k, n]``; on a CPU at once, in NumPy.

    MLX's wheel for Linux has the reference BLAS: 4 GFLOP/s where NumPy took 65 on the same cores.
    """
    if mx.default_device().type != mx.DeviceType.cpu:
        return a @ b
    left, right = (np.array(x, copy=False) for x in (a, b))
    # Values that are not finite are refused, with the tensor's name, where they arrive.
    with np.errstate(all="ignore"):
        return mx.array((left.reshape(-1, left.shape[-1]) @ right).reshape(*left.shape[:-1], -1))


def trim_heap() -> None:
    """Return freed memory to the system; glibc keeps it, and it would add up layer by layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
