"""Ranking metrics of each query, from the corpus rows that a search returned and the rows that are right.

Per query, because a comparison of two models is a paired one; `mean_metrics` gives the figures that are printed.

    Q  queries     P  positives of all queries     H  hits: positives that stand in a ranking
"""

import difflib
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bge_core import UserError

DEFAULT_METRICS = ("MRR@1", "MRR@10", "MRR@100", "Recall@1", "Recall@10", "Recall@100", "nDCG@10")
_NAMES_ELSEWHERE = {
    "hit": "Success", "hitrate": "Success", "accuracy": "Success", "p": "Precision", "r": "Recall",
    "rr": "MRR", "recip_rank": "MRR", "rprec": "RPrecision",
}  # fmt: skip
_QUERIES_AT_ONCE = 1024


@dataclass(frozen=True)
class Hits:
    """What a metric of METRICS is computed from; all hits of a query lie together, in the order of their ranks.

    Args:
        num_positives_Q: how many positives a query has.
        query_H, rank_H, nth_H, grade_H: a hit's query, its rank from 1, its number among the query's hits, its grade.
        query_P, ideal_rank_P, ideal_grade_P: the positives, each query's by decreasing grade.
    """

    num_positives_Q: np.ndarray
    query_H: np.ndarray
    rank_H: np.ndarray
    nth_H: np.ndarray
    grade_H: np.ndarray
    query_P: np.ndarray
    ideal_rank_P: np.ndarray
    ideal_grade_P: np.ndarray

    @property
    def divisor_Q(self) -> np.ndarray:
        """The number of positives; 1 where there is none, and so no hit either."""
        return np.maximum(self.num_positives_Q, 1)

    def total(self, weight_H: np.ndarray, k_Q: np.ndarray) -> np.ndarray:
        """(Q,) float64: the sum of the weights of a query's hits at ranks up to its k."""
        within = self.rank_H <= k_Q[self.query_H]
        return np.bincount(self.query_H[within], weight_H[within], minlength=len(k_Q)).astype(np.float64)

    def count(self, k_Q: np.ndarray) -> np.ndarray:
        """hits(k) of every query."""
        return self.total(np.ones(len(self.rank_H)), k_Q)


def _ndcg(hits: Hits, k_Q: np.ndarray) -> np.ndarray:
    within = hits.ideal_rank_P <= k_Q[hits.query_P]
    gain_P = hits.ideal_grade_P / np.log2(hits.ideal_rank_P + 1)
    ideal_Q = np.bincount(hits.query_P[within], gain_P[within], minlength=len(k_Q))
    return hits.total(hits.grade_H / np.log2(hits.rank_H + 1), k_Q) / np.where(hits.num_positives_Q > 0, ideal_Q, 1.0)


# Every metric: (hits, each query's k) -> (Q,). `per_query_metrics` has their formulas; of RPrecision k is P.
METRICS: dict[str, Callable[[Hits, np.ndarray], np.ndarray]] = {
    "MRR": lambda hits, k_Q: hits.total((hits.nth_H == 1) / hits.rank_H, k_Q),
    "Recall": lambda hits, k_Q: hits.count(k_Q) / hits.divisor_Q,
    "CappedRecall": lambda hits, k_Q: hits.count(k_Q) / np.minimum(hits.divisor_Q, k_Q),
    "nDCG": _ndcg,
    "MAP": lambda hits, k_Q: hits.total(hits.nth_H / hits.rank_H, k_Q) / hits.divisor_Q,
    "Precision": lambda hits, k_Q: hits.count(k_Q) / k_Q,
    "Success": lambda hits, k_Q: hits.total(hits.nth_H == 1, k_Q),
    "RPrecision": lambda hits, k_Q: hits.count(k_Q) / hits.divisor_Q,
}


def parse_metric(name: str) -> tuple[str, int | None]:
    """A metric's kind and its cutoff k: "nDCG@10" is ("nDCG", 10), "RPrecision" is ("RPrecision", None).

    Raises:
        UserError: there is no such metric, k is missing or no whole number from 1, or RPrecision has one; the message
            offers the nearest name.
    """
    kind, at, k = name.partition("@")
    has_k = re.fullmatch("[1-9][0-9]{0,8}", k) is not None
    if name == "RPrecision" or (kind in METRICS and kind != "RPrecision" and has_k):
        return kind, int(k) if at else None
    known = {kind.lower(): kind for kind in METRICS} | _NAMES_ELSEWHERE
    nearest = known[difflib.get_close_matches(kind.lower(), known, n=1, cutoff=0)[0]]
    right = nearest if nearest == "RPrecision" else f"{nearest}@{k if has_k else 10}"
    kinds = ", ".join(f"{kind}@k" for kind in METRICS if kind != "RPrecision")
    raise UserError(
        f"unknown metric {name!r}; did you mean {right!r}? There are {kinds} with a whole number k from 1,"
        " and RPrecision"
    )


def search_depth(
    k: int, names: Sequence[str], relevant: Sequence[Mapping[int, float]], missing: Sequence[Collection[float]]
) -> int:
    """How deep a ranking must be for all of the metrics to be what their names say, and at least k.

    Args: as of `per_query_metrics`.
    """
    cutoffs = [parse_metric(name)[1] for name in names]
    num_positives = (
        sum(grade > 0 for grade in (*of.values(), *lost)) for of, lost in zip(relevant, missing, strict=True)
    )
    most = max(num_positives, default=0) if None in cutoffs else 0
    return max(k, most, *filter(None, cutoffs))


def per_query_metrics(
    ranked: Sequence[np.ndarray] | np.ndarray,
    relevant: Sequence[Mapping[int, float] | Iterable[int]],
    missing: Sequence[Iterable[float]] | None = None,
    names: Sequence[str] = DEFAULT_METRICS,
) -> dict[str, np.ndarray]:
    """Each named metric of every query.

    A positive is a thing of grade > 0, P their number for this query, those that the corpus lacks included. A hit is a
    positive in the ranking, r its rank from 1, hits(k) their number at ranks r <= k:

        MRR@k           1 / rank of the first hit if that rank <= k, else 0
        Recall@k        hits(k) / P
        CappedRecall@k  hits(k) / min(P, k)
        nDCG@k          sum over hits at r <= k of grade / log2(r + 1), divided by the same sum for the k best positives
                        in decreasing order of grade
        MAP@k           sum over hits at r <= k of hits(r) / r, divided by P
        Precision@k     hits(k) / k
        Success@k       1 if hits(k) > 0, else 0
        RPrecision      hits(P) / P

    What happens at the edges:

    - Recall is not capped: with P = 20, Recall@10 is at most 0.5. Nor is MAP's divisor.
    - A positive that the corpus lacks cannot be found, but counts in P and in the ideal of nDCG: a miss. Give
      `missing` for that.
    - A query without positives (P = 0) gets 0 everywhere, as in trec_eval, and takes part in the mean.
    - A ranking shorter than k (a short search, a small or empty corpus) simply ends there: the names and divisors stay
      the same, and what is not in the ranking is not found.
    - -1 means "nothing" and is never right; it keeps its place, so later rows do not move up.
    - A row repeated in a ranking counts at its first place; the repeats keep their places and are not right again.
    - Ties: the order given is what counts, and no score is looked at. `search.py` puts the smaller row first; trec_eval
      sorts by score and equal scores by id, so it sees this order only if a run's scores fall strictly.

    Args:
        ranked: (Q, K) integers, or Q one-dimensional arrays of any lengths: corpus rows, the best first.
        relevant: for each query either {corpus row: grade}, where 0 and below are judged and not relevant, or the rows
            that are right, of grade 1 each; repeats and negative rows are ignored.
        missing: for each query the grades of what the corpus lacks; None: it lacks nothing.
        names: see `parse_metric`.

    Returns:
        {name: (Q,) float64}, in the order of `names`.

    Raises:
        UserError: a name is not a metric's.
        ValueError: the arguments speak of different numbers of queries, or a grade is not finite.

    Source: trec_eval 9's recip_rank (of a run cut at k), recall, ndcg_cut, map_cut, P, success and Rprec. CappedRecall
        is BEIR's (Thakur et al. 2021, arXiv:2104.08663). MRR and Recall are also those of FlagEmbedding 1.2.11,
        baai_general_embedding/finetune/eval_msmarco.py:145. Its nDCG is another one: it takes the ideal from the
        right rows that were found, not from all there are, and so is higher.
    """
    kinds = {name: parse_metric(name) for name in names}
    num_queries = len(relevant)
    judged = [rows if isinstance(rows, Mapping) else dict.fromkeys(rows, 1.0) for rows in relevant]
    lost: list[tuple[float, ...]] = [()] * num_queries if missing is None else [tuple(grades) for grades in missing]
    if not len(ranked) == num_queries == len(lost):
        raise ValueError(
            f"ranked, relevant and missing are about {len(ranked)}, {num_queries} and {len(lost)} queries:"
            " give one entry per query in each"
        )
    query_P, row_P, grade_P = _list_positives(judged, lost)
    num_positives_Q = np.bincount(query_P, minlength=num_queries)
    best_first = np.lexsort((-grade_P, query_P))  # query_P[best_first] is query_P: only the grades are rearranged
    found, rank_H = _find(ranked, query_P, row_P)
    hits = Hits(
        num_positives_Q,
        query_P[found],
        rank_H,
        _count_within(query_P[found]),
        grade_P[found],
        query_P,
        _count_within(query_P),
        grade_P[best_first],
    )
    metrics = {}
    for name, (kind, k) in kinds.items():
        metrics[name] = METRICS[kind](hits, num_positives_Q if k is None else np.full(num_queries, k))
    return metrics


def mean_metrics(per_query: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of each metric over the queries, every query weighing the same.

    Args:
        per_query: {name: (Q,)}, as from `per_query_metrics`.

    Returns:
        {name: mean}, in the same order, as Python floats.

    Raises:
        UserError: there are no queries, so no mean either.
    """
    if any(len(values) == 0 for values in per_query.values()):
        raise UserError("there is no query to average the metrics over: the evaluation data has no rows; add some")
    return {name: float(np.mean(values)) for name, values in per_query.items()}


def _list_positives(
    judged: Sequence[Mapping[int, float]], lost: Sequence[Collection[float]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query, row (-1: the corpus lacks it) and grade of every positive, ordered by query and row."""
    sizes = np.fromiter(map(len, (*judged, *lost)), np.int64)
    query = np.repeat(np.tile(np.arange(len(judged)), 2), sizes)
    row = np.fromiter(itertools.chain.from_iterable(judged), np.int64)
    lost_grade = np.fromiter(itertools.chain.from_iterable(lost), np.float64)
    grade = np.fromiter(itertools.chain.from_iterable(rows.values() for rows in judged), np.float64)
    if not np.isfinite(grade).all() or not np.isfinite(lost_grade).all():
        raise ValueError("a grade is NaN or infinite: give whole numbers, above 0 for what is relevant")
    grade = np.concatenate([np.where(row < 0, 0.0, grade), lost_grade])
    row = np.concatenate([row, np.full(len(lost_grade), -1)])
    order = np.lexsort((row, query))
    order = order[grade[order] > 0]
    return query[order], row[order], grade[order]


def _find(
    ranked: Sequence[np.ndarray] | np.ndarray, query_P: np.ndarray, row_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which positives stand in the rankings (indices into P), and at which rank: ordered by query and rank."""
    stride = int(row_P.max(initial=-1)) + 2  # (query, row) becomes query * stride + row, for rows from -1 on
    founds, ranks = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start in range(0, len(ranked), _QUERIES_AT_ONCE):  # in blocks: memory, and keys that fit into the CPU's cache
        rankings = [np.asarray(ranking, dtype=np.int64) for ranking in ranked[start : start + _QUERIES_AT_ONCE]]
        lengths = [len(ranking) for ranking in rankings]
        first, last = np.searchsorted(query_P, [start, start + len(rankings)])
        keys = (query_P[first:last] - start) * stride + row_P[first:last]
        rows = np.concatenate(rankings)
        place = np.flatnonzero((rows >= 0) & (rows < stride - 1))
        wanted = np.repeat(np.arange(len(rankings)) * stride, lengths)[place] + rows[place]
        at = np.searchsorted(keys, wanted)
        hit = np.flatnonzero(np.append(keys, -1)[at] == wanted)
        hit = hit[np.sort(np.unique(at[hit], return_index=True)[1])]  # of a repeated row the first place
        found = first + at[hit]
        begins = np.cumsum(lengths) - lengths
        founds.append(found)
        ranks.append(place[hit] - begins[query_P[found] - start] + 1)
    return np.concatenate(founds), np.concatenate(ranks)


def _count_within(query: np.ndarray) -> np.ndarray:
    """1, 2, ... within each run of equal entries of a sorted array."""
    return np.arange(1, len(query) + 1) - np.searchsorted(query, query)
