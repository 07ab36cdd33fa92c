"""Check a conversion's target before any work."""

import fnmatch
import os
from contextlib import suppress
from pathlib import Path

from magistral_mlx.checkpoint.manifest import MANIFEST
from magistral_mlx.convert.output.journal import JOURNAL
from magistral_mlx.convert.output.staging import aside_of, partial_of
from magistral_mlx.disk_space import free_bytes
from magistral_mlx.errors import ConversionError, in_units


def check_place(target: Path) -> None:
    """Raise ConversionError if no folder can be made there, or it would be in a checkpoint."""
    if not target.name:
        raise ConversionError(f"{target} is the root folder; name another folder")
    try:
        str(target).encode()
    except UnicodeEncodeError:
        raise ConversionError(
            f"{str(target)!r} is not UTF-8, and not every runtime opens it; name another"
        ) from None
    for path in (target, partial_of(target), aside_of(target)):
        try:
            path.lstat()
        except FileNotFoundError:
            continue
        except OSError as error:  # too long, a loop of links, or under a file
            raise ConversionError(
                f"{target} cannot be made ({error.strerror}); name another folder"
            ) from None
    for folder in target.parents:
        if any(map(os.path.isfile, (folder / MANIFEST, folder / JOURNAL))):
            raise ConversionError(f"{target} lies in the checkpoint {folder}; name another folder")
    there = _nearest(target)
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConversionError(
            f"{target} cannot be made: {there} cannot be written to; name another folder"
        )


def check_replaceable(target: Path, *, force: bool) -> None:
    """Check that only a conversion, or with ``force`` a checkpoint, would be replaced.

    Raises:
        ConversionError: something else is there.
    """
    if not os.path.lexists(target) or (target / MANIFEST).is_file():
        return
    names = _names_in(target)
    if names is None and not os.path.lexists(target):
        return
    if not force:
        if names == []:
            raise ConversionError(
                f"{target} exists, empty; remove it: it is made when it is complete"
            )
        raise ConversionError(
            f"{target} exists and is not what would be made here; name another folder"
        )
    if names is None or (names and not _is_checkpoint(names)):
        raise ConversionError(
            f"{target} holds no checkpoint, so it is not replaced; name another folder"
        )


def check_apart(source: Path, target: Path) -> None:
    """Raise ConversionError if one folder is or contains the other."""
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ConversionError(
            f"{target} and the source {source} lie in one another; name another folder"
        )


def check_space(target: Path, needed_bytes: int) -> None:
    """Raise ConversionError unless the disk has ``needed_bytes`` free."""
    if needed_bytes > (free := free_bytes(target)):
        raise ConversionError(
            f"{target} needs {in_units(needed_bytes)} more, and {in_units(free)} are free; "
            "free some space, or name a folder on a larger disk"
        )


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files under a folder that another process may be changing."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(path, name)).st_size
    return total


def _names_in(folder: Path) -> list[str] | None:
    """List a folder; None if it is no folder, or was moved away by another process."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_checkpoint(names: list[str]) -> bool:
    return "config.json" in names and bool(fnmatch.filter(names, "model*.safetensors"))


def _nearest(target: Path) -> Path:
    return next(folder for folder in target.parents if folder.is_dir())
