"""The C library's memory, between the steps of a pass."""

import ctypes
import sys


def give_back() -> None:
    """Return to the system what freed arrays left between those that stay: glibc keeps it, and it would add up from
    layer to layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
