"""The folders of models that were made or loaded here, so that a name is enough to find them."""

import json
import logging
import os
from contextlib import suppress
from pathlib import Path

from magistral_mlx.atomic_files import replacing
from magistral_mlx.checkpoint.documents import read_json
from magistral_mlx.checkpoint.folder import DEMO
from magistral_mlx.errors import CheckpointError, MagistralError
from magistral_mlx.files import exclusive, state_dir, write_all
from magistral_mlx.library.hub_models import cached_ids

log = logging.getLogger(__name__)

FOLDERS = "folders"  # the key in the list's file


def known_folders() -> list[Path]:
    """Return the folders that hold a model now; one that has gone is left out."""
    return [folder for folder in _read() if os.path.isfile(folder / "config.json")]


def remember(folder: str | Path) -> None:
    """Add a model's folder to the list; a list that cannot be written is no error."""
    path = Path(os.path.realpath(os.path.expanduser(folder)))
    # The hub's own cache is a list already.
    if path.parent.name != "snapshots" and path not in _read():
        _write([path])


def forget(folder: Path) -> None:
    """Remove a model's folder from the list."""
    _write([], without=Path(os.path.realpath(folder)))


def find_model(name: str) -> str:
    """Return the folder or hub id that a name of ``magistral list`` means, else the name itself.

    A folder of this name, a hub id and "demo" mean themselves.
    """
    if name == DEMO or "/" in name or os.path.exists(os.path.expanduser(name)):
        return name
    found = [str(folder) for folder in known_folders() if folder.name == name]
    found = found or [repo_id for repo_id in cached_ids() if repo_id.partition("/")[2] == name]
    if len(found) > 1:
        raise CheckpointError(
            f"{name} is the name of several models; use one of {', '.join(found)}"
        )
    return found[0] if found else name


def model_names() -> list[str]:
    """Return the names that a shell may complete, without opening a model."""
    folders = sorted({folder.name for folder in known_folders()} - {DEMO})
    return [DEMO, *folders, *cached_ids()]


def is_model(name: str) -> bool:
    """Return whether a word is the demo, a folder with a model, or a name of the list."""
    folder = Path(os.path.expanduser(name))
    return name == DEMO or os.path.isfile(folder / "config.json") or find_model(name) != name


def _path() -> Path:
    return state_dir() / "models.json"


def _read() -> list[Path]:
    path = _path()
    if not path.exists():
        return []
    try:
        found = read_json(path).get(FOLDERS)
    except MagistralError as error:
        # The list can be made again, and no model depends on it.
        log.warning("the list of models is empty: %s", error)
        return []
    names = found if isinstance(found, list) else []
    return [Path(name) for name in names if isinstance(name, str) and os.path.isabs(name)]


def _write(added: list[Path], without: Path | None = None) -> None:
    """Change the list, while no other process does."""
    path = _path()
    # A home that is read-only costs the list, and nothing else.
    with suppress(OSError), exclusive(path.with_suffix(".lock")):
        # A folder that is not there may be on a drive that is not mounted.
        kept = [folder for folder in _read() if folder not in (*added, without)]
        names = [str(folder) for folder in (*kept, *added)]
        with replacing(path) as descriptor:
            content = json.dumps({FOLDERS: names}, indent=1).encode()
            write_all(descriptor, memoryview(content))
