"""FSDP2 on two real processes (gloo): the same gradients, norms, steps, files and checkpoints as DDP."""

import functools
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from batches import Gradients, assert_same_gradients, load, true_gradients
from runs import Row
from tiny_model import add_dense
from torch.distributed.tensor import DTensor
from two_processes import ENCODE_CASES, EVEN, PROMPT, UNEVEN, StepCase, forward_backward_of, rank_batches

from bge_core import UserError
from bge_core.encoder.encode import encode
from bge_core.encoder.model import Encoder
from bge_core.runtime.distributed import clip_gradients, sum_over_ranks, unwrap, wrap
from bge_core.runtime.launch import resolve_sharding, start
from bge_core.training.optim import build_optimizer, update_if_finite

ONE_WITHOUT = ((3, 2), (1, 1))
CASES = {
    "info_nce": StepCase([UNEVEN]),
    "info_nce_cached": StepCase([UNEVEN], chunk_size=3),
    "kl_div": StepCase([UNEVEN], "kl_div"),
    "mrl_cached": StepCase([UNEVEN], "mrl", chunk_size=3),
    "no_negatives_on_rank_1_m3": StepCase([ONE_WITHOUT], "m3_kd_loss", chunk_size=2),
    "accumulation": StepCase([EVEN, UNEVEN]),
    "accumulation_cached": StepCase([UNEVEN, EVEN], chunk_size=2),
    "accumulation_short_last_cached": StepCase([UNEVEN, ((), (3,))], chunk_size=2),
    "one_row_on_rank_1": StepCase([((), (3,))]),
    "one_row_cached": StepCase([((3,), ())], chunk_size=1),
    "local_cached": StepCase([ONE_WITHOUT, EVEN], cross_device=False, chunk_size=2),
    "local_one_row_m3_cached": StepCase([((), (3,))], "m3_kd_loss", cross_device=False, chunk_size=2),
}
RTOL = {"float64": 1e-9, "float32": 1e-5}
STEPS = [(name, "float64") for name in CASES] + [(name, "float32") for name in ("info_nce", "info_nce_cached")]


def whole_gradients(model: torch.nn.Module) -> Gradients:
    """Every trainable parameter's gradient, put together; the parameters' own are cleared."""
    found = {}
    for name, parameter in unwrap(model).named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            gradient = parameter.grad
            found[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()
    model.zero_grad(set_to_none=True)
    return found


def step_case(model: torch.nn.Module, name: str, rank: int) -> tuple[dict[str, float], Gradients]:
    shares = forward_backward_of(model, rank_batches(CASES[name], rank), CASES[name])
    return {name: sum_over_ranks(share).item() for name, share in shares.items()}, whole_gradients(model)


def layout(model: Encoder) -> Row:
    """What of the model lies in shards, and which modules are put together on their own."""
    parameters = dict(model.named_parameters())
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    return {
        "whole": [name for name, parameter in parameters.items() if not isinstance(parameter, DTensor)],
        "dtypes": {parameter.dtype for parameter in parameters.values()},
        "share": sum(p.to_local().numel() for p in parameters.values()) / sum(p.numel() for p in parameters.values()),
        "groups": [name for name, m in model.named_modules() if isinstance(m, torch.distributed.fsdp.FSDPModule)],
        "frozen": frozen,
    }


def clipped(model: torch.nn.Module, rank: int, max_norm: float) -> tuple[float, Gradients]:
    case = CASES["info_nce"]
    forward_backward_of(model, rank_batches(case, rank), case)
    return float(clip_gradients(unwrap(model).parameters(), max_norm)), whole_gradients(model)


def infinite_in_one_shard(model: torch.nn.Module, rank: int) -> list[tuple[bool, float, float]]:
    """Of an update, and of one with an infinity on rank 1 alone: did anything change, was it left out, the scale then."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(model, 0.1, 0.01, (0.9, 0.999), 1e-8)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))  # as every step does: it makes the scale a tensor

    def numbers() -> list[torch.Tensor]:
        kept = [*parameters, *(value for state in optimizer.state.values() for value in state.values())]
        return [(value.to_local() if isinstance(value, DTensor) else value).detach().clone() for value in kept]

    found = []
    for poison in (False, True):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        if poison and rank == 1:
            parameters[0].grad.to_local().view(-1)[0] = torch.inf
        before = numbers()
        scaler.unscale_(optimizer)
        norm = clip_gradients(parameters, 1.0)
        left_out = update_if_finite(optimizer, 0.1, {"loss": torch.zeros(()), "grad_norm": norm})
        scaler.update()
        found.append((not runs.equal(before, numbers()), float(left_out), scaler.get_scale()))
    model.zero_grad(set_to_none=True)
    return found


def under_bf16(folder: str, shard: bool, rank: int, checkpointing: bool) -> Gradients:
    encoder = load(folder, torch.float32)
    if checkpointing:
        encoder.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    model = wrap(encoder, shard)
    case = CASES["accumulation_cached"]
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    case = type(case)(case.groups, chunk_size=case.chunk_size, settings={"autocast": autocast})
    forward_backward_of(model, rank_batches(case, rank), case)
    return whole_gradients(model)


def work(folder: Path, model_folder: str) -> None:
    """One rank: case -> result or a traceback, into a file; runs instead of train.py."""
    start()
    rank = int(os.environ["RANK"])
    results: Row = {}

    def record(name: str, compute: Callable[[], Any]) -> None:
        try:
            results[name] = compute()
        except Exception:
            results[name] = traceback.format_exc()
            print(name, results[name], flush=True)

    for dtype_name in RTOL:
        model = wrap(load(model_folder, getattr(torch, dtype_name)), shard=True)
        for name in (name for name, of_dtype in STEPS if of_dtype == dtype_name):
            record(f"step/{name}/{dtype_name}", lambda m=model, n=name: step_case(m, n, rank))
    record("layout", lambda: layout(model))
    record(
        "dense",
        lambda: step_case(wrap(load(f"{model_folder}_dense", torch.float64), shard=True), "info_nce_cached", rank),
    )
    for max_norm in (0.0, 0.05):
        record(f"clip/{max_norm}", lambda n=max_norm: clipped(model, rank, n))
    for name, (texts, batch_size) in ENCODE_CASES.items():
        record(f"encode/{name}", lambda t=texts, b=batch_size: encode(model, t, prompt=PROMPT, batch_size=b))
    record("after_encoding", lambda: step_case(model, "info_nce", rank))
    record("scaler", lambda: infinite_in_one_shard(wrap(load(model_folder, torch.float32), shard=True), rank))
    for checkpointing in (False, True):
        for shard in (False, True):
            record(
                f"bf16/{checkpointing}/{shard}", lambda s=shard, c=checkpointing: under_bf16(model_folder, s, rank, c)
            )
    torch.save(results, folder / f"results.rank{rank}")
    torch.distributed.destroy_process_group()
    sys.exit(0)


@pytest.fixture(scope="module")
def two_ranks(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("fsdp")
    add_dense(Path(shutil.copytree(tiny_bert, folder / "bert_dense")))
    (folder / "bert").symlink_to(tiny_bert)
    patch = functools.partial(work, folder, str(folder / "bert"))
    codes = runs.finish(runs.start_two([], folder / "log", patch), 240)
    assert codes == [0, 0], "\n".join(log.read_text(encoding="utf-8")[-4000:] for log in folder.glob("log.*"))
    return [torch.load(folder / f"results.rank{rank}", weights_only=False) for rank in range(2)]


def of_both(two_ranks: list[Row], case: str) -> list[Any]:
    results = [rank[case] for rank in two_ranks]
    for rank, result in enumerate(results):
        assert not isinstance(result, str), f"rank {rank} failed:\n{result}"
    return results


# --- one step ---------------------------------------------------------------------------------------------------------


def test_every_parameter_lies_in_shards_and_every_layer_is_put_together_alone(two_ranks: list[Row]) -> None:
    for found in of_both(two_ranks, "layout"):
        assert found["whole"] == [] and found["dtypes"] == {torch.float32}
        assert found["share"] == pytest.approx(0.5, abs=0.01)
        assert found["groups"] == ["", "backbone.encoder.layer.0", "backbone.encoder.layer.1"]
        assert found["frozen"] == ["backbone.pooler.dense.weight", "backbone.pooler.dense.bias"]


@pytest.mark.parametrize("name, dtype", STEPS)
def test_shards_hold_the_gradient_of_the_global_batch(
    name: str, dtype: str, two_ranks: list[Row], tiny_bert: Path
) -> None:
    want_loss, want = true_gradients(tiny_bert, CASES[name].pools(), CASES[name].mode)
    for shares, got in of_both(two_ranks, f"step/{name}/{dtype}"):
        assert shares["loss"] == pytest.approx(want_loss, rel=RTOL[dtype])
        assert_same_gradients(got, want, RTOL[dtype])


def test_dense_modules_lie_in_shards_and_learn(two_ranks: list[Row], tiny_bert: Path, tmp_path: Path) -> None:
    folder = add_dense(Path(shutil.copytree(tiny_bert, tmp_path / "dense")))
    _, want = true_gradients(folder, CASES["info_nce_cached"].pools(), "info_nce")
    assert sum(name.startswith("dense.") for name in want) == 6
    for _, got in of_both(two_ranks, "dense"):
        assert_same_gradients(got, want, RTOL["float64"])


def test_the_norm_is_that_of_all_shards(two_ranks: list[Row], tiny_bert: Path) -> None:
    _, want = true_gradients(tiny_bert, CASES["info_nce"].pools(), "info_nce")
    norm = float(sum(gradient.pow(2).sum() for gradient in want.values()) ** 0.5)
    assert norm > 0.05
    for max_norm, scale in ((0.0, 1.0), (0.05, 0.05 / norm)):
        for got_norm, got in of_both(two_ranks, f"clip/{max_norm}"):
            assert got_norm == pytest.approx(norm, rel=1e-5)
            assert_same_gradients(got, {name: gradient * scale for name, gradient in want.items()}, 1e-5)


def test_an_infinity_in_one_shard_skips_the_step_on_both(two_ranks: list[Row]) -> None:
    assert of_both(two_ranks, "scaler") == [[(True, 0.0, 4.0), (False, 1.0, 2.0)]] * 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_bf16_and_checkpointing_shards_compute_what_ddp_does(checkpointing: bool, two_ranks: list[Row]) -> None:
    ddp, fsdp = (of_both(two_ranks, f"bf16/{checkpointing}/{shard}") for shard in (False, True))
    for got, want in zip(fsdp, ddp, strict=True):
        assert_same_gradients(got, want, 2e-3)  # dummy texts round otherwise: bfloat16 has 8 bits


@pytest.mark.parametrize("case", ENCODE_CASES)
def test_encoding_from_shards_is_that_of_one_process(case: str, two_ranks: list[Row], tiny_bert: Path) -> None:
    texts, batch_size = ENCODE_CASES[case]
    alone = encode(load(tiny_bert, torch.float32), texts, prompt=PROMPT, batch_size=batch_size)
    for result in of_both(two_ranks, f"encode/{case}"):
        if (
            case == "one_text"
        ):  # a product of few rows takes, on an AMD EPYC, the order that the weights' addresses suit
            assert np.abs(result - alone).max() <= 1e-6
        else:
            assert np.array_equal(result, alone)


def test_training_goes_on_after_an_evaluation(two_ranks: list[Row]) -> None:
    before, after = (of_both(two_ranks, case)[0][1] for case in ("step/info_nce/float32", "after_encoding"))
    assert_same_gradients(after, before, 1e-7)


# --- train.py ---------------------------------------------------------------------------------------------------------

# Adam divides by the gradient's size, and a key's bias has none but rounding: the larger epsilon leaves it at rest.
SETTINGS: Row = {
    "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "sub_batch_size": 4, "save_steps": 2,
    "negatives_cross_device": True, "fix_position_embedding": True, "weight_decay": 0.01, "eval_steps": 2,
    "knowledge_distillation": True, "adam_epsilon": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 41)  # the last batch: 5 rows, 3 and 2


@pytest.fixture(scope="module")
def train_two(data: Path) -> Callable[..., Path]:
    """A run of two processes; its folder."""

    def train(model: Path, folder: Path, **settings: Any) -> Path:
        log = folder.with_name(f"{folder.name}.log")
        words = runs.flags(model, data, folder, val_data=data, **SETTINGS | settings)
        codes = runs.finish(runs.start_two(words, log))
        assert codes == [0, 0], "\n".join(path.read_text(encoding="utf-8") for path in log.parent.glob("*.log.*"))
        return folder

    return train


@pytest.fixture(scope="module")
def ddp(train_two: Callable[..., Path], tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_two(tiny_bert, tmp_path_factory.mktemp("ddp") / "run")


@pytest.fixture(scope="module")
def fsdp(train_two: Callable[..., Path], tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_two(tiny_bert, tmp_path_factory.mktemp("fsdp") / "run", fsdp=True)


def without_the_end(run: Path, target: Path) -> Path:
    """A copy of a run folder as it was after checkpoint-2."""
    later = [path.name for path in run.glob("checkpoint-*") if path.name != "checkpoint-2"]
    assert later
    return runs.copy_run(run, target, *later)


def assert_close_runs(one: Path, other: Path) -> None:
    """The same steps and the same weights, to what float32 sums in another order may differ."""
    for got, want in zip(runs.read_steps(one), runs.read_steps(other), strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-6)
    weights = runs.weights(other)
    assert runs.weights(one).keys() == weights.keys()
    for name, weight in runs.weights(one).items():
        assert torch.allclose(weight, weights[name], rtol=1e-4, atol=1e-5), name


def test_training_in_shards_is_training(ddp: Path, fsdp: Path) -> None:
    assert_close_runs(fsdp, ddp)
    assert set(runs.tree(fsdp)) == set(runs.tree(ddp))
    assert runs.manifest(fsdp)["facts"]["sharding"] == "FSDP2" and runs.manifest(ddp)["facts"]["sharding"] == "none"
    of_fsdp, of_ddp = (runs.training_state(folder / "checkpoint-2")["optimizer"] for folder in (fsdp, ddp))
    assert of_fsdp["state"].keys() == of_ddp["state"].keys() and len(of_ddp["state"]) > 30
    for i, values in of_ddp["state"].items():
        for name, value in values.items():
            assert torch.allclose(of_fsdp["state"][i][name], value, rtol=1e-3, atol=1e-4), (i, name)


@pytest.mark.parametrize("before, after", [("ddp", True), ("fsdp", False)])
def test_a_run_goes_on_in_the_other_form(
    before: str,
    after: bool,
    train_two: Callable[..., Path],
    tiny_bert: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    unbroken = request.getfixturevalue(before)
    folder = without_the_end(unbroken, tmp_path / "run")
    train_two(tiny_bert, folder, fsdp=after, resume_from_checkpoint="latest")
    assert runs.read_steps(folder)[:2] == runs.read_steps(unbroken)[:2]
    assert_close_runs(folder, unbroken)


def test_resume_from_shards_to_shards_is_bitwise(
    train_two: Callable[..., Path], tiny_bert_dropout: Path, tmp_path: Path
) -> None:
    unbroken = train_two(tiny_bert_dropout, tmp_path / "unbroken", fsdp=True)
    folder = without_the_end(unbroken, tmp_path / "run")
    train_two(tiny_bert_dropout, folder, fsdp=True, resume_from_checkpoint="latest")
    assert runs.equal_weights(folder, unbroken)
    assert runs.read_steps(folder) == runs.read_steps(unbroken)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_one_process_has_nothing_to_shard(
    tiny_bert: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    assert runs.run(tiny_bert, data, tmp_path / "run", fsdp=True, max_steps=1) == 0
    assert sum("FSDP needs several processes" in message for message in caplog.messages) == 1
    assert runs.manifest(tmp_path / "run")["facts"]["sharding"] == "none"


def test_sharding_is_the_flags_or_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for variable in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_OFFLOAD_PARAMS"):
        monkeypatch.delenv(variable, raising=False)
    assert resolve_sharding(True) and not resolve_sharding(False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"fsdp_version: 2.*configs/accelerate/fsdp2\.yaml"):
        resolve_sharding(False)
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert resolve_sharding(False)


def test_shards_and_a_moving_average_are_refused_together(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the flag, with one process, too, and by the launcher."""
    assert runs.run(tiny_bert, data, tmp_path / "run", fsdp=True, ema_decay=0.9) == 2
    err = capsys.readouterr().err
    assert "--ema_decay 0.9: cannot go with FSDP" in err and err.count("error: ") == 1 and "Traceback" not in err
    assert not (tmp_path / "run").exists()
    assert not resolve_sharding(False, 0.9)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match="cannot go with FSDP.*no FSDP in the launch file"):
        resolve_sharding(False, 0.9)


def test_deepspeed_is_refused(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert runs.run(tiny_bert, data, tmp_path / "run") == 2
    assert "DeepSpeed, which was never run here" in capsys.readouterr().err
