"""At which optimizer steps a run saves and evaluates, and with which learning rate: known before the first of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from bge_core.runtime.config import TrainConfig
from bge_core.training.optim import learning_rate_schedule


def steps_between(setting: float, num_steps: int) -> int:
    """Steps from one save, or evaluation, to the next by transformers' rule: below 1 a share, rounded up; 0: none."""
    return math.ceil(setting * num_steps) if 0 < setting < 1 else int(setting)


@dataclass(frozen=True)
class Schedule:
    """Of a run of `num_steps`; steps count from 1.

    Args:
        num_steps, num_warmup: optimizer steps, all and those in which the learning rate rises.
        save_every, eval_every: steps from one to the next; 0: none.
        has_task: there is something to evaluate on, if only at the end.
        lr_at: the learning rate of the update after so many updates.
    """

    num_steps: int
    num_warmup: int
    save_every: int
    eval_every: int
    has_task: bool
    lr_at: Callable[[int], float]

    @classmethod
    def of(cls, config: TrainConfig, num_steps: int) -> "Schedule":
        """What the flags say of a run of so many steps. UserError: an unknown kind of learning-rate schedule."""
        num_warmup = config.warmup_steps or math.ceil(config.warmup_ratio * num_steps)
        save_every = steps_between(config.save_steps, num_steps)
        eval_every = save_every if config.eval_steps is None else steps_between(config.eval_steps, num_steps)
        lr_at = learning_rate_schedule(config.lr_scheduler_type, config.learning_rate, num_warmup, num_steps)
        return cls(num_steps, num_warmup, save_every, eval_every, config.val_data is not None, lr_at)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`."""
        return self.save_every > 0 and step % self.save_every == 0

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after `step`."""
        return self.has_task and (step == self.num_steps or (self.eval_every > 0 and step % self.eval_every == 0))

    def rests(self, step: int) -> bool:
        """Whether something comes between `step` and the next: a checkpoint, an evaluation or the end."""
        return step == self.num_steps or self.saves(step) or self.evaluates(step)
