"""Paths, the cache folder, and files that are whole and on the drive before they have their name."""

import errno
import fcntl
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from magistral_mlx.errors import OptionError, quoted

WRITE_BYTES = 2**30  # a single write of 2 GiB or more fails on macOS
PARTIAL = ".partial"  # ends the name of a file that is not whole


def as_path(value: str | Path, name: str) -> Path:
    """A path, as given. Raises OptionError where ``name`` is none."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise OptionError(f"{name} is {quoted(value)}; use the path of a file or folder")
    return Path(value)


def cache_dir() -> Path:
    """The folder for converted demos and other things that can be made again; it need not exist yet.

    ``MAGISTRAL_MLX_CACHE`` where it is set, else ``~/Library/Caches/magistral-mlx`` on macOS, else
    ``magistral-mlx`` under ``XDG_CACHE_HOME`` or ``~/.cache``.
    Source: https://specifications.freedesktop.org/basedir-spec (a relative XDG path is to be ignored).
    """
    if own := os.environ.get("MAGISTRAL_MLX_CACHE"):
        return Path(own).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "magistral-mlx"
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "magistral-mlx"


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A descriptor of a new file, which takes the place of ``path`` at the end of the block.

    Until it is whole and on the drive ``path`` is the old file, or none, however the process ends. The new file has the
    old one's mode; where ``path`` is a symbolic link, what it points to is replaced. A process that died while it
    did this leaves a ``.NAME.PID.partial``, which the next one deletes.

    Raises:
        OSError: ``path`` is not a plain file that may be written, or the disk is full, or fails.
    """
    target, partial, mode = _begun(path)
    _discard_abandoned(target)
    descriptor = os.open(
        partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
    )
    try:
        _lock(descriptor)
        if mode is not None:
            os.fchmod(descriptor, mode)
        yield descriptor
        flush(descriptor)
        os.rename(partial, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    finally:
        os.close(descriptor)
    flush_folder(target.parent)


def check_writable(path: Path) -> None:
    """Raises the OSError at once that ``replacing`` would raise after hours of work, where that can be told."""
    target, partial, _ = _begun(path)
    with suppress(FileNotFoundError):
        os.lstat(partial)  # its name is longer
    if not os.path.isdir(target.parent):
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {target.parent}")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{target.parent} may not be written to")


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of ``data`` (bytes) where the file's position is."""
    while data:
        data = data[os.write(descriptor, data[:WRITE_BYTES]) :]


def flush(descriptor: int) -> None:
    """Return when a file's or folder's content is on the drive itself, on macOS too, where fsync alone does not."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:  # network and FAT file systems know no such thing
            if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                raise
    os.fsync(descriptor)


def flush_folder(folder: Path) -> None:
    """Return when the names in ``folder`` are on the drive."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def _begun(path: Path) -> tuple[Path, Path, int | None]:
    """What is replaced, the file that is written in its place, and the mode it gets."""
    target = Path(os.path.realpath(path))
    return target, target.with_name(f".{target.name}.{os.getpid()}{PARTIAL}"), _mode(target)


def _mode(target: Path) -> int | None:
    """The mode of the file that will be replaced; None where there is none."""
    try:
        status = os.lstat(target)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no plain file")
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return stat.S_IMODE(status.st_mode)


def _discard_abandoned(target: Path) -> None:
    """Delete what was to become ``target`` and that no living process has locked."""
    before = f".{target.name}."
    for name in os.listdir(target.parent):
        if (
            name.startswith(before)
            and name.endswith(PARTIAL)
            and name[len(before) : -len(PARTIAL)].isdigit()
        ):
            _discard_unlocked(target.with_name(name))


def _discard_unlocked(partial: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(partial)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> None:
    with suppress(OSError):  # a file system without locks: then nothing abandoned is deleted either
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
