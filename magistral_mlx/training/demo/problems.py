"""Problems of the embedded model: small arithmetic and counting letters, in six languages.

Each step of a trace is a local look-up, so that two million parameters can learn it: digits go
from right to left with their carry, words piece by piece as the tokenizer cuts them.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from zlib import crc32

from magistral_mlx.training.demo.phrases import HELD_OUT_WORDS, LANGUAGES, PHRASES

KINDS = ("add", "subtract", "multiply", "letters")
ARITHMETIC = KINDS[:3]
SIGNS = {"add": "+", "subtract": "-", "multiply": "*"}

# Cuts a text into the tokenizer's pieces, in UTF-8.
Pieces = Callable[[str], list[bytes]]


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its expected trace and answer, and the number that makes an answer correct."""

    kind: str
    language: str
    question: str
    trace: str
    answer: str
    expected: int


def is_held_out(kind: str, a: int, b: int) -> bool:
    """Tell if a problem is held out of training: one in sixteen is, in this order of operands."""
    return crc32(f"{a}{SIGNS[kind]}{b}".encode()) % 16 == 0


def is_unseen(kind: str, a: int, b: int) -> bool:
    """Tell if training saw the problem in neither order.

    The other order would give it away: 5 * 941 is 941 * 5, and 7 - 9 is -(9 - 7).
    """
    return is_held_out(kind, a, b) and is_held_out(kind, b, a)


def arithmetic(kind: str, a: int, b: int, language: str, question: str) -> Problem:
    """Make the problem of two operands, with its worked trace."""
    phrases = PHRASES[language]
    if kind == "add":
        lines, expected = _sum_lines(a, b, phrases.carry), a + b
    elif kind == "subtract":
        lines, expected = _difference_lines(a, b, phrases.borrow), a - b
    else:
        lines, expected = _product_lines(max(a, b), min(a, b), phrases.carry), a * b
    trace = "\n".join([phrases.intro, *lines, f"= {expected}"])
    return Problem(kind, language, question, trace, phrases.result.format(r=expected), expected)


def _columns(a: int, b: int) -> list[tuple[int, int]]:
    """Pair the digits of both numbers, units first; the shorter one is filled with zeros."""
    width = max(len(str(a)), len(str(b)))
    return [
        (int(x), int(y))
        for x, y in zip(str(a).zfill(width)[::-1], str(b).zfill(width)[::-1], strict=True)
    ]


def _sum_lines(a: int, b: int, word: str) -> list[str]:
    lines, carry = [f"{a}+{b}"], 0
    for x, y in _columns(a, b):
        total = x + y + carry
        terms = f"{x}+{y}+{carry}" if carry else f"{x}+{y}"
        lines.append(f"{terms}={total}: {total % 10}" + (f" {word} 1" if total > 9 else ""))
        carry = total // 10
    return lines + ["1"] * carry


def _difference_lines(a: int, b: int, word: str) -> list[str]:
    lines, borrow = [f"{a}-{b}"], 0
    if a < b:
        lines.append(f"{a}<{b}: -({b}-{a})")
        a, b = b, a
    for x, y in _columns(a, b):
        ten = 10 * (x - y - borrow < 0)
        terms = f"{x + ten}-{y}-1" if borrow else f"{x + ten}-{y}"
        lines.append(f"{terms}={x + ten - y - borrow}" + (f" {word} 1" if ten else ""))
        borrow = ten // 10
    return lines


def _product_lines(a: int, b: int, word: str) -> list[str]:
    lines, carry = [f"{a}*{b}"], 0
    for digit in map(int, reversed(str(a))):
        total = digit * b + carry
        terms = f"{digit}*{b}={digit * b}+{carry}={total}" if carry else f"{digit}*{b}={total}"
        lines.append(f"{terms}: {total % 10}" + (f" {word} {total // 10}" if total > 9 else ""))
        carry = total // 10
    return lines + [str(carry)] * (carry > 0)


def letters(letter: str, word: str, language: str, template: str, pieces: Pieces) -> Problem:
    """Make the problem of counting a letter, in either case, in a word.

    ``template`` holds ``{c}`` and, once, ``{w}``. An é does not count as an e.
    """
    phrases = PHRASES[language]
    template = template.replace("{c}", letter)
    question = template.replace("{w}", word)
    lines, count = [phrases.spell], 0
    for piece in _pieces_of(question, template.index("{w}"), len(word), pieces):
        shown = []
        for c in piece.strip():
            count += c.lower() == letter
            shown.append(f"{c}{count}")
        lines.append(f"{piece}: {' '.join(shown)}")
    answer = phrases.count.format(c=letter, r=count, t=phrases.times[count != 1])
    return Problem("letters", language, question, "\n".join([*lines, f"= {count}"]), answer, count)


def _pieces_of(question: str, start: int, length: int, pieces: Pieces) -> list[str]:
    """Return the tokenizer's pieces of a part of the question, with the space before it.

    Raises:
        ValueError: a piece ends inside a character, or spans the word and its neighbour.
    """
    first, last = (len(question[:i].encode()) for i in (start, start + length))
    found, position = [], 0
    for piece in pieces(question):
        end = position + len(piece)
        if end > first and position < last:
            found.append(piece.decode())
        position = end
    if "".join(found).strip() != question[start : start + length]:
        raise ValueError(f"a piece spans {question[start : start + length]!r} and its neighbour")
    return found


def ask_arithmetic(rng: random.Random, kind: str, a: int, b: int, language: str) -> Problem:
    phrases = PHRASES[language]
    if rng.random() < 0.6:
        sign = rng.choice({"add": "+", "subtract": "-\u2212-", "multiply": "*×x"}[kind])
        template = rng.choice(phrases.symbolic)
    else:
        sign, template = "", rng.choice(phrases.spoken[kind])
    return arithmetic(kind, a, b, language, _loosen(rng, template.format(a=a, b=b, s=sign)))


def ask_letters(
    rng: random.Random, letter: str, word: str, language: str, pieces: Pieces
) -> Problem:
    template = _loosen(rng, rng.choice(PHRASES[language].letters))
    if rng.random() < 0.25:
        template = template.replace("{w}", '"{w}"')
    if rng.random() < 0.2 and "{c}'s" not in template and "{c}s" not in template:
        template = template.replace("{c}", '"{c}"')
    return letters(letter, word, language, template, pieces)


def _loosen(rng: random.Random, question: str) -> str:
    """Drop the closing mark now and then, as people do."""
    return re.sub(r" ?[?.]$", "", question) if rng.random() < 0.15 else question


def random_operands(rng: random.Random, kind: str) -> tuple[int, int]:
    def number(digits: int) -> int:
        return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)

    if kind == "multiply":
        a, b = number(rng.choice((1, 2, 2, 3, 3, 3))), number(1)
        return (a, b) if rng.random() < 0.8 else (b, a)
    a, b = number(rng.choice((1, 2, 2, 3, 3, 3))), number(rng.choice((1, 2, 2, 3, 3, 3)))
    return (b, a) if kind == "subtract" and a < b and rng.random() < 0.7 else (a, b)


def close_operands(rng: random.Random) -> tuple[int, int]:
    """Draw two numbers below 1,000: uniformly, or the second near the first.

    Near numbers have small differences, whose sign and borrows are the hardest to get right.
    """
    a = rng.randrange(1000)
    if rng.random() < 0.5:
        return a, rng.randrange(1000)
    return a, min(max(a + rng.randint(-120, 120), 0), 999)


def held_out_problems(
    n: int, seed: int, pieces: Pieces, kinds: Sequence[str] = ARITHMETIC
) -> list[Problem]:
    """Make ``n`` problems that training never saw, with kinds in turn and languages at random."""
    rng = random.Random(seed)
    found: list[Problem] = []
    while len(found) < n:
        kind, language = kinds[len(found) % len(kinds)], rng.choice(LANGUAGES)
        if kind == "letters":
            word = rng.choice(HELD_OUT_WORDS[language].split())
            letter = rng.choice(word.lower() if rng.random() < 0.85 else "aeirst")
            if not letter.isascii():
                continue
            found.append(ask_letters(rng, letter, word, language, pieces))
        else:
            a, b = random_operands(rng, kind)
            if is_unseen(kind, a, b):
                found.append(ask_arithmetic(rng, kind, a, b, language))
    return found


def is_correct(problem: Problem, answer: str) -> bool:
    """Tell if the last number of an answer is the expected one."""
    numbers = re.findall(r"-?\d+", answer.replace("\u2212", "-"))
    return bool(numbers) and int(numbers[-1]) == problem.expected
