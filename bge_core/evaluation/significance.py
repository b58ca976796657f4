"""How sure a difference is: intervals and p-values of metrics per query, and thresholds of the score.

Queries are the sample: what is drawn again or has its sign flipped is a query, with all that a model made of it. The
same draws serve every model and every metric, so comparisons are paired, and a result is a function of values and seed.

    Q  queries     M  columns: a metric of a model, or the difference of two models     U  distinct scores
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bge_core import UserError

INTERVAL = (1 - 0.95) / 2, (1 + 0.95) / 2  # the quantiles between which a 95 % interval lies
TARGETS = tuple(
    [("precision", share) for share in (0.9, 0.95, 0.99)] + [("false_positive_rate", share) for share in (0.01, 0.05)]
)
_CELLS_AT_ONCE = 2**21  # resamples x queries in memory: some 60 MB
_ROUNDING = 1e-12  # metrics are at most 1: a difference below this is one of the order of summation


@dataclass(frozen=True)
class Comparison:
    """A model against the baseline, in one metric.

    Args:
        difference, low, high: the model's mean less the baseline's, and its 95 % interval.
        p_value, p_adjusted: of the permutation test; the second by Holm over the models, for this metric alone.
        wins, losses, ties: numbers of queries; a difference up to 1e-12 is a tie.
    """

    model: str
    baseline: str
    metric: str
    difference: float
    low: float
    high: float
    p_value: float
    p_adjusted: float
    wins: int
    losses: int
    ties: int


@dataclass(frozen=True)
class Threshold:
    """The lowest score from which on answers may be accepted.

    Args:
        target, value: "precision" of at least `value`, or "false_positive_rate" of at most `value`.
        threshold, low, high: the score and its 95 % interval; None: above all scores.
        reached: the target's rate at the threshold; None: no score reaches it.
        recall: the share of positives at or above it.
    """

    target: str
    value: float
    threshold: float | None
    low: float | None
    high: float | None
    reached: float | None
    recall: float


def bootstrap_means(
    values: np.ndarray, resamples: int = 10_000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the queries and its 95 % percentile bootstrap interval; with few queries (below 30, say) it holds less.

        mean*_b = 1/Q sum_i values[draw_bi],  draw_bi uniform on the Q queries,  b = 1 .. resamples
        low, high = the 0.025 and 0.975 quantiles of mean*

    Args:
        values: (Q,) or (Q, M) numbers; the columns share the draws.
        resamples: how many times Q queries are drawn with replacement.
        seed: of the draws, which depend on it and on Q alone.

    Returns:
        mean, low, high: each (M,) float64, or () for values of shape (Q,).

    Raises:
        UserError: no query, a value that is not finite, another number of dimensions, or resamples below 1.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3 (the percentile interval).
    """
    values = _check_values("values", values, max_dimensions=2)
    _check_resamples(resamples)
    num_queries, shape = len(values), values.shape[1:]
    value_QM = values.reshape(num_queries, -1)
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, value_QM.shape[1]))
    for block in _blocks(resamples, num_queries):
        # How often each query was drawn, as a matrix: all columns then cost one product.
        drawn = rng.integers(num_queries, size=(block.stop - block.start, num_queries))
        drawn += np.arange(len(drawn))[:, None] * num_queries
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        means[block] = times.astype(np.float64) @ value_QM / num_queries
    low, high = np.quantile(means, INTERVAL, axis=0)
    return value_QM.mean(axis=0).reshape(shape), low.reshape(shape), high.reshape(shape)


def permutation_p_values(difference_QM: np.ndarray, resamples: int = 10_000, seed: int = 0) -> np.ndarray:
    """Two-sided p-values of "the two models are interchangeable", from their differences per query.

    If they are, each query's difference might as well have had the other sign. With mean* the mean of the differences
    under random signs:

        p = (1 + #{b: |mean*_b| >= |mean|}) / (1 + resamples)

    or, if 2^n <= resamples for n differences other than 0, the share of all 2^n sign patterns with |mean*| >= |mean|.
    Means that differ by rounding alone are equal. Without a difference p is 1.

    Args:
        difference_QM: (Q, M) finite numbers, one model's value less the other's; every column sees the same signs.
        resamples: how many sign patterns are drawn, at least 1.
        seed: of the signs, which depend on it and on Q alone.

    Returns:
        (M,) float64, above 0 and at most 1.

    Source: the paired randomization test of Smucker, Allan & Carterette 2007, A Comparison of Statistical Significance
        Tests for Information Retrieval Evaluation; Good 2005, Permutation, Parametric and Bootstrap Tests of
        Hypotheses. The added ones: Phipson & Smyth 2010, Permutation P-values Should Never Be Zero.
    """
    num_queries = len(difference_QM)
    total_M, size_M = difference_QM.sum(axis=0), np.abs(difference_QM).sum(axis=0)
    least_M = np.abs(total_M) - 1e-10 * size_M  # sums of the same numbers in another order count as equal
    rng = np.random.default_rng(seed)
    extreme_M = np.zeros(len(total_M))
    for block in _blocks(resamples, num_queries):
        packed = rng.integers(256, size=(block.stop - block.start, -(-num_queries // 8)), dtype=np.uint8)
        kept = np.unpackbits(packed, axis=1, count=num_queries).astype(np.float64)  # 1: the sign stays, 0: it flips
        extreme_M += (np.abs(2 * (kept @ difference_QM) - total_M) >= least_M).sum(axis=0)
    p_value_M = (1 + extreme_M) / (1 + resamples)
    for column in np.flatnonzero(np.count_nonzero(difference_QM, axis=0) < int(resamples).bit_length()):
        sums = np.zeros(1)
        for difference in difference_QM[difference_QM[:, column] != 0, column]:
            sums = np.concatenate([sums + difference, sums - difference])
        p_value_M[column] = np.mean(np.abs(sums) >= least_M[column])
    return p_value_M


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Adjust p-values so that the chance of any false rejection among them stays below the level.

        adjusted_(i) = min(1, max over j <= i of (m - j + 1) p_(j)),  p_(1) <= ... <= p_(m)

    Args:
        p_values: (m,) numbers from 0 to 1, m at least 1, dependent or not.

    Returns:
        (m,) float64 in the order of `p_values`, never below them.

    Raises:
        UserError: there is none, or one is not from 0 to 1.

    Source: Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure, Scand. J. Statist. 6:65-70.
    """
    p = _check_values("p_values", p_values)
    if p.min() < 0 or p.max() > 1:
        raise UserError(f"p_values go from {p.min():g} to {p.max():g}: give numbers from 0 to 1")
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def compare_to_baseline(
    per_query: Mapping[str, Mapping[str, np.ndarray]], baseline: str, resamples: int = 10_000, seed: int = 0
) -> list[Comparison]:
    """Compare every model with one of them, on the same queries.

    Args:
        per_query: {model: {metric: (Q,)}}, the queries of all models in the same order.
        baseline: the model that the others are compared with, in its metrics.
        resamples, seed: see `bootstrap_means` and `permutation_p_values`.

    Returns:
        For each metric and within it each other model, in the order given. Empty if there is no other model.

    Raises:
        UserError: no such baseline or metric, models with different numbers of queries, or what `bootstrap_means`
            refuses.

    Source: Smucker, Allan & Carterette 2007 for the test on means over queries; Holm 1979.
    """
    if baseline not in per_query:
        raise UserError(f"baseline {baseline!r}: there is no such model; use one of {', '.join(per_query)}")
    table: dict[tuple[str, str], np.ndarray] = {}
    for model, values in per_query.items():
        for name in per_query[baseline]:
            if name not in values:
                raise UserError(f"{model} has no metric {name!r}; it has {', '.join(values)}")
            table[name, model] = _check_values(f"{name} of {model}", values[name])
    sizes = {len(values): f"{len(values)} queries in {name} of {model}" for (name, model), values in table.items()}
    if len(sizes) > 1:
        raise UserError(f"{', '.join(sizes.values())}: compare models on the same queries")
    pairs = [(name, model) for name in per_query[baseline] for model in per_query if model != baseline]
    if not pairs:
        return []
    difference_QM = np.stack([table[name, model] - table[name, baseline] for name, model in pairs], axis=1)
    difference_QM[np.abs(difference_QM) <= _ROUNDING] = 0
    p_value_M = permutation_p_values(difference_QM, resamples, seed)
    columns = [
        *bootstrap_means(difference_QM, resamples, seed),
        p_value_M,
        np.concatenate([holm(of_metric) for of_metric in p_value_M.reshape(len(per_query[baseline]), -1)]),
        (difference_QM > 0).sum(axis=0),
        (difference_QM < 0).sum(axis=0),
        (difference_QM == 0).sum(axis=0),
    ]
    figures = zip(*(column.tolist() for column in columns), strict=True)
    return [Comparison(model, baseline, name, *of) for (name, model), of in zip(pairs, figures, strict=True)]


def thresholds(
    positive: np.ndarray,
    negative: np.ndarray,
    targets: Sequence[tuple[str, float]] = TARGETS,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Threshold]:
    """The lowest scores from which on answers may be accepted, for targets of precision and false positive rate.

    An answer is accepted if its score is at least t. With P(t), N(t) the positives and negatives accepted:

        precision(t) = P(t) / (P(t) + N(t))     false_positive_rate(t) = N(t) / N     recall(t) = P(t) / Q
        threshold    = the lowest of the given scores t with precision(t) >= value, or false_positive_rate(t) <= value

    The lowest, because it has the highest recall of all that reach the target. What to bear in mind:

    - Precision speaks of the mix given: with ten times the negatives, N(t) is ten times as large. The false positive
      rate does not depend on the mix.
    - Precision does not rise steadily with t: above the threshold it may fall below the target again, as when the
      highest score is a negative's. The false positive rate only falls.
    - A false positive rate below 1/N asks for a threshold above every negative.

    Args:
        positive: (Q,) scores of right answers, one per query.
        negative: (N,) scores of wrong answers, drawn again independently of the positives.
        targets: ("precision" or "false_positive_rate", value from 0 to 1) each.
        resamples, seed: of the percentile bootstrap interval; positives and negatives are drawn again, each as many as
            there are. A resample without a threshold counts as one above all scores.

    Returns:
        One for each target, in order.

    Raises:
        UserError: no positive or no negative, a score that is not finite, or resamples below 1.

    Source: Efron & Tibshirani 1993, section 13.3, for the interval.
    """
    positive, negative = _check_values("positive", positive), _check_values("negative", negative)
    _check_resamples(resamples)
    score_U, place = np.unique(np.concatenate([positive, negative]), return_inverse=True)
    samples = place[: len(positive)], place[len(positive) :]
    rng = np.random.default_rng(seed)
    drawn = np.empty((resamples, len(targets)), dtype=np.int64)
    for b in range(resamples):
        again = [at[rng.integers(len(at), size=len(at))] for at in samples]
        drawn[b] = [at for at, _, _ in _lowest_reaching(again[0], again[1], len(score_U), targets)]
    ends = np.quantile(drawn, INTERVAL, axis=0, method="inverted_cdf").astype(np.int64)
    scores = [*score_U.tolist(), None]
    found = _lowest_reaching(*samples, len(score_U), targets)
    return [
        Threshold(*target, scores[at], scores[low], scores[high], reached, recall)
        for target, (at, reached, recall), (low, high) in zip(targets, found, ends.T, strict=True)
    ]


def _lowest_reaching(
    positive_at: np.ndarray, negative_at: np.ndarray, num_scores: int, targets: Sequence[tuple[str, float]]
) -> list[tuple[int, float | None, float]]:
    """For each target the index of the lowest score that reaches it (num_scores: none), its rate, its recall.

    A sample is given as indices of its scores among the distinct ones in rising order.
    """
    positive_U, negative_U = (np.bincount(at, minlength=num_scores) for at in (positive_at, negative_at))
    present_U = positive_U + negative_U > 0
    positive_U, negative_U = (np.cumsum(count[::-1])[::-1] for count in (positive_U, negative_U))  # at or above
    rates = {
        "precision": positive_U / np.maximum(positive_U + negative_U, 1),
        "false_positive_rate": negative_U / len(negative_at),
    }
    found: list[tuple[int, float | None, float]] = []
    for target, value in targets:
        reaches_U = rates[target] >= value if target == "precision" else rates[target] <= value
        reaches_U &= present_U
        at = int(reaches_U.argmax())
        reached = (at, float(rates[target][at]), float(positive_U[at] / len(positive_at)))
        found.append(reached if reaches_U[at] else (num_scores, None, 0.0))
    return found


def _check_values(name: str, values: Any, max_dimensions: int = 1) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if not 1 <= array.ndim <= max_dimensions or len(array) == 0:
        raise UserError(f"{name} has the shape {array.shape}: give one number for each query, of at least one")
    if not np.isfinite(array).all():
        raise UserError(f"{name}: {int((~np.isfinite(array)).sum())} of {array.size} are NaN or infinite; mend them")
    return array


def _check_resamples(resamples: int) -> None:
    if resamples < 1:
        raise UserError(f"resamples={resamples}: give a whole number from 1, as 10000")


def _blocks(resamples: int, num_queries: int) -> Iterator[slice]:
    """Slices of the resamples, each of few enough to be in memory at once."""
    step = max(1, _CELLS_AT_ONCE // num_queries)
    for start in range(0, resamples, step):
        yield slice(start, min(start + step, resamples))
