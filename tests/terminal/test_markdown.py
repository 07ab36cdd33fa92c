"""Markdown on a terminal: the same in any pieces, complete, and without control sequences."""

import random
import re

import pytest

from magistral_mlx.terminal.markdown import MarkdownWriter, blocks
from tests.support.screen import Screen

ANSWER = """# Title

Some *text* with **bold**, `code` and x_1 + y_2, in a paragraph that is longer than a \
narrow terminal is wide.
A line of its own
# Another

1. first
2. second with a [link](https://example.org/a_b)

   and a paragraph
   - nested

| n | 日本語 |
|--:|---|
| 1 | はい |

```python
def f(x):
    return x ** 2


print(f(3))
```
Setext
---
> quoted
lazily

    indented code

***

#hashtag, and the end"""
LITERAL = [
    "a <div>b</div> <!-- c --> d",
    "<script>\nalert(1)\n</script>",
    "\\( \\frac{a}{b} \\) and \\[ x \\\\ y \\] and \\*",
    "2*3*4 = 24, 2**3 = 8, a*b*c, f(x)*g(y)*2",
    "&lt; &amp; &#27;[31m &#x202e;",
    "[1]: https://example.org/gone\n[1]",
    "![alt](https://example.org/a.png)",
    "x_1 + y_2 and __init__.py snake_case_name",
    "```\n<b> &lt; *x* \\\\\n```",
    "| a | b |\n|---|---|\n| *1 | 2*3*4 |",
]
EVIL = [
    "\x1b]0;x\x07",
    "\x1b[2J",
    "\x9b31m",
    "\u202e",
    "\r",
    "\x00",
    "\x08",
    "\u2028",
    "&#27;]0;x&#7;",
    "&#x202e;",
    "\t",
]


def shown(pieces: list[str], *, columns: int, every: bool = True, lines: int = 12) -> Screen:
    """Lay out a text in pieces; with ``every`` draw after each, else only at the end."""
    screen = Screen(columns, lines)
    ticks = iter(range(10**9))
    writer = MarkdownWriter(screen, clock=(lambda: next(ticks) * 1e3) if every else lambda: -1.0)  # type: ignore[arg-type]
    for piece in pieces:
        writer.push(piece)
    writer.end()
    return screen


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("LINES", "12")
    monkeypatch.setenv("COLUMNS", "60")


def in_pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("columns", [24, 60])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_the_pieces_an_answer_comes_in_change_nothing(
    monkeypatch: pytest.MonkeyPatch, columns: int, size: int
) -> None:
    """The screen is lower than the answer, and the lines that scrolled away are right too."""
    monkeypatch.setenv("COLUMNS", str(columns))
    whole = shown([ANSWER], columns=columns, every=False)
    assert shown(in_pieces(ANSWER, size), columns=columns).rows == whole.rows
    assert whole.rows[-1] == ""


def test_an_answer_cut_off_anywhere_is_shown_in_full() -> None:
    for end in range(0, len(ANSWER), 11):
        cut = ANSWER[:end]
        assert (
            shown(in_pieces(cut, 5), columns=60).rows == shown([cut], columns=60, every=False).rows
        )


def test_how_it_is_laid_out() -> None:
    assert (
        "\n".join(shown([ANSWER], columns=60).rows)
        == """\
Title

Some text with bold, code and x_1 + y_2, in a paragraph
that is longer than a narrow terminal is wide. A line of
its own

Another

 1 first
 2 second with a link (https://example.org/a_b)
   and a paragraph
    • nested

 n  日本語
 ─────────
 1  はい

def f(x):
    return x ** 2


print(f(3))

Setext

▌ quoted lazily

indented code

-----------------------------------------------------------

#hashtag, and the end
"""
    )


@pytest.mark.parametrize("text", LITERAL)
def test_nothing_that_was_written_is_hidden(text: str) -> None:
    def marks(text: str) -> str:
        return re.sub(
            r"[\s`|─-]", "", text
        )  # but for white space, and the marks of code and tables

    seen = marks("".join(shown([text], columns=60).rows))
    assert seen == marks(text).replace("![alt](", "!alt(")


def test_emphasis_of_parts_of_words_where_words_are_not_set_apart() -> None:
    assert shown(["这是**重点**内容"], columns=60).rows[0] == "这是重点内容"


def test_a_link_shows_its_target_and_is_no_terminal_link() -> None:
    screen = shown(["[safe.example](https://evil.example/x) <https://other.example>"], columns=60)
    assert "safe.example (https://evil.example/x)" in screen.rows[0]
    assert "\x1b]8" not in screen.text


def test_nothing_a_terminal_would_obey() -> None:
    """The screen refuses other control sequences."""
    rng = random.Random(0)
    parts = [
        *EVIL,
        *LITERAL,
        "```",
        "`",
        "| a |\n|---|\n",
        "[a](",
        "](b)",
        "<",
        ">",
        "# ",
        "- ",
        "**",
        "\n",
        "\n\n",
        "x",
    ]
    for _ in range(150):
        text = "".join(rng.choices(parts, k=12))
        screen = shown(in_pieces(text, rng.randrange(1, 30)), columns=60)
        assert screen.rows == shown([text], columns=60, every=False).rows
        assert "".join(blocks(text)) == text


def test_without_colours_there_is_no_bold_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[\d;]*m", shown([ANSWER], columns=60).text)
