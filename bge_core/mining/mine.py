"""Hard negatives: texts that the encoder ranks high for a query without being its answer.

    texts -> vectors -> the best b candidates of each query -> hits a to b -> guards, score filters -> a seeded sample
          -> a teacher's scores

As in FlagEmbedding's hn_mine, the range [a, b) counts hits from 0, before anything is taken out, and what the range
cannot give is filled up at random. Unlike there, what may be an answer is no negative (guards.py), a positive that the
same question has in another row is spared too, and chance is drawn per row, so that neither the number of processes nor
what other rows drew changes what a row gets.

Shapes: Q rows, U distinct queries, K depth of the ranking.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bge_core.encoder.model import Encoder
from bge_core.files.records import Row, distinct_texts
from bge_core.files.text import text_id
from bge_core.mining.guards import Guards, GuardSettings, common_words
from bge_core.mining.select import select_negatives  # cross
from bge_core.runtime.config import MineConfig
from bge_core.runtime.distributed import on_main
from bge_core.search.approximate import approximate_search, measure_recall
from bge_core.search.exact import EXTRA, GPU_MAX_K, exact_search, gpu_available, score_pairs
from bge_core.search.words import bm25_search, reciprocal_rank_fusion

NEIGHBOURS = 32  # questions nearest to each, among which nearly the same ones are looked for
MAX_EXAMPLES = 200  # of what a guard took out, for the report


@dataclass(frozen=True)
class Mined:
    """The result of `mine`, and what was really used.

    Args:
        neg: for each row the texts that its `neg` becomes.
        neg_score: for each row the encoder's score of each of them.
        pos_score: for each row the encoder's score of each of its positives.
        pos_teacher, neg_teacher: a teacher's scores likewise; None without a teacher.
        positive_rank: (Q,) each row's best positive in its ranking, from 0; -1: not within the depth.
        removed: for each guard and filter some of what it took out: query, positive, candidate, score.
        counts: for the report and the manifest.
        query_instruction, passage_instruction: put before texts; "" for none.
        search: how was searched: "device", and of an approximate index what it reached.
    """

    neg: list[list[str]]
    neg_score: list[list[float]]
    pos_score: list[list[float]]
    pos_teacher: list[list[float]] | None
    neg_teacher: list[list[float]] | None
    positive_rank: np.ndarray
    removed: dict[str, list[Row]]
    counts: dict[str, int | float]
    query_instruction: str
    passage_instruction: str
    search: dict[str, Any] = field(default_factory=dict)


class _Judge:
    """Says why a candidate is no negative of a row: guards on the texts, then the limits on its score.

        score <= max_score        score >= min_score
        score <= p - absolute_margin        score <= p - relative_margin * |p|        p: lowest score of the positives

    Args:
        guards: of the rows.
        scores: the encoder's scores of some rows of the pool for a row.
        lowest_Q: p of each row.

    Source: NV-Retriever, Moreira et al. 2024, sec. 4.1 (TopK-MarginPos, TopK-PercPos).
    """

    def __init__(
        self,
        rows: Sequence[Row],
        pool: Sequence[str],
        guards: Guards | None,
        config: MineConfig,
        scores: Callable[[int, Sequence[int]], np.ndarray],
        lowest_Q: np.ndarray,
    ) -> None:
        self.rows, self.pool, self.guards, self.scores, self.lowest_Q = rows, pool, guards, scores, lowest_Q
        self.config, self.removed, self.shown = config, dict[str, list[Row]](), set[tuple[int, int]]()
        self.filters = [
            name
            for name in ("max_score", "min_score", "absolute_margin", "relative_margin")
            if getattr(config, name) is not None
        ]

    def __call__(self, number: int, candidates: Sequence[int]) -> list[str | None]:
        texts = [self.pool[row] for row in candidates]
        reasons: list[str | None] = self.guards.reasons(number, texts) if self.guards else [None] * len(texts)
        scored = self.scores(number, candidates) if len(candidates) and (self.filters or any(reasons)) else None
        lowest = float(self.lowest_Q[number])
        for name in self.filters if scored is not None else ():
            limit = getattr(self.config, name)
            if name == "min_score":
                bad = scored < limit
            else:
                margin = {"max_score": 0.0, "absolute_margin": limit, "relative_margin": limit * abs(lowest)}[name]
                bad = scored > (limit if name == "max_score" else lowest - margin)
            for i in np.flatnonzero(bad).tolist():
                reasons[i] = reasons[i] or name
        for i, reason in enumerate(reasons):
            kept = self.removed.setdefault(reason, []) if reason else None
            if kept is not None and scored is not None and len(kept) < MAX_EXAMPLES:
                if (number, candidates[i]) in self.shown:  # asked again, to fill up at random
                    continue
                self.shown.add((number, candidates[i]))
                row = self.rows[number]
                kept.append(
                    {"query": row["query"], "positive": row["pos"][0], "candidate": texts[i], "score": float(scored[i])}
                )
        return reasons


def mine(
    encoder: Encoder,
    rows: Sequence[Row],
    pool: Sequence[str],
    config: MineConfig,
    encode_texts: Callable[..., Any],
    *,
    index_key: str = "",
    teacher: Callable[[Sequence[tuple[str, str]]], np.ndarray] | None = None,
) -> Mined:
    """Negatives for all rows: encode, search, judge, select. The same on every rank.

    Encoding and a teacher's work are shared among the ranks; the first one searches for all.

    A row's own `prompt` replaces the query instruction. Equal questions share their positives: what answers a question
    in one row is no negative of it in another. With `config.keep_neg`, a row's own negatives come first, each once,
    without those that are a positive or the query, and `config.negative_number` mined ones follow.

    Args:
        encoder: on the device to use.
        rows: checked rows of training data.
        pool: the candidates, each (normalized) text once.
        config: instructions of None mean the encoder's stored prompts.
        encode_texts: (texts, prompt=, max_length=, description=) -> (n, D) vectors, an array or a view of a cache.
        index_key: names what the pool's vectors are made of; an index on disk is reused only under the same.
        teacher: scores of (query, passage) pairs, as a reranker gives them; None: there is none.

    Raises:
        UserError: the model gives NaN; faiss is missing; an index does not fit.
    """
    stored = encoder.settings
    query_instruction = _first_stated(config.query_instruction_for_retrieval, stored.query_prompt)
    passage_instruction = _first_stated(config.passage_instruction_for_retrieval, stored.passage_prompt)

    # One vector for each distinct query as it is encoded, for rows may repeat it.
    asked = [_first_stated(row.get("prompt"), query_instruction) + row["query"] for row in rows]
    places = {text: place for place, text in enumerate(dict.fromkeys(asked))}
    place_Q = np.array([places[text] for text in asked])
    query_UD = encode_texts(list(places), max_length=config.query_max_len, description="encode queries")
    as_passage = {"prompt": passage_instruction, "max_length": config.passage_max_len}
    pool_ND = encode_texts(pool, **as_passage, description="encode candidates")
    if math.prod(pool_ND.shape) * pool_ND.dtype.itemsize <= config.search_memory * 2**20:
        # Views of a cache are gathered once, where that fits, not row by row.
        query_UD, pool_ND = np.asarray(query_UD), np.asarray(pool_ND)
    ranked_UK, searched = on_main(lambda: _retrieve(rows, place_Q, pool, query_UD, pool_ND, config, index_key))
    ranked_QK = ranked_UK[place_Q]

    pool_row = {text_id(text): row for row, text in enumerate(pool)}
    elsewhere = [text for text in distinct_texts(rows, "pos", "neg") if text_id(text) not in pool_row]
    extra_row = {text_id(text): row for row, text in enumerate(elsewhere)}
    extra_ED = encode_texts(elsewhere, **as_passage, description="encode positives") if elsewhere else pool_ND[:0]

    def scores(number: int, candidates: Sequence[int], vectors: Any = pool_ND) -> np.ndarray:
        query = query_UD[place_Q[number] : place_Q[number] + 1]
        return score_pairs(query, vectors, np.array([candidates], dtype=np.int64))[0]

    def text_scores(number: int, texts: Sequence[str]) -> list[float]:
        ids = list(map(text_id, texts))
        found = dict(
            zip(inside := [i for i in ids if i in pool_row], scores(number, [pool_row[i] for i in inside]), strict=True)
        )
        outside = [i for i in ids if i not in pool_row]
        found |= zip(outside, scores(number, [extra_row[i] for i in outside], extra_ED), strict=True)
        return [float(found[i]) for i in ids]

    queries = [row["query"] for row in rows]
    positives = _positives(rows)
    own_neg = list(_own_negatives(rows, positives)) if config.keep_neg else [[] for _ in rows]
    pos_score = [text_scores(number, row["pos"]) for number, row in enumerate(rows)]
    guards = None
    if config.guards:
        near = on_main(lambda: exact_search(query_UD, query_UD, min(NEIGHBOURS, len(query_UD)))[1])
        first = np.unique(place_Q, return_index=True)[1]  # a row of each distinct query
        neighbours = first[near[place_Q]]
        own = [row["pos"] for row in rows]
        guards = Guards(
            queries, own, _answers(rows), guard_settings(config), common_words(pool, config.seed), neighbours
        )
    judge = _Judge(rows, pool, guards, config, scores, np.array([min(found) for found in pos_score]))

    known: dict[tuple[int, str], float] = {}  # a teacher's scores, by row and text

    def ask(pairs: Sequence[tuple[int, str]]) -> list[float]:
        assert teacher is not None
        new = list(dict.fromkeys(pair for pair in pairs if pair not in known))
        known.update(zip(new, teacher([(queries[i], text) for i, text in new]).tolist(), strict=True) if new else ())
        return [known[pair] for pair in pairs]

    def approve(candidates: Sequence[tuple[int, int]]) -> list[bool]:
        found = ask([(i, pool[row]) for i, row in candidates])
        if config.teacher_margin is None:
            return [True] * len(found)
        lowest = {i: min(known[i, text] for text in rows[i]["pos"]) for i, _ in candidates}
        return [score <= lowest[i] - config.teacher_margin for (i, _), score in zip(candidates, found, strict=True)]

    if teacher is not None:
        ask([(i, text) for i, row in enumerate(rows) for text in (*row["pos"], *own_neg[i])])
    chosen, counts = select_negatives(
        queries,
        positives,
        ranked_QK,
        list(pool_row),
        sampling_range=config.sampling_range,
        negative_number=config.negative_number,
        seed=config.seed,
        kept=own_neg,
        sampling=config.sampling,
        temperature=config.sampling_temperature,
        scores=scores,
        refuse=judge if guards or judge.filters else None,
        approve=approve if teacher else None,
    )
    taken = [[*ranked, *filled] for ranked, filled in chosen]
    neg = [own + [pool[i] for i in of] for own, of in zip(own_neg, taken, strict=True)]
    neg_score = [text_scores(i, own) + scores(i, taken[i]).tolist() for i, own in enumerate(own_neg)]
    teachers = (
        [[[known[i, text] for text in texts] for i, texts in enumerate(of)] for of in ([r["pos"] for r in rows], neg)]
        if teacher
        else [None, None]
    )
    num_neg = list(map(len, neg))
    num_own = sum(len(row.get("neg") or []) for row in rows) if config.keep_neg else 0
    return Mined(
        neg,
        neg_score,
        pos_score,
        teachers[0],
        teachers[1],
        _positive_ranks(rows, ranked_QK, pool_row),
        judge.removed,
        {
            "rows": len(rows),
            "distinct_queries": len(places),
            "rows_with_own_prompt": sum(row.get("prompt") is not None for row in rows),
            "pool": len(pool),
            "negatives_min": min(num_neg, default=0),
            "negatives_mean": sum(num_neg) / max(1, len(rows)),
            "negatives_max": max(num_neg, default=0),
            "own_negatives_kept": sum(map(len, own_neg)),
            "own_negatives_dropped": num_own - sum(map(len, own_neg)),
            **counts,
            "negatives_above_positive": sum(
                score > min(own) for own, found in zip(pos_score, neg_score, strict=True) for score in found
            ),
            "positives_not_in_pool": sum(text_id(text) not in pool_row for row in rows for text in row["pos"]),
        },
        query_instruction,
        passage_instruction,
        searched,
    )


def guard_settings(config: MineConfig) -> GuardSettings:
    """The guards that the flags ask for."""
    return GuardSettings(
        config.guard_identical,
        config.near_duplicate_threshold if config.guard_near_duplicates else None,
        config.same_question_threshold if config.guard_same_questions else None,
        config.guard_answers,
    )


def _retrieve(
    rows: Sequence[Row],
    place_Q: np.ndarray,
    pool: Sequence[str],
    query_UD: Any,
    pool_ND: Any,
    config: MineConfig,
    index_key: str,
) -> tuple[np.ndarray, dict[str, Any]]:
    """The best rows of the pool for each distinct query, (U, K), and how they were found."""
    depth = min(config.sampling_range[1], len(pool))
    on_gpu = config.use_gpu_for_searching and gpu_available() and min(depth + EXTRA, len(pool)) <= GPU_MAX_K
    facts: dict[str, Any] = {
        "retriever": config.retriever,
        "index_factory": config.index_factory,
        "device": "gpu" if on_gpu else "cpu",
    }
    rankings = []
    if config.retriever != "bm25":
        if config.index_factory == "Flat":
            found = exact_search(
                query_UD, pool_ND, depth, memory_mb=config.search_memory, use_gpu=config.use_gpu_for_searching
            )[1]
        else:
            _, found, more = approximate_search(
                query_UD,
                pool_ND,
                depth,
                config.index_factory,
                path=config.index_path,
                content_key=index_key,
                seed=config.seed,
                memory_mb=config.search_memory,
                use_gpu=config.use_gpu_for_searching,
            )
            facts |= more | {"recall": measure_recall(query_UD, pool_ND, found, depth, seed=config.seed)}
        rankings.append(found)
    if config.retriever != "dense":
        first = np.unique(place_Q, return_index=True)[1]
        rankings.append(bm25_search([rows[i]["query"] for i in first], pool, depth)[1])
    return (rankings[0] if len(rankings) == 1 else reciprocal_rank_fusion(rankings, depth)), facts


def _positive_ranks(rows: Sequence[Row], ranked_QK: np.ndarray, pool_row: dict[int, int]) -> np.ndarray:
    """(Q,) place of each row's best positive in its ranking, -1: not there."""
    ranks = np.full(len(rows), -1)
    for number, row in enumerate(rows):
        own = [pool_row[i] for i in map(text_id, row["pos"]) if i in pool_row]
        hit = np.flatnonzero(np.isin(ranked_QK[number], own))
        ranks[number] = hit[0] if len(hit) else -1
    return ranks


def _first_stated(*values: str | None) -> str:
    return next((value for value in values if value is not None), "")


def _answers(rows: Sequence[Row]) -> list[list[str]]:
    """For each row its `answer`: a text, a list of them, or nothing."""
    found = []
    for row in rows:
        answer = row.get("answer") or []
        found.append([text for text in ([answer] if isinstance(answer, str) else answer) if isinstance(text, str)])
    return found


def _positives(rows: Sequence[Row]) -> list[list[str]]:
    """For each row the positives of its query, over all rows that ask the same."""
    together: defaultdict[int, list[str]] = defaultdict(list)
    for row in rows:
        together[text_id(row["query"])] += row["pos"]
    return [together[text_id(row["query"])] for row in rows]


def _own_negatives(rows: Sequence[Row], positives: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """For each row its `neg`, each text once, without the query and its positives."""
    for row, known in zip(rows, positives, strict=True):
        barred_ids = {text_id(row["query"]), *map(text_id, known)}
        yield [text for text in distinct_texts([row], "neg") if text_id(text) not in barred_ids]


def mined_rows(rows: Sequence[Row], mined: Mined) -> Iterator[Row]:
    """The rows of the output: `neg` and a teacher's scores replaced where they stood, or added at the end."""
    for i, row in enumerate(rows):
        new = {**row, "neg": mined.neg[i]}
        if mined.pos_teacher is not None and mined.neg_teacher is not None:
            new |= {"pos_scores": mined.pos_teacher[i], "neg_scores": mined.neg_teacher[i]}
        else:
            new.pop("neg_scores", None)
        yield new
