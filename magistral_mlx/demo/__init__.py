"""The embedded model, a real checkpoint of 5 MB, and the folders of models by name."""

import os
from collections.abc import Callable
from pathlib import Path

from magistral_mlx.checkpoint.folder import DEMO, DEMO_SOURCE, open_checkpoint, resolve
from magistral_mlx.errors import CheckpointError, ConversionError, quoted
from magistral_mlx.files import as_path, cache_dir, exclusive

SOURCE = DEMO_SOURCE


def demo_folder() -> Path:
    """Return the folder of the 4-bit demo, which exists once the demo has been used."""
    return cache_dir() / f"demo-4bit-{open_checkpoint(SOURCE).fingerprint()[:16]}"


def demo_checkpoint() -> Path:
    """Return the folder of the 4-bit demo; convert it into the cache folder on first use.

    Raises:
        ConversionError: the cache folder cannot be written to.
    """
    target = demo_folder()
    if target.exists():
        return target
    # The one place where the runtime needs the converter.
    from magistral_mlx.convert.pipeline.conversion import convert_checkpoint

    try:
        with exclusive(target.with_name(f".{target.name}.lock")):
            # Another process may have converted it meanwhile.
            if not target.exists():
                convert_checkpoint(SOURCE, target, q_method="round", tokenizer_json=False)
    except OSError as error:
        raise ConversionError(
            f"the demo cannot be converted into {target.parent} ({error.strerror}); "
            "let MAGISTRAL_MLX_CACHE name a folder that you can write to"
        ) from None
    return target


def resolve_model(
    model: str | Path, revision: str | None = None, *, check: Callable[[Path], None] | None = None
) -> Path:
    """Return the folder of a model: "demo", a folder, or a hub id, which is fetched.

    ``check`` is called with a folder of a hub id's other files before weights are fetched.

    Raises:
        CheckpointError: there is no such folder, and it is not a hub id.
        HubError: the id cannot be fetched.
        OptionError: a revision of a folder or of the demo.
    """
    as_path(model, "model")
    folder = resolve(model, revision=revision, layout="hf", check=check)
    return demo_checkpoint() if model == DEMO else folder


def resolve_local(model: str, *, converts_demo: bool = True) -> Path:
    """Return the folder of a model on this machine; never fetch, which a host could not cancel.

    Args:
        model: a folder or "demo".
        converts_demo: make the demo on first use; else it must have been used before.

    Raises:
        CheckpointError: there is no such folder.
    """
    if model == DEMO and converts_demo:
        return demo_checkpoint()
    folder = demo_folder() if model == DEMO else Path(os.path.expanduser(model))
    try:
        is_folder = folder.is_dir()
    except (OSError, ValueError):
        # The name is too long or holds a zero byte.
        is_folder = False
    if is_folder:
        return folder
    if model == DEMO:
        raise CheckpointError(
            "the demo is converted when it is first loaded, which has not happened yet; load it "
            "once"
        )
    raise CheckpointError(
        f"{quoted(model)}: no such folder. A host loads folders and 'demo', and fetches nothing: "
        "download the model in your app, or once with `magistral pull org/name`"
    )
