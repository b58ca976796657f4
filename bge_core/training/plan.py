"""What a run will take, told before it: steps, candidates, traffic, memory, time, checkpoints.

Two lines in the number of tokens are fitted to steps that are really computed, on the run's own rows, with its own
`forward_backward` and its optimizer at learning rate 0:

    peak memory     = fixed + a * tokens held at once          (a whole micro-batch, or one GradCache chunk)
    time of a step  = overhead + sum over its micro-batches of (b + c * tokens)

and read at the tokens of the run's own steps, a sample of which is tokenized. Sizes rise from one row to the whole
micro-batch, which is computed only if the line of the smaller ones says that it fits.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from bge_core import UserError
from bge_core.loss import LossConfig, rows_per_block
from bge_core.runtime.config import TrainConfig
from bge_core.runtime.log import available_memory_mb, memory_mb, reset_peak_memory
from bge_core.training.batch import Batch
from bge_core.training.data import Example, TrainingData
from bge_core.training.step import StepSettings, forward_backward

Gather = Callable[[Any], list[Any]]
MB = 2**20
SAMPLED_ROWS, SAMPLED_STEPS = 4096, 64  # at most so many are tokenized; at least 8 steps are
TIMED_STEPS = 6

# What the loss holds, as measured on one of 1,024 to 3,000 queries: vectors, gathered vectors and their gradients; and
# for each score of a block of rows the score, its masked copy, its gradient and the masks.
VECTOR_COPIES, SCORE_BYTES = 6, 24


@dataclass(frozen=True)
class Line:
    """y = fixed + slope * x."""

    fixed: float
    slope: float

    def at(self, x: float) -> float:
        """y at x."""
        return self.fixed + self.slope * x


def fit_line(points: Sequence[tuple[float, float]]) -> Line:
    """The least-squares line through (x, y) that neither falls nor begins below 0.

    A falling line becomes the mean, one that would begin below 0 goes through (0, 0).
    """
    x, y = np.array(points, dtype=float).T
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread else 0.0
    if slope <= 0:
        return Line(float(y.mean()), 0.0)
    fixed = float(y.mean()) - slope * float(x.mean())
    return Line(fixed, slope) if fixed >= 0 else Line(0.0, float((x * y).sum() / (x**2).sum()))


def memory_line(points: Sequence[tuple[float, float]]) -> Line:
    """The line through the largest (tokens, MB) and the one whose tokens are nearest to half of it.

    Small steps lie above the line, for their peak is the update, when gradients exist and activations do not.
    """
    largest = max(points)
    half = min(points, key=lambda point: abs(point[0] - largest[0] / 2))
    return fit_line([half, largest])


def checkpoint_steps(num_steps: int, save_every: int, limit: int | None) -> tuple[list[int], list[int]]:
    """(steps at which a checkpoint is written, those that are left at the end); `save_every` 0: none."""
    written = list(range(save_every, num_steps + 1, save_every)) if save_every else []
    return written, written[-limit:] if limit else written


def gather_bytes(
    num_queries: int, num_passages: int, embedding_size: int, *, query_gradient: bool = False
) -> dict[str, int]:
    """What one gather of a micro-batch holds on each rank; a rank receives (W - 1) / W of it.

        forward  = 4 D (M + N) + 8 N          float32 vectors of queries and passages, int64 hashes of the passages
        backward = 4 D N (+ 4 D M)            gradients of the passages, and of the queries where the loss uses them

    Args:
        num_queries, num_passages: M and N, of all ranks.
        embedding_size: D.
        query_gradient: the loss uses the other ranks' queries, which the built-in one does not.
    """
    forward = 4 * embedding_size * (num_queries + num_passages) + 8 * num_passages
    backward = 4 * embedding_size * (num_passages + num_queries * query_gradient)
    return {"forward": forward, "backward": backward}


def loss_bytes(num_queries: int, num_candidates: int, embedding_size: int, loss_config: LossConfig) -> int:
    """About what the loss holds at its peak for B queries of this rank and N candidates."""
    vectors = VECTOR_COPIES * 4 * embedding_size * (num_queries + num_candidates)
    return vectors + SCORE_BYTES * rows_per_block(num_queries, num_candidates, loss_config) * num_candidates


def largest_batch(memory_at: Callable[[int], float], limit: float) -> int:
    """The most rows whose memory is within the limit, for a memory that grows with them; 0: not even one."""
    low, high = 0, 1
    while memory_at(high) <= limit and high < 2**24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if memory_at(middle) <= limit else (low, middle)
    return low


def expected_largest(sample: Sequence[float], num_all: int) -> float:
    """The largest of `num_all` values of which `sample` is known: mean + sd sqrt(2 ln n), at least the largest seen."""
    if num_all <= len(sample):
        return max(sample)
    return max(max(sample), statistics.fmean(sample) + statistics.pstdev(sample) * math.sqrt(2 * math.log(num_all)))


@dataclass(frozen=True)
class MicroBatch:
    """Where a micro-batch is in the run, and its tokens (of the rank that has most): all, and those held at once."""

    step: int
    index: int
    tokens: int
    held: int


@dataclass(frozen=True)
class Measurement:
    """One computed step: the rows and tokens of its micro-batch, seconds of the slowest rank, the highest peak."""

    rows: int
    tokens: int
    held: int
    seconds: float
    peak_mb: float


def held_at_once(batch: Batch, settings: StepSettings) -> int:
    """Tokens whose activations exist together: of the whole micro-batch, or of the largest GradCache chunk."""
    return max(sum(part.lengths) for part in batch.tokens.split(settings.chunk_size, settings.max_tokens))


def scan(data: TrainingData, settings: StepSettings, gather: Gather) -> tuple[list[list[MicroBatch]], float]:
    """The micro-batches of a sample of the run's steps, spread evenly over it, and the mean seconds to load a step."""
    rows_per_step = data.config.per_device_train_batch_size * data.plan.accumulation
    count = max(8, min(SAMPLED_STEPS, SAMPLED_ROWS // rows_per_step))
    steps = sorted({round(step) for step in np.linspace(0, data.num_steps - 1, count)})
    begin = time.perf_counter()
    sizes = [
        [(sum(batch.tokens.lengths), held_at_once(batch, settings)) for batch in micro_batches]
        for micro_batches in map(data.__getitem__, steps)
    ]
    seconds = (time.perf_counter() - begin) / len(steps)
    largest = np.max(gather([size for of_step in sizes for size in of_step]), axis=0).tolist()
    places = [(step, index) for step, of_step in zip(steps, sizes, strict=True) for index in range(len(of_step))]
    flat = [MicroBatch(*place, *map(int, size)) for place, size in zip(places, largest, strict=True)]
    return [[micro for micro in flat if micro.step == step] for step in steps], max(gather(seconds))


def measure_steps(
    data: TrainingData,
    sample: Sequence[Sequence[MicroBatch]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: StepSettings,
    limit_mb: float,
    gather: Gather,
) -> tuple[list[Measurement], list[Measurement]]:
    """Compute steps of rising size. All ranks take part, and all see the same figures.

    With accumulation a micro-batch is measured behind one of one row, so that gradients exist while it is computed, as
    in the run; `seconds` then are without the one-row step, which is the overhead of a step: update and average of
    gradients over the ranks.

    Returns:
        (three steps of one row, of which the first warms up; steps of a quarter and half of the largest micro-batch
        and, if the line through these fits into `limit_mb`, of whole micro-batches: small to large).

    Raises:
        UserError: the accelerator's memory did not hold one of them.
    """
    for group in optimizer.param_groups:  # the weights stay as they are
        group["lr"] = 0.0
    micro_batches = sorted((micro for of_step in sample for micro in of_step), key=lambda micro: micro.tokens)
    largest = max(micro_batches, key=lambda micro: (micro.held, micro.tokens))
    accumulates = data.plan.accumulation > 1

    def part_of(examples: Sequence[Example], share: float) -> Batch:
        """A micro-batch of a share of this rank's examples, one at least."""
        part = examples[: max(1, round(share * len(examples)))]
        return data.collate(part, gather((len(part), sum(len(example.passages) for example in part))))

    def compute(micro: MicroBatch, share: float, lead: Sequence[Batch] = ()) -> Measurement:
        batch = part_of(list(data.examples(micro.step))[micro.index][0], share)
        reset_peak_memory()
        begin = time.perf_counter()
        try:
            forward_backward(model, [*lead, batch], settings)
            torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
            optimizer.step()
        except torch.OutOfMemoryError:
            raise UserError(
                f"--per_device_train_batch_size {data.config.per_device_train_batch_size}: not even a step of "
                f"{batch.num_queries} queries fits; use --sub_batch_size, --gradient_checkpointing or shorter texts"
            ) from None
        optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        mine = (
            batch.num_queries,
            sum(batch.tokens.lengths),
            held_at_once(batch, settings),
            time.perf_counter() - begin,
            memory_mb(),
        )
        return Measurement(*map(max, zip(*gather(mine), strict=True)))

    single = [compute(largest, 0.0) for _ in range(3)]
    overhead = statistics.fmean(m.seconds for m in single[1:]) if accumulates else 0.0
    lead = [part_of(next(data.examples(largest.step))[0], 0.0)] if accumulates else []

    def micro_step(micro: MicroBatch, share: float = 1.0) -> Measurement:
        measured = compute(micro, share, lead)
        return Measurement(**{**vars(measured), "seconds": max(0.0, measured.seconds - overhead)})

    parts = [micro_step(largest, 0.25), micro_step(largest, 0.5)]
    if memory_line([(m.held, m.peak_mb) for m in parts]).at(largest.held) > limit_mb:
        return single, parts
    places = {round(place) for place in np.linspace(0, len(micro_batches) - 1, TIMED_STEPS)}
    chosen = [micro_batches[place] for place in sorted(places) if micro_batches[place] != largest]
    return single, [*parts, *map(micro_step, [*chosen, largest])]


def plan_run(
    config: TrainConfig,
    data: TrainingData,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: StepSettings,
    *,
    embedding_size: int,
    num_candidates: int,
    save_every: int,
    eval_every: int,
    gather: Gather,
) -> dict[str, Any]:
    """Measure a few steps and say what the run will take.

    Args:
        config, data, model, optimizer, settings: of the run that would follow; the model in training mode.
        embedding_size: D.
        num_candidates: candidates of a query, N.
        save_every, eval_every: steps between two checkpoints and two evaluations; 0: none.
        gather: a value of this rank -> the values of all ranks, on every rank.

    Returns:
        What `train.py --plan` prints; memory in MB (2**20 bytes) of one process, time in seconds.
    """
    floor_mb = max(gather(memory_mb()))
    limit_mb = min(gather(available_memory_mb()))
    batch_size, group_size = config.per_device_train_batch_size, config.train_group_size
    # no loss scaling: a step that it skips would be no measurement
    plain = replace(settings, scaler=torch.amp.GradScaler(enabled=False))
    sample, load_seconds = scan(data, settings, gather)
    single, measured = measure_steps(data, sample, model, optimizer, plain, limit_mb, gather)
    whole = measured[2:]

    # ---- time
    overhead = statistics.fmean(m.seconds for m in single[1:]) if data.plan.accumulation > 1 else 0.0
    time_line = fit_line([(m.tokens, m.seconds) for m in whole or measured])
    compute_seconds = overhead + statistics.fmean(
        sum(time_line.at(micro.tokens) for micro in micro_batches) for micro_batches in sample
    )
    workers = config.dataloader_num_workers
    step_seconds = max(compute_seconds, load_seconds / workers) if workers else compute_seconds + load_seconds
    warm_up = max(0.0, single[0].seconds - single[-1].seconds)

    # ---- memory
    sizes = [micro for micro_batches in sample for micro in micro_batches]
    num_micro_batches = round(data.num_steps * len(sizes) / len(sample))
    largest_held = expected_largest([micro.held for micro in sizes], num_micro_batches)
    line = memory_line([(m.held, m.peak_mb) for m in [*single[1:], *measured]])
    peak_mb = max(floor_mb, line.at(largest_held), *(m.peak_mb for m in [*single, *measured]))
    tokens_per_row = expected_largest([micro.tokens for micro in sizes], num_micro_batches) / batch_size
    num_together = data.world_size if settings.cross_device else 1

    def loss_mb(rows: int) -> float:
        return loss_bytes(rows, rows * num_together * group_size, embedding_size, settings.loss_config) / MB

    def memory_at(rows: int) -> float:
        held = rows * tokens_per_row if settings.plain else min(rows * tokens_per_row, largest_held)
        return line.at(held) + loss_mb(rows) - loss_mb(batch_size)

    trainable = [p for p in model.parameters() if p.requires_grad]
    states = [s for state in optimizer.state.values() for s in state.values() if isinstance(s, torch.Tensor)]
    parameters_mb = _mb(model.parameters())
    optimizer_mb = _mb(states)
    average_mb = _mb(trainable) if config.ema_decay else 0.0

    # ---- checkpoints
    written, kept = checkpoint_steps(data.num_steps, save_every, config.save_total_limit)
    evaluations = checkpoint_steps(data.num_steps, eval_every, None)[0] if config.val_data else []
    if config.val_data and data.num_steps not in evaluations:
        evaluations.append(data.num_steps)
    gathered = {"forward": 0, "backward": 0}
    if settings.cross_device and data.world_size > 1:
        gathered = gather_bytes(
            data.plan.batch_size, data.plan.batch_size * group_size, embedding_size, query_gradient=bool(config.loss)
        )
    return {
        "steps": data.num_steps,
        "steps_per_epoch": data.plan.steps_per_epoch,
        "global_batch": data.plan.batch_size * data.plan.accumulation,
        "candidates": num_candidates,
        "ln_n": round(math.log(num_candidates), 4),
        "gather_bytes": gathered,
        "memory_mb": round(peak_mb, 3),
        "fixed_mb": round(line.fixed, 3),
        "activation_mb": round(line.slope * largest_held, 3),
        "parameters_mb": round(parameters_mb, 3),
        "gradients_mb": round(_mb(trainable), 3),
        "optimizer_mb": round(optimizer_mb, 3),
        "available_mb": round(limit_mb, 3),
        "fits": peak_mb <= limit_mb,
        "largest_batch": largest_batch(memory_at, limit_mb),
        "seconds": round(data.num_steps * step_seconds + warm_up, 2),
        "seconds_cover": "the steps alone: no start, no evaluation, no saving",
        "seconds_per_step": round(step_seconds, 4),
        "tokens_per_step": round(statistics.fmean(sum(m.tokens for m in of_step) for of_step in sample), 1),
        "checkpoints": kept,
        "checkpoints_written": written,
        "checkpoint_mb": round(parameters_mb + optimizer_mb + average_mb, 3),
        "evaluations": evaluations,
        "best_checkpoint_among": evaluations if config.load_best_model_at_end else [],
        "measured": [
            vars(m) | {"seconds": round(m.seconds, 4), "peak_mb": round(m.peak_mb, 3)} for m in [*single, *measured]
        ],
    }


def _mb(tensors: Any) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / MB


def describe(told: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of each line of the table that people read."""
    gather, minutes = told["gather_bytes"], told["seconds"] / 60
    fits = "fits" if told["fits"] else "DOES NOT FIT"
    lines = [
        ("steps", f"{told['steps']:,}, {told['steps_per_epoch']:,} an epoch"),
        ("queries per update", f"{told['global_batch']:,}"),
        ("candidates per query", f"{told['candidates']:,}; a random guess has the loss ln(N) = {told['ln_n']:.3f}"),
        ("gather per micro-batch", f"{gather['forward']:,} bytes forward, {gather['backward']:,} backward"),
        ("memory of a process", f"{told['memory_mb']:,.0f} MB of {told['available_mb']:,.0f}: {fits}"),
        (
            "  fixed",
            f"{told['fixed_mb']:,.0f} MB, with {told['parameters_mb']:,.0f} of weights and "
            f"{told['optimizer_mb']:,.0f} of optimizer",
        ),
        ("  activations", f"{told['activation_mb']:,.0f} MB at the largest batch"),
        ("largest batch that fits", f"--per_device_train_batch_size {told['largest_batch']:,} (predicted)"),
        (
            "time",
            f"{told['seconds']:,.1f} s ({minutes:,.1f} min), {told['seconds_per_step']:.3f} s a step of "
            f"{told['tokens_per_step']:,.0f} tokens; {told['seconds_cover']}",
        ),
        ("checkpoints", _steps(told["checkpoints_written"]) + f", {told['checkpoint_mb']:,.0f} MB each"),
        ("  left at the end", _steps(told["checkpoints"])),
    ]
    if told["evaluations"]:
        lines.append(("evaluations", _steps(told["evaluations"])))
    if told["best_checkpoint_among"]:
        lines.append(("  best checkpoint", "that of the best evaluation stays, too; it counts as one of the limit"))
    return lines


def _steps(steps: Sequence[int]) -> str:
    shown = ", ".join(f"{step:,}" for step in steps) if len(steps) <= 8 else ""
    if len(steps) > 8:
        shown = ", ".join(f"{step:,}" for step in steps[:3]) + f", ... {steps[-1]:,} ({len(steps)} in all)"
    return f"at step {shown}" if steps else "none"
