"""Dropout on a CPU: the right share of zeros, each entry by itself, the expectation kept, replayed by the generator."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bge_core.encoder.dropout import Dropout, dropout, replace_dropout
from bge_core.encoder.load import load_encoder

P = [0.1, 0.5, 0.9]


@pytest.mark.parametrize("p, kept", [(2**-20, 1000), (1 - 2**-20, 0)])
def test_shares_near_0_and_1_do_not_overflow(p: float, kept: int) -> None:
    torch.manual_seed(0)
    assert int((dropout(torch.ones(1000), p) != 0).sum()) == kept


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("shape", [(1_000_003,), (1000, 1001)])
def test_a_share_of_p_is_dropped_and_the_mean_stays(p: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    y = dropout(torch.ones(shape, dtype=torch.float64), p)
    count, sigma = y.numel(), (p * (1 - p) / y.numel()) ** 0.5
    assert abs((y == 0).sum().item() / count - p) < 5 * sigma + 2**-16
    assert abs(y.mean().item() - 1) < 5 * sigma / (1 - p)
    kept = y[y != 0].unique()
    assert len(kept) == 1 and kept.item() == pytest.approx(1 / (1 - p), rel=2e-4)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("distance", [1, 2, 3, 4, 1000])
def test_entries_are_independent(p: float, distance: int) -> None:
    """Four of them come from one draw: pairs at any distance are dropped together in p^2 of the cases."""
    torch.manual_seed(1)
    drops = (dropout(torch.ones(1_000_000), p) == 0).double()
    both = (drops[:-distance] * drops[distance:]).mean().item()
    assert abs(both - p * p) < 5 * (p * p * (1 - p * p) / 1e6) ** 0.5 + 2 * p * 2**-16


def test_each_of_the_four_entries_of_a_draw_has_its_share() -> None:
    torch.manual_seed(2)
    drops = (dropout(torch.ones(1_000_000), 0.3) == 0).double().view(-1, 4).mean(0)
    assert (drops - 0.3).abs().max() < 5 * (0.3 * 0.7 / 250_000) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_is_the_factor_of_each_entry(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x = torch.rand(7, 13, dtype=dtype).add_(1).requires_grad_()
    y = dropout(x, 0.4)
    y.sum().backward()
    assert y.dtype == dtype and x.grad is not None
    torch.testing.assert_close(x.grad, y.detach() / x.detach(), rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=0)


def test_the_generators_state_decides() -> None:
    x = torch.ones(1001)
    state = torch.get_rng_state()
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.set_rng_state(state)
    assert torch.equal(dropout(x, 0.5), first) and not torch.equal(first, second)
    assert dropout(torch.ones(0, 3), 0.5).shape == (0, 3)


def test_the_module_is_off_in_eval_mode_and_without_p() -> None:
    x = torch.ones(100)
    assert Dropout(0.5).eval()(x) is x and Dropout(0.0)(x) is x
    assert (Dropout(0.5)(x) == 0).any()


def test_every_dropout_of_a_model_is_replaced(tiny_bert_dropout: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.2)), nn.Dropout(0.3)).eval()
    replace_dropout(model)
    assert [type(m) for m in model.modules() if isinstance(m, nn.Dropout)] == [Dropout, Dropout]
    assert model[1][0].p == 0.2 and not model[2].training
    encoder = load_encoder(tiny_bert_dropout)
    assert {type(m) for m in encoder.modules() if isinstance(m, nn.Dropout)} == {Dropout}
