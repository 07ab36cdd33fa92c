"""Ctrl-C while a command line still imports its modules: exit code 130 and no traceback.

The package imports this file first, and this file little. In every other program it does nothing.
"""

import os
import signal
import sys
from collections.abc import Sequence
from itertools import pairwise

INTERRUPTED = 130


def is_command(argv: Sequence[str], original: Sequence[str]) -> bool:
    """Return whether a process was started as one of this package's command lines.

    Args:
        argv: ``sys.argv``; Python puts "-m" first until it has found the module.
        original: ``sys.orig_argv``.
    """
    if list(argv[:1]) == ["-m"]:
        modules = [after for one, after in pairwise(original) if one == "-m"]
        return any(module.split(".")[0] == "magistral_mlx" for module in modules)
    return bool(argv) and os.path.basename(argv[0]) == "magistral"


def leave(_: int, __: object) -> None:
    """End the process at once: an exception inside a C++ module's import would abort it."""
    os._exit(INTERRUPTED)


def ready() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if (
    is_command(sys.argv, sys.orig_argv)
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, leave)
