"""Decide the format, and so the bits, of each matrix.

For the recipe auto these are the bits to begin with, and ``methods/auto.py`` decides.
"""

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.convert.recipe.named import AUTO
from magistral_mlx.convert.recipe.options import ConvertOptions

RAISED_BITS = 6


def make_formats(config: ModelConfig, options: ConvertOptions) -> dict[str, QuantFormat | None]:
    """Return each matrix's format by module path; raise OptionError if a rule matches none."""
    modules = [
        name.removesuffix(".weight") for name, shape in config.shapes.items() if len(shape) == 2
    ]
    if options.file is not None:
        return options.file.formats(modules)
    default = options.default
    if default is None or options.recipe in (None, AUTO):
        return dict.fromkeys(modules, default)
    raised = QuantFormat(RAISED_BITS, default.group_size)
    return {
        m: raised if _is_raised(m, config.num_layers, options.recipe) else default for m in modules
    }


def _is_raised(module: str, num_layers: int, recipe: str) -> bool:
    """Return whether a named recipe gives a module, by its path, RAISED_BITS."""
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
