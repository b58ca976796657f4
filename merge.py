"""Stage 4, merge: several checkpoints -> a model folder with their weighted average.

    python merge.py --models BAAI/bge-large-zh-v1.5 outputs/model --weights 0.5 0.5 --output_path outputs/merged

Without --weights they are equal; with --example_data they follow from each model's loss on those rows.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until all below is imported (`run_stage`): a third of the start would be spent on collecting nothing

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bge_core import UserError, records
from bge_core.cli import as_dict, changed_fields, run_stage
from bge_core.config import MergeConfig
from bge_core.merging import example_losses, merge_folders, refuse_output, weights_from_losses
from bge_core.model import read_settings
from bge_core.report import write_model_card


def merge(config: MergeConfig) -> None:
    """Run the stage; prints each model's weight, where the result lies and the next command.

    Raises:
        UserError: weights that do not fit, models that cannot be averaged, an output folder not ours.
    """
    if config.weights and config.example_data:
        raise UserError("--weights: cannot go with --example_data, which computes them: choose one")
    refuse_output(config.output_path, config.models, config.overwrite_output_dir)
    hub: dict[str, Any] = {"cache_dir": config.cache_dir, "trust_remote_code": config.trust_remote_code}
    weights, inputs = config.weights or [1 / len(config.models)] * len(config.models), []
    if config.example_data:
        examples = records.read_rows(config.example_data, records.check_training_row)
        inputs = [records.describe_input(config.example_data, len(examples))]
        losses = example_losses(
            config.models, examples, batch_size=config.batch_size, max_input_length=config.max_input_length,
            neg_number=config.neg_number, seed=config.seed, **hub,
        )  # fmt: skip
        weights = weights_from_losses(losses, config.temperature)
    manifest = merge_folders(
        config.models, weights, config.output_path, overwrite=config.overwrite_output_dir, config=as_dict(config),
        inputs=inputs, **hub,
    )  # fmt: skip

    stored = read_settings(config.output_path)
    write_model_card(
        Path(config.output_path),
        title=Path(config.output_path).name,
        facts={
            "base model": config.models[0],
            "merged from": {name: f"{weight:.4f}" for name, weight in zip(config.models, weights, strict=True)},
            "pooling": manifest["pooling"],
            "settings": changed_fields(config),
        },
        scores=None,
        prompt=stored.query_prompt or "",
    )
    for weight, name in zip(weights, config.models, strict=True):
        print(f"{weight:.4f}  {name}")
    print(f"model: {config.output_path}")
    encoders = shlex.join([*config.models, config.output_path])
    print(f"next: python evaluate.py --encoder {encoders} --val_data data/test.jsonl --corpus data/corpus.jsonl")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, return the exit code: 0 done, 2 the user's input or settings."""
    return run_stage(MergeConfig, merge, argv)


if __name__ == "__main__":
    sys.exit(main())
