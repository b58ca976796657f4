"""Which of a query's hits become its negatives: a function of its ranking, the texts and the seed."""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from itertools import chain, islice
from typing import Literal, NamedTuple

import numpy as np

from bge_core.files.text import letters, text_id
from bge_core.mining.filters import CandidateFilter
from bge_core.mining.retrieve import Embedded
from bge_core.mining.teacher import TeacherScores

COUNTS = (
    "positives_dropped", "queries_dropped", "kept_dropped",  # hits of the range that were taken out, and why
    "rows_sampled",  # had more hits than needed
    "rows_filled_at_random", "negatives_at_random",
    "rows_short", "rows_without_negatives",  # got fewer than asked for; got none at all
    "rows_short_of_pool",  # of the short: the pool, without the row's own texts, is too small, whatever was taken out
)  # fmt: skip


class Negatives(NamedTuple):
    """What one row gets, as rows of the pool: hits of its range in rank order, then what was drawn at random."""

    ranked: list[int]
    filled: list[int]


def query_ids(queries: Sequence[str], pool: Sequence[str], pool_ids: Sequence[int]) -> list[set[int]]:
    """For each query the `text_id` of itself and of all texts of the pool with its letters: marks and spaces aside."""
    asked = {letters(query) for query in queries} - {""}
    found: dict[str, set[int]] = {}
    for text, number in zip(pool, pool_ids, strict=True):
        if (form := letters(text)) in asked:
            found.setdefault(form, set()).add(number)
    return [{text_id(query)} | found.get(letters(query), set()) for query in queries]


def select_negatives(
    queries: Sequence[Set[int]],
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
    embedded: Embedded | None = None,
    filters: CandidateFilter | None = None,
    teacher: TeacherScores | None = None,
) -> tuple[list[Negatives], Counter[str]]:
    """Choose the negatives of each row from its ranking.

        hits = ranked[a:b] without positives, the query, `kept` and what the filters exclude
        order of the hits:  uniform  each order equally likely
                            top      by rank
                            score    drawn without repeats, each with probability ~ exp(score / temperature)
        the first n that the teacher accepts; too few: others of the pool at random, as far as the pool goes

    A row's choice is a function of its own ranking and texts, the pool, the seed and its number in the file.

    Args:
        queries: of each row the ids of what is its query, see `query_ids`.
        positives: texts that are no negatives of that query, whether or not the pool holds them.
        ranked_QK: (Q, K) int64, rows of the pool, best first, each once, padded with -1. K may be below b.
        pool_ids: `text_id` of each text of the pool; all different.
        sampling_range: (a, b), counted from 0, b excluded.
        negative_number: n.
        seed: of the chance; any integer.
        kept: negatives that a row has already and that are not to come again.
        sampling, temperature: see above; "score" needs `embedded`, which has the scores.
        filters: may exclude hits, which is counted by reason, and what is drawn at random.
        teacher: asked last, of many rows at once, and only of what would be taken.

    Returns:
        Q choices, and the COUNTS over all rows.

    Source: FlagEmbedding 1.2.11, baai_general_embedding/finetune/hn_mine.py, find_knn_neg. Drawing by score without
        repeats: Gumbel-top-k, Kool et al. 2019, eq. 4.
    """
    assert len(set(pool_ids)) == len(pool_ids), "a text of the pool comes twice"
    counts = Counter(dict.fromkeys(COUNTS, 0))
    rank_of_hit: list[dict[int, int]] = []
    orders: list[Iterator[int]] = []  # of each row, what it takes next
    available: list[int] = []  # for each row, before anything is taken out
    for number, own in enumerate(queries):
        known = {text_id(text): "kept_dropped" for text in (kept[number] if kept is not None else ())}
        known |= dict.fromkeys(own, "queries_dropped")
        known |= dict.fromkeys(map(text_id, positives[number]), "positives_dropped")
        hits = _hits_in_range(ranked_QK[number], sampling_range, known, pool_ids, counts)
        hits = _exclude(number, hits, filters, counts)
        counts["rows_sampled"] += len(hits) > negative_number
        chance = random.Random(f"{seed} {number}")  # a string: seeded by its hash, so neighbours are unrelated
        rank_of_hit.append({row: rank for rank, row in enumerate(hits)})
        order = list(hits)
        if sampling == "uniform":
            chance.shuffle(order)
        elif sampling == "score" and hits:
            assert embedded is not None
            order = _draw_by_score(hits, embedded.scores(number, hits), temperature, chance)
        orders.append(chain(order, _others(number, negative_number, {*hits}, {*known}, pool_ids, chance, filters)))
        available.append(_num_others(known, pool_ids, negative_number))
    chosen = []
    for rows, rank, most in zip(_take(orders, negative_number, teacher, counts), rank_of_hit, available, strict=True):
        ranked, filled = sorted(set(rows) & rank.keys(), key=rank.__getitem__), [row for row in rows if row not in rank]
        chosen.append(Negatives(ranked, filled))
        counts["rows_filled_at_random"] += bool(filled)
        counts["negatives_at_random"] += len(filled)
        counts["rows_short"] += len(rows) < negative_number
        counts["rows_short_of_pool"] += most < negative_number
        counts["rows_without_negatives"] += not rows
    return chosen, counts


def _hits_in_range(
    ranked_K: np.ndarray,
    sampling_range: tuple[int, int],
    known: dict[int, str],
    pool_ids: Sequence[int],
    counts: Counter[str],
) -> list[int]:
    """The hits of the range, best first, without what is known not to be a negative."""
    hits = [row for row in ranked_K[slice(*sampling_range)].tolist() if row >= 0]
    counts.update(known[pool_ids[row]] for row in hits if pool_ids[row] in known)
    return [row for row in hits if pool_ids[row] not in known]


def _num_others(known: dict[int, str], pool_ids: Sequence[int], enough: int) -> int:
    """How many texts of the pool are not known, as far as up to `enough` matters."""
    if len(pool_ids) - len(known) >= enough:
        return enough
    return sum(number not in known for number in pool_ids)


def _exclude(number: int, hits: list[int], filters: CandidateFilter | None, counts: Counter[str]) -> list[int]:
    if filters is None:
        return hits
    reasons = filters.reasons(number, hits)
    counts.update(f"{reason}_dropped" for reason in reasons if reason)
    return [row for row, reason in zip(hits, reasons, strict=True) if not reason]


def _draw_by_score(hits: Sequence[int], scores: np.ndarray, temperature: float, chance: random.Random) -> list[int]:
    keys = [score / temperature - math.log(chance.expovariate(1)) for score in scores.tolist()]
    return [row for _, row in sorted(zip(keys, hits, strict=True), reverse=True)]


def _others(
    number: int,
    count: int,
    hits: set[int],
    known: set[int],
    pool_ids: Sequence[int],
    chance: random.Random,
    filters: CandidateFilter | None,
) -> Iterator[int]:
    """Different rows of the pool, each equally likely, neither hits nor known nor excluded; `count` and more."""
    # Texts of the pool are distinct, so of these draws at most len(hits) + len(known) are passed over.
    num_draws = min((5 if filters else 1) * count + len(hits) + len(known), len(pool_ids))
    drawn = chance.sample(range(len(pool_ids)), num_draws)
    others = (row for row in drawn if row not in hits and pool_ids[row] not in known)
    while some := list(islice(others, count)):
        reasons = filters.reasons(number, some) if filters else [None] * len(some)
        yield from (row for row, reason in zip(some, reasons, strict=True) if not reason)


def _take(
    orders: Sequence[Iterator[int]], count: int, teacher: TeacherScores | None, counts: Counter[str]
) -> list[list[int]]:
    """The first `count` of each row that the teacher accepts, asked for all rows at once until none lacks any."""
    taken: list[list[int]] = [[] for _ in orders]
    while asked := [(i, row) for i, order in enumerate(orders) for row in islice(order, count - len(taken[i]))]:
        accepted = teacher.accepts(asked) if teacher else [True] * len(asked)
        for (i, row), is_accepted in zip(asked, accepted, strict=True):
            if is_accepted:
                taken[i].append(row)
            else:
                counts["teacher_dropped"] += 1
    return taken
