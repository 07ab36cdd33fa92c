"""The embedded model: a real checkpoint of a few megabytes, and what made it."""

from pathlib import Path

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.files import cache_dir

SOURCE = Path(__file__).parent


def demo_folder() -> Path:
    """Where the embedded checkpoint lies in 4 bit, once it has been used."""
    return cache_dir() / f"demo-4bit-{open_checkpoint(SOURCE).fingerprint()[:16]}"


def demo_checkpoint() -> Path:
    """The embedded checkpoint in 4 bit, converted into the cache folder on first use."""
    target = demo_folder()
    if not target.exists():
        from magistral_mlx.convert import (
            convert_checkpoint,  # the one line where the runtime needs the converter
        )

        convert_checkpoint(SOURCE, target, q_method="round", tokenizer_json=False)
    return target
