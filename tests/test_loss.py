"""bge_core/loss.py against the slow float64 truth of tests/reference.py, in value and in gradient."""

import ast
import inspect
import math
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Batch, loss_input, make_batch, rank_rows, reference_loss, reference_metrics
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bge_core.loss
from bge_core.loss import LossConfig, LossInput, LossOutput, by_row_blocks, info_nce, negative_mask, training_loss
from bge_core.training import build

MODES: dict[str, dict[str, Any]] = {
    "info_nce": {},
    "no_in_batch": {"in_batch_negatives": False},
    "kl_div": {"distillation": "kl_div"},
    "m3_kd_loss": {"distillation": "m3_kd_loss"},
    "kl_div_no_in_batch": {"distillation": "kl_div", "in_batch_negatives": False},
    "m3_kd_loss_no_in_batch": {"distillation": "m3_kd_loss", "in_batch_negatives": False},
    "matryoshka": {"mrl_dims": (2, 8, 4)},
    "matryoshka_kl_div": {"mrl_dims": (8, 3), "distillation": "kl_div"},
    "matryoshka_m3_kd_loss": {"mrl_dims": (8, 3), "distillation": "m3_kd_loss"},
    "inner_product": {"normalize": False, "mrl_dims": (8, 3), "temperature": 1.0},
}
GROUPS: dict[str, int | tuple[int, ...]] = {
    "equal": 3,
    "uneven": (4, 2, 3, 2, 3),
    "some_without_negatives": (1, 3, 1, 4, 2),
}


def run_loss(batch: Batch, config: dict[str, Any], **view: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Value and gradients of the built-in loss on fresh leaves of this batch."""
    leaves = batch.leaves(batch.query_MD.dtype)
    loss = training_loss(loss_input(leaves, teacher="distillation" in config, **view), LossConfig(**config)).loss
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), leaves.gradients()


def run_reference(batch: Batch, config: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    leaves = batch.leaves(batch.query_MD.dtype)
    loss = reference_loss(leaves.query_MD, leaves.passages, leaves.rows, **config)
    loss.backward()
    return loss.detach(), leaves.gradients()


def assert_close(got: Tensor, want: Tensor, rtol: float) -> None:
    """Within `rtol` of the largest entry, or of 1 where all are smaller.

    An entry that cancels to nothing has no relative accuracy of its own: a score of 50 (a cosine of 1 at temperature
    0.02) is itself rounded by 2e-6 in float32.
    """
    want = want.double()
    atol = rtol * max(1.0, want.abs().max().item())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)


# -------------------------------------------------------------------------------------- against the reference, one rank


def rounded_batch(mode: str, groups: str) -> Batch:
    """Numbers that float32 can hold, in float64: one truth for both."""
    return make_batch(3, 5, GROUPS[groups], dim=8, unit=mode != "inner_product").leaves(torch.float32).leaves()


@cache
def truth(mode: str, groups: str, exclude: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return run_reference(rounded_batch(mode, groups), {**MODES[mode], "exclude_positives": exclude})


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("exclude", [True, False], ids=["exclude", "keep"])
@pytest.mark.parametrize("mode", MODES)
def test_value_and_gradient_are_those_of_the_reference(
    mode: str, exclude: bool, groups: str, dtype: torch.dtype, rtol: float
) -> None:
    want, want_gradients = truth(mode, groups, exclude)
    batch = rounded_batch(mode, groups).leaves(dtype)
    for padding, block_size in ((0, 0), (2, 0), (0, 1), (0, 2), (2, 3), (0, 4)):
        config = {**MODES[mode], "exclude_positives": exclude, "block_size": block_size}
        got, got_gradients = run_loss(batch, config, padding=padding)
        assert got.dtype == dtype
        assert_close(got, want, rtol)
        for got_gradient, want_gradient in zip(got_gradients, want_gradients, strict=True):
            assert_close(got_gradient, want_gradient, rtol)


@pytest.mark.parametrize("mode", ["info_nce", "kl_div", "m3_kd_loss"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_whose_own_negatives_alone_count(world_size: int, mode: str) -> None:
    """In one batch with rows that have everybody's; loss, gradient and metrics of all ranks together."""
    batch = make_batch(5, 5, (3, 2, 1, 4, 2))
    batch = replace(batch, rows=[replace(row, own_only=i in (0, 2, 3)) for i, row in enumerate(batch.rows)]).leaves()
    want, gradients = run_reference(batch, MODES[mode])
    metrics = reference_metrics(batch.query_MD, batch.passages, batch.rows)
    for block_size in (0, 1, 2):
        total, got = torch.zeros((), dtype=torch.float64), [torch.zeros_like(gradient) for gradient in gradients]
        found = dict.fromkeys(metrics, 0.0)
        for rank, here in enumerate(rank_rows(5, world_size)):
            config = LossConfig(**MODES[mode], block_size=block_size)
            leaves = batch.leaves()
            output = training_loss(loss_input(leaves, rank, world_size), config)
            (output.loss * len(here) / 5).backward()
            total += output.loss.detach() * len(here) / 5
            got = [sum_of + more for sum_of, more in zip(got, leaves.gradients(), strict=True)]
            found = {name: found[name] + output.metrics[name].item() * len(here) / 5 for name in found}
        assert_close(total, want, 1e-9)
        for got_gradient, want_gradient in zip(got, gradients, strict=True):
            assert_close(got_gradient, want_gradient, 1e-9)
        assert found == pytest.approx(metrics, rel=1e-9)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation made within it, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return made


@pytest.mark.parametrize("mode", ["info_nce", "no_in_batch", "kl_div", "m3_kd_loss", "matryoshka"])
def test_blocks_of_rows_never_make_the_whole_matrix(mode: str) -> None:
    """No score, no mask, no gradient of B x N: the largest thing is a block, or the vectors themselves."""
    sizes = {}
    for block_size in (0, 4):
        leaves = make_batch(1, 40, 3, dim=8).leaves()  # 40 x 120 scores, 120 x 8 numbers
        with LargestTensor() as largest:
            x = loss_input(leaves, teacher="distillation" in MODES[mode])
            training_loss(x, LossConfig(**MODES[mode], block_size=block_size)).loss.backward()
        sizes[block_size] = largest.size
    assert sizes[0] >= 40 * 120
    assert sizes[4] <= 120 * 8 + 8


def test_the_default_block_is_chosen_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole where it is small; else as many rows as make a block of about the default size."""
    seen: list[int] = []

    def row_losses(scores: list[Tensor], rows: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(len(scores[0]))
        return scores[0].sum(dim=1), {}

    x = loss_input(make_batch(1, 10, 3).leaves())
    by_row_blocks([(x.query_BD, x.candidate_ND)], row_losses, x, LossConfig())
    monkeypatch.setattr(bge_core.loss, "DEFAULT_BLOCK_SCORES", 4 * 30 - 1)
    by_row_blocks([(x.query_BD, x.candidate_ND)], row_losses, x, LossConfig())
    by_row_blocks([(x.query_BD, x.candidate_ND)], row_losses, x, LossConfig(block_size=0))
    assert seen == [10, 4, 4, 2, 10]


def test_random_batches_hold_what_is_hard() -> None:
    """The comparison above is worth something only if these cases occur in it."""
    batch = make_batch(3, 5, 3, dim=8)
    ids, rows = batch.ids, batch.rows
    positives = [ids[row.own[0]] for row in rows]
    foreign = [{ids[j] for other in rows if other is not row for j in other.own[1:]} for row in rows]
    assert positives[0] == positives[1], "two rows have the same positive"
    assert any(ids[row.own[1]] == ids[row.own[0]] for row in rows), "an own negative equal to the positive"
    assert any(positive in texts for positive, texts in zip(positives, foreign, strict=True)), "a positive elsewhere"
    others = [
        (row.excluded - {positive}) & texts for row, positive, texts in zip(rows, positives, foreign, strict=True)
    ]
    assert sum(map(len, others)) >= 2, "another positive elsewhere, and the query's own text"
    assert len({len(row.excluded) for row in rows}) > 1, "rows differ in the number of known positives"
    assert 0 in positives and max(ids) > 2**53, "ids that are falsy, or equal once they are floats"


@pytest.mark.parametrize("groups", GROUPS)
def test_in_random_batches_the_exclusion_matters(groups: str) -> None:
    assert truth("info_nce", groups, False)[0] - truth("info_nce", groups, True)[0] > 0.05


# ------------------------------------------------------------------------------------------------- averaging over ranks

GLOBAL_BATCH = make_batch(11, 8, (3, 1, 4, 2, 3, 1, 2, 3), dim=8)


@pytest.mark.parametrize("world_size, uneven", [(2, True), (4, False)])
@pytest.mark.parametrize("mode", ["m3_kd_loss_no_in_batch", "matryoshka_kl_div", "matryoshka_m3_kd_loss"])
def test_mean_over_ranks_is_the_loss_of_the_global_batch(mode: str, world_size: int, uneven: bool) -> None:
    """The modes that tests/matrix.py has not."""
    want, want_gradients = run_reference(GLOBAL_BATCH, MODES[mode])
    total, gradients = torch.zeros(()).double(), [torch.zeros_like(g) for g in want_gradients]
    for rank, rows in enumerate(rank_rows(8, world_size, uneven)):
        loss, rank_gradients = run_loss(GLOBAL_BATCH, MODES[mode], rank=rank, world_size=world_size, uneven=uneven)
        total += loss * len(rows) / 8
        for sum_so_far, gradient in zip(gradients, rank_gradients, strict=True):
            sum_so_far += gradient * len(rows) / 8
    assert_close(total, want, 1e-9)
    for got_gradient, want_gradient in zip(gradients, want_gradients, strict=True):
        assert_close(got_gradient, want_gradient, 1e-9)


# -------------------------------------------------------------------------------------------------------------- metrics


def assert_same_metrics(batch: Batch, config: dict[str, Any], names: set[str], **view: Any) -> None:
    x = loss_input(batch, **view)
    got = training_loss(x, LossConfig(**config)).metrics
    known = {
        k: v for k, v in config.items() if k in ("in_batch_negatives", "mrl_dims", "normalize", "exclude_positives")
    }
    here = slice(x.row_offset, x.row_offset + len(x.query_BD))
    want = reference_metrics(batch.query_MD[here], batch.passages, batch.rows[here], **known)
    assert set(got) >= set(want)
    for name in names:
        assert not got[name].requires_grad and got[name].ndim == 0
        assert got[name].item() == pytest.approx(want[name], rel=1e-9, abs=1e-12), name


METRICS = {
    "accuracy",
    "negative_beats_positive",
    "positive_similarity",
    "hardest_negative_similarity",
    "masked_negatives",
    "log_candidates",
}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("exclude", [True, False], ids=["exclude", "keep"])
@pytest.mark.parametrize("mode", MODES)
def test_metrics_are_those_of_the_reference(mode: str, exclude: bool, world_size: int) -> None:
    config = {**MODES[mode], "exclude_positives": exclude}
    names = METRICS if MODES[mode].get("in_batch_negatives", True) else METRICS - {"masked_negatives"}
    for sizes in GROUPS.values():
        batch = make_batch(5, 5, sizes, dim=8, unit=mode != "inner_product").leaves()
        for rank in range(world_size):
            assert_same_metrics(batch, config, names, rank=rank, world_size=world_size, padding=1)


def test_masked_negatives_are_counted_among_the_candidates_of_the_row() -> None:
    assert_same_metrics(make_batch(5, 5, 3, dim=8).leaves(), {"in_batch_negatives": False}, {"masked_negatives"})


def test_metrics_without_any_negative_are_numbers() -> None:
    metrics = training_loss(loss_input(make_batch(0, 1, 1)), LossConfig()).metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["accuracy"] == 1 and metrics["negative_beats_positive"] == 0 and metrics["log_candidates"] == 0


# ----------------------------------------------------------------------------------------------------- computed by hand


def hand_input(**changes: Any) -> LossInput:
    """Two queries along the axes. Cosines: q0 1, .6, 0, .8 and q1 0, .8, 1, -.6; own passages 0, 1 and 2, 3."""
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    x = LossInput(
        query_BD=query,
        all_query_MD=query,
        row_offset=0,
        candidate_ND=torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.8, -0.6]], dtype=torch.float64),
        positive_B=torch.tensor([0, 2]),
        own_BG=torch.tensor([[0, 1], [2, 3]]),
        candidate_id_N=torch.tensor([10, 11, 12, 13]),
        excluded_BX=torch.tensor([[10, 20], [12, 21]]),
        teacher_BG=torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]], dtype=torch.float64),  # 3/4 and 1/4
    )
    return replace(x, **changes)


@pytest.mark.parametrize(
    "config, want",
    [
        # (ln(1 + e^-.8 + e^-2 + e^-.4) + ln(1 + e^-2 + e^-.4 + e^-3.2)) / 2 = (0.813143 + 0.613247) / 2
        ({}, 0.713195),
        # (ln(1 + e^-.8) + ln(1 + e^-3.2)) / 2 = (0.371101 + 0.039953) / 2
        ({"in_batch_negatives": False}, 0.205527),
        # the first, plus (3/4 0.371101 + 1/4 1.171101 + 3/4 0.039953 + 1/4 3.239953) / 2
        ({"distillation": "kl_div"}, 1.418722),
        # (3/4 0.813143 + 1/4 ln(1 + e^-1.2 + e^.4) + 3/4 0.613247 + 1/4 ln(1 + e^1.2 + e^2.8)) / 2
        ({"distillation": "m3_kd_loss"}, 1.042444),
        # the last own passage is alone in its term: (3/4 0.371101 + 3/4 0.039953) / 2
        ({"distillation": "m3_kd_loss", "in_batch_negatives": False}, 0.154145),
        # the first and one dimension: there q0 scores 2, 2, 0, 2, and q1 has no length, so that every score is 0
        ({"mrl_dims": (2, 1)}, (0.713195 + (math.log(3 + math.exp(-2)) + math.log(4)) / 2) / 2),
    ],
)
def test_two_queries_by_hand(config: dict[str, Any], want: float) -> None:
    assert training_loss(hand_input(), LossConfig(temperature=0.5, **config)).loss.item() == pytest.approx(
        want, abs=2e-6
    )


def test_gradient_by_hand() -> None:
    """1/2 rows * 1/temperature * (mean passage under the softmax - positive); shares .443462 .199260 .060016 .297261"""
    x = hand_input()
    training_loss(x, LossConfig(temperature=0.5)).loss.backward()
    assert x.query_BD.grad is not None
    torch.testing.assert_close(x.query_BD.grad[0].tolist(), [-0.199173, 0.041067], atol=2e-6, rtol=0)


def test_exclusion_by_hand() -> None:
    """The text of passage 3, q1's own negative, is q0's positive: ln(1 + e^-.8 + e^-2) = 0.460372 for q0."""
    x = hand_input(candidate_id_N=torch.tensor([10, 11, 12, 10]))
    config = LossConfig(temperature=0.5)
    out = training_loss(x, config)
    assert out.loss.item() == pytest.approx((0.460372 + 0.613247) / 2, abs=2e-6)
    assert out.metrics["masked_negatives"] == 0.5
    assert negative_mask(x, config).tolist() == [[False, True, True, False], [True, True, False, True]]
    assert training_loss(x, replace(config, exclude_positives=False)).loss.item() == pytest.approx(0.713195, abs=2e-6)


def test_metrics_by_hand() -> None:
    metrics = training_loss(hand_input(), LossConfig()).metrics
    assert {name: round(metrics[name].item(), 12) for name in METRICS} == {
        "accuracy": 1.0,
        "negative_beats_positive": 0.0,
        "positive_similarity": 1.0,
        "hardest_negative_similarity": 0.8,
        "masked_negatives": 0.0,
        "log_candidates": round(math.log(4), 12),
    }


def test_a_tie_is_neither_right_nor_beaten() -> None:
    x = hand_input()
    tie = training_loss(replace(x, candidate_ND=x.candidate_ND[[0, 1, 2, 0]]), LossConfig()).metrics
    assert tie["accuracy"] == 0.5 and tie["negative_beats_positive"] == 0
    swapped = training_loss(replace(x, positive_B=torch.tensor([1, 2])), LossConfig()).metrics
    assert swapped["accuracy"] == 0.5 and swapped["negative_beats_positive"] == 0.5


def test_teacher_scores_are_needed_and_only_differences_of_them_count() -> None:
    config = LossConfig(distillation="kl_div")
    with pytest.raises(ValueError, match="teacher"):
        training_loss(hand_input(teacher_BG=None), config)
    x = hand_input()
    assert x.teacher_BG is not None
    shifted = training_loss(replace(x, teacher_BG=x.teacher_BG + 5), config).loss
    torch.testing.assert_close(shifted, training_loss(x, config).loss)


# ----------------------------------------------------------------------------------------------------------- properties

any_batch = st.builds(
    lambda seed, sizes: make_batch(seed, len(sizes), sizes, dim=4),
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
)
any_mode = st.sampled_from([MODES[mode] for mode in ("info_nce", "no_in_batch", "kl_div", "m3_kd_loss")])
quick = settings(max_examples=30, deadline=None, derandomize=True, database=None)


@quick
@given(batch=any_batch, temperature=st.floats(0.01, 10), in_batch=st.booleans(), exclude=st.booleans())
def test_info_nce_is_never_negative(batch: Batch, temperature: float, in_batch: bool, exclude: bool) -> None:
    config = LossConfig(temperature=temperature, in_batch_negatives=in_batch, exclude_positives=exclude)
    assert training_loss(loss_input(batch), config).loss >= 0


@quick
@given(batch=any_batch, config=any_mode, order_seed=st.integers(0, 10**6))
def test_the_order_of_the_candidates_does_not_matter(batch: Batch, config: dict[str, Any], order_seed: int) -> None:
    x = loss_input(batch)
    order = torch.randperm(len(batch.ids), generator=torch.Generator().manual_seed(order_seed))
    new_column = torch.argsort(order)
    shuffled = replace(
        x,
        candidate_ND=x.candidate_ND[order],
        candidate_id_N=x.candidate_id_N[order],
        positive_B=new_column[x.positive_B],
        own_BG=torch.where(x.own_BG < 0, -1, new_column[x.own_BG.clamp(min=0)]),
    )
    want, got = training_loss(x, LossConfig(**config)), training_loss(shuffled, LossConfig(**config))
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.metrics, want.metrics, rtol=1e-12, atol=1e-12)


@quick
@given(batch=any_batch, config=any_mode, data=st.data())
def test_one_more_copy_of_an_excluded_text_does_not_matter(batch: Batch, config: dict[str, Any], data: Any) -> None:
    rank = data.draw(st.integers(0, len(batch.rows) - 1))  # one row a rank: the text is excluded for that row
    x = loss_input(batch, rank, len(batch.rows))
    text = data.draw(st.sampled_from(sorted(batch.rows[rank].excluded)))
    vector_1D = data.draw(st.sampled_from([x.query_BD, -x.query_BD]))
    more = replace(
        x,
        candidate_ND=torch.cat([x.candidate_ND, vector_1D]),
        candidate_id_N=torch.cat([x.candidate_id_N, torch.tensor([text])]),
    )
    want = training_loss(x, LossConfig(**config)).loss
    torch.testing.assert_close(training_loss(more, LossConfig(**config)).loss, want, rtol=1e-12, atol=1e-12)


@quick
@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=5), in_batch=st.booleans())
def test_a_row_without_negatives_costs_nothing(seed: int, sizes: list[int], in_batch: bool) -> None:
    """Without in-batch negatives, and as the only row with all other texts known to be positives."""
    batch = make_batch(seed, len(sizes), [1, *sizes[1:]], dim=4)
    config = {"in_batch_negatives": in_batch}
    if in_batch:
        everything = frozenset(batch.ids)
        batch = replace(batch, rows=[replace(batch.rows[0], excluded=everything), *batch.rows[1:]])
    loss, (query_gradient, candidate_gradient) = run_loss(batch, config, rank=0, world_size=len(sizes))
    assert loss == 0
    assert not query_gradient.any() and not candidate_gradient.any()


# ------------------------------------------------------------------------------------------------------------- extremes


KINDS = {"equal": (1, 1), "opposite": (-1, -1), "positives_worst": (-1, 1), "positives_best": (1, -1)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", ["equal", "some_without_negatives"])
@pytest.mark.parametrize("mode", MODES)
def test_extreme_scores_stay_finite(mode: str, groups: str, kind: str) -> None:
    """Cosines of 1 and -1 at temperature 0.02 are scores 100 apart, at 0.005 they are 400: beyond float32's exp.

    With anomaly detection a NaN counts even where a later mask would have hidden it.
    """
    batch = make_batch(0, 5, GROUPS[groups], dim=8)
    positive_sign, negative_sign = KINDS[kind]
    unit_D = F.normalize(torch.ones(8), dim=0)
    candidate_ND = negative_sign * unit_D.repeat(len(batch.ids), 1)
    candidate_ND[[row.own[0] for row in batch.rows]] = positive_sign * unit_D
    batch = replace(batch, query_MD=unit_D.repeat(5, 1), candidate_ND=candidate_ND)
    for exclude, temperature in ((True, 0.02), (False, 0.005)):
        config = {**MODES[mode], "temperature": temperature, "exclude_positives": exclude}
        with torch.autograd.set_detect_anomaly(True):
            loss, gradients = run_loss(batch, config, padding=2)
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("mode", ["info_nce", "no_in_batch", "kl_div", "m3_kd_loss"])
def test_an_extreme_loss_is_the_score_difference(mode: str) -> None:
    """Every positive at -50 under negatives at 50: the loss is 100 + ln(number of them), not a clamped number."""
    batch = make_batch(0, 2, 2, dim=2, duplicates=False).leaves(torch.float32)
    unit = torch.tensor([1.0, 0.0])
    batch = replace(batch, query_MD=torch.stack([unit, unit]), candidate_ND=torch.stack([-unit, unit, -unit, unit]))
    loss, _ = run_loss(batch, MODES[mode])
    teacher = sum(math.exp(row.teacher[0]) / sum(map(math.exp, row.teacher)) for row in batch.rows) / 2
    want = {
        "info_nce": 100 + math.log(2),
        "no_in_batch": 100,
        "kl_div": 100 + math.log(2) + teacher * 100,
        "m3_kd_loss": teacher * (100 + math.log(2)) + (1 - teacher) * math.log(2),
    }
    assert loss.item() == pytest.approx(want[mode], rel=1e-6)


# ---------------------------------------------------------------------------------------------------- a file of its own


def test_the_loss_can_be_pasted_into_a_notebook_and_draws_no_numbers() -> None:
    """What it imports: tests/test_architecture.py."""
    tree = ast.parse(Path(bge_core.loss.__file__).read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not names & {"random", "logging", "cpu", "numpy", "rand", "randn", "randperm"}


def on_meta(x: LossInput) -> LossInput:
    """Meta tensors have shapes and no values: reading one (`.item()`, `if tensor:`, `nonzero`) would raise."""
    values = {f.name: getattr(x, f.name) for f in fields(LossInput)}
    return LossInput(**{name: v.to("meta") if isinstance(v, Tensor) else v for name, v in values.items()})


@pytest.mark.parametrize("mode", MODES)
def test_loss_never_waits_for_the_device(mode: str) -> None:
    out = training_loss(on_meta(loss_input(make_batch(0, 4, 3, dim=8).leaves())), LossConfig(**MODES[mode]))
    assert out.loss.shape == () and all(value.shape == () for value in out.metrics.values())


# --------------------------------------------------------------------------------------------------- a loss of your own


def symmetric_info_nce(x: LossInput, cfg: LossConfig) -> LossOutput:
    """InfoNCE of each query over the passages, and of its positive over the queries of all ranks."""
    score_BN = x.query_BD @ x.candidate_ND.T / cfg.temperature
    forward_B = info_nce(score_BN, negative_mask(x, cfg), x.positive_B)
    score_BM = x.candidate_ND[x.positive_B] @ x.all_query_MD.T / cfg.temperature
    own_query_B = x.row_offset + torch.arange(len(x.query_BD))
    other_query_BM = F.one_hot(own_query_B, len(x.all_query_MD)) == 0
    backward_B = info_nce(score_BM, other_query_BM, own_query_B)
    return LossOutput(loss=(forward_B + backward_B).mean() / 2, metrics={})


def margin_loss(x: LossInput, cfg: LossConfig) -> LossOutput:
    """Every negative shall stay `margin` below the positive."""
    cosine_BN = x.query_BD @ x.candidate_ND.T
    positive_B1 = cosine_BN.gather(1, x.positive_B[:, None])
    excess_BN = F.relu(cosine_BN - positive_B1 + cfg.args["margin"]) * negative_mask(x, cfg)
    return LossOutput(loss=excess_BN.sum(dim=1).mean(), metrics={})


def reference_symmetric(batch: Batch) -> Tensor:
    forward = reference_loss(batch.query_MD, batch.passages, batch.rows, temperature=0.1)
    backward = torch.zeros(()).double()
    for i, row in enumerate(batch.rows):
        scores = [(batch.candidate_ND[row.own[0]] * query).sum() / 0.1 for query in batch.query_MD]
        backward = backward - scores[i] + torch.stack(scores).logsumexp(0)
    return (forward + backward / len(batch.rows)) / 2


def reference_margin(batch: Batch) -> Tensor:
    total = torch.zeros(()).double()
    for query, row in zip(batch.query_MD, batch.rows, strict=True):
        for j, passage in enumerate(batch.candidate_ND):
            if j != row.own[0] and batch.ids[j] not in row.excluded:
                total = total + (0.3 + (query * passage).sum() - (query * batch.candidate_ND[row.own[0]]).sum()).clamp(
                    0
                )
    return total / len(batch.rows)


@pytest.mark.parametrize("world_size, uneven", [(2, True), (4, False)])
@pytest.mark.parametrize(
    "loss, reference", [(symmetric_info_nce, reference_symmetric), (margin_loss, reference_margin)]
)
def test_a_loss_of_ten_lines_is_exact_on_many_ranks(loss: Any, reference: Any, world_size: int, uneven: bool) -> None:
    config = LossConfig(temperature=0.1, args={"margin": 0.3})
    truth, batch = GLOBAL_BATCH.leaves(), GLOBAL_BATCH.leaves()
    want = reference(truth)
    want.backward()
    total = torch.zeros(()).double()
    for rank, rows in enumerate(rank_rows(8, world_size, uneven)):
        total = total + loss(loss_input(batch, rank, world_size, uneven=uneven), config).loss * len(rows) / 8
    total.backward()
    assert_close(total, want, 1e-9)
    for got_gradient, want_gradient in zip(batch.gradients(), truth.gradients(), strict=True):
        assert_close(got_gradient, want_gradient, 1e-9)


# -------------------------------------------------------------- examples/losses that have few cells in tests/matrix.py

ORTHOGONAL = replace(
    make_batch(0, 3, 1, dim=8, duplicates=False), query_MD=torch.eye(8)[:3], candidate_ND=torch.eye(8)[3:6]
)


def example_loss(name: str) -> Any:
    return build.load_loss(str(Path(__file__).parents[1] / f"examples/losses/{name}.py:{name}_loss"))


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(
    "name, args", [("margin_mse", {}), ("spread_out", {}), ("spread_out", {"weight": 3.0, "mean_weight": 0.0})]
)
def test_an_example_is_its_paper(
    name: str, args: dict[str, float], groups: str, dtype: torch.dtype, rtol: float
) -> None:
    """All at once and by blocks, on one rank and on two."""
    truth = rounded_batch("info_nce", groups)
    want = getattr(reference, f"{name}_loss")(truth.query_MD, truth.passages, truth.rows, temperature=0.1, **args)
    want.backward()
    for world_size, padding, block_size in ((1, 0, 0), (1, 2, 2), (2, 1, 0), (2, 0, 1)):
        config = LossConfig(temperature=0.1, block_size=block_size, args=args)
        total, batch = torch.zeros(()), truth.leaves(dtype)
        for rank, rows in enumerate(rank_rows(5, world_size)):
            x = loss_input(batch, rank, world_size, padding=padding)
            total = total + example_loss(name)(x, config).loss * len(rows) / 5
        total.backward()
        assert_close(total, want, rtol)
        for got_gradient, want_gradient in zip(batch.gradients(), truth.gradients(), strict=True):
            assert_close(got_gradient, want_gradient, rtol)


def test_margin_mse_by_hand() -> None:
    """Margins .4 and 1.6 over the temperature are .8 and 3.2, the teacher's ln 3 = 1.098612: squares .089169, 4.415831."""
    config, loss = LossConfig(temperature=0.5), example_loss("margin_mse")
    assert loss(hand_input(), config).loss.item() == pytest.approx((0.089169 + 4.415831) / 2, abs=2e-6)
    without = hand_input(own_BG=torch.tensor([[0, 1], [2, -1]]))  # the second row has no negative: 0, and it counts
    assert loss(without, config).loss.item() == pytest.approx(0.089169 / 2, abs=2e-6)
    with pytest.raises(ValueError, match="--knowledge_distillation"):
        loss(hand_input(teacher_BG=None), config)


@pytest.mark.parametrize(
    "x, want",
    [
        # <q0,q1> = 0; passages .6 0 .8 .8 0 -.6: (1.6 / 6)^2, and their squares' mean 1/3 is below 1/2
        (hand_input(), 0.071111),
        # the last passage is a copy of the first: .6 0 .8, (1.4 / 3)^2
        (hand_input(candidate_id_N=torch.tensor([10, 11, 12, 10])), 0.217778),
        # equal questions: 1^2 and 1 - 1/2 more
        (hand_input(all_query_MD=torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)), 1.571111),
        (loss_input(ORTHOGONAL), 0.0),
        (
            loss_input(replace(ORTHOGONAL, ids=[7, 7, 7], query_MD=ORTHOGONAL.query_MD * 0), teacher=False),
            0.0,
        ),  # no pair
    ],
)
def test_the_spread_out_term_by_hand(x: LossInput, want: float) -> None:
    output = example_loss("spread_out")(x, LossConfig(args={"weight": 2.0}))
    assert output.metrics["spread_out"].item() == pytest.approx(want, abs=2e-6)
    assert (output.loss - training_loss(x, LossConfig()).loss).item() == pytest.approx(2 * want, abs=4e-6)


@pytest.mark.parametrize("name", ["margin_mse", "spread_out"])
def test_an_example_never_waits_for_the_device(name: str) -> None:
    assert example_loss(name)(on_meta(loss_input(make_batch(0, 4, 3, dim=8).leaves())), LossConfig()).loss.shape == ()


def test_the_example_of_the_docstring_runs() -> None:
    lines = (bge_core.loss.__doc__ or "").splitlines()
    code = "\n".join(line.strip() for line in lines if line.startswith("    ") and ("=" in line or "backward" in line))
    found: dict[str, Any] = dict(vars(bge_core.loss))
    exec(code, found)
    assert found["query"].grad.abs().sum() > 0 and found["passage"].grad.abs().sum() > 0


def test_every_setting_of_the_loss_comes_from_a_flag() -> None:
    """A field that `build.loss_config` forgets would have a flag that is accepted and ignored."""
    (call,) = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(build.loss_config)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "LossConfig"
    ]
    assert {keyword.arg for keyword in call.keywords} == {field.name for field in fields(LossConfig)}
