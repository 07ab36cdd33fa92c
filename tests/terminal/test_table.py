"""Tables stay within a terminal's width, and a pipe gets a line for each row."""

import io
import re
import sys

import pytest

from magistral_mlx.terminal.table import Table, aligned, show_table, split

TABLE = Table(
    "A title",
    ["Mac", "use", "4 bit\nplain", "8 bit"],
    [["* 24 GB", "17.2", "23,296", "-"], ["512 GB", "412.3", "40,960", "40,960"]],
    marked=0,
)


def test_a_pipe_gets_aligned_text(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(TABLE)
    assert capsys.readouterr().out == (
        "A title\n"
        "                 4 bit\n"
        "Mac        use   plain   8 bit\n"
        "* 24 GB   17.2  23,296       -\n"
        "512 GB   412.3  40,960  40,960\n"
    )


@pytest.mark.parametrize("width", range(16, 40))
def test_a_split_table_fits_and_keeps_every_figure(width: int) -> None:
    parts = split(TABLE, width)
    for part in parts:
        assert [row[0] for row in part.rows] == ["* 24 GB", "512 GB"]
        lines = aligned(part).split("\n")[1:]
        assert max(map(len, lines)) <= width
    assert [name for part in parts for name in part.headings[1:]] == TABLE.headings[1:]
    assert len(parts) == 1 or width < 30


@pytest.mark.parametrize("columns", [24, 30, 80])
def test_a_terminal_gets_lines_within_its_width(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    show_table(TABLE)
    assert "\x1b[1m" in sys.stdout.getvalue()
    lines = re.sub(r"\x1b\[\d*m", "", sys.stdout.getvalue()).split("\n")
    assert max(map(len, lines)) <= columns
    assert sum("* 24 GB" in line for line in lines) == (1 if columns >= 30 else 2)
    assert ["* 24 GB", "17.2", "23,296", "-"][: 4 if columns >= 30 else 3] in [
        re.split(r"\s{2,}", line.strip()) for line in lines
    ]
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            context.setattr(sys, "stdout", Terminal())
            show_table(TABLE)
            assert "\x1b" not in sys.stdout.getvalue()
