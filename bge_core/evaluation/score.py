"""What evaluate.py computes: every encoder on every test set, or rankings that something else made."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bge_core import UserError
from bge_core.encoder.fingerprint import fingerprint
from bge_core.encoder.graphs import hold_passes
from bge_core.encoder.load import load_encoder, settings_of
from bge_core.encoder.prompts import choose_prompts
from bge_core.encoder.settings import EncoderSettings
from bge_core.evaluation.costs import COST_METRICS, Cost, measure_costs, refuse_costs
from bge_core.evaluation.evaluator import EvaluationResult, Model, Ranking, bge_instruction, rank, task_vectors
from bge_core.evaluation.metrics import DEFAULT_METRICS, parse_metric, per_query_metrics, search_depth
from bge_core.evaluation.tasks import RetrievalTask, make_unique
from bge_core.evaluation.trec import read_qrels, read_run, run_as_ranking, run_name
from bge_core.reports.model_card import read_model_card
from bge_core.runtime.config import EvaluateConfig
from bge_core.runtime.distributed import on_main
from bge_core.search.cache import EmbeddingCache


@dataclass(frozen=True)
class Scored:
    """What one model found on one test set, and how it was used. `costs` is empty where none was asked for."""

    task: RetrievalTask
    name: str
    model: Model
    ranking: Ranking
    costs: list[Cost]


def refuse_evaluation(config: EvaluateConfig) -> None:
    """UserError for what can be refused before anything is encoded: metrics' names, model cards, what folders state."""
    for name in config.metrics:
        parse_metric(name)
    for path in config.encoder if config.update_model_card else ():
        if not Path(path).is_dir():
            raise UserError(f"--update_model_card: {path} is no folder; evaluate a local copy of it")
        read_model_card(Path(path))
    for path in config.encoder:
        settings_of(path)


def score_encoders(
    config: EvaluateConfig,
    tasks: Sequence[RetrievalTask],
    *,
    device: Any,
    precision: str,
    cache: EmbeddingCache | None,
) -> Iterator[Scored]:
    """Yield each encoder's result on each test set; several ranks share the work, and each gets the results.

    Args:
        config: which encoders, lengths, instructions, metrics and costs.
        tasks: the test sets.
        device, precision: to encode with.
        cache: where vectors are kept; None: nowhere.
    """
    metrics = config.metrics or DEFAULT_METRICS
    wants_costs = bool(config.dims or config.dtypes or config.index_factories)
    for path, name in zip(config.encoder, unique_names(config.encoder), strict=True):
        encoder = load_encoder(
            path,
            pooling=config.sentence_pooling_method,
            trust_remote_code=config.trust_remote_code,
            attention=config.attention,
        ).to(device)
        if config.cuda_graphs:
            hold_passes(encoder, precision)
        refuse_costs(encoder.embedding_size, config.dims, config.dtypes, config.index_factories)
        known = fingerprint(encoder) if config.output_dir else None
        for task in tasks:
            query_prompt, passage_prompt = prompts(config, path, encoder.settings, task)
            query_QD, corpus_ND = task_vectors(
                encoder,
                task,
                cache=cache,
                batch_size=config.batch_size,
                max_tokens=config.max_tokens,
                precision=precision,
                query_prompt=query_prompt,
                passage_prompt=passage_prompt,
                query_max_len=config.query_max_len,
                passage_max_len=config.passage_max_len,
            )
            ranking = rank(query_QD, corpus_ND, task, k=config.k, metrics=metrics)
            measure = functools.partial(
                measure_costs,
                query_QD,
                corpus_ND,
                task,
                dims=config.dims,
                dtypes=config.dtypes or ["float32"],
                factories=config.index_factories,
                k=config.k,
                metrics=config.metrics or COST_METRICS,
                similarity=encoder.settings.scored_by,
            )
            costs = on_main(measure) if wants_costs else []
            settings = encoder.settings
            model = Model(path, known, settings.pooling, settings.scored_by, query_prompt, passage_prompt, precision)
            yield Scored(task, name, model, ranking, costs)


def results_of(
    scored: Sequence[Scored], tasks: Sequence[RetrievalTask], resamples: int, seed: int
) -> list[EvaluationResult]:
    """One for each test set, in order."""
    results = []
    for task in tasks:
        of_task = [one for one in scored if one.task is task]
        rankings, models = {one.name: one.ranking for one in of_task}, {one.name: one.model for one in of_task}
        costs = {one.name: one.costs for one in of_task if one.costs}
        results.append(EvaluationResult(task, rankings, resamples, seed, models, costs))
    return results


def macro_average(results: Sequence[EvaluationResult]) -> dict[str, dict[str, float]]:
    """{model: {metric: mean over the test sets}}, every set weighing the same."""
    of_sets = [result.metrics for result in results]
    return {
        name: {metric: float(np.mean([of[name][metric] for of in of_sets])) for metric in means}
        for name, means in of_sets[0].items()
    }


def score_runs(config: EvaluateConfig) -> tuple[list[str], dict[str, dict[str, np.ndarray]]]:
    """TREC runs against qrels: the questions' ids, and {run: {metric: (Q,)}}."""
    qrels, metrics = read_qrels(config.val_data[0]), config.metrics or DEFAULT_METRICS
    per_query = {}
    for path, name in zip(config.run, make_unique(map(run_name, config.run)), strict=True):
        _, ranked, relevant, missing = run_as_ranking(read_run(path), qrels)
        depth = search_depth(config.k, metrics, relevant, missing)
        per_query[name] = per_query_metrics([rows[:depth] for rows in ranked], relevant, missing, metrics)
    return list(qrels), per_query


def unique_names(paths: Sequence[str]) -> list[str]:
    """Each model's last folder name; of equal ones the later get a number."""
    return make_unique(Path(path).name or str(path) for path in paths)


def prompts(config: EvaluateConfig, path: str, stored: EncoderSettings, task: RetrievalTask) -> tuple[str, str]:
    """What stands before questions and passages.

    With --add_instruction: the model's stored prompts, else BGE's query instruction for its language. The flags that
    name a prompt or an instruction beat that; without any of them there is none.
    """
    chosen = config.query_prompt_name, config.passage_prompt_name
    if not config.add_instruction and chosen == (None, None):
        return config.query_instruction_for_retrieval or "", config.passage_instruction_for_retrieval or ""
    query, passage = choose_prompts(path, stored, config)
    if query is None and config.add_instruction and not stored.prompts:
        query = bge_instruction(path, task.queries)
    return query or "", passage or ""
