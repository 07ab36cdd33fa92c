"""Models in the hub's own cache: list them, measure them, delete them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from magistral_mlx.checkpoint.hub_cache import UNCHECKED
from magistral_mlx.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo

MAIN = "main"


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A repository of the hub's cache.

    Attributes:
        snapshot: the folder of the main branch's commit, else of the newest.
        nbytes: of all its commits, and of what arrived of an unfinished download.
        is_whole: no download of it was interrupted.
    """

    repo_id: str
    snapshot: Path
    nbytes: int
    is_whole: bool


def hide_progress() -> None:
    """Let huggingface_hub show no progress of its own, in this process."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()


def cached_ids() -> list[str]:
    """Return the ids in the hub's cache, by the names of its folders alone."""
    from huggingface_hub import constants

    folders = Path(constants.HF_HUB_CACHE).expanduser().glob("models--*--*")
    return sorted("/".join(folder.name.split("--", 2)[1:]) for folder in folders)


def cached_models() -> list[CachedModel]:
    """Return the models in the hub's cache, by name; other repositories are left out."""
    info = _scan()
    found = [] if info is None else list(_models(info))
    return sorted(found, key=lambda model: model.repo_id)


def delete_cached(repo_id: str) -> int:
    """Delete a model from the hub's cache, all its commits; return the bytes that are freed.

    Raises:
        HubError: the cache has no such model.
    """
    info = _scan()
    all_repos = frozenset() if info is None else info.repos
    repos = [repo for repo in all_repos if (repo.repo_type, repo.repo_id) == ("model", repo_id)]
    if info is None or not repos:
        raise HubError(f"{repo_id} is not in the hub's cache, so there is nothing to delete")
    freed = next(model.nbytes for model in _models(info) if model.repo_id == repo_id)
    # Copies of a repository share their commits' names, so the others are left out.
    alone = replace(info, repos=frozenset(repos))
    alone.delete_revisions(*(revision.commit_hash for revision in repos[0].revisions)).execute()
    return freed


def _scan() -> "HFCacheInfo | None":
    """Scan the hub's cache, if there is one."""
    from huggingface_hub import constants, scan_cache_dir

    cache = Path(constants.HF_HUB_CACHE).expanduser()
    return scan_cache_dir(cache) if cache.is_dir() else None


def _models(info: "HFCacheInfo") -> Iterator[CachedModel]:
    for repo in info.repos:
        if repo.repo_type != "model" or not repo.revisions:
            continue
        newest = max(repo.revisions, key=lambda each: (MAIN in each.refs, each.last_modified))
        arriving = sum(p.stat().st_size for p in (repo.repo_path / "blobs").glob("*.incomplete"))
        yield CachedModel(
            repo.repo_id,
            newest.snapshot_path,
            repo.size_on_disk + arriving,
            not (repo.repo_path / UNCHECKED).exists() and not arriving,
        )
