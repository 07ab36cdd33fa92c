"""The converter: any Magistral checkpoint in, one 4-bit checkpoint for every MLX runtime out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magistral_mlx.convert.pipeline.conversion import Conversion, Summary
    from magistral_mlx.convert.pipeline.prepare import convert_checkpoint, converting, prepare
    from magistral_mlx.convert.recipe.options import Options
    from magistral_mlx.convert.verification.verification import Report, verify_checkpoint

HOMES = {
    "Conversion": ".pipeline.conversion",
    "Options": ".recipe.options",
    "Report": ".verification.verification",
    "Summary": ".pipeline.conversion",
    "convert_checkpoint": ".pipeline.prepare",
    "converting": ".pipeline.prepare",
    "prepare": ".pipeline.prepare",
    "verify_checkpoint": ".verification.verification",
}
__all__ = [
    "Conversion",
    "Options",
    "Report",
    "Summary",
    "convert_checkpoint",
    "converting",
    "prepare",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Import a stage when it is asked for: so ``python -m`` of one finds it not imported yet."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name], __name__), name)
