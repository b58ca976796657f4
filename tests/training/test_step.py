"""forward_backward in one process: what the matrix (tests/matrix.py), which compares loss and gradient, cannot see."""

from pathlib import Path

import pytest
import reference
import torch
from batches import (
    MODES,
    Gradients,
    TextRow,
    assert_same_gradients,
    encode_one,
    gradients_of,
    load,
    make_rows,
    rank_batch,
    text_id_of,
    true_gradients,
)

from bge_core.encoder.model import Encoder
from bge_core.loss import LossConfig, LossInput, LossOutput, training_loss
from bge_core.training.step import StepSettings, forward_backward


@pytest.fixture(scope="module")
def encoders(tiny_bert: Path) -> dict[str, Encoder]:
    """The same float32 weights computed in float64 and in float32."""
    return {name: load(tiny_bert, dtype) for name, dtype in (("float64", torch.float64), ("float32", torch.float32))}


def run_step(
    encoder: Encoder, micro_batches: tuple[tuple[TextRow, ...], ...], mode: str, **settings: object
) -> tuple[dict[str, float], Gradients]:
    batches = [rank_batch(rows, teacher="distillation" in MODES[mode]) for rows in micro_batches]
    shares = forward_backward(encoder, batches, StepSettings(loss_config=LossConfig(**MODES[mode]), **settings))
    return {name: value.item() for name, value in shares.items()}, gradients_of(encoder)


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
@pytest.mark.parametrize("mode", ["info_nce", "keep_positives"])
def test_gradient_of_texts_of_all_lengths(
    mode: str, chunk_size: int | None, encoders: dict[str, Encoder], tiny_bert: Path
) -> None:
    """The matrix has short texts, of about the same length."""
    pools = (make_rows(1, (1, 3, 1, 4, 2)), make_rows(2, (2, 3)))
    want_loss, want = true_gradients(tiny_bert, pools, mode)
    shares, got = run_step(encoders["float64"], pools, mode, chunk_size=chunk_size)
    assert shares["loss"] == pytest.approx(want_loss, rel=1e-9)
    assert_same_gradients(got, want, 1e-9)


def test_gradients_add_to_what_is_there(encoders: dict[str, Encoder]) -> None:
    encoder, rows = encoders["float64"], make_rows(1, (3, 2))
    _, once = run_step(encoder, (rows,), "info_nce")
    batches = [rank_batch(rows, teacher=False)]
    for chunk_size in (None, 2):
        forward_backward(encoder, batches, StepSettings(chunk_size=chunk_size))
    assert_same_gradients(gradients_of(encoder), {name: 2 * gradient for name, gradient in once.items()}, 1e-9)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_single_row_without_negatives_teaches_nothing(chunk_size: int | None, encoders: dict[str, Encoder]) -> None:
    shares, gradients = run_step(encoders["float64"], (make_rows(0, (1,)),), "info_nce", chunk_size=chunk_size)
    assert shares["loss"] == 0.0
    assert all(float(gradient.abs().max()) == 0.0 for gradient in gradients.values())


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_metrics_are_means_over_all_rows(chunk_size: int | None, encoders: dict[str, Encoder]) -> None:
    encoder = encoders["float64"]
    pools = (make_rows(9, (3, 1, 2, 4)), make_rows(10, (2, 3)))
    shares, _ = run_step(encoder, pools, "info_nce", chunk_size=chunk_size)
    want = dict.fromkeys(shares, 0.0)
    for pool in pools:
        texts = [text for row in pool for text in row.passages]
        starts = [sum(len(row.passages) for row in pool[:i]) for i in range(len(pool))]
        rows = [
            reference.Row(list(range(start, start + len(row.passages))), frozenset(row.known), [])
            for start, row in zip(starts, pool, strict=True)
        ]
        with torch.no_grad():
            queries = torch.stack([encode_one(encoder, row.query) for row in pool])
            candidates = torch.stack([encode_one(encoder, text) for text in texts])
        passages = (candidates, [text_id_of(text) for text in texts])
        for name, value in reference.reference_metrics(queries, passages, rows).items():
            want[name] += value * len(pool) / 6
    del want["loss"], shares["loss"]
    assert shares == pytest.approx(want, rel=1e-9)
    assert shares["masked_negatives"] > 0 and 0 < shares["accuracy"] < 1


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_rank_without_rows_has_a_gradient_of_zero(
    mode: str, chunk_size: int | None, encoders: dict[str, Encoder]
) -> None:
    """As in a last micro-batch of one row on two ranks, when passages stay on their rank."""
    settings = StepSettings(loss_config=LossConfig(**MODES[mode]), chunk_size=chunk_size)
    batch = rank_batch((), [(), make_rows(0, (1,))], teacher="distillation" in MODES[mode])
    encoders["float64"].zero_grad()
    shares = forward_backward(encoders["float64"], [batch], settings)
    assert all(float(gradient.abs().max()) == 0.0 for gradient in gradients_of(encoders["float64"]).values())
    assert set(float(value) for value in shares.values()) == {0.0}


def test_no_metric_depends_on_how_rows_are_split(encoders: dict[str, Encoder]) -> None:
    rows = make_rows(1, (3, 1, 2, 1))
    whole, _ = run_step(encoders["float64"], (rows,), "no_in_batch")
    split, _ = run_step(encoders["float64"], (rows[:3], rows[3:]), "no_in_batch")
    assert split == pytest.approx(whole)


def test_replaying_chunks_leaves_the_random_state_of_one_pass(tiny_bert_dropout: Path) -> None:
    """Else the next step would draw the masks of this one."""
    encoder, batch = load(tiny_bert_dropout, torch.float64), rank_batch(make_rows(1, (3, 1, 2)), teacher=False)
    torch.manual_seed(7)
    for chunk in batch.tokens.split(3, None):
        encoder(chunk)
    want = torch.get_rng_state()
    torch.manual_seed(7)
    forward_backward(encoder, [batch], StepSettings(chunk_size=3))
    assert torch.equal(torch.get_rng_state(), want)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_loss_of_the_users_own_sees_representations_only(
    chunk_size: int | None, encoders: dict[str, Encoder]
) -> None:
    """Gradient of sum(q * c) by autograd through the encoder, text by text."""
    encoder, rows = encoders["float64"], make_rows(3, (2, 2))
    seen: list[LossInput] = []

    def product_loss(x: LossInput, cfg: LossConfig) -> LossOutput:
        seen.append(x)
        loss = (x.query_BD * x.candidate_ND[x.positive_B]).sum(dim=1).mean() * cfg.args["weight"]
        return LossOutput(loss, {"weight": x.query_BD.new_tensor(3.0)})

    for row in rows:
        (encode_one(encoder, row.query).dot(encode_one(encoder, row.passages[0])) * 3.0 / len(rows)).backward()
    want = gradients_of(encoder)
    settings = StepSettings(product_loss, LossConfig(args={"weight": 3.0}), chunk_size=chunk_size)
    shares = forward_backward(encoder, [rank_batch(rows, teacher=False)], settings)
    assert_same_gradients(gradients_of(encoder), want, 1e-9)
    assert shares["weight"].item() == pytest.approx(3.0)
    assert seen[0].row_offset == 0 and torch.equal(seen[0].all_query_MD, seen[0].query_BD)
    assert seen[0].own_BG.tolist() == [[0, 1], [2, 3]] and seen[0].positive_B.tolist() == [0, 2]


def test_the_loss_runs_in_float32_under_autocast(encoders: dict[str, Encoder]) -> None:
    types: list[tuple[torch.dtype, torch.dtype, bool]] = []

    def spy(x: LossInput, cfg: LossConfig) -> LossOutput:
        product = x.query_BD @ x.candidate_ND.T
        types.append((x.query_BD.dtype, product.dtype, torch.is_autocast_enabled("cpu")))
        return training_loss(x, cfg)

    for chunk_size in (None, 2):
        settings = StepSettings(spy, chunk_size=chunk_size, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
        forward_backward(encoders["float32"], [rank_batch(make_rows(1, (2, 2)), teacher=False)], settings)
        encoders["float32"].zero_grad()
    assert types == [(torch.float32, torch.float32, False)] * 2
