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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bge_core import UserError
from bge_core.encoder.load import load_encoder
from bge_core.encoder.model import Encoder
from bge_core.evaluation.costs import COST_METRICS, measure_costs, refuse_costs
from bge_core.evaluation.evaluator import EvaluationResult, Ranking, bge_instruction, rank, task_vectors
from bge_core.evaluation.metrics import DEFAULT_METRICS, mean_metrics, parse_metric, per_query_metrics, search_depth
from bge_core.evaluation.report import write_evaluation_report
from bge_core.evaluation.significance import compare_to_baseline
from bge_core.evaluation.tasks import RetrievalTask, describe_task, load_tasks, make_unique
from bge_core.evaluation.trec import falling, read_qrels, read_run, run_as_ranking, run_name, without_space
from bge_core.files import atomic, records
from bge_core.reports.model_card import add_to_model_card, read_model_card
from bge_core.reports.tables import comparison_tables, text_table
from bge_core.runtime.cli import as_dict, run_stage
from bge_core.runtime.config import EvaluateConfig
from bge_core.runtime.distributed import world
from bge_core.runtime.launch import start
from bge_core.search.cache import EmbeddingCache, fingerprint

logger = logging.getLogger(__name__)
OWN_FILES = (
    "metrics.json", "per_query.jsonl", "run.<model>.trec", "significance.json", "costs.json", "report.html",
    "report.md", "manifest.json",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    return run_stage(EvaluateConfig, evaluate, argv)


def evaluate(config: EvaluateConfig) -> None:
    """Evaluate every encoder on every test set, print, and write the files if an output folder is given."""
    accelerator = start(config.fp16, config.bf16)
    is_main = world()[0] == 0
    if config.output_dir and is_main:
        atomic.refuse_foreign_folder(config.output_dir, config.overwrite_output_dir, OWN_FILES)
    if config.update_model_card and (absent := [name for name in config.encoder if not Path(name).is_dir()]):
        raise UserError(f"--update_model_card: {absent[0]} is no folder; evaluate a local copy of it")
    metrics = config.metrics or list(DEFAULT_METRICS)
    for name in metrics:
        parse_metric(name)
    if config.update_model_card:
        for path in config.encoder:
            read_model_card(Path(path) / "README.md")
    if config.run:
        return score_runs(config) if is_main else None
    tasks = load_tasks(config.val_data, config.corpus or None)
    for task in tasks:
        logger.info("%s: %d questions, %d passages", task.name, len(task.queries), len(task.corpus))

    cache = EmbeddingCache(config.embedding_cache_dir, config.cache_shard_size) if config.embedding_cache_dir else None
    rankings: dict[str, dict[str, Ranking]] = {task.name: {} for task in tasks}
    costs: dict[str, dict[str, list[Any]]] = {task.name: {} for task in tasks}
    used: dict[str, dict[str, Any]] = {task.name: {} for task in tasks}
    for path, name in zip(config.encoder, unique_names(config.encoder), strict=True):
        encoder = load_encoder(
            path,
            pooling=config.sentence_pooling_method,
            trust_remote_code=config.trust_remote_code,
            attention=config.attention,
        ).to(accelerator.device)
        refuse_costs(encoder.embedding_size, config.dims, config.dtypes, config.index_factories)
        for task in tasks:
            query_prompt, passage_prompt = prompts(config, path, encoder, task)
            used[task.name][name] = {
                "model": path,
                "fingerprint": fingerprint(encoder) if config.output_dir else None,
                "pooling": encoder.settings.pooling,
                "query_instruction": query_prompt,
                "passage_instruction": passage_prompt,
                "precision": accelerator.mixed_precision,
            }
            query_QD, corpus_ND = task_vectors(
                encoder,
                task,
                cache=cache,
                batch_size=config.batch_size,
                max_tokens=config.max_tokens,
                precision=accelerator.mixed_precision,
                query_prompt=query_prompt,
                passage_prompt=passage_prompt,
                query_max_length=config.query_max_len,
                passage_max_length=config.passage_max_len,
            )
            rankings[task.name][name] = found = rank(query_QD, corpus_ND, task, k=config.k, metrics=metrics)
            if not is_main:
                continue
            on_set = f" on {task.name}" if len(tasks) > 1 else ""
            print(f"# {name}{on_set} ({encoder.settings.pooling} pooling, query instruction {query_prompt!r})")
            print(found.means, flush=True)
            if config.dims or config.dtypes or config.index_factories:
                costs[task.name][name] = measure_costs(
                    query_QD,
                    corpus_ND,
                    task,
                    dims=config.dims,
                    dtypes=config.dtypes or ["float32"],
                    factories=config.index_factories,
                    k=config.k,
                    metrics=config.metrics or COST_METRICS,
                )
                print(cost_table(costs[task.name][name]))
    if not is_main:
        return
    results = {task.name: EvaluationResult(task, rankings[task.name], config.resamples, config.seed) for task in tasks}
    for name, result in results.items():
        if len(config.encoder) > 1:
            print(
                "\n" + (f"{name}\n" if len(tasks) > 1 else "") + comparison_tables(result.metrics, result.comparisons)
            )
    averages = macro_average([result.metrics for result in results.values()])
    if len(tasks) > 1:
        print("\n" + f"mean of {len(tasks)} test sets")
        for name, means in averages.items():
            print(f"# {name}\n{means}")
    if config.output_dir:
        kept = {"cache": {"encoded": cache.num_encoded, "reused": cache.num_reused}} if cache else {}
        folder = Path(config.output_dir)
        clear(folder)
        for name, result in results.items():
            write_results(folder / name if len(tasks) > 1 else folder, config, result, costs[name], used[name])
        corpora = config.corpus * (len(tasks) if len(config.corpus) == 1 else 1) or [""] * len(tasks)
        described = [
            describe_task(task, val_data, corpus or None)
            for task, val_data, corpus in zip(tasks, config.val_data, corpora, strict=True)
        ]
        inputs = list({line["path"]: line for lines in described for line in lines}.values())
        manifest = atomic.make_manifest(
            "evaluate",
            as_dict(config),
            inputs,
            encoders=used if len(tasks) > 1 else used[tasks[0].name],
            missing_positives=sum(len(task.missing_texts) for task in tasks),
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            **kept,
        )
        atomic.write_json(folder / "metrics.json", averages)
        atomic.write_json(folder / "manifest.json", manifest)
        print(
            f"written: {folder}" + (f", look at {folder}/report.html" if len(tasks) == 1 else ", a report for each set")
        )
    if config.update_model_card:
        for path, name in zip(config.encoder, unique_names(config.encoder), strict=True):
            add_to_model_card(Path(path), name, list(results.values()))


def macro_average(of_sets: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """{model: {metric: mean over the test sets}}, every set weighing the same."""
    first = of_sets[0]
    return {
        name: {metric: float(np.mean([of[name][metric] for of in of_sets])) for metric in first[name]} for name in first
    }


def clear(folder: Path) -> None:
    """Remove what an earlier evaluation left; its manifest first, which must not vouch for a mixture."""
    for pattern in ("manifest.json", *OWN_FILES):
        for path in folder.glob(pattern.replace("<model>", "*")):
            if path.is_file():
                path.unlink()


def score_runs(config: EvaluateConfig) -> None:
    """Rankings that something else made, against qrels: metrics, comparisons and a manifest, no report."""
    qrels = read_qrels(config.val_data[0])
    names = make_unique(map(run_name, config.run))
    per_query, query_ids = {}, list[str]()
    for path, name in zip(config.run, names, strict=True):
        query_ids, ranked, relevant, missing = run_as_ranking(read_run(path), qrels)
        metrics = config.metrics or DEFAULT_METRICS
        depth = search_depth(config.k, metrics, relevant, missing)
        per_query[name] = per_query_metrics([rows[:depth] for rows in ranked], relevant, missing, metrics)
        print(f"# {name}\n{mean_metrics(per_query[name])}", flush=True)
    means = {name: mean_metrics(values) for name, values in per_query.items()}
    lines = compare_to_baseline(per_query, names[0], resamples=config.resamples, seed=config.seed)
    if len(names) > 1:
        print("\n" + comparison_tables(means, lines))
    if config.output_dir:
        folder = Path(config.output_dir)
        clear(folder)
        atomic.write_jsonl(folder / "per_query.jsonl", per_query_lines(query_ids, None, per_query))
        atomic.write_json(folder / "significance.json", lines)
        atomic.write_json(folder / "metrics.json", means)
        inputs = [atomic.describe_input(path, len(query_ids)) for path in (*config.val_data, *config.run)]
        atomic.write_json(folder / "manifest.json", atomic.make_manifest("evaluate", as_dict(config), inputs))
        print(f"written: {folder}")


def unique_names(paths: Sequence[str]) -> list[str]:
    """Each model's last folder name; of equal ones the later get a number."""
    return make_unique(Path(path).name or str(path) for path in paths)


def prompts(config: EvaluateConfig, path: str, encoder: Encoder, task: RetrievalTask) -> tuple[str, str]:
    """What stands before questions and passages.

    With --add_instruction: the model's stored prompts, else BGE's query instruction for its language. The flags that
    name an instruction beat that; without either there is none.
    """
    query, passage = "", ""
    if config.add_instruction:
        stored = encoder.settings
        query = stored.query_prompt if stored.query_prompt is not None else bge_instruction(path, task.queries)
        passage = stored.passage_prompt or ""
    if config.query_instruction_for_retrieval is not None:
        query = config.query_instruction_for_retrieval
    if config.passage_instruction_for_retrieval is not None:
        passage = config.passage_instruction_for_retrieval
    return query, passage


def cost_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """What smaller vectors cost, for a terminal."""
    forms = {"dimension": "d", "bytes_per_passage": ",.1f", "queries_per_second": ",.0f"}
    return text_table(
        [name.replace("_", " ") for name in lines[0]],
        [
            [value if isinstance(value, str) else f"{value:{forms.get(name, '.4f')}}" for name, value in line.items()]
            for line in lines
        ],
    )


def per_query_lines(
    query_ids: Sequence[str], queries: Sequence[str] | None, per_query: Mapping[str, Mapping[str, np.ndarray]]
) -> Iterator[records.Row]:
    """The lines of per_query.jsonl."""
    for name, values in per_query.items():
        for i, query_id in enumerate(query_ids):
            text = {} if queries is None else {"query": queries[i]}
            yield {"model": name, "query_id": query_id} | text | {metric: float(of[i]) for metric, of in values.items()}


def write_results(
    folder: Path, config: EvaluateConfig, result: EvaluationResult, costs: dict[str, list[Any]], used: dict[str, Any]
) -> None:
    """A test set's per_query.jsonl, significance.json, costs.json, one TREC run a model, plots and report.html."""
    task = result.task
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    for name, ranking in result.rankings.items():
        with (
            atomic.atomic_path(folder / f"run.{name}.trec") as temporary,
            open(temporary, "w", encoding="utf-8") as file,
        ):
            for query_id, rows, scores in zip(task.query_ids, ranking.rows, ranking.scores, strict=True):
                for place, (row, score) in enumerate(zip(rows, falling(scores), strict=True), start=1):
                    if row >= 0:
                        columns = (query_id, "Q0", task.corpus_ids[row], str(place), f"{score:.9g}", name)
                        file.write(" ".join(map(without_space, columns)) + "\n")
    per_query = {name: ranking.per_query for name, ranking in result.rankings.items()}
    atomic.write_jsonl(folder / "per_query.jsonl", per_query_lines(task.query_ids, task.queries, per_query))
    atomic.write_json(folder / "significance.json", result.comparisons)
    if costs:
        atomic.write_json(folder / "costs.json", costs)
    atomic.write_json(folder / "metrics.json", result.metrics)
    write_evaluation_report(
        folder,
        result,
        lang=config.lang,
        costs=costs,
        settings=as_dict(config),
        models=used,
    )


if __name__ == "__main__":
    sys.exit(main())
