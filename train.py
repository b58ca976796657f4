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

import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator
from tqdm import tqdm

from bge_core.encoder.load import stated_attention_dropout
from bge_core.encoder.model import Encoder
from bge_core.evaluation.evaluator import evaluate_encoder
from bge_core.evaluation.metrics import DEFAULT_METRICS
from bge_core.evaluation.tasks import evaluation_command, load_task
from bge_core.files.atomic import make_manifest, write_json
from bge_core.reports.model_card import write_model_card
from bge_core.reports.plots import plot_curves
from bge_core.reports.tables import text_table
from bge_core.runtime import watchdog
from bge_core.runtime.cli import as_dict, changed_fields, run_stage
from bge_core.runtime.config import TrainConfig
from bge_core.runtime.distributed import (
    clip_gradients,
    gather_objects,
    is_sharded,
    load_optimizer,
    on_main,
    whole_copy,
    world,
    wrap,
)
from bge_core.runtime.launch import resolve_sharding, start, tracker_options
from bge_core.runtime.log import append_metrics
from bge_core.training import build, checkpoint, plan, preflight, run_folder
from bge_core.training.batch import Batch
from bge_core.training.data import TrainingData
from bge_core.training.optim import ExponentialMovingAverage, update_if_finite
from bge_core.training.progress import Meter, Progress, Reading, reads_late
from bge_core.training.random_state import restore_random_state, seed_random_state
from bge_core.training.read_ahead import ReadAhead, lost_worker
from bge_core.training.schedule import Schedule
from bge_core.training.step import StepSettings, forward_backward, sum_figures, warm_up_ddp
from bge_core.training.stop import catch_stop_signals

logger = logging.getLogger(__name__)
STOPPED_BY_SIGNAL = 75  # EX_TEMPFAIL: try again


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit code."""

    with ExitStack() as at_end:
        return run_stage(TrainConfig, lambda config: train(config, at_end), argv)


def train(config: TrainConfig, at_end: ExitStack) -> int:
    """The whole run of one process; `at_end` gets what must be given back. Returns 0, or 75 when told to stop."""
    # ---- 1. build: whatever can be refused is refused here; nothing is written or removed yet
    if config.full_determinism:
        transformers.enable_full_determinism(config.seed)
    shard = resolve_sharding(config.fsdp, config.ema_decay)
    # A collective waits longer than the watchdog, which says more.
    accelerator = start(config.fp16, config.bf16, config.ddp_timeout + 60, **tracker_options(config))
    datasets.disable_progress_bars()
    rank, world_size = world()
    accumulation = config.gradient_accumulation_steps or accelerator.gradient_accumulation_steps
    output_dir = Path(config.output_dir)
    loss = build.load_loss(config.loss)
    encoder = build.build_encoder(config, config.model_name_or_path)
    guide = build.build_guide(config, accelerator.device)
    config = build.resolve(config, encoder.settings, encoder.embedding_size, DEFAULT_METRICS)
    data = build.build_data(config, encoder, guide, rank, world_size, accumulation)
    task = load_task(config.val_data, config.val_corpus) if config.val_data else None
    schedule = Schedule.of(config, data.num_steps)
    if config.show_batch:
        return show_batch(data)
    preflight.refuse_empty_texts(data)

    # ---- 2. the run folder: begin, or go on where a checkpoint left off
    order = build.data_order(config, data, accumulation, world_size)
    # asked here; `begin` below touches it
    opening = None if config.plan else claim_run_folder(config, order, at_end)
    if resume := opening and opening.resume:
        encoder = build.build_encoder(config, str(resume))
    encoder.settings = build.settings_to_save(config, encoder.settings, data)
    encoder.to(accelerator.device).train()
    graphed = build.graphs_or_layers(config, encoder, guide, data, accelerator.mixed_precision, shard)
    model = graphed or wrap(encoder, shard)
    optimizer = build.build_optimizer(config, encoder)
    ema = ExponentialMovingAverage(encoder, config.ema_decay) if config.ema_decay else None
    scaler = accelerator.scaler or torch.amp.GradScaler(enabled=False)
    settings = build.step_settings(config, loss, accelerator, scaler, guide)
    warm_up_ddp(model)
    torch.manual_seed(config.seed + rank)
    first_step, progress = restore(resume, config.seed, optimizer, scaler, ema) if resume else (0, Progress())
    facts = preflight.run_facts(data, encoder.settings, accelerator.mixed_precision, schedule.num_warmup, shard)
    facts["attention dropout"] = stated_attention_dropout(encoder.backbone.config)
    if opening is None:
        return show_plan(data, model, optimizer, settings, facts, schedule)
    manifest = make_manifest("train", as_dict(config), data.inputs, data_order=order, facts=facts)
    log = open_log(config, accelerator, data, opening, manifest, progress.evaluated)
    of_checkpoints = manifest | {"stage": "checkpoint"}
    saver = checkpoint.Saver(output_dir, encoder, of_checkpoints, config.save_total_limit, first_step)
    at_end.callback(saver.close)
    signals = catch_stop_signals(at_end)
    at_end.enter_context(watchdog.watch(rank, world_size, config.ddp_timeout, saver.close))

    def save(step: int) -> None:
        state = {"progress": vars(progress), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        state |= {"ema": ema.state_dict()} if ema else {}
        saver.save(step, state, f"checkpoint-{progress.best_step}" if config.load_best_model_at_end else None)

    def finish(reading: Reading) -> str:
        """What follows from a step's figures; why the run has to stop, "" if it has not."""
        means = reading.take()  # the loop's one wait for the device
        told, lost = means.pop("signals"), means.pop("workers_lost")
        grad_norm, left_out, loss_scale = (means.pop(name) for name in ("grad_norm", "left_out", "loss_scale"))
        if means.pop("save_failed"):
            saver.wait()  # raises the reason
        if not math.isfinite(means["loss"]) or (left_out and not scaler.is_enabled()):
            raise preflight.not_finite(output_dir, reading.step, rank, data, reading.batches)
        progress.skipped += int(left_out)
        if ema and not left_out:
            ema.update()
        meter.add(means)
        bar.update()
        if reading.step % config.logging_steps == 0 or reading.step == last_step:
            logged = meter.read() | figures(optimizer, grad_norm, progress, loss_scale if scaler.is_enabled() else None)
            log({"step": reading.step, "epoch": round(reading.step / data.plan.steps_per_epoch, 4)} | logged)
            show_step(bar, reading.step, logged)
        return "signal" if told else "worker" if lost else ""

    def evaluate(step: int) -> None:
        with meter.paused(), ema.applied() if ema else nullcontext():
            assert task is not None
            scores = evaluate_encoder(encoder, task, **encoding_options(config, accelerator, encoder, data)).means
        log({"step": step} | scores)
        logger.info("step %d  %s", step, "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        is_best = progress.add_scores(step, scores, config.metric_for_best_model)
        if is_best and config.load_best_model_at_end and saver.newest != step:
            save(step)

    # ---- 3. the loop: what a step is, is changed here; what it learns, in bge_core/loss.py
    meter = Meter(progress.window)
    if first_step > progress.evaluated and schedule.evaluates(first_step):  # a signal, or a kill, came before it
        evaluate(first_step)
    patience = config.early_stopping_patience or math.inf
    last_step = first_step if progress.stale >= patience else schedule.num_steps
    bar = tqdm(total=last_step, initial=first_step, desc="train", unit="step", disable=None if rank == 0 else True)
    late = reads_late(accelerator.device)
    reader = ReadAhead(data, config.dataloader_num_workers, accelerator.device if late else None)
    pending, why = None, ""
    for step, batches in enumerate(reader.steps(first_step, last_step), start=first_step + 1):
        watchdog.step_begins()
        shares = forward_backward(model, batches, settings)  # this rank's shares of the loss and of each metric
        if pending:  # the step before, while the device works at this one
            why = finish(pending)
        scaler.unscale_(optimizer)
        norm = clip_gradients(encoder.parameters(), config.max_grad_norm)
        counts = count(batches, signals=len(signals), workers_lost=reader.lost, save_failed=saver.failed())
        means = sum_figures(shares, norm, counts)  # the loop's one collective
        means["left_out"] = update_if_finite(optimizer, schedule.lr_at(step - 1 - progress.skipped), means)
        scaler.update()
        means["loss_scale"] = scaler.scale(torch.ones_like(norm))
        optimizer.zero_grad(set_to_none=True)
        pending = Reading(step, batches, means)
        if why or not late or schedule.rests(step):
            why, pending = finish(pending), None
        watchdog.step_ends()

        # An evaluation may take longer than who sent the signal waits: first what is done is saved.
        stops = bool(why) and (step < last_step or schedule.evaluates(step))
        if stops or schedule.saves(step):
            save(step)
        if stops:
            return stopped(saver, step, why, config.dataloader_num_workers)
        if schedule.evaluates(step):
            evaluate(step)
        if progress.stale >= patience:
            logger.info("stopped early: %d evaluations without a better one", progress.stale)
            break
    bar.close()

    # ---- 4. the final model
    saver.wait()
    weights = whole_copy(encoder.state_dict()) if is_sharded(model) else None
    on_main(lambda: publish(config, encoder, weights, ema, progress, manifest))
    accelerator.end_training()
    return 0


def claim_run_folder(config: TrainConfig, order: dict[str, Any], at_end: ExitStack) -> run_folder.Start:
    """Lock the run folder until the end; how this run may begin in it."""
    folder = Path(config.output_dir)
    on_main(lambda: at_end.enter_context(run_folder.lock_run_folder(folder)))
    resume, overwrite = config.resume_from_checkpoint, config.overwrite_output_dir
    return on_main(lambda: run_folder.plan_start(folder, as_dict(config), order, resume=resume, overwrite=overwrite))


def restore(
    resume: Path, seed: int, optimizer: torch.optim.Optimizer, scaler: Any, ema: ExponentialMovingAverage | None
) -> tuple[int, Progress]:
    """Put a checkpoint's state back, the random state last; (steps done, what the loop remembers)."""
    state, (rank, world_size) = checkpoint.load_checkpoint(resume), world()
    load_optimizer(optimizer, state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    if ema and "ema" in state:
        ema.load_state_dict(state["ema"])
    if len(state["random_states"]) == world_size:
        restore_random_state(state["random_states"][rank])
    else:
        seed_random_state(seed, state["step"], rank)
    logger.info("resumed from %s", resume)
    return state["step"], Progress(**state["progress"])


def open_log(
    config: TrainConfig,
    accelerator: Accelerator,
    data: TrainingData,
    opening: run_folder.Start,
    manifest: dict[str, Any],
    evaluated: int,
) -> Callable[[dict[str, Any]], None]:
    """Begin the run folder, say what the run is, begin metrics.jsonl and the tracker; what adds a line to both."""
    output_dir = Path(config.output_dir)

    def begin() -> None:
        run_folder.begin(opening)
        for line in preflight.describe_run(data, manifest["facts"]):
            logger.info(line)
        write_json(output_dir / "manifest.json", manifest | {"status": "running"})
        run_folder.cut_metrics(output_dir / "metrics.jsonl", opening.step, evaluated)

    on_main(begin)
    if config.report_to != "none":
        plain = {name: value for name, value in as_dict(config).items() if isinstance(value, (int, float, str))}
        accelerator.init_trackers("bge_core", plain)

    def log(values: dict[str, Any]) -> None:
        if world()[0] == 0:
            append_metrics(output_dir / "metrics.jsonl", values)
        accelerator.log({name: value for name, value in values.items() if name != "step"}, step=values["step"])

    return log


def figures(
    optimizer: torch.optim.Optimizer, grad_norm: float, progress: Progress, loss_scale: float | None
) -> dict[str, Any]:
    """What is logged of an update beside the means; None: without loss scaling."""
    finite = grad_norm if math.isfinite(grad_norm) else None  # of a skipped step; JSON has no infinity
    scaling = {} if loss_scale is None else {"skipped_steps": progress.skipped, "loss_scale": loss_scale}
    return {"lr": optimizer.param_groups[0]["lr"], "grad_norm": finite} | scaling


def show_step(bar: "tqdm[Any]", step: int, logged: dict[str, Any]) -> None:
    """A logged step in the progress bar; without one, in a line."""
    bar.set_postfix_str(preflight.one_line(logged))
    if bar.disable and world()[0] == 0:
        logger.info("step %d/%d  %s", step, bar.total, preflight.one_line(logged))


def stopped(saver: checkpoint.Saver, step: int, why: str, num_workers: int) -> int:
    """The exit code of a run that saves after `step` and ends before its time. UserError: for a lost worker."""
    saver.wait()
    if why == "worker":
        raise lost_worker(num_workers, step)
    logger.info("stopped by a signal after step %d; --resume_from_checkpoint latest goes on", step)
    return STOPPED_BY_SIGNAL


def count(batches: Sequence[Batch], **more: int) -> dict[str, int]:
    """This rank's queries and tokens of a step, and more counts, to be summed over the ranks."""
    tokens = sum(len(batch.tokens.input_id_T) for batch in batches)
    return {"queries": sum(batch.num_queries for batch in batches), "tokens": tokens, **more}


def encoding_options(
    config: TrainConfig, accelerator: Accelerator, encoder: Encoder, data: TrainingData
) -> dict[str, Any]:
    """How an evaluation encodes."""
    return {
        "batch_size": config.per_device_eval_batch_size,
        "precision": accelerator.mixed_precision,
        "query_prompt": encoder.settings.query_prompt,
        "passage_prompt": encoder.settings.passage_prompt,
        "query_max_len": data.query_max_len,
        "passage_max_len": data.passage_max_len,
    }


def show_batch(data: TrainingData) -> int:
    """--show_batch: print the first micro-batch; the exit code."""
    if data.rank == 0:
        print(preflight.describe_batch(data))
    return 0


def show_plan(
    data: TrainingData,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: StepSettings,
    facts: dict[str, Any],
    schedule: Schedule,
) -> int:
    """--plan: tell what the run will take; the exit code."""
    told = plan.plan_run(
        data,
        model,
        optimizer,
        settings,
        num_candidates=facts["candidates per query"],
        save_every=schedule.save_every,
        eval_every=schedule.eval_every,
        gather=gather_objects,
    )
    if world()[0] == 0:
        logger.info(text_table(("plan", ""), plan.describe(told), left=True))
        print(json.dumps(told))
    return 0


def publish(
    config: TrainConfig,
    encoder: Encoder,
    weights: dict[str, torch.Tensor] | None,
    ema: ExponentialMovingAverage | None,
    progress: Progress,
    manifest: dict[str, Any],
) -> None:
    """The final model at the root of the run folder, the best one if asked for, with card, curves and manifest."""
    output_dir = Path(config.output_dir)
    best = output_dir / f"checkpoint-{progress.best_step}"
    checkpoint.prune(output_dir, config.save_total_limit, best.name)
    use_best = config.load_best_model_at_end and best.is_dir()
    best_ema = checkpoint.load_checkpoint(best).get("ema") if ema and use_best else None
    if ema and best_ema:  # the files of the checkpoint hold the weights in training
        ema.load_state_dict(best_ema)
    with ema.applied() if ema else nullcontext():
        checkpoint.publish_model(output_dir, best if use_best and not best_ema else encoder, weights)
    scores = progress.best_scores if use_best else progress.scores
    if use_best:
        what = f"{config.metric_for_best_model} {progress.best_value:.4f}"
        logger.info("the final model is that of step %d (%s)", progress.best_step, what)
    plot_curves(output_dir / "metrics.jsonl", output_dir / "curves.png")
    base = {"base model": config.model_name_or_path, "training data": config.train_data}
    write_model_card(
        output_dir,
        title=config.run_name or output_dir.name,
        scores=scores,
        facts={**base, **manifest["facts"], "settings": changed_fields(config)},
        prompt=encoder.settings.query_prompt or "",
    )
    finished = {"status": "finished", "scores": scores, "skipped_steps": progress.skipped}
    write_json(output_dir / "manifest.json", manifest | finished)
    command = evaluation_command([config.model_name_or_path, str(output_dir)], as_dict(config))
    print(f"model: {output_dir}\nnext: {command}")


if __name__ == "__main__":
    sys.exit(main())
