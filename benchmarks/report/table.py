"""Tables on the terminal."""

from collections.abc import Iterable, Sequence

from magistral_mlx.terminal.table import Table, show_table

RATIO = "ratio with 95 % interval"
TIMES = "ours, times as fast"


def show(title: str, words: str, figures: str, rows: Iterable[Sequence[object]]) -> None:
    """Print a table of words and then right-aligned figures; a cell of None stays empty.

    ``words`` and ``figures`` are headings with " | " between them.
    """
    names = words.split(" | ")
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if cells:
        show_table(Table(title, [*names, *figures.split(" | ")], cells, words=len(names)))
