"""Paths, the cache folder, and files that get their name when they are whole."""

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from magistral_mlx.errors import OptionError, quoted

WRITE_BYTES = 2**30  # a single write of 2 GiB or more fails on macOS
HASH_BYTES = 4 * 2**20
PARTIAL = ".partial"  # ends the name of a file that is not whole


def as_path(value: str | Path, name: str) -> Path:
    """Return ``value`` as a path; raise OptionError, which calls it ``name``, if it is none."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise OptionError(f"{name} is {quoted(value)}; use the path of a file or folder")
    return Path(value)


def cache_dir() -> Path:
    """Return the folder for converted demos and other files that can be made again.

    ``MAGISTRAL_MLX_CACHE`` if it is set, else ``~/Library/Caches/magistral-mlx`` on macOS, else
    ``magistral-mlx`` under ``XDG_CACHE_HOME`` or ``~/.cache``. The folder may not exist yet.
    Source: https://specifications.freedesktop.org/basedir-spec (ignore a relative XDG path).
    """
    if own := os.environ.get("MAGISTRAL_MLX_CACHE"):
        return Path(own).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "magistral-mlx"
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "magistral-mlx"


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """Open a new file that takes the place of ``path`` at the end of the block.

    Until then ``path`` is the old file, or no file, however the process ends. The new file keeps
    the old file's mode. If ``path`` is a symbolic link, the link's target is replaced. A process
    that dies in the block leaves ``.NAME.PID.partial`` behind, and the next call deletes it.

    Yields:
        The descriptor of the new file.

    Raises:
        OSError: ``path`` is not a plain file that may be written, or the disk is full or fails.
    """
    target, partial, mode = _begin(path)
    _discard_abandoned(target)
    with _renamed_when_whole(_create_locked(partial), partial, target) as descriptor:
        if mode is not None:
            os.fchmod(descriptor, mode)
        yield descriptor


def check_writable(path: Path) -> None:
    """Raise now the OSError that ``replacing`` would raise later, as far as that can be told."""
    target, partial, _ = _begin(path)
    # The name of the partial file is longer, and may be too long.
    with suppress(FileNotFoundError):
        os.lstat(partial)
    if not os.path.isdir(target.parent):
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {target.parent}")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{target.parent} may not be written to")


def write_file(path: Path, content: bytes) -> None:
    """Write a small file that gets its name when it is whole and on the drive.

    Unlike ``replacing``, never follows a link, and expects no other process in the folder.
    """
    partial = path.with_name(path.name + PARTIAL)
    with _renamed_when_whole(create_file(partial), partial, path) as descriptor:
        write_at(descriptor, memoryview(content), 0)


def create_file(path: Path) -> int:
    """Return the descriptor of a new empty file; first delete what has its name."""
    discard(path)
    return _create(path, os.O_RDWR)


def append_to_file(path: Path, content: bytes) -> None:
    """Add ``content`` to a file and return when it is on the drive."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        write_at(descriptor, memoryview(content), os.fstat(descriptor).st_size)
        flush(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of ``data`` (bytes) at the file's position."""
    while data:
        data = data[os.write(descriptor, data[:WRITE_BYTES]) :]


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` (bytes) at ``offset``."""
    while data:
        written = os.pwrite(descriptor, data[:WRITE_BYTES], offset)
        data, offset = data[written:], offset + written


def flush(descriptor: int) -> None:
    """Return when the content of a file or folder is on the drive.

    On macOS ``fsync`` leaves it in the drive's own cache, and F_FULLFSYNC does not.
    """
    if hasattr(fcntl, "F_FULLFSYNC"):
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:  # network and FAT file systems do not have it
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


def rename(old: Path, new: Path) -> None:
    """Give a file or folder another name in the same folder, and flush that folder."""
    os.rename(old, new)
    flush_folder(new.parent)


def discard(path: Path) -> None:
    """Delete a file, a link (not its target) or a whole folder, if it exists.

    Another process may be deleting it, too.
    """
    while os.path.lexists(path):
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(os.lstat(path).st_mode):
                shutil.rmtree(path)
            else:
                os.unlink(path)


def is_own_file(path: Path) -> bool:
    """Return whether ``path`` is a plain file that has no other name anywhere."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hex, and leave no copy of the file in memory.

    It is read in large pieces: hashlib's own loop takes the interpreter's lock so often that it
    slows down other threads.
    """
    digest, buffer, position = hashlib.sha256(), memoryview(bytearray(HASH_BYTES)), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            leave_file_cache(file.fileno(), position, count)
            position += count
    return digest.hexdigest()


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` for the block, after waiting for the process that holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        # Some network drives have no locks.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def leave_file_cache(descriptor: int, offset: int, nbytes: int) -> None:
    """Ask the system (Linux) to keep no copy of these bytes of a file in memory.

    For files that are read once: reusing a few pages is faster than making room for 47 GB.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


@contextmanager
def _renamed_when_whole(descriptor: int, partial: Path, target: Path) -> Iterator[int]:
    """Flush ``partial`` and rename it to ``target`` at the end of the block, or delete it."""
    try:
        yield descriptor
        flush(descriptor)
        rename(partial, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    finally:
        os.close(descriptor)


def _create(path: Path, access: int) -> int:
    return os.open(path, access | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _begin(path: Path) -> tuple[Path, Path, int | None]:
    """Return the file to replace, the partial file that replaces it, and the mode to keep."""
    target = Path(os.path.realpath(path))
    return target, target.with_name(f".{target.name}.{os.getpid()}{PARTIAL}"), _mode(target)


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


def _create_locked(partial: Path) -> int:
    """Create ``partial`` and lock it, so that no other process takes it for abandoned.

    Another process may delete it before it is locked. Then it is created again.
    """
    while True:
        descriptor = _create(partial, os.O_WRONLY)
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
        process = name.removeprefix(before).removesuffix(PARTIAL)
        if name == f"{before}{process}{PARTIAL}" and process.isdigit():
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
