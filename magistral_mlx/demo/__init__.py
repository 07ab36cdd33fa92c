"""The embedded model: a real checkpoint of a few megabytes, and what made it."""

from pathlib import Path

from magistral_mlx.checkpoint import open_checkpoint
from magistral_mlx.paths import cache_dir


def demo_checkpoint() -> Path:
    """The embedded checkpoint in 4 bit, converted into the cache folder on first use."""
    source = Path(__file__).parent
    target = cache_dir() / f"demo-4bit-{open_checkpoint(source).fingerprint()[:16]}"
    if not target.exists():
        from magistral_mlx.convert import convert_checkpoint  # the one line where the runtime needs the converter

        convert_checkpoint(source, target, q_method="round", tokenizer_json=False)
    return target
