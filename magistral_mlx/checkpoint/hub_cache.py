"""The hub's own cache: fetch the files of a checkpoint, of one commit, and no others.

huggingface_hub keeps a file that arrived in part, and the next run resumes it.
"""

import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from magistral_mlx.checkpoint.hub_api import (
    BESIDE_THE_WEIGHTS,
    WEIGHTS,
    HubFile,
    Layout,
    Unreachable,
    explain,
    list_files,
    list_named,
)
from magistral_mlx.disk_space import free_bytes, is_disk_full
from magistral_mlx.errors import HubError, in_units

log = logging.getLogger(__name__)

# Marker file of a download in progress. The next run then checks the hash of every file.
UNCHECKED = "magistral-unchecked"
CHUNK_BYTES = 2**20


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    layout: Layout | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Return the folder in the hub's cache that holds a checkpoint; download what is missing.

    A complete commit in the cache needs no request. Without a network a complete cached copy is
    used. huggingface_hub shows the progress on stderr. Files that arrived whole are kept when a
    download ends early.

    Args:
        repo_id: ``org/name``.
        revision: branch, tag or commit; all files come from the commit that it means at the start.
        layout: the weights to fetch; by default the HF shards if there are any.
        check: called with the folder once it holds all but the weights, if weights are missing.

    Raises:
        HubError: there is no network and no cached copy, no such repository, no access to it, or no
            weights in it; the disk is too small; or a file arrived damaged.
    """
    from huggingface_hub import try_to_load_from_cache

    if (
        is_commit(revision)
        and (folder := _cached_commit(repo_id, str(revision), layout)) is not None
    ):
        return folder
    try:
        listing = list_files(repo_id, revision, layout)
    except Unreachable as error:
        return _offline(repo_id, revision, layout, error)
    unchecked, files = _cache_of(repo_id) / UNCHECKED, listing.files
    cached = {
        name: try_to_load_from_cache(repo_id, name, revision=listing.commit) for name in files
    }
    missing = [file for name, file in files.items() if not isinstance(cached[name], str)]
    folder = _cache_of(repo_id) / "snapshots" / listing.commit
    if missing or unchecked.exists():
        to_check = list(files.values()) if unchecked.exists() else missing
        _check_space(repo_id, missing)
        if check is not None and any(file.name in listing.weights for file in missing):
            folder = _download(repo_id, listing.commit, listing.documents)
            documents = [file for file in to_check if file.name in listing.documents]
            _refuse(_delete_damaged(folder, documents))
            check(folder)
        folder = _download(repo_id, listing.commit, files)
        _check(folder, to_check)
    _note(repo_id, revision, listing.commit)
    return folder


def fetch_files(repo_id: str, names: Sequence[str], *, most_bytes: int) -> Path:
    """Return the folder in the hub's cache that holds small files of a repository's main branch.

    The first of ``names`` must be there; others may be missing.

    Raises:
        HubError: it is not there, a file has over ``most_bytes``, or they cannot be fetched.
    """
    commit, files = list_named(repo_id, names)
    if names[0] not in files:
        raise HubError(f"{repo_id} holds no {names[0]}; name another repository or a folder")
    for file in files.values():
        if file.size > most_bytes:
            raise HubError(
                f"{repo_id}: {file.name} has {file.size} bytes, far too many for what it is; name "
                "another repository or a folder"
            )
    _check_space(repo_id, files.values())
    folder = _download(repo_id, commit, files, is_marked=False)
    _refuse(_delete_damaged(folder, files.values()))
    _note(repo_id, None, commit)
    return folder


def cached_files(repo_id: str, name: str) -> Path | None:
    """Return the folder in the hub's cache that holds a file of the main branch, if any."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo_id, name)
    except HFValidationError:  # the hub says why
        return None
    return Path(found).parent if isinstance(found, str) else None


def _download(repo_id: str, commit: str, names: Collection[str], *, is_marked: bool = True) -> Path:
    """Download files of a commit; ``is_marked`` leaves a mark until ``_check`` has seen them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    mark = _cache_of(repo_id) / UNCHECKED
    try:
        if is_marked:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        return Path(snapshot_download(repo_id, revision=commit, allow_patterns=list(names)))
    # hf_xet raises plain RuntimeErrors.
    except (HTTPError, OSError, RuntimeError) as error:
        raise _fetch_error(repo_id, commit, error) from None


def is_commit(revision: str | None) -> bool:
    """Return whether this names one commit forever, unlike a branch or tag."""
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def _cache_of(repo_id: str) -> Path:
    from huggingface_hub import constants

    return (
        Path(constants.HF_HUB_CACHE).expanduser().resolve()
        / f"models--{repo_id.replace('/', '--')}"
    )


def _check_space(repo_id: str, missing: Iterable[HubFile]) -> None:
    # Another commit may share a file.
    blobs = _cache_of(repo_id) / "blobs"
    needed = sum(file.size for file in missing if not (blobs / file.checksum).exists())
    free = free_bytes(blobs)
    if needed > free:
        raise HubError(
            f"{repo_id} needs {in_units(needed)} more under {blobs.parent.parent}, where "
            f"{in_units(free)} are free; free some space, or set HF_HUB_CACHE to a folder on a "
            "larger disk"
        )


def _check(folder: Path, files: Iterable[HubFile]) -> None:
    """Hash all files that arrived and delete damaged ones, then remove the mark."""
    damaged = _delete_damaged(folder, files)
    (folder.parent.parent / UNCHECKED).unlink(missing_ok=True)
    _refuse(damaged)


def _delete_damaged(folder: Path, files: Iterable[HubFile]) -> list[str]:
    """Hash files, delete damaged ones and name them; huggingface_hub compares only sizes."""
    damaged = []
    for file in files:
        blob, digest = (folder / file.name).resolve(), file.digest()
        with blob.open("rb") as data:
            while piece := data.read(CHUNK_BYTES):
                digest.update(piece)
        if digest.hexdigest() != file.checksum:
            (folder / file.name).unlink()
            blob.unlink(missing_ok=True)
            damaged.append(file.name)
    return damaged


def _refuse(damaged: Sequence[str]) -> None:
    if damaged:
        raise HubError(
            f"{', '.join(damaged)} arrived damaged (another hash than the hub states) and had to "
            "be deleted; run the same command again, the other files are kept"
        )


def _note(repo_id: str, revision: str | None, commit: str) -> None:
    """Note in the cache the commit of a branch or tag, as huggingface_hub does, for offline use."""
    from huggingface_hub import constants

    if is_commit(revision):
        return
    ref = _cache_of(repo_id) / "refs" / (revision or constants.DEFAULT_REVISION)
    # A shared cache may be read-only, and online nothing depends on this.
    with suppress(OSError):
        if not ref.is_file() or ref.read_text() != commit:
            ref.parent.mkdir(parents=True, exist_ok=True)
            fresh = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
            fresh.write_text(commit)
            fresh.replace(ref)


def _cached_commit(repo_id: str, commit: str, layout: Layout | None) -> Path | None:
    """Return the folder of a commit that the cache holds whole and checked, without a request."""
    cache = _cache_of(repo_id)
    files_of_commit = cache / "trees" / f"{commit}.json"
    if (cache / UNCHECKED).exists() or not files_of_commit.is_file():
        return None
    for choice in WEIGHTS if layout is None else (layout,):
        try:
            folder = _complete(repo_id, commit, choice)
        except OSError:
            return None
        if folder is not None:
            return folder
    return None


def _offline(repo_id: str, revision: str | None, layout: Layout | None, why: Unreachable) -> Path:
    """Return the complete copy in the hub's cache, when the hub cannot be reached."""
    for choice in WEIGHTS if layout is None else (layout,):
        try:
            folder = _complete(repo_id, revision, choice)
        except OSError:
            continue
        if folder is not None:
            if (folder.parent.parent / UNCHECKED).exists():
                _check(folder, _files_named_by_checksum(folder))
            log.warning("the hub cannot be reached; using the cached copy %s", folder)
            return folder
    raise HubError(f"{why}; no complete copy is cached")


def _complete(repo_id: str, revision: str | None, layout: Layout) -> Path | None:
    """Return the cached folder of a layout, or None if it has no weights.

    Raises:
        OSError: files are missing.
    """
    from huggingface_hub import snapshot_download

    patterns = [*BESIDE_THE_WEIGHTS, *WEIGHTS[layout]]
    folder = Path(
        snapshot_download(
            repo_id,
            revision=revision,
            local_files_only=True,
            allow_patterns=patterns,
            ignore_patterns="*/*",
        )
    )
    return folder if any(folder.glob(WEIGHTS[layout][0])) else None


def _files_named_by_checksum(folder: Path) -> Iterator[HubFile]:
    """Yield the cached files that the cache names by their checksum."""
    for link in folder.iterdir():
        blob = link.resolve()
        if re.fullmatch("[0-9a-f]{64}", blob.name):
            yield HubFile(link.name, blob.stat().st_size, blob.name, "")
        # A small file is named by its git hash, which has 40 digits like a commit.
        elif is_commit(blob.name):
            yield HubFile(link.name, blob.stat().st_size, None, blob.name)


def _fetch_error(repo_id: str, commit: str, error: Exception) -> HubError:
    from huggingface_hub import constants

    if is_disk_full(error):
        return HubError(
            f"{repo_id} does not fit: the disk of {constants.HF_HUB_CACHE} is full; free some "
            "space and run the command again; or name a folder that holds the checkpoint"
        )
    return explain(repo_id, commit, error, name="every file")
