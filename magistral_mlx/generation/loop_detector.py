"""The loop detector: finds a block of tokens that repeats, exactly or with other numbers.

It works on strings and needs no model. Honest text repeats itself too: rules of ``=``, rows of
zeros, tables, columns of closing brackets. Such blocks have few words, so a block of few words must
repeat for much longer.
"""

from collections.abc import Sequence

import numpy as np

# Most tokens of a block.
LONGEST = 1024
# Stands for every number where only numbers change.
NUMBER = "0"

EXACT_REPETITIONS = 3
# Least tokens of the repetitions together: a block of 20 tokens is found at its third repetition.
EXACT_TOKENS = 60
# Least different words of a block. With fewer words it must take DULL_TOKENS.
EXACT_WORDS = 3
DULL_TOKENS = 400
NEAR_REPETITIONS = 8
NEAR_TOKENS = 200
# Least different words of a block whose numbers change. Half of its tokens must be words, too: the
# block is a sentence, not a row of a table or of code.
NEAR_WORDS = 5


class LoopDetector:
    """Takes a text token by token and tells when its end repeats itself.

    An exact repetition is found with its third block, once the blocks have 60 tokens together (400
    if a block has fewer than three different words). A repetition with other numbers is found with
    its eighth block, once the blocks have 200 tokens together, and only if a block has five
    different words and little else. Blocks have up to 1,024 tokens. A token takes microseconds,
    whatever came before it.
    """

    def __init__(self) -> None:
        self._exact = _Periods(EXACT_REPETITIONS)
        self._near = _Periods(NEAR_REPETITIONS)
        self._ends_in_number = False

    def push(self, piece: str) -> bool:
        """Take the text of one token; return True if a loop is certain by now."""
        has_digit = piece.strip().isdigit()
        is_found = self._is_exact(self._exact.push(piece))
        if has_digit and self._ends_in_number:
            # The digits of a number are one symbol, so that 99 and 100 differ in nothing else.
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
    """A sequence of symbols, and for every period the length of the end that repeats with it."""

    def __init__(self, repetitions: int) -> None:
        self._wanted = np.arange(1, LONGEST + 1) * (repetitions - 1)
        # At p - 1: how many of the last symbols equal the symbol p before.
        self._equal = np.zeros(LONGEST, np.int64)
        self._symbols: dict[str, int] = {}
        self._names: list[str] = []
        self._history = np.full(4 * LONGEST, -1, np.int64)
        # Tokens up to each symbol.
        self._tokens = np.zeros(4 * LONGEST, np.int64)
        self._end = LONGEST

    def push(self, name: str) -> int:
        """Append a symbol; return the shortest period that is repeated often enough, or 0."""
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
        """Count one token more for the last symbol."""
        self._tokens[self._end - 1] += 1

    def last(self, count: int) -> list[str]:
        """Return the names of the last symbols."""
        return [self._names[symbol] for symbol in self._history[self._end - count : self._end]]

    def covered(self, period: int) -> int:
        """Return the tokens that a period's repetitions take, as far as they are remembered."""
        count = min(int(self._equal[period - 1]) + period, self._end - 1)
        return int(self._tokens[self._end - 1] - self._tokens[self._end - 1 - count])


def _words(pieces: Sequence[str]) -> int:
    """Count different words, or parts of words."""
    return len({piece.strip().casefold() for piece in pieces if _is_word(piece)})


def _is_word(piece: str) -> bool:
    return any(map(str.isalpha, piece))
