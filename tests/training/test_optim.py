"""Parameter groups, the learning rate against transformers' schedulers stepped one by one, the moving average."""

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from bge_core import UserError
from bge_core.training.optim import ExponentialMovingAverage, build_optimizer, learning_rate_schedule

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


def test_a_moving_average_is_its_float64_reference() -> None:
    """Over 120 real updates: the warm-up ends at the 8th, at the 80th, and never."""
    torch.manual_seed(0)
    for decay in (0.5, 0.9, 0.9999):
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        optimizer = build_optimizer(model, 0.05, 0.01, (0.9, 0.999), 1e-8)
        slow = [p.detach().double() for p in model.parameters()]
        ema = ExponentialMovingAverage(model, decay)
        for t in range(1, 121):
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            d = min(decay, (1 + t) / (10 + t))
            slow = [d * a + (1 - d) * p.detach().double() for a, p in zip(slow, model.parameters(), strict=True)]
        for average, expected in zip(ema.average.values(), slow, strict=True):
            assert average.dtype == torch.float32
            torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_moving_average_by_hand() -> None:
    """d_1 = 2/11, d_2 = 3/12, d_3 = min(0.3, 4/13)."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 11.0)
    ema = ExponentialMovingAverage(layer, 0.3)
    for weight, expected in ((0.0, 2.0), (4.0, 3.5), (0.0, 1.05)):
        nn.init.constant_(layer.weight, weight)
        ema.update()
        assert ema.average["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_the_average_takes_the_models_place_and_gives_it_back() -> None:
    """In the same tensors, bit for bit, also when what is done meanwhile fails; what is frozen is not kept."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[1].weight.requires_grad_(False)
    ema = ExponentialMovingAverage(model, 0.9)
    assert list(ema.average) == ["0.weight", "0.bias", "1.bias"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) + 1)
    ema.update()
    own = {name: value.clone() for name, value in model.state_dict().items()}
    average = {name: value.clone() for name, value in ema.average.items()}
    places = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(ZeroDivisionError), ema.applied():
        assert all(torch.equal(model.state_dict()[name], value) for name, value in average.items())
        assert torch.equal(model[1].weight, own["1.weight"])
        raise ZeroDivisionError
    assert all(torch.equal(model.state_dict()[name], value) for name, value in own.items())
    assert all(torch.equal(ema.average[name], value) for name, value in average.items())
    assert places == [parameter.data_ptr() for parameter in model.parameters()]


def test_a_moving_average_goes_on_from_its_state() -> None:
    model = nn.Linear(2, 2)
    one, other = ExponentialMovingAverage(model, 0.9), ExponentialMovingAverage(model, 0.9)
    for step in range(6):
        nn.init.constant_(model.weight, float(step))
        one.update()
        if step == 2:
            other.load_state_dict(one.state_dict())
        elif step > 2:
            other.update()
    assert other.num_updates == 6 and torch.equal(one.average["weight"], other.average["weight"])
    assert one.average["weight"].data_ptr() != other.average["weight"].data_ptr()
