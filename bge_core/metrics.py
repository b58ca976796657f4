"""Ranking metrics of each query, from the corpus rows that a search returned and the rows that are right.

Per query, because a comparison of two models is a paired one; `mean_metrics` gives the figures that are printed.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from bge_core import UserError

NDCG_CUTOFF = 10


def per_query_metrics(
    ranked: Sequence[np.ndarray] | np.ndarray,
    relevant: Sequence[Iterable[int]],
    num_relevant: Sequence[int] | np.ndarray | None = None,
    cutoffs: Sequence[int] = (1, 10, 100),
) -> dict[str, np.ndarray]:
    """MRR@k and Recall@k at each cutoff k, and nDCG@10, of every query. A row is right or not: relevance is binary.

        MRR@k    = 1 / rank of the first right row if that rank <= k, else 0
        Recall@k = right rows within the first k / P
        nDCG@10  = sum over right rows of rank r <= 10 of 1 / log2(r + 1), divided by the same sum for a ranking that
                   begins with min(P, 10) right rows

    where P is the number of the query's positives. What happens at the edges:

    - Recall is not capped: with P = 20, Recall@10 is at most 0.5.
    - A positive that the corpus lacks cannot be found, but counts in P: a miss. Give `num_relevant` for that.
    - A query without positives (P = 0) gets 0 everywhere, as in trec_eval, and takes part in the mean.
    - A ranking shorter than a cutoff (k or the corpus smaller than 100, an empty corpus) simply ends there: the names
      stay the same, and what is not in the ranking is not found.
    - -1 means "nothing" and is never right; it keeps its place, so later rows do not move up.
    - A row repeated in a ranking counts at its first place; the repeats keep their places and are not right again.

    Args:
        ranked: (Q, K) integers, or Q one-dimensional arrays of any lengths: corpus rows, the best first.
        relevant: for each query the corpus rows that are right; repeats and -1 are ignored.
        num_relevant: (Q,) P, the positives of each query including those that the corpus lacks; default: as many as
            `relevant` has.
        cutoffs: the ks of MRR and Recall, at least 1.

    Returns:
        {name: (Q,) float64}, in the order MRR@1, MRR@10, MRR@100, Recall@1, Recall@10, Recall@100, nDCG@10.

    Raises:
        ValueError: the arguments speak of different numbers of queries, P is below the number of rows in `relevant`,
            or a cutoff is below 1.

    Source: trec_eval's recip_rank, recall and ndcg_cut. MRR and Recall are also those of FlagEmbedding 1.2.11,
        baai_general_embedding/finetune/eval_msmarco.py:145. Its nDCG is another one: it takes the ideal from the
        right rows that were found, not from all there are, and so is higher.
    """
    right = [{int(row) for row in rows} - {-1} for rows in relevant]
    if num_relevant is None:
        num_relevant = [len(rows) for rows in right]
    num_queries = len(right)
    if not len(ranked) == num_queries == len(num_relevant):
        raise ValueError(
            f"ranked, relevant and num_relevant are about {len(ranked)}, {num_queries} and {len(num_relevant)} queries:"
            " give one entry per query in each"
        )
    if any(cutoff < 1 for cutoff in cutoffs):
        raise ValueError(f"cutoffs={tuple(cutoffs)}: each must be at least 1")

    gain = 1 / np.log2(np.arange(2, NDCG_CUTOFF + 2))  # of a right row at rank 1, 2, ...
    depth = max(NDCG_CUTOFF, *cutoffs)
    names = [f"MRR@{k}" for k in cutoffs] + [f"Recall@{k}" for k in cutoffs] + [f"nDCG@{NDCG_CUTOFF}"]
    metrics = {name: np.zeros(num_queries) for name in names}
    for query in range(num_queries):
        total = int(num_relevant[query])
        if total < len(right[query]):
            raise ValueError(
                f"num_relevant[{query}] is {total}, but relevant[{query}] has {len(right[query])} rows:"
                " it must count the positives inside the corpus and outside"
            )
        ranks = _ranks_of(right[query], np.asarray(ranked[query])[:depth])
        if not len(ranks):
            continue
        for k in cutoffs:
            metrics[f"MRR@{k}"][query] = 1 / ranks[0] if ranks[0] <= k else 0.0
            metrics[f"Recall@{k}"][query] = np.count_nonzero(ranks <= k) / total
        found = gain[ranks[ranks <= NDCG_CUTOFF] - 1].sum()
        metrics[f"nDCG@{NDCG_CUTOFF}"][query] = found / gain[: min(total, NDCG_CUTOFF)].sum()
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


def _ranks_of(right: set[int], ranking: np.ndarray) -> np.ndarray:
    """The ranks, from 1 and ascending, at which right rows stand for the first time."""
    missing = set(right)
    ranks = []
    for rank, row in enumerate(ranking.tolist(), start=1):
        if row in missing:
            missing.remove(row)
            ranks.append(rank)
    return np.array(ranks, dtype=np.int64)
