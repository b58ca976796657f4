"""The files that an evaluation leaves: figures of each question, rankings, comparisons, the report, the manifest."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from bge_core.evaluation.evaluator import EvaluationResult
from bge_core.evaluation.metrics import mean_metrics
from bge_core.evaluation.report import write_evaluation_report
from bge_core.evaluation.score import macro_average
from bge_core.evaluation.significance import Comparison
from bge_core.evaluation.tasks import corpora_of, describe_task
from bge_core.evaluation.trec import write_run
from bge_core.files import atomic
from bge_core.files.records import Row
from bge_core.runtime.cli import as_dict
from bge_core.runtime.config import EvaluateConfig
from bge_core.search.cache import EmbeddingCache

OWN_FILES = (
    "manifest.json", "metrics.json", "per_query.jsonl", "run.<model>.trec", "significance.json", "costs.json",
    "report.html", "report.md",
)  # fmt: skip


def write_results(config: EvaluateConfig, results: Sequence[EvaluationResult], cache: EmbeddingCache | None) -> None:
    """Write an evaluation's files into --output_dir, a folder in it for each of several test sets."""
    assert config.output_dir is not None
    folder = Path(config.output_dir)
    _clear(folder)
    for result in results:
        _write_result(folder / result.task.name if len(results) > 1 else folder, config, result)
    corpora = corpora_of(config.val_data, config.corpus)
    inputs: dict[str, Row] = {}
    for result, val_data, corpus in zip(results, config.val_data, corpora, strict=True):
        inputs |= {line["path"]: line for line in describe_task(result.task, val_data, corpus)}
    used = {of.task.name: {name: asdict(model) for name, model in of.models.items()} for of in results}
    kept = {"cache": {"encoded": cache.num_encoded, "reused": cache.num_reused}} if cache else {}
    manifest = atomic.make_manifest(
        "evaluate",
        as_dict(config),
        list(inputs.values()),
        encoders=used if len(results) > 1 else used[results[0].task.name],
        missing_positives=sum(len(result.task.missing_texts) for result in results),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **kept,
    )
    atomic.write_json(folder / "metrics.json", macro_average(results))
    atomic.write_json(folder / "manifest.json", manifest)


def _write_result(folder: Path, config: EvaluateConfig, result: EvaluationResult) -> None:
    task = result.task
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    for name, ranking in result.rankings.items():
        file, ids = folder / f"run.{name}.trec", (task.query_ids, task.corpus_ids)
        write_run(file, name, *ids, ranking.rows, ranking.scores, task.judged_ids)
    per_query = {name: ranking.per_query for name, ranking in result.rankings.items()}
    _write_per_query(folder, per_query, result.comparisons, task.query_ids, task.queries)
    if result.costs:
        costs = {name: [cost.row() for cost in of] for name, of in result.costs.items()}
        atomic.write_json(folder / "costs.json", costs)
    write_evaluation_report(folder, result, lang=config.lang, settings=as_dict(config))


def write_run_results(
    config: EvaluateConfig,
    query_ids: Sequence[str],
    per_query: Mapping[str, Mapping[str, np.ndarray]],
    comparisons: Sequence[Comparison],
) -> None:
    """Write the files of an evaluation of TREC runs into --output_dir: no ranking and no report."""
    assert config.output_dir is not None
    folder = Path(config.output_dir)
    _clear(folder)
    _write_per_query(folder, per_query, comparisons, query_ids)
    inputs = [atomic.describe_input(path, len(query_ids)) for path in (*config.val_data, *config.run)]
    atomic.write_json(folder / "manifest.json", atomic.make_manifest("evaluate", as_dict(config), inputs))


def _write_per_query(
    folder: Path,
    per_query: Mapping[str, Mapping[str, np.ndarray]],
    comparisons: Sequence[Comparison],
    query_ids: Sequence[str],
    queries: Sequence[str] | None = None,
) -> None:
    def lines() -> Iterator[Row]:
        for name, values in per_query.items():
            for i, query_id in enumerate(query_ids):
                text = {} if queries is None else {"query": queries[i]}
                figures = {metric: float(of[i]) for metric, of in values.items()}
                yield {"model": name, "query_id": query_id} | text | figures

    atomic.write_jsonl(folder / "per_query.jsonl", lines())
    atomic.write_json(folder / "significance.json", list(map(asdict, comparisons)))
    atomic.write_json(folder / "metrics.json", {name: mean_metrics(values) for name, values in per_query.items()})


def _clear(folder: Path) -> None:
    """Remove what an earlier evaluation left; its manifest first, which must not vouch for a mixture."""
    for pattern in OWN_FILES:
        for path in folder.glob(pattern.replace("<model>", "*")):
            path.unlink()
