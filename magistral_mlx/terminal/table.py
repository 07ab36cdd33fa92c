"""Tables: within a terminal's width, and as aligned text in a pipe."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal

from magistral_mlx.terminal.window import has_styles

GAP = 2


@dataclass(frozen=True, slots=True)
class Table:
    """A heading, columns of words, then columns of figures.

    Attributes:
        headings: of the columns; one may have several lines.
        words: the leading columns that hold words. They are repeated where a table is split.
        marked: the row that a terminal shows in bold.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    marked: int | None = None

    def widths(self) -> list[int]:
        """Return the width of each column."""
        columns = zip(self.headings, *self.rows, strict=True)
        return [
            max(len(line) for cell in column for line in cell.split("\n")) for column in columns
        ]

    def only(self, columns: Sequence[int]) -> "Table":
        """Return the table with these columns."""
        rows = [[row[i] for i in columns] for row in self.rows]
        return replace(self, headings=[self.headings[i] for i in columns], rows=rows)


def show_table(table: Table) -> None:
    """Print a table: in a window's width on a terminal, a line for each row elsewhere."""
    if not sys.stdout.isatty():
        print(aligned(table))
        return
    # rich takes a while to import, and only a terminal needs it.
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    columns = shutil.get_terminal_size().columns
    colours: Literal["auto"] | None = "auto" if has_styles() else None
    console = Console(width=columns, highlight=False, color_system=colours)
    console.print(table.title, style="bold", markup=False)
    for part in split(table, columns):
        # The frame has a space between columns, too.
        grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for i, heading in enumerate(part.headings):
            grid.add_column(heading, justify="left" if i < part.words else "right")
        for i, row in enumerate(part.rows):
            grid.add_row(*row, style="bold" if i == part.marked else None)
        console.print(grid, markup=False)


def aligned(table: Table) -> str:
    """Return a table as text whose columns are apart by spaces."""
    widths = table.widths()
    # A heading of fewer lines stands at the bottom.
    lines = [heading.split("\n")[::-1] for heading in table.headings]
    heads = [*zip_longest(*lines, fillvalue="")][::-1]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i < table.words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return (" " * GAP).join(padded).rstrip()

    return "\n".join([table.title, *map(line, heads), *map(line, table.rows)])


def split(table: Table, width: int) -> list[Table]:
    """Return tables that stand below each other: each has the words, and figures that fit."""
    words = list(range(table.words))
    widths = [each + GAP for each in table.widths()]
    groups: list[list[int]] = []
    taken = 0
    for i in range(table.words, len(widths)):
        if not groups or taken + widths[i] > width + GAP:
            groups.append([])
            taken = sum(widths[j] for j in words)
        groups[-1].append(i)
        taken += widths[i]
    return [table.only([*words, *group]) for group in groups or [[]]]
