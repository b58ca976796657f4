"""Which models with which weights: as given, from losses on examples, by a sweep, or by a greedy soup."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bge_core.encoder.code import model_code
from bge_core.encoder.fingerprint import tokenizer_text
from bge_core.encoder.load import load_encoder
from bge_core.encoder.prompts import choose_prompts
from bge_core.encoder.settings import EncoderSettings
from bge_core.evaluation.evaluator import evaluate_encoder
from bge_core.evaluation.tasks import RetrievalTask, describe_task, load_task
from bge_core.files import atomic, records
from bge_core.files.records import Row
from bge_core.merging.folders import write_merged
from bge_core.merging.lm_cocktail import example_losses, weights_from_losses
from bge_core.merging.methods import greedy_soup
from bge_core.merging.model_folders import ModelFolder
from bge_core.merging.sweep import Sweep, parse_sweep, sweep
from bge_core.reports.plots import plot_sweep
from bge_core.reports.tables import text_table
from bge_core.runtime.config import MergeConfig
from bge_core.search.cache import EmbeddingCache

METRIC = "MRR@10"
SCORES_FILE = "sweep_scores.json"


@dataclass(frozen=True)
class Choice:
    """What is merged, and how that was found.

    Args:
        models, weights: one weight a model; behind the models the base where the method wants one.
        facts: entries for the manifest.
        inputs: entries of the manifest's inputs: the data on which the choice rests.
        sweep: what a sweep measured; None: there was none.
        told: what was tried, as a text for the terminal.
    """

    models: list[ModelFolder]
    weights: list[float]
    facts: Row = field(default_factory=dict)
    inputs: list[Row] = field(default_factory=list)
    sweep: Sweep | None = None
    told: str = ""


def choose(config: MergeConfig, folders: list[ModelFolder], settings: EncoderSettings, **hub: Any) -> Choice:
    """The models and weights that the flags ask for.

    Args:
        config: the flags.
        folders: those of --models, and behind them the base.
        settings: what a merged model states.
        hub: cache_dir, trust_remote_code.

    Raises:
        UserError: data that cannot be read.
    """
    if config.method == "greedy_soup":
        return _choose_soup(config, folders, settings, hub)
    if config.sweep:
        return _choose_by_sweep(config, folders, settings, hub)
    if config.example_data:
        examples = records.read_rows(config.example_data, records.check_training_row)
        losses = example_losses(
            config.models,
            examples,
            batch_size=config.batch_size,
            max_input_length=config.max_input_length,
            neg_number=config.neg_number,
            seed=config.seed,
            **hub,
        )
        weights = weights_from_losses(losses, config.temperature)
        return Choice(folders, weights, inputs=[atomic.describe_input(config.example_data, len(examples))])
    return Choice(folders, config.weights or _equal(config.models))


def _equal(models: Sequence[Any]) -> list[float]:
    return [1 / len(models)] * len(models)


def _choose_soup(
    config: MergeConfig, folders: Sequence[ModelFolder], settings: EncoderSettings, hub: dict[str, Any]
) -> Choice:
    """The models whose uniform average scores best by `greedy_soup`. Each is written beside the output, and removed."""
    assert config.val_data is not None
    metric, task = config.metric or METRIC, load_task(config.val_data, config.corpus)
    output = Path(config.output_path)

    def score(models: Sequence[ModelFolder]) -> float:
        with TemporaryDirectory(prefix=f".{output.name}.soup-", dir=output.parent) as folder:
            model = models[0].name
            if len(models) > 1:
                model = str(Path(folder, "average"))
                write_merged(models, _equal(models), model, settings)
            return float(score_model(config, model, [task], pooling=settings.pooling, **hub)[0].mean())

    chosen, trials = greedy_soup(folders, score)
    tried = [
        {"models": [config.models[i] for i in trial.members], "score": trial.score, "kept": trial.kept}
        for trial in trials
    ]
    rows = [(" + ".join(str(i + 1) for i in t.members), f"{t.score:.4f}", "yes" if t.kept else "") for t in trials]
    numbers = [(str(i), name) for i, name in enumerate(config.models, 1)]
    told = text_table(("number", "model"), numbers, left=True) + "\n\n"
    told += text_table(("average of", metric, "kept"), rows) + "\n"
    models = [folders[i] for i in chosen]
    facts = {"method": "greedy_soup", "metric": metric, "tried": tried}
    return Choice(models, _equal(models), facts, describe_task(task, config.val_data, config.corpus), told=told)


def _choose_by_sweep(
    config: MergeConfig, folders: list[ModelFolder], settings: EncoderSettings, hub: dict[str, Any]
) -> Choice:
    """The two weights that `sweep` chooses. Scores of an earlier sweep in the output folder are used where they fit."""
    assert config.val_data is not None and config.sweep is not None
    sets = {"domain": (config.val_data, config.corpus)}
    if config.general_data:
        sets["general"] = config.general_data, config.general_corpus
    weights = parse_sweep(config.sweep)
    tasks = {name: load_task(*of) for name, of in sets.items()}
    file = _scores_file(config)
    earlier = Path(config.output_path, SCORES_FILE)
    if earlier.exists() and not file.exists():
        shutil.copy(earlier, file)

    def score(folder: str) -> dict[str, np.ndarray]:
        found = score_model(config, folder, list(tasks.values()), pooling=settings.pooling, **hub)
        return dict(zip(tasks, found, strict=True))

    found = sweep(
        weights,
        lambda weight, folder: write_merged(folders, [1 - weight, weight], folder, settings),
        score,
        file,
        key=_sweep_key(config, list(tasks.values()), folders, settings),
        metric=config.metric or METRIC,
        general_weight=config.general_weight,
        seed=config.seed,
    )
    inputs = [line for name, of in sets.items() for line in describe_task(tasks[name], *of)]
    told = f"{found.table()}\n{found.rule}\n"
    return Choice(folders, [1 - found.chosen, found.chosen], {"sweep": found.row()}, inputs, found, told)


def _sweep_key(
    config: MergeConfig,
    tasks: Sequence[RetrievalTask],
    folders: Sequence[ModelFolder],
    settings: EncoderSettings,
) -> str:
    """A hash of all that a weight's scores depend on."""
    parts: list[Any] = [
        [
            task.queries,
            task.corpus,
            [sorted(of.items()) for of in task.relevant],
            task.missing,
            task.own_rows,
            task.query_prompts,
        ]
        for task in tasks
    ]
    parts += [config.metric or METRIC, config.max_input_length, config.fp16, config.bf16, repr(settings)]
    for one in folders:
        parts += [*(line["sha256"] for line in one.inputs), one.backbone.config.to_json_string()]
        parts += [model_code(one.backbone), tokenizer_text(one.tokenizer.backend_tokenizer)]
    text = json.dumps(parts, ensure_ascii=False).encode("utf-8", "replace")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def write_sweep(config: MergeConfig, choice: Choice) -> None:
    """Write what a sweep measured beside the merged model, in place of what an earlier one left there."""
    output = Path(config.output_path)
    for name in ("sweep.json", "sweep.png", SCORES_FILE):
        (output / name).unlink(missing_ok=True)
    if choice.sweep:
        atomic.write_json(output / "sweep.json", choice.sweep.row())
        plot_sweep(choice.sweep.row(), output / "sweep.png")
        shutil.move(_scores_file(config), output / SCORES_FILE)  # which may be on another disk


def _scores_file(config: MergeConfig) -> Path:
    """Where a sweep that is not finished keeps its scores: beside the output, which appears whole."""
    return Path(f"{Path(config.output_path)}.{SCORES_FILE}")


def score_model(config: MergeConfig, name: str, tasks: Sequence[RetrievalTask], **loading: Any) -> list[np.ndarray]:
    """The metric of each question, for each test set, with the prompts that the model stores."""
    encoder = load_encoder(name, **loading).to("cuda" if torch.cuda.is_available() else "cpu")
    metric, (query_prompt, passage_prompt) = config.metric or METRIC, choose_prompts(name, encoder.settings)
    options: dict[str, Any] = {
        "metrics": [metric],
        "precision": "fp16" if config.fp16 else "bf16" if config.bf16 else "no",
        "query_prompt": query_prompt or "",
        "passage_prompt": passage_prompt or "",
        "query_max_len": config.max_input_length,
        "passage_max_len": config.max_input_length,
    }
    with ExitStack() as stack:
        if len(tasks) > 1:  # they may share a corpus, which is encoded once
            beside = Path(config.output_path)
            folder = TemporaryDirectory(prefix=f".{beside.name}.vectors-", dir=beside.parent)
            options["cache"] = EmbeddingCache(stack.enter_context(folder))
        return [evaluate_encoder(encoder, task, **options).per_query[metric] for task in tasks]
