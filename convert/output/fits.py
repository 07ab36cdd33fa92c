"""What of a conversion's result fits which Mac: a forecast from shapes."""

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.errors import MemoryLimitError
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.model.mac_table import MAC_GB, mac_budget_bytes
from magistral_mlx.model.memory import make_plan


def contexts(config: ModelConfig, weights_bytes: int) -> dict[int, int | None]:
    """The context, prompt and reply together, that fits beside the weights, by the gigabytes of a Mac; None: none."""
    found: dict[int, int | None] = {}
    for memory_gb in MAC_GB:
        try:
            found[memory_gb] = make_plan(
                config,
                weights_bytes,
                LoadOptions(memory_gb=mac_budget_bytes(memory_gb) / 1e9),
            ).context
        except MemoryLimitError:
            found[memory_gb] = None
    return found


def in_words(config: ModelConfig, weights_bytes: int) -> str:
    """On one line."""
    found = contexts(config, weights_bytes).items()
    return "fits, by a forecast: " + ", ".join(
        f"{memory_gb} GB Mac {'not' if context is None else f'{context:,} tokens'}"
        for memory_gb, context in found
    )
