"""An answer in Markdown on a terminal, a block at a time, while it arrives."""

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

from magistral_mlx.terminal.window import Window, width
from magistral_mlx.tokenizer.reasoning import visible

# Left out, so that what the model wrote is seen: HTML would vanish, a reference would change what came long before,
# a backslash that escapes would vanish from LaTeX, and an entity may stand for a control character.
LITERAL = ["html_block", "html_inline", "reference", "escape", "entity", "image"]
SGR = re.compile(r"\x1b\[[\d;]*m")
NO_EMPHASIS = re.compile(r"(?<=[0-9A-Za-z)])\*+(?=[0-9A-Za-z(])|__+")
THEME = Theme(
    {"markdown.code": "cyan", "markdown.code_block": "none"}
)  # rich's have a black background
PADDING = re.compile(r"(?: |\x1b\[[\d;]*m)+$")


def literal(state: StateInline, silent: bool) -> bool:
    """A rule of the parser: in ``2*3*4``, ``2**3`` and ``__init__`` is no emphasis, which would hide its marks."""
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
    """On the left, without a box around it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class CodeBlock(markdown.CodeBlock):
    """Without a margin, which would be copied with the code."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Syntax(str(self.text).rstrip(), self.lexer_name, theme=self.theme, word_wrap=True)


class Markdown(markdown.Markdown):
    """A block. Links show where they lead: a terminal would hide it."""

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
    """The blocks of a text: paragraphs, lists, tables, ...; together they are the text."""
    tokens = [token for token in PARSER.parse(text) if token.level == 0 and token.nesting >= 0]
    starts = [token.map[0] for token in tokens if token.map is not None]
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    for start, stop in zip([0, *starts[1:]], [*starts[1:], len(lines)], strict=True):
        yield "".join(lines[start:stop])


def rendered(block: str, columns: int) -> list[str]:
    """A block's lines on a terminal."""
    console = Console(file=io.StringIO(), force_terminal=True, width=columns, theme=THEME)
    console.print(Markdown(block), end="")
    assert isinstance(console.file, io.StringIO)
    lines = [PADDING.sub(_colours, line) for line in console.file.getvalue().split("\n")]
    seen = [i for i, line in enumerate(lines) if SGR.sub("", line)]
    return lines[seen[0] : seen[-1] + 1] if seen else []


def _colours(padding: re.Match[str]) -> str:
    return "".join(SGR.findall(padding[0]))


@dataclass
class MarkdownWriter:
    """Takes an answer in any pieces. A block is printed for good when the next one has begun: only the last is drawn
    over."""

    stream: TextIO
    clock: Callable[[], float] = time.monotonic
    _window: Window = field(init=False)
    _text: str = ""  # from the last block on
    _is_first: bool = True

    def __post_init__(self) -> None:
        self._window = Window(self.stream, self.clock)

    def push(self, text: str) -> None:
        self._text += visible(text)
        if self._window.is_due():
            self._window.draw(self._lines)

    def end(self) -> None:
        self._window.draw(lambda: ([*self._lines(is_last=True)[0]], []))

    def _lines(self, *, is_last: bool = False) -> tuple[Sequence[str], Sequence[str]]:
        """Lines that will not change, and those that may."""
        whole = (
            self._text if is_last else self._text[: self._text.rfind("\n") + 1]
        )  # a line begun may become anything
        done = [*blocks(whole)] if is_last else [*blocks(whole)][:-1]
        self._text = self._text[sum(map(len, done)) :]
        for_good = [line for block in done for line in self._spaced(rendered(block, width()))]
        return for_good, [] if is_last else self._spaced(
            rendered(self._text, width()), is_drawn_over=True
        )

    def _spaced(self, lines: list[str], *, is_drawn_over: bool = False) -> list[str]:
        """With a blank line before, if there are any and they are not the first."""
        if not lines:
            return []
        spaced = lines if self._is_first else ["", *lines]
        self._is_first = self._is_first and is_drawn_over
        return spaced
