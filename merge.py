"""Stage 4, merge: several checkpoints -> one model folder.

    python merge.py --models BAAI/bge-large-zh-v1.5 outputs/model --weights 0.5 0.5 --output_path outputs/merged
    python merge.py --models A B --method ties --base_model BASE --output_path outputs/merged
    python merge.py --models outputs/run/checkpoint-* --method greedy_soup --val_data V --output_path outputs/soup

Without --weights they are equal; with --example_data they follow from each model's loss on those rows. The methods:
bge_core/merge_methods.py.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until all below is imported (`run_stage`): a third of the start would be spent on collecting nothing

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bge_core import UserError, records
from bge_core.cli import as_dict, changed_fields, run_stage
from bge_core.config import MergeConfig
from bge_core.evaluation import RetrievalTask, evaluate_encoder, load_task
from bge_core.merge_methods import check_arguments, greedy_soup
from bge_core.merging import (
    example_losses,
    merge_folders,
    merged_settings,
    open_checkpoints,
    refuse_output,
    weights_from_losses,
)
from bge_core.metrics import per_query_metrics
from bge_core.model import load_encoder, read_settings
from bge_core.report import text_table, write_model_card

METRIC_NAMES = tuple(per_query_metrics([], []))


def merge(config: MergeConfig) -> None:
    """Run the stage; prints each model's weight, where the result lies and the next command.

    Raises:
        UserError: weights that do not fit, models that cannot be merged, an output folder not ours.
    """
    if config.weights and config.example_data:
        raise UserError("--weights: cannot go with --example_data, which computes them: choose one")
    check_arguments(config.method, len(config.models), config.base_model, config.density)
    read_too = [config.base_model] if config.base_model else []
    refuse_output(config.output_path, [*config.models, *read_too], config.overwrite_output_dir)
    hub: dict[str, Any] = {"cache_dir": config.cache_dir, "trust_remote_code": config.trust_remote_code}
    models, facts, inputs = config.models, dict[str, Any](), list[records.Row]()
    if config.method == "greedy_soup":
        models, facts, inputs = choose_soup(config, hub)
    weights = config.weights or [1 / len(models)] * len(models)
    if config.example_data:
        examples = records.read_rows(config.example_data, records.check_training_row)
        inputs = [records.describe_input(config.example_data, len(examples))]
        losses = example_losses(
            models, examples, batch_size=config.batch_size, max_input_length=config.max_input_length,
            neg_number=config.neg_number, seed=config.seed, **hub,
        )  # fmt: skip
        weights = weights_from_losses(losses, config.temperature)
    manifest = merge_folders(
        models, weights, config.output_path, method="linear" if config.method == "greedy_soup" else config.method,
        base_model=config.base_model, density=config.density, dtype=config.dtype,
        overwrite=config.overwrite_output_dir, config=as_dict(config), inputs=inputs, facts=facts, **hub,
    )  # fmt: skip

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
    print(f"next: python evaluate.py --encoder {encoders} --val_data data/test.jsonl --corpus data/corpus.jsonl")


def choose_soup(config: MergeConfig, hub: dict[str, Any]) -> tuple[list[str], records.Row, list[records.Row]]:
    """The models whose uniform average scores best by `greedy_soup`; prints what was tried.

    An average is written into a folder beside the output, scored, and removed.

    Returns:
        The models, what the manifest says of the trials, its input files.

    Raises:
        UserError: no such metric, models that cannot be merged, evaluation data that cannot be read.
    """
    metric = config.metric or "MRR@10"
    if metric not in METRIC_NAMES:
        raise UserError(f"--metric {metric!r}: use one of {', '.join(METRIC_NAMES)}")
    assert config.val_data is not None
    task = load_task(config.val_data, config.corpus)
    pooling = merged_settings(open_checkpoints(config.models, **hub)).pooling
    output = Path(config.output_path)

    def score(models: Sequence[str]) -> float:
        if len(models) == 1:
            return score_model(models[0], task, metric, config.max_input_length, pooling=pooling, **hub)
        with TemporaryDirectory(prefix=f".{output.name}.soup-", dir=output.parent) as folder:
            average = str(Path(folder, "average"))
            merge_folders(models, [1 / len(models)] * len(models), average, **hub)
            return score_model(average, task, metric, config.max_input_length, pooling=pooling, **hub)

    chosen, trials = greedy_soup(config.models, score)
    rows = [(" + ".join(str(i + 1) for i in t.members), f"{t.score:.4f}", "yes" if t.kept else "") for t in trials]
    print(text_table(("number", "model"), [(str(i), name) for i, name in enumerate(config.models, 1)], left=True))
    print("\n" + text_table(("average of", metric, "kept"), rows) + "\n")
    tried = [
        {"models": [config.models[i] for i in trial.members], "score": trial.score, "kept": trial.kept}
        for trial in trials
    ]
    inputs = [records.describe_input(config.val_data, len(task.queries))]
    if config.corpus:
        inputs.append(records.describe_input(config.corpus, len(task.corpus)))
    return [config.models[i] for i in chosen], {"method": "greedy_soup", "metric": metric, "tried": tried}, inputs


def score_model(name: str, task: RetrievalTask, metric: str, max_length: int, **loading: Any) -> float:
    """The metric of one model, with the prompts that it stores."""
    encoder = load_encoder(name, **loading).to("cuda" if torch.cuda.is_available() else "cpu")
    ranking = evaluate_encoder(
        encoder, task, k=100, query_prompt=encoder.settings.query_prompt or "",
        passage_prompt=encoder.settings.passage_prompt or "", query_max_length=max_length,
        passage_max_length=max_length,
    )  # fmt: skip
    return ranking.means[metric]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, return the exit code: 0 done, 2 the user's input or settings."""
    return run_stage(MergeConfig, merge, argv)


if __name__ == "__main__":
    sys.exit(main())
