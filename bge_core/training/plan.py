"""What a run will take, told before it: steps, candidates, memory, time, checkpoints, the largest batch that fits.

Two lines in the number of tokens are fitted to steps that are really computed, on the run's own rows, with its own
`forward_backward` and its optimizer at learning rate 0:

    peak memory     = fixed + a * tokens held at once          (a whole micro-batch, or one GradCache chunk)
    time of a step  = b + c * tokens of its micro-batches

and read at the run's own steps, a sample of which is tokenized. Sizes rise from one row a micro-batch to whole steps,
which are computed only if the line of the smaller ones says that they fit.
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
from bge_core.runtime.log import available_memory_mb, memory_mb, reset_peak_memory
from bge_core.training.batch import Batch
from bge_core.training.data import TrainingData
from bge_core.training.step import StepSettings, forward_backward

Gather = Callable[[Any], list[Any]]
SAMPLED_ROWS, SAMPLED_STEPS = 4096, 64  # at most so many are tokenized; at least 8 steps are
WHOLE_STEPS = 5


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

    A decreasing line becomes the mean, one that would begin below 0 goes through (0, 0).
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


def checkpoint_mb(model: nn.Module, optimizer: torch.optim.Optimizer, has_average: bool) -> float:
    """Weights, what the optimizer keeps of them, and their moving average."""
    tensors = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    tensors += [weight for weight in model.parameters() if has_average and weight.requires_grad]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if torch.is_tensor(tensor)) / 2**20


@dataclass(frozen=True)
class Step:
    """A step of the run: the tokens of all its micro-batches, and those whose activations exist together.

    Of the rank that has most; `seconds` of the slowest one and the highest `peak_mb`, where it was computed.
    """

    number: int
    tokens: int
    held: int
    seconds: float = 0.0
    peak_mb: float = 0.0


def count_tokens(batches: Sequence[Batch], settings: StepSettings) -> tuple[int, int]:
    """(tokens of a step, those held at once: of its largest micro-batch or GradCache chunk)."""
    parts = [part for batch in batches for part in batch.tokens.split(settings.chunk_size, settings.max_tokens)]
    return sum(sum(batch.tokens.lengths) for batch in batches), max(sum(part.lengths) for part in parts)


def largest_of_ranks(values: tuple[float, ...], gather: Gather) -> tuple[Any, ...]:
    """The largest of each value over all ranks."""
    return tuple(max(of_ranks) for of_ranks in zip(*gather(values), strict=True))


def scan(data: TrainingData, settings: StepSettings, gather: Gather) -> tuple[list[Step], float]:
    """A sample of the run's steps, spread evenly over it, and the mean seconds to load one."""
    rows_per_step = data.config.per_device_train_batch_size * data.plan.accumulation
    count = max(8, min(SAMPLED_STEPS, SAMPLED_ROWS // rows_per_step))
    numbers = sorted({round(number) for number in np.linspace(0, data.num_steps - 1, count)})
    begin = time.perf_counter()
    counts = [count_tokens(data[number], settings) for number in numbers]
    seconds = (time.perf_counter() - begin) / len(numbers)
    steps = [Step(number, *largest_of_ranks(of_step, gather)) for number, of_step in zip(numbers, counts, strict=True)]
    return steps, max(gather(seconds))


def compute_step(
    number: int,
    share: float,
    data: TrainingData,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: StepSettings,
    gather: Gather,
) -> Step:
    """Compute a share of each micro-batch of a step, one row at least; the weights stay as they are.

    Raises:
        UserError: the accelerator's memory did not hold it.
    """
    batches = []
    for examples, _ in data.examples(number):
        part = examples[: max(1, round(share * len(examples)))]
        batches.append(data.collate(part, gather((len(part), sum(len(example.passages) for example in part)))))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    reset_peak_memory()
    begin = time.perf_counter()
    try:
        # no loss scaling: a step that it skips would be no measurement
        forward_backward(model, batches, replace(settings, scaler=torch.amp.GradScaler(enabled=False)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        optimizer.step()
    except torch.OutOfMemoryError:
        raise UserError(
            f"--per_device_train_batch_size {data.config.per_device_train_batch_size}: not even a step of "
            f"{batches[0].num_queries} queries fits; use --sub_batch_size, --gradient_checkpointing or shorter texts"
        ) from None
    optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    own = (*count_tokens(batches, settings), time.perf_counter() - begin, memory_mb())
    return Step(number, *largest_of_ranks(own, gather))


def compute_steps(sample: Sequence[Step], limit_mb: float, compute: Callable[[int, float], Step]) -> list[Step]:
    """Steps of rising size: two of one row, of which the first warms up, a quarter, half and, if these fit, whole ones.

    Args:
        sample: of the run.
        limit_mb: whole steps are computed if the line through the smaller ones says that the largest needs no more.
        compute: the number of a step and the share of its rows -> the step, computed.
    """
    largest = max(sample, key=lambda step: (step.held, step.tokens))
    parts = [compute(largest.number, share) for share in (0.0, 0.0, 0.25, 0.5)]
    if memory_line([(step.held, step.peak_mb) for step in parts[2:]]).at(largest.held) > limit_mb:
        return parts
    by_size = sorted(sample, key=lambda step: step.tokens)
    chosen = [by_size[place] for place in sorted({*np.linspace(0, len(by_size) - 1, WHOLE_STEPS).round().astype(int)})]
    return [*parts, *(compute(step.number, 1.0) for step in [*(s for s in chosen if s != largest), largest])]


def plan_run(
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
        data, model, optimizer, settings: of the run that would follow; the model in training mode.
        num_candidates: candidates of a query, N.
        save_every, eval_every: steps between two checkpoints and two evaluations; 0: none.
        gather: a value of this rank -> the values of all ranks, on every rank.

    Returns:
        What `train.py --plan` prints; memory in MB (2**20 bytes) of one process, time in seconds.
    """
    config, num_steps = data.config, data.num_steps
    floor_mb, limit_mb = max(gather(memory_mb())), min(gather(available_memory_mb()))
    sample, load_seconds = scan(data, settings, gather)
    computed = compute_steps(
        sample, limit_mb, lambda number, share: compute_step(number, share, data, model, optimizer, settings, gather)
    )

    memory = memory_line([(step.held, step.peak_mb) for step in computed[1:]])
    held = expected_largest([step.held for step in sample], num_steps)
    peak_mb = max(floor_mb, memory.at(held), *(step.peak_mb for step in computed))
    held_per_row = held / config.per_device_train_batch_size if settings.plain else 0.0
    of_rows = Line(memory.at(0.0 if settings.plain else held), memory.slope * held_per_row)

    line = fit_line([(step.tokens, step.seconds) for step in computed[4:] or computed[1:]])
    seconds = statistics.fmean(line.at(step.tokens) for step in sample)
    workers = config.dataloader_num_workers  # they load while steps are computed
    seconds = max(seconds, load_seconds / workers) if workers else seconds + load_seconds

    written, kept = checkpoint_steps(num_steps, save_every, config.save_total_limit)
    evaluations = {*checkpoint_steps(num_steps, eval_every, None)[0], num_steps} if config.val_data else ()
    return {
        "steps": num_steps,
        "steps_per_epoch": data.plan.steps_per_epoch,
        "global_batch": data.plan.batch_size * data.plan.accumulation,
        "candidates": num_candidates,
        "ln_n": round(math.log(num_candidates), 4),
        "memory_mb": round(peak_mb, 3),
        "available_mb": round(limit_mb, 3),
        "fits": peak_mb <= limit_mb,
        "largest_batch": largest_batch(of_rows, limit_mb),
        "seconds": round(num_steps * seconds, 2),
        "seconds_per_step": round(seconds, 4),
        "tokens_per_step": round(statistics.fmean(step.tokens for step in sample), 1),
        "checkpoints": kept,
        "checkpoints_written": written,
        "checkpoint_mb": round(checkpoint_mb(model, optimizer, bool(config.ema_decay)), 3),
        "evaluations": sorted(evaluations),
        "measured": [vars(step) for step in computed],
    }


def describe(told: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of each line of the table that people read."""
    batch, fits = told["largest_batch"], "fits" if told["fits"] else "DOES NOT FIT"
    any_size = "any: memory does not grow with it" if batch is None else None
    return [
        ("steps", f"{told['steps']:,}, {told['steps_per_epoch']:,} an epoch"),
        ("queries per update", f"{told['global_batch']:,}"),
        ("candidates per query", f"{told['candidates']:,}; a random guess has the loss ln(N) = {told['ln_n']:.3f}"),
        ("memory of a process", f"{told['memory_mb']:,.0f} MB of {told['available_mb']:,.0f}: {fits}"),
        ("largest batch that fits", any_size or f"--per_device_train_batch_size {batch:,} (predicted)"),
        (
            "time",
            f"{told['seconds']:,.1f} s ({told['seconds'] / 60:,.1f} min) for the steps alone, without evaluations",
        ),
        ("  a step", f"{told['seconds_per_step']:.3f} s, {told['tokens_per_step']:,.0f} tokens"),
        ("checkpoints", f"{_listed(told['checkpoints_written'])}, {told['checkpoint_mb']:,.0f} MB each"),
        ("  left at the end", _listed(told["checkpoints"])),
        ("evaluations", _listed(told["evaluations"])),
    ]


def _listed(steps: Sequence[int]) -> str:
    shown = [f"{step:,}" for step in steps]
    if len(steps) > 8:
        shown = [*shown[:3], f"... {shown[-1]} ({len(steps)} in all)"]
    return f"at step {', '.join(shown)}" if steps else "none"
