"""Stage 4, merge: several models -> one model folder.

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

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bge_core import UserError
from bge_core.evaluation.metrics import parse_metric
from bge_core.evaluation.tasks import evaluation_command
from bge_core.files.atomic import read_json
from bge_core.merging.choose import METRIC, choose, write_sweep
from bge_core.merging.compare import merged_settings, open_model_folders
from bge_core.merging.folders import refuse_output, write_merged
from bge_core.merging.methods import check_arguments, check_weights
from bge_core.merging.sweep import parse_sweep
from bge_core.reports.model_card import write_model_card
from bge_core.runtime.cli import as_dict, changed_fields, run_stage
from bge_core.runtime.config import MergeConfig
from bge_core.runtime.launch import resolve_precision


def merge(config: MergeConfig) -> None:
    """Run the stage; prints each model's weight, where the result lies and the next command.

    Raises:
        UserError: weights that do not fit, models that cannot be merged, an output folder not ours.
    """
    refuse_merge(config)
    hub: dict[str, Any] = {"cache_dir": config.cache_dir, "trust_remote_code": config.trust_remote_code}
    folders = open_model_folders([*config.models, *filter(None, [config.base_model])], **hub)
    settings = merged_settings(folders, config.prompts_from)
    choice = choose(config, folders, settings, **hub)
    output = Path(config.output_path)
    manifest = write_merged(
        choice.models,
        choice.weights,
        output,
        settings,
        method="linear" if config.method == "greedy_soup" else config.method,
        density=config.density,
        dtype=config.dtype,
        config=as_dict(config),
        inputs=choice.inputs,
        facts=choice.facts,
    )
    write_sweep(config, choice)
    named = list(zip(manifest["models"], choice.weights, strict=True))
    write_model_card(
        output,
        title=output.name,
        facts={
            "base model": config.base_model or manifest["models"][0],
            "merged from": {name: f"{weight:.4f}" for name, weight in named},
            "method": config.method,
            "pooling": manifest["pooling"],
            "settings": changed_fields(config),
        },
        scores=None,
        prompt=settings.query_prompt or "",
    )
    if choice.told:
        print(choice.told)
    for name, weight in named:
        print(f"{weight:.4f}  {name}")
    print(f"model: {config.output_path}")
    of_models = [(read_json(Path(model, "manifest.json")) or {}).get("config") or {} for model in manifest["models"]]
    print(f"next: {evaluation_command([*manifest['models'], config.output_path], as_dict(config), *of_models)}")


def refuse_merge(config: MergeConfig) -> None:
    """UserError for what can be refused before a model is read. Half precision that is not to be had is turned off."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("merge.py is one process, and its copies would be in each other's way: start it with python")
    if config.fp16:
        config.fp16 = resolve_precision(True, False, cuda=torch.cuda.is_available()) == "fp16"
    if config.weights and config.example_data:
        raise UserError("--weights: cannot go with --example_data, which computes them: choose one")
    parse_metric(config.metric or METRIC)
    check_arguments(config.method, len(config.models), config.base_model, config.density)
    if config.sweep:
        parse_sweep(config.sweep)
    if config.weights:
        check_weights(config.models, config.weights, config.method)
    read_too = [config.base_model] if config.base_model else []
    refuse_output(config.output_path, [*config.models, *read_too], config.overwrite_output_dir)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, return the exit code: 0 done, 2 the user's input or settings."""
    return run_stage(MergeConfig, merge, argv)


if __name__ == "__main__":
    sys.exit(main())
