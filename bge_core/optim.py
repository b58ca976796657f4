"""AdamW's parameter groups, and the learning rate as a pure function of the step."""

from collections.abc import Callable

import torch
from torch import nn
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
    fused = all(p.device.type in ("cpu", "cuda", "mps") for p in parameters)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=fused)


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
