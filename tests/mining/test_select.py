"""The choice of negatives: against FlagEmbedding's, by hand, and as properties."""

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_core.files.records import distinct_texts
from bge_core.files.text import text_id
from bge_core.mining.select import COUNTS, Negatives, query_ids, select_negatives
from bge_core.search.exact import exact_search

GOLDEN = json.loads((ROOT / "tests" / "golden" / "hn_mine.json").read_text(encoding="utf-8"))

Row = dict[str, Any]


def select(
    queries: list[str], positives: list[list[str]], ranked: list[list[int]], pool: list[str], **options: Any
) -> tuple[list[Negatives], dict[str, int]]:
    """select_negatives with a pool of texts; everything in range, five negatives, unless told otherwise."""
    options = {"sampling_range": (0, 1000), "negative_number": 5, "seed": 0} | options
    array = np.array(ranked, dtype=np.int64).reshape(len(queries), -1)
    ids = [text_id(text) for text in pool]
    chosen, counts = select_negatives(query_ids(queries, pool, ids), positives, array, ids, **options)
    return chosen, {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_candidates_equal_those_of_flagembedding(case: Row) -> None:
    rows, texts = GOLDEN["rows"], GOLDEN["pools"][case["pool"]]
    pool = distinct_texts(rows, "pos", "neg") if texts is None else distinct_texts([{"text": texts}], "text")
    start, end = map(int, case["range_for_sampling"].split("-"))
    queries = np.array(GOLDEN["query_embeddings"], dtype=np.float32)
    passages = np.array([GOLDEN["passage_embeddings"][text] for text in pool], dtype=np.float32)
    ranked = exact_search(queries, passages, end)[1]
    chosen, _ = select_negatives(
        [{text_id(row["query"])} for row in rows], [row["pos"] for row in rows], ranked, list(map(text_id, pool)),
        sampling_range=(start, end), negative_number=10**6, seed=0,
    )  # fmt: skip
    assert [[pool[i] for i in choice.ranked] for choice in chosen] == case["expected"]


def test_a_small_example_by_hand() -> None:
    pool = ["p0", "p1", "p2", "p3", "p4", "p5", "问", "p7"]
    ranked = [[7, 3, 0, 6, 1, 4, 2, 5]]
    # Hits 2 to 6 are p0 (the positive), 问 (the query), p1, p4; the range counts before these are taken out.
    chosen, counts = select(["问"], [["p0", "elsewhere"]], ranked, pool, sampling_range=(2, 6), negative_number=2)
    assert chosen == [Negatives([1, 4], [])]
    assert counts == {"positives_dropped": 1, "queries_dropped": 1}
    chosen, counts = select(["问"], [["p0"]], ranked, pool, sampling_range=(2, 6), negative_number=1)
    assert chosen in ([Negatives([1], [])], [Negatives([4], [])])
    assert counts == {"positives_dropped": 1, "queries_dropped": 1, "rows_sampled": 1}
    chosen, counts = select(["问"], [["p0"]], ranked, pool, sampling_range=(2, 6), negative_number=4, kept=[["p4"]])
    assert chosen[0].ranked == [1] and len(chosen[0].filled) == 3 and set(chosen[0].filled) < {2, 3, 5, 7}
    assert counts == {
        "positives_dropped": 1, "queries_dropped": 1, "kept_dropped": 1, "rows_filled_at_random": 1,
        "negatives_at_random": 3,
    }  # fmt: skip
    chosen, counts = select(["问"], [["p0"]], ranked, pool, sampling_range=(2, 6), negative_number=99)
    assert chosen[0].ranked == [1, 4] and sorted(chosen[0].filled) == [2, 3, 5, 7]
    assert counts["rows_short"] == 1 and "rows_without_negatives" not in counts


def test_texts_are_compared_normalized() -> None:
    pool = ["ＡＢＣ  公司", "其他", " 问题？"]
    chosen, counts = select(["问题?"], [["ABC 公司"]], [[0, 1, 2]], pool)
    assert chosen == [Negatives([1], [])]
    assert counts == {"positives_dropped": 1, "queries_dropped": 1, "rows_short": 1, "rows_short_of_pool": 1}


@pytest.mark.parametrize("text", ["退货要几天", "退货 要几天？", "退货要几天 ?", "【退货】要几天。"])
def test_a_query_is_no_negative_of_itself_whatever_its_marks_and_spaces(text: str) -> None:
    for ranked in ([[0, 1]], [[-1, -1]]):  # found, or drawn at random
        chosen, _ = select(["退货要几天？"], [["p0"]], ranked, [text, "换货要几天？"])
        assert [*chosen[0].ranked, *chosen[0].filled] == [1]
    assert select(["？"], [["p0"]], [[0, 1]], ["！", "。"])[0][0].ranked == [0, 1]  # no letters: other texts


@pytest.mark.parametrize("pool", [[], ["p0"], ["q"], ["p0", "q"]])
def test_a_pool_without_any_negative(pool: list[str]) -> None:
    chosen, counts = select(["q"], [["p0"]], [list(range(len(pool)))], pool)
    assert chosen == [Negatives([], [])]
    assert counts["rows_short"] == counts["rows_without_negatives"] == 1


@st.composite
def problems(draw: st.DrawFn) -> Row:
    """A pool, rows whose texts come from it or not, and for each a ranking cut short and padded."""
    num_pool = draw(st.integers(0, 12))
    texts = st.sampled_from([f"t{i}" for i in range(15)])  # t12 to t14 are never in the pool
    num_rows = draw(st.integers(1, 4))
    depth = draw(st.integers(0, 14))
    ranked = [[*draw(st.permutations(range(num_pool))), *[-1] * 14][:depth] for _ in range(num_rows)]
    start = draw(st.integers(0, 6))
    return {
        "queries": draw(st.lists(texts, min_size=num_rows, max_size=num_rows)),
        "positives": draw(st.lists(st.lists(texts, min_size=1, max_size=3), min_size=num_rows, max_size=num_rows)),
        "kept": draw(st.lists(st.lists(texts, max_size=3), min_size=num_rows, max_size=num_rows)),
        "ranked": ranked,
        "pool": [f"t{i}" for i in range(num_pool)],
        "sampling_range": (start, start + draw(st.integers(1, 10))),
        "negative_number": draw(st.integers(1, 9)),
        "seed": draw(st.integers(-3, 3)),
    }


@settings(deadline=None, max_examples=150)
@given(problem=problems())
def test_what_holds_for_every_row(problem: Row) -> None:
    chosen, counts = select(**problem)
    (start, end), wanted, pool = problem["sampling_range"], problem["negative_number"], problem["pool"]
    for i, (ranked, filled) in enumerate(chosen):
        excluded = {problem["queries"][i], *problem["positives"][i], *problem["kept"][i]}
        in_range = [row for row in problem["ranked"][i][start:end] if row >= 0 and pool[row] not in excluded]
        found = [*ranked, *filled]
        assert not {pool[row] for row in found} & excluded
        assert len(set(found)) == len(found) == min(wanted, len(set(pool) - excluded))
        assert len(ranked) == min(wanted, len(in_range))
        assert ranked == [row for row in in_range if row in ranked]  # in the order of the ranking
    assert counts.get("negatives_at_random", 0) == sum(len(choice.filled) for choice in chosen)
    assert counts.get("rows_short", 0) == sum(len(ranked) + len(filled) < wanted for ranked, filled in chosen)
    assert set(counts) <= set(COUNTS)


@settings(deadline=None, max_examples=50)
@given(problem=problems(), other=problems())
def test_a_row_depends_on_no_other_row(problem: Row, other: Row) -> None:
    """The same row at the same place, among other rows, chooses the same."""
    before = select(**problem)[0]
    changed = {**problem}
    for name in ("queries", "positives", "kept", "ranked"):
        changed[name] = [*problem[name][:1], *problem[name][:1], *problem[name][2:], *problem[name]]
    after = select(**changed)[0]
    assert after[0] == before[0] and after[2 : len(before)] == before[2:]


def test_the_seed_and_the_row_decide_the_sample() -> None:
    pool, ranked = [f"p{i}" for i in range(200)], [list(range(200))] * 3

    def run(seed: int, end: int) -> list[Negatives]:
        return select(["q"] * 3, [["x"]] * 3, ranked, pool, seed=seed, sampling_range=(2, end), negative_number=20)[0]

    for end in (150, 10):  # a sample of the range; a random filling
        assert run(1, end) == run(1, end) != run(2, end)
        assert len({str(choice) for choice in run(1, end) + run(2, end)}) == 6


def test_every_candidate_is_equally_likely() -> None:
    num_rows, pool = 3000, [f"p{i}" for i in range(10)]
    positives = [["p0", "p1"]] * num_rows
    for name, sampling_range in (("ranked", (0, 10)), ("filled", (20, 30))):
        chosen, _ = select(
            ["q"] * num_rows, positives, [list(range(10))] * num_rows, pool, negative_number=3,
            sampling_range=sampling_range,
        )  # fmt: skip
        times = np.bincount([row for choice in chosen for row in getattr(choice, name)], minlength=10)
        assert times[:2].sum() == 0
        np.testing.assert_allclose(times[2:], num_rows * 3 / 8, rtol=0.11)  # 5 standard deviations


def test_the_highest_hits_are_taken_with_top() -> None:
    pool = [f"t{i}" for i in range(20)]
    chosen, _ = select(
        ["q"], [["t3"]], [list(range(20))], pool, sampling_range=(2, 12), negative_number=4, sampling="top"
    )
    assert chosen == [Negatives([2, 4, 5, 6], [])]


def test_sampling_by_score_follows_the_softmax() -> None:
    """The first draw of many rows against exp(score / temperature), and no row takes a hit twice."""
    pool, score = [f"t{i}" for i in range(4)], np.array([0.30, 0.25, 0.20, 0.10])
    num_rows = 2000
    options: dict[str, Any] = {
        "sampling": "score", "temperature": 0.1, "negative_number": 1,
        "embedded": SimpleNamespace(scores=lambda number, rows: score[list(rows)]),
    }  # fmt: skip
    ranked = [[0, 1, 2, 3]] * num_rows
    chosen, _ = select(["q"] * num_rows, [["p"]] * num_rows, ranked, pool, **options)
    share = np.bincount([choice.ranked[0] for choice in chosen], minlength=4) / num_rows
    want = np.exp(score / 0.1) / np.exp(score / 0.1).sum()
    assert np.abs(share - want).max() < 4 * np.sqrt(0.25 / num_rows)
    three = select(["q"] * 50, [["p"]] * 50, ranked[:50], pool, **options | {"negative_number": 3})[0]
    assert all(len(set(choice.ranked)) == 3 for choice in three)


def test_what_is_excluded_is_counted_and_neither_taken_nor_filled_in() -> None:
    pool = [f"t{i}" for i in range(30)]

    def reasons(number: int, rows: Sequence[int]) -> list[str | None]:
        return ["odd" if row % 2 else None for row in rows]

    chosen, counts = select(
        ["q"],
        [["p"]],
        [[0, 1, 2, 3, 4, 5, 6, 7]],
        pool,
        sampling_range=(1, 8),
        negative_number=9,
        filters=SimpleNamespace(reasons=reasons),
    )
    assert chosen[0].ranked == [2, 4, 6] and len(chosen[0].filled) == 6
    assert all(row % 2 == 0 and row not in (2, 4, 6) for row in chosen[0].filled)
    assert counts["odd_dropped"] == 4 and counts["negatives_at_random"] == 6


def test_a_teacher_is_asked_only_for_what_would_be_taken() -> None:
    pool, asked = [f"t{i}" for i in range(100)], []

    def accepts(pairs: Sequence[tuple[int, int]]) -> list[bool]:
        asked.append(list(pairs))
        return [row >= 5 for _, row in pairs]

    options: dict[str, Any] = {
        "sampling": "top",
        "negative_number": 4,
        "sampling_range": (0, 50),
        "teacher": SimpleNamespace(accepts=accepts),
    }
    chosen, counts = select(["q", "r"], [["p"], ["p"]], [list(range(50)), list(range(20, 70))], pool, **options)
    assert [choice.ranked for choice in chosen] == [[5, 6, 7, 8], [20, 21, 22, 23]]
    assert asked[0] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 20), (1, 21), (1, 22), (1, 23)]
    assert asked[1] == [(0, 4), (0, 5), (0, 6), (0, 7)] and asked[2] == [(0, 8)] and len(asked) == 3
    assert counts["teacher_dropped"] == 5
