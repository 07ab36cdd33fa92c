"""Tables on the terminal."""

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

RATIO = "ratio with 95 % interval"
TIMES = "ours, times as fast"
PIPE_WIDTH = 160


def show(title: str, words: str, figures: str, rows: Iterable[Sequence[object]]) -> None:
    """Print a table of words and then right-aligned figures; a cell of None stays empty.

    ``words`` and ``figures`` are headings with " | " between them.
    """
    table = Table(title=title, title_justify="left")
    for column in words.split(" | "):
        table.add_column(column)
    for column in figures.split(" | "):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    if table.row_count:
        Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)
