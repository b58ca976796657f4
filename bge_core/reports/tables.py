"""What people look at: tables, plots, the model card, a batch decoded."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `datasets` takes half a second to import, which merging and evaluating need not wait for
    pass


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    """A table for a terminal: first column left, others right unless `left`; a Chinese character is two wide."""
    cells = [list(header), *map(list, rows)]
    widths = [max(_width(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        placed = [
            cell + gap if left or i == 0 else gap + cell for i, (cell, gap) in enumerate(zip(row, padded, strict=True))
        ]
        lines.append("  ".join(placed).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def comparison_tables(metrics: Mapping[str, Mapping[str, float]], comparisons: Sequence[Mapping[str, Any]]) -> str:
    """One line a model with every metric, the best ones marked *, then how each differs from the first, and how surely.

    Args:
        metrics: {model: {metric: mean}}.
        comparisons: of `significance.compare_to_baseline`.
    """
    names, columns = list(metrics), list(next(iter(metrics.values())))
    best = {column: max(of[column] for of in metrics.values()) for column in columns}
    rows = [
        [name, *(f"{of[column]:.4f}{'*' if of[column] == best[column] else ' '}" for column in columns)]
        for name, of in metrics.items()
    ]
    lines = [
        [
            f"{line['model']} - {names[0]}",
            line["metric"],
            f"{line['difference']:+.4f}",
            f"[{line['low']:+.4f}, {line['high']:+.4f}]",
            f"{line['p_adjusted']:.3g}",
            str(line["wins"]),
            str(line["losses"]),
            str(line["ties"]),
        ]
        for line in comparisons
    ]
    header = ["difference", "metric", "", "95 % interval", "p (Holm)", "better", "worse", "equal"]
    return text_table(["model", *columns], rows) + "\n\n" + text_table(header, lines)
