"""Metrics against pytrec_eval (trec_eval's own code), FlagEmbedding's definition and figures worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_core import UserError
from bge_core.metrics import mean_metrics, per_query_metrics

NAMES = ["MRR@1", "MRR@10", "MRR@100", "Recall@1", "Recall@10", "Recall@100", "nDCG@10"]
OUTSIDE = 1_000_000  # first row number of positives that the corpus lacks


def single(ranking: list[int], relevant: Any, num_relevant: int | None = None) -> dict[str, float]:
    """The metrics of one query."""
    counts = None if num_relevant is None else [num_relevant]
    metrics = per_query_metrics([np.array(ranking, dtype=np.int64)], [relevant], counts)
    assert list(metrics) == NAMES
    assert all(values.shape == (1,) and values.dtype == np.float64 for values in metrics.values())
    return {name: float(values[0]) for name, values in metrics.items()}


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[int]], list[set[int]], list[int]]:
    """(rankings, relevant rows, number of positives outside the corpus) of a few queries; up to 130 rows."""
    rankings, relevant, num_outside = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(0, 130))
        order = draw(st.permutations(range(size)))
        rankings.append(list(order[: draw(st.integers(0, size))]))
        inside = set(draw(st.lists(st.integers(0, max(0, size - 1)), max_size=25))) if size else set()
        relevant.append(inside)
        num_outside.append(draw(st.integers(0, 15)))
    return rankings, relevant, num_outside


@settings(deadline=None)
@given(cases())
def test_equals_pytrec_eval(case: tuple[list[list[int]], list[set[int]], list[int]]) -> None:
    rankings, relevant, num_outside = case
    num_relevant = [len(inside) + outside for inside, outside in zip(relevant, num_outside, strict=True)]
    ours = per_query_metrics([np.array(r, dtype=np.int64) for r in rankings], relevant, num_relevant)
    assert list(ours) == NAMES
    qrels = {
        str(q): {str(row): 1 for row in [*relevant[q], *range(OUTSIDE, OUTSIDE + num_outside[q])]} or {"none": 0}
        for q in range(len(rankings))
    }
    for k in (1, 10, 100):
        # recip_rank has no cutoff of its own: the run is cut instead
        run = {str(q): {str(row): -float(i) for i, row in enumerate(r[:k])} for q, r in enumerate(rankings)}
        theirs = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank", f"recall.{k}", f"ndcg_cut.{k}"}).evaluate(run)
        for q in range(len(rankings)):
            truth = theirs.get(str(q), {})  # an empty ranking is left out there
            assert ours[f"MRR@{k}"][q] == pytest.approx(truth.get("recip_rank", 0.0), abs=1e-12)
            assert ours[f"Recall@{k}"][q] == pytest.approx(truth.get(f"recall_{k}", 0.0), abs=1e-12)
            if k == 10:
                assert ours["nDCG@10"][q] == pytest.approx(truth.get("ndcg_cut_10", 0.0), abs=1e-12)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_mrr_and_recall_are_those_of_flag_embedding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rankings = np.stack([rng.permutation(150)[:100] for _ in range(5)])
    labels = [rng.choice(150, size=rng.integers(1, 12), replace=False) for _ in range(5)]
    expected: dict[str, float] = {}
    for k in (1, 10, 100):  # its definition: every label counts, the first hit alone makes the reciprocal rank
        hits = [np.isin(ranking[:k], label).tolist() for ranking, label in zip(rankings, labels, strict=True)]
        expected[f"MRR@{k}"] = sum(1 / (hit.index(True) + 1) if any(hit) else 0 for hit in hits) / 5
        expected[f"Recall@{k}"] = sum(sum(hit) / len(label) for hit, label in zip(hits, labels, strict=True)) / 5
    ours = mean_metrics(per_query_metrics(rankings, labels))
    assert {name: ours[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_one_positive_at_rank_three_by_hand() -> None:
    assert single([7, 8, 5, 9], {5}) == pytest.approx(
        {
            "MRR@1": 0,
            "MRR@10": 1 / 3,
            "MRR@100": 1 / 3,
            "Recall@1": 0,
            "Recall@10": 1,
            "Recall@100": 1,
            "nDCG@10": 0.5,  # 1 / log2(4), and the ideal is 1
        }
    )


def test_positives_at_ranks_1_and_11_of_3_by_hand() -> None:
    ranking = [50, *range(9), 51, *range(10, 20)]
    metrics = single(ranking, {50, 51, 99})
    assert metrics["MRR@1"] == metrics["MRR@10"] == metrics["MRR@100"] == 1
    assert metrics["Recall@1"] == metrics["Recall@10"] == pytest.approx(1 / 3)
    assert metrics["Recall@100"] == pytest.approx(2 / 3)
    assert metrics["nDCG@10"] == pytest.approx(1 / (1 + 1 / math.log2(3) + 1 / 2))


def test_a_cutoff_includes_its_own_rank() -> None:
    at_10, at_11 = [*range(9), 50, 51], [*range(10), 50]
    assert single(at_10, {50})["MRR@10"] == pytest.approx(0.1)
    assert single(at_10, {50})["Recall@10"] == 1
    assert single(at_11, {50})["MRR@10"] == single(at_11, {50})["Recall@10"] == single(at_11, {50})["nDCG@10"] == 0
    assert single(at_11, {50})["MRR@100"] == pytest.approx(1 / 11)
    assert single([*range(100), 500], {500}) == dict.fromkeys(NAMES, 0.0)


def test_recall_is_not_capped_but_the_ideal_of_ndcg_ends_at_ten() -> None:
    metrics = single(list(range(20)), set(range(20)))
    assert metrics["Recall@1"] == 0.05
    assert metrics["Recall@10"] == 0.5
    assert metrics["Recall@100"] == metrics["nDCG@10"] == 1


def test_a_positive_that_the_corpus_lacks_is_a_miss() -> None:
    metrics = single([5, 6], {5}, num_relevant=2)
    assert metrics["MRR@1"] == 1
    assert metrics["Recall@100"] == 0.5
    assert metrics["nDCG@10"] == pytest.approx(1 / (1 + 1 / math.log2(3)))
    assert single([5, 6], set(), num_relevant=2) == dict.fromkeys(NAMES, 0.0)


def test_a_query_without_positives_gets_zero_and_counts_in_the_mean() -> None:
    assert single([1, 2], set()) == dict.fromkeys(NAMES, 0.0)
    both = per_query_metrics(np.array([[1, 2], [1, 2]]), [{1}, set()])
    assert mean_metrics(both)["MRR@1"] == 0.5


def test_a_short_ranking_ends_where_it_ends() -> None:
    assert single([], {1}) == dict.fromkeys(NAMES, 0.0)  # an empty corpus
    short = single([3, 1], {1, 2})
    assert short["MRR@10"] == short["MRR@100"] == 0.5
    assert short["Recall@10"] == short["Recall@100"] == 0.5
    assert short == single([3, 1, -1, -1, -1], {1, 2})  # k larger than the corpus: padded with -1


def test_minus_one_keeps_its_place_and_is_never_right() -> None:
    assert single([-1, 4], {4})["MRR@10"] == 0.5
    assert single([-1, -1], {4, -1})["MRR@10"] == 0
    assert single([4, -1], [4, -1])["Recall@1"] == 1  # -1 is no positive either


def test_a_repeated_row_is_right_once_and_the_repeats_keep_their_places() -> None:
    metrics = single([4, 4, 5], {4, 5})
    assert metrics["Recall@1"] == 0.5
    assert metrics["Recall@10"] == 1
    assert metrics["nDCG@10"] == pytest.approx((1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3)))


def test_relevant_may_be_arrays_lists_or_sets_with_repeats() -> None:
    as_set = single([1, 2, 3], {3, 9})
    assert as_set == single([1, 2, 3], np.array([9, 3, 3], dtype=np.int32)) == single([1, 2, 3], [3, 9, 9])


def test_other_cutoffs_name_their_metrics() -> None:
    metrics = per_query_metrics(np.array([[2, 1]]), [{1}], cutoffs=(1, 5))
    assert list(metrics) == ["MRR@1", "MRR@5", "Recall@1", "Recall@5", "nDCG@10"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1], [2]], [{1}]), "2, 1 and 1 queries"),
        (([[1]], [{1}], [1, 1]), "1, 1 and 2 queries"),
        (([[1]], [{1, 2}], [1]), r"num_relevant\[0\] is 1, but relevant\[0\] has 2 rows"),
        (([[1]], [{1}], None, (0, 10)), "at least 1"),
    ],
)
def test_contradicting_arguments_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        per_query_metrics(*arguments)


def test_mean_keeps_the_order_and_gives_python_floats() -> None:
    metrics = per_query_metrics(np.array([[1, 2], [2, 1], [3, 4]]), [{1}, {1}, {1}])
    means = mean_metrics(metrics)
    assert list(means) == NAMES
    assert means["MRR@10"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert all(type(value) is float for value in means.values())


def test_no_queries() -> None:
    metrics = per_query_metrics([], [])
    assert list(metrics) == NAMES and all(values.shape == (0,) for values in metrics.values())
    with pytest.raises(UserError, match="no query"):
        mean_metrics(metrics)
