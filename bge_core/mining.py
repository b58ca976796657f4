"""Hard negatives: texts that the encoder ranks high for a query without being its answer.

    texts -> vectors -> the best b candidates of each query -> hits a to b, without positives -> a seeded sample

As in FlagEmbedding's hn_mine, the range [a, b) counts hits from 0, before positives are taken out, and what the range
cannot give is filled up at random. Unlike there, texts are compared normalized (`records.normalize_text`), a positive
that the same question has in another row is spared too, and chance is drawn per row, so that neither the number of
processes nor what other rows drew changes what a row gets.

Shapes: Q rows, K depth of the ranking.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from bge_core.config import MineConfig
from bge_core.encode import encode
from bge_core.model import Encoder
from bge_core.records import Row, distinct_texts, text_id
from bge_core.search import EXTRA, GPU_MAX_K, exact_search, gpu_available

COUNTS = (
    "positives_dropped", "queries_dropped", "kept_dropped",  # hits of the range that were taken out, and why
    "rows_sampled",  # had more hits than needed
    "rows_filled_at_random", "negatives_at_random",
    "rows_short", "rows_without_negatives",  # the pool had too few; had none at all
)  # fmt: skip


class Negatives(NamedTuple):
    """What one row gets, as rows of the pool: hits of its range in rank order, then what was drawn at random."""

    ranked: list[int]
    filled: list[int]


@dataclass(frozen=True)
class Mined:
    """The result of `mine`, and what was really used.

    Args:
        neg: for each row the texts that its `neg` becomes.
        counts: for the report and the manifest.
        query_instruction, passage_instruction: put before texts; "" for none.
        search_device: "gpu" or "cpu".
    """

    neg: list[list[str]]
    counts: dict[str, int | float]
    query_instruction: str
    passage_instruction: str
    search_device: str


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
) -> tuple[list[Negatives], Counter[str]]:
    """Choose the negatives of each row from its ranking.

        hits = ranked[a:b] without positives, the query and `kept`
        more than n hits: n of them, drawn without repeats, still in rank order
        fewer:            all of them, then others of the pool at random, as far as the pool goes

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

    Returns:
        Q choices, and the COUNTS over all rows.

    Source: FlagEmbedding 1.2.11, baai_general_embedding/finetune/hn_mine.py, find_knn_neg.
    """
    assert len(set(pool_ids)) == len(pool_ids), "a text of the pool comes twice"
    start, end = sampling_range
    chosen: list[Negatives] = []
    counts = Counter(dict.fromkeys(COUNTS, 0))
    for number, query in enumerate(queries):
        query_id = text_id(query)
        positive_ids = set(map(text_id, positives[number]))
        kept_ids = set(map(text_id, kept[number])) if kept is not None else set()
        hits = []
        for row in ranked_QK[number, start:end].tolist():
            if row < 0:
                break
            if pool_ids[row] in positive_ids:
                counts["positives_dropped"] += 1
            elif pool_ids[row] == query_id:
                counts["queries_dropped"] += 1
            elif pool_ids[row] in kept_ids:
                counts["kept_dropped"] += 1
            else:
                hits.append(row)

        chance = random.Random(f"{seed} {number}")  # a string: seeded by its hash, so neighbours are unrelated
        if len(hits) > negative_number:
            hits = [hits[i] for i in sorted(chance.sample(range(len(hits)), negative_number))]
            counts["rows_sampled"] += 1
        filled = _fill(negative_number - len(hits), set(hits), positive_ids | kept_ids | {query_id}, pool_ids, chance)
        counts["rows_filled_at_random"] += bool(filled)
        counts["negatives_at_random"] += len(filled)
        counts["rows_short"] += len(hits) + len(filled) < negative_number
        counts["rows_without_negatives"] += not hits and not filled
        chosen.append(Negatives(hits, filled))
    return chosen, counts


def _fill(count: int, taken: set[int], barred: set[int], pool_ids: Sequence[int], chance: random.Random) -> list[int]:
    """Up to `count` different rows of the pool, each equally likely, that are neither taken nor barred."""
    # Texts of the pool are distinct, so of these draws at most len(taken) + len(barred) are refused.
    num_draws = min(count + len(taken) + len(barred), len(pool_ids)) if count else 0
    drawn = chance.sample(range(len(pool_ids)), num_draws)
    return [row for row in drawn if row not in taken and pool_ids[row] not in barred][:count]


def mine(
    encoder: Encoder, rows: Sequence[Row], pool: Sequence[str], config: MineConfig, *, precision: str = "no"
) -> Mined:
    """Negatives for all rows: encode, search, select. The same on every rank; encoding is shared among them.

    A row's own `prompt` replaces the query instruction. Equal questions share their positives: what answers a question
    in one row is no negative of it in another. With `config.keep_neg`, a row's own negatives come first, each once,
    without those that are a positive or the query, and `config.negative_number` mined ones follow.

    Args:
        encoder: on the device to use.
        rows: checked rows of training data.
        pool: the candidates, each (normalized) text once.
        config: instructions of None mean the encoder's stored prompts.
        precision: "fp16" or "bf16" autocast, or "no".

    Raises:
        UserError: the model gives NaN; faiss is missing.
    """
    stored = encoder.settings
    query_instruction = _first_stated(config.query_instruction_for_retrieval, stored.query_prompt)
    passage_instruction = _first_stated(config.passage_instruction_for_retrieval, stored.passage_prompt)
    depth = min(config.sampling_range[1], len(pool))
    on_gpu = config.use_gpu_for_searching and gpu_available() and min(depth + EXTRA, len(pool)) <= GPU_MAX_K

    # One vector for each distinct query as it is encoded, for rows may repeat it.
    asked = [_first_stated(row.get("prompt"), query_instruction) + row["query"] for row in rows]
    places = {text: place for place, text in enumerate(dict.fromkeys(asked))}
    shared = partial(encode, encoder, batch_size=config.batch_size, max_tokens=config.max_tokens, precision=precision)
    query_vectors = shared(list(places), max_length=config.query_max_len, description="encode queries")
    pool_vectors = shared(
        pool, prompt=passage_instruction, max_length=config.passage_max_len, description="encode candidates"
    )
    _, ranked = exact_search(query_vectors, pool_vectors, depth, use_gpu=config.use_gpu_for_searching)
    ranked_QK = ranked[[places[text] for text in asked]]

    queries = [row["query"] for row in rows]
    positives = _positives(rows)
    own_neg = list(_own_negatives(rows, positives)) if config.keep_neg else [[] for _ in rows]
    chosen, counts = select_negatives(
        queries, positives, ranked_QK, list(map(text_id, pool)), sampling_range=config.sampling_range,
        negative_number=config.negative_number, seed=config.seed, kept=own_neg,
    )  # fmt: skip
    neg = [own + [pool[i] for i in (*ranked, *filled)] for own, (ranked, filled) in zip(own_neg, chosen, strict=True)]
    num_neg = list(map(len, neg))
    num_own = sum(len(row.get("neg") or []) for row in rows) if config.keep_neg else 0
    return Mined(
        neg,
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
        },
        query_instruction,
        passage_instruction,
        "gpu" if on_gpu else "cpu",
    )


def _first_stated(*values: str | None) -> str:
    return next((value for value in values if value is not None), "")


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
