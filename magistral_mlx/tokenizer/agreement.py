"""Compare a tekken.json with another, and with the tokenizer.json beside a model's weights."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magistral_mlx.checkpoint.documents import open_plain, read_json
from magistral_mlx.checkpoint.multimodal import language_config
from magistral_mlx.errors import CheckpointError, TokenizerError, quoted
from magistral_mlx.tokenizer.home import find_tokenizer
from magistral_mlx.tokenizer.tekken_file import open_tekken

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

TOKENIZER_JSON = "tokenizer.json"
# Magistral's has 17 MB and a million values.
MAX_BYTES, MAX_VALUES = 50_000_000, 3_000_000
# The name of a control id without a use, which tokenizer.json may leave out.
UNUSED = re.compile(r"<SPECIAL_\d+>")


def share_ids(ours: "Tekkenizer", theirs: "Tekkenizer") -> bool:
    """Return whether two tokenizers give every id of text the same bytes."""
    if (ours.n_words, ours.num_special_tokens) != (theirs.n_words, theirs.num_special_tokens):
        return False
    texts = range(ours.num_special_tokens, ours.n_words)
    return all(ours.id_to_byte_piece(i) == theirs.id_to_byte_piece(i) for i in texts)


def check_before_weights(folder: Path, given: str | Path | None = None) -> None:
    """Find the tokenizer of a model whose weights are not fetched yet, and compare it.

    Raises:
        TokenizerError, HubError, CheckpointError: as ``Tokenizer.of_model``.
    """
    home = find_tokenizer(folder, given)
    if home == folder:
        return
    tekken, path = open_tekken(home)
    check_agreement(tekken, path, folder)
    config = folder / "config.json"
    if config.is_file():
        vocab_size = language_config(read_json(config), config).get("vocab_size")
        if vocab_size != tekken.n_words:
            raise other_size(path, tekken.n_words, vocab_size)


def other_size(path: Path, ids: int, vocab_size: object) -> CheckpointError:
    """Make the error for a tekken.json of another size than the model's vocabulary."""
    return CheckpointError(
        f"{path} has {ids} ids, the model has {quoted(vocab_size)}; they are not of the same "
        "model: download both again"
    )


def check_agreement(tekken: "Tekkenizer", source: Path, folder: Path) -> None:
    """Raise TokenizerError if the ids of a tekken.json and of a tokenizer.json differ.

    Nothing is compared where there is no tokenizer.json. Its splitting pattern does not count:
    conversions with a wrong one were published, and tekken.json has the right one.

    Args:
        tekken: the tokenizer of tekken.json.
        source: its path, for messages.
        folder: the checkpoint's, which may have a tokenizer.json.
    """
    path = folder / TOKENIZER_JSON
    if not path.is_file():
        return
    texts, controls = _read(path)
    first = tekken.num_special_tokens
    for identity in range(tekken.n_words):
        if identity >= first:
            name = byte_level(tekken.id_to_byte_piece(identity))
            found = texts.get(identity)
        else:
            name, found = tekken.id_to_piece(identity), controls.get(identity)
            if UNUSED.fullmatch(name) and (found is None or UNUSED.fullmatch(found)):
                continue
        if found != name:
            raise TokenizerError(
                f"{source} is not the tokenizer of {path}: id {identity} is {quoted(name)} in "
                f"the first and {quoted(found)} in the second; name the tekken.json of the "
                "release that this model was made from"
            )


def byte_level(piece: bytes) -> str:
    """Return bytes as tokenizer.json spells them: a visible character for each byte.

    Source: https://github.com/openai/gpt-2/blob/master/src/encoder.py (bytes_to_unicode).
    """
    return piece.decode("latin-1").translate(_SPELLING)


_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_SPELLING = {byte: 0x100 + i for i, byte in enumerate(b for b in range(0x100) if b not in _VISIBLE)}


def _read(path: Path) -> tuple[dict[int, str], dict[int, str]]:
    """Return the texts and the control tokens of a tokenizer.json, by id."""
    try:
        with open_plain(path) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES or sum(map(content.count, (b",", b"[", b"{"))) > MAX_VALUES:
            raise ValueError("it is far too large for what it is")
        raw: Any = json.loads(content)
        texts = {identity: text for text, identity in raw["model"]["vocab"].items()}
        return texts, {token["id"]: token["content"] for token in raw["added_tokens"]}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = quoted(f"{type(error).__name__}: {error}")
        raise TokenizerError(
            f"{path} is damaged or of another kind ({reason}); download it again, or delete it: "
            "only other programs need it"
        ) from None
