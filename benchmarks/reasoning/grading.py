"""The integer or letter that an answer states last, without its trace.

A value counts in a box, or after words such as "the answer is", or else in the last line with a
number. An answer with two values states none, and neither does a fraction, a power or a number in
words.
"""

import re
from collections.abc import Iterator

ANSWER = "answer|result|réponse|résultat|antwort|ergebnis|respuesta|resultado|risposta|risultato"
ANSWER += "|resposta"
VERB = r"is|was|equals|must be|should be|would be|will be|est|ist|lautet|es|è|é|vaut|=|:|—|–"
MARKER = re.compile(
    rf"\b(?:{ANSWER})\b(?P<between>[^.\n:=]{{0,60}}?)[\s*_#]*(?:(?:{VERB})(?!\w)|\n)[\s*_]*:?", re.I
)
BOX = re.compile(r"\\f?box(?:ed)?\s*\{")

NUMBER = re.compile(
    r"(?<![\w.^/])(?<!\d,)(?P<sign>[-+]\s*)?(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
    r"(?P<fraction>\.\d+)?(?![\w^/]|\.\d)"
)
# After a value, these words begin a reason or a remark, which may hold other numbers.
REMARK = re.compile(
    r"\s*(?:,?\s*\b(?:since|because|as|where|which|for|from|with|when|if|given|rather"
    r"|instead|not|and not|so|by)\b"
    r"|[;:(]|,\s)",
    re.I,
)
HEDGE = re.compile(
    r"^\s*(?:[,/&]|or\b|and\b(?! not\b)|ou\b|oder\b|o\b)\s*[-+]?(?:either\s+)?\d", re.I
)
OPERATOR = re.compile(r"[-+*/^×·√!]")
SENTENCE_END = re.compile(r"(?<=\S)[.!?](?=\s|$)(?!\s*=)|\n")
CLAUSE_END = re.compile(r",\s+|;|\b(?:and|so|hence|thus)\b")
ASIDE = re.compile(r"\s*\b(?:as|since|because|where|which|with|when|from|given)\b")
# y = 9 after x = 7.
SECOND = re.compile(r"^\s*(?:[,;&]|and\b|or\b)\s*[a-zA-Z]\w{0,2}\s*=\s*[-+]?\d")

LETTER_END = (
    r"(?=\s*(?:$|\n|[^\w\s'’/&+-]|['’](?!\w))"
    r"|\s+(?:because|since|as|is|for|given|and not|not|rather|[-–—])(?!\w))"
)
OPENING = r"[\s*_$:({\[\\`'\"“]*"
LETTER = re.compile(
    rf"^{OPENING}(?:(?i:option|choice|letter|text|textbf|mathbf|mathrm|rm|therefore|thus|then|clearly)\b{OPENING})*"
    rf"(?P<letter>[A-D])"
    rf"{LETTER_END}"
)
SMALL_LETTER = re.compile(
    r"^[\s*_$:]*(?:\((?P<bracketed>[a-d])\)|(?P<listed>[a-d])\)\s|(?P<alone>[a-d])[\s*_.)]*(?:$|\n))"
)
LETTER_MARKER = re.compile(
    rf"\b(?:{ANSWER}|option|choice)\b(?P<between>[^.\n:=]{{0,40}}?)[\s*_#]*(?:(?:{VERB})(?!\w)|\n)[\s*_]*:?",
    re.I,
)
SO = r"\b(?:[Ss]o|[Tt]hus|[Hh]ence|[Tt]herefore)\s+"
BEFORE_CHOICE = rf"\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s+\(?|\(|(?m:^)[\s*]*|[.,:]\s+|{SO}"
CHOSEN = re.compile(
    rf"(?:{BEFORE_CHOICE})(?P<letter>[A-D])\)?[\s*]*"
    r"(?:is|as) (?:the )?(?:\w+ )?(?:correct|right|answer|best)|"
    r"\b(?:choose|select|pick)\s+(?:option |choice |answer )?[*(]*(?P<picked>[A-D])\b"
)
LAST_LINE = re.compile(r"^[\s*_$(]*(?P<letter>[A-D])(?:[\s*_$.)]*$|[).:]\s+\S.*$)")
OTHER_LETTER = re.compile(
    r"^[\s*_$)\]}]*(?:[,/&+]|or\b|and\b|und\b|ou\b)\s*(?:also\s+|option\s+|maybe\s+)?[*_$(]*[A-D]\b"
)


def final_integer(answer: str) -> int | None:
    """Return the integer that an answer states; None for no integer or several."""
    text = plain(answer)
    for stated in reversed(list(_statements(text, MARKER))):
        if re.search(r"[\w\\]", stated):
            return _value(stated)
    sentences = [sentence for sentence in SENTENCE_END.split(text) if re.search(r"\d", sentence)]
    return _last_of(sentences[-1]) if sentences else None


def final_letter(answer: str) -> str | None:
    """Return the letter of A to D that an answer chooses; None for no letter or several."""
    text = plain(answer)
    for stated in reversed(list(_statements(text, LETTER_MARKER, whole_lines=True))):
        chosen = LETTER.match(stated)
        if chosen:
            return None if OTHER_LETTER.match(stated[chosen.end() :]) else chosen["letter"]
        small = SMALL_LETTER.match(stated)
        if small:
            return (small["bracketed"] or small["listed"] or small["alone"]).upper()
        is_several = re.match(r"^[\s*_$:(]*[A-D](?:\b(?!\s+[a-z])|[A-D]+\b)", stated)
        if is_several:
            return None
    named = list(CHOSEN.finditer(text))
    if named:
        return named[-1]["letter"] or named[-1]["picked"]
    lines = [line for line in text.splitlines() if line.strip()]
    last = LAST_LINE.match(lines[-1]) if lines else None
    return None if last is None else last["letter"]


def plain(text: str) -> str:
    """Remove the parts of LaTeX and typography that change no value."""
    text = text.translate({0x2212: "-", 0xA0: " ", 0x202F: "", 0x2009: ""})
    text = text.replace("{,}", ",").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"\\[,!;:> ]", "", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|°", "", text)
    text = re.sub(r"\\p?mod\s*\{?\s*\d+\s*\}?|\(\s*mod\s+\d+\s*\)", "", text)
    text = re.sub(r"\\equiv\b|≡", "=", text)
    text = re.sub(r"\\(?:cdot|times)\b", "×", text)
    text = re.sub(r"\\(?:q?quad|left|right|displaystyle|ldots|dots|,)\b", " ", text)
    text = re.sub(r"\\[()\[\]]|\$", " ", text)
    return re.sub(r"\\%|%", "", text)


def _statements(text: str, marker: re.Pattern[str], *, whole_lines: bool = False) -> Iterator[str]:
    """Yield the text from each marker to the end of its sentence, and in each box, in order."""
    found: list[tuple[int, str]] = []
    for match in BOX.finditer(text):
        inside = _braced(text, match.end())
        if inside is not None:
            found.append((match.start(), inside))
    for match in marker.finditer(text):
        if re.search(r"\b(?:not|no|isn't)\b", match["between"]):
            continue
        rest = text[match.end() :].lstrip(" \t\n*_#:=")
        negated = re.match(r"not\b[^.\n]*?\bbut\b", rest)
        if negated:
            rest = rest[negated.end() :]
        elif re.match(r"not\b", rest):
            continue
        if match[0].rstrip().endswith("=") and re.search(
            r"\b(?:for|when|if|with)\b", match["between"]
        ):
            rest = re.sub(r"^[^.\n]*?\bis\b", "", rest, count=1)
        end = re.search(r"\n", rest) if whole_lines else SENTENCE_END.search(rest)
        stated = rest[: end.start()] if end else rest
        box = BOX.search(stated)
        if box is None:
            found.append((match.start(), stated))
    return (stated for _, stated in sorted(found, key=lambda one: one[0]))


def _braced(text: str, start: int) -> str | None:
    """Return the text from ``start`` to the brace that closes the one before it."""
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start:i]
    return None


def _last_of(line: str) -> int | None:
    """Return the value of a line's last clause with a number, if no marker names the answer."""
    outside = re.sub(r"\([^()]*\)", " ", line)
    line = outside if NUMBER.search(outside) else line
    clauses = [c for c in CLAUSE_END.split(line) if NUMBER.search(c) and not ASIDE.match(c)]
    if not clauses:
        return None
    clause = clauses[-1]
    found = _value(clause.rpartition(":")[2]) if "=" in clause else None
    numbers = list(NUMBER.finditer(clause))
    if found is not None:
        return found
    is_open = len(numbers) > 1 and HEDGE.match(clause[numbers[-2].end() :])
    return None if is_open else _value(clause[numbers[-1].start() :])


def _value(stated: str) -> int | None:
    """Return the one integer of a statement; in a chain of equations the last lone number."""
    stated = re.sub(r"\\(?:text|textbf|textit|mathbf|mathrm|bf|rm|boldsymbol)\b\s*", " ", stated)
    stated = (
        re.sub(r"(?<!\\)[{}*_`~]|\\boxed|\\fbox", " ", stated) if "\\frac" not in stated else stated
    )
    if re.search(r"\\(?:frac|sqrt|binom|pi\b)", stated):
        sides = [side for side in stated.split("=") if "\\" not in side]
        stated = "=".join(sides)
    first = NUMBER.search(stated)
    if first is None:
        return None
    remark = REMARK.search(stated, first.end())
    if HEDGE.match(stated[first.end() :]) or SECOND.match(stated[first.end() :]):
        return None
    clause = stated if remark is None else stated[: remark.start()]
    if "=" in stated[first.end() :].lstrip()[:1]:
        # The first side of this equation is a number.
        second = REMARK.search(stated, stated.index("=", first.end()) + 1)
        clause = stated if second is None else stated[: second.start()]
    for side in reversed(clause.split("=")):
        numbers = list(NUMBER.finditer(side))
        if len(numbers) == 1 and not _is_expression(side, numbers[0]):
            return _number(numbers[0])
    return None


def _is_expression(side: str, number: re.Match[str]) -> bool:
    """Return True if the number is an operand."""
    before, after = side[: number.start()].rstrip()[-1:], side[number.end() :].lstrip()[:1]
    return bool(
        (before and OPERATOR.match(before))
        or (after and OPERATOR.match(after) and after not in "!-")
    )


def _number(match: re.Match[str]) -> int | None:
    if match["fraction"] and match["fraction"].strip(".0"):
        return None
    digits = int(match["digits"].replace(",", ""))
    return -digits if (match["sign"] or "").strip() == "-" else digits
