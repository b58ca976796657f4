#!/usr/bin/env python3
"""Score one or several encoders on questions with known answers: MRR, Recall and nDCG by exact search.

    python evaluate.py --encoder MODEL [MODEL ...] --val_data test.jsonl --corpus corpus.jsonl --add_instruction --k 100

Prints one dict a model on stdout and, for several, a table with the differences to the first.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until all below is imported (`run_stage`): a third of the start would be spent on collecting nothing

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bge_core import records
from bge_core.cache import EmbeddingCache
from bge_core.cli import as_dict, run_stage
from bge_core.config import EvaluateConfig
from bge_core.distributed import world
from bge_core.evaluation import Ranking, bge_instruction, evaluate_encoder
from bge_core.launch import start
from bge_core.model import Encoder, load_encoder
from bge_core.report import compare_models
from bge_core.tasks import RetrievalTask, describe_task, load_task, make_unique

logger = logging.getLogger(__name__)
OWN_FILES = ("metrics.json", "per_query.jsonl", "run.<model>.trec", "manifest.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    return run_stage(EvaluateConfig, evaluate, argv)


def evaluate(config: EvaluateConfig) -> None:
    """Evaluate every encoder, print, and write the files if an output folder is given."""
    accelerator = start(config.fp16, config.bf16)
    is_main = world()[0] == 0
    if config.output_dir and is_main:
        records.refuse_foreign_folder(config.output_dir, config.overwrite_output_dir, OWN_FILES)
    task = load_task(config.val_data, config.corpus)
    logger.info("%d questions, %d passages", len(task.queries), len(task.corpus))

    cache = EmbeddingCache(config.cache_dir, config.cache_shard_size) if config.cache_dir else None
    rankings: dict[str, Ranking] = {}
    used: dict[str, Any] = {}
    for path, name in zip(config.encoder, unique_names(config.encoder), strict=True):
        encoder = load_encoder(
            path, pooling=config.pooling_method, trust_remote_code=config.trust_remote_code, attention=config.attention,
        ).to(accelerator.device)  # fmt: skip
        query_prompt, passage_prompt = prompts(config, path, encoder, task)
        used[name] = {
            "model": path, "pooling": encoder.settings.pooling, "query_instruction": query_prompt,
            "passage_instruction": passage_prompt, "precision": accelerator.mixed_precision,
        }  # fmt: skip
        rankings[name] = evaluate_encoder(
            encoder, task, k=config.k, cache=cache, batch_size=config.batch_size, max_tokens=config.max_tokens,
            precision=accelerator.mixed_precision,
            query_prompt=query_prompt, passage_prompt=passage_prompt,
            query_max_length=config.max_query_length, passage_max_length=config.max_passage_length,
        )  # fmt: skip
        if is_main:
            print(f"# {name} ({encoder.settings.pooling} pooling, query instruction {query_prompt!r})")
            print(rankings[name].means, flush=True)
    if not is_main:
        return
    if len(rankings) > 1:
        print("\n" + compare_models({name: ranking.means for name, ranking in rankings.items()}))
    if config.output_dir:
        kept = {"cache": {"encoded": cache.num_encoded, "reused": cache.num_reused}} if cache else {}
        write_results(Path(config.output_dir), config, task, rankings, used, **kept)
        print(f"written: {config.output_dir}")


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


def falling(scores: np.ndarray) -> np.ndarray:
    """The scores, each a last bit below the one before where they tie: trec_eval would order ties by id."""
    fallen = scores.astype(np.float32)
    for i in range(1, len(fallen)):
        fallen[i] = min(fallen[i], np.nextafter(fallen[i - 1], np.float32(-np.inf)))
    return fallen


def write_results(
    folder: Path, config: EvaluateConfig, task: RetrievalTask, rankings: dict[str, Ranking], used: dict[str, Any],
    **more: Any,
) -> None:  # fmt: skip
    """metrics.json, per_query.jsonl, one TREC run a model and, last, manifest.json."""
    for name, ranking in rankings.items():
        with (
            records.atomic_path(folder / f"run.{name}.trec") as temporary,
            open(temporary, "w", encoding="utf-8") as file,
        ):
            for query_id, rows, scores in zip(task.query_ids, ranking.rows, ranking.scores, strict=True):
                for rank, (row, score) in enumerate(zip(rows, falling(scores), strict=True), start=1):
                    columns = (query_id, "Q0", task.corpus_ids[row], str(rank), f"{score:.9g}", name)
                    file.write(" ".join("_".join(column.split()) for column in columns) + "\n")
    records.write_jsonl(
        folder / "per_query.jsonl",
        (
            {"model": name, "query_id": query_id, "query": query}
            | {metric: float(values[i]) for metric, values in ranking.per_query.items()}
            for name, ranking in rankings.items()
            for i, (query_id, query) in enumerate(zip(task.query_ids, task.queries, strict=True))
        ),
    )
    records.write_json(folder / "metrics.json", {name: ranking.means for name, ranking in rankings.items()})
    inputs = describe_task(task, config.val_data, config.corpus)
    manifest = records.make_manifest(
        "evaluate", as_dict(config), inputs, encoders=used, missing_positives=len(task.missing_texts),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", **more,
    )  # fmt: skip
    records.write_json(folder / "manifest.json", manifest)


if __name__ == "__main__":
    sys.exit(main())
