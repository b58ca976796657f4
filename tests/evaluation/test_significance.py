"""Intervals and p-values against loops, scipy, exhaustive enumeration, simulated data and figures worked out by hand."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_core import UserError
from bge_core.evaluation import significance
from bge_core.evaluation.significance import (
    bootstrap_means,
    compare_to_baseline,
    holm,
    permutation_p_values,
    thresholds,
)

scipy_stats = pytest.importorskip("scipy.stats")  # comes with sentence-transformers


# ----------------------------------------------------------------------------------------------------------- references


def slow_bootstrap(values: Sequence[float], resamples: int, seed: int) -> tuple[float, float, float]:
    """One query after the other."""
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = rng.integers(len(values), size=len(values))
        means.append(math.fsum(values[i] for i in drawn) / len(values))
    low, high = np.quantile(means, [0.025, 0.975])
    return math.fsum(values) / len(values), float(low), float(high)


def p_value_of(differences: np.ndarray, resamples: int = 10_000, seed: int = 0) -> float:
    return float(permutation_p_values(differences[:, None], resamples, seed)[0])


def exact_p_value(differences: Sequence[float]) -> float:
    """All sign patterns, of the zeros too."""
    observed = abs(math.fsum(differences))
    patterns = list(itertools.product((1, -1), repeat=len(differences)))
    sums = [abs(math.fsum(s * d for s, d in zip(signs, differences, strict=True))) for signs in patterns]
    return sum(value >= observed - 1e-12 for value in sums) / len(patterns)


def slow_thresholds(
    positive: Sequence[float], negative: Sequence[float], target: str, value: float
) -> tuple[float | None, float | None, float]:
    """Threshold, rate and recall, every score tried in rising order."""
    for t in sorted({*positive, *negative}):
        right, wrong = sum(score >= t for score in positive), sum(score >= t for score in negative)
        precision, false_positive_rate = right / (right + wrong), wrong / len(negative)
        if precision >= value if target == "precision" else false_positive_rate <= value:
            reached = precision if target == "precision" else false_positive_rate
            return t, reached, right / len(positive)
    return None, None, 0.0


# ------------------------------------------------------------------------------------------------------------ bootstrap


@pytest.mark.parametrize("cells", [1, 700, 2**21])
def test_bootstrap_is_that_of_a_loop(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "_CELLS_AT_ONCE", cells)  # blocks of 1, of 10 and of all 333 resamples
    value_QM = np.random.default_rng(5).random((70, 3))
    found = bootstrap_means(value_QM, 333, seed=9)
    assert all(part.shape == (3,) and part.dtype == np.float64 for part in found)
    for column in range(3):  # the same draws for every column, alone or not
        expected = slow_bootstrap(value_QM[:, column].tolist(), 333, 9)
        assert [part[column] for part in found] == pytest.approx(expected, abs=1e-14)
        alone = bootstrap_means(value_QM[:, column], 333, seed=9)
        assert all(part.shape == () for part in alone)
        assert [float(part) for part in alone] == pytest.approx(expected, abs=1e-14)


def test_bootstrap_agrees_with_scipy() -> None:
    values = np.random.default_rng(2).exponential(size=400)
    theirs = scipy_stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=1)
    _, low, high = bootstrap_means(values, 10_000, seed=0)
    width = high - low
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.05 * width)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.05 * width)


def test_bootstrap_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    value_QM = rng.beta(0.4, 0.6, size=(200, 600))  # a metric of 200 queries, most near 0 or 1; measured 600 times
    _, low, high = bootstrap_means(value_QM, 1000, seed=3)
    covered = np.mean((low <= 0.4) & (high >= 0.4))
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 600))


def test_equal_values_and_a_single_query_leave_no_doubt() -> None:
    for values in (np.full(50, 0.1), np.array([0.3])):
        assert [float(part) for part in bootstrap_means(values, 200)] == pytest.approx([values[0]] * 3, abs=1e-15)


# ---------------------------------------------------------------------------------------------------------- permutation


def test_permutation_by_hand() -> None:
    assert p_value_of(np.array([1.0, 1, 1])) == 2 / 8  # +++ and ---
    assert p_value_of(np.array([3.0, -1, 0, 0])) == 4 / 4  # sums 2 4 -4 -2: |2| or more
    assert p_value_of(np.array([3.0, 1, 0, 0])) == 2 / 4
    assert p_value_of(np.array([0.5] * 9)) == 2 / 512
    assert p_value_of(np.zeros(20)) == 1


@settings(deadline=None)
@given(st.lists(st.sampled_from([-1, -0.5, -1 / 3, 0, 0, 0.1, 0.3, 0.7, 1]), min_size=1, max_size=9))
def test_few_differences_are_enumerated(differences: list[float]) -> None:
    assert p_value_of(np.array(differences), 512) == exact_p_value(differences)


def test_enumeration_ends_where_there_are_more_patterns_than_resamples() -> None:
    five = np.array([0.1, 0.2, 0.4, -0.8, 1.6, 0, 0])
    assert p_value_of(five, 32) == exact_p_value(five.tolist())
    drawn = {p_value_of(five, 31, seed=seed) for seed in range(10)}
    assert len(drawn) > 1  # differs with the seed, and is always a multiple of 1/32
    assert all(p * 32 == round(p * 32) and p > 0 for p in drawn)


def test_drawn_signs_agree_with_enumeration_and_scipy() -> None:
    rng = np.random.default_rng(4)
    for shift in (0.0, 0.1, 0.3):
        differences = rng.normal(shift, 0.5, size=14)
        exact = exact_p_value(differences.tolist())
        drawn = p_value_of(differences, 16_383)  # 2^14 patterns: one too many to enumerate
        assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 16_383) + 1e-4)
        theirs = scipy_stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
        )
        assert p_value_of(differences, 16_384) == pytest.approx(theirs.pvalue, abs=1e-12)


@pytest.mark.parametrize("cells", [1, 2**21])
def test_the_p_value_of_drawn_signs_is_never_zero(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "_CELLS_AT_ONCE", cells)
    assert p_value_of(np.ones(300), 99) == 1 / 100
    assert p_value_of(-np.ones(300), 99) == 1 / 100


def test_sums_that_differ_by_rounding_alone_are_equal() -> None:
    tenths = np.array([0.1, 0.2, 0.3, -0.6, 0.7] * 8)  # many patterns have exactly the sum of the data
    whole = np.round(tenths * 10)
    assert p_value_of(tenths, 2000, seed=1) == p_value_of(whole, 2000, seed=1)
    assert p_value_of(tenths[:10], 2000) == p_value_of(whole[:10], 2000)


def test_p_values_are_uniform_where_there_is_no_difference() -> None:
    rng = np.random.default_rng(7)
    p_values = np.array([p_value_of(rng.normal(size=40), 499, seed=seed) for seed in range(500)])
    for level in (0.05, 0.2, 0.5, 0.8):
        assert np.mean(p_values <= level) == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 500))


def test_a_difference_is_found() -> None:
    rng = np.random.default_rng(8)
    found = [p_value_of(rng.normal(0.5, 1, size=100), 499, seed=seed) < 0.05 for seed in range(50)]
    assert np.mean(found) > 0.95  # the t-test's power is 0.999


# ----------------------------------------------------------------------------------------------------------------- Holm


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]).tolist() == [1, 1]
    assert holm(np.array([0.2])).tolist() == [0.2]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_its_steps_reject(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    m = len(p_values)
    order = sorted(range(m), key=p_values.__getitem__)
    assert (np.diff(adjusted[order]) >= 0).all()
    assert (adjusted >= p_values).all() and (adjusted <= 1).all()
    for level in (0.01, 0.05, 0.5):
        rejected: set[int] = set()
        for step, i in enumerate(order):  # from the smallest on, until one is not small enough
            if p_values[i] * (m - step) > level:
                break
            rejected.add(i)
        assert {i for i in range(m) if adjusted[i] <= level} == rejected


# ----------------------------------------------------------------------------------------------------------- comparison


def three_models() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(11)
    base = {"MRR@10": rng.random(80), "Recall@10": rng.integers(0, 2, 80).astype(float)}
    better = {name: np.clip(values + rng.choice([0, 0, 0.1], 80), 0, 1) for name, values in base.items()}
    other = {"MRR@10": rng.random(80), "Recall@10": rng.integers(0, 2, 80).astype(float)}
    return {"better": better, "base": base, "other": other}


def test_each_model_is_compared_by_its_differences() -> None:
    per_query = three_models()
    rows = compare_to_baseline(per_query, "base", resamples=500, seed=6)
    order = [("MRR@10", "better"), ("MRR@10", "other"), ("Recall@10", "better"), ("Recall@10", "other")]
    assert [(row.metric, row.model) for row in rows] == order
    assert {row.baseline for row in rows} == {"base"}
    for row in rows:
        differences = per_query[row.model][row.metric] - per_query["base"][row.metric]
        expected = slow_bootstrap(differences.tolist(), 500, 6)
        assert (row.difference, row.low, row.high) == pytest.approx(expected, abs=1e-13)
        assert row.p_value == pytest.approx(p_value_of(differences, 500, seed=6), abs=1e-15)
        counts = [(differences > 0).sum(), (differences < 0).sum(), (differences == 0).sum()]
        assert [row.wins, row.losses, row.ties] == counts
        assert all(type(getattr(row, key)) is int for key in ("wins", "losses", "ties"))
        assert all(type(getattr(row, key)) is float for key in ("difference", "low", "high", "p_value", "p_adjusted"))
    for pair in (rows[:2], rows[2:]):  # Holm over the models, for each metric alone
        assert [row.p_adjusted for row in pair] == holm([row.p_value for row in pair]).tolist()
    assert rows[0].p_value < 0.01 < rows[1].p_value


def test_a_model_s_figures_do_not_depend_on_the_others() -> None:
    per_query = three_models()
    alone = compare_to_baseline({name: per_query[name] for name in ("base", "other")}, "base", 300)
    among = [row for row in compare_to_baseline(per_query, "base", resamples=300) if row.model == "other"]
    assert len(alone) == len(among) == 2
    for key in ("difference", "low", "high", "p_value", "wins", "losses", "ties"):
        assert getattr(alone[1], key) == pytest.approx(getattr(among[1], key), abs=1e-14)
    assert alone[0].p_adjusted == alone[0].p_value


def test_a_model_like_the_baseline_differs_in_nothing() -> None:
    base = {"nDCG@10": np.random.default_rng(0).random(30)}
    rounded = {"nDCG@10": base["nDCG@10"] + 1e-16 * np.resize([1, -1], 30)}
    for model in (base, rounded):
        (row,) = compare_to_baseline({"a": base, "b": model}, "a", resamples=50)
        zero = {key: getattr(row, key) for key in ("difference", "low", "high", "wins", "losses")}
        assert set(zero.values()) == {0} and row.ties == 30 and row.p_value == row.p_adjusted == 1


def test_one_model_alone_is_compared_with_nothing() -> None:
    assert compare_to_baseline({"a": {"MRR@1": np.array([1.0, 0])}}, "a") == []


# ----------------------------------------------------------------------------------------------------------- thresholds


def test_thresholds_by_hand() -> None:
    positive, negative = np.array([0.9, 0.8, 0.7, 0.4]), np.array([0.6, 0.5, 0.3, 0.2, 0.1])
    rows = thresholds(
        positive,
        negative,
        [
            (target, value)
            for target, values in (("precision", (0.5, 0.75, 1.0)), ("false_positive_rate", (0.2, 0.0, 1.0)))
            for value in values
        ],
        resamples=10,
    )
    found = [(row.target, row.value, row.threshold, row.reached, row.recall) for row in rows]
    assert found == [
        ("precision", 0.5, 0.2, 0.5, 1.0),  # 4 of the 8 scores from 0.2 on are right, 4 of 9 from 0.1 on
        ("precision", 0.75, 0.6, 0.75, 0.75),  # 3 of 4; from 0.4 on it is 4 of 6, from 0.5 on 3 of 5
        ("precision", 1.0, 0.7, 1.0, 0.75),
        ("false_positive_rate", 0.2, 0.6, 0.2, 0.75),  # one of five
        ("false_positive_rate", 0.0, 0.7, 0.0, 0.75),
        ("false_positive_rate", 1.0, 0.1, 1.0, 1.0),
    ]


def test_equal_scores_are_accepted_together() -> None:
    (row,) = thresholds(np.array([0.5, 0.5, 0.8]), np.array([0.5, 0.1]), [("precision", 0.8)], resamples=5)
    assert (row.threshold, row.reached, row.recall) == (0.8, 1.0, pytest.approx(1 / 3))  # 3 of 4 from 0.5 on


def test_a_target_that_no_score_reaches_has_no_threshold() -> None:
    rows = thresholds(
        np.array([0.1, 0.2]), np.array([0.3, 0.3]), [("precision", 0.9), ("false_positive_rate", 0.05)], resamples=20
    )
    for row in rows:  # the highest score is a negative's, in every resample
        assert (row.threshold, row.low, row.high, row.reached, row.recall) == (None, None, None, None, 0.0)


def test_precision_may_be_reached_below_a_score_where_it_is_not() -> None:
    positive, negative = np.array([0.5, 0.6, 0.7, 0.8]), np.array([0.1, 0.9])
    (row,) = thresholds(positive, negative, [("precision", 0.8)], resamples=5)
    assert (row.threshold, row.reached, row.recall) == (0.5, 0.8, 1.0)  # from 0.8 on it is 1 of 2


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=15), st.lists(st.integers(0, 12), min_size=1, max_size=15),
    st.sampled_from(["precision", "false_positive_rate"]), st.sampled_from([0, 0.05, 0.25, 0.5, 0.75, 0.9, 1]),
)  # fmt: skip
def test_thresholds_are_those_of_a_loop(right: list[int], wrong: list[int], target: str, value: float) -> None:
    positive, negative = [score / 10 for score in right], [score / 10 for score in wrong]
    (row,) = thresholds(np.array(positive), np.array(negative), [(target, value)], resamples=7, seed=3)
    expected = slow_thresholds(positive, negative, target, value)
    assert (row.threshold, row.reached, row.recall) == expected
    rng = np.random.default_rng(3)
    drawn = []
    for _ in range(7):
        again = [[scores[i] for i in rng.integers(len(scores), size=len(scores))] for scores in (positive, negative)]
        threshold = slow_thresholds(*again, target, value)[0]
        drawn.append(math.inf if threshold is None else threshold)
    low, high = min(drawn), max(drawn)  # of 7
    assert (row.low, row.high) == tuple(None if end == math.inf else end for end in (low, high))


def test_threshold_intervals_hold_the_true_threshold() -> None:
    rng = np.random.default_rng(1)
    truth = scipy_stats.norm.ppf(0.9)  # negatives are standard normal: a tenth of them is above
    held = 0
    for _ in range(100):
        (row,) = thresholds(rng.normal(2, 1, 100), rng.normal(size=300), [("false_positive_rate", 0.1)], resamples=200)
        held += row.low <= truth <= row.high
    assert 86 <= held <= 100  # 95 expected, 4 standard deviations


def test_the_defaults_are_five_targets_in_order() -> None:
    rng = np.random.default_rng(0)
    rows = thresholds(rng.normal(3, 1, 500), rng.normal(size=500), resamples=30)
    assert [(row.target, row.value) for row in rows] == [
        ("precision", 0.9), ("precision", 0.95), ("precision", 0.99), ("false_positive_rate", 0.01),
        ("false_positive_rate", 0.05),
    ]  # fmt: skip
    for row in rows:
        assert row.low <= row.threshold <= row.high
        assert row.reached >= row.value if row.target == "precision" else row.reached <= row.value


# ------------------------------------------------------------------------------------------------ determinism, mistakes


def test_the_seed_decides() -> None:
    rng = np.random.default_rng(0)
    values, negative = rng.normal(0.1, 1, 60), rng.normal(-1, 1, 90)
    calls: list[Callable[[int], Any]] = [
        lambda seed: [float(part) for part in bootstrap_means(values, 200, seed)],
        lambda seed: p_value_of(values, 200, seed),
        lambda seed: thresholds(values, negative, [("precision", 0.6)], resamples=50, seed=seed),
        lambda seed: compare_to_baseline({"a": {"m": values}, "b": {"m": values[::-1]}}, "a", 200, seed),
    ]
    for call in calls:
        assert call(1) == call(1)
        assert any(call(seed) != call(1) for seed in (2, 3, 4))


A, NAN = np.array([0.1, 0.2]), np.array([0.1, math.nan])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_means(np.array([])), r"values has the shape \(0,\)"),
        (lambda: bootstrap_means(np.zeros((2, 2, 2))), r"values has the shape \(2, 2, 2\)"),
        (lambda: bootstrap_means(NAN), "values: 1 of 2 are NaN or infinite"),
        (lambda: bootstrap_means(A, 0), "resamples=0"),
        (lambda: holm([]), "p_values has the shape"),
        (lambda: holm([0.1, 1.1]), "p_values go from 0.1 to 1.1"),
        (lambda: holm([math.nan]), "p_values: 1 of 1 are NaN"),
        (lambda: compare_to_baseline({"a": {"m": A}}, "b"), "baseline 'b'.*use one of a"),
        (lambda: compare_to_baseline({"a": {"m": A}, "b": {}}, "a"), "b has no metric 'm'"),
        (
            lambda: compare_to_baseline({"a": {"m": A}, "b": {"m": A[:1]}}, "a"),
            "2 queries in m of a, 1 queries in m of b: compare models on the same queries",
        ),
        (lambda: compare_to_baseline({"a": {"m": A}, "b": {"m": NAN}}, "a"), "m of b: 1 of 2 are NaN"),
        (lambda: thresholds(np.array([]), A), "positive has the shape"),
        (lambda: thresholds(A, NAN), "negative: 1 of 2 are NaN"),
        (lambda: thresholds(A, A, resamples=0), "resamples=0"),
    ],
)
def test_mistakes_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
