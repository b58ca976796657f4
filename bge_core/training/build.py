"""What train.py builds from its settings: models, loss, and what a resumed run shares with the one before."""

import importlib.util
import inspect
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from bge_core import UserError
from bge_core.encoder.encode import HALF
from bge_core.encoder.graphs import hold_passes, why_no_graphs
from bge_core.encoder.load import load_encoder
from bge_core.encoder.model import Encoder, compile_layers
from bge_core.encoder.prompts import choose_prompts
from bge_core.encoder.settings import EncoderSettings
from bge_core.files.atomic import sha256
from bge_core.loss import LossConfig, training_loss
from bge_core.runtime.config import TrainConfig
from bge_core.training import optim
from bge_core.training.data import TrainingData
from bge_core.training.graphs import GraphedEncoder
from bge_core.training.step import LossFunction, StepSettings

logger = logging.getLogger(__name__)


def build_encoder(config: TrainConfig, name: str) -> Encoder:
    """The encoder in `name`, float32 master weights, with what gets no gradient switched off."""
    encoder = load_encoder(
        name,
        pooling=config.sentence_pooling_method,
        normalize=config.normalize_embeddings,
        tokenizer_name=config.tokenizer_name,
        cache_dir=config.cache_dir,
        token=config.token,
        trust_remote_code=config.trust_remote_code,
        attention=config.attention,
        attention_dropout=config.attention_dropout,
    )
    encoder.freeze(position_embeddings=config.fix_position_embedding)
    if config.gradient_checkpointing:
        encoder.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    return encoder


def graphs_or_layers(
    config: TrainConfig, encoder: Encoder, guide: Encoder | None, data: TrainingData, precision: str, shard: bool
) -> GraphedEncoder | None:
    """Find out how texts become rows here, and hold passes as graphs or compile layers where the flags ask for it.

    Args:
        config: see there.
        encoder, guide: on their device, the first in training mode.
        data: is told how texts become rows of fixed shape.
        precision: "fp16", "bf16" or "no".
        shard: FSDP2.

    Returns:
        The encoder with its passes held; None where they are not.
    """
    half = HALF.get(precision)
    with torch.autocast(encoder.device.type, half, enabled=half is not None):
        encoder.eval().fixed_rows()  # found out here, too: once weights lie in shards, it would be a pass of its own
        data.fixed_rows, data.guide_rows = encoder.train().fixed_rows(), guide.fixed_rows() if guide else None
    if config.cuda_graphs:
        reasons = {"weights lie in shards": shard, "--gradient_checkpointing": config.gradient_checkpointing}
        reason = next((reason for reason, holds in reasons.items() if holds), None) or why_no_graphs(encoder, half)
        if reason is None:
            graphed = GraphedEncoder(encoder, half, compiled=config.torch_compile)
            for evaluated in [encoder, guide] if guide else [encoder]:
                hold_passes(evaluated, precision)
            return graphed
        logger.warning("--cuda_graphs: not in training: %s", reason)
    if config.torch_compile:
        compile_layers(encoder.backbone, fixed=data.fixed_rows is not None)
    return None


def build_guide(config: TrainConfig, device: torch.device) -> Encoder | None:
    """The frozen encoder whose vectors the loss sees, if the user named one."""
    if config.guide_encoder is None:
        return None
    guide = load_encoder(
        config.guide_encoder, cache_dir=config.cache_dir, token=config.token, trust_remote_code=config.trust_remote_code
    )
    return guide.requires_grad_(False).to(device)


def build_data(
    config: TrainConfig, encoder: Encoder, guide: Encoder | None, rank: int, world_size: int, accumulation: int
) -> TrainingData:
    """The rows, as the encoder and the guide read them. UserError: as `TrainingData`."""
    return TrainingData(
        config,
        encoder.tokenizer,
        encoder.max_length,
        rank,
        world_size,
        accumulation,
        (guide.tokenizer, guide.max_length) if guide else None,
        include_prompt=encoder.settings.include_prompt,
    )


def build_optimizer(config: TrainConfig, encoder: Encoder) -> torch.optim.AdamW:
    """AdamW with the flags' settings."""
    betas = (config.adam_beta1, config.adam_beta2)
    return optim.build_optimizer(encoder, config.learning_rate, config.weight_decay, betas, config.adam_epsilon)


def resolve(
    config: TrainConfig, stored: EncoderSettings, embedding_size: int, metric_names: Sequence[str]
) -> TrainConfig:
    """The settings with the instructions that the checkpoint stores, '' where it stores none and none is given.

    Raises:
        UserError: Matryoshka dimensions beyond the model's; a metric that no evaluation gives; as `choose_prompts`.
    """
    if config.metric_for_best_model not in metric_names:
        remedy = f"use one of {', '.join(metric_names)}"
        raise UserError(f"--metric_for_best_model {config.metric_for_best_model!r}: {remedy}")
    if max(config.mrl_dims, default=0) > embedding_size:
        raise UserError(f"--mrl_dims {config.mrl_dims}: the model's vectors have {embedding_size} dimensions")
    if config.mrl_dims and embedding_size not in config.mrl_dims:
        logger.warning(
            "WARNING: --mrl_dims %s leaves out the full size: no loss sees all %d dimensions; add it",
            config.mrl_dims,
            embedding_size,
        )
    query, passage = choose_prompts(config.model_name_or_path, stored, config)
    return replace(
        config,
        query_instruction_for_retrieval=query or "",
        passage_instruction_for_retrieval=passage or "",
        query_prompt_name=None,
        passage_prompt_name=None,
    )


def settings_to_save(config: TrainConfig, loaded: EncoderSettings, data: TrainingData) -> EncoderSettings:
    """What the trained model shall state of itself."""

    def prompt(instruction: str | None, form: str) -> str:
        return form.format(instruction, "") if instruction else ""

    return replace(
        loaded,
        max_length=data.passage_max_len,
        query_prompt=prompt(config.query_instruction_for_retrieval, config.query_instruction_format),
        passage_prompt=prompt(config.passage_instruction_for_retrieval, config.passage_instruction_format),
    )


def data_order(config: TrainConfig, data: TrainingData, accumulation: int, world_size: int) -> dict[str, Any]:
    """What a resumed run must have in common with the one before, see `run_folder.changed_settings`."""
    loss_file = config.loss.rpartition(":")[0] if config.loss else inspect.getfile(training_loss)
    all_together = world_size == 1 or config.negatives_cross_device
    return {
        "train_data": [[entry["path"], entry["sha256"]] for entry in data.inputs],
        "loss": [[loss_file, sha256(loss_file)]],
        "rows": data.plan.batch_size,
        "accumulation": accumulation,
        "candidates": "all" if all_together else config.per_device_train_batch_size,
    }


def loss_config(config: TrainConfig) -> LossConfig:
    """The loss's part of the settings."""
    return LossConfig(
        temperature=config.temperature,
        in_batch_negatives=config.use_inbatch_neg,
        distillation=config.kd_loss_type if config.knowledge_distillation else None,
        mrl_dims=tuple(config.mrl_dims),
        normalize=config.normalize_embeddings,
        exclude_positives=config.exclude_positives,
        block_size=config.loss_block_size,
        args=config.parsed_loss_args,
    )


def step_settings(
    config: TrainConfig, loss: LossFunction, accelerator: Accelerator, scaler: Any, guide: Encoder | None
) -> StepSettings:
    """How a step is computed."""
    return StepSettings(
        loss=loss,
        loss_config=loss_config(config),
        cross_device=config.negatives_cross_device,
        chunk_size=config.sub_batch_size,
        max_tokens=config.max_tokens,
        scaler=scaler,
        autocast=accelerator.autocast,
        guide=guide,
    )


def load_loss(spec: str | None) -> LossFunction:
    """FILE.py:FUNCTION -> the function; None: the built-in loss. UserError where it cannot be had."""
    if spec is None:
        return training_loss
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"--loss {spec}: write FILE.py:FUNCTION; there is no file {file!r}")
    module_spec = importlib.util.spec_from_file_location("user_loss", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules["user_loss"] = module  # dataclasses defined there look themselves up
    module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--loss {spec}: {file} has no function {name!r}")
    return function  # type: ignore[no-any-return]
