"""One HTML template for every report: a single file that needs no network, light and dark, on a phone and on paper.

Whatever is put on a page is text and is escaped; the page's policy lets a browser run its own script alone, so that a
text that got through would still do nothing. Plots are drawn by matplotlib and stand in the page as SVG: their letters
are those of the page, so Chinese labels need no font of matplotlib's, and their colours follow light and dark.

    page = Page("Title", "What it is about.")
    page.tiles([("rows", 1200, "after cleaning")]).section("Scores").plot(lambda axes: axes.hist(scores), "Cosines")
    page.write("report.html")
"""

import base64
import hashlib
import html
import io
import json
import re
import warnings
from collections.abc import Container, Mapping, Sequence
from importlib import resources
from numbers import Integral, Real
from pathlib import Path
from string import Template
from typing import Any

from bge_core.files.atomic import atomic_path

COLORS = {"#1f5fa8": "--c1", "#c2571a": "--c2", "#3b7d4a": "--c3", "#626a75": "--muted"}  # as the template names them
SIZE = (5.4, 2.9)  # inches of a plot: two stand side by side, and on a phone its letters can still be read
WORDS = {
    "en": {"bad": "Problem", "warning": "Warning", "note": "Note", "do": "What to do:", "search": "Search",
           "examples": "Examples", "none": "Nothing to warn of."},
    "zh": {"bad": "严重", "warning": "警告", "note": "提示", "do": "建议：", "search": "搜索",
           "examples": "例子", "none": "没有警告。"},
}  # fmt: skip
AMOUNT = re.compile(r"[-+]?[\d.,]+ ?%|[-+][\d.,]+|\[[-+]?[\d.]+, [-+]?[\d.]+\]")  # share, change, interval
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "page", "font.size": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.linewidth": 0.8, "axes.titlesize": 10, "legend.frameon": False,
    "lines.linewidth": 1.8, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "text.parse_math": False, "axes.prop_cycle": f"cycler('color', {list(COLORS)})",
}  # fmt: skip
_SCRIPT = """
for (const box of document.querySelectorAll("input[type=search]:not([data-rows])")) {
  const items = [...document.getElementById(box.getAttribute("aria-controls")).querySelectorAll(".item")];
  const texts = items.map(item => item.textContent.toLowerCase());
  const filter = () => {
    const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
    items.forEach((item, i) => { item.hidden = !words.every(word => texts[i].includes(word)); });
    box.nextElementSibling.textContent = items.filter(item => !item.hidden).length + " / " + items.length;
  };
  box.addEventListener("input", filter);
  filter();
}
for (const box of document.querySelectorAll("input[data-rows]")) {
  const rows = JSON.parse(document.getElementById(box.dataset.rows).textContent);
  const texts = rows.map(row => row[0].toLowerCase());
  const body = document.getElementById(box.getAttribute("aria-controls"));
  const filter = () => {
    const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let count = 0;
    body.replaceChildren();
    rows.forEach((row, i) => {
      if (!words.every(word => texts[i].includes(word)) || count++ >= SHOWN) return;
      const line = body.insertRow();
      row.forEach((value, j) => {
        const cell = line.insertCell();
        cell.textContent = value;
        if (j) cell.className = "n";
      });
    });
    box.nextElementSibling.textContent = Math.min(count, SHOWN) + " / " + count;
  };
  box.addEventListener("input", filter);
  filter();
}
""".replace("SHOWN", "100")  # of rows that are looked up, as many stand on the page


class Page:
    """A report, built from top to bottom; every method that adds something returns the page.

    Args:
        title: of the page.
        lead: a sentence or two below it.
        lang: of the page's own words, "en" or "zh".
    """

    def __init__(self, title: str, lead: str = "", lang: str = "en") -> None:
        self.title, self.lang, self.words = title, lang, WORDS[lang]
        self.parts = [f'<p class="lead">{_text(lead)}</p>'] if lead else []

    def tiles(self, tiles: Sequence[tuple[str, Any, str]]) -> "Page":
        """The figures that matter most: (label, value, hint), in a row."""
        shown = "".join(
            f'<div><dt>{_text(label)}</dt><dd class="value">{_text(value)}</dd><dd>{_text(hint)}</dd></div>'
            for label, value, hint in tiles
        )
        return self._add(_tag("dl", shown, class_="tiles"))

    def section(self, title: str, text: str = "") -> "Page":
        """A heading, and what is to be seen below it."""
        return self._add(_tag("h2", _text(title)) + (_tag("p", _text(text)) if text else ""))

    def warnings(self, warnings: Sequence[tuple[Any, ...]]) -> "Page":
        """(severity, message, remedy) or (severity, message, remedy, examples) each; severity "bad", "warning", "note".

        Examples are texts or mappings. Without a warning the page says that there is none.
        """
        items = []
        for severity, message, remedy, *more in warnings:
            label = _tag("b", _text(self.words.get(severity, severity)))
            item = _tag("p", f"{label} {_text(message)}") + _tag("p", f"{self.words['do']} {_text(remedy)}")
            if more and more[0]:
                item += _folded(self.words["examples"], _tag("pre", "\n".join(map(_text, more[0]))))
            items.append(_tag("li", item, class_=severity))
        return self._add(_tag("ul", "".join(items), class_="warnings") if items else _tag("p", self.words["none"]))

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[Any]],
        best: Mapping[str, str] | None = None,
        caption: str = "",
    ) -> "Page":
        """A table; numbers stand to the right. `best`: column -> "max" or "min", whose best values are set in bold."""
        bold = set()
        for name, which in (best or {}).items():
            column = {i: row[header.index(name)] for i, row in enumerate(rows)}
            numbers = {i: value for i, value in column.items() if _is_number(value) and value == value}
            goal = (max if which == "max" else min)(numbers.values(), default=None)
            bold |= {(i, header.index(name)) for i, value in numbers.items() if value == goal}
        above = _tag("caption", _text(caption)) if caption else ""
        return self._add(_scrolling(_table(header, rows, above, bold)))

    def plot(self, draw: Any, caption: str) -> "Page":
        """A plot: a matplotlib Figure, or what draws on given Axes. COLORS follow light and dark, and black does."""
        name = f"p{sum(part.startswith('<figure') for part in self.parts) + 1}-{_digest(caption)}-"
        svg = _svg(draw, name).replace("<svg ", f'<svg role="img" aria-label="{_text(caption)}" ', 1)
        return self._add(f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>")

    def examples(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], search: bool = True) -> "Page":
        """Rows of texts and numbers, with a box that shows only those that hold all words typed into it."""
        cells = [[row.get(column) for column in columns] for row in rows]
        return self._searchable(_table(columns, cells, kind="stack", item=True), search)

    def cards(self, cards: Sequence[tuple[str, Sequence[tuple[str, str, Any, str]]]], search: bool = True) -> "Page":
        """(title, lines) each, a line being (kind, label, score, text); kind "good" or "odd" is coloured, "" is not."""
        shown = []
        for title, lines in cards:
            body = "".join(
                _tag(
                    "tr", f'<td>{_text(label)}</td><td class="n">{_text(score)}</td><td>{_text(text)}</td>', class_=kind
                )
                for kind, label, score, text in lines
            )
            shown.append(_tag("section", _tag("h3", _text(title)) + _tag("table", body), class_="card item"))
        return self._searchable("".join(shown), search)

    def lookup(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> "Page":
        """Rows to be found by words of their first column, of which a hundred are shown.

        They stand in the page as data and not as elements, so that fifty thousand load in a moment.
        """
        data = json.dumps([list(map(_shown, row)) for row in rows], ensure_ascii=False, separators=(",", ":"))
        name, label = f"y{len(self.parts)}-{_digest(data)}", _text(self.words["search"])
        box = (
            f'<input type="search" data-rows="{name}" aria-controls="{name}-shown" aria-label="{label}"'
            f' placeholder="{label}"><output></output>'
        )
        head = "".join(_tag("th", _text(text), class_="n" * (i > 0)) for i, text in enumerate(header))
        table = _tag("table", _tag("thead", _tag("tr", head)) + _tag("tbody", "", id=f"{name}-shown"))
        script = f'<script type="application/json" id="{name}">{data.replace("<", chr(92) + "u003c")}</script>'
        return self._add(_tag("div", box, class_="search") + _scrolling(table) + script)

    def details(self, summary: str, content: "str | Mapping[str, Any] | Page") -> "Page":
        """What is folded away below `summary`: a text as it stands, names and values, or the parts of another page."""
        if isinstance(content, Page):
            inner = "".join(content.parts)
        elif isinstance(content, str):
            inner = _tag("pre", _text(content))
        else:  # as text: a seed is no amount
            inner = _scrolling(_table((), [(name, str(value)) for name, value in content.items()]))
        return self._add(_folded(summary, inner))

    def render(self) -> str:
        """The HTML."""
        digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
        template = resources.files("bge_core.reports").joinpath("page.html").read_text(encoding="utf-8")
        return Template(template).substitute(
            lang={"zh": "zh-Hans"}.get(self.lang, self.lang),
            title=_text(self.title),
            body="\n".join(self.parts),
            script=_SCRIPT,
            script_hash=f"sha256-{digest}",
        )

    def write(self, path: str | Path) -> None:
        """Write the page, whole or not at all."""
        with atomic_path(path) as temporary:
            temporary.write_text(self.render(), encoding="utf-8", errors="replace", newline="\n")

    def _add(self, part: str) -> "Page":
        self.parts.append(part)
        return self

    def _searchable(self, content: str, search: bool) -> "Page":
        name = f"x{len(self.parts)}-{_digest(content)}"  # other pages' parts may come to stand beside it
        label = _text(self.words["search"])
        box = (
            f'<input type="search" aria-controls="{name}" aria-label="{label}" placeholder="{label}"><output></output>'
        )
        return self._add(
            (_tag("div", box, class_="search") if search else "") + _tag("div", content, id=name, class_="examples")
        )


def _text(value: object) -> str:
    """A value as a person reads it, escaped."""
    return html.escape(_shown(value))


def _tag(name: str, content: str, **attributes: str) -> str:
    """An element around HTML; attributes that are "" are left out."""
    shown = "".join(f' {key.rstrip("_").replace("_", "-")}="{_text(of)}"' for key, of in attributes.items() if of)
    return f"<{name}{shown}>{content}</{name}>"


def _folded(summary: str, content: str) -> str:
    return _tag("details", _tag("summary", _text(summary)) + _tag("div", content))


def _scrolling(content: str) -> str:
    return _tag("div", content, class_="scroll", tabindex="0")  # so that the keyboard can scroll it


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_amount(value: object) -> bool:
    return _is_number(value) or AMOUNT.fullmatch(str(value)) is not None


def _shown(value: Any) -> str:
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


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    above: str = "",
    bold: Container[tuple[int, int]] = (),
    kind: str = "",
    item: bool = False,
) -> str:
    columns = [[row[j] for row in rows] for j in range(max(map(len, rows), default=len(header)))]
    right = [
        any(map(_is_amount, column)) and all(value in (None, "–") or _is_amount(value) for value in column)
        for column in columns
    ]
    head = "".join(_tag("th", _text(name), class_="n" * r) for name, r in zip(header, right, strict=False))
    body = []
    for i, row in enumerate(rows):
        cells = [
            _tag(
                "td",
                _text(value),
                class_=" ".join(["n"] * right[j] + ["best"] * ((i, j) in bold)),
                data_name=header[j] if item else "",
            )
            for j, value in enumerate(row)
        ]
        body.append(_tag("tr", "".join(cells), class_="item" if item else ""))
    top = _tag("thead", _tag("tr", head)) if header else ""
    return _tag("table", above + top + _tag("tbody", "".join(body)), class_=kind)


def _svg(draw: Any, prefix: str) -> str:
    """The drawing as an <svg> element, the same for the same drawing; its ids begin with `prefix`."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's own fonts draw the letters
        figure = draw
        if not isinstance(draw, Figure):
            figure = Figure(figsize=SIZE, layout="constrained")
            draw(figure.subplots())
        FigureCanvasSVG(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg ") :], flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg))
    # Equal ids of two plots would refer to each other's shapes.
    svg = re.sub(r'(\bid="|href="#|url\(#)', lambda found: found[1] + prefix, svg)
    for color, name in COLORS.items():
        svg = svg.replace(color, f"var({name})")
    return svg.replace("#000000", "currentColor")
