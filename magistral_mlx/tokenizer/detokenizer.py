"""Ids to text as they are generated, without ever splitting a character."""

import codecs
from collections.abc import Iterable
from typing import Protocol


class Vocabulary(Protocol):
    """Interface of a tokenizer that gives each id its bytes."""

    def is_control(self, token_id: int) -> bool: ...

    def to_bytes(self, ids: Iterable[int]) -> bytes: ...


class Detokenizer:
    """Text of ids that come one at a time: whole characters only, flushed at every control id."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def is_inside_character(self) -> bool:
        """True while the bytes of a character are incomplete."""
        return bool(self._decoder.getstate()[0])

    def push(self, token_id: int) -> str:
        """Return the characters that this id completes."""
        if self._vocabulary.is_control(token_id):
            return self.flush()
        return self._decoder.decode(self._vocabulary.to_bytes([token_id]))

    def flush(self) -> str:
        """Return the rest at the end: nothing, or U+FFFD for a character that is incomplete."""
        return self._decoder.decode(b"", final=True)
