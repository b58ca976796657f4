"""AdamW's parameter groups, the learning rate as a pure function of the step, a moving average of the weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import get_scheduler

from bge_core import UserError


def build_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; matrices decay, biases and norms (one-dimensional) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)


def update_if_finite(optimizer: torch.optim.AdamW, learning_rate: float, figures: Mapping[str, Tensor]) -> Tensor:
    """One update, unless loss or gradient is NaN or infinite: then weights, moments and their count stay as they are.

    The device decides, so that nobody waits for it.

    Args:
        optimizer: a fused one.
        learning_rate: of this update.
        figures: has "loss" and "grad_norm", scalars on its device, the same on every rank.

    Returns:
        1.0 where it was left out, else 0.0; on the device.

    Source: torch.amp.GradScaler.step, which tells a fused optimizer by the same attribute.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    left_out = torch.stack([figures["loss"], figures["grad_norm"]]).isfinite().all().logical_not().float()
    optimizer.found_inf = left_out  # type: ignore[attr-defined]
    optimizer.step()
    return left_out


def learning_rate_schedule(
    name: str, learning_rate: float, num_warmup_steps: int, num_training_steps: int
) -> Callable[[int], float]:
    """lr_at(updates): the learning rate of the update after `updates` updates, by transformers' scheduler of that name.

    Raises:
        UserError: a name that transformers lacks, or a schedule that depends on more than the step.
    """
    dummy = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
    try:
        scheduler = get_scheduler(name, dummy, num_warmup_steps, num_training_steps)
        factor = scheduler.lr_lambdas[0]
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"--lr_scheduler_type {name!r}: use linear, cosine, cosine_with_restarts, polynomial, constant, "
            f"constant_with_warmup or inverse_sqrt ({error})"
        ) from None
    return lambda updates: learning_rate * float(factor(updates))


class ExponentialMovingAverage:
    """A moving average of the weights over the updates, float32 and on their device, beside the weights in training.

        theta_ema <- d_t theta_ema + (1 - d_t) theta,    d_t = min(d, (1 + t) / (10 + t))    after update t = 1, 2, ...

    It begins as the initial weights, and the smaller d_t of the first updates let go of them; later it is the mean over
    about the last 1 / (1 - d) updates. It follows from the weights alone, so every rank of DDP has the same one without
    communication. It costs 4 bytes a trainable parameter and one pass over them an update.

    Args:
        model: on its device; what needs no gradient does not change and is not kept.
        decay: d, above 0 and below 1.

    Source: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging", in the exponential form;
        d_t is that of TensorFlow's tf.train.ExponentialMovingAverage, with num_updates = t.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def update(self) -> None:
        """Take in the weights, after an optimizer update."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        get_ema_multi_avg_fn(decay)(list(self.average.values()), list(self.weights.values()), self.num_updates)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model has the average for its weights; behind it, its own again, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, weight in self.weights.items():  # in place: DDP and the optimizer hold the same tensors
            own = weight.clone()
            weight.copy_(self.average[name])
            self.average[name].copy_(own)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on to the same bits."""
        return {"num_updates": self.num_updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same parameters."""
        self.num_updates = state["num_updates"]
        for name, average in self.average.items():
            average.copy_(state["average"][name])
