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
