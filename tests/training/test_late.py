"""A step's figures read once the next step is queued, as on a GPU, here forced on a CPU: the same run, bit for bit."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import Row, read_lines, read_steps, run
from test_checkpoint import SETTINGS, assert_same_run
from test_train import NAN_LOSS, POISON, assert_refused, use_cpu_scaler

import train
from bge_core.training import checkpoint, progress
from bge_core.training.data import BatchPlan


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 rows: 7 micro-batches of 4, the last of them of 2."""
    return runs.write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 26)


def read_late() -> None:
    """What `reads_late` says of a GPU; to be undone."""
    train.reads_late = lambda device: True


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Every run in this process reads late, until `late.undo()`."""
    monkeypatch.setattr(train, "reads_late", lambda device: True)
    return monkeypatch


def test_late_is_for_devices_that_work_by_themselves() -> None:
    assert [progress.reads_late(torch.device(name)) for name in ("cuda:1", "cpu", "mps")] == [True, False, False]


@pytest.mark.parametrize("save_steps, want", [(0, "F1U1 F2T1U2 F3T2U3T3"), (2, "F1U1 F2T1U2T2 F3U3T3")])
def test_a_step_is_read_between_the_next_ones_backward_and_its_update(
    tiny_bert: Path, data: Path, tmp_path: Path, late: pytest.MonkeyPatch, save_steps: int, want: str
) -> None:
    """Before a checkpoint, and at the end, at once."""
    done: list[str] = []

    def noting(letter: str, function: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            step = args[0].step if letter == "T" else sum(letter in one for one in done) + 1
            done.append(f" F{step}" if letter == "F" else f"{letter}{step}")
            return function(*args, **kwargs)

        return noted

    late.setattr(train, "forward_backward", noting("F", train.forward_backward))
    late.setattr(train, "update_if_finite", noting("U", train.update_if_finite))
    late.setattr(train.Reading, "take", noting("T", train.Reading.take))
    assert run(tiny_bert, data, tmp_path / "run", max_steps=3, save_steps=save_steps) == 0
    assert "".join(done).strip() == want


CASES: dict[str, Row] = {
    "plain": {"save_steps": 3, "logging_steps": 2},
    "all": SETTINGS | {"ema_decay": 0.3, "load_best_model_at_end": True, "early_stopping_patience": 2},
}


@pytest.mark.parametrize("case", [pytest.param("plain", marks=pytest.mark.slow), "all"])
def test_a_run_read_late_is_the_same_run(
    tiny_bert_dropout: Path, data: Path, tmp_path: Path, late: pytest.MonkeyPatch, case: str
) -> None:
    settings = CASES[case] | ({"val_data": data} if "eval_steps" in CASES[case] else {})
    assert run(tiny_bert_dropout, data, tmp_path / "late", **settings) == 0
    late.undo()
    assert run(tiny_bert_dropout, data, tmp_path / "run", **settings) == 0
    assert_same_run(tmp_path / "late", tmp_path / "run")
    for one, other in zip(*map(checkpoint.checkpoints, (tmp_path / "late", tmp_path / "run")), strict=True):
        assert runs.equal_weights(one, other)


def test_a_step_that_loss_scaling_skips(
    tiny_bert_dropout: Path, data: Path, tmp_path: Path, late: pytest.MonkeyPatch
) -> None:
    """Learning rate, moving average and counts of the steps after it are those of a run that knew at once."""
    (tmp_path / "poison.py").write_text(POISON, encoding="utf-8")
    settings = {"loss": f"{tmp_path / 'poison.py'}:my_loss", "save_steps": 5, "ema_decay": 0.3, "sub_batch_size": 3}
    late.setattr(train, "start", train.start)
    use_cpu_scaler()
    assert run(tiny_bert_dropout, data, tmp_path / "late", **settings) == 0
    late.setattr(train, "reads_late", progress.reads_late)
    assert run(tiny_bert_dropout, data, tmp_path / "run", **settings) == 0
    assert_same_run(tmp_path / "late", tmp_path / "run")
    assert [line["skipped_steps"] for line in read_steps(tmp_path / "late")] == [0, 0, 1, 1, 1, 1, 1]
    assert runs.training_state(tmp_path / "late" / "checkpoint-5")["ema"]["num_updates"] == 4


def test_a_signal_is_heeded_after_the_step_in_progress(
    tiny_bert_dropout: Path, data: Path, tmp_path: Path, late: pytest.MonkeyPatch
) -> None:
    """Told when step 2 is logged, which is in step 3: that one tells it, and the run ends after step 4; then goes on."""
    settings = {"save_steps": 0, "logging_steps": 1}
    append = train.append_metrics

    def append_and_tell(path: Path, values: Row) -> None:
        append(path, values)
        if values["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    late.setattr(train, "append_metrics", append_and_tell)
    assert run(tiny_bert_dropout, data, tmp_path / "late", **settings) == 75
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "late")] == ["checkpoint-4"]
    late.setattr(train, "append_metrics", append)
    assert run(tiny_bert_dropout, data, tmp_path / "late", resume_from_checkpoint="latest", **settings) == 0
    late.undo()
    assert run(tiny_bert_dropout, data, tmp_path / "run", **settings) == 0
    assert read_steps(tmp_path / "late") == read_steps(tmp_path / "run")
    assert runs.equal_weights(tmp_path / "late", tmp_path / "run")


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_told_one_step_late(
    tiny_bert: Path, data: Path, tmp_path: Path, late: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    scaled: bool,
) -> None:  # fmt: skip
    """Step 3: when it is read, step 4 has been computed, on the weights after step 2."""
    late.setattr(train, "start", train.start)
    if scaled:
        use_cpu_scaler()
    seen: list[Any] = []
    build_optimizer = train.build.build_optimizer
    late.setattr(train.build, "build_optimizer", lambda *args: seen.append(build_optimizer(*args)) or seen[-1])
    (tmp_path / "loss.py").write_text(NAN_LOSS, encoding="utf-8")
    settings = {"lr_scheduler_type": "constant", "ema_decay": 0.5}
    nan = {"loss": f"{tmp_path / 'loss.py'}:my_loss", "loss_args": json.dumps({"value": "nan"})}
    code = run(tiny_bert, data, tmp_path / "run", **settings, **nan)
    file = tmp_path / "run" / "not_finite-step3-rank0.jsonl"
    assert_refused(capsys, code, "step 3", str(file))
    assert [row["row"] for row in read_lines(file)] == BatchPlan((26,), 4, 1, seed=42).epoch(0)[2].tolist()
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert run(tiny_bert, data, tmp_path / "two", max_steps=2, **settings) == 0
    broken, whole = seen
    assert runs.equal(broken.state_dict()["state"], whole.state_dict()["state"])
    for one, other in zip(broken.param_groups, whole.param_groups, strict=True):
        assert runs.equal([*map(torch.Tensor.detach, one["params"])], [*map(torch.Tensor.detach, other["params"])])


@pytest.mark.slow
def test_two_processes_stop_together(tiny_bert_dropout: Path, data: Path, tmp_path: Path) -> None:
    """The loss of step 5 is NaN on the last rank alone: the same run up to there, each rank tells its rows of it."""
    loss = POISON.replace("calls == 3", "calls == 5").replace("Poison.apply(output.loss)", "output.loss * float('nan')")
    (tmp_path / "loss.py").write_text(loss, encoding="utf-8")
    settings = {"per_device_train_batch_size": 2, "save_steps": 4}
    nan = runs.flags(tiny_bert_dropout, data, tmp_path / "late", loss=f"{tmp_path / 'loss.py'}:my_loss", **settings)
    assert runs.finish(runs.start_two(nan, tmp_path / "late.log", read_late)) == [2, 2]
    assert "step 5: the loss or its gradient is NaN" in (tmp_path / "late.0").read_text(encoding="utf-8")
    told = [read_lines(tmp_path / "late" / f"not_finite-step5-rank{rank}.jsonl") for rank in (0, 1)]
    rows = BatchPlan((26,), 4, 1, seed=42).epoch(0)[4].tolist()
    assert all(told) and sorted(row["row"] for of_rank in told for row in of_rank) == sorted(rows)
    assert runs.finish(
        runs.start_two(runs.flags(tiny_bert_dropout, data, tmp_path / "run", **settings), tmp_path / "run.log")
    ) == [0, 0]
    assert read_steps(tmp_path / "late") == read_steps(tmp_path / "run")[:4]
    late, at_once = (tmp_path / name / "checkpoint-4" for name in ("late", "run"))
    assert runs.equal(*map(runs.training_state, (late, at_once))) and runs.equal_weights(late, at_once)
