"""One HTML template for every report: a single file that needs no network, light and dark, on a phone and on paper.

Whatever is put on a page is text and is escaped by Jinja2; the page's policy lets a browser run its own script alone,
so that a text that got through would still do nothing. Look and script: page.html, what stands on a page: parts.html.

    page = Page("Title", "What it is about.")
    page.tiles([("rows", 1200, "after cleaning")]).section("Scores").plot(lambda axes: axes.hist(scores), "Cosines")
    page.write("report.html")
"""

import base64
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import jinja2

from bge_core.files.atomic import atomic_path
from bge_core.reports.plots import draw_svg

WORDS = {
    "en": {"bad": "Problem", "warning": "Warning", "note": "Note", "do": "What to do:", "search": "Search",
           "examples": "Examples", "none": "Nothing to warn of."},
    "zh": {"bad": "严重", "warning": "警告", "note": "提示", "do": "建议：", "search": "搜索",
           "examples": "例子", "none": "没有警告。"},
}  # fmt: skip
AMOUNT = re.compile(r"[-+]?[\d.,]+ ?%|[-+][\d.,]+|\[[-+]?[\d.]+, [-+]?[\d.]+\]")  # share, change, interval
Cell = tuple[Any, str]  # what it shows, and its class in the page's style


class Page:
    """A report, built from top to bottom; every method that adds something returns the page.

    Args:
        title: of the page.
        lead: a sentence or two below it.
        lang: of the page's own words, "en" or "zh".
    """

    def __init__(self, title: str, lead: str = "", lang: str = "en") -> None:
        self.title, self.lang = title, lang
        self.macros: Any = _templates().get_template("parts.html").make_module({"words": WORDS[lang]})
        self.parts: list[Any] = [self.macros.lead(lead)] if lead else []

    def tiles(self, tiles: Sequence[tuple[str, Any, str]]) -> "Page":
        """The figures that matter most: (label, value, hint), in a row."""
        return self._add(self.macros.tiles(tiles))

    def section(self, title: str, text: str = "") -> "Page":
        """A heading, and what is to be seen below it."""
        return self._add(self.macros.section(title, text))

    def warnings(self, warnings: Sequence[tuple[Any, ...]]) -> "Page":
        """(severity, message, remedy) or (severity, message, remedy, examples) each; severity "bad", "warning", "note".

        Examples are texts or mappings. Without a warning the page says that there is none.
        """
        return self._add(self.macros.warnings([(*warning, ())[:4] for warning in warnings]))

    def table(
        self, header: Sequence[str], rows: Sequence[Sequence[Any]], best: Mapping[str, str] | None = None
    ) -> "Page":
        """A table; numbers stand to the right. `best`: column -> "max" or "min", whose best values are set in bold."""
        head, body = _cells(header, rows)
        for name, which in (best or {}).items():
            j = header.index(name)
            numbers = [row[j] for row in rows if _is_number(row[j]) and row[j] == row[j]]
            goal = (max if which == "max" else min)(numbers, default=None)
            for cells, row in zip(body, rows, strict=True):
                if _is_number(row[j]) and row[j] == goal:
                    cells[j] = (row[j], "n best")
        return self._add(self.macros.scrolling(self.macros.table(head, body)))

    def plot(self, draw: Any, caption: str) -> "Page":
        """A plot: a matplotlib Figure, or what draws on given Axes. plots.COLORS follow light and dark; black does."""
        return self._add(self.macros.figure(draw_svg(draw, self._name("p", caption) + "-"), caption))

    def examples(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], search: bool = True) -> "Page":
        """Rows of texts and numbers, with a box that shows only those that hold all words typed into it."""
        head, body = _cells(columns, [[row.get(column) for column in columns] for row in rows])
        table = self.macros.table(head, body, kind="stack", row_class="item", names=columns)
        return self._add(self.macros.examples(self._name("x", table), table, search))

    def cards(self, cards: Sequence[tuple[str, Sequence[tuple[str, str, Any, str]]]], search: bool = True) -> "Page":
        """(title, lines) each, a line being (kind, label, score, text); kind "good" or "odd" is coloured, "" is not."""
        shown = self.macros.cards(cards)
        return self._add(self.macros.examples(self._name("x", shown), shown, search))

    def lookup(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> "Page":
        """Rows to be found by words of their first column, of which a hundred are shown.

        They stand in the page as data and not as elements, so that fifty thousand load in a moment.
        """
        data = [list(map(_shown, row)) for row in rows]
        return self._add(self.macros.lookup(self._name("y", str(data)), header, data))

    def details(self, summary: str, content: "str | Mapping[str, Any] | Page") -> "Page":
        """What is folded away below `summary`: a text as it stands, names and values, or the parts of another page."""
        if isinstance(content, Page):
            inner = self.macros.joined(content.parts)
        elif isinstance(content, str):
            inner = self.macros.preformatted(content)
        else:  # as text: a seed is no amount
            _, body = _cells((), [(name, str(value)) for name, value in content.items()])
            inner = self.macros.scrolling(self.macros.table((), body))
        return self._add(self.macros.details(summary, inner))

    def render(self) -> str:
        """The HTML."""
        lang = {"zh": "zh-Hans"}.get(self.lang, self.lang)
        return _templates().get_template("page.html").render(lang=lang, title=self.title, parts=self.parts)

    def write(self, path: str | Path) -> None:
        """Write the page, whole or not at all."""
        with atomic_path(path) as temporary:
            temporary.write_text(self.render(), encoding="utf-8", errors="replace", newline="\n")

    def _add(self, part: Any) -> "Page":
        self.parts.append(part)
        return self

    def _name(self, kind: str, content: str) -> str:
        """An id that no other part has, also where those of another page come to stand beside it."""
        return f"{kind}{len(self.parts)}-{hashlib.sha256(content.encode('utf-8', 'replace')).hexdigest()[:8]}"


@functools.cache
def _templates() -> Any:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("bge_core.reports", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    found.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    found.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_amount(value: object) -> bool:
    return _is_number(value) or AMOUNT.fullmatch(str(value)) is not None


def _shown(value: Any) -> str:
    """A value as a person reads it. What is text stays as it is, marked as HTML or not."""
    if isinstance(value, str):
        return value
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return " | ".join(f"{name}: {_shown(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(_shown, value))
    if not _is_number(value):
        return str(value)
    if isinstance(value, Integral):
        return f"{int(value):,}"
    size = abs(float(value))
    return f"{value:.3g}" if 0 < size < 0.001 or size >= 1e9 else f"{value:,.0f}" if size >= 1000 else f"{value:.3f}"


def _cells(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> tuple[list[Cell], list[list[Cell]]]:
    """Header and rows; the columns that hold amounts alone stand to the right."""
    columns = [[row[j] for row in rows] for j in range(max(map(len, rows), default=len(header)))]
    right = [
        any(map(_is_amount, column)) and all(value in (None, "–") or _is_amount(value) for value in column)
        for column in columns
    ]
    classes = ["n" if is_right else "" for is_right in right]
    return list(zip(header, classes, strict=False)), [list(zip(row, classes, strict=False)) for row in rows]
