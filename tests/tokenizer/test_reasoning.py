"""The splitter against a grammar, stop strings against a definition, text for terminals."""

import random
import re

import pytest

from magistral_mlx.errors import visible
from magistral_mlx.tokenizer.reasoning import CLOSE, Splitter, StopStrings, TagSplitter
from magistral_mlx.tokenizer.segments import Text

PIECES = [
    "<think>",
    "</think>",
    "<thi",
    "nk>",
    "</",
    "\n",
    "\n\n",
    " ",
    "a",
    "Rs. 5 < 7",
    "日本",
    "🙂",
    "</thinking>",
    "[/THINK]",
]


def joined(segments: list[Text], kind: str) -> str:
    return "".join(s.text for s in segments if s.kind == kind)


def split(pieces: list[str], *, thinking: bool = True) -> tuple[str, str]:
    splitter = TagSplitter(thinking=thinking)
    segments = [s for piece in pieces for s in splitter.push(piece)] + splitter.flush()
    assert all(s.text for s in segments)
    return joined(segments, "reasoning"), joined(segments, "answer")


def expected(text: str, *, thinking: bool = True) -> tuple[str, str]:
    """Split a whole reply by its grammar, as a regular expression."""
    if thinking and (
        trace := re.fullmatch(r"\s*<think>\n?(.*?)(?:\n?</think>(\n*)(.*))?", text, re.DOTALL)
    ):
        return trace[1], trace[3] or ""
    return "", text.lstrip() if thinking else text.lstrip("\n")


def transcripts(n: int = 200) -> list[str]:
    rng = random.Random(0)
    made = [
        "<think>\nStep 1.\n</think>\n\nFour.",
        "<think></think>x",
        "<think>\n\n</think>\n",
        "<think>\nno end\n",
        "",
        "<think",
    ]
    while len(made) < n:
        lead = rng.choice(["<think>\n", "<think>", "\n <think>\n", ""])
        made.append(lead + "".join(rng.choices(PIECES, k=rng.randrange(9))))
    return made


@pytest.mark.parametrize("thinking", [True, False])
def test_every_split_of_a_transcript_gives_the_same_parts(thinking: bool) -> None:
    for text in transcripts():
        whole = expected(text, thinking=thinking)
        assert split([text], thinking=thinking) == whole, text
        assert split(list(text), thinking=thinking) == whole, text
        for cut in range(len(text) + 1):
            assert split([text[:cut], text[cut:]], thinking=thinking) == whole, (text, cut)


def test_no_more_than_the_tag_is_held_back() -> None:
    for text in transcripts():
        splitter, kept = TagSplitter(), 0
        for i, character in enumerate(text):
            kept += sum(len(s.text) for s in splitter.push(character))
            if splitter.state == "answer" and not splitter.was_opened:
                assert kept >= len(text[: i + 1].lstrip()) - len(CLOSE)
            elif splitter.state == "reasoning" and CLOSE not in text[: i + 1]:
                assert kept >= len(text[: i + 1].lstrip()) - len("<think>\n") - len(CLOSE)


@pytest.mark.parametrize(
    ("text", "parts", "state"),
    [
        ("<think>\na\nb\n</think>\nans", ("a\nb", "ans"), "answer"),
        (
            "<think>a</think>b<think>c</think>",
            ("a", "b<think>c</think>"),
            "answer",
        ),  # tags after the first close are text
        ("The tag <think> opens a trace", ("", "The tag <think> opens a trace"), "answer"),
        (
            "<think>\nit goes on\n",
            ("it goes on\n", ""),
            "reasoning",
        ),  # cut off: all of it is reasoning
        ("<think>\na </thin", ("a </thin", ""), "reasoning"),
        ("</think>a", ("", "</think>a"), "answer"),
        ("<thinking>", ("", "<thinking>"), "answer"),
        (
            "<think>\n</think>\n\n    code",
            ("", "    code"),
            "answer",
        ),  # indentation is the answer's
        (
            "<think>a</think>\n```html\n<think>x</think>\n```\n",
            ("a", "```html\n<think>x</think>\n```\n"),
            "answer",
        ),
        (
            "<think>\n<think>\na\n</think>\nb\n</think>\nc",
            ("<think>\na", "b\n</think>\nc"),
            "answer",
        ),  # nested
    ],
)
def test_what_belongs_where(text: str, parts: tuple[str, str], state: str) -> None:
    splitter = TagSplitter()
    segments = splitter.push(text) + splitter.flush()
    assert (joined(segments, "reasoning"), joined(segments, "answer")) == parts
    assert splitter.state == state
    assert splitter.was_opened is text.startswith("<think>")


MARKS = {"[": "open", "]": "close"}  # how the transcripts below write the control ids


def split_marks(*transcript: str, thinking: bool = True) -> tuple[str, str]:
    """Split a reply whose tags are control ids and whose text comes in these pieces."""
    splitter = Splitter(thinking=thinking)
    segments = []
    for piece in (part for whole in transcript for part in re.split(r"([\[\]])", whole)):
        if piece in MARKS:
            getattr(splitter, MARKS[piece])()
        else:
            segments += splitter.push(piece)
    segments += splitter.flush()
    assert all(s.text for s in segments)
    return joined(segments, "reasoning"), joined(segments, "answer")


def expected_of_marks(transcript: str, *, thinking: bool = True) -> tuple[str, str]:
    """Split such a reply by its grammar, as a regular expression."""

    def text(part: str | None) -> str:
        return re.sub(r"[\[\]]", "", part or "")

    if thinking and (trace := re.fullmatch(r"[\s\]]*\[([^\]]*)(?:\](.*))?", transcript, re.DOTALL)):
        return text(trace[1]), text(trace[2])
    return "", text(transcript).lstrip() if thinking else text(transcript)


def test_control_ids_split_a_reply_at_every_position() -> None:
    rng = random.Random(2)
    pieces = ["[", "]", "\n", " ", "a", "<think>", "</think>", "日本🙂", "THINK"]
    made = ["[a]b", "[]b", "[a", "[", "]a", "a[b]c", "[a]b[c]d", "[a[b]c", " \n[\n a \n]\n b", ""]
    made += ["".join(rng.choices(pieces, k=rng.randrange(9))) for _ in range(400)]
    for transcript in made:
        for thinking in (True, False):
            expected_parts = expected_of_marks(transcript, thinking=thinking)
            assert split_marks(*transcript, thinking=thinking) == expected_parts, transcript
            for cut in range(len(transcript) + 1):
                halves = transcript[:cut], transcript[cut:]
                assert split_marks(*halves, thinking=thinking) == expected_parts, halves


def test_both_kinds_of_tag_give_the_same_parts() -> None:
    """Only 2506 writes newlines around the tags."""
    rng = random.Random(3)
    for _ in range(200):
        reasoning, answer = (
            "x".join(rng.choices(["a", "\n", " b", "日本"], k=rng.randrange(1, 6)))
            for _ in range(2)
        )
        reasoning, answer = f"({reasoning})", f"({answer})"
        closed = (
            split([*f"<think>\n{reasoning}\n</think>\n\n{answer}"]),
            split_marks(f"[{reasoning}]{answer}"),
        )
        cut = split([*f"<think>\n{reasoning}"]), split_marks(f"[{reasoning}")
        without = split([*answer]), split_marks(answer)
        assert closed == ((reasoning, answer),) * 2
        assert cut == ((reasoning, ""),) * 2
        assert without == (("", answer),) * 2


def test_stop_strings_end_the_answer_however_it_is_cut() -> None:
    rng = random.Random(1)
    for _ in range(1000):
        text = "".join(rng.choices("ab\nc", k=rng.randrange(12)))
        stop = tuple(
            "".join(rng.choices("ab\nc", k=rng.randrange(1, 4))) for _ in range(rng.randrange(3))
        )
        # The first prefix that ends in a stop string, less the longest such string.
        whole, stopped = text, False
        for end in range(len(text) + 1):
            ending = [s for s in stop if text[:end].endswith(s)]
            if ending:
                whole, stopped = text[: end - max(map(len, ending))], True
                break
        for pieces in [[text], list(text), *([text[:i], text[i:]] for i in range(len(text)))]:
            strings, shown, reached = StopStrings(stop), "", False
            for piece in pieces:
                if not reached:
                    new, reached = strings.push(piece)
                    shown += new
            assert (shown + strings.flush(), reached) == (whole, stopped), (text, stop, pieces)


def test_a_stop_string_is_held_back_only_as_long_as_it_may_come() -> None:
    strings = StopStrings(("END",))
    assert strings.push("the E") == ("the ", False)
    assert strings.push("N") == ("", False)
    assert strings.push("T") == ("ENT", False)


def test_nothing_that_a_terminal_obeys_is_left() -> None:
    raw = "".join(map(chr, range(0x110))) + "\u202e\u2066\x1b[2J\x1b]0;title\x07"
    shown = visible(raw)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    assert shown.endswith(r"\u202e\u2066\x1b[2J\x1b]0;title\x07")
    assert visible("é\t日本\n🙂 עברית \\x1b") == "é\t日本\n🙂 עברית \\x1b"
