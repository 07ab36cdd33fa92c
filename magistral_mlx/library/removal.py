"""Delete a model: from the hub's cache, or a folder that was converted here."""

import os
from pathlib import Path

from magistral_mlx.checkpoint.manifest import MANIFEST, Manifest
from magistral_mlx.errors import CheckpointError, OptionError
from magistral_mlx.library.hub_models import delete_cached
from magistral_mlx.library.known_folders import forget
from magistral_mlx.library.models import LocalModel, find_local
from magistral_mlx.library.settings import MODEL, read_settings, unset_value

# Written beside the files that the manifest names.
UNNAMED = frozenset({MANIFEST, ".DS_Store"})


def find_removable(name: str) -> LocalModel:
    """Return a model that may be removed.

    Raises:
        OptionError: it is the demo, or a link.
        CheckpointError: it is not here, was not converted here, or its folder holds other files.
    """
    path = os.path.expanduser(name)
    if os.path.islink(path):
        raise OptionError(f"{path} is a link; name the folder itself, {os.path.realpath(path)}")
    model = find_local(name)
    if model.kind == "demo":
        raise OptionError("the demo is part of this package; it cannot be removed alone")
    if model.kind == "folder":
        _files_of(model.folder)
    return model


def remove_model(model: LocalModel) -> int:
    """Delete a model that ``find_removable`` found; return the bytes that are freed.

    A default that names it is unset.

    Raises:
        HubError: another process has just deleted it.
        CheckpointError: its folder has changed.
    """
    freed = delete_cached(model.name) if model.kind == "hub" else _remove_folder(model.folder)
    # Otherwise the next command would fetch it again.
    if model.is_default and MODEL in read_settings():
        unset_value(MODEL)
    return freed


def _remove_folder(folder: Path) -> int:
    freed = 0
    for path in _files_of(folder):
        freed += path.lstat().st_size
        path.unlink()
    folder.rmdir()
    forget(folder)
    return freed


def _files_of(folder: Path) -> list[Path]:
    """Return the files of a folder that was converted here; its manifest is the last.

    So a removal that is interrupted can be repeated.
    """
    manifest = Manifest.find(folder)
    if manifest is None:
        raise CheckpointError(
            f"{folder} was not converted here (it has no {MANIFEST}), so it is not removed; "
            "delete it yourself"
        )
    manifest.require_all()
    own = UNNAMED | set(manifest.files)
    files = list(folder.iterdir())
    if strangers := [p for p in files if p.name not in own or p.is_dir()]:
        raise CheckpointError(
            f"{folder} also holds {min(strangers).name}, which was not made by a conversion, so "
            "nothing is removed; move it away first"
        )
    return sorted(files, key=lambda path: path.name == MANIFEST)
