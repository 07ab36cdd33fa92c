"""Write a conversion into ``OUT.partial``, which is renamed to the target when complete.

Its journal lists the finished files, so that the same command resumes a conversion after any end.
"""

import errno
import fcntl
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from magistral_mlx.convert.output.journal import JOURNAL, journal_line, read_journal
from magistral_mlx.convert.output.manifest import first_difference
from magistral_mlx.errors import ConversionError, named
from magistral_mlx.files import (
    PARTIAL,
    append_to_file,
    discard,
    flush_folder,
    is_own_file,
    rename,
    write_file,
)

log = logging.getLogger(__name__)

FETCHED = "source"
CALIBRATION = "calibration"
TRACES = "traces"
# The errors of drives without locks, such as some network drives.
# A folder that vanishes this often is not deleted by other processes.
MAX_ATTEMPTS = 100
NO_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


class Staging:
    """The locked partial folder of a target, as a context manager; finished files outlive errors.

    Attributes:
        folder: the output files.
        fetched: files fetched from the hub.
        calibration: saved pass states.
        traces: replies of a model to calibrate on.
        awaits_publication: every file is finished, and only ``publish`` is missing.
        finished: the journal's entry of each finished file: ``size``, ``sha256``, and ``errors`` of
            its tensors.
    """

    def __init__(
        self,
        target: Path,
        record: Mapping[str, Any],
        *,
        is_complete: Callable[[Path], bool],
        stamps: Mapping[str, Sequence[int]] | None = None,
        force: bool = False,
    ) -> None:
        """Describe the folder; entering the block makes and locks it.

        Args:
            target: the folder to publish.
            record: the manifest's entries for source and options.
            is_complete: tells whether a folder is the complete result of this record.
            stamps: size and time of change of the source's files that no hash identifies.
            force: discard a partial folder of another record.
        """
        self.target, self.folder = target, partial_of(target)
        self.fetched, self.calibration = self.folder / FETCHED, self.folder / CALIBRATION
        self.traces = self.folder / TRACES
        self.awaits_publication, self._is_complete = False, is_complete
        self.finished: dict[str, dict[str, Any]] = {}
        self._record, self._force = {"plan": json.loads(json.dumps(record))}, force
        self._stamps = {file: list(stamp) for file, stamp in (stamps or {}).items()}
        self._journal = self.folder / JOURNAL
        self._writing = threading.Lock()
        self._made: list[Path] = []

    def __enter__(self) -> "Staging":
        """Make and lock the folder, and load its journal.

        Raises:
            ConversionError: another process or conversion uses the folder, or it holds other files.
        """
        self._made = [folder for folder in self.target.parents if not folder.exists()]
        self._descriptor = self._lock()
        try:
            self._load()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        kept = [
            path
            for folder in (self.fetched, self.calibration, self.traces)
            for path in folder.glob("*")
        ]
        if kind is not None and not self.finished and not kept:
            with suppress(OSError):
                discard(self.folder)
        self._leave()

    def _leave(self) -> None:
        """Unlock the folder; delete it and the parents made for it where empty."""
        for folder in (self.folder, *self._made):
            with suppress(OSError):
                folder.rmdir()
        os.close(self._descriptor)

    def record(self, file: str, entry: dict[str, Any]) -> None:
        """Record that a file is finished. Safe from any thread."""
        with self._writing:
            append_to_file(self._journal, journal_line({"file": file, **entry}))
            self.finished[file] = entry

    def forget(self, file: str) -> None:
        """Mark a file as unfinished, so that it is written again."""
        with self._writing:
            del self.finished[file]
            self._rewrite()

    def publish(self, *, replace: bool) -> None:
        """Rename the folder to the target; with ``replace``, delete the old target afterwards.

        Raises:
            FileExistsError: the target exists, and ``replace`` is False.
        """
        exists, aside = os.path.lexists(self.target), aside_of(self.target)
        if exists and not replace:
            raise FileExistsError(errno.EEXIST, "appeared meanwhile", str(self.target))
        discard(self.fetched)
        discard(self.calibration)
        discard(self.traces)
        discard(self._journal)
        flush_folder(self.folder)
        try:
            if exists:
                discard(aside)
                rename(self.target, aside)
            rename(self.folder, self.target)
        except BaseException:
            if exists and not os.path.lexists(self.target):
                os.rename(aside, self.target)
            raise
        discard_replaced(self.target)

    def _lock(self) -> int:
        """Make and lock the folder; return the descriptor that holds the lock."""
        for _ in range(MAX_ATTEMPTS):
            try:
                self.target.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileExistsError):
                    os.mkdir(self.folder)
            except FileNotFoundError:
                # Another process has failed, and deleted the parents that it made.
                continue
            try:
                descriptor = os.open(
                    self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                )
            except FileNotFoundError:  # another process has just finished with it
                continue
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                raise ConversionError(
                    f"{self.folder} is no folder; move it away, the target is made there"
                ) from None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise ConversionError(
                    f"another process is converting to {self.target}; wait until it is done, "
                    "or name another folder"
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    os.close(descriptor)
                    raise
                log.warning(
                    "%s cannot be locked on this drive; start no second conversion to it",
                    self.folder,
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.lstat(self.folder), os.fstat(descriptor)):
                    return descriptor
            os.close(descriptor)
        raise ConversionError(f"{self.folder} vanishes whenever it is made; name another folder")

    def _load(self) -> None:
        """Load the files finished by an earlier process for the same record; delete the rest."""
        lines = read_journal(self._journal)
        if not lines:
            if self._is_complete(self.folder):
                self.awaits_publication = True
                return
            if strangers := set(os.listdir(self.folder)) - {JOURNAL, JOURNAL + PARTIAL}:
                raise ConversionError(
                    f"{self.folder} holds {min(strangers)} and no {JOURNAL}; "
                    "move it away, or name another target"
                )
        elif (other := self._other_conversion(lines[0])) is not None:
            if not self._force:
                raise ConversionError(
                    f"{self.folder} holds an unfinished conversion {other}, or give it up with "
                    f"{named('force')} or by deleting the folder"
                )
            lines = []
        names = set(os.listdir(self.folder))
        for line in lines[1:]:
            file, size = line["file"], line["size"]
            if (
                file in names
                and is_own_file(self.folder / file)
                and (self.folder / file).stat().st_size == size
            ):
                self.finished[file] = {key: value for key, value in line.items() if key != "file"}
        kept = {JOURNAL} if is_own_file(self._journal) else set()
        kept |= {FETCHED} if _is_own_folder(self.fetched) else set()
        kept |= {
            folder.name
            for folder in (self.calibration, self.traces)
            if lines and _is_own_folder(folder)
        }
        for name in names - kept - set(self.finished):
            discard(self.folder / name)
        self._rewrite()

    def _other_conversion(self, begun: Mapping[str, Any]) -> str | None:
        """Say why what was begun cannot be finished here, and the way out; None if it can."""
        if (other := first_difference({"plan": begun["plan"]}, self._record)) is not None:
            return f"with another {other}; finish it with the command that began it"
        for file, stamp in self._stamps.items():
            if begun.get("stamps", {}).get(file, stamp) != stamp:
                return (
                    f"of a source whose {file} was changed since: what is finished may be of other "
                    "weights; put the old file back"
                )
        return None

    def _rewrite(self) -> None:
        files = ({"file": file, **entry} for file, entry in self.finished.items())
        write_file(
            self._journal,
            b"".join(map(journal_line, (self._record | {"stamps": self._stamps}, *files))),
        )


def partial_of(target: Path) -> Path:
    """Return the folder that a target is built in."""
    return target.with_name(f"{target.name}.partial")


def aside_of(target: Path) -> Path:
    """Return the temporary name of a target that is being replaced."""
    return target.with_name(f".{target.name}.replaced")


def discard_replaced(target: Path) -> None:
    """Delete the replaced folder, even if interrupted."""
    aside = aside_of(target)
    try:
        discard(aside)
    except BaseException:
        with suppress(OSError):
            discard(aside)
        if os.path.lexists(aside):
            log.warning(
                "%s, the replaced checkpoint, could not be deleted; delete it by hand", aside
            )
        raise


def begun_commit(target: Path, repo_id: str) -> str | None:
    """Return the commit of a hub id that an unfinished conversion to ``target`` uses."""
    lines = read_journal(partial_of(target) / JOURNAL)
    hub = lines[0]["plan"]["source"].get("hub") if lines else None
    if hub is None or hub["id"] != repo_id:
        return None
    log.info(
        "resuming with commit %s of %s, recorded in %s", hub["commit"], repo_id, partial_of(target)
    )
    return str(hub["commit"])


def _is_own_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
