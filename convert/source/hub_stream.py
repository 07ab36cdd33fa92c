"""Fetch a hub checkpoint's weight files one by one, each deleted after its use."""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from magistral_mlx.checkpoint.documents import parse_json
from magistral_mlx.checkpoint.hub_api import TEKKEN_FILE, HubFile, Layout, Listing, list_files
from magistral_mlx.checkpoint.hub_transfer import Cancelled, fetch_header, read
from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.checkpoint.safetensors_header import INDEX
from magistral_mlx.errors import ConversionError, HubError, named, quoted
from magistral_mlx.files import (
    create_file,
    discard,
    flush,
    is_own_file,
    rename,
    write_at,
    write_file,
)

log = logging.getLogger(__name__)

# Suffix of an incomplete file.
INCOMPLETE = ".incomplete"
# Made from tekken.json, or compared with it where that comes from elsewhere.
NOT_NEEDED = frozenset({"tokenizer.json"})
# tekken.json has 19 MB.
MAX_DOCUMENT_BYTES = 200_000_000
CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class HubStream:
    """One commit of a repository, fetched into its own folder without the hub's cache.

    Attributes:
        files: the weight files by name; each exists only between ``fetch`` and ``release``.
        shards: their headers.
    """

    repo_id: str
    commit: str
    layout: Layout
    folder: Path
    files: Mapping[str, HubFile]
    shards: tuple[Shard, ...]

    @classmethod
    def open(
        cls, repo_id: str, folder: Path, *, revision: str | None, layout: Layout | None
    ) -> "HubStream":
        """Fetch all documents and weight headers, enough to plan the conversion.

        Args:
            repo_id: ``org/name``.
            folder: made if missing. Documents of this commit in it are used, other files deleted.
            revision: branch, tag or commit. All files come from the one commit it names now.
            layout: of the weights; None prefers HF shards.

        Raises:
            HubError: the hub cannot be reached or refuses, or the repository lacks files.
            CheckpointError: a header or the index contradicts itself.
            ConversionError: ``folder`` cannot be written.
        """
        listing = list_files(repo_id, revision, layout)
        documents = {
            name: file
            for name, file in listing.documents.items()
            if name not in NOT_NEEDED or TEKKEN_FILE not in listing.documents
        }
        try:
            _make_own(
                folder,
                {*documents, *listing.weights, *(name + INCOMPLETE for name in listing.weights)},
            )
            for file in documents.values():
                _fetch_document(repo_id, listing.commit, file, folder)
        except OSError as error:
            raise ConversionError(
                f"{folder} could not be written ({error}); check the folder and the disk, then run "
                "the command again"
            ) from None
        _check_index(repo_id, listing, folder)
        shards = tuple(
            fetch_header(repo_id, listing.commit, file, folder) for file in listing.weights.values()
        )
        return cls(repo_id, listing.commit, listing.layout, folder, listing.weights, shards)

    def into(self, folder: Path) -> "HubStream":
        """Return the same stream with another folder, made or cleared of other files."""
        _make_own(folder, {*self.files, *(name + INCOMPLETE for name in self.files)})
        shards = tuple(replace(shard, path=folder / shard.path.name) for shard in self.shards)
        return replace(self, folder=folder, shards=shards)

    def fetch(
        self, name: str, *, report: Callable[[int], None], cancelled: Callable[[], bool]
    ) -> Path:
        """Fetch a weight file, resuming a partial one, and check its hash and header.

        Safe from several threads for different files. Bytes that arrived stay after an error.

        Args:
            name: of the file.
            report: called with the bytes that arrived since its last call, those of an earlier
                process included; negative if they were damaged.
            cancelled: called often; True ends the fetch.

        Raises:
            HubError: the file cannot be fetched, or arrived damaged.
            Cancelled: ``cancelled`` returned True.
            CheckpointError: the safetensors library refuses the file.
            OSError: the disk is full or fails.
        """
        file, path = self.files[name], self.folder / name
        partial = path.with_name(name + INCOMPLETE)
        if is_own_file(path):
            # A finished file of an earlier process is checked like a partial one.
            rename(path, partial)
        planned = next(shard for shard in self.shards if shard.path == path)
        while True:
            found, kept = self._receive(file, planned, partial, report=report, cancelled=cancelled)
            if found == file.checksum:
                break
            discard(partial)
            report(-file.size)
            if not kept:
                raise HubError(
                    f"{self.repo_id}: {name} arrived damaged (hash {found[:12]}, expected "
                    f"{file.checksum[:12]}) and was deleted; run the same command again, the other "
                    "files are kept"
                )
            log.warning(
                "%s: the part that an earlier run left is damaged; it is fetched again", partial
            )
        if Shard.open(partial).header_sha256 != planned.header_sha256:
            raise HubError(
                f"{self.repo_id}: the header of {name} has changed since it was first fetched; "
                "run the same command again"
            )
        rename(partial, path)
        return path

    def release(self, name: str) -> None:
        discard(self.folder / name)

    def peak_bytes(self, order: Sequence[Sequence[str]]) -> int:
        """Return the most bytes of weight files that are on the disk at once.

        ``order`` holds the stored names of the tensors that each step reads. A file is released
        after its last use, and the next one is fetched meanwhile.
        """
        home = {tensor: shard.path.name for shard in self.shards for tensor in shard.header}
        steps = [list(dict.fromkeys(home[tensor] for tensor in tensors)) for tensors in order]
        arrivals = list(dict.fromkeys(name for names in steps for name in names))
        last_use = {name: step for step, names in enumerate(steps) for name in names}
        arrived, peak = 0, 0
        for step, names in enumerate(steps):
            arrived = max([arrived, *(arrivals.index(name) + 2 for name in names)])
            there = [name for name in arrivals[:arrived] if last_use[name] >= step]
            peak = max(peak, sum(self.files[name].size for name in there))
        return peak

    def _receive(
        self,
        file: HubFile,
        planned: Shard,
        partial: Path,
        *,
        report: Callable[[int], None],
        cancelled: Callable[[], bool],
    ) -> tuple[str, int]:
        """Complete a partial file; return its hash and the number of bytes that it had."""
        descriptor, kept = _reopen(partial, file, planned)
        try:
            digest, position = file.digest(), kept
            for begin in range(0, kept, CHUNK_BYTES):
                if cancelled():
                    raise Cancelled
                digest.update(os.pread(descriptor, min(CHUNK_BYTES, kept - begin), begin))
            report(kept)
            rest = read(self.repo_id, self.commit, file, kept, file.size, cancelled=cancelled)
            with closing(rest):
                for piece in rest:
                    write_at(descriptor, memoryview(piece), position)
                    digest.update(piece)
                    position += len(piece)
                    report(len(piece))
            flush(descriptor)
        finally:
            os.close(descriptor)
        return digest.hexdigest(), kept


def _make_own(folder: Path, names: set[str]) -> None:
    """Make a folder, and delete everything in it except ``names``."""
    if folder.is_symlink():
        raise ConversionError(
            f"{folder} is a link, and fetched files would go to its target; delete it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in set(os.listdir(folder)) - names:
        discard(folder / name)


def _fetch_document(repo_id: str, commit: str, file: HubFile, folder: Path) -> None:
    path = folder / file.name
    if file.size > MAX_DOCUMENT_BYTES:
        raise HubError(
            f"{repo_id}: {file.name} has {file.size} bytes, far too many for such a file; name "
            "another repository"
        )
    if (
        is_own_file(path)
        and path.stat().st_size == file.size
        and _hash(file, path.read_bytes()) == file.checksum
    ):
        return
    content = b"".join(read(repo_id, commit, file, 0, file.size))
    if _hash(file, content) != file.checksum:
        raise HubError(f"{repo_id}: {file.name} arrived damaged; run the same command again")
    discard(path)
    write_file(path, content)


def _hash(file: HubFile, content: bytes) -> str:
    digest = file.digest()
    digest.update(content)
    return digest.hexdigest()


def _check_index(repo_id: str, listing: Listing, folder: Path) -> None:
    """Raise HubError if the commit lacks a file that the index names."""
    if INDEX not in listing.documents:
        return
    weight_map = parse_json((folder / INDEX).read_bytes(), folder / INDEX).get("weight_map")
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    if missing := [
        name for name in files if not isinstance(name, str) or name not in listing.weights
    ]:
        raise HubError(
            f"{repo_id}: {INDEX} names {quoted(missing[0])}, which commit {listing.commit} does "
            "not hold; the repository is incomplete, name another commit with "
            f"{named('revision')}"
        )


def _reopen(partial: Path, file: HubFile, planned: Shard) -> tuple[int, int]:
    """Open a partial file, emptied if of other weights; return descriptor and bytes to keep."""
    if is_own_file(partial):
        descriptor = os.open(partial, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        kept, head = os.fstat(descriptor).st_size, os.pread(descriptor, planned.data_start, 0)
        is_other = (
            len(head) == planned.data_start
            and hashlib.sha256(head).hexdigest() != planned.header_sha256
        )
        if kept <= file.size and not is_other:
            return descriptor, kept
        os.close(descriptor)
    return create_file(partial), 0
