"""Named recipes: kinds of matrices that get more bits than the others."""

from collections.abc import Mapping

# Name -> the bits of most matrices, and the help text.
RECIPES: Mapping[str, tuple[int, str]] = {
    "4bit": (4, "every matrix in 4 bit"),
    "8bit": (8, "every matrix in 8 bit"),
    "4bit-kv6": (4, "4 bit, k and v projections in 6"),
    "4bit-head6": (4, "4 bit, embedding and lm_head in 6"),
    "mixed_4_6": (4, "4 bit; lm_head, some v and down projections in 6, as in mlx-lm"),
}
# Bits by predicted errors, ``target_bits`` on average.
AUTO = "auto"
RAISED_BITS = 6


def is_raised(module: str, num_layers: int, recipe: str) -> bool:
    """Tell whether a named recipe gives a module, by its path, RAISED_BITS."""
    if recipe == "4bit-kv6":
        return module.endswith(("self_attn.k_proj", "self_attn.v_proj"))
    if recipe == "4bit-head6":
        return module in ("model.embed_tokens", "lm_head")
    if recipe != "mixed_4_6":
        return False
    if module == "lm_head":
        return True
    # The first and last eighth of the layers, and every third between, like llama.cpp's Q4_K_M.
    # Source: https://github.com/ggml-org/llama.cpp/blob/917786f43d0f29b7c77a0c56767c0fa4df68b1c5/src/llama.cpp#L5265
    if not module.endswith(("self_attn.v_proj", "mlp.down_proj")):
        return False
    eighth, layer = num_layers // 8, int(module.split(".")[2])
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
