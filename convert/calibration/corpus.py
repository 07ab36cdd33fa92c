"""What a calibration reads: ids of our own texts and random ones, or of the user's file."""

import codecs
import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from magistral_mlx.errors import OptionError
from magistral_mlx.tokenizer.tekken import Tokenizer

TEXTS = Path(__file__).parent / "calibration.txt"
BETWEEN_TEXTS, BETWEEN_PARTS = "===\n", "---\n"
WINDOW = 512  # ids of a sequence, the first of which is bos
FEWEST = 256  # ids that a file must have: as many random ones are nearly as good as any number
LARGEST_FILE = 16 * 2**20  # bytes that are read: windows are taken from all over them


def built_in(tokenizer: Tokenizer, *, windows: int, seed: int = 0) -> mx.array:
    """A conversation in the card's languages after the model's own system prompt, and one window of random ids.

    Statistics of 256 random ids gain nearly what those of real text do; but a Hessian's correlations are the text's.

    Args:
        windows: at most; fewer where the texts are not as long.
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
    texts = tokenizer.encode_chat(messages[:-1])[
        1:
    ]  # a conversation ends in a question; bos comes with each window
    control = [tokenizer.is_control(identity) for identity in range(tokenizer.vocab_size)]
    random = np.random.default_rng(seed).choice(np.flatnonzero(~np.array(control)), WINDOW - 1)
    return windows_of(
        tokenizer, [int(identity) for identity in random] + texts, windows, spread=False
    )


def read_calibration(
    path: str | os.PathLike[str], tokenizer: Tokenizer, *, windows: int
) -> mx.array:
    """Windows of a text file, evenly spread where it has more.

    Returns:
        ``[windows, WINDOW]`` int32; one shorter window of a file that does not fill one.
    Raises:
        OptionError: the file is missing, empty, no UTF-8 text or too short.
    """
    path = Path(os.path.expanduser(path))
    again = "name a UTF-8 text file, such as answers of the model to questions of yours, or leave --calibration out"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OptionError(f"the calibration file {path} is no plain file; {again}")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE)
    except OSError as error:
        raise OptionError(
            f"the calibration file {path} cannot be read ({error.strerror}); {again}"
        ) from None
    if not content.strip():
        raise OptionError(f"the calibration file {path} is empty; {again}")
    try:
        # A file cut off at LARGEST_FILE may end inside a character.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(
            content, final=len(content) < LARGEST_FILE
        )
    except UnicodeDecodeError as error:
        raise OptionError(
            f"the calibration file {path} is no text: byte {error.start} is not UTF-8; {again}"
        ) from None
    if "\0" in text:
        raise OptionError(f"the calibration file {path} is no text: it holds zero bytes; {again}")
    ids = tokenizer.encode(text)
    if len(ids) < FEWEST:
        raise OptionError(
            f"the calibration file {path} is too short: {len(ids)} tokens, at least {FEWEST} are needed; {again}"
        )
    return windows_of(tokenizer, ids, windows, spread=True)


def digest(ids: mx.array) -> str:
    """SHA-256 by which a calibration is known, in hex."""
    return hashlib.sha256(
        f"{list(ids.shape)}".encode() + np.array(ids, dtype=np.int32).tobytes()
    ).hexdigest()


def questions() -> list[str]:
    """Those of our own texts."""
    return [question for question, _, _ in _texts()]


def _texts() -> list[tuple[str, str, str]]:
    """Question, reasoning and answer of each of our own texts."""
    texts = (
        text.split(BETWEEN_PARTS) for text in TEXTS.read_text(encoding="utf-8").split(BETWEEN_TEXTS)
    )
    return [
        (question.strip(), reasoning.strip(), answer.strip())
        for question, reasoning, answer in texts
    ]


def windows_of(tokenizer: Tokenizer, ids: Sequence[int], windows: int, *, spread: bool) -> mx.array:
    """Whole windows of ``ids``, bos before each."""
    length = min(WINDOW - 1, len(ids))
    there = len(ids) // length
    count = min(windows, there)
    first = [length * (i * there // count if spread else i) for i in range(count)]
    return mx.array([[tokenizer.bos_id, *ids[start : start + length]] for start in first], mx.int32)
