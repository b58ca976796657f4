"""Tables for a terminal."""

import unicodedata
from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    """A table for a terminal: first column left, others right unless `left`; a Chinese character is two wide."""
    cells = [list(header), *map(list, rows)]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join("-" * width for width in widths)]
    for row in cells:
        gaps = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        placed = [
            cell + gap if left or not i else gap + cell for i, (cell, gap) in enumerate(zip(row, gaps, strict=True))
        ]
        lines.append("  ".join(placed).rstrip())
    return "\n".join([lines[1], lines[0], *lines[2:]])


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
