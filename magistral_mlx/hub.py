"""Fetching a checkpoint from the Hugging Face hub: the files needed, of one commit, and no others."""

import errno
import hashlib
import logging
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from magistral_mlx.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

log = logging.getLogger(__name__)

Layout = Literal["hf", "consolidated"]

BESIDE_THE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "params.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "SYSTEM_PROMPT.txt",
    "*.jinja",
    "magistral_mlx.json",
)
# In this order of preference: the published repository has both, 47 GB each.
WEIGHTS: dict[Layout, tuple[str, ...]] = {
    "hf": ("model*.safetensors", "model.safetensors.index.json"),
    "consolidated": ("consolidated*.safetensors",),
}
TIMEOUT_SECONDS = 10.0


def fetch(repo_id: str, *, revision: str | None = None, layout: Layout | None = None) -> Path:
    """The folder of the hub's own cache that holds a repository's checkpoint; downloads what it lacks.

    Without a network a complete cached copy is used. Progress is huggingface_hub's own, on stderr; files
    that arrived whole are kept when a download ends early.

    Args:
        repo_id: ``org/name``.
        revision: branch, tag or commit; all files come from the one commit it stands for now.
        layout: which weights to fetch; by default the HF shards where there are any.
    Raises:
        HubError: no network and no cached copy; no such repository, or no access to it; no weights in it;
            the disk is too small; a file arrived damaged.
    """
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]

    try:
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} cannot be a hub id ({error}); use org/name, or name a folder") from None
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise _explain(repo_id, revision, error) from None
        return _cached(repo_id, revision, layout, error)
    except (HTTPError, OSError) as error:  # the HTTP library's own; offline mode is an OSError
        return _cached(repo_id, revision, layout, error)

    files = _needed(repo_id, info.siblings or [], layout)
    cached = {file.rfilename: try_to_load_from_cache(repo_id, file.rfilename, revision=info.sha) for file in files}
    missing = [file for file in files if not isinstance(cached[file.rfilename], str)]
    if not missing:
        return Path(str(cached[files[0].rfilename])).parent
    _check_space(repo_id, missing)
    try:
        # By branch, not by commit: so the hub's cache notes what the branch stands for, and finds it offline.
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[f.rfilename for f in files]))
    except (HTTPError, OSError, RuntimeError) as error:  # hf_xet raises plain RuntimeErrors
        raise _explain(repo_id, revision, error) from None
    if folder.name != info.sha:
        raise HubError(f"{repo_id} changed while it was being fetched; run the same command again")
    _verify(folder, missing)
    return folder


def _needed(repo_id: str, siblings: Sequence["RepoSibling"], layout: Layout | None) -> list["RepoSibling"]:
    """The files to fetch; all lie at the top of the repository."""

    def matching(patterns: Sequence[str]) -> list["RepoSibling"]:
        top = [file for file in siblings if "/" not in file.rfilename]
        return [file for file in top if any(fnmatchcase(file.rfilename, pattern) for pattern in patterns)]

    for choice in WEIGHTS if layout is None else (layout,):
        weights = matching(WEIGHTS[choice])
        if any(file.rfilename.endswith(".safetensors") for file in weights):
            return matching(BESIDE_THE_WEIGHTS) + weights
    if layout == "hf" and matching(WEIGHTS["consolidated"]):
        raise HubError(
            f"{repo_id} holds only Mistral's own layout; convert it first: "
            f"python -m magistral_mlx.convert --hf-path {repo_id} --mlx-path OUT"
        )
    wanted = " or ".join(WEIGHTS[choice][0] for choice in (WEIGHTS if layout is None else (layout,)))
    raise HubError(
        f"{repo_id} holds no {wanted}; it is not a checkpoint this software can use: name one in safetensors, "
        "such as the published Magistral or a conversion of it to MLX"
    )


def _check_space(repo_id: str, missing: Sequence["RepoSibling"]) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).absolute()
    blobs = cache / f"models--{repo_id.replace('/', '--')}" / "blobs"  # another commit may share a file
    needed = sum(f.size or 0 for f in missing if not (blobs / (f.lfs.sha256 if f.lfs else f.blob_id or "-")).exists())
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if needed > free:
        raise HubError(
            f"{repo_id} needs {needed / 1e9:.1f} GB more under {cache}, where {free / 1e9:.1f} GB are free; "
            "free some space, or set HF_HUB_CACHE to a folder on a larger disk"
        )


def _verify(folder: Path, downloaded: Sequence["RepoSibling"]) -> None:
    """Hash what arrived: huggingface_hub itself compares no more than sizes."""
    for file in downloaded:
        if file.lfs is None:
            continue
        blob = (folder / file.rfilename).resolve()
        with blob.open("rb") as data:
            found = hashlib.file_digest(data, "sha256").hexdigest()
        if found != file.lfs.sha256:
            (folder / file.rfilename).unlink()
            blob.unlink(missing_ok=True)
            raise HubError(
                f"{file.rfilename} arrived damaged (sha256 {found[:12]}, expected {file.lfs.sha256[:12]}) and was "
                "deleted; run the same command again, the other files are kept"
            )


def _cached(repo_id: str, revision: str | None, layout: Layout | None, reason: Exception) -> Path:
    """The complete copy that the hub's cache holds, for when the hub cannot be reached."""
    from huggingface_hub import snapshot_download

    for choice in WEIGHTS if layout is None else (layout,):
        patterns = [*BESIDE_THE_WEIGHTS, *WEIGHTS[choice]]
        try:
            folder = Path(
                snapshot_download(
                    repo_id,
                    revision=revision,
                    local_files_only=True,
                    allow_patterns=patterns,
                    ignore_patterns="*/*",
                )
            )
        except OSError:  # nothing cached, or not everything
            continue
        if any(folder.glob(WEIGHTS[choice][0])):
            log.warning("the hub cannot be reached; using the cached copy %s", folder)
            return folder
    raise HubError(
        f"{repo_id} cannot be fetched: the hub cannot be reached ({_first_line(reason)}), and no complete copy is "
        "cached. Connect and run the same command again, or name a folder that holds the checkpoint"
    )


def _explain(repo_id: str, revision: str | None, error: Exception) -> HubError:
    """What the hub's refusal means for the user."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{repo_id}"
    if isinstance(error, GatedRepoError):
        way = f"is gated: accept its terms at {page}, then log in here with `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        way = "is no folder here, and missing or private on the hub: check the spelling, or log in with `hf auth login`"
    elif isinstance(error, RevisionNotFoundError):
        way = f"has no revision {revision!r}: take a branch, tag or commit from {page}/commits, or leave it out"
    elif isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        way = "was refused: it is private, or the token used is not valid; log in with `hf auth login`"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        way = f"does not fit: the disk of {constants.HF_HUB_CACHE} is full; free some space and run the command again"
    else:
        way = f"could not be fetched ({_first_line(error)}): run the same command again, files that arrived are kept"
    return HubError(f"{repo_id} {way}; or name a folder that holds the checkpoint")


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
