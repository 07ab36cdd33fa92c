"""Show a reply while it arrives: the answer on stdout, everything else on stderr."""

import shutil
import sys
from dataclasses import dataclass
from functools import partial
from textwrap import TextWrapper
from typing import TYPE_CHECKING, TextIO

from magistral_mlx.errors import in_units, visible
from magistral_mlx.generation.reply import Reply, Usage
from magistral_mlx.streams import Progress, Stream
from magistral_mlx.terminal.window import TraceWindow, can_draw, dim, width
from magistral_mlx.tokenizer.segments import Segment, Text

if TYPE_CHECKING:
    from magistral_mlx.terminal.markdown import MarkdownWriter

WRAPPER = partial(TextWrapper, expand_tabs=False, replace_whitespace=False, break_on_hyphens=False)


def show_status(text: str) -> None:
    """Show one line on a terminal's stderr, in place of the last one; "" removes it."""
    if sys.stderr.isatty():
        # A line that wraps could not be removed.
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"\r\x1b[K{visible(text)[:width]}")
        sys.stderr.flush()


@dataclass
class Display:
    """Shows a reply while it arrives: the answer on stdout, the trace on stderr.

    A terminal gets control characters as visible text; a pipe or a file gets the model's text.

    Attributes:
        folds: show a trace in a few lines while it grows, and in one line once it is closed.
        renders: lay out the answer's Markdown on a terminal.
    """

    hides_reasoning: bool = False
    hides_answer: bool = False
    folds: bool = False
    renders: bool = False
    reasoning: str = ""
    answer: str = ""
    has_status: bool = False
    _trace: TraceWindow | None = None
    _markdown: "MarkdownWriter | None" = None

    def show(self, segment: Segment) -> None:
        """Show one segment."""
        if isinstance(segment, Progress):
            self.tell(f"reading the prompt: {segment.done}/{segment.total} tokens")
        elif isinstance(segment, Text):
            self._show_text(segment)

    def _show_text(self, segment: Text) -> None:
        if segment.kind == "reasoning":
            self.reasoning += segment.text
            if self.hides_reasoning:
                self.tell(f"reasoning: {len(self.reasoning):,} characters")
            else:
                self.tell("")
                self._show_reasoning(segment.text)
        else:
            if not self.answer and self.reasoning and not self.hides_reasoning:
                self._close_trace()
            self.answer += segment.text
            if self.hides_answer:
                self.tell(f"answering: {len(self.answer):,} characters")
            else:
                self.tell("")
                self._show_answer(segment.text)

    def _show_reasoning(self, text: str) -> None:
        if self.folds and self._trace is None and can_draw(sys.stderr):
            self._trace = TraceWindow(sys.stderr)
        if self._trace is None:
            write(sys.stderr, text, is_dim=True)
        else:
            self._trace.push(text)

    def _close_trace(self) -> None:
        if self._trace is None:
            write(sys.stderr, "\n\n")
        else:
            self._trace.fold()

    def _show_answer(self, text: str) -> None:
        if self.renders and self._markdown is None and can_draw(sys.stdout):
            # rich takes a while to import, and only a terminal needs it.
            from magistral_mlx.terminal.markdown import MarkdownWriter

            self._markdown = MarkdownWriter(sys.stdout)
        if self._markdown is None:
            write(sys.stdout, text)
        else:
            self._markdown.push(text)

    def tell(self, status: str) -> None:
        """Set or remove the status line, but never a line of the reply in its place."""
        if status or self.has_status:
            show_status(status)
        self.has_status = bool(status)

    def end(self) -> None:
        """Finish the last line."""
        self.tell("")
        if self._markdown is not None:
            self._markdown.end()
        elif self.answer and not self.hides_answer:
            write(sys.stdout, "\n")
        elif self._trace is not None and not self.answer:
            self._trace.fold()
        elif self.reasoning and not self.hides_reasoning:
            write(sys.stderr, "\n")

    def show_all(self, stream: Stream[Segment, Reply]) -> Reply | None:
        """Show a whole stream and return its reply, or None if Ctrl-C ended it."""
        try:
            for segment in stream:
                self.show(segment)
            return stream.result()
        except KeyboardInterrupt:
            stream.close()
            return None
        finally:
            self.end()


def write(stream: TextIO, text: str, *, is_dim: bool = False) -> None:
    """Write text; on a terminal with control characters made visible."""
    if stream.isatty():
        text = dim(visible(text)) if is_dim else visible(text)
    stream.write(text)
    stream.flush()


def tell(text: str, *, is_dim: bool = False) -> None:
    """Write a line on stderr; on a terminal, wrap it between words."""
    if sys.stderr.isatty():
        lines = [
            line for long in text.split("\n") for line in WRAPPER(width=width()).wrap(long) or [""]
        ]
        text = "\n".join(lines)
    write(sys.stderr, text, is_dim=is_dim)
    write(sys.stderr, "\n")


def report(reply: Reply, label: str = "") -> None:
    """Write the cost of a reply as one line on stderr, and how it ended if not by itself."""
    ended = "" if reply.finish_reason == "stop" else f"ended by {reply.finish_reason}; "
    tell(f"{label}{ended}{figures(reply.usage)}", is_dim=True)


def rate(tokens: float, seconds: float) -> str:
    """Format tokens per second, or "-" where nothing was measured."""
    return f"{tokens / seconds:,.1f} tok/s" if tokens > 0 and seconds > 0 else "-"


def figures(usage: Usage) -> str:
    """Format the cost of a reply as one line."""
    cached = f" ({usage.cached_tokens:,} cached)" if usage.cached_tokens else ""
    left_out = f"; {usage.dropped_turns} oldest turns left out" if usage.dropped_turns else ""
    return (
        f"prompt {usage.prompt_tokens:,} tokens{cached}, "
        f"{rate(usage.prompt_tokens - usage.cached_tokens, usage.prefill_seconds)}; "
        f"reply {usage.completion_tokens:,} tokens ({usage.reasoning_tokens:,} reasoning), "
        # the first token came with the prompt's pass
        f"{rate(usage.completion_tokens - 1, usage.decode_seconds)}; "
        f"first token after {usage.prefill_seconds:.2f} s; "
        f"peak memory {in_units(usage.peak_memory_bytes)}{left_out}"
    )
