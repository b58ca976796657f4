"""Stage 4, merge: several checkpoints -> one model folder.

    python merge.py --models BAAI/bge-large-zh-v1.5 outputs/model --weights 0.5 0.5 --output_path outputs/merged
    python merge.py --models A B --method ties --base_model BASE --output_path outputs/merged
    python merge.py --models BASE FINETUNED --sweep 0:1:0.1 --val_data V --general_data G --output_path outputs/merged
    python merge.py --models outputs/run/checkpoint-* --method greedy_soup --val_data V --output_path outputs/soup

Without --weights they are equal; with --example_data they follow from each model's loss on those rows. The methods:
bge_core/merging/methods.py.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until all below is imported (`run_stage`): a third of the start would be spent on collecting nothing

import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bge_core import UserError
from bge_core.encoder.load import load_encoder
from bge_core.encoder.settings import read_settings
from bge_core.evaluation.evaluator import evaluate_encoder
from bge_core.evaluation.metrics import parse_metric
from bge_core.evaluation.tasks import RetrievalTask, describe_task, load_task
from bge_core.files import atomic, records
from bge_core.merging.checkpoints import merged_settings, open_model_folders
from bge_core.merging.folders import merge_folders, refuse_output
from bge_core.merging.lm_cocktail import example_losses, weights_from_losses
from bge_core.merging.methods import check_arguments, greedy_soup
from bge_core.merging.sweep import parse_sweep, plot_sweep, sweep, sweep_rows
from bge_core.reports.model_card import write_model_card
from bge_core.reports.tables import text_table
from bge_core.runtime.cli import as_dict, changed_fields, run_stage
from bge_core.runtime.config import MergeConfig
from bge_core.runtime.launch import resolve_precision
from bge_core.search.cache import EmbeddingCache

METRIC = "MRR@10"
SWEEP_FILES = ("sweep.json", "sweep.png", "sweep_scores.json")


def merge(config: MergeConfig) -> None:
    """Run the stage; prints each model's weight, where the result lies and the next command.

    Raises:
        UserError: weights that do not fit, models that cannot be merged, an output folder not ours.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("merge.py is one process, and its copies would be in each other's way: start it with python")
    if config.fp16:
        config.fp16 = resolve_precision(True, False, cuda=torch.cuda.is_available()) == "fp16"
    if config.weights and config.example_data:
        raise UserError("--weights: cannot go with --example_data, which computes them: choose one")
    parse_metric(config.metric or METRIC)
    check_arguments(config.method, len(config.models), config.base_model, config.density)
    read_too = [config.base_model] if config.base_model else []
    refuse_output(config.output_path, [*config.models, *read_too], config.overwrite_output_dir)
    hub: dict[str, Any] = {"cache_dir": config.cache_dir, "trust_remote_code": config.trust_remote_code}
    models, facts, inputs = config.models, dict[str, Any](), list[records.Row]()
    if config.method == "greedy_soup":
        models, facts, inputs = choose_soup(config, hub)
    weights = config.weights or [1 / len(models)] * len(models)
    if config.sweep:
        weights, facts, inputs = sweep_weights(config, hub)
    if config.example_data:
        examples = records.read_rows(config.example_data, records.check_training_row)
        inputs = [atomic.describe_input(config.example_data, len(examples))]
        losses = example_losses(
            models,
            examples,
            batch_size=config.batch_size,
            max_input_length=config.max_input_length,
            neg_number=config.neg_number,
            seed=config.seed,
            **hub,
        )
        weights = weights_from_losses(losses, config.temperature)
    manifest = merge_folders(
        models,
        weights,
        config.output_path,
        method="linear" if config.method == "greedy_soup" else config.method,
        base_model=config.base_model,
        density=config.density,
        dtype=config.dtype,
        overwrite=config.overwrite_output_dir,
        config=as_dict(config),
        inputs=inputs,
        facts=facts,
        **hub,
    )

    output = Path(config.output_path)
    for name in SWEEP_FILES:
        (output / name).unlink(missing_ok=True)  # of an earlier sweep, whose model is no longer there
    if config.sweep:
        atomic.write_json(output / "sweep.json", facts["sweep"])
        plot_sweep(facts["sweep"], output / "sweep.png")
        shutil.move(scores_file(output), output / SWEEP_FILES[2])  # which may be on another disk
        print(text_table(*sweep_rows(facts["sweep"])) + f"\n{facts['sweep']['rule']}\n")
    stored = read_settings(config.output_path)
    write_model_card(
        Path(config.output_path),
        title=Path(config.output_path).name,
        facts={
            "base model": config.base_model or models[0],
            "merged from": {name: f"{weight:.4f}" for name, weight in zip(models, weights, strict=True)},
            "method": config.method,
            "pooling": manifest["pooling"],
            "settings": changed_fields(config),
        },
        scores=None,
        prompt=stored.query_prompt or "",
    )
    for weight, name in zip(weights, models, strict=True):
        print(f"{weight:.4f}  {name}")
    print(f"model: {config.output_path}")
    encoders = shlex.join([*models, config.output_path])
    print(
        f"next: python evaluate.py --encoder {encoders} --val_data data/test.jsonl --corpus data/corpus.jsonl "
        "--add_instruction --output_dir outputs/report"
    )


def choose_soup(config: MergeConfig, hub: dict[str, Any]) -> tuple[list[str], records.Row, list[records.Row]]:
    """The models whose uniform average scores best by `greedy_soup`; prints what was tried.

    An average is written into a folder beside the output, scored, and removed.

    Returns:
        The models, what the manifest says of the trials, its input files.

    Raises:
        UserError: models that cannot be merged, evaluation data that cannot be read.
    """
    assert config.val_data is not None
    metric, task = config.metric or METRIC, load_task(config.val_data, config.corpus)
    pooling = merged_settings(open_model_folders(config.models, **hub)).pooling
    output = Path(config.output_path)

    def score(models: Sequence[str]) -> float:
        if len(models) == 1:
            return float(score_model(config, models[0], [task], pooling=pooling, **hub)[0].mean())
        with TemporaryDirectory(prefix=f".{output.name}.soup-", dir=output.parent) as folder:
            average = str(Path(folder, "average"))
            merge_folders(models, [1 / len(models)] * len(models), average, **hub)
            return float(score_model(config, average, [task], pooling=pooling, **hub)[0].mean())

    chosen, trials = greedy_soup(config.models, score)
    rows = [(" + ".join(str(i + 1) for i in t.members), f"{t.score:.4f}", "yes" if t.kept else "") for t in trials]
    print(text_table(("number", "model"), [(str(i), name) for i, name in enumerate(config.models, 1)], left=True))
    print("\n" + text_table(("average of", metric, "kept"), rows) + "\n")
    tried = [
        {"models": [config.models[i] for i in trial.members], "score": trial.score, "kept": trial.kept}
        for trial in trials
    ]
    inputs = describe_task(task, config.val_data, config.corpus)
    return [config.models[i] for i in chosen], {"method": "greedy_soup", "metric": metric, "tried": tried}, inputs


def sweep_weights(config: MergeConfig, hub: dict[str, Any]) -> tuple[list[float], records.Row, list[records.Row]]:
    """The two weights that `sweep` chooses, what the manifest says of it, its input files."""
    assert config.val_data is not None and config.sweep is not None
    weights, output = parse_sweep(config.sweep), Path(config.output_path)
    sets = {"domain": (config.val_data, config.corpus)}
    if config.general_data:
        sets["general"] = config.general_data, config.general_corpus
    tasks = {name: load_task(*of) for name, of in sets.items()}
    checkpoints = open_model_folders(config.models, **hub)
    pooling = merged_settings(checkpoints).pooling
    parts: list[Any] = [
        [task.queries, task.corpus, [sorted(of.items()) for of in task.relevant], task.missing, task.own_rows]
        for task in tasks.values()
    ]
    parts += [config.metric or METRIC, config.max_input_length, config.fp16, config.bf16]
    for one in checkpoints:
        parts += [*map(atomic.sha256, one.files), repr(one.settings), one.backbone.config.to_json_string()]
        parts += [one.tokenizer.backend_tokenizer.to_str()]
    key = hashlib.blake2b(json.dumps(parts, ensure_ascii=False).encode("utf-8", "replace"), digest_size=16).hexdigest()
    earlier, file = output / SWEEP_FILES[2], scores_file(output)
    if earlier.exists() and not file.exists():
        shutil.copy(earlier, file)

    found = sweep(
        weights,
        lambda weight, folder: merge_folders(config.models, [1 - weight, weight], folder, **hub),
        lambda folder: dict(
            zip(tasks, score_model(config, folder, [*tasks.values()], pooling=pooling, **hub), strict=True)
        ),
        file,
        key=key,
        metric=config.metric or METRIC,
        general_weight=config.general_weight,
        seed=config.seed,
    )
    inputs = [line for name, of in sets.items() for line in describe_task(tasks[name], *of)]
    return [1 - found["chosen"], found["chosen"]], {"sweep": found}, inputs


def scores_file(output: Path) -> Path:
    """Where a sweep that is not finished keeps its scores: beside the output, which appears whole."""
    return output.with_name(f"{output.name}.sweep_scores.json")


def score_model(config: MergeConfig, name: str, tasks: Sequence[RetrievalTask], **loading: Any) -> list[np.ndarray]:
    """The metric of each question, for each test set, with the prompts that the model stores."""
    encoder = load_encoder(name, **loading).to("cuda" if torch.cuda.is_available() else "cpu")
    metric = config.metric or METRIC
    options: dict[str, Any] = {
        "metrics": [metric],
        "precision": "fp16" if config.fp16 else "bf16" if config.bf16 else "no",
        "query_prompt": encoder.settings.query_prompt or "",
        "passage_prompt": encoder.settings.passage_prompt or "",
        "query_max_length": config.max_input_length,
        "passage_max_length": config.max_input_length,
    }
    with ExitStack() as stack:
        if len(tasks) > 1:  # they may share a corpus, which is encoded once
            beside = Path(config.output_path)
            folder = TemporaryDirectory(prefix=f".{beside.name}.vectors-", dir=beside.parent)
            options["cache"] = EmbeddingCache(stack.enter_context(folder))
        rankings = [evaluate_encoder(encoder, task, **options) for task in tasks]
    return [ranking.per_query[metric] for ranking in rankings]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, return the exit code: 0 done, 2 the user's input or settings."""
    return run_stage(MergeConfig, merge, argv)


if __name__ == "__main__":
    sys.exit(main())
