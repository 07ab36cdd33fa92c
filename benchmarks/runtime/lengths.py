"""How much longer a longer prompt takes."""

from math import prod

from magistral_mlx.checkpoint.config import ModelConfig

ENDS = (
    "model.embed_tokens.weight",
    "lm_head.weight",
)  # a prefill looks rows up in one, and reads one row's logits


def times_as_long(config: ModelConfig, before: int, after: int) -> float:
    """Multiply-adds of a prefill of ``after`` ids over those of one of ``before``: every weight of a layer for each id,
    and queries with keys, and weights with values, of each position and those before it."""
    weights = sum(prod(shape) for name, shape in config.shapes.items() if name not in ENDS)
    pair = (
        config.num_layers * config.num_heads * config.head_dim
    )  # of two products, half of all pairs
    return after * (weights + pair * after) / (before * (weights + pair * before))
