"""The text of a reply: its trace told from its answer, stop strings, and what is safe to show. Strings only."""

from collections.abc import Sequence
from typing import Literal

from magistral_mlx.tokenizer.segments import Text

OPEN, CLOSE = "<think>", "</think>"
EMPTY_TRACE = "<think>\n</think>\n"  # put after the prompt, it asks for an answer without a trace
THINK_CLOSE = "\n</think>\n\n"  # written into a trace, it ends it


def last_line(text: str, line: str) -> str:
    """What puts a line of its own behind a text that ends in ``text``; "" for none."""
    return line if not line or not text or text.endswith("\n") else f"\n{line}"


def closing(text: str, line: str = "") -> str:
    """What ends a trace that so far ends in ``text``: a last line, if there is one, and a closing tag on its own.

    Of a tag that the text has begun, the rest.
    """
    begun = text[len(text) - _held_length(text, (CLOSE, "\n" + CLOSE)) :]
    if CLOSE[:2] in begun:
        return THINK_CLOSE.removeprefix("\n").removeprefix(begun.removeprefix("\n"))
    return last_line(text, line) + (THINK_CLOSE if line else last_line(text, THINK_CLOSE[1:]))


class Splitter:
    """Tells reasoning from answer in one reply, whose tags come as control ids: ``open`` and ``close``.

    A trace opens where only white space came before, and closes with the first closing tag; any other tag
    changes nothing. White space before the reply belongs to neither part. A trace that never closes is
    reasoning to its end.

    Attributes:
        state: the part that the next text belongs to, "start" while a trace may still open.
        was_opened: whether a trace was opened.
    """

    def __init__(self, *, thinking: bool = True) -> None:
        self.state: Literal["start", "reasoning", "answer"] = "start" if thinking else "answer"
        self.was_opened = False

    def open(self) -> None:
        """The opening tag comes next."""
        if self.state == "start":
            self.state, self.was_opened = "reasoning", True

    def close(self) -> None:
        """The closing tag comes next."""
        if self.state == "reasoning":
            self.state = "answer"

    def push(self, text: str) -> list[Text]:
        """Take the next piece of the reply, and give the segments that are certain by now."""
        if self.state == "start":
            text = text.lstrip()
        if not text:
            return []
        if self.state == "start":
            self.state = "answer"
        return [Text(self.state, text)]

    def flush(self) -> list[Text]:
        """The text still held back, once the reply has ended."""
        return []


class TagSplitter(Splitter):
    """As Splitter, for a reply that spells its tags ``<think>`` and ``</think>``, and may arrive in any pieces.

    One newline after ``<think>``, one before ``</think>`` and all newlines before the answer are the
    protocol's too. At most ``len("</think>")`` characters are held back.
    """

    def __init__(self, *, thinking: bool = True) -> None:
        super().__init__(thinking=thinking)
        self._held = ""
        self._is_at_edge = True  # no text of this part has come yet

    def push(self, text: str) -> list[Text]:
        self._held += text
        segments = []
        if self.state == "start":
            self._start()
        if self.state == "reasoning" and (reasoning := self._reasoning()):
            segments.append(Text("reasoning", reasoning))
        if self.state == "answer" and (answer := self._answer()):
            segments.append(Text("answer", answer))
        return segments

    def flush(self) -> list[Text]:
        held, self._held = self._held, ""
        return super().push(held)

    def _start(self) -> None:
        self._held = self._held.lstrip()
        if self._held.startswith(OPEN):
            self._held = self._held.removeprefix(OPEN)
            self.open()
        elif not OPEN.startswith(self._held):
            self.state = "answer"

    def _reasoning(self) -> str:
        if self._is_at_edge and self._held:
            self._held = self._held.removeprefix("\n")
            self._is_at_edge = False
        reasoning, close, rest = self._held.partition(CLOSE)
        if close:
            self.close()
            self._held, self._is_at_edge = rest, True
            return reasoning.removesuffix("\n")
        certain = len(self._held) - _held_length(self._held, (CLOSE, "\n" + CLOSE))
        reasoning, self._held = self._held[:certain], self._held[certain:]
        return reasoning

    def _answer(self) -> str:
        answer, self._held = self._held, ""
        if self._is_at_edge:
            answer = answer.lstrip("\n")
            self._is_at_edge = not answer
        return answer


class StopStrings:
    """Ends an answer at the first of several strings, which is not part of it.

    They apply to the answer only: a stop such as a newline must not end the trace. The string that is
    complete first wins, and of two complete at once the longer.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece of the answer; gives what is certain by now, and whether a stop string was reached."""
        text, self._held = self._held + text, ""
        found = [
            (start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0
        ]
        if found:
            return text[: min(found)[1]], True
        certain = len(text) - _held_length(text, self._stop)
        self._held = text[certain:]
        return text[:certain], False

    def flush(self) -> str:
        """The text still held back, once the reply has ended without a stop string."""
        held, self._held = self._held, ""
        return held


def _held_length(text: str, tags: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that may be the beginning of one of ``tags``."""
    longest = max((len(tag) for tag in tags), default=1) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if any(tag.startswith(text[-n:]) for tag in tags)), 0)


# Controls but newline and tab, and the characters that reorder the text after them: a terminal, or the eye, obeys them.
_HARMFUL = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_VISIBLE = {
    c: f"\\x{c:02x}" if c < 0x100 else f"\\u{c:04x}" for c in _HARMFUL if c not in (0x09, 0x0A)
}


def visible(text: str) -> str:
    r"""``text`` made harmless for a terminal: controls and text-direction overrides as ``\x1b``, ``\u202e``."""
    return text.translate(_VISIBLE)
