"""Which of a query's hits become its negatives: a pure function."""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Literal, NamedTuple

import numpy as np

from bge_core.files.text import text_id

COUNTS = (
    "positives_dropped", "queries_dropped", "kept_dropped",  # hits of the range that were taken out, and why
    "rows_sampled",  # had more hits than needed
    "rows_filled_at_random", "negatives_at_random",
    "rows_short", "rows_without_negatives",  # the pool had too few; had none at all
)  # fmt: skip

Refuse = Callable[[int, Sequence[int]], Sequence[str | None]]
Approve = Callable[[Sequence[tuple[int, int]]], Sequence[bool]]


class Negatives(NamedTuple):
    """What one row gets, as rows of the pool: hits of its range in rank order, then what was drawn at random."""

    ranked: list[int]
    filled: list[int]


def select_negatives(
    queries: Sequence[str],
    positives: Sequence[Sequence[str]],
    ranked_QK: np.ndarray,
    pool_ids: Sequence[int],
    *,
    sampling_range: tuple[int, int],
    negative_number: int,
    seed: int,
    kept: Sequence[Sequence[str]] | None = None,
    sampling: Literal["uniform", "top", "score"] = "uniform",
    temperature: float = 0.05,
    scores: Callable[[int, Sequence[int]], np.ndarray] | None = None,
    refuse: Refuse | None = None,
    approve: Approve | None = None,
) -> tuple[list[Negatives], Counter[str]]:
    """Choose the negatives of each row from its ranking.

        hits = ranked[a:b] without positives, the query, `kept` and what is refused
        order of the hits:  uniform  each order equally likely
                            top      by rank
                            score    drawn without repeats, each with probability ~ exp(score / temperature)
        the first n that are approved; too few: others of the pool at random, as far as the pool goes

    A row's choice is a function of its own ranking and texts, the pool, the seed and its number in the file.

    Args:
        queries: Q texts.
        positives: texts that are no negatives of that query, whether or not the pool holds them.
        ranked_QK: (Q, K) int64, rows of the pool, best first, each once, padded with -1. K may be below b.
        pool_ids: `text_id` of each text of the pool; all different.
        sampling_range: (a, b), counted from 0, b excluded.
        negative_number: n.
        seed: of the chance; any integer.
        kept: negatives that a row has already and that are not to come again.
        sampling, temperature: see above; "score" needs `scores`.
        scores: the encoder's scores of some rows of the pool for a query.
        refuse: for some rows of the pool the reason why each is no negative of a query, or None; counted by reason.
        approve: asked last, for (row, row of the pool) of many rows at once, and only for what would be taken.

    Returns:
        Q choices, and the COUNTS over all rows.

    Source: FlagEmbedding 1.2.11, baai_general_embedding/finetune/hn_mine.py, find_knn_neg. Drawing by score without
        repeats: Gumbel-top-k, Kool et al. 2019, eq. 4.
    """
    assert len(set(pool_ids)) == len(pool_ids), "a text of the pool comes twice"
    start, end = sampling_range
    counts = Counter(dict.fromkeys(COUNTS, 0))
    hits: list[list[int]] = []
    orders: list[Iterator[int]] = []  # of each row, what it takes next
    for number, query in enumerate(queries):
        barred = {text_id(text): "kept_dropped" for text in (kept[number] if kept is not None else ())}
        barred |= {text_id(query): "queries_dropped"} | {
            text_id(text): "positives_dropped" for text in positives[number]
        }
        found = []
        for row in ranked_QK[number, start:end].tolist():
            if row < 0:
                break
            if pool_ids[row] in barred:
                counts[barred[pool_ids[row]]] += 1
            else:
                found.append(row)
        if refuse is not None:
            reasons = refuse(number, found)
            counts.update(f"{reason}_dropped" for reason in reasons if reason)
            found = [row for row, reason in zip(found, reasons, strict=True) if not reason]
        counts["rows_sampled"] += len(found) > negative_number
        hits.append(found)

        chance = random.Random(f"{seed} {number}")  # a string: seeded by its hash, so neighbours are unrelated
        order = list(found)
        if sampling == "uniform":
            chance.shuffle(order)
        elif sampling == "score" and found:
            assert scores is not None
            keys = [score / temperature - math.log(chance.expovariate(1)) for score in scores(number, found).tolist()]
            order = [row for _, row in sorted(zip(keys, found, strict=True), reverse=True)]
        spare = _fill(number, negative_number, set(found), set(barred), pool_ids, chance, refuse)
        orders.append(chain(order, spare))

    taken: list[list[int]] = [[] for _ in queries]
    while asked := [
        (i, row) for i in range(len(queries)) for row in islice(orders[i], negative_number - len(taken[i]))
    ]:
        for (i, row), good in zip(asked, approve(asked) if approve else [True] * len(asked), strict=True):
            if good:
                taken[i].append(row)
            else:
                counts["teacher_dropped"] += 1

    chosen = []
    for rows, found in zip(taken, hits, strict=True):
        rank = {row: place for place, row in enumerate(found)}
        filled = [row for row in rows if row not in rank]
        chosen.append(Negatives(sorted(set(rows) & set(found), key=rank.__getitem__), filled))
        counts["rows_filled_at_random"] += bool(filled)
        counts["negatives_at_random"] += len(filled)
        counts["rows_short"] += len(rows) < negative_number
        counts["rows_without_negatives"] += not rows
    return chosen, counts


def _fill(
    number: int,
    count: int,
    hits: set[int],
    barred: set[int],
    pool_ids: Sequence[int],
    chance: random.Random,
    refuse: Refuse | None,
) -> Iterator[int]:
    """Different rows of the pool, each equally likely, neither hits nor barred nor refused; `count` and more."""
    # Texts of the pool are distinct, so of these draws at most len(hits) + len(barred) are passed over.
    num_draws = min((5 if refuse else 1) * count + len(hits) + len(barred), len(pool_ids))
    drawn = (row for row in chance.sample(range(len(pool_ids)), num_draws))
    spare = (row for row in drawn if row not in hits and pool_ids[row] not in barred)
    while some := list(islice(spare, count)):
        reasons = refuse(number, some) if refuse else [None] * len(some)
        yield from (row for row, reason in zip(some, reasons, strict=True) if not reason)
