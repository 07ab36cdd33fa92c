"""Matrix products of a calibration, on the device there is."""

import mlx.core as mx
import numpy as np


def product(a: mx.array, b: mx.array) -> mx.array:
    """``a @ b`` in float32, of ``[..., m, k]`` and ``[k, n]``; on a CPU computed now, and by NumPy.

    MLX's wheel for Linux comes with the reference BLAS, of 4 GFLOP/s where NumPy's took 65 on the same two cores.
    """
    if mx.default_device().type != mx.DeviceType.cpu:
        return a @ b
    left, right = (np.array(x, copy=False) for x in (a, b))
    with np.errstate(all="ignore"):  # what is not finite is found, and named, where it arrives
        return mx.array((left.reshape(-1, left.shape[-1]) @ right).reshape(*left.shape[:-1], -1))
