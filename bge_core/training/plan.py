"""What a run will take, told before it: steps, candidates, memory, time, checkpoints, the largest batch that fits.

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
from bge_core.runtime.config import TrainConfig
from bge_core.runtime.log import available_memory_mb, memory_mb, reset_peak_memory
from bge_core.training.batch import Batch
from bge_core.training.data import TrainingData
from bge_core.training.step import StepSettings, forward_backward

Gather = Callable[[Any], list[Any]]
SAMPLED_ROWS, SAMPLED_STEPS = 4096, 64  # at most so many are tokenized; at least 8 steps are
TIMED_STEPS = 6


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
    return fit_line([min(points, key=lambda point: abs(point[0] - largest[0] / 2)), largest])


def expected_largest(sample: Sequence[float], num_all: int) -> float:
    """The largest of `num_all` values of which `sample` is known: mean + sd sqrt(2 ln n), at least the largest seen."""
    if num_all <= len(sample):
        return max(sample)
    return max(max(sample), statistics.fmean(sample) + statistics.pstdev(sample) * math.sqrt(2 * math.log(num_all)))


def largest_batch(memory: Line, limit: float) -> int | None:
    """The most rows whose memory, a line in them, is within the limit; None where it does not grow."""
    if memory.at(1) > limit:
        return 0
    return math.floor((limit - memory.fixed) / memory.slope) if memory.slope else None


def checkpoint_steps(num_steps: int, save_every: int, limit: int | None) -> tuple[list[int], list[int]]:
    """(steps at which a checkpoint is written, those that are left at the end); `save_every` 0: none."""
    written = list(range(save_every, num_steps + 1, save_every)) if save_every else []
    return written, written[-limit:] if limit else written


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
    sizes = [[(sum(batch.tokens.lengths), held_at_once(batch, settings)) for batch in data[step]] for step in steps]
    seconds = (time.perf_counter() - begin) / len(steps)
    sample = [
        [
            MicroBatch(step, index, *(max(size) for size in zip(*of_ranks, strict=True)))
            for index, of_ranks in enumerate(zip(*ranks, strict=True))
        ]
        for step, *ranks in zip(steps, *gather(sizes), strict=True)
    ]
    return sample, max(gather(seconds))


@dataclass(frozen=True)
class Trial:
    """Computes steps as the run would; all ranks take part, and all see the same figures. Its weights change not."""

    data: TrainingData
    model: nn.Module
    optimizer: torch.optim.Optimizer
    settings: StepSettings
    gather: Gather

    def part_of(self, micro: MicroBatch, share: float) -> Batch:
        """A share of this rank's rows of a micro-batch, one at least."""
        examples = list(self.data.examples(micro.step))[micro.index][0]
        part = examples[: max(1, round(share * len(examples)))]
        return self.data.collate(part, self.gather((len(part), sum(len(example.passages) for example in part))))

    def compute(self, micro: MicroBatch, share: float, before: Sequence[Batch] = ()) -> Measurement:
        """A step of `before` and a share of a micro-batch. UserError: the accelerator's memory did not hold it."""
        batch = self.part_of(micro, share)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        reset_peak_memory()
        begin = time.perf_counter()
        try:
            forward_backward(self.model, [*before, batch], self.settings)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), math.inf)
            self.optimizer.step()
        except torch.OutOfMemoryError:
            raise UserError(
                f"--per_device_train_batch_size {self.data.config.per_device_train_batch_size}: not even a step of "
                f"{batch.num_queries} queries fits; use --sub_batch_size, --gradient_checkpointing or shorter texts"
            ) from None
        self.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        sizes = batch.num_queries, sum(batch.tokens.lengths), held_at_once(batch, self.settings)
        own = (*sizes, time.perf_counter() - begin, memory_mb())
        return Measurement(*map(max, zip(*self.gather(own), strict=True)))


def measure_steps(
    trial: Trial, sample: Sequence[Sequence[MicroBatch]], limit_mb: float
) -> tuple[list[Measurement], list[Measurement]]:
    """Compute steps of rising size.

    With accumulation a micro-batch is measured behind one of one row, so that gradients exist while it is computed, as
    in the run; `seconds` then are without the one-row step, which is the overhead of a step: update and average of
    gradients over the ranks.

    Returns:
        (three steps of one row, of which the first warms up; steps of a quarter and half of the largest micro-batch
        and, if the line through these fits into `limit_mb`, of whole micro-batches: small to large).
    """
    micro_batches = sorted((micro for of_step in sample for micro in of_step), key=lambda micro: micro.tokens)
    largest = max(micro_batches, key=lambda micro: (micro.held, micro.tokens))
    single = [trial.compute(largest, 0.0) for _ in range(3)]
    accumulates = trial.data.plan.accumulation > 1
    overhead = statistics.fmean(m.seconds for m in single[1:]) if accumulates else 0.0
    before = [trial.part_of(largest, 0.0)] if accumulates else []

    def compute(micro: MicroBatch, share: float = 1.0) -> Measurement:
        measured = trial.compute(micro, share, before)
        return replace(measured, seconds=max(0.0, measured.seconds - overhead))

    parts = [compute(largest, 0.25), compute(largest, 0.5)]
    if memory_line([(m.held, m.peak_mb) for m in parts]).at(largest.held) > limit_mb:
        return single, parts
    places = sorted({round(place) for place in np.linspace(0, len(micro_batches) - 1, TIMED_STEPS)})
    chosen = [micro_batches[place] for place in places if micro_batches[place] != largest]
    return single, [*parts, *map(compute, [*chosen, largest])]


def plan_run(
    config: TrainConfig,
    data: TrainingData,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: StepSettings,
    *,
    num_candidates: int,
    save_every: int,
    eval_every: int,
    gather: Gather,
) -> dict[str, Any]:
    """Measure a few steps and say what the run will take.

    Args:
        config, data, model, optimizer, settings: of the run that would follow; the model in training mode.
        num_candidates: candidates of a query, N.
        save_every, eval_every: steps between two checkpoints and two evaluations; 0: none.
        gather: a value of this rank -> the values of all ranks, on every rank.

    Returns:
        What `train.py --plan` prints; memory in MB (2**20 bytes) of one process, time in seconds.
    """
    floor_mb, limit_mb = max(gather(memory_mb())), min(gather(available_memory_mb()))
    sample, load_seconds = scan(data, settings, gather)
    # no loss scaling: a step that it skips would be no measurement
    plain = replace(settings, scaler=torch.amp.GradScaler(enabled=False))
    single, measured = measure_steps(Trial(data, model, optimizer, plain, gather), sample, limit_mb)
    tensors = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    tensors += [weight for weight in model.parameters() if config.ema_decay and weight.requires_grad]
    written, kept = checkpoint_steps(data.num_steps, save_every, config.save_total_limit)
    evaluations = {*checkpoint_steps(data.num_steps, eval_every, None)[0], data.num_steps} if config.val_data else ()
    return {
        "steps": data.num_steps,
        "steps_per_epoch": data.plan.steps_per_epoch,
        "global_batch": data.plan.batch_size * data.plan.accumulation,
        "candidates": num_candidates,
        "ln_n": round(math.log(num_candidates), 4),
        **predict_memory(data, sample, [*single, *measured], floor_mb, limit_mb, cached=not settings.plain),
        **predict_time(data, sample, single, measured, load_seconds),
        "checkpoints": kept,
        "checkpoints_written": written,
        "checkpoint_mb": round(sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t)) / 2**20, 3),
        "evaluations": sorted(evaluations),
        "measured": [
            vars(m) | {"seconds": round(m.seconds, 4), "peak_mb": round(m.peak_mb, 3)} for m in [*single, *measured]
        ],
    }


def predict_memory(
    data: TrainingData,
    sample: Sequence[Sequence[MicroBatch]],
    measured: Sequence[Measurement],
    floor_mb: float,
    limit_mb: float,
    cached: bool,
) -> dict[str, Any]:
    """The peak of the run's largest micro-batch, and the most rows whose peak is within the limit.

    With GradCache (`cached`) activations do not grow with the batch.
    """
    micro_batches = [micro for of_step in sample for micro in of_step]
    num_all = round(data.num_steps * len(micro_batches) / len(sample))
    line = memory_line([(m.held, m.peak_mb) for m in measured[1:]])
    held = expected_largest([micro.held for micro in micro_batches], num_all)
    peak_mb = max(floor_mb, line.at(held), *(m.peak_mb for m in measured))
    row = 0.0 if cached else held / data.config.per_device_train_batch_size
    return {
        "memory_mb": round(peak_mb, 3),
        "fixed_mb": round(line.fixed, 3),
        "activation_mb": round(line.slope * held, 3),
        "available_mb": round(limit_mb, 3),
        "fits": peak_mb <= limit_mb,
        "largest_batch": largest_batch(Line(line.at(held if cached else 0.0), line.slope * row), limit_mb),
    }


def predict_time(
    data: TrainingData,
    sample: Sequence[Sequence[MicroBatch]],
    single: Sequence[Measurement],
    measured: Sequence[Measurement],
    load_seconds: float,
) -> dict[str, Any]:
    """Steps are computed and loaded in turn, or at the same time where other processes read ahead."""
    overhead = statistics.fmean(m.seconds for m in single[1:]) if data.plan.accumulation > 1 else 0.0
    line = fit_line([(m.tokens, m.seconds) for m in measured[2:] or measured])
    seconds = overhead + statistics.fmean(sum(line.at(micro.tokens) for micro in of_step) for of_step in sample)
    workers = data.config.dataloader_num_workers
    seconds = max(seconds, load_seconds / workers) if workers else seconds + load_seconds
    warm_up = max(0.0, single[0].seconds - single[-1].seconds)
    return {
        "seconds": round(data.num_steps * seconds + warm_up, 2),
        "seconds_cover": "the steps alone: no start, no evaluation, no saving",
        "seconds_per_step": round(seconds, 4),
        "tokens_per_step": round(statistics.fmean(sum(m.tokens for m in of_step) for of_step in sample), 1),
    }


def describe(told: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of each line of the table that people read."""
    batch = told["largest_batch"]
    lines = [
        ("steps", f"{told['steps']:,}, {told['steps_per_epoch']:,} an epoch"),
        ("queries per update", f"{told['global_batch']:,}"),
        ("candidates per query", f"{told['candidates']:,}; a random guess has the loss ln(N) = {told['ln_n']:.3f}"),
        (
            "memory of a process",
            f"{told['memory_mb']:,.0f} MB of {told['available_mb']:,.0f}: {'fits' if told['fits'] else 'DOES NOT FIT'}",
        ),
        ("  activations", f"{told['activation_mb']:,.0f} MB at the largest batch"),
        (
            "largest batch that fits",
            "any: activations do not grow with it"
            if batch is None
            else f"--per_device_train_batch_size {batch:,} (predicted)",
        ),
        (
            "time",
            f"{told['seconds']:,.1f} s ({told['seconds'] / 60:,.1f} min), {told['seconds_per_step']:.3f} s a step of "
            f"{told['tokens_per_step']:,.0f} tokens; {told['seconds_cover']}",
        ),
        ("checkpoints", f"{_steps(told['checkpoints_written'])}, {told['checkpoint_mb']:,.0f} MB each"),
        ("  left at the end", _steps(told["checkpoints"])),
        ("evaluations", _steps(told["evaluations"])),
    ]
    return lines


def _steps(steps: Sequence[int]) -> str:
    shown = [f"{step:,}" for step in steps]
    if len(steps) > 8:
        shown = [*shown[:3], f"... {shown[-1]} ({len(steps)} in all)"]
    return f"at step {', '.join(shown)}" if steps else "none"
