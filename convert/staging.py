"""A folder that appears complete or not at all."""

import errno
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from magistral_mlx.errors import ConversionError

from .provenance import PROVENANCE
from .writer import flush_path

log = logging.getLogger(__name__)


def check_replaceable(target: Path, *, force: bool) -> None:
    """Check, before any work, whether something is in the way.

    Raises:
        ConversionError: something that is no finished conversion; with ``force``, something that is no checkpoint.
    """
    if not os.path.lexists(target) or (target / PROVENANCE).is_file():
        return
    if not force:
        raise ConversionError(f"{target} exists and is not what would be made here; name another folder")
    is_checkpoint = (target / "config.json").is_file() and any(target.glob("model*.safetensors"))
    if not target.is_dir() or (any(target.iterdir()) and not is_checkpoint):
        raise ConversionError(f"{target} holds no checkpoint, so it is not replaced; name another folder")


def check_apart(source: Path, target: Path) -> None:
    """Raises ConversionError where one folder is the other or lies in it."""
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ConversionError(f"{target} and the source {source} lie in one another; name another folder")


def check_space(target: Path, needed_bytes: int) -> None:
    """Raises ConversionError where the disk has less free than ``needed_bytes``."""
    if needed_bytes > (free := free_bytes(target)):
        raise ConversionError(
            f"{target} needs {in_units(needed_bytes)}, and {in_units(free)} are free; free some "
            "space, or name a folder on a larger disk"
        )


def free_bytes(target: Path) -> int:
    """Free on the disk where ``target`` is or will be."""
    return shutil.disk_usage(next(folder for folder in target.parents if folder.is_dir())).free


def in_units(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**7 else f"{nbytes:,} bytes"


@contextmanager
def appearing(target: Path, *, replace: bool) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its name when the block ends well, and vanishes when it does not.

    Args:
        replace: whether an existing target is set aside immediately before, and deleted after.
    Raises:
        OSError: writing failed, or ``target`` exists by now and is not to be replaced.
    """
    made = [folder for folder in target.parents if not folder.exists()]
    token = secrets.token_hex(4)
    staging = target.with_name(f".{target.name}.partial-{token}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        for path in staging.iterdir():
            flush_path(path)
        flush_path(staging)
        if replace and os.path.lexists(target):
            _swap(staging, target, target.with_name(f".{target.name}.replaced-{token}"))
        elif os.path.lexists(target):  # rename would replace an empty folder
            raise FileExistsError(errno.EEXIST, "appeared meanwhile", str(target))
        else:
            staging.rename(target)
        flush_path(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # not empty, or never made
                folder.rmdir()
        raise


def _swap(staging: Path, target: Path, aside: Path) -> None:
    """Put ``staging`` in the place of ``target``; whatever happens between, one of the two is there after."""
    try:
        target.rename(aside)
        staging.rename(target)
    finally:
        if not os.path.lexists(target):
            aside.rename(target)
        elif os.path.lexists(aside):
            _discard(aside)


def _discard(old: Path) -> None:
    """Delete what was set aside; an interruption may end it late, but not half way."""
    if old.is_symlink() or old.is_file():
        old.unlink()
        return
    try:
        shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(old, ignore_errors=True)
        if old.exists():
            log.warning("%s is what was replaced, and could not be deleted; delete it by hand", old)
        raise
