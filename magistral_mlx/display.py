"""Showing a reply while it arrives: the answer on stdout, everything else on stderr."""

import os
import shutil
import sys
from collections.abc import Generator
from dataclasses import dataclass
from typing import TextIO

from magistral_mlx.reasoning import Segment, visible
from magistral_mlx.reply import Reply, Usage


def show_status(text: str) -> None:
    """One line on a terminal's stderr that the next one replaces; "" removes it."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be removed
        sys.stderr.write(f"\r\x1b[K{visible(text)[:width]}")
        sys.stderr.flush()


@dataclass
class Display:
    """Shows a reply while it arrives: the answer on stdout, so that a pipe gets nothing else; the trace on stderr.

    What a terminal would obey is made visible; a pipe or a file gets the model's text as it is.
    """

    hides_reasoning: bool = False
    hides_answer: bool = False
    reasoning: str = ""
    answer: str = ""
    has_status: bool = False

    def show(self, segment: Segment) -> None:
        if segment.kind == "progress":
            self.tell(f"reading the prompt: {segment.text} tokens")
        elif segment.kind == "reasoning":
            self.reasoning += segment.text
            if self.hides_reasoning:
                self.tell(f"reasoning: {len(self.reasoning):,} characters")
            else:
                self.tell("")
                write(sys.stderr, segment.text, is_dim=True)
        elif segment.kind == "answer":
            if not self.answer and self.reasoning and not self.hides_reasoning:
                write(sys.stderr, "\n\n")
            self.answer += segment.text
            if self.hides_answer:
                self.tell(f"answering: {len(self.answer):,} characters")
            else:
                self.tell("")
                write(sys.stdout, segment.text)

    def tell(self, status: str) -> None:
        """Set the status line, or remove it, but never a line of the reply that stands in its place."""
        if status or self.has_status:
            show_status(status)
        self.has_status = bool(status)

    def end(self) -> None:
        """Finish the last line."""
        self.tell("")
        if self.answer and not self.hides_answer:
            write(sys.stdout, "\n")
        elif self.reasoning and not self.hides_reasoning:
            write(sys.stderr, "\n")

    def show_all(self, stream: Generator[Segment, None, Reply]) -> Reply | None:
        """Show a whole stream; None if Ctrl-C ended it, which leaves the model usable."""
        try:
            while True:
                try:
                    self.show(next(stream))
                except StopIteration as end:
                    reply: Reply = end.value
                    return reply
        except KeyboardInterrupt:
            stream.close()
            return None
        finally:
            self.end()


def write(stream: TextIO, text: str, *, is_dim: bool = False) -> None:
    if stream.isatty():
        text = visible(text)
        if is_dim and "NO_COLOR" not in os.environ:
            text = f"\x1b[2m{text}\x1b[22m"
    stream.write(text)
    stream.flush()


def report(reply: Reply, label: str = "") -> None:
    """What a reply cost, as one line on stderr, and how it ended if not by itself."""
    ended = "" if reply.finish_reason == "stop" else f"ended by {reply.finish_reason}; "
    print(f"{label}{ended}{figures(reply.usage)}", file=sys.stderr)


def figures(usage: Usage) -> str:

    def rate(tokens: int, seconds: float) -> str:
        return f"{tokens / seconds:,.1f} tok/s" if tokens > 0 and seconds > 0 else "-"

    cached = f" ({usage.cached_tokens:,} cached)" if usage.cached_tokens else ""
    left_out = f"; {usage.forgotten_turns} oldest turns left out" if usage.forgotten_turns else ""
    return (
        f"prompt {usage.prompt_tokens:,} tokens{cached}, "
        f"{rate(usage.prompt_tokens - usage.cached_tokens, usage.prefill_seconds)}; "
        f"reply {usage.completion_tokens:,} tokens ({usage.reasoning_tokens:,} reasoning), "
        # the first token came with the prompt's pass
        f"{rate(usage.completion_tokens - 1, usage.decode_seconds)}; "
        f"first token after {usage.prefill_seconds:.2f} s; peak memory {in_units(usage.peak_memory_bytes)}{left_out}"
    )


def in_units(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
