"""Convert Magistral checkpoints into quantized ones for every MLX runtime."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magistral_mlx.convert.pipeline.conversion import (
        Summary,
        convert_checkpoint,
        stream_conversion,
    )
    from magistral_mlx.convert.pipeline.prepare import check_conversion
    from magistral_mlx.convert.recipe.options import ConvertOptions
    from magistral_mlx.convert.verification.verification import Report, verify_checkpoint

HOMES = {
    "ConvertOptions": ".recipe.options",
    "Report": ".verification.verification",
    "Summary": ".pipeline.conversion",
    "check_conversion": ".pipeline.prepare",
    "convert_checkpoint": ".pipeline.conversion",
    "stream_conversion": ".pipeline.conversion",
    "verify_checkpoint": ".verification.verification",
}
__all__ = [
    "ConvertOptions",
    "Report",
    "Summary",
    "check_conversion",
    "convert_checkpoint",
    "stream_conversion",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Import lazily, so that ``python -m`` of a module does not find it imported already."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name], __name__), name)
