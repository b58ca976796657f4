#!/usr/bin/env python3
"""Score one or several encoders on questions with known answers, and say how sure the difference is.

    python evaluate.py --encoder BASE FINETUNED --val_data test.jsonl --corpus corpus.jsonl --add_instruction --k 100
    python evaluate.py --encoder MODEL --val_data path/to/scifact path/to/test.jsonl        BEIR folders, several sets
    python evaluate.py --run bm25.trec dense.trec --val_data qrels.txt                      runs made elsewhere

Prints one dict a model on stdout and, for several, a table with the differences to the first, their intervals and
tests. With --output_dir a report, plots, rankings and all figures are written.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until all below is imported (`run_stage`): a third of the start would be spent on collecting nothing

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from bge_core.evaluation.metrics import mean_metrics
from bge_core.evaluation.results import OWN_FILES, write_results, write_run_results
from bge_core.evaluation.score import Scored, macro_average, refuse_evaluation, results_of, score_encoders, score_runs
from bge_core.evaluation.significance import compare_to_baseline
from bge_core.evaluation.tables import (
    SCORED_DIFFERENTLY,
    comparison_tables,
    cost_table,
    model_card_section,
    scored_by,
)
from bge_core.evaluation.tasks import RetrievalTask, load_tasks
from bge_core.files.atomic import refuse_foreign_folder
from bge_core.reports.model_card import add_to_model_card
from bge_core.runtime.cli import run_stage
from bge_core.runtime.config import EvaluateConfig
from bge_core.runtime.distributed import on_main, world
from bge_core.runtime.launch import start
from bge_core.search.cache import EmbeddingCache

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    return run_stage(EvaluateConfig, evaluate, argv)


def evaluate(config: EvaluateConfig) -> None:
    """Evaluate every encoder on every test set, print, and write the files if an output folder is given."""
    accelerator = start(config.fp16, config.bf16)
    is_main = world()[0] == 0
    if folder := config.output_dir:
        on_main(lambda: refuse_foreign_folder(folder, config.overwrite_output_dir, OWN_FILES))
    refuse_evaluation(config)
    if config.run:
        return on_main(lambda: evaluate_runs(config))
    tasks = load_tasks(config.val_data, config.corpus or None)
    for task in tasks:
        logger.info("%s: %d questions, %d passages", task.name, len(task.queries), len(task.corpus))
    cache = EmbeddingCache(config.embedding_cache_dir, config.cache_shard_size) if config.embedding_cache_dir else None
    device, precision = accelerator.device, accelerator.mixed_precision

    scored = []
    for found in score_encoders(config, tasks, device=device, precision=precision, cache=cache):
        scored.append(found)
        if is_main:
            on_set = f" on {found.task.name}" if len(tasks) > 1 else ""
            scoring = "" if found.model.similarity == "cosine" else f"{found.model.similarity} scores, "
            how = f"{found.model.pooling} pooling, {scoring}query instruction {found.model.query_instruction!r}"
            print(f"# {found.name}{on_set} ({how})\n{found.ranking.means}", flush=True)
            if found.costs:
                print(cost_table(found.costs))
    on_main(lambda: report(config, tasks, scored, cache))


def report(
    config: EvaluateConfig, tasks: Sequence[RetrievalTask], scored: Sequence[Scored], cache: EmbeddingCache | None
) -> None:
    """Compare the models, print, and write what was asked for."""
    results = results_of(scored, tasks, config.resamples, config.seed)
    for result in results if len(config.encoder) > 1 else ():
        title = f"{result.task.name}\n" if len(tasks) > 1 else ""
        print(f"\n{title}{comparison_tables(result.metrics, result.comparisons)}")
        if result.similarities:
            print(f"\n{SCORED_DIFFERENTLY}: {scored_by(result)}")
    if len(tasks) > 1:
        print(f"\nmean of {len(tasks)} test sets")
        for name, means in macro_average(results).items():
            print(f"# {name}\n{means}")
    if config.output_dir:
        write_results(config, results, cache)
        where = f"look at {config.output_dir}/report.html" if len(tasks) == 1 else "a report for each set"
        print(f"written: {config.output_dir}, {where}")
    if config.update_model_card:
        for path, name in zip(config.encoder, results[0].rankings, strict=True):
            add_to_model_card(Path(path), model_card_section(name, results))


def evaluate_runs(config: EvaluateConfig) -> None:
    """Score rankings that something else made against qrels: print, and write figures but no report."""
    query_ids, per_query = score_runs(config)
    metrics = {name: mean_metrics(values) for name, values in per_query.items()}
    for name, means in metrics.items():
        print(f"# {name}\n{means}")
    comparisons = compare_to_baseline(per_query, next(iter(per_query)), config.resamples, config.seed)
    if comparisons:
        print(f"\n{comparison_tables(metrics, comparisons)}")
    if config.output_dir:
        write_run_results(config, query_ids, per_query, comparisons)
        print(f"written: {config.output_dir}")


if __name__ == "__main__":
    sys.exit(main())
