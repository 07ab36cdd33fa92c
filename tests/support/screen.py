"""A terminal's screen after all that was written; any other control sequence is an error."""

import re

from rich.cells import cell_len

ALLOWED = re.compile(
    r"\x1b\[(\d*)(A|K|J)|\x1b\[[\d;]*m|(\r)|(\n)|([^\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]+)"
)


class Screen:
    """A stream that is a terminal with a number of columns and lines."""

    def __init__(self, columns: int = 80, lines: int = 24) -> None:
        self.columns, self.lines = columns, lines
        # By row; a wide character takes two cells, the second one empty.
        self.cells: list[list[str]] = [[]]
        self.row = self.column = 0
        self.text = ""

    @property
    def rows(self) -> list[str]:
        return ["".join(cells) for cells in self.cells]

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        pass

    def write(self, text: str) -> int:
        self.text += text
        position = 0
        while position < len(text):
            found = ALLOWED.match(text, position)
            assert found, f"a terminal would obey {text[position : position + 20]!r}"
            position = found.end()
            self._obey(*found.groups())
        return len(text)

    def _obey(
        self,
        count: str | None,
        control: str | None,
        back: str | None,
        down: str | None,
        text: str | None,
    ) -> None:
        if control == "A":
            self.row -= int(count or 1)
            assert self.row >= max(0, len(self.cells) - self.lines), (
                "what has left the screen cannot be drawn over"
            )
        elif control == "K":
            del self.cells[self.row][self.column :]
        elif control == "J":
            del self.cells[self.row][self.column :], self.cells[self.row + 1 :]
        elif back or down:
            self.column = 0
            self.row += bool(down)
            self.cells += [[] for _ in range(self.row - len(self.cells) + 1)]
        for letter in text or "":
            self._put(letter, cell_len(letter))

    def _put(self, letter: str, width: int) -> None:
        cells = self.cells[self.row]
        if width:
            cells[self.column : self.column + width] = [letter, ""][:width]
            self.column += width
        elif self.column:
            cells[self.column - 1] += letter
        assert self.column <= self.columns, "a line would wrap"
