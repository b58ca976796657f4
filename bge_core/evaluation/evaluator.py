"""Evaluate encoders: encode, search exactly, score each question, compare.

    task = load_task("test.jsonl", "corpus.jsonl")
    result = evaluate({"base": "BAAI/bge-large-zh-v1.5", "mine": "outputs/model"}, task, cache_dir="cache")
    result.metrics["mine"]["MRR@10"]; result.table(); result.comparisons
    evaluate({"an API": (query_vectors, corpus_vectors)}, task)      # in the order of task.queries and task.corpus

A positive is found by its text, as FlagEmbedding does. Shapes: Q questions, N passages, k depth, D embedding size.
"""

import functools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bge_core import UserError
from bge_core.encoder.encode import encode_for_search
from bge_core.encoder.load import load_encoder
from bge_core.encoder.model import Encoder
from bge_core.encoder.prompts import choose_prompts
from bge_core.evaluation.costs import Cost
from bge_core.evaluation.metrics import DEFAULT_METRICS, mean_metrics, per_query_metrics, search_depth
from bge_core.evaluation.significance import Comparison, Threshold, bootstrap_means, compare_to_baseline, thresholds
from bge_core.evaluation.tasks import Paths, RetrievalTask, load_task
from bge_core.search.cache import EmbeddingCache
from bge_core.search.exact import score_pairs, search_in_shares

logger = logging.getLogger(__name__)

BGE_QUERY_INSTRUCTION = {
    "zh": "为这个句子生成表示以用于检索相关文章：",
    "en": "Represent this sentence for searching relevant passages: ",
}


@dataclass(frozen=True)
class Ranking:
    """What one model found.

    Args:
        scores, rows: (Q, k), best first; rows of the corpus, -1 where it has no more.
        per_query: each metric, (Q,) float64.
        positive_score: (Q,) float32, the highest score of a question's positives; NaN: the corpus has none.
        negative_score: (Q,) float32, the highest score of what is no positive, within the depth; NaN: none there.
    """

    scores: np.ndarray
    rows: np.ndarray
    per_query: dict[str, np.ndarray]
    positive_score: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    negative_score: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))

    @property
    def means(self) -> dict[str, float]:
        """Each metric's mean over the questions."""
        return mean_metrics(self.per_query)

    def first_positive(self, task: RetrievalTask) -> np.ndarray:
        """(Q,) int64: the rank, from 1, of the first positive; 0: not within the depth."""
        right = is_positive(self.rows, task)
        return np.where(right.any(axis=1), right.argmax(axis=1) + 1, 0)


@dataclass(frozen=True)
class Model:
    """How a model was used: its folder or hub name, the hash of its weights, pooling, instructions, precision.

    `similarity` is how it was scored: by cosine, or by dot, the inner product of vectors of any length.
    """

    model: str
    fingerprint: str | None
    pooling: str | None
    similarity: str
    query_instruction: str
    passage_instruction: str
    precision: str


@dataclass(frozen=True)
class EvaluationResult:
    """What several models found on one test set; the first model is what the others are compared with.

    Args:
        task: the test set.
        rankings: of each model, by its name.
        resamples, seed: of intervals and tests.
        models: how they were used, as far as it is known.
        costs: what smaller vectors cost, of the models for which it was measured.
    """

    task: RetrievalTask
    rankings: dict[str, Ranking]
    resamples: int = 10_000
    seed: int = 0
    models: dict[str, Model] = field(default_factory=dict)
    costs: dict[str, list[Cost]] = field(default_factory=dict)

    @property
    def similarities(self) -> dict[str, str]:
        """{model: how it was scored}, where not all were scored alike, so that their scores have no common scale."""
        found = {name: model.similarity for name, model in self.models.items()}
        return found if len(set(found.values())) > 1 else {}

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """{model: {metric: mean}}."""
        return {name: ranking.means for name, ranking in self.rankings.items()}

    @functools.cached_property
    def intervals(self) -> dict[str, dict[str, tuple[float, float]]]:
        """{model: {metric: 95 % interval}}, by the bootstrap over questions."""
        found = {}
        for name, ranking in self.rankings.items():
            values = np.stack(list(ranking.per_query.values()), axis=1)
            _, low, high = bootstrap_means(values, self.resamples, self.seed)
            found[name] = dict(zip(ranking.per_query, zip(low.tolist(), high.tolist(), strict=True), strict=True))
        return found

    @functools.cached_property
    def comparisons(self) -> list[Comparison]:
        """`significance.compare_to_baseline` of every other model and metric."""
        per_query = {name: ranking.per_query for name, ranking in self.rankings.items()}
        return compare_to_baseline(per_query, next(iter(per_query)), resamples=self.resamples, seed=self.seed)

    @functools.cached_property
    def thresholds(self) -> dict[str, list[Threshold]]:
        """{model: `significance.thresholds`} of each question's best positive against its best negative."""
        found = {}
        for name, ranking in self.rankings.items():
            positive, negative = ranking.positive_score, ranking.negative_score
            positive, negative = positive[np.isfinite(positive)], negative[np.isfinite(negative)]
            found[name] = thresholds(positive, negative, seed=self.seed) if len(positive) and len(negative) else []
        return found

    def table(self) -> Any:
        """A pandas DataFrame: a row for each model and metric with value, low, high, and the difference if any."""
        import pandas

        rows = []
        compared = {(line.model, line.metric): asdict(line) for line in self.comparisons}
        for name, ranking in self.rankings.items():
            for metric, value in ranking.means.items():
                low, high = self.intervals[name][metric]
                rows.append({"model": name, "metric": metric, "value": value, "low": low, "high": high})
                if line := compared.get((name, metric)):
                    rows[-1] |= {key: line[key] for key in ("difference", "p_value", "p_adjusted")}
        return pandas.DataFrame(rows)


def evaluate(
    models: Any,
    data: RetrievalTask | str | Path,
    corpus: Paths | None = None,
    *,
    k: int = 100,
    metrics: Sequence[str] = DEFAULT_METRICS,
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
    query_max_len: int = 64,
    passage_max_len: int = 512,
    cache_dir: str | Path | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    **encoding: Any,
) -> EvaluationResult:
    """Score models, or vectors from anywhere, on one test set.

    Args:
        models: a model, or {name: model}. A model is a folder or hub name, an Encoder on its device, or the vectors
            (queries (Q, D), corpus (N, D)) in the order of `task.queries` and `task.corpus`, float32 or float16.
        data, corpus: a task, or what `load_task` reads.
        k: depth of the ranking; a metric that needs a deeper one gets it.
        metrics: names as in `per_query_metrics`.
        query_prompt, passage_prompt: None: what the model's folder states, else nothing.
        query_max_len, passage_max_len: in tokens.
        cache_dir: where vectors are kept; None: nowhere.
        resamples, seed: of intervals and tests.
        encoding: precision, batch_size, max_tokens for `encode`.

    Raises:
        UserError: bad data, no model, vectors of another number, with NaN, or of two sizes.
    """
    task = data if isinstance(data, RetrievalTask) else load_task(data, corpus)
    named = (
        models if isinstance(models, Mapping) else {Path(models).name if isinstance(models, str) else "model": models}
    )
    cache = EmbeddingCache(str(cache_dir)) if cache_dir else None
    rankings = {}
    for name, model in named.items():
        if isinstance(model, tuple):
            rankings[name] = rank(model[0], model[1], task, k=k, metrics=metrics)
            continue
        encoder = model if isinstance(model, Encoder) else load_encoder(str(model)).to(_device())
        stored = encoder.settings
        if query_prompt is None:
            choose_prompts(name, stored)  # refuses to guess
        rankings[name] = evaluate_encoder(
            encoder,
            task,
            k=k,
            cache=cache,
            metrics=metrics,
            query_prompt=query_prompt if query_prompt is not None else stored.query_prompt or "",
            passage_prompt=passage_prompt if passage_prompt is not None else stored.passage_prompt or "",
            query_max_len=query_max_len,
            passage_max_len=passage_max_len,
            **encoding,
        )
    return EvaluationResult(task, rankings, resamples, seed)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def bge_instruction(name: str, queries: list[str]) -> str:
    """BGE's query instruction for a model's language: by its name (-zh, -en), else by the questions' characters."""
    for language, instruction in BGE_QUERY_INSTRUCTION.items():
        if re.search(f"-{language}(?![a-z])", Path(name).name.lower()):
            return instruction
    han = sum("一" <= char <= "鿿" for query in queries for char in query)
    return BGE_QUERY_INSTRUCTION["zh" if 4 * han > sum(map(len, queries)) else "en"]


def task_vectors(encoder: Encoder, task: RetrievalTask, *, cache: EmbeddingCache | None = None, **encoding: Any) -> Any:
    """What is searched: vectors of the questions (Q, D) and passages (N, D), on every process; arrays or cache views.

    A question's own prompt replaces `query_prompt`.

    Args:
        encoder: on the device to use.
        task: see `load_task`.
        cache: where vectors are kept; None: nowhere.
        encoding: query_prompt, passage_prompt, query_max_len, passage_max_len; the rest goes to `encode_for_search`.
    """
    prompt, query_max_len = encoding.pop("query_prompt", ""), encoding.pop("query_max_len")
    passage = {"prompt": encoding.pop("passage_prompt", ""), "max_length": encoding.pop("passage_max_len")}
    vectors_by: Any = cache.vectors if cache else encode_for_search
    corpus_ND = vectors_by(encoder, task.corpus, description="corpus", **passage, **encoding)
    options = {"description": "queries", "max_length": query_max_len} | encoding
    if not task.query_prompts:
        return vectors_by(encoder, task.queries, prompt=prompt, **options), corpus_ND
    prompts = np.array([prompt if own is None else own for own in task.query_prompts], dtype=object)
    query_QD = np.empty((len(prompts), corpus_ND.shape[1]), corpus_ND.dtype)
    for one in dict.fromkeys(prompts):
        places = np.flatnonzero(prompts == one)
        query_QD[places] = vectors_by(encoder, [task.queries[i] for i in places], prompt=one, **options)
    return query_QD, corpus_ND


def evaluate_encoder(
    encoder: Encoder, task: RetrievalTask, *, k: int = 100, metrics: Sequence[str] = DEFAULT_METRICS, **encoding: Any
) -> Ranking:
    """Rank the corpus for every question; every process of a group gets the result.

    Args:
        encoder, task, encoding: as in `task_vectors`.
        k: depth of the ranking.
        metrics: names as in `per_query_metrics`.
    """
    query_QD, corpus_ND = task_vectors(encoder, task, **encoding)
    return rank(query_QD, corpus_ND, task, k=k, metrics=metrics)


def rank(
    query_QD: Any, corpus_ND: Any, task: RetrievalTask, *, k: int = 100, metrics: Sequence[str] = DEFAULT_METRICS
) -> Ranking:
    """The exact ranking by inner product, and its scores; every process of a group calls it and gets both.

    Raises:
        UserError: not as many vectors as texts, or of two sizes; NaN.
    """
    for what, vectors, texts in (("questions", query_QD, task.queries), ("passages", corpus_ND, task.corpus)):
        if len(vectors.shape) != 2 or len(vectors) != len(texts):
            raise UserError(
                f"vectors of the {what}: {tuple(vectors.shape)}; give one row for each of {len(texts)}, in their order"
            )
    if query_QD.shape[1] != corpus_ND.shape[1]:
        raise UserError(
            f"questions have {query_QD.shape[1]} dimensions and passages {corpus_ND.shape[1]}: of two models?"
        )
    k = search_depth(k, metrics, task.relevant, task.missing)
    scores, rows = task.drop_own(*search_in_shares(query_QD, corpus_ND, task.depth(k)))
    positives = [[row for row, grade in relevant.items() if grade > 0] for relevant in task.relevant]
    positive_score = np.full(len(rows), np.nan, dtype=np.float32)
    for i, own in enumerate(positives):
        if own:
            positive_score[i] = score_pairs(query_QD[i : i + 1], corpus_ND, np.array([own])).max()
    wrong = ~is_positive(rows, task) & (rows >= 0)
    first = wrong.argmax(axis=1)[:, None]
    negative_score = np.where(wrong.any(axis=1), np.take_along_axis(scores, first, axis=1)[:, 0], np.nan)
    per_query = per_query_metrics(rows, task.relevant, task.missing, metrics)
    return Ranking(scores, rows, per_query, positive_score, negative_score.astype(np.float32))


def is_positive(rows: np.ndarray, task: RetrievalTask) -> np.ndarray:
    """(Q, k) bool: which of the rows (Q, k) are a positive of their question."""
    own = [[row for row, grade in relevant.items() if grade > 0] for relevant in task.relevant]
    return np.stack([np.isin(found, right) for found, right in zip(rows, own, strict=True)])
