"""Search by words, for what vectors miss: BM25 over segmented Chinese, and the fusion of several rankings.

Shapes: Q queries, K places of a ranking, B queries of a block, M places of all rankings.
"""

import logging
import re
from array import array
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from bge_core import UserError
from bge_core.files.text import fold

BLOCK = 1024  # queries that are fused together: their places stay in the cache
_HAN = r"\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"

# A run of Chinese characters, or a word of any other script or a number, with its decimals and groups of thousands
_RUNS = re.compile(rf"([{_HAN}]+)|[^\W_{_HAN}]+(?:\.\d+|,\d{{3}}(?!\d))*")


def segment(text: str) -> list[str]:
    """The words of a text in the form in which BM25 compares them: NFKC, without case, no punctuation, no white space.

    Chinese is cut by jieba's dictionary in search mode: a long word comes with its parts, so that 大学 finds 北京大学.
    Words of other scripts and numbers stay whole.

    Args:
        text: any string.

    Returns:
        The words in order, a repeated one repeated; none for a text of punctuation alone.
    """
    import rjieba

    words: list[str] = []
    for run in _RUNS.finditer(fold(text)):
        if run[1]:
            # hmm would join unknown characters, names above all, into words of its own: fewer of them are found
            words += rjieba.cut_for_search(run[1], hmm=False)
        else:
            words.append(run[0])
    return words


def bm25_search(
    queries: Sequence[str], corpus: Sequence[str], k: int, *, show_progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The k corpus rows that share the weightiest words with each query.

        score(q, c) = sum over the words w of q of idf(w) * tf / (tf + k1 * (1 - b + b * |c| / mean |c|))
        idf(w) = ln(1 + (N - df + 0.5) / (df + 0.5)), tf = times w is in c, k1 = 1.5, b = 0.75

    Best first; of equal scores the smaller row first. The same on every run, whatever the other queries are. The index
    of a million passages of 200 characters takes about 4 GB while it is made; a query then takes some milliseconds.

    Args:
        queries: Q texts.
        corpus: N texts.
        k: how many rows a query, at least 1.
        show_progress: bars on stderr.

    Returns:
        scores (Q, k) float32 and rows (Q, k) int64. A row that shares no word with the query is no hit; the places left
        over have score -inf and row -1.

    Raises:
        UserError: k is not positive.

    Source: Robertson and Zaragoza 2009, in Lucene's variant (Kamphuis et al. 2020), computed by bm25s (Lù 2024).
    """
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG

    if k < 1:
        raise UserError(f"k={k}: must be at least 1")
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    vocabulary: dict[str, int] = {}
    number = vocabulary.setdefault
    reading = tqdm(corpus, desc="segment", unit="text", disable=not show_progress)
    # 4 bytes a word; a list of a million passages' words takes twice that
    documents = [array("i", [number(word, len(vocabulary)) for word in segment(text)]) for text in reading]
    if not vocabulary:
        return scores, rows
    index = bm25s.BM25()
    index.index((documents, vocabulary), create_empty_token=False, show_progress=show_progress)
    del documents
    for i, query in enumerate(tqdm(queries, desc="BM25", unit="query", disable=not show_progress)):
        if known := [word for word in segment(query) if word in vocabulary]:
            found = index.get_scores(known)
            kth = np.partition(found, -k)[-k] if len(found) > k else 0.0
            hits = np.flatnonzero((found > 0) & (found >= kth))
            best = hits[np.argsort(-found[hits], kind="stable")][:k]  # hits rise, so ties stay in the order of rows
            scores[i, : len(best)], rows[i, : len(best)] = found[best], best
    return scores, rows


def reciprocal_rank_fusion(rankings: Sequence[np.ndarray], k: int, constant: int = 60) -> np.ndarray:
    """The k rows that stand highest in several rankings of the same queries together.

        score(row) = sum over the rankings that hold it of 1 / (constant + rank), ranks from 1

    Args:
        rankings: (Q, K_i) integer rows of each, best first, each row once, -1 where a ranking has no more.
        k: how many rows a query.
        constant: the larger, the less the first places count against the others.

    Returns:
        rows (Q, k) int64, best first; of equal scores the smaller row first; -1 where there are fewer.

    Raises:
        UserError: no ranking, or rankings of another number of queries.

    Source: Cormack, Clarke and Buettcher, Reciprocal Rank Fusion Outperforms Condorcet, SIGIR 2009.
    """
    if len({len(ranking) for ranking in rankings}) != 1:
        raise UserError(f"rankings of {[len(r) for r in rankings]} queries: fuse at least one, all of the same queries")
    gain_M = np.concatenate([1 / (constant + 1 + np.arange(ranking.shape[1])) for ranking in rankings])
    fused = np.full((len(rankings[0]), k), -1, dtype=np.int64)
    for start in range(0, len(fused), BLOCK):
        row_BM = np.concatenate([ranking[start : start + BLOCK] for ranking in rankings], axis=1).astype(np.int64)
        order_BM = np.argsort(row_BM, axis=1, kind="stable")
        row_BM = np.take_along_axis(row_BM, order_BM, axis=1)
        is_first_BM = np.diff(row_BM, axis=1, prepend=-2) != 0  # the place that gets the sum over the same row
        score_BM = np.zeros(row_BM.shape)
        # Rounded: 1/61 + 1/62 + 1/63 in another order is no other score.
        sums = np.add.reduceat(gain_M[order_BM].ravel(), np.flatnonzero(is_first_BM)) if row_BM.size else 0.0
        score_BM[is_first_BM] = np.round(sums, 14)
        score_BM[row_BM < 0] = 0
        best_BK = np.argsort(-score_BM, axis=1, kind="stable")[:, :k]
        found = np.take_along_axis(np.where(score_BM > 0, row_BM, -1), best_BK, axis=1)
        fused[start : start + BLOCK, : found.shape[1]] = found
    return fused
