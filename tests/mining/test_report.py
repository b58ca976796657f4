"""The report of a run of mining: what it warns of, and what the page shows."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from bge_core.mining.facts import MiningReport, auc, closest_in_words, mining_warnings
from bge_core.mining.file_checks import Finding
from bge_core.mining.near_duplicates import Likeness
from bge_core.mining.report import _draw_ranks, write_check_report, write_mining_report

RNG = np.random.default_rng(0)
COUNTS: dict[str, int | float] = {
    "rows": 100, "pool": 1000, "negatives_min": 3, "negatives_mean": 4.9, "negatives_max": 5,
    "negatives_above_positive": 0,
}  # fmt: skip
EXAMPLE = {"query": "问", "positive": "答", "candidate": "<img>候选", "score": 0.9}
GOOD = MiningReport(
    title="Mined",
    settings={"seed": 2024, "model_name_or_path": "bge"},
    counts=COUNTS,
    search={"recall": 0.95},
    pos_scores=RNG.normal(0.8, 0.05, 100),
    neg_scores=RNG.normal(0.5, 0.05, 500),
    positive_ranks=np.array([0] * 60 + [1] * 20 + [7] * 20),
    depth=50,
    removed={"identical": [EXAMPLE]},
    lengths={"query": np.array([5, 6]), "positive": np.array([20, 40]), "negative": np.array([30])},
    limits={"query": 64, "positive": 64, "negative": 64},
    inspect=[
        {"query": "酒店几点退房", "pos": [("中午", 0.7), ("十二点", 0.6)], "neg": [("早餐", 0.6), ("晚上", 0.65)]}
    ],
    closest=[],
    findings=[],
)


def counts(**change: int) -> dict[str, Any]:
    return {"counts": COUNTS | change}


LIMITS = {  # name: facts just below the limit, at it, and at the one above which it is bad
    "positives_not_found": [{"positive_ranks": np.array([0] * (100 - n) + [-1] * n)} for n in (4, 5, 20)],
    "negatives_above_positive": [counts(negatives_above_positive=n) for n in (24, 25, 100)],
    "rows_short": [counts(rows=1000, rows_short=n) for n in (9, 10, 500)],
    "negatives_at_random": [counts(negatives_at_random=n) for n in (24, 25, 250)],
    "guard_identical": [counts(identical_dropped=n) for n in (999, 1000, 2500)],
    "positive_cut": [{"lengths": {"positive": np.array([64] * (100 - n) + [65] * n)}} for n in (4, 5, 50)],
    "overlap": [{"pos_scores": np.full(100, 0.5), "neg_scores": np.array([0.4] * (100 - n) + [0.6] * n)} for n in (14, 15, 35)],
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITS)
def test_when_mining_warns(name: str) -> None:
    below, at, bad = (mining_warnings(replace(GOOD, **change)) for change in LIMITS[name])
    assert below == mining_warnings(GOOD) == []
    assert [(f.name, f.severity) for f in at] == [(name, "warning")]
    assert [(f.name, f.severity) for f in bad] == [(name, "bad")]
    assert re.match(r"\d+\.\d% of the ", at[0].message) and at[0].message.endswith(").") and at[0].remedy.endswith(".")
    assert f"{at[0].count / at[0].total:.1%}" in at[0].message


def test_a_range_that_covers_the_pool() -> None:
    covered, guard = mining_warnings(replace(GOOD, **counts(pool=10, identical_dropped=200)))
    assert covered.name == "range_covers_pool" and "10 candidates" in covered.message
    assert guard.total == 1000  # 100 rows * the whole pool


def test_auc_is_that_of_all_pairs() -> None:
    pos, neg = RNG.integers(0, 9, 40) / 8, RNG.integers(-2, 7, 70) / 8  # many ties
    slow = np.mean([(p > n) + (p == n) / 2 for p in pos for n in neg])
    assert auc(pos, neg) == pytest.approx(slow, abs=1e-12)


@pytest.mark.parametrize("ranks, shares", [
    ([0, 1, 2, 3, 6, 7, -1, -1], [1 / 8, 2 / 8, 2 / 8, 1 / 8, 2 / 8]), ([-1, -1], [0, 1]), ([0], [1, 0]),
])  # fmt: skip
def test_ranks_fall_into_their_bins(ranks: list[int], shares: list[float]) -> None:
    axes = Figure().subplots()
    _draw_ranks(axes, np.array(ranks))
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(shares)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["1", "2-3", "4-7", "8-15"][: len(shares) - 1] + ["not found"]


def test_the_page_shows_the_worst_first_and_settings_last(tmp_path: Path) -> None:
    hub = Finding("hubs", "note", 1, 2, "1 of 2 hub.", "Look.", [{"row": 7, "text": "<img>文"}])
    shared = Finding("shared", "bad", 1, 2, "1 of 2 shared.", "Remove.", [])
    report = replace(GOOD, findings=[hub, shared], **counts(negatives_above_positive=30))
    assert [found.message for found in write_mining_report(tmp_path / "r.html", report)][::2] == [
        shared.message,
        hub.message,
    ]
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    places = [html.index(part) for part in ("1 of 2 shared.", "6.0% of the negatives", "1 of 2 hub.", "Scores and ranks",
              "has the letters and digits of a positive", "Lengths", "酒店几点退房", "model_name_or_path")]  # fmt: skip
    assert places == sorted(places)
    assert "<img>" not in html and "候选" in html and html.count("<svg ") == 2 and "2024" in html
    card = re.search(r'<section class="card item">(.*?)</section>', html, re.DOTALL)
    assert card and re.findall(r"<td[^>]*>([^<]*)</td>", card[1]) == [
        "positive", "0.700", "中午", "positive", "0.600", "十二点", "above", "0.650", "晚上", "negative", "0.600", "早餐",
    ]  # fmt: skip


def test_pages_of_nothing(tmp_path: Path) -> None:
    empty = {"neg_scores": np.array([]), "removed": {}, "lengths": {"negative": np.array([])}, "inspect": []}
    write_mining_report(tmp_path / "mine.html", replace(GOOD, **empty))
    write_check_report(tmp_path / "check.html", "Check of F", [])
    assert "AUC" not in (tmp_path / "mine.html").read_text(encoding="utf-8")
    assert "Check of F" in (tmp_path / "check.html").read_text(encoding="utf-8")


def test_the_negatives_most_like_a_positive_are_found() -> None:
    rows = [{"query": f"q{i}", "pos": [f"第{i}号柜台办理", "另见"]} for i in range(9)]
    neg = [[f"{i * 7}路公交车", "停车场在后面"] for i in range(9)]
    neg[7][1], neg[3] = "第七号柜台办理", []
    mined: Any = SimpleNamespace(neg=neg, neg_score=[[0.1, 0.2]] * 9)
    found = closest_in_words(
        rows, mined, Likeness([text for of in (*neg, *(row["pos"] for row in rows)) for text in of]), 5
    )
    assert found[0] == {
        "query": "q7", "positive": "第7号柜台办理", "negative": "第七号柜台办理", "alike": 1.0, "score": 0.2,
    }  # fmt: skip
    assert len(found) == 5 and [one["alike"] for one in found] == sorted((o["alike"] for o in found), reverse=True)
