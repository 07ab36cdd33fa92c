"""Paths, the user's folders, small files, and what has to reach the drive."""

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from magistral_mlx.errors import OptionError, quoted

WRITE_BYTES = 2**30  # a single write of 2 GiB or more fails on macOS
HASH_BYTES = 4 * 2**20
NAME = "magistral-mlx"  # of our folders
PRIVATE = 0o600  # the mode of files with what a user or a model has said
PARTIAL = ".partial"  # ends the name of a file that is not whole


def as_path(value: str | Path, name: str) -> Path:
    """Return ``value`` as a path; raise OptionError, which calls it ``name``, if it is none."""
    if not isinstance(value, str | Path) or not _is_name(str(value)):
        raise OptionError(f"{name} is {quoted(value)}; use the path of a file or folder")
    return Path(value)


def expanded(path: Path) -> Path:
    """Return a path with its ``~`` or ``~user`` expanded; raise OptionError for an unknown one."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise OptionError(
            f"{path}: there is no home folder {path.parts[0]}; write the whole path, or ./{path}"
        ) from None


def cache_dir() -> Path:
    """Return the folder for converted demos and other files that can be made again.

    ``MAGISTRAL_MLX_CACHE`` if it is set, else ``~/Library/Caches/magistral-mlx`` on macOS, else
    ``magistral-mlx`` under ``XDG_CACHE_HOME`` or ``~/.cache``. The folder may not exist yet.
    """
    return _own_folder("CACHE", "Library/Caches", ".cache")


def state_dir() -> Path:
    """Return the folder for what is remembered: the typed lines of chats, the known models.

    ``MAGISTRAL_MLX_STATE`` if it is set, else ``~/Library/Application Support/magistral-mlx`` on
    macOS, else ``magistral-mlx`` under ``XDG_STATE_HOME`` or ``~/.local/state``. The folder may not
    exist yet.
    """
    return _own_folder("STATE", "Library/Application Support", ".local/state")


def settings_path() -> Path:
    """Return the path of the user's settings, on every platform.

    ``MAGISTRAL_CONFIG`` if it is set, else ``magistral-mlx/config.toml`` under ``XDG_CONFIG_HOME``
    or ``~/.config``. The file may not exist yet.
    """
    return _named_by("MAGISTRAL_CONFIG") or _xdg("CONFIG", ".config") / "config.toml"


def _own_folder(kind: str, on_mac: str, under_home: str) -> Path:
    if named := _named_by(f"MAGISTRAL_MLX_{kind}"):
        return named
    return Path.home() / on_mac / NAME if sys.platform == "darwin" else _xdg(kind, under_home)


def _named_by(variable: str) -> Path | None:
    own = os.environ.get(variable)
    return expanded(as_path(own, variable)).absolute() if own else None


def _xdg(kind: str, under_home: str) -> Path:
    # A relative path is ignored: https://specifications.freedesktop.org/basedir-spec
    xdg = Path(os.environ.get(f"XDG_{kind}_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / under_home) / NAME


def write_file(path: Path, content: bytes) -> None:
    """Write a small file that gets its name when it is whole and on the drive.

    Unlike ``replacing``, never follows a link, and expects no other process in the folder.
    """
    partial = path.with_name(path.name + PARTIAL)
    with renamed_when_whole(create_file(partial), partial, path) as descriptor:
        write_at(descriptor, memoryview(content), 0)


def create_file(path: Path) -> int:
    """Return the descriptor of a new empty file; first delete what has its name."""
    discard(path)
    return create_new(path, os.O_RDWR)


def append_to_file(path: Path, content: bytes) -> None:
    """Add ``content`` to a file and return when it is on the drive."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        write_all(descriptor, memoryview(content))
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
def renamed_when_whole(
    descriptor: int, partial: Path, target: Path, alone: AbstractContextManager[None] | None = None
) -> Iterator[int]:
    """Flush ``partial`` and rename it to ``target`` at the end of the block, or delete it.

    It is renamed in a block of ``alone``, if given.
    """
    try:
        yield descriptor
        flush(descriptor)
        with alone or nullcontext():
            rename(partial, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    finally:
        os.close(descriptor)


def _is_name(text: str) -> bool:
    """Return whether the system can have a file of this name; lone surrogates are no characters."""
    try:
        return bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def create_new(path: Path, access: int, mode: int = 0o666) -> int:
    """Create a file and return its descriptor; raise OSError if something has its name."""
    return os.open(path, access | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
