"""Text of a reply: split trace from answer, find stop strings, make text safe to show."""

from collections.abc import Sequence
from typing import Literal

from magistral_mlx.tokenizer.segments import Text

OPEN, CLOSE = "<think>", "</think>"
# After the prompt, it asks for an answer without a trace.
EMPTY_TRACE = "<think>\n</think>\n"
# Written into a trace, it ends it.
THINK_CLOSE = "\n</think>\n\n"


def last_line(text: str, line: str) -> str:
    """Return ``line``, on a line of its own after ``text``; "" if there is no line."""
    return line if not line or not text or text.endswith("\n") else f"\n{line}"


def closing(text: str, line: str = "") -> str:
    """Return what ends a trace after ``text``: a last line, if any, and a closing tag.

    If the text has begun a tag, that is the rest of the tag.
    """
    begun = text[len(text) - _held_length(text, (CLOSE, "\n" + CLOSE)) :]
    if CLOSE[:2] in begun:
        return THINK_CLOSE.removeprefix("\n").removeprefix(begun.removeprefix("\n"))
    return last_line(text, line) + (THINK_CLOSE if line else last_line(text, THINK_CLOSE[1:]))


class Splitter:
    """Splits one reply, whose tags are control ids, into reasoning and answer.

    A trace opens if only white space came before, and closes with the first closing tag. Any other
    tag changes nothing. White space before the reply belongs to neither part. A trace that never
    closes is reasoning to its end.

    Attributes:
        state: part of the next text; "start" while a trace may still open.
        was_opened: a trace was opened.
    """

    def __init__(self, *, thinking: bool = True) -> None:
        self.state: Literal["start", "reasoning", "answer"] = "start" if thinking else "answer"
        self.was_opened = False

    def open(self) -> None:
        """Note an opening tag before the next text."""
        if self.state == "start":
            self.state, self.was_opened = "reasoning", True

    def close(self) -> None:
        """Note a closing tag before the next text."""
        if self.state == "reasoning":
            self.state = "answer"

    def push(self, text: str) -> list[Text]:
        """Take the next piece of the reply and return the segments that are certain by now."""
        if self.state == "start":
            text = text.lstrip()
        if not text:
            return []
        if self.state == "start":
            self.state = "answer"
        return [Text(self.state, text)]

    def flush(self) -> list[Text]:
        """Return the text that was held back, after the end of the reply."""
        return []


class TagSplitter(Splitter):
    """Splits a reply that spells its tags ``<think>`` and ``</think>``, in any pieces.

    One newline after ``<think>``, one before ``</think>`` and all newlines before the answer belong
    to the tags. At most ``len("</think>")`` characters are held back.
    """

    def __init__(self, *, thinking: bool = True) -> None:
        super().__init__(thinking=thinking)
        self._held = ""
        # True until this part has text.
        self._is_at_edge = True

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
    """Ends an answer before the first of several strings.

    They apply to the answer only: a newline as a stop string must not end the trace. The string
    that is complete first wins; of two that are complete at once, the longer.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece of the answer.

        Returns:
            The text that is certain by now, and whether a stop string was reached.
        """
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
        """Return the text that was held back, if the reply ended without a stop string."""
        held, self._held = self._held, ""
        return held


def _held_length(text: str, tags: Sequence[str]) -> int:
    """Return the length of the longest end of ``text`` that may begin one of ``tags``."""
    longest = max((len(tag) for tag in tags), default=1) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if any(tag.startswith(text[-n:]) for tag in tags)), 0)
