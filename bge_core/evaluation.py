"""Evaluate encoders: encode, search exactly, score. A positive is found by its text, as FlagEmbedding does."""

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bge_core import UserError, records
from bge_core.cache import EmbeddingCache
from bge_core.encode import encode
from bge_core.metrics import mean_metrics, per_query_metrics
from bge_core.model import Encoder
from bge_core.search import exact_search

logger = logging.getLogger(__name__)

BGE_QUERY_INSTRUCTION = {
    "zh": "为这个句子生成表示以用于检索相关文章：",
    "en": "Represent this sentence for searching relevant passages: ",
}


@dataclass(frozen=True)
class RetrievalTask:
    """Questions, a corpus, and which of its rows are right.

    Args:
        query_ids, queries: equal questions stay separate.
        corpus_ids, corpus: each normalized text once (the first of equal ones).
        relevant: for each question the corpus rows of its positives.
        num_positives: distinct positives of each question, those included that the corpus lacks.
        missing: positives that the corpus lacks, each text once.
    """

    query_ids: list[str]
    queries: list[str]
    corpus_ids: list[str]
    corpus: list[str]
    relevant: list[list[int]]
    num_positives: list[int]
    missing: list[str]


@dataclass(frozen=True)
class Ranking:
    """What one model found: scores and corpus rows (Q, k), best first, and each metric per question."""

    scores: np.ndarray
    rows: np.ndarray
    per_query: dict[str, np.ndarray]

    @property
    def means(self) -> dict[str, float]:
        """Each metric's mean over the questions."""
        return mean_metrics(self.per_query)


def load_task(val_data: str | Path, corpus: str | Path | None = None) -> RetrievalTask:
    """Read evaluation data.

    Args:
        val_data: JSONL with query, pos and optional id.
        corpus: JSONL with text and optional id; None: the distinct `pos` and `neg` texts of val_data.

    Raises:
        UserError: a file is missing, empty or has bad lines.
    """
    query_ids: list[str] = []
    rows: list[records.Row] = []
    for number, row in records.read_jsonl(val_data, records.check_evaluation_row):
        query_ids.append(str(row["id"]) if row.get("id") is not None else str(number - 1))
        rows.append(row)
    _refuse_repeated(val_data, query_ids)
    if not rows:
        raise UserError(f"{val_data}: holds no row")
    num_empty = sum(not row["query"].strip() for row in rows)
    if num_empty:
        logger.warning("%s: %d questions are empty; they are scored like the others", val_data, num_empty)
    if corpus is None:
        texts = records.distinct_texts(rows, "pos", "neg")
        ids = [str(i) for i in range(len(texts))]
    else:
        ids, texts = records.read_corpus(corpus)
        _refuse_repeated(corpus, ids)
    row_of: dict[int, int] = {}
    kept: list[int] = []
    for i, text in enumerate(texts):
        if row_of.setdefault(records.text_id(text), len(kept)) == len(kept):
            kept.append(i)
    if len(kept) < len(texts):
        logger.warning("%s: %d repeated texts were left out of the corpus", corpus, len(texts) - len(kept))
    relevant: list[list[int]] = []
    num_positives: list[int] = []
    missing: dict[int, str] = {}
    for row in rows:
        positives = {records.text_id(text): text for text in row["pos"]}
        relevant.append([row_of[i] for i in positives if i in row_of])
        num_positives.append(len(positives))
        missing.update({i: text for i, text in positives.items() if i not in row_of})
    if missing:
        shown = "".join(f"\n  {text[:60]}" for text in list(missing.values())[:3])
        logger.warning(
            "%s lacks %d positives of %s, which count as misses; first:%s", corpus, len(missing), val_data, shown
        )
    return RetrievalTask(
        query_ids, [row["query"] for row in rows], [ids[i] for i in kept], [texts[i] for i in kept],
        relevant, num_positives, list(missing.values()),
    )  # fmt: skip


def _refuse_repeated(path: str | Path, ids: list[str]) -> None:
    if len(set(ids)) < len(ids):
        repeated = next(name for name, count in Counter(ids).items() if count > 1)
        raise UserError(f"{path}: the id {repeated!r} stands on several lines; make ids unique, or leave them out")


def bge_instruction(name: str, queries: list[str]) -> str:
    """BGE's query instruction for a model's language: by its name (-zh, -en), else by the questions' characters."""
    for language, instruction in BGE_QUERY_INSTRUCTION.items():
        if f"-{language}" in name.lower():
            return instruction
    han = sum("一" <= char <= "鿿" for query in queries for char in query)
    return BGE_QUERY_INSTRUCTION["zh" if 4 * han > sum(map(len, queries)) else "en"]


def evaluate_encoder(
    encoder: Encoder, task: RetrievalTask, *, k: int = 100, cache: EmbeddingCache | None = None, **encoding: Any
) -> Ranking:
    """Rank the corpus for every question; every rank of a process group gets the result.

    Args:
        encoder: on the device to use.
        task: see `load_task`.
        k: depth of the ranking.
        cache: where vectors are kept; None: nowhere.
        encoding: query_prompt, passage_prompt, query_max_length, passage_max_length; the rest goes to `encode`.
    """
    query_prompt, passage_prompt = encoding.pop("query_prompt", ""), encoding.pop("passage_prompt", "")
    query_length, passage_length = encoding.pop("query_max_length"), encoding.pop("passage_max_length")
    vectors_by: Any = cache.vectors if cache else encode
    corpus_ND = vectors_by(
        encoder, task.corpus, prompt=passage_prompt, max_length=passage_length, description="corpus", **encoding
    )
    query_QD = vectors_by(
        encoder, task.queries, prompt=query_prompt, max_length=query_length, description="queries", **encoding
    )
    scores, rows = exact_search(query_QD, corpus_ND, min(k, len(task.corpus)))
    missing = [[1] * (total - len(found)) for total, found in zip(task.num_positives, task.relevant, strict=True)]
    return Ranking(scores, rows, per_query_metrics(rows, task.relevant, missing))
