"""Files that are replaced as a whole: the old file or the new one, whoever else replaces it."""

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from magistral_mlx.files import PARTIAL, create_new, discard, renamed_when_whole

NUMBER_DIGITS = 12


def accept(_: Path) -> None:
    """Accept any file to replace."""


@contextmanager
def replacing(
    path: Path, *, mode: int | None = None, check: Callable[[Path], None] = accept
) -> Iterator[int]:
    """Open a new file that takes the place of ``path`` at the end of the block.

    Until then ``path`` is the old file, or no file, however the process ends. If ``path`` is a
    symbolic link, the link's target is replaced. Any number of processes and threads may replace
    one file at a time: the last one wins. A process that dies in the block leaves
    ``.NAME.NUMBER.partial`` behind, and the next call deletes it.

    Args:
        path: the file to replace.
        mode: of the new file; by default the old file's.
        check: called with the file to replace before the block and once more before it is replaced,
            while no other process replaces it. What it raises leaves the old file.

    Yields:
        The descriptor of the new file.

    Raises:
        OSError: ``path`` is not a plain file that may be written, or the disk is full or fails.
    """
    target, partial, old_mode = _begin(path)
    with _alone(target, check):
        _discard_abandoned(target)
    new = _create_locked(partial, 0o666 if mode is None else mode)
    with renamed_when_whole(new, partial, target, _alone(target, check)) as descriptor:
        if mode is None and old_mode is not None:
            os.fchmod(descriptor, old_mode)
        yield descriptor


def check_writable(path: Path) -> None:
    """Raise now the OSError that ``replacing`` would raise later, as far as that can be told."""
    target, partial, _ = _begin(path)
    # The name of the partial file is longer, and may be too long.
    with suppress(FileNotFoundError):
        os.lstat(partial)
    if not os.path.isdir(target.parent):
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {target.parent}")
    if not os.access(target.parent, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{target.parent} may not be read and written to")


def _begin(path: Path) -> tuple[Path, Path, int | None]:
    """Return the file to replace, the partial file that replaces it, and the mode to keep."""
    target = Path(os.path.realpath(path))
    if not target.name:
        raise OSError(errno.EINVAL, "it is no plain file")
    number = f"{secrets.randbelow(10**NUMBER_DIGITS):0{NUMBER_DIGITS}}"
    return target, target.with_name(f".{target.name}.{number}{PARTIAL}"), _mode(target)


@contextmanager
def _alone(target: Path, check: Callable[[Path], None]) -> Iterator[None]:
    """Lock the target's folder for the block, after ``check`` accepts the file to replace."""
    descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Some network drives have no locks.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        check(target)
        yield
    finally:
        os.close(descriptor)


def _mode(target: Path) -> int | None:
    """Return the mode of the file to replace, or None if there is none."""
    try:
        status = os.lstat(target)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no plain file")
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return stat.S_IMODE(status.st_mode)


def _create_locked(partial: Path, mode: int) -> int:
    """Create ``partial`` and lock it, so that no other process takes it for abandoned.

    Another process may delete it before it is locked. Then it is created again.
    """
    while True:
        descriptor = create_new(partial, os.O_WRONLY, mode)
        # Only a process that is about to delete the file holds this lock, and not for long. A file
        # system without locks raises an error; then no process deletes anything.
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _has_name(descriptor, partial):
                return descriptor
        except BaseException:
            discard(partial)
            os.close(descriptor)
            raise
        os.close(descriptor)


def _discard_abandoned(target: Path) -> None:
    """Delete the partial files of ``target`` that no living process has locked."""
    before = f".{target.name}."
    for name in os.listdir(target.parent):
        number = name.removeprefix(before).removesuffix(PARTIAL)
        if name == f"{before}{number}{PARTIAL}" and number.isdigit():
            _discard_unlocked(target.with_name(name))


def _discard_unlocked(partial: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Since it was opened, the name may have gone to a newer file.
            if _has_name(descriptor, partial):
                os.unlink(partial)
        finally:
            os.close(descriptor)


def _has_name(descriptor: int, path: Path) -> bool:
    """Return whether ``path`` is the name of the open file."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    return False
