"""Show a reply while it arrives: the answer on stdout, everything else on stderr."""

import sys
from dataclasses import dataclass, field
from functools import partial
from textwrap import TextWrapper
from typing import TYPE_CHECKING, TextIO

from magistral_mlx.errors import counted, in_units, visible
from magistral_mlx.generation.reply import Reply, Usage
from magistral_mlx.streams import Progress, Stream
from magistral_mlx.terminal.verbosity import Status, is_quiet
from magistral_mlx.terminal.window import TraceWindow, can_draw, dim, width
from magistral_mlx.tokenizer.segments import Segment, Text

if TYPE_CHECKING:
    from magistral_mlx.terminal.markdown import MarkdownWriter

WRAPPER = partial(TextWrapper, expand_tabs=False, replace_whitespace=False, break_on_hyphens=False)


# How a reply ended, unless by itself.
ENDINGS = {
    "length": "cut off at --max-tokens ({:,}); ",
    "tool_calls": "asks for tools; ",
    "loop": "stopped, as it repeated itself; ",
    "cancelled": "stopped by you; ",
}
MENDS = {
    "length": "raise --max-tokens, or limit the reasoning with --think-budget",
    "loop": "try another --seed, or --on-loop close",
}


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
    status: Status = field(default_factory=Status)
    _trace: TraceWindow | None = None
    _markdown: "MarkdownWriter | None" = None

    def __post_init__(self) -> None:
        self.hides_reasoning = self.hides_reasoning or is_quiet()

    def show(self, segment: Segment) -> None:
        """Show one segment."""
        if isinstance(segment, Progress):
            self.status.show(f"reading the prompt: {segment.done}/{segment.total} tokens")
        elif isinstance(segment, Text):
            self._show_text(segment)

    def _show_text(self, segment: Text) -> None:
        if segment.kind == "reasoning":
            self.reasoning += segment.text
            if self.hides_reasoning:
                self.status.show(f"reasoning: {counted(len(self.reasoning), 'character')}")
            else:
                self.status.clear()
                self._show_reasoning(segment.text)
        else:
            if not self.answer and self.reasoning and not self.hides_reasoning:
                self._close_trace()
            self.answer += segment.text
            if self.hides_answer:
                self.status.show(f"answering: {counted(len(self.answer), 'character')}")
            else:
                self.status.clear()
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

    def end(self) -> None:
        """Finish the last line."""
        self.status.clear()
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


def remark(text: str) -> None:
    """Write a line on stderr, unless --quiet is asked for."""
    if not is_quiet():
        tell(text)


def report(reply: Reply, *, says_ending: bool = True) -> None:
    """Write the cost of a reply as one line on stderr, and how it ended if not by itself."""
    if not is_quiet():
        tell(f"{ending(reply) if says_ending else ''}{figures(reply.usage)}", is_dim=True)


def ending(reply: Reply) -> str:
    """Say how a reply ended, as the first part of a line; "" if it ended by itself."""
    return ENDINGS.get(reply.finish_reason, "").format(reply.usage.max_tokens)


def has_result(reply: Reply) -> bool:
    """Return False for a reply that has neither an answer nor a tool call."""
    return bool(reply.answer.strip() or reply.tool_calls)


def report_no_answer(reply: Reply) -> None:
    """Say as an error that a reply has no answer, why, and what helps."""
    mend = MENDS.get(reply.finish_reason, "try another --seed")
    tell(f"error: {ending(reply)}there is no answer; {mend}")


def rate(tokens: float, seconds: float) -> str:
    """Format tokens per second, or "-" where nothing was measured."""
    return f"{tokens / seconds:,.1f} tok/s" if tokens > 0 and seconds > 0 else "-"


def figures(usage: Usage) -> str:
    """Format the cost of a reply as one line."""
    cached = f" ({usage.cached_tokens:,} cached)" if usage.cached_tokens else ""
    dropped = usage.dropped_turns
    left_out = f"; {counted(dropped, 'oldest turn')} left out" if dropped else ""
    return (
        f"prompt {counted(usage.prompt_tokens, 'token')}{cached}, "
        f"{rate(usage.prompt_tokens - usage.cached_tokens, usage.prefill_seconds)}; "
        f"reply {counted(usage.completion_tokens, 'token')} "
        f"({usage.reasoning_tokens:,} reasoning), "
        # the first token came with the prompt's pass
        f"{rate(usage.completion_tokens - 1, usage.decode_seconds)}; "
        f"first token after {usage.prefill_seconds:.2f} s; "
        f"peak memory {in_units(usage.peak_memory_bytes)}{left_out}; seed {usage.seed}"
    )
