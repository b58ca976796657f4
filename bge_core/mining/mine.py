"""Hard negatives: texts that the encoder ranks high for a query without being its answer.

    texts -> vectors -> the best b candidates of each query -> hits a to b -> guards, score filters -> a seeded sample
          -> a teacher's scores

As in FlagEmbedding's hn_mine, the range [a, b) counts hits from 0, before anything is taken out, and what the range
cannot give is filled up at random. Unlike there, what may be an answer is no negative (guards.py), nor is a positive
that the same question has in another row, and chance is drawn per row, so that neither the number of processes nor what
other rows drew changes what a row gets.

Shapes: Q rows, U distinct queries, K depth of the ranking.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bge_core.encoder.model import Encoder
from bge_core.files.records import Row, distinct_texts
from bge_core.files.text import letters, text_id
from bge_core.mining.filters import CandidateFilter
from bge_core.mining.guards import Guards, GuardSettings
from bge_core.mining.retrieve import Embedded, embed, index_key, rank_pool
from bge_core.mining.select import query_ids, select_negatives
from bge_core.mining.teacher import Teacher, TeacherScores
from bge_core.runtime.config import MineConfig
from bge_core.search.cache import EmbeddingCache
from bge_core.search.exact import search_in_shares

NEIGHBOURS = 32  # questions nearest to each, among which nearly the same ones are looked for


@dataclass(frozen=True)
class Mined:
    """The result of `mine_hard_negatives`, and what was really used.

    Args:
        neg: for each row the texts that its `neg` becomes.
        neg_score: for each row the encoder's score of each of them.
        pos_score: for each row the encoder's score of each of its positives.
        pos_teacher, neg_teacher: a teacher's scores likewise, over its temperature; None without a teacher.
        teacher_temperature: None without a teacher.
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
    teacher_temperature: float | None
    positive_rank: np.ndarray
    removed: dict[str, list[Row]]
    counts: dict[str, int | float]
    query_instruction: str
    passage_instruction: str
    search: dict[str, Any] = field(default_factory=dict)


def mine_hard_negatives(
    encoder: Encoder,
    rows: Sequence[Row],
    pool: Sequence[str],
    config: MineConfig,
    *,
    precision: str = "no",
    cache: EmbeddingCache | None = None,
    teacher: Teacher | None = None,
) -> Mined:
    """Negatives for all rows: encode, search, filter, select. The same on every process.

    Encoding, exact search and a teacher's work are shared among the processes; an index and words are the first one's.

    A row's own `prompt` replaces the query instruction. Equal questions share their positives: what answers a question
    in one row is no negative of it in another. With `config.keep_neg`, a row's own negatives come first, each once,
    without those that are a positive or the query, and `config.negative_number` mined ones follow.

    Args:
        encoder: on the device to use.
        rows: checked rows of training data.
        pool: the candidates, each (normalized) text once.
        config: instructions of None mean the encoder's stored prompts, see `choose_prompts`.
        precision: "fp16", "bf16" or "no".
        cache: keeps the vectors; None: nothing does.
        teacher: scores what is chosen; None: there is none.

    Raises:
        UserError: the model gives NaN; faiss is missing; an index does not fit.
    """
    embedded = embed(encoder, rows, pool, config, precision=precision, cache=cache)
    key = ""
    if config.index_factory != "Flat":
        key = index_key(encoder, pool, embedded.passage_instruction, config, precision)
    ranked_UK, searched = rank_pool(rows, pool, embedded, config, key)
    ranked_QK = ranked_UK[embedded.place_Q]

    positives = _positives(rows)
    own_neg = list(_own_negatives(rows, positives)) if config.keep_neg else [[] for _ in rows]
    pos_score = [embedded.text_scores(number, row["pos"]) for number, row in enumerate(rows)]
    guards = _make_guards(rows, pool, embedded, config) if config.guards else None
    filters = CandidateFilter(rows, pool, embedded, config, [min(scores) for scores in pos_score], guards)
    teacher_scores = TeacherScores(teacher, rows, own_neg, pool, config.teacher_margin) if teacher else None
    pool_ids = list(embedded.pool_row)
    chosen, counts = select_negatives(
        query_ids([row["query"] for row in rows], pool, pool_ids),
        positives,
        ranked_QK,
        pool_ids,
        sampling_range=config.sampling_range,
        negative_number=config.negative_number,
        seed=config.seed,
        kept=own_neg,
        sampling=config.sampling,
        temperature=config.sampling_temperature,
        embedded=embedded,
        filters=filters if filters.excludes_any else None,
        teacher=teacher_scores,
    )
    taken = [[*ranked, *filled] for ranked, filled in chosen]
    neg = [own + [pool[i] for i in of] for own, of in zip(own_neg, taken, strict=True)]
    neg_score = [embedded.text_scores(i, own) + embedded.scores(i, taken[i]).tolist() for i, own in enumerate(own_neg)]
    return Mined(
        neg,
        neg_score,
        pos_score,
        [teacher_scores.over_temperature(i, row["pos"]) for i, row in enumerate(rows)] if teacher_scores else None,
        [teacher_scores.over_temperature(i, texts) for i, texts in enumerate(neg)] if teacher_scores else None,
        teacher.temperature if teacher else None,
        _positive_ranks(rows, ranked_QK, embedded.pool_row),
        filters.removed,
        _count(rows, own_neg, neg, pos_score, neg_score, embedded, counts, config.keep_neg),
        embedded.query_instruction,
        embedded.passage_instruction,
        searched,
    )


def mined_rows(rows: Sequence[Row], mined: Mined) -> Iterator[Row]:
    """The rows of the output: `neg` and a teacher's scores replaced where they stood, or added at the end."""
    for i, row in enumerate(rows):
        new = {**row, "neg": mined.neg[i]}
        if mined.pos_teacher is not None and mined.neg_teacher is not None:
            new |= {"pos_scores": mined.pos_teacher[i], "neg_scores": mined.neg_teacher[i]}
        else:
            new.pop("neg_scores", None)
        yield new


def _make_guards(rows: Sequence[Row], pool: Sequence[str], embedded: Embedded, config: MineConfig) -> Guards:
    """The guards that the flags ask for, of these rows."""
    query_UD = embedded.query_UD
    near_UK = search_in_shares(query_UD, query_UD, min(NEIGHBOURS, len(query_UD)))[1]
    settings = GuardSettings(
        config.guard_identical,
        config.near_duplicate_threshold if config.guard_near_duplicates else None,
        config.same_question_threshold if config.guard_same_questions else None,
        config.guard_answers,
    )
    return Guards(
        [row["query"] for row in rows],
        [row["pos"] for row in rows],
        [_answers(row) for row in rows],
        settings,
        pool,
        embedded.first_U[near_UK[embedded.place_Q]],
        config.seed,
    )


def _answers(row: Row) -> list[str]:
    """A row's `answer`: a text, a list of them, or nothing."""
    answer = row.get("answer") or []
    return [text for text in ([answer] if isinstance(answer, str) else answer) if isinstance(text, str)]


def _positives(rows: Sequence[Row]) -> list[list[str]]:
    """For each row the positives of its query, over all rows that ask the same."""
    together: defaultdict[int, list[str]] = defaultdict(list)
    for row in rows:
        together[text_id(row["query"])] += row["pos"]
    return [together[text_id(row["query"])] for row in rows]


def _own_negatives(rows: Sequence[Row], positives: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """For each row its `neg`, each text once, without the query and its positives."""
    for row, known in zip(rows, positives, strict=True):
        excluded, query = {text_id(row["query"]), *map(text_id, known)}, letters(row["query"])
        own = (text for text in distinct_texts([row], "neg") if text_id(text) not in excluded)
        yield [text for text in own if not query or letters(text) != query]


def _positive_ranks(rows: Sequence[Row], ranked_QK: np.ndarray, pool_row: Mapping[int, int]) -> np.ndarray:
    """(Q,) place of each row's best positive in its ranking, -1: not there."""
    ranks = np.full(len(rows), -1)
    for number, row in enumerate(rows):
        own = [pool_row[i] for i in map(text_id, row["pos"]) if i in pool_row]
        hits = np.flatnonzero(np.isin(ranked_QK[number], own))
        ranks[number] = hits[0] if len(hits) else -1
    return ranks


def _count(
    rows: Sequence[Row],
    own_neg: Sequence[Sequence[str]],
    neg: Sequence[Sequence[str]],
    pos_score: Sequence[Sequence[float]],
    neg_score: Sequence[Sequence[float]],
    embedded: Embedded,
    of_selection: Mapping[str, int],
    keep_neg: bool,
) -> dict[str, int | float]:
    num_neg, num_kept = list(map(len, neg)), sum(map(len, own_neg))
    num_own = sum(len(row.get("neg") or []) for row in rows) if keep_neg else 0
    return {
        "rows": len(rows),
        "distinct_queries": len(embedded.query_UD),
        "rows_with_own_prompt": sum(row.get("prompt") is not None for row in rows),
        "pool": len(embedded.pool_row),
        "negatives_min": min(num_neg, default=0),
        "negatives_mean": sum(num_neg) / max(1, len(rows)),
        "negatives_max": max(num_neg, default=0),
        "own_negatives_kept": num_kept,
        "own_negatives_dropped": num_own - num_kept,
        **of_selection,
        "negatives_above_positive": sum(
            score > min(own) for own, found in zip(pos_score, neg_score, strict=True) for score in found
        ),
        "positives_not_in_pool": sum(text_id(text) not in embedded.pool_row for row in rows for text in row["pos"]),
    }
