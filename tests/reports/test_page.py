"""Pages: nothing of a text becomes markup, nothing comes from outside, the same bytes each time."""

import base64
import hashlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.figure import Figure

from bge_core.reports.page import Page
from bge_core.reports.plots import COLORS

EVIL = """--></script></style><img src=x onerror="alert(1)">'"&lt;<svg/onload=alert(2)>{{7}}$title"""


class Reader(HTMLParser):
    """All tags, attributes and text of a page; fails where tags do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def bars(axes: Any) -> None:
    axes.bar([0, 1], [1, 2])
    axes.set(xlabel=EVIL.replace("$", ""), title="分数")


def full_page(text: str) -> Page:
    return (
        Page(text, text)
        .tiles([(text, text, text), ("rows", 1200, "")])
        .warnings([("bad", text, text, [text, {text: text}]), (text, text, text)])
        .section(text, text)
        .table([text, "score"], [[text, 0.5], ["b", 0.75]], best={"score": "max"})
        .plot(bars, text)
        .plot(bars, text)
        .examples([{text: text, "score": 1.0}, {"score": None}], [text, "score"])
        .cards([(text, [(text, text, 0.5, text), ("odd", "above", None, text)])])
        .details(text, text)
        .details(text, {text: text})
        .details(text, Page("").examples([{text: text}], [text], search=False))
    )


def test_no_text_becomes_markup() -> None:
    plain, evil = Reader(full_page("plain").render()), Reader(full_page(EVIL).render())
    assert [tag for tag, _ in evil.tags] == [tag for tag, _ in plain.tags]
    assert [set(attributes) for _, attributes in evil.tags] == [set(attributes) for _, attributes in plain.tags]
    names = {name for _, attributes in evil.tags for name in attributes}
    assert not [name for name in names if name.startswith("on")] and "src" not in names
    assert sum(tag == "script" for tag, _ in evil.tags) == 1 and "img" not in dict(evil.tags)
    assert sum(text.count(EVIL) for text in evil.texts) == sum(text.count("plain") for text in plain.texts)


def test_a_page_needs_nothing_from_outside_and_runs_only_its_own_script() -> None:
    html = full_page("中文").render()
    reader = Reader(html)
    for _, attributes in reader.tags:
        for name, value in attributes.items():
            assert "//" not in (value or "") or name.startswith("xmlns"), (name, value)
            if name == "xlink:href":
                assert (value or "").startswith("#")
    assert "@import" not in html and "url(http" not in html
    policy = next(a["content"] or "" for _, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    script = html.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert all(
        word in html for word in ("width=device-width", "prefers-color-scheme: dark", "@media print", "PingFang")
    )


def test_ids_are_unique_and_all_references_are_met() -> None:
    html = full_page("x").render()
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids)) > 10
    references = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)|aria-controls="([^"]*)"', html)
    assert len(references) > 5 and {"".join(found) for found in references} <= set(ids)


def test_plots_follow_light_and_dark() -> None:
    html = Page("t").plot(bars, "c").render()
    svg = html[html.index("<svg") : html.index("</svg>")]
    assert "var(--c1)" in svg and "currentColor" in svg and ">分数</text>" in svg  # letters stay letters
    assert "#000000" not in svg and "#ffffff" not in svg and "<metadata" not in svg
    assert not re.search(r'<svg [^>]*\b(width|height)="', svg) and "viewBox" in svg
    figure = Figure(figsize=(4, 2))
    figure.subplots(1, 2)[1].plot([1, 2], color="red")
    given = Page("t").plot(figure, "c").render()
    assert "#ff0000" in given and "currentColor" in given


def test_the_palette_is_that_of_the_template() -> None:
    html = Page("t").render()
    for color, name in COLORS.items():
        assert f"{name}: {color};" in html and html.count(f"{name}: #") == 2  # light and dark


def cells(html: str) -> list[tuple[str, str]]:
    return re.findall(r'<td(?: class="([^"]*)")?(?: data-name="[^"]*")?>([^<]*)</td>', html)


def test_numbers_are_readable_and_the_best_are_bold() -> None:
    header = ["model", "MRR", "ms", "share", "n"]
    rows = [
        ["a", 0.52345, 12.0, "5.0%", 12345],
        ["b", np.float32(0.75), 1e-5, "–", np.int64(7)],
        ["c", 0.75, None, "12%", 2],
    ]
    table = cells(Page("t").table(header, rows, best={"MRR": "max", "ms": "min"}).render())
    assert table == [
        ("", "a"), ("n", "0.523"), ("n", "12.000"), ("n", "5.0%"), ("n", "12,345"),
        ("", "b"), ("n best", "0.750"), ("n best", "1e-05"), ("n", "–"), ("n", "7"),
        ("", "c"), ("n best", "0.750"), ("n", "–"), ("n", "12%"), ("n", "2"),
    ]  # fmt: skip
    nan = cells(Page("t").table(["x"], [[float("nan")], [1.0], [123456.7]], best={"x": "max"}).render())
    assert nan == [("n", "nan"), ("n", "1.000"), ("n best", "123,457")]
    assert ("", "2024") in cells(Page("t").details("settings", {"seed": 2024}).render())
    assert "<tbody></tbody>" in Page("t").table(["a"], [], best={"a": "max"}).render()


def test_the_language_of_the_page() -> None:
    english, chinese = (Page("t", lang=lang).warnings([]).examples([], []).render() for lang in ("en", "zh"))
    assert '<html lang="en">' in english and "Nothing to warn of." in english and 'placeholder="Search"' in english
    assert '<html lang="zh-Hans">' in chinese and "没有警告。" in chinese and 'placeholder="搜索"' in chinese


SMALL = """
import sys
from bge_core.reports.page import Page
page = Page("同").plot(lambda axes: axes.bar([0, 1], [1, 2], color=["C0", "C1"]), "c")
page.examples([{"a": "b"}], ["a"]).write(sys.argv[1])
"""


def test_the_same_page_has_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", SMALL, str(tmp_path / seed)]
        subprocess.run(command, env=environment, check=True, timeout=120)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert full_page("同").render() == full_page("同").render()


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "page.html"
    Page("半\ud800").write(file)  # half a character does not stop a report
    assert "<h1>半?</h1>" in file.read_text(encoding="utf-8")
    monkeypatch.setattr(Page, "render", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Page("new").write(file)
    assert "半" in file.read_text(encoding="utf-8") and list(file.parent.iterdir()) == [file]
