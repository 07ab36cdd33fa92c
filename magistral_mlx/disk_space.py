"""Free disk space, and the error that says there is none."""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error says that the disk, or the user's quota on it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def free_bytes(path: Path) -> int:
    """Return the bytes that are free on the disk of ``path``, which need not exist yet."""
    for folder in path.parents:
        # Another process may delete a folder that it made at any moment.
        with suppress(FileNotFoundError, NotADirectoryError):
            return shutil.disk_usage(folder).free
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
