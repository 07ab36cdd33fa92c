"""Lay out an answer in Markdown on a terminal, block by block, while it arrives."""

import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TextIO

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from rich import markdown
from rich.console import Console, ConsoleOptions, RenderResult
from rich.syntax import Syntax
from rich.theme import Theme

from magistral_mlx.errors import visible
from magistral_mlx.terminal.window import Window, has_styles, width

# Rules that are off, so that the model's text stays visible: HTML would vanish, a reference would
# change earlier text, an escaping backslash would vanish from LaTeX, and an entity may stand for a
# control character.
LITERAL = ["html_block", "html_inline", "reference", "escape", "entity", "image"]
SGR = re.compile(r"\x1b\[[\d;]*m")
NO_EMPHASIS = re.compile(r"(?<=[0-9A-Za-z)])\*+(?=[0-9A-Za-z(])|__+")
# Without the black background of rich's own theme.
THEME = Theme({"markdown.code": "cyan", "markdown.code_block": "none"})
PADDING = re.compile(r"(?: |\x1b\[[\d;]*m)+$")


def literal(state: StateInline, silent: bool) -> bool:
    """Keep the marks of ``2*3*4``, ``2**3`` and ``__init__``, which are no emphasis."""
    found = NO_EMPHASIS.match(state.src, state.pos)
    if found is None:
        return False
    if not silent:
        state.pending += found[0]
    state.pos = found.end()
    return True


PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"]).disable(LITERAL)
PARSER.inline.ruler.before("emphasis", "literal", literal)


class Heading(markdown.Heading):
    """A heading on the left, without a box around it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class CodeBlock(markdown.CodeBlock):
    """A code block without a margin, which would be copied with the code."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Syntax(str(self.text).rstrip(), self.lexer_name, theme=self.theme, word_wrap=True)


class Markdown(markdown.Markdown):
    """A block whose links show their targets, which a terminal would hide."""

    elements: ClassVar = {
        **markdown.Markdown.elements,
        "heading_open": Heading,
        "fence": CodeBlock,
        "code_block": CodeBlock,
    }

    def __init__(self, block: str) -> None:
        super().__init__("", hyperlinks=False, code_theme="ansi_dark")
        self.parsed = PARSER.parse(block)


def blocks(text: str) -> Iterator[str]:
    """Split a text into its blocks: paragraphs, lists, tables and so on."""
    tokens = [token for token in PARSER.parse(text) if token.level == 0 and token.nesting >= 0]
    starts = [token.map[0] for token in tokens if token.map is not None]
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    for start, stop in zip([0, *starts[1:]], [*starts[1:], len(lines)], strict=True):
        yield "".join(lines[start:stop])


def rendered(block: str, columns: int) -> list[str]:
    """Lay out a block as lines for a terminal."""
    console = Console(file=io.StringIO(), force_terminal=True, width=columns, theme=THEME)
    console.print(Markdown(block), end="")
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    if not has_styles():
        text = SGR.sub("", text)
    lines = [PADDING.sub(_colours, line) for line in text.split("\n")]
    seen = [i for i, line in enumerate(lines) if SGR.sub("", line)]
    return lines[seen[0] : seen[-1] + 1] if seen else []


def _colours(padding: re.Match[str]) -> str:
    return "".join(SGR.findall(padding[0]))


@dataclass
class MarkdownWriter:
    """Writes an answer that comes in pieces; only its last block is drawn over."""

    stream: TextIO
    clock: Callable[[], float] = time.monotonic
    _window: Window = field(init=False)
    _text: str = ""  # from the last block on
    _is_first: bool = True

    def __post_init__(self) -> None:
        self._window = Window(self.stream, self.clock)

    def push(self, text: str) -> None:
        """Show a piece of the answer."""
        self._text += visible(text)
        if self._window.is_due():
            self._window.draw(self._lines)

    def end(self) -> None:
        """Show the rest of the answer."""
        self._window.draw(lambda: ([*self._lines(is_last=True)[0]], []))

    def _lines(self, *, is_last: bool = False) -> tuple[Sequence[str], Sequence[str]]:
        """Return the lines that will not change, and those that may."""
        # A line that is not complete may still become anything.
        whole = self._text if is_last else self._text[: self._text.rfind("\n") + 1]
        done = [*blocks(whole)] if is_last else [*blocks(whole)][:-1]
        self._text = self._text[sum(map(len, done)) :]
        for_good = [line for block in done for line in self._spaced(rendered(block, width()))]
        return for_good, [] if is_last else self._spaced(
            rendered(self._text, width()), is_drawn_over=True
        )

    def _spaced(self, lines: list[str], *, is_drawn_over: bool = False) -> list[str]:
        """Put a blank line before lines, unless they are the first."""
        if not lines:
            return []
        spaced = lines if self._is_first else ["", *lines]
        self._is_first = self._is_first and is_drawn_over
        return spaced
