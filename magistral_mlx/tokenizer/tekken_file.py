"""The file tekken.json: checked, then built by mistral-common.

mistral-common trusts the file: it allocates as many control ids as the file names, and panics or
drops text where the pattern does not match. So counts and pattern are checked here first.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magistral_mlx.checkpoint.documents import read_document
from magistral_mlx.checkpoint.hub_api import TEKKEN_FILE
from magistral_mlx.errors import CheckpointError, TokenizerError, quoted

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

# Without an id for each byte, tiktoken panics on text that needs it.
BYTES = 256
MAX_TEKKEN_BYTES = 50_000_000  # Magistral's has 19 million
MAX_TEKKEN_VALUES = 1_000_000  # Magistral's has 610,000
MAX_CONTROL_IDS = 10_000  # Magistral has 1,000
MAX_PATTERN = 2_000  # characters; Magistral's has 300
# Magistral's pattern looks ahead here only. Looking around in another way, back references and
# possessive repetition may take a time that doubles with every letter of a text.
LOOKS_AHEAD = r"(?!\S)"
SLOW = re.compile(r"\(\?(?!:|i:)|\\[1-9gkGK]|(?:[+*?]|\{[\d,]+\})\+")
# A character of every class that a pattern may tell apart; all of it must be encoded.
PROBE = (
    "".join(map(chr, range(128)))
    + " Aa0, DŽdžʰªÉé\u0301 \u00a0\u2003\u2028\u200d\ufeff"
    + "Ωж א ع हिन्दी ไทย 한글 漢字 １½Ⅷ _- «“”» €+^` 🙂\U000e0001\U0010fffd \r\n\r\n  \t\n x  "
)
MAX_REASON = 300  # characters
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
    try:
        text = read_document(path, MAX_TEKKEN_BYTES)
    except CheckpointError as error:
        raise TokenizerError(error.template) from None
    try:
        with panics_as_errors(path):
            tekken = _build(_checked(text), path)
            _check_probe(tekken)
    except DAMAGE as error:
        raise damaged_tekken(path, error) from None
    if (pieces := tekken.n_words - tekken.num_special_tokens) < BYTES:
        raise TokenizerError(
            f"{path} has {pieces} ids of text, and single bytes alone are {BYTES}; its vocabulary "
            "was cut: copy it from where the model was published"
        )
    return tekken, path


def damaged_tekken(path: Path, error: BaseException) -> TokenizerError:
    """Make the error for a tekken.json that mistral-common cannot read."""
    reason = f"{type(error).__name__}: {reason_of(error)}"
    return TokenizerError(f"{path} is damaged or unknown; download it again ({reason})")


def reason_of(error: BaseException) -> str:
    """Return what mistral-common says on one short line; it may quote a whole file or tool."""
    said = str(error).partition("For further information")[0]
    return re.sub(r"\s+", " ", said).strip()[:MAX_REASON]


@contextmanager
def panics_as_errors(path: Path) -> Iterator[None]:
    """Raise TokenizerError where tiktoken, which is written in Rust, panics.

    A panic is no Exception, and its class cannot be imported.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise damaged_tekken(path, error) from None


def _checked(text: bytes) -> dict[str, Any]:
    """Parse the file, and check what mistral-common would believe.

    Raises:
        ValueError, TypeError, LookupError, AttributeError, RecursionError: it is damaged.
    """
    if (values := sum(map(text.count, (b",", b"[", b"{")))) > MAX_TEKKEN_VALUES:
        raise ValueError(f"it holds up to {values} values, {MAX_TEKKEN_VALUES} are allowed")
    raw: dict[str, Any] = json.loads(text.decode())
    config, named = raw["config"], raw.get("special_tokens") or []
    vocab_size, control_ids = config["default_vocab_size"], config["default_num_special_tokens"]
    if type(control_ids) is not int or not 0 < control_ids <= MAX_CONTROL_IDS:
        raise ValueError(
            f"default_num_special_tokens is {quoted(control_ids)}; 1 to {MAX_CONTROL_IDS} are "
            "allowed"
        )
    if type(vocab_size) is not int or not control_ids < vocab_size <= (
        control_ids + len(raw["vocab"])
    ):
        raise ValueError(
            f"default_vocab_size is {quoted(vocab_size)}, with {control_ids} special tokens and "
            f"{len(raw['vocab'])} of text"
        )
    for rank, token in enumerate(named):
        if token["rank"] != rank or not isinstance(token["token_str"], str):
            raise ValueError(f"special token {rank} is {quoted(token)}")
    pattern = config["pattern"]
    if not isinstance(pattern, str) or not 0 < len(pattern) <= MAX_PATTERN:
        raise ValueError(f"pattern is {quoted(pattern)}")
    if slow := SLOW.search(pattern.replace(LOOKS_AHEAD, "")):
        raise ValueError(f"its pattern has {quoted(slow[0])}, which may take for ever")
    return raw


def _build(raw: dict[str, Any], path: Path) -> "Tekkenizer":
    """Build the tokenizer as mistral-common does from a file, without images and audio."""
    from mistral_common.tokens.tokenizers.base import TokenizerVersion
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    config, version = raw["config"], TokenizerVersion(raw["config"]["version"])
    named = raw.get("special_tokens")
    if named is None and version > TokenizerVersion.v7:
        raise ValueError("it has no special_tokens")
    return Tekkenizer(
        raw["vocab"],
        list(Tekkenizer.DEPRECATED_SPECIAL_TOKENS) if named is None else named,
        config["pattern"],
        config["default_vocab_size"],
        config["default_num_special_tokens"],
        version,
        name=path.stem,
        _path=path,
    )


def _check_probe(tekken: "Tekkenizer") -> None:
    """Raise ValueError if a pattern leaves text out, which tiktoken drops silently."""
    ids = tekken.encode(PROBE, bos=False, eos=False)
    if b"".join(map(tekken.id_to_byte_piece, ids)) != PROBE.encode():
        raise ValueError("its pattern does not match every character")
