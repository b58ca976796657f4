"""forward_backward in one process against the slow truth: every parameter's gradient of a real two-layer BERT."""

from functools import cache
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
from bge_core.training.step import StepSettings, forward_backward, loss_input

GROUPS = {"equal": (3, 3, 3, 3), "uneven": (4, 2, 3, 2, 3), "some_without_negatives": (1, 3, 1, 4, 2)}
DTYPES = {"float64": (torch.float64, 1e-9), "float32": (torch.float32, 1e-5)}


@pytest.fixture(scope="module")
def encoders(tiny_bert: Path) -> dict[str, Encoder]:
    """The same float32 weights computed in float64 and in float32."""
    return {name: load(tiny_bert, dtype) for name, (dtype, _) in DTYPES.items()}


@cache
def truth(folder: Path, mode: str, pools: tuple[tuple[TextRow, ...], ...]) -> tuple[float, Gradients]:
    return true_gradients(folder, pools, mode)


def run_step(
    encoder: Encoder, micro_batches: tuple[tuple[TextRow, ...], ...], mode: str, **settings: object
) -> tuple[dict[str, float], Gradients]:
    batches = [rank_batch(rows, teacher="distillation" in MODES[mode]) for rows in micro_batches]
    shares = forward_backward(encoder, batches, StepSettings(loss_config=LossConfig(**MODES[mode]), **settings))
    return {name: value.item() for name, value in shares.items()}, gradients_of(encoder)


@pytest.mark.parametrize(
    "chunk_size, dtype",
    [(None, "float64"), (1, "float64"), (3, "float64"), (100, "float64"), (None, "float32"), (3, "float32")],
)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_that_of_the_reference(
    mode: str, groups: str, chunk_size: int | None, dtype: str, encoders: dict[str, Encoder], tiny_bert: Path
) -> None:
    pools = (make_rows(1, GROUPS[groups]),)
    want_loss, want = truth(tiny_bert, mode, pools)
    shares, got = run_step(encoders[dtype], pools, mode, chunk_size=chunk_size)
    rtol = DTYPES[dtype][1]
    assert shares["loss"] == pytest.approx(want_loss, rel=rtol)
    assert_same_gradients(got, want, rtol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("mode", ["info_nce", "kl_div", "m3_kd_loss"])
@pytest.mark.parametrize("sizes", [((3, 2), (2, 4)), ((3, 1, 2, 4), (2,))], ids=["equal", "short_last"])
def test_accumulation_weighs_every_row_alike(
    sizes: tuple[tuple[int, ...], ...],
    mode: str,
    chunk_size: int | None,
    dtype: str,
    encoders: dict[str, Encoder],
    tiny_bert: Path,
) -> None:
    pools = tuple(make_rows(seed, group_sizes) for seed, group_sizes in enumerate(sizes))
    want_loss, want = truth(tiny_bert, mode, pools)
    shares, got = run_step(encoders[dtype], pools, mode, chunk_size=chunk_size)
    rtol = DTYPES[dtype][1]
    assert shares["loss"] == pytest.approx(want_loss, rel=rtol)
    assert_same_gradients(got, want, rtol)


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


# --- dropout, RNG -----------------------------------------------------------------------------------------------------


def graphs_kept(encoder: Encoder, pools: tuple[tuple[TextRow, ...], ...], chunk_size: int) -> Gradients:
    """The same chunks with all their graphs alive: what GradCache must reproduce."""
    num_rows = sum(map(len, pools))
    for pool in pools:
        batch = rank_batch(pool, teacher=False)
        texts = [list(text) for text in batch.tokens.texts()]
        chunks = [texts[i : i + chunk_size] for i in range(0, len(texts), chunk_size)]
        vector_SD = torch.cat([encoder(type(batch.tokens).from_lists(chunk)) for chunk in chunks])
        loss = training_loss(loss_input(vector_SD, batch, cross_device=False), LossConfig()).loss
        (loss * len(pool) / num_rows).backward()
    return gradients_of(encoder)


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_cached_chunks_with_dropout_equal_the_same_chunks_with_graphs(chunk_size: int, tiny_bert_dropout: Path) -> None:
    encoder = load(tiny_bert_dropout, torch.float64)
    pools = (make_rows(1, (3, 1, 2)), make_rows(2, (2, 3)))
    torch.manual_seed(7)
    want = graphs_kept(encoder, pools, chunk_size)
    state_after = torch.get_rng_state()
    torch.manual_seed(7)
    _, got = run_step(encoder, pools, "info_nce", chunk_size=chunk_size)
    assert_same_gradients(got, want, 1e-9)
    assert torch.equal(torch.get_rng_state(), state_after), "the next step draws other masks than without caching"

    torch.manual_seed(8)
    _, other = run_step(encoder, pools, "info_nce", chunk_size=chunk_size)
    with pytest.raises(AssertionError, match="off by"):  # dropout is really on
        assert_same_gradients(other, want, 1e-2)


# --- scaling, other losses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_loss_scaling_scales_the_gradient_and_nothing_else(
    chunk_size: int | None, encoders: dict[str, Encoder]
) -> None:
    encoder, pools = encoders["float32"], (make_rows(1, (3, 2, 1)), make_rows(2, (2, 2)))
    plain_shares, plain = run_step(encoder, pools, "info_nce", chunk_size=chunk_size)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    shares, scaled = run_step(encoder, pools, "info_nce", chunk_size=chunk_size, scaler=scaler)
    assert shares == plain_shares
    for name, gradient in plain.items():  # a power of two: exact
        assert torch.equal(scaled[name], gradient * 2.0**12), name


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
