#!/usr/bin/env python3
"""Fine-tune a text-embedding model: read the settings, build, then one loop over optimizer steps.

    python train.py --model_name_or_path BAAI/bge-large-zh-v1.5 --train_data train_minedHN.jsonl --output_dir OUT ...
    torchrun --nproc_per_node 2 train.py ...
    accelerate launch train.py --config configs/train/bge-large-zh.yaml

`python train.py --help` lists every flag. To change what is learned, edit bge_core/loss.py or
give --loss FILE.py:FUNCTION.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until all below is imported (`run_stage`): a third of the start would be spent on collecting nothing

import importlib.util
import inspect
import json
import logging
import math
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tqdm import tqdm

from bge_core import UserError
from bge_core.encoder.load import load_encoder
from bge_core.encoder.model import Encoder, compile_layers
from bge_core.encoder.tokens import Tokens
from bge_core.evaluation.evaluator import evaluate_encoder
from bge_core.evaluation.metrics import per_query_metrics
from bge_core.evaluation.tasks import load_task
from bge_core.files import atomic
from bge_core.loss import LossConfig, training_loss
from bge_core.reports import model_card, plots, tables
from bge_core.runtime import watchdog
from bge_core.runtime.cli import as_dict, changed_fields, run_stage
from bge_core.runtime.config import TrainConfig
from bge_core.runtime.distributed import (
    clip_gradients,
    gather_objects,
    is_sharded,
    load_optimizer,
    on_main,
    sum_over_ranks,
    whole_copy,
    world,
    wrap,
)
from bge_core.runtime.launch import resolve_sharding, start, tracker_options
from bge_core.runtime.log import append_metrics
from bge_core.training import checkpoint, optim, plan, preflight, run_folder
from bge_core.training.data import TrainingData, start_worker
from bge_core.training.optim import ExponentialMovingAverage, build_optimizer, learning_rate_schedule
from bge_core.training.step import LossFunction, StepSettings, forward_backward

logger = logging.getLogger(__name__)
STOPPED_BY_SIGNAL = 75  # EX_TEMPFAIL: try again
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # the second is one that a launcher can be told to ignore
METRIC_NAMES = tuple(per_query_metrics([], []))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit code."""

    def stage(config: TrainConfig) -> int:
        try:
            return train(config, at_end)
        except RuntimeError as error:  # torch raises it wherever the loop is when the worker ends
            if "DataLoader worker" not in str(error):
                raise
            raise ChildProcessError(  # every rank says it: only one has lost a worker
                f"{error}\nA process that reads ahead was ended from outside, most often for want of memory: use fewer "
                "--dataloader_num_workers; --resume_from_checkpoint latest goes on from the last checkpoint"
            ) from None

    with ExitStack() as at_end:
        for number in STOP_SIGNALS:
            at_end.callback(signal.signal, number, signal.getsignal(number))
        at_end.callback(watchdog.stop)
        return run_stage(TrainConfig, stage, argv)


def train(config: TrainConfig, at_end: ExitStack) -> int:
    """The whole run of one process.

    Args:
        config: its settings.
        at_end: gets what must be given back, however the run ends.

    Returns:
        0, or 75 where a signal stopped it after a save.
    """
    # ---- build
    if config.full_determinism:
        transformers.enable_full_determinism(config.seed)
    shard = resolve_sharding(config.fsdp, config.ema_decay)
    # A collective waits longer than the watchdog, which says more.
    accelerator = start(config.fp16, config.bf16, config.ddp_timeout + 60, **tracker_options(config))
    rank, world_size = world()
    datasets.disable_progress_bars()
    accumulation = config.gradient_accumulation_steps or accelerator.gradient_accumulation_steps
    output_dir = Path(config.output_dir)
    loss = load_loss(config.loss) if config.loss else training_loss

    encoder = build_encoder(config, config.model_name_or_path)
    config = resolve_instructions(config, encoder)
    if max(config.mrl_dims, default=0) > encoder.embedding_size:
        raise UserError(f"--mrl_dims {config.mrl_dims}: the model's vectors have {encoder.embedding_size} dimensions")
    guide = build_guide(config)
    guide_reads = (guide.tokenizer, guide.max_positions) if guide else None
    data = TrainingData(config, encoder.tokenizer, encoder.max_positions, rank, world_size, accumulation, guide_reads)
    task = load_task(config.val_data, config.val_corpus) if config.val_data else None
    if config.metric_for_best_model not in METRIC_NAMES:
        raise UserError(
            f"--metric_for_best_model {config.metric_for_best_model!r}: use one of {', '.join(METRIC_NAMES)}"
        )
    if config.show_batch:
        if rank == 0:
            print(preflight.describe_batch(data, config))
        return 0

    loss_file = config.loss.rpartition(":")[0] if config.loss else inspect.getfile(training_loss)
    all_together = world_size == 1 or config.negatives_cross_device
    data_order = {
        "train_data": [[entry["path"], entry["sha256"]] for entry in data.inputs],
        "loss": [[loss_file, atomic.sha256(loss_file)]],
        "rows": data.plan.batch_size,
        "accumulation": accumulation,
        "candidates": "all" if all_together else config.per_device_train_batch_size,
    }
    resume = None
    if not config.plan:
        on_main(lambda: at_end.enter_context(run_folder.lock_run_folder(output_dir)))
        resume = on_main(
            lambda: run_folder.open_run_folder(
                output_dir,
                as_dict(config),
                data_order,
                resume=config.resume_from_checkpoint,
                overwrite=config.overwrite_output_dir,
            )
        )
    if resume:
        encoder = build_encoder(config, str(resume))
    encoder.settings = replace(
        encoder.settings,
        max_length=data.passage_max_len,
        query_prompt=prompt_of(config.query_instruction_for_retrieval, config.query_instruction_format),
        passage_prompt=prompt_of(config.passage_instruction_for_retrieval, config.passage_instruction_format),
    )
    encoder.to(accelerator.device)
    model = wrap(encoder, shard)
    optimizer = build_optimizer(
        encoder, config.learning_rate, config.weight_decay, (config.adam_beta1, config.adam_beta2), config.adam_epsilon
    )
    ema = ExponentialMovingAverage(encoder, config.ema_decay) if config.ema_decay else None
    averaged = ema.applied if ema else nullcontext  # within it the encoder has the weights to evaluate and publish
    scaler = accelerator.scaler or torch.amp.GradScaler(enabled=False)
    settings = StepSettings(
        loss=loss,
        loss_config=loss_config(config),
        cross_device=config.negatives_cross_device,
        chunk_size=config.sub_batch_size,
        max_tokens=config.max_tokens,
        scaler=scaler,
        autocast=accelerator.autocast,
        guide=guide.to(accelerator.device) if guide else None,
    )
    num_steps = data.num_steps
    num_warmup = config.warmup_steps or math.ceil(config.warmup_ratio * num_steps)
    lr_at = learning_rate_schedule(config.lr_scheduler_type, config.learning_rate, num_warmup, num_steps)
    save_every = optim.interval(config.save_steps, num_steps)
    eval_every = optim.interval(config.save_steps if config.eval_steps is None else config.eval_steps, num_steps)
    evaluation = {
        "batch_size": config.per_device_eval_batch_size,
        "precision": accelerator.mixed_precision,
        "query_prompt": encoder.settings.query_prompt,
        "passage_prompt": encoder.settings.passage_prompt,
        "query_max_length": data.query_max_len,
        "passage_max_length": data.passage_max_len,
    }

    # ---- begin, or go on where a checkpoint left off
    progress: dict[str, Any] = {
        "skipped": 0,
        "window": {},
        "scores": {},
        "stale": 0,
        "best_value": -math.inf,
        "best_step": 0,
        "best_scores": {},
    }
    model.train()
    warm_up_ddp(model, world_size)
    torch.manual_seed(config.seed + rank)
    first_step = 0
    if resume:
        state = checkpoint.load_checkpoint(resume)
        first_step, progress = state["step"], state["progress"]
        load_optimizer(optimizer, state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if ema and "ema" in state:
            ema.load_state_dict(state["ema"])
        if len(state["random_states"]) == world_size:
            checkpoint.restore_random_state(state["random_states"][rank])
        else:
            checkpoint.seed_random_state(config.seed, first_step, rank)
        logger.info("resumed from %s", resume)
    facts = preflight.run_facts(
        config, data, encoder, accelerator.mixed_precision, accumulation, world_size, num_warmup
    )
    facts["sharding"] = "FSDP2" if shard else "none"
    if config.plan:
        told = plan.plan_run(
            config,
            data,
            model,
            optimizer,
            settings,
            num_candidates=facts["candidates per query"],
            save_every=save_every,
            eval_every=eval_every,
            gather=gather_objects,
        )
        if rank == 0:
            logger.info(tables.text_table(("plan", ""), plan.describe(told), left=True))
            print(json.dumps(told))
        return 0
    manifest = atomic.make_manifest("train", as_dict(config), data.inputs, data_order=data_order, facts=facts)
    metrics_file = output_dir / "metrics.jsonl"
    if rank == 0:
        for line in preflight.preflight(config, data, encoder, facts):
            logger.info(line)
        atomic.write_json(output_dir / "manifest.json", manifest | {"status": "running"})
        run_folder.cut_metrics(metrics_file, first_step)
    if config.report_to != "none":
        accelerator.init_trackers(
            "bge_core", {k: v for k, v in as_dict(config).items() if isinstance(v, (int, float, str))}
        )

    saver = checkpoint.Saver(output_dir, encoder, manifest | {"stage": "checkpoint"}, config.save_total_limit)
    at_end.callback(saver.close)

    def save(step: int) -> None:
        best = f"checkpoint-{progress['best_step']}" if config.load_best_model_at_end else None
        state = {"progress": progress, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        if ema:
            state["ema"] = ema.state_dict()
        saver.save(step, state, keep=best)

    def log(values: dict[str, Any]) -> None:
        if rank == 0:
            append_metrics(metrics_file, values)
        accelerator.log({name: value for name, value in values.items() if name != "step"}, step=values["step"])

    def out_of_patience() -> bool:
        return config.early_stopping_patience is not None and progress["stale"] >= config.early_stopping_patience

    # ---- the loop
    last_step = first_step if out_of_patience() else num_steps
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=None,
        sampler=range(first_step, last_step),
        num_workers=config.dataloader_num_workers,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # its own: drawing the workers' seed from the global one would shift dropout
    )
    bar = tqdm(total=num_steps, initial=first_step, desc="train", unit="step", disable=None if rank == 0 else True)
    signals: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: signals.append(number))
    window, clock = progress["window"], time.perf_counter()
    watchdog.watch(rank, world_size, config.ddp_timeout)
    for step, micro_batches in enumerate(loader, start=first_step + 1):
        watchdog.step_begins()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step - 1 - progress["skipped"])

        shares = forward_backward(model, micro_batches, settings)
        scaler.unscale_(optimizer)
        shares["grad_norm"] = clip_gradients(encoder.parameters(), config.max_grad_norm) / world_size

        shares["queries"] = torch.tensor(sum(batch.num_queries for batch in micro_batches))
        shares["tokens"] = torch.tensor(sum(len(batch.tokens.input_id_T) for batch in micro_batches))
        shares["signals"], shares["save_failed"] = torch.tensor(len(signals)), torch.tensor(saver.failed())
        values = torch.stack([share.to(accelerator.device, torch.float32) for share in shares.values()])
        means = dict(zip(shares, sum_over_ranks(values).tolist(), strict=True))
        told_to_stop, grad_norm = means.pop("signals") > 0, means.pop("grad_norm")
        if means.pop("save_failed"):
            saver.wait()  # raises the reason
        if not math.isfinite(means["loss"]) or not (math.isfinite(grad_norm) or scaler.is_enabled()):
            raise preflight.not_finite(output_dir, step, rank, data, micro_batches)

        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped = scaler.get_scale() < scale
        progress["skipped"] += skipped
        if ema and not skipped:
            ema.update()
        optimizer.zero_grad(set_to_none=True)
        watchdog.step_ends()

        for name, value in {**means, "steps": 1}.items():
            window[name] = window.get(name, 0) + value
        bar.update()
        if step % config.logging_steps == 0 or step == num_steps:
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            logged = preflight.summarize(window, seconds) | {
                "lr": optimizer.param_groups[0]["lr"],
                "grad_norm": grad_norm,
            }
            if not math.isfinite(grad_norm):  # a skipped step; JSON has no infinity
                logged["grad_norm"] = None
            if scaler.is_enabled():
                logged |= {"skipped_steps": progress["skipped"], "loss_scale": scaler.get_scale()}
            log({"step": step, "epoch": round(step / data.plan.steps_per_epoch, 4)} | logged)
            bar.set_postfix_str(preflight.one_line(logged))
            if bar.disable and rank == 0:
                logger.info("step %d/%d  %s", step, num_steps, preflight.one_line(logged))
            window.clear()

        if task and (step == num_steps or (eval_every and step % eval_every == 0)):
            with averaged():
                progress["scores"] = scores = evaluate_encoder(encoder, task, **evaluation).means
            log({"step": step} | scores)
            logger.info("step %d  %s", step, "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
            is_best = scores[config.metric_for_best_model] > progress["best_value"]
            if is_best:
                value = scores[config.metric_for_best_model]
                progress |= {"best_value": value, "best_scores": scores, "best_step": step, "stale": 0}
            else:
                progress["stale"] += 1
            if is_best and config.load_best_model_at_end and not (save_every and step % save_every == 0):
                save(step)
            clock = time.perf_counter()
        if save_every and step % save_every == 0:
            save(step)
        if out_of_patience():
            logger.info(
                "stopped early: %d evaluations without a better %s", progress["stale"], config.metric_for_best_model
            )
            break
        if told_to_stop and step < num_steps:
            if not (save_every and step % save_every == 0):
                save(step)
            saver.wait()
            logger.info("stopped by a signal after step %d; --resume_from_checkpoint latest goes on", step)
            return STOPPED_BY_SIGNAL
    bar.close()

    # ---- the final model
    saver.wait()
    watchdog.stop()
    weights = whole_copy(encoder.backbone.state_dict()) if is_sharded(model) else None
    accelerator.wait_for_everyone()
    if rank == 0:
        best = output_dir / f"checkpoint-{progress['best_step']}"
        use_best = config.load_best_model_at_end and best.is_dir()
        best_ema = checkpoint.load_checkpoint(best).get("ema") if ema and use_best else None
        if ema and best_ema:  # the files of the checkpoint hold the weights in training
            ema.load_state_dict(best_ema)
        with averaged():
            checkpoint.publish_model(output_dir, best if use_best and not best_ema else encoder, weights)
        scores = progress["best_scores" if use_best else "scores"]
        if use_best:
            logger.info(
                "the final model is that of step %d (%s %.4f)",
                progress["best_step"],
                config.metric_for_best_model,
                progress["best_value"],
            )
        plots.plot_curves(metrics_file, output_dir / "curves.png")
        base = {"base model": config.model_name_or_path, "training data": config.train_data}
        model_card.write_model_card(
            output_dir,
            title=config.run_name or output_dir.name,
            scores=scores,
            facts={**base, **facts, "settings": changed_fields(config)},
            prompt=encoder.settings.query_prompt or "",
        )
        skipped = {"skipped_steps": progress["skipped"]}
        atomic.write_json(output_dir / "manifest.json", manifest | {"status": "finished", "scores": scores, **skipped})
        encoders = shlex.join([str(config.model_name_or_path), str(output_dir)])
        print(
            f"model: {output_dir}\nnext: python evaluate.py --encoder {encoders} --val_data data/test.jsonl "
            "--corpus data/corpus.jsonl --add_instruction --output_dir outputs/report"
        )
    accelerator.end_training()
    return 0


def build_encoder(config: TrainConfig, name: str) -> Encoder:
    """The encoder, float32 master weights, with what gets no gradient switched off."""
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
    if config.torch_compile:
        compile_layers(encoder.backbone)
    return encoder


def build_guide(config: TrainConfig) -> Encoder | None:
    """The frozen encoder whose vectors the loss sees, if the user named one."""
    if config.guide_encoder is None:
        return None
    guide = load_encoder(
        config.guide_encoder, cache_dir=config.cache_dir, token=config.token, trust_remote_code=config.trust_remote_code
    )
    return guide.requires_grad_(False)


def resolve_instructions(config: TrainConfig, encoder: Encoder) -> TrainConfig:
    """None becomes the checkpoint's stored prompt, or '' where it has none."""
    query, passage = config.query_instruction_for_retrieval, config.passage_instruction_for_retrieval
    return replace(
        config,
        query_instruction_for_retrieval=query if query is not None else encoder.settings.query_prompt or "",
        passage_instruction_for_retrieval=passage if passage is not None else encoder.settings.passage_prompt or "",
    )


def prompt_of(instruction: str | None, form: str) -> str:
    """What stands before a text: the form with the instruction and an empty text."""
    return form.format(instruction, "") if instruction else ""


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


def load_loss(spec: str) -> LossFunction:
    """FILE.py:FUNCTION -> the function. UserError where it cannot be had."""
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


def warm_up_ddp(model: torch.nn.Module, world_size: int) -> None:
    """Two throw-away passes: DDP orders its buckets anew after the first, which changes sums in the last bit.

    Done at every start, they leave the first real step the same order in a fresh and in a resumed run.
    """
    for _ in range(2 if world_size > 1 else 0):
        model(Tokens(torch.zeros(1, dtype=torch.int64, device=next(model.parameters()).device), [1])).sum().backward()
        model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    sys.exit(main())
