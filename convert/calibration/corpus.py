"""Make calibration ids from our own texts and random ids, or from the user's file."""

import codecs
import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from magistral_mlx.errors import OptionError, named
from magistral_mlx.tokenizer.tekken import Tokenizer

TEXTS = Path(__file__).parent / "calibration.txt"
BETWEEN_TEXTS, BETWEEN_PARTS = "===\n", "---\n"
# Ids of a sequence; the first is bos.
WINDOW = 512
# Fewest ids of a file: 256 random ones are nearly as good as any number.
MIN_IDS = 256
# Bytes read of a file; windows are spread over all of them.
MAX_FILE_BYTES = 16 * 2**20


def built_in(tokenizer: Tokenizer, *, windows: int, seed: int = 0) -> mx.array:
    """Return one window of random ids, then a conversation in the model card's languages.

    The conversation follows the model's own system prompt. Mean squares of 256 random ids are
    nearly as good as those of real text, but the correlations in a Hessian come from real text.

    Args:
        tokenizer: the source's.
        windows: at most; fewer if the texts are shorter.
        seed: of the random ids.

    Returns:
        ``[windows, WINDOW]`` int32.
    """
    messages: list[dict[str, str]] = []
    for question, reasoning, answer in _texts():
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "reasoning": reasoning, "content": answer},
        ]
    # A conversation ends in a question. Its bos is dropped: each window gets its own.
    texts = tokenizer.encode_chat(messages[:-1])[1:]
    control = [tokenizer.is_control(token_id) for token_id in range(tokenizer.vocab_size)]
    random = np.random.default_rng(seed).choice(np.flatnonzero(~np.array(control)), WINDOW - 1)
    return windows_of(
        tokenizer, [int(token_id) for token_id in random] + texts, windows, spread=False
    )


def read_calibration(
    path: str | os.PathLike[str], tokenizer: Tokenizer, *, windows: int
) -> mx.array:
    """Read windows of a text file, evenly spread if the file has more.

    Returns:
        ``[windows, WINDOW]`` int32, or one shorter window if the file does not fill one.

    Raises:
        OptionError: the file is missing, empty, not UTF-8 text or too short.
    """
    path = Path(os.path.expanduser(path))
    again = (
        "name a UTF-8 text file, such as answers of the model to questions of yours, or leave "
        f"{named('calibration')} out"
    )
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OptionError(f"the calibration file {path} is no plain file; {again}")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise OptionError(
            f"the calibration file {path} cannot be read ({error.strerror}); {again}"
        ) from None
    if not content.strip():
        raise OptionError(f"the calibration file {path} is empty; {again}")
    try:
        # A file cut off at MAX_FILE_BYTES may end inside a character.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(
            content, final=len(content) < MAX_FILE_BYTES
        )
    except UnicodeDecodeError as error:
        raise OptionError(
            f"the calibration file {path} is not text: byte {error.start} is not UTF-8; {again}"
        ) from None
    if "\0" in text:
        raise OptionError(f"the calibration file {path} is not text: it holds zero bytes; {again}")
    ids = tokenizer.encode(text)
    if len(ids) < MIN_IDS:
        raise OptionError(
            f"the calibration file {path} is too short: {len(ids)} tokens, at least {MIN_IDS} are "
            f"needed; {again}"
        )
    return windows_of(tokenizer, ids, windows, spread=True)


def digest(ids: mx.array) -> str:
    """Return the SHA-256 of ids and their shape, in hex."""
    return hashlib.sha256(
        f"{list(ids.shape)}".encode() + np.array(ids, dtype=np.int32).tobytes()
    ).hexdigest()


def questions() -> list[str]:
    return [question for question, _, _ in _texts()]


def _texts() -> list[tuple[str, str, str]]:
    """Return question, reasoning and answer of each of our own texts."""
    texts = (
        text.split(BETWEEN_PARTS) for text in TEXTS.read_text(encoding="utf-8").split(BETWEEN_TEXTS)
    )
    return [
        (question.strip(), reasoning.strip(), answer.strip())
        for question, reasoning, answer in texts
    ]


def windows_of(tokenizer: Tokenizer, ids: Sequence[int], windows: int, *, spread: bool) -> mx.array:
    """Cut ids into windows of a bos and equally many ids: the first ones, or evenly spread ones."""
    length = min(WINDOW - 1, len(ids))
    there = len(ids) // length
    count = min(windows, there)
    first = [length * (i * there // count if spread else i) for i in range(count)]
    return mx.array([[tokenizer.bos_id, *ids[start : start + length]] for start in first], mx.int32)
