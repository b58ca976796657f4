"""Two real processes against one: collectives, and every parameter's gradient of a real two-layer BERT."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import two_processes
from batches import MODES, Gradients, assert_same_gradients, gradients_of, load, rank_batch, true_gradients
from two_processes import ALL_REDUCE_CASES, ENCODE_CASES, FIXED_CASES, PROMPT, QUERY_CASES, STEP_CASES, StepCase

from bge_core import UserError
from bge_core.encoder.encode import encode
from bge_core.loss import LossConfig
from bge_core.runtime.distributed import gather_objects, on_main, sum_over_ranks, unwrap, world, wrap
from bge_core.runtime.launch import resolve_precision
from bge_core.search.exact import exact_search
from bge_core.training.step import StepSettings, forward_backward

RTOL = 1e-9
Ranks = list[dict[str, Any]]


def of_both(two_ranks: Ranks, case: str) -> list[Any]:
    """The results of both ranks, none of which failed."""
    results = [rank[case] for rank in two_ranks]
    for rank, result in enumerate(results):
        assert not isinstance(result, str), f"rank {rank} failed:\n{result}"
    return results


# --- collectives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, rows, gradient_of_rank",
    [
        # rank r's loss is (r + 1) * sum_i i * row_i with i from 1, so row i has gradient (1 + 2) * i
        ("equal", [[0, 1], [2, 3], [100, 101], [102, 103]], [[3, 6], [9, 12]]),
        ("uneven", [[0, 1], [2, 3], [4, 5], [100, 101]], [[3, 6, 9], [12]]),
        ("first_empty", [[100, 101], [102, 103]], [[], [3, 6]]),
        ("last_empty", [[0, 1], [2, 3]], [[3, 6], []]),
    ],
)
def test_gather_gives_all_rows_and_sums_their_gradients(
    case: str, rows: list[list[int]], gradient_of_rank: list[list[int]], two_ranks: Ranks
) -> None:
    for rank, result in enumerate(of_both(two_ranks, f"gather/{case}")):
        assert result["value"].tolist() == rows
        assert result["gradient"].tolist() == [[g, g] for g in gradient_of_rank[rank]]
        assert result["counts"] == [[len(g) for g in gradient_of_rank], [7, 8]]
    for result in of_both(two_ranks, f"gather_integers/{case}"):
        assert result["value"].dtype == torch.int64 and result["value"].tolist() == rows


def test_gather_of_nothing_is_nothing(two_ranks: Ranks) -> None:
    assert [result["value"].shape for result in of_both(two_ranks, "gather/all_empty")] == [(0, 2), (0, 2)]


def test_what_rank_0_does_alone_reaches_both(two_ranks: Ranks) -> None:
    for rank, result in enumerate(of_both(two_ranks, "collectives")):
        assert result["world"] == (rank, 2)
        assert result["value"] == {"from": 0}
        assert result["calls"] == ([0] if rank == 0 else [])
        assert result["user_error"] == "UserError: the folder is not empty"
        assert "No space left on device" in result["os_error"]
        kind, _, why = result["fault"].partition(": ")
        if rank == 0:
            assert (kind, why) == ("ZeroDivisionError", "by zero")
        else:
            assert (
                kind == "RuntimeError"
                and why.startswith("rank 0 failed:\nTraceback")
                and "ZeroDivisionError: by zero" in why
            )
        assert result["slow"] == "done"  # the group's timeout was half of what it took
        assert result["after"] == "still in step"
        assert result["objects"] == [{"rank": 0}, {"rank": 1}]
        assert result["sum"] == 3.0


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEP_CASES)
def test_two_ranks_give_the_gradient_of_the_global_batch(name: str, two_ranks: Ranks, tiny_bert: Path) -> None:
    """Against the slow truth, and (where passages cross) against this code in one process with all rows."""
    case = STEP_CASES[name]
    (shares, digest, got), (other_shares, other_digest, _) = of_both(two_ranks, f"step/{name}")
    assert (shares, digest) == (other_shares, other_digest), "the ranks disagree"

    want_loss, want = true_gradients(tiny_bert, case.pools(), case.mode)
    assert shares["loss"] == pytest.approx(want_loss, rel=RTOL)
    assert_same_gradients(got, want, RTOL)

    if case.cross_device:
        alone_shares, alone = in_one_process(case, tiny_bert)
        assert_same_gradients(got, alone, RTOL)
        if any(min(map(len, both)) and 1 in sum(both, ()) for both in case.groups):
            del shares["hardest_negative_similarity"]  # a mean over rows with a negative: see test_step.py
        assert {name: alone_shares[name] for name in shares} == pytest.approx(shares, rel=1e-4)


@pytest.mark.parametrize("name", FIXED_CASES)
def test_one_reduction_of_a_flat_gradient_is_that_of_ddp(name: str, two_ranks: Ranks, tiny_bert: Path) -> None:
    """Held passes without hooks against DDP on the same rows of fixed shape, bit for bit, and against the truth."""
    case = FIXED_CASES[name]
    (_, ddp, _), _ = of_both(two_ranks, f"fixed/{name}")
    (shares, digest, got), (_, other_digest, _) = of_both(two_ranks, f"graphed/{name}")
    assert digest == other_digest == ddp
    loss, want = true_gradients(tiny_bert, case.pools(), case.mode)
    assert shares["loss"] == pytest.approx(loss, rel=RTOL)
    assert_same_gradients(got, want, RTOL)


@pytest.mark.parametrize("name", QUERY_CASES)
def test_a_loss_over_all_queries_is_exact_on_two_ranks(name: str, two_ranks: Ranks, tiny_bert: Path) -> None:
    shares, want = in_one_process(QUERY_CASES[name], tiny_bert)
    (got_shares, digest, got), (_, other_digest, _) = of_both(two_ranks, f"step/{name}")
    assert digest == other_digest
    assert got_shares["loss"] == pytest.approx(shares["loss"], rel=RTOL)
    assert_same_gradients(got, want, RTOL)


def in_one_process(case: StepCase, model: Path) -> tuple[dict[str, float], Gradients]:
    """The shares and gradients of all rows of a case."""
    encoder, mode = load(model, torch.float64), MODES[case.mode]
    whole = [rank_batch(pool, teacher="distillation" in mode) for pool in case.pools()]
    settings = StepSettings(loss_config=LossConfig(**mode), chunk_size=case.chunk_size, **case.settings)
    shares = forward_backward(encoder, whole, settings)
    return {name: value.item() for name, value in shares.items()}, gradients_of(encoder)


@pytest.mark.parametrize("name", ALL_REDUCE_CASES)
def test_ranks_average_their_gradients_once_a_step(name: str, two_ranks: Ranks) -> None:
    assert of_both(two_ranks, f"all_reduces/{name}") == [1, 1]


@pytest.mark.parametrize("case", ENCODE_CASES)
def test_encoding_on_two_ranks_is_bitwise_that_of_one(case: str, two_ranks: Ranks, tiny_bert: Path) -> None:
    texts, batch_size = ENCODE_CASES[case]
    alone = encode(load(tiny_bert, torch.float32), texts, prompt=PROMPT, batch_size=batch_size)
    for result in of_both(two_ranks, f"encode/{case}"):
        assert np.array_equal(result.numpy(), alone)


def test_processes_of_a_machine_share_an_array(two_ranks: Ranks, tiny_bert: Path) -> None:
    alone = encode(load(tiny_bert, torch.float32), two_processes.TEXTS, prompt=PROMPT, batch_size=4)
    for result in of_both(two_ranks, "shared"):
        assert result["array"].tolist() == [[1, 1], [2, 2], [0, 0]] and result["left"] == [[], []]
        assert "no room for vectors in" in result["refused"] and "set TMPDIR" in result["refused"]
        kind, vectors = result["encoded"]
        assert kind == "memmap" and np.allclose(vectors, alone, atol=1e-6)  # other batches: blocks of 8
    one, other = (result["encoded"][1] for result in of_both(two_ranks, "shared"))
    assert torch.equal(one, other)


def test_a_search_in_shares_is_bitwise_that_of_one(two_ranks: Ranks) -> None:
    query_QD, corpus_ND = two_processes.search_vectors()
    for result in of_both(two_ranks, "search"):
        for num_queries in (31, 1, 0):
            scores, rows = exact_search(query_QD[:num_queries], corpus_ND, 7)
            got_scores, got_rows = (found.numpy() for found in result[str(num_queries)])
            assert np.array_equal(got_scores.view(np.int32), scores.view(np.int32)) and np.array_equal(got_rows, rows)
        for name in ("queries", "corpus", "corpus, one query"):
            assert f"{name.split(',')[0]}: row 30 holds NaN" in result[f"bad {name}"]


# --- one process ------------------------------------------------------------------------------------------------------


def test_one_process_needs_no_group(tiny_bert: Path) -> None:
    model = load(tiny_bert, torch.float32)
    assert world() == (0, 1)
    assert wrap(model) is model and unwrap(model) is model
    assert on_main(lambda: 3) == 3
    assert gather_objects("x") == ["x"]
    assert sum_over_ranks(torch.tensor([2.0])).tolist() == [2.0]
    with pytest.raises(UserError, match="disk"):
        on_main(lambda: (_ for _ in ()).throw(OSError("disk")))


@pytest.mark.parametrize(
    "fp16, bf16, launcher, cuda, want",
    [
        (False, False, None, True, "no"),
        (False, False, "no", True, "no"),
        (True, False, "no", True, "fp16"),  # accelerate launch always exports "no": not a contradiction
        (False, True, None, False, "bf16"),
        (False, False, "bf16", True, "bf16"),
        (False, False, "FP16", True, "fp16"),
        (True, False, "fp16", True, "fp16"),
        (True, False, None, False, "no"),
        (False, False, "fp16", False, "no"),
    ],
)
def test_precision_is_the_flag_else_the_launchers(
    fp16: bool, bf16: bool, launcher: str | None, cuda: bool, want: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    assert resolve_precision(fp16, bf16, cuda=cuda) == want


def test_two_precisions_are_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")  # whatever an earlier stage of this process has set
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="--fp16.*bf16: choose one"):
        resolve_precision(True, False, cuda=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="fp8"):
        resolve_precision(False, False, cuda=True)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    resolve_precision(True, False, cuda=False)
    assert sum("fp16 needs a GPU" in message for message in caplog.messages) == 1
