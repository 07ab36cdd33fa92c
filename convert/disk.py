"""Every change the converter makes on disk: new files only, on the drive before anything says so, renamed when whole.

Nothing here follows a symbolic link at the name it is given.
"""

import hashlib
import os
import shutil
import stat
from pathlib import Path

from magistral_mlx.checkpoint.safetensors import leave_file_cache
from magistral_mlx.files import flush, flush_folder

WRITE_BYTES = 2**30  # a single write of 2 GiB or more fails on macOS
HASH_BYTES = 4 * 2**20
TEMPORARY = ".tmp"  # ends the name of a file that is not whole


def create(path: Path) -> int:
    """A descriptor of a new empty file; one left there by an interruption is removed first."""
    discard(path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def put(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` (bytes) at ``offset``."""
    while data:
        written = os.pwrite(descriptor, data[:WRITE_BYTES], offset)
        data, offset = data[written:], offset + written


def write_file(path: Path, content: bytes) -> None:
    """A small file that has its name only when it is whole and on the drive."""
    temporary = path.with_name(path.name + TEMPORARY)
    descriptor = create(temporary)
    try:
        put(descriptor, memoryview(content), 0)
        flush(descriptor)
    except BaseException:
        discard(temporary)
        raise
    finally:
        os.close(descriptor)
    rename(temporary, path)


def append(path: Path, content: bytes) -> None:
    """Add to a file; on return it is on the drive."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        put(descriptor, memoryview(content), os.fstat(descriptor).st_size)
        flush(descriptor)
    finally:
        os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Give a file or folder another name in the same folder, and flush that folder."""
    os.rename(old, new)
    flush_folder(new.parent)


def discard(path: Path) -> None:
    """Delete a file, a link (not what it points to) or a whole folder, if it is there."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def is_own_file(path: Path) -> bool:
    """Whether this is a plain file that has no other name anywhere."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex.

    In large pieces: hashlib's own loop asks for the interpreter so often that threads which need it slow it down.
    Files are hashed when they are done with.
    """
    digest, buffer, position = hashlib.sha256(), memoryview(bytearray(HASH_BYTES)), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            leave_file_cache(file.fileno(), position, count)
            position += count
    return digest.hexdigest()
