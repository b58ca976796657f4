"""Evaluate encoders: encode, search exactly, score."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from bge_core.cache import EmbeddingCache
from bge_core.encode import encode
from bge_core.metrics import mean_metrics, per_query_metrics
from bge_core.model import Encoder
from bge_core.search import exact_search
from bge_core.tasks import RetrievalTask

BGE_QUERY_INSTRUCTION = {
    "zh": "为这个句子生成表示以用于检索相关文章：",
    "en": "Represent this sentence for searching relevant passages: ",
}


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
        task: see `tasks.load_task`.
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
    right = [[row for row, grade in grades.items() if grade > 0] for grades in task.relevant]
    num_right = [len(found) + len(lacking) for found, lacking in zip(right, task.missing, strict=True)]
    return Ranking(scores, rows, per_query_metrics(rows, right, num_right))
