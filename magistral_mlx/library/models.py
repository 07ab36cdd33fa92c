"""The models on this machine: the demo, folders made or loaded here, and the hub's cache."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from magistral_mlx.checkpoint.folder import DEMO, DEMO_SOURCE, Checkpoint, open_checkpoint
from magistral_mlx.checkpoint.hub_api import is_hub_id
from magistral_mlx.demo import demo_folder
from magistral_mlx.errors import CheckpointError, MagistralError, MemoryLimitError, as_flags
from magistral_mlx.library.hub_models import cached_models
from magistral_mlx.library.known_folders import find_model, known_folders
from magistral_mlx.library.settings import default_model, load_options
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.model.memory import plan_for
from magistral_mlx.tokenizer.home import find_tokenizer

Kind = Literal["demo", "folder", "hub"]


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model on this machine.

    Attributes:
        name: the word that means it on a command line.
        disk_bytes: of all its files.
        bits: bits a weight of its matrices, without scales; None if it cannot be opened.
        context: the tokens of prompt and reply that fit here; None if none does.
        is_default: commands take it where they name none.
        problem: the reason for which it cannot be loaded.
    """

    name: str
    kind: Kind
    folder: Path
    disk_bytes: int
    bits: float | None
    context: int | None
    is_default: bool
    problem: str | None


@dataclass(frozen=True, slots=True)
class _Found:
    """A model by its place alone; ``problem`` if its files are not whole."""

    name: str
    kind: Kind
    folder: Path
    nbytes: int
    problem: str | None = None


def local_models() -> list[LocalModel]:
    """Return the models on this machine; of the hub's cache, those that can be loaded here.

    Raises:
        OptionError: the settings are wrong.
    """
    options, default = load_options(), _default()
    return [
        _described(found, options, default)
        for found in _found()
        if found.kind != "hub" or found.problem is not None or _is_ours(found.folder)
    ]


def find_local(name: str) -> LocalModel:
    """Return a model on this machine by its name; fetch nothing.

    Raises:
        CheckpointError: it is not here.
    """
    wanted = find_model(name)
    folder = Path(os.path.realpath(os.path.expanduser(wanted)))
    for found in _found():
        if found.name == wanted or (found.kind == "folder" and found.folder == folder):
            return _described(found, load_options(), _default())
    if folder.is_dir():
        found = _Found(str(folder), "folder", folder, folder_bytes(folder))
        return _described(found, load_options(), _default())
    way = f"`magistral pull {wanted}` fetches it" if is_hub_id(wanted) else "check the name"
    raise CheckpointError(f"{name} is not on this machine; magistral list shows what is, {way}")


def bits_of(checkpoint: Checkpoint) -> float:
    """Return the mean bits a weight of all matrices, without scales and biases."""
    shapes = {
        name.removesuffix(".weight"): shape for name, shape in checkpoint.config.shapes.items()
    }
    weights = bits = 0
    for path, quant in checkpoint.formats.items():
        rows, columns = shapes[path]
        weights += rows * columns
        bits += rows * columns * (16 if quant is None else quant.bits)
    return bits / weights


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder, without its subfolders."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _found() -> Iterator[_Found]:
    demo = demo_folder()
    demo = demo if demo.is_dir() else DEMO_SOURCE
    yield _Found(DEMO, "demo", demo, folder_bytes(demo))
    folders = known_folders()
    default = _default_folder()
    if default is not None and default not in folders:
        folders.append(default)
    names = [DEMO, *(folder.name for folder in folders)]
    for folder in sorted(folders):
        name = folder.name if names.count(folder.name) == 1 else str(folder)
        yield _Found(name, "folder", folder, folder_bytes(folder))
    for model in cached_models():
        problem = None if model.is_whole else f"incomplete; magistral pull {model.repo_id} goes on"
        # Of an incomplete download this is the only sign that it is of Mistral.
        if model.is_whole or (model.snapshot / "tekken.json").exists():
            yield _Found(model.repo_id, "hub", model.snapshot, model.nbytes, problem)


def _default() -> str | None:
    default = default_model()
    return None if default is None else find_model(default)


def _default_folder() -> Path | None:
    """Return the default model if it is a folder, which need not have been loaded yet."""
    default = _default()
    if default in (None, DEMO):
        return None
    folder = Path(os.path.realpath(os.path.expanduser(default)))
    return folder if (folder / "config.json").is_file() else None


def _is_ours(folder: Path) -> bool:
    """Return whether a folder of the hub's cache can be opened; it may hold any model."""
    try:
        open_checkpoint(folder)
    except MagistralError:
        return False
    return True


def _described(found: _Found, options: LoadOptions, default: str | None) -> LocalModel:
    is_default = default is not None and (
        found.name == default
        or (
            found.kind == "folder"
            and os.path.realpath(os.path.expanduser(default)) == str(found.folder)
        )
    )
    bits: float | None = None
    context: int | None = None
    problem = found.problem
    if problem is None:
        try:
            checkpoint = open_checkpoint(found.folder)
            bits = bits_of(checkpoint)
            find_tokenizer(found.folder, fetches=False)
            context = plan_for(checkpoint, options).context
        except MemoryLimitError:
            problem = "does not fit this machine"
        except MagistralError as error:
            problem = as_flags(error)
    return LocalModel(
        found.name, found.kind, found.folder, found.nbytes, bits, context, is_default, problem
    )
