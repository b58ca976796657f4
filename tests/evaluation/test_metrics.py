"""Metrics against pytrec_eval (trec_eval's own code), loops written from the definitions, FlagEmbedding's definition
and figures worked out by hand."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_core import UserError
from bge_core.evaluation import metrics
from bge_core.evaluation.metrics import DEFAULT_METRICS, METRICS, mean_metrics, parse_metric, per_query_metrics

NAMES = ["MRR@1", "MRR@10", "MRR@100", "Recall@1", "Recall@10", "Recall@100", "nDCG@10"]
CUTOFFS = (1, 3, 10, 100)
ALL_NAMES = [f"{kind}@{k}" for kind in METRICS if kind != "RPrecision" for k in CUTOFFS] + ["RPrecision"]
NOT_IN_TREC = {"CappedRecall"}  # metrics that trec_eval lacks
IN_TREC = {
    "Recall": "recall", "nDCG": "ndcg_cut", "MAP": "map_cut", "Precision": "P", "Success": "success",
}  # fmt: skip

Case = tuple[list[int], Any, list[int]]  # ranking, relevant, grades of what the corpus lacks


def single(ranking: Sequence[int], relevant: Any, missing: Sequence[float] = (), names: Any = None) -> dict[str, float]:
    """The metrics of one query."""
    extra = {} if names is None else {"names": names}
    metrics = per_query_metrics([np.array(ranking, dtype=np.int64)], [relevant], [missing], **extra)
    assert list(metrics) == (NAMES if names is None else list(names))
    assert all(values.shape == (1,) and values.dtype == np.float64 for values in metrics.values())
    return {name: float(values[0]) for name, values in metrics.items()}


def grades_of(relevant: Any) -> dict[int, int]:
    pairs = relevant.items() if isinstance(relevant, Mapping) else ((row, 1) for row in relevant)
    return {int(row): int(grade) for row, grade in pairs if row >= 0}


# ----------------------------------------------------------------------------------------------------------- references


def slow_metric(name: str, ranking: Sequence[int], relevant: Any, missing: Sequence[int]) -> float:
    """One metric of one query, from its definition."""
    grade_of = grades_of(relevant)
    positives = sorted((grade for grade in [*grade_of.values(), *missing] if grade > 0), reverse=True)
    if not positives:
        return 0.0
    kind, _, text = name.partition("@")
    k = int(text) if text else len(positives)
    hits: list[tuple[int, int]] = []  # rank and grade
    for i, row in enumerate(ranking[:k]):
        if grade_of.get(row, 0) > 0 and row not in ranking[:i]:
            hits.append((i + 1, grade_of[row]))
    if kind == "MRR":
        return 1 / hits[0][0] if hits else 0.0
    if kind == "Recall":
        return len(hits) / len(positives)
    if kind == "CappedRecall":
        return len(hits) / min(len(positives), k)
    if kind == "nDCG":
        ideal = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(positives[:k], start=1))
        return sum(grade / math.log2(rank + 1) for rank, grade in hits) / ideal
    if kind == "MAP":
        return sum(count / rank for count, (rank, _) in enumerate(hits, start=1)) / len(positives)
    if kind in ("Precision", "RPrecision"):
        return len(hits) / k
    assert kind == "Success"
    return float(len(hits) > 0)


def trec_metrics(cases: Sequence[Case]) -> dict[str, np.ndarray]:
    """The same from trec_eval, which knows no CappedRecall."""
    qrels, runs = {}, {}
    for q, (ranking, relevant, missing) in enumerate(cases):
        judged = {str(row): grade for row, grade in grades_of(relevant).items()}
        judged |= {f"missing{i}": grade for i, grade in enumerate(missing)}
        qrels[str(q)] = judged or {"none": 0}
        # What counts for nothing is there a document that nobody judged; scores fall, so that it keeps our order.
        places = [str(row) if row >= 0 and row not in ranking[:i] else f"no{i}" for i, row in enumerate(ranking)]
        runs[str(q)] = {document: float(len(places) - i) for i, document in enumerate(places)}
    measures = {f"{theirs}.{','.join(map(str, CUTOFFS))}" for theirs in IN_TREC.values()}

    def evaluate(wanted: set[str], depth: int) -> list[dict[str, float]]:
        run = {q: dict(list(scores.items())[:depth]) for q, scores in runs.items()}
        found = pytrec_eval.RelevanceEvaluator(qrels, wanted).evaluate(run)
        return [found.get(str(q), {}) for q in range(len(cases))]  # an empty ranking is left out there

    whole = evaluate(measures | {"Rprec"}, 10**6)
    truth = {"RPrecision": [values.get("Rprec", 0.0) for values in whole]}
    for k in CUTOFFS:
        # recip_rank has no cutoff of its own: the run is cut instead
        truth[f"MRR@{k}"] = [values.get("recip_rank", 0.0) for values in evaluate({"recip_rank"}, k)]
        for ours, theirs in IN_TREC.items():
            truth[f"{ours}@{k}"] = [values.get(f"{theirs}_{k}", 0.0) for values in whole]
    return {name: np.array(values) for name, values in truth.items()}


def largest_difference(cases: Sequence[Case]) -> float:
    """Ours to trec_eval's and to the loops'."""
    rankings, relevant, missing = ([case[i] for case in cases] for i in range(3))
    ours = per_query_metrics([np.array(r, dtype=np.int64) for r in rankings], relevant, missing, ALL_NAMES)
    assert list(ours) == ALL_NAMES
    theirs = trec_metrics(cases)
    slow = {name: np.array([slow_metric(name, *case) for case in cases]) for name in ALL_NAMES}
    unknown = {name.partition("@")[0] for name in set(ALL_NAMES) - set(theirs)}
    assert unknown == NOT_IN_TREC, "IN_TREC says what trec_eval calls a metric, NOT_IN_TREC that it has none"
    return max(float(np.abs(ours[name] - truth[name]).max()) for truth in (theirs, slow) for name in truth)


@st.composite
def any_cases(draw: st.DrawFn) -> list[Case]:
    """A few queries: gaps and repeats in the ranking, binary or graded judgements, positives outside the corpus."""
    cases: list[Case] = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(0, 130))
        ranking = list(draw(st.permutations(range(size)))[: draw(st.integers(0, size))])
        for _ in range(draw(st.integers(0, 3)) if ranking else 0):
            ranking[draw(st.integers(0, len(ranking) - 1))] = draw(st.sampled_from([-1, *ranking]))
        rows = draw(st.lists(st.integers(-1, max(0, size - 1)), max_size=25)) if size else []
        graded = draw(st.booleans())
        relevant = {row: draw(st.integers(-1, 4)) for row in rows} if graded else rows
        cases.append((ranking, relevant, draw(st.lists(st.integers(0, 3 if graded else 1), max_size=15))))
    return cases


def random_cases(rng: np.random.Generator, count: int) -> list[Case]:
    cases: list[Case] = []
    for _ in range(count):
        ranking = rng.permutation(200)[: rng.integers(0, 130)].tolist()
        rows = rng.choice(200, size=rng.integers(0, 25), replace=False).tolist()
        relevant: Any = {row: int(grade) for row, grade in zip(rows, rng.integers(0, 5, len(rows)), strict=True)}
        cases.append((ranking, relevant if rng.random() < 0.5 else rows, rng.integers(0, 3, rng.integers(3)).tolist()))
    return cases


@settings(deadline=None, max_examples=300)
@given(any_cases())
def test_equals_pytrec_eval_and_the_definitions(cases: list[Case]) -> None:
    assert largest_difference(cases) < 1e-9


def test_equals_pytrec_eval_and_the_definitions_on_many_queries_at_once() -> None:
    cases = random_cases(np.random.default_rng(0), 2500)  # more than are worked on at once
    assert largest_difference(cases) < 1e-9


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


def test_of_equal_scores_the_order_given_counts_and_trec_eval_sees_it_in_scores_that_fall() -> None:
    ranking, relevant = [2, 10, 30], {2}  # the search gave all three the same score: the smaller row first
    assert single(ranking, relevant)["MRR@10"] == 1
    evaluator = pytrec_eval.RelevanceEvaluator({"q": {"2": 1}}, {"recip_rank"})
    tied = evaluator.evaluate({"q": {str(row): 0.5 for row in ranking}})
    assert tied["q"]["recip_rank"] == pytest.approx(1 / 2)  # it puts the larger id first, as text: 30, 2, 10
    falling = evaluator.evaluate({"q": {str(row): 0.5 - 1e-6 * i for i, row in enumerate(ranking)}})
    assert falling["q"]["recip_rank"] == 1


# -------------------------------------------------------------------------------------------------------------- by hand


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        # ranking 9 1 8 2 3, of which 1, 2 and 3 are right; right too are 4, not in the ranking, and one not in the corpus
        ("MRR@1", 0), ("MRR@2", 1 / 2), ("MRR@5", 1 / 2),
        ("Recall@1", 0), ("Recall@2", 1 / 5), ("Recall@4", 2 / 5), ("Recall@5", 3 / 5), ("Recall@50", 3 / 5),
        ("CappedRecall@1", 0), ("CappedRecall@2", 1 / 2), ("CappedRecall@4", 2 / 4), ("CappedRecall@50", 3 / 5),
        ("MAP@1", 0), ("MAP@2", 1 / 2 / 5), ("MAP@4", (1 / 2 + 2 / 4) / 5), ("MAP@9", (1 / 2 + 2 / 4 + 3 / 5) / 5),
        ("Precision@1", 0), ("Precision@2", 1 / 2), ("Precision@4", 2 / 4), ("Precision@10", 3 / 10),
        ("Success@1", 0), ("Success@2", 1), ("Success@10", 1),
        ("RPrecision", 3 / 5),
        ("nDCG@1", 0),
        ("nDCG@2", 1 / math.log2(3) / (1 + 1 / math.log2(3))),
        ("nDCG@4", (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3) + 1 / 2 + 1 / math.log2(5))),
    ],
)  # fmt: skip
def test_each_metric_by_hand(name: str, value: float) -> None:
    assert single([9, 1, 8, 2, 3], {1, 2, 3, 4}, missing=[1], names=[name])[name] == pytest.approx(value, abs=1e-15)


def test_graded_ndcg_by_hand() -> None:
    graded = {1: 1, 2: 3, 3: 0, 4: 2, 5: -2}
    found = 3 / 2 + 1 / math.log2(5)  # grade 3 at rank 3, grade 1 at rank 4; 3 and 5 are judged and not relevant
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    metrics = single([3, 5, 2, 1], graded, names=["nDCG@10", "nDCG@2", "Recall@10", "MRR@10", "RPrecision"])
    assert metrics["nDCG@10"] == pytest.approx(found / ideal)
    assert metrics["nDCG@2"] == 0
    assert metrics["Recall@10"] == pytest.approx(2 / 3)
    assert metrics["MRR@10"] == metrics["RPrecision"] == pytest.approx(1 / 3)
    # what the corpus lacks is in the ideal with its grade, and only if that is above 0
    outside = single([3, 5, 2, 1], graded, missing=[5, 0, -1], names=["nDCG@10", "Recall@10"])
    ideal = 5 + 3 / math.log2(3) + 2 / 2 + 1 / math.log2(5)
    assert outside == pytest.approx({"nDCG@10": found / ideal, "Recall@10": 2 / 4})


def test_the_best_ranking_of_graded_positives_has_an_ndcg_of_one() -> None:
    assert single([4, 9, 7], {9: 2, 7: 1, 4: 3})["nDCG@10"] == 1.0
    assert single([4, 7, 9], {9: 2, 7: 1, 4: 3})["nDCG@10"] < 1


def test_rprecision_looks_as_deep_as_there_are_positives() -> None:
    assert single([1, 9, 2], {1, 2}, names=["RPrecision"])["RPrecision"] == 0.5
    assert single([1, 9, 2], {1, 2}, missing=[1], names=["RPrecision"])["RPrecision"] == pytest.approx(2 / 3)
    assert single([1], {1, 2}, names=["RPrecision"])["RPrecision"] == 0.5


# ---------------------------------------------------------------------------------------------------------------- edges


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
    assert single(list(range(20)), set(range(20)), names=["CappedRecall@10"])["CappedRecall@10"] == 1


def test_a_positive_that_the_corpus_lacks_is_a_miss() -> None:
    metrics = single([5, 6], {5}, missing=[1])
    assert metrics["MRR@1"] == 1
    assert metrics["Recall@100"] == 0.5
    assert metrics["nDCG@10"] == pytest.approx(1 / (1 + 1 / math.log2(3)))
    assert single([5, 6], set(), missing=[1, 1]) == dict.fromkeys(NAMES, 0.0)
    assert single([-1, 0], set(), missing=[1, 1]) == dict.fromkeys(NAMES, 0.0)  # nothing stands for it


def test_a_query_without_positives_gets_zero_and_counts_in_the_mean() -> None:
    for nothing in (set(), {1: 0, 2: -1}):
        assert single([1, 2], nothing, names=ALL_NAMES) == dict.fromkeys(ALL_NAMES, 0.0)
    both = per_query_metrics(np.array([[1, 2], [1, 2]]), [{1}, set()])
    assert mean_metrics(both)["MRR@1"] == 0.5


def test_a_short_ranking_ends_where_it_ends() -> None:
    assert single([], {1}, names=ALL_NAMES) == dict.fromkeys(ALL_NAMES, 0.0)  # an empty corpus
    short = single([3, 1], {1, 2})
    assert short["MRR@10"] == short["MRR@100"] == 0.5
    assert short["Recall@10"] == short["Recall@100"] == 0.5
    assert short == single([3, 1, -1, -1, -1], {1, 2})  # k larger than the corpus: padded with -1


def test_minus_one_keeps_its_place_and_is_never_right() -> None:
    assert single([-1, 4], {4})["MRR@10"] == 0.5
    assert single([-1, -1], {4, -1})["MRR@10"] == 0
    assert single([4, -1], [4, -1])["Recall@1"] == 1  # -1 is no positive either
    assert single([4, -1], {4: 1, -1: 2})["nDCG@10"] == 1


def test_a_repeated_row_is_right_once_and_the_repeats_keep_their_places() -> None:
    metrics = single([4, 4, 5], {4, 5})
    assert metrics["Recall@1"] == 0.5
    assert metrics["Recall@10"] == 1
    assert metrics["nDCG@10"] == pytest.approx((1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3)))


def test_a_row_that_is_right_for_another_query_is_not_right_here() -> None:
    metrics = per_query_metrics(np.array([[1, 2, 3], [3, 2, 1], [0, 4, 1]]), [{3}, {1: 2, 2: 0}, {4}], names=["MRR@3"])
    assert metrics["MRR@3"].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 2])


def test_relevant_may_be_arrays_lists_sets_or_mappings_with_repeats() -> None:
    as_set = single([1, 2, 3], {3, 9})
    assert as_set == single([1, 2, 3], np.array([9, 3, 3], dtype=np.int32)) == single([1, 2, 3], [3, 9, 9])
    assert as_set == single([1, 2, 3], {3: 1, 9: 1, 1: 0}) == single([1, 2, 3], iter([3, 9]))


def test_an_array_and_lists_of_any_length_are_the_same() -> None:
    rng = np.random.default_rng(1)
    table = np.stack([rng.permutation(50)[:20] for _ in range(7)]).astype(np.int32)
    table[2, 5:] = -1
    relevant = [rng.choice(50, 5, replace=False) for _ in range(7)]
    ragged = [row[row >= 0].tolist() for row in table]
    one, other = (per_query_metrics(ranked, relevant, names=ALL_NAMES) for ranked in (table, ragged))
    assert all((one[name] == other[name]).all() for name in ALL_NAMES)


# ---------------------------------------------------------------------------------------------------- names and mistakes


def test_the_names_are_those_asked_for_in_that_order() -> None:
    assert list(DEFAULT_METRICS) == NAMES
    metrics = per_query_metrics(np.array([[2, 1]]), [{1}], names=("Recall@7", "MRR@5", "RPrecision", "MRR@1"))
    assert list(metrics) == ["Recall@7", "MRR@5", "RPrecision", "MRR@1"]
    assert parse_metric("nDCG@10") == ("nDCG", 10) and parse_metric("RPrecision") == ("RPrecision", None)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("MRR@0", "MRR@10"), ("MRR@-1", "MRR@10"), ("MRR@010", "MRR@10"), ("MRR@1.5", "MRR@10"), ("MRR@", "MRR@10"),
        ("MRR@１", "MRR@10"), ("MRR@9999999999", "MRR@10"),
        ("nDCG", "nDCG@10"), ("ndcg@5", "nDCG@5"), ("NDCG@10", "nDCG@10"), ("Recal@3", "Recall@3"), ("mrr@1", "MRR@1"),
        ("Hit@7", "Success@7"), ("Accuracy@1", "Success@1"), ("P@5", "Precision@5"), ("map@100", "MAP@100"),
        ("RPrecision@5", "RPrecision"), ("R-Precision", "RPrecision"), ("Rprec", "RPrecision"), ("Precision", "Precision@10"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"unknown metric .*did you mean '{nearest}'.*CappedRecall@k.*RPrecision"):
        parse_metric(name)
    with pytest.raises(UserError, match="did you mean"):
        per_query_metrics([[1]], [{1}], names=["MRR@1", name])


def test_every_name_leads_to_a_function() -> None:
    """The table's names have a definition in `slow_metric`, too, which refuses one that it does not know."""
    assert set(metrics._NAMES_ELSEWHERE.values()) <= set(METRICS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1], [2]], [{1}]), "2, 1 and 1 queries"),
        (([[1]], [{1}], [[1], [1]]), "1, 1 and 2 queries"),
        (([[1]], [{1: math.nan}]), "NaN"),
        (([[1]], [{1}], [[math.inf]]), "infinite"),
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
    metrics = per_query_metrics([], [], names=ALL_NAMES)
    assert list(metrics) == ALL_NAMES and all(values.shape == (0,) for values in metrics.values())
    with pytest.raises(UserError, match="no query"):
        mean_metrics(metrics)
