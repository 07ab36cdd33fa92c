"""The file tekken.json: read by mistral-common and checked."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from magistral_mlx.errors import TokenizerError

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

TEKKEN_FILE = "tekken.json"
# Without an id for each byte, tiktoken panics on text that needs it.
BYTES = 256
MAX_TEKKEN_BYTES = 50_000_000  # Magistral's has 19 million
# What mistral-common raises depends on where the file is damaged.
DAMAGE = (
    ValueError,
    TypeError,
    LookupError,
    AssertionError,
    AttributeError,
    OverflowError,
    RecursionError,
)


def open_tekken(folder: Path) -> tuple["Tekkenizer", Path]:
    """Read the tekken.json of a checkpoint; returns it and its path.

    Raises:
        TokenizerError: it is missing, damaged or incomplete.
    """
    path = folder / TEKKEN_FILE
    if not path.is_file():
        raise TokenizerError(
            f"{path} is missing; it is the tokenizer of every Magistral checkpoint: "
            "copy it into this folder from where the model was published"
        )
    if (size := path.stat().st_size) > MAX_TEKKEN_BYTES:
        raise TokenizerError(
            f"{path} has {size} bytes, far too many for what it is; download it again"
        )
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    try:
        tekken = Tekkenizer.from_file(path)
    except DAMAGE as error:
        raise damaged_tekken(path, error) from None
    if (pieces := tekken.n_words - tekken.num_special_tokens) < BYTES:
        raise TokenizerError(
            f"{path} has {pieces} ids of text, and single bytes alone are {BYTES}; its vocabulary "
            "was cut: copy it from where the model was published"
        )
    return tekken, path


def damaged_tekken(path: Path, error: Exception) -> TokenizerError:
    """Make the error for a tekken.json that mistral-common cannot read."""
    reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:200]
    return TokenizerError(f"{path} is damaged or unknown; download it again ({reason})")
