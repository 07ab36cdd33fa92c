"""Finds out that a model repeats itself: the same block of tokens, or one in which only numbers change. Strings only.

What is said of a loop needs no model, but marks, and honest text repeats itself too: rules of ``=``, rows of zeros,
tables, columns of closing brackets. Those have few words, so a block of few words must go on for much longer.
"""

from collections.abc import Sequence

import numpy as np

LONGEST = 1024  # tokens of a block at most
NUMBER = "0"  # stands for every number where only numbers change

EXACT_REPETITIONS = 3
EXACT_TOKENS = (
    60  # that the repetitions take together at least: a block of 20 tokens is found at its third
)
EXACT_WORDS = 3  # different ones in a block; with fewer it must take DULL_TOKENS
DULL_TOKENS = 400
NEAR_REPETITIONS = 8
NEAR_TOKENS = 200
NEAR_WORDS = 5  # different ones in a block, and half of its tokens: a sentence, not a row of a table or of code


class LoopDetector:
    """Takes a text token by token and says when its end repeats itself.

    An exact repetition is found with its third block, once that is 60 tokens (400 where the block has fewer than
    three different words). One in which only numbers differ is found with its eighth block, once that is 200 tokens,
    and only where a block has five different words and little else. Blocks have up to 1,024 tokens. A token takes
    microseconds, whatever came before it.
    """

    def __init__(self) -> None:
        self._exact = _Periods(EXACT_REPETITIONS)
        self._near = _Periods(NEAR_REPETITIONS)
        self._ends_in_number = False

    def push(self, piece: str) -> bool:
        """Take the text of one token; whether a loop is certain by now."""
        has_digit = piece.strip().isdigit()
        is_found = self._is_exact(self._exact.push(piece))
        if (
            has_digit and self._ends_in_number
        ):  # digits of one number are one: 99 and 100 differ in nothing else
            self._near.lengthen()
        else:
            is_found |= self._is_near(self._near.push(NUMBER if has_digit else piece))
        self._ends_in_number = has_digit
        return is_found

    def _is_exact(self, period: int) -> bool:
        if not period:
            return False
        is_dull = _words(self._exact.last(period)) < EXACT_WORDS
        return self._exact.covered(period) >= (DULL_TOKENS if is_dull else EXACT_TOKENS)

    def _is_near(self, period: int) -> bool:
        if not period or self._near.covered(period) < NEAR_TOKENS:
            return False
        block = self._near.last(period)
        written = [piece for piece in block if piece.strip()]
        return (
            NUMBER in block
            and _words(block) >= NEAR_WORDS
            and 2 * sum(map(_is_word, written)) >= len(written)
        )


class _Periods:
    """A sequence of symbols, and for every period how long its end has had it."""

    def __init__(self, repetitions: int) -> None:
        self._wanted = np.arange(1, LONGEST + 1) * (repetitions - 1)
        self._equal = np.zeros(
            LONGEST, np.int64
        )  # at p - 1: how many of the last symbols equal the one p before
        self._symbols: dict[str, int] = {}
        self._names: list[str] = []
        self._history = np.full(4 * LONGEST, -1, np.int64)
        self._tokens = np.zeros(4 * LONGEST, np.int64)  # before and with each symbol
        self._end = LONGEST

    def push(self, name: str) -> int:
        """Append a symbol; the shortest period that has been repeated often enough, or 0."""
        symbol = self._symbols.setdefault(name, len(self._names))
        if symbol == len(self._names):
            self._names.append(name)
        if self._end == len(self._history):
            kept = 2 * LONGEST
            self._history[:kept], self._tokens[:kept] = self._history[-kept:], self._tokens[-kept:]
            self._end = kept
        before = self._history[self._end - LONGEST : self._end][::-1]
        self._equal += 1
        self._equal *= before == symbol
        self._history[self._end] = symbol
        self._tokens[self._end] = self._tokens[self._end - 1] + 1
        self._end += 1
        found = self._equal >= self._wanted
        return int(found.argmax()) + 1 if found.any() else 0

    def lengthen(self) -> None:
        """The last symbol takes one token more."""
        self._tokens[self._end - 1] += 1

    def last(self, count: int) -> list[str]:
        return [self._names[symbol] for symbol in self._history[self._end - count : self._end]]

    def covered(self, period: int) -> int:
        """Tokens that the repetitions of a period take; of very long ones those that are remembered."""
        count = min(int(self._equal[period - 1]) + period, self._end - 1)
        return int(self._tokens[self._end - 1] - self._tokens[self._end - 1 - count])


def _words(pieces: Sequence[str]) -> int:
    """Different words, or parts of words."""
    return len({piece.strip().casefold() for piece in pieces if _is_word(piece)})


def _is_word(piece: str) -> bool:
    return any(map(str.isalpha, piece))
