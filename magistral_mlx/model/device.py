"""Memory of the device: what may be used, and the limits that hold MLX to it."""

import logging
import os

import mlx.core as mx

from magistral_mlx.errors import MemoryLimitError, OptionError, in_units, named

log = logging.getLogger(__name__)

# Of the machine's memory, which other programs use too; MLX's own limit on a CPU.
CPU_SHARE = 0.8
# Where C++ looks for the temporary folder, in this order.
TEMPORARY = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")


def on_gpu() -> bool:
    return mx.default_device().type == mx.DeviceType.gpu


def budget_bytes(memory_gb: float | None = None) -> int:
    """Return the bytes that may be used.

    That is ``memory_gb`` (10^9 bytes) if given, else a GPU's recommended working set, or 0.8 of all
    memory.

    Raises:
        MemoryLimitError: the device does not tell.
    """
    if memory_gb is not None:
        return int(memory_gb * 1e9)
    if on_gpu():
        info = mx.device_info()
        # The first name is Metal's, the others are of other backends of MLX.
        for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            if key in info:
                return int(info[key])
        raise MemoryLimitError(
            f"this device does not tell how much memory it has; say it with {named('memory_gb')}"
        )
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * CPU_SHARE)


def check_temporary_folder() -> None:
    """Check the folder into which MLX writes the kernels that it compiles for a CPU.

    Raises:
        OptionError: it is missing, or may not be written to.
    """
    name = next((name for name in TEMPORARY if name in os.environ), None)
    folder = "/tmp" if name is None else os.environ[name]
    if on_gpu() or (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        return
    called = f"the temporary folder {folder}" if name is None else f"{name} is {folder!r}, which"
    raise OptionError(
        f"{called} is no folder that may be written to, and MLX compiles its CPU kernels there; "
        "set TMPDIR to one"
    )


def limit_memory(budget: int, *, freed: int, wired: int | None) -> None:
    """Set MLX's memory limits for the whole process, until the next load.

    Over the budget MLX waits for running work before it allocates. The wired limit is set only on
    request: setting it at every call is implicated in kernel panics of macOS
    (https://github.com/ml-explore/mlx/issues/3186).

    Args:
        budget: bytes in all.
        freed: bytes of freed buffers to keep for the next pass.
        wired: bytes to keep in a Mac's memory even if other programs want it; None for none.

    Raises:
        OptionError: this device has no wired limit, or a lower one.
    """
    if wired is not None:
        if not mx.metal.is_available():
            raise OptionError(
                f"memory can be wired on a Mac's GPU only; leave {named('wired', True)} out"
            )
        log.warning(
            "wiring %s; if this Mac restarts by itself, do not ask for that: "
            "setting that limit is implicated in kernel panics of macOS (mlx issue 3186)",
            in_units(wired),
        )
        try:
            mx.set_wired_limit(wired)
        except ValueError as error:
            raise OptionError(
                f"{in_units(wired)} cannot be wired on this Mac ({error}); leave "
                f"{named('wired', True)} out, or plan for less by {named('memory_gb')}"
            ) from None
    mx.set_memory_limit(budget)
    mx.set_cache_limit(freed)
