"""Parameter groups, and the learning rate against transformers' schedulers stepped one by one."""

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from bge_core import UserError
from bge_core.optim import build_optimizer, learning_rate_schedule

NAMES = [
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
]  # fmt: skip


@pytest.mark.parametrize("num_warmup", [0, 1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_lr_is_that_of_transformers_stepped(name: str, num_warmup: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(name, optimizer, num_warmup, 20)
    lr_at = learning_rate_schedule(name, 3e-4, num_warmup, 20)
    for updates in range(20):
        assert lr_at(updates) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-18)
        optimizer.step()
        scheduler.step()


def test_lr_by_hand() -> None:
    lr_at = learning_rate_schedule("linear", 1.0, 2, 6)
    assert [lr_at(updates) for updates in range(7)] == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert lr_at(2) == 1.0, "a pure function: asked again, the same"


@pytest.mark.parametrize("name", ["linnear", "", "reduce_lr_on_plateau"])
def test_a_scheduler_that_is_none_of_them_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--lr_scheduler_type {name!r}: use linear, cosine"):
        learning_rate_schedule(name, 1.0, 0, 10)


def test_matrices_decay_biases_norms_and_frozen_ones_do_not() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    model[2].weight.requires_grad_(False)
    optimizer = build_optimizer(model, 0.1, 0.5, (0.8, 0.9), 1e-6)
    decayed, others = optimizer.param_groups
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)] and decayed["weight_decay"] == 0.5
    assert {id(p) for p in others["params"]} == {id(p) for p in (model[0].bias, *model[1].parameters(), model[2].bias)}
    assert others["weight_decay"] == 0.0
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.9), 1e-6)


def test_decay_is_decoupled() -> None:
    """With no gradient: w <- w * (1 - lr * decay)."""
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, 2.0)
    nn.init.constant_(layer.bias, 2.0)
    optimizer = build_optimizer(layer, 0.1, 0.5, (0.9, 0.999), 1e-8)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert layer.weight.item() == pytest.approx(1.9) and layer.bias.item() == 2.0
