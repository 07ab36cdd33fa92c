"""Texts to measure quality on: ours in the wire form of a release, or windows of a file."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from magistral_mlx.convert.calibration.corpus import BETWEEN_PARTS, BETWEEN_TEXTS, read_calibration
from magistral_mlx.errors import OptionError
from magistral_mlx.tokenizer.tekken import Tokenizer
from magistral_mlx.training.demo.problems import KINDS, held_out_problems

OURS = Path(__file__).parent / "quality.txt"  # shares no text with the calibration
TRACE, ANSWER, TEXT = "trace", "answer", "text"
TEXT_SEED = 61  # of the demo's problems; its answers are to others


@dataclass(frozen=True, slots=True)
class Texts:
    """Sequences of ids, and the parts that they belong to.

    Attributes:
        ids: ``[B, T]`` int32; shorter sequences end in padding.
        parts: ``[B, T - 1]``, the place in ``names`` for each id but the first; -1 is not counted.
        names: such as trace and answer.
    """

    ids: mx.array
    parts: NDArray[np.int8]
    names: tuple[str, ...]


def our_texts(tokenizer: Tokenizer, *, most: int | None = None) -> Texts:
    """Return questions with their traces and answers, in languages of the card."""
    texts = OURS.read_text(encoding="utf-8").split(BETWEEN_TEXTS)[:most]
    parts = [[part.strip() for part in text.split(BETWEEN_PARTS)] for text in texts]
    return conversations(
        tokenizer, [(question, trace, answer) for question, trace, answer in parts]
    )


def demo_texts(tokenizer: Tokenizer, count: int) -> Texts:
    """Return problems the embedded model was not trained on, with traces as it learned them."""
    problems = held_out_problems(count, TEXT_SEED, tokenizer.pieces, KINDS)
    return conversations(tokenizer, [(p.question, p.trace, p.answer) for p in problems])


def conversations(tokenizer: Tokenizer, texts: Sequence[tuple[str, str, str]]) -> Texts:
    """Encode conversations; trace and answer count, with tags and the last id."""
    sequences, parts = [], []
    for question, trace, answer in texts:
        asked = {"role": "user", "content": question}
        prompt = tokenizer.encode_chat([asked])
        replied = {"role": "assistant", "reasoning": trace, "content": answer}
        whole = tokenizer.encode_chat([asked, replied, asked])
        assert whole[: len(prompt)] == prompt
        end = next(i for i in range(len(prompt), len(whole)) if whole[i] in tokenizer.stop_ids) + 1
        sequences.append(whole[:end])
        parts.append([-1] * (len(prompt) - 1) + kinds(tokenizer, whole[len(prompt) : end]))
    width = max(map(len, sequences))
    padded = [ids + [tokenizer.pad_id] * (width - len(ids)) for ids in sequences]
    unpadded = [numbers + [-1] * (width - 1 - len(numbers)) for numbers in parts]
    return Texts(mx.array(padded, mx.int32), np.array(unpadded, np.int8), (TRACE, ANSWER))


def kinds(tokenizer: Tokenizer, reply: list[int]) -> list[int]:
    """Return for each id of a reply 0 until the trace has closed, and 1 after it."""
    text, splitter, found = tokenizer.detokenizer(), tokenizer.splitter(thinking=True), []
    for token_id in reply:
        found.append(int(splitter.state == "answer"))
        splitter.push(text.push(token_id))
        if token_id == tokenizer.open_id:
            splitter.open()
        elif token_id == tokenizer.close_id:
            splitter.close()
    return found


def texts_of_file(path: str | os.PathLike[str], tokenizer: Tokenizer, *, windows: int) -> Texts:
    """Return windows of 512 ids from all over a text file.

    Raises:
        OptionError: the file is missing, empty, no UTF-8 text or too short.
    """
    try:
        ids = read_calibration(path, tokenizer, windows=windows)
    except OptionError as error:
        raise OptionError(
            str(error).replace("calibration file", "text").replace("--calibration", "--text")
        ) from None
    return Texts(ids, np.zeros((ids.shape[0], ids.shape[1] - 1), np.int8), (TEXT,))
