"""From which score on an answer may be taken: thresholds of a score, with their intervals.

Q  queries     N  negatives     U  distinct scores
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bge_core.evaluation.significance import INTERVAL, check_resamples, check_values

PRECISIONS = (0.9, 0.95, 0.99)
TARGETS = tuple(
    [("precision", share) for share in PRECISIONS] + [("false_positive_rate", share) for share in (0.01, 0.05)]
)


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


@dataclass(frozen=True)
class Reply:
    """The lowest score of the first hit from which on it may be the answer.

    Args:
        precision: the share of answers that are to be right.
        threshold, low, high: the score and its 95 % interval; None: above all scores.
        reached: the share of answers that are right at the threshold; None: no score reaches it.
        coverage: the share of questions that are answered.
    """

    precision: float
    threshold: float | None
    low: float | None
    high: float | None
    reached: float | None
    coverage: float


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
    positive, negative = check_values("positive", positive), check_values("negative", negative)
    check_resamples(resamples)
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


def reply_thresholds(
    score: np.ndarray,
    is_right: np.ndarray,
    precisions: Sequence[float] = PRECISIONS,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Reply]:
    """May the bot reply? The lowest scores from which on answering with the first hit is right often enough.

    A question is answered if its first hit scores at least t; the others go to a person.

        coverage(t)  = answered(t) / Q     precision(t) = right answers(t) / answered(t)
        threshold    = the lowest of the given scores t with precision(t) >= value

    Unlike in `thresholds`, a question gives one score, right or wrong, so that precision speaks of what users see, as
    long as they ask like the test set. One whose answer the corpus lacks is among the wrong ones.

    Args:
        score: (Q,) of each question's first hit.
        is_right: (Q,) bool, whether that is a positive.
        precisions: from 0 to 1 each.
        resamples, seed: of the percentile bootstrap interval over questions; a resample without a threshold counts as
            one above all scores.

    Returns:
        One for each precision, in order.

    Raises:
        UserError: no question, a score that is not finite, or resamples below 1.

    Source: coverage and risk (1 - precision) of El-Yaniv & Wiener 2010, On the Foundations of Noise-free Selective
        Classification, JMLR 11:1605-1641.
    """
    score, is_right = check_values("score", score), np.asarray(is_right, dtype=bool)
    check_resamples(resamples)
    score_U, place_Q = np.unique(score, return_inverse=True)
    targets = [("precision", value) for value in precisions]
    rng = np.random.default_rng(seed)

    def lowest(questions: np.ndarray | slice) -> list[tuple[int, float | None, float]]:
        place, right = place_Q[questions], is_right[questions]
        return _lowest_reaching(place[right], place[~right], len(score_U), targets)

    draws = (rng.integers(len(score), size=len(score)) for _ in range(resamples))
    drawn = np.array([[at for at, _, _ in lowest(draw)] for draw in draws], dtype=np.int64)
    ends = np.quantile(drawn, INTERVAL, axis=0, method="inverted_cdf").astype(np.int64)
    scores = [*score_U.tolist(), None]
    return [
        Reply(value, scores[at], scores[low], scores[high], reached, float(np.mean(place_Q >= at)))
        for value, (at, reached, _), (low, high) in zip(precisions, lowest(slice(None)), ends.T, strict=True)
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
        "false_positive_rate": negative_U / max(len(negative_at), 1),
    }
    found: list[tuple[int, float | None, float]] = []
    for target, value in targets:
        reaches_U = rates[target] >= value if target == "precision" else rates[target] <= value
        reaches_U &= present_U
        at = int(reaches_U.argmax())
        reached = (at, float(rates[target][at]), float(positive_U[at] / max(len(positive_at), 1)))
        found.append(reached if reaches_U[at] else (num_scores, None, 0.0))
    return found
