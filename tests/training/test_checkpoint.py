"""The run folder: resuming to the same bits, kills at bad moments, full disks, folders of others."""

import errno
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import torch
from runs import Row, read_lines, read_steps, run
from tiny_model import DENSE, add_dense

import train
from bge_core import UserError
from bge_core.encoder.load import load_encoder
from bge_core.encoder.settings import read_settings
from bge_core.files import atomic
from bge_core.runtime.cli import as_dict
from bge_core.runtime.config import TrainConfig
from bge_core.runtime.parcel import pack
from bge_core.training import checkpoint, run_folder, stop
from bge_core.training.random_state import restore_random_state, seed_random_state
from bge_core.training.read_ahead import ReadAhead
from bge_core.training.stop import STOP_SIGNALS, catch_stop_signals

# All that could make a resumed run another one: dropout, accumulation with a short last step of an epoch, GradCache,
# workers, a mean over steps that a checkpoint cuts in two, evaluations, a schedule.
SETTINGS: Row = {
    "num_train_epochs": 2, "gradient_accumulation_steps": 2, "sub_batch_size": 3, "dataloader_num_workers": 2,
    "logging_steps": 2, "eval_steps": 4, "save_steps": 3, "warmup_ratio": 0.3, "lr_scheduler_type": "cosine",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 rows: 7 micro-batches of 4, the last of them of 2."""
    return runs.write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 26)


@pytest.fixture(scope="module")
def unbroken(tiny_bert_dropout: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 steps, 4 an epoch; checkpoints after 3 and 6, both within an epoch. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    assert run(tiny_bert_dropout, data, folder, val_data=data, **SETTINGS) == 0
    return folder


@pytest.fixture
def resume(tiny_bert_dropout: Path, data: Path) -> Callable[..., int]:
    def resume(folder: Path, **changes: Any) -> int:
        settings = SETTINGS | {"val_data": data, "resume_from_checkpoint": "latest"} | changes
        return run(tiny_bert_dropout, data, folder, **settings)

    return resume


def assert_same_run(folder: Path, unbroken: Path) -> None:
    """Bitwise the same model, last checkpoint and figures; nothing left behind."""
    assert runs.equal_weights(folder, unbroken)
    assert read_steps(folder) == read_steps(unbroken)
    (*_, last) = checkpoint.checkpoints(unbroken)
    assert runs.equal_weights(folder / last.name, last)
    one, other = runs.training_state(folder / last.name), runs.training_state(last)
    for state in (one, other):
        for name in ("queries", "tokens"):  # of the mean that is being taken; only speeds come from them
            state["progress"]["window"].pop(name, None)
    assert runs.equal(one, other)
    assert set(os.listdir(folder)) == set(os.listdir(unbroken))  # no hidden leftovers either


def distance(one: Path, other: Path) -> float:
    """The norm of the difference of two models' weights."""
    a, b = runs.weights(one), runs.weights(other)
    return sum(float((a[name] - b[name]).double().norm() ** 2) for name in a) ** 0.5


# --------------------------------------------------------------------------------------------------------------- resume


def test_a_resumed_run_is_the_unbroken_one(unbroken: Path, tmp_path: Path, resume: Callable[..., int]) -> None:
    folder = runs.copy_run(unbroken, tmp_path / "run", "checkpoint-6")
    for name in ("README.md", "curves.png", "config.json"):
        (folder / name).unlink()
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 9, "los')  # killed while it wrote
    for leftover in (".checkpoint-6.tmp-123", ".model.tmp-123"):
        (folder / leftover).mkdir()
        (folder / leftover / "model.safetensors").write_bytes(b"half")
    (folder / ".manifest.json.tmp-123").write_text("{")
    assert resume(folder) == 0
    assert_same_run(folder, unbroken)
    assert runs.manifest(folder)["status"] == "finished"


def train_in(number: int, model: Path, data: Path, folder: Path, **settings: Any) -> None:
    """train.py in as many processes, with a batch of 4 rows together."""
    argv = runs.flags(model, data, folder, per_device_train_batch_size=4 // number, **settings)
    log = folder.parent / f"{folder.name}{number}.log"
    codes = runs.finish(runs.start_many(number, argv, log))
    assert codes == [0] * number, [file.read_text(encoding="utf-8") for file in log.parent.glob(f"{log.stem}*")]


def test_many_processes_resume_to_the_same_bits(tiny_bert_dropout: Path, data: Path, tmp_path: Path) -> None:
    """Dropout on, and in an epoch's last micro-batch of 2 rows two of four ranks have none."""
    settings = SETTINGS | {"val_data": data, "negatives_cross_device": True, "dataloader_num_workers": 0}
    train_in(4, tiny_bert_dropout, data, tmp_path / "unbroken", **settings)
    folder = runs.copy_run(tmp_path / "unbroken", tmp_path / "run", "checkpoint-6")
    train_in(4, tiny_bert_dropout, data, folder, resume_from_checkpoint="latest", **settings)
    assert_same_run(folder, tmp_path / "unbroken")


def test_a_run_with_a_moving_average_resumes_to_the_same_bits(
    tiny_bert_dropout: Path, data: Path, tmp_path: Path, resume: Callable[..., int]
) -> None:
    """The average, the number of its updates, and the evaluations of it; the average of other decays is refused."""
    settings = SETTINGS | {"val_data": data, "ema_decay": 0.3}
    assert run(tiny_bert_dropout, data, tmp_path / "whole", **settings) == 0
    folder = runs.copy_run(tmp_path / "whole", tmp_path / "run", "checkpoint-6")
    assert resume(folder, ema_decay=0.3) == 0
    assert_same_run(folder, tmp_path / "whole")
    assert runs.training_state(folder / "checkpoint-6")["ema"]["num_updates"] == 6
    again = runs.copy_run(tmp_path / "whole", tmp_path / "again", "checkpoint-6")
    assert resume(again, ema_decay=0.5) == 2
    assert resume(again, ema_decay=0.5, allow_changed="ema_decay") == 0
    assert not runs.equal_weights(again, folder)


def test_dense_modules_are_trained_averaged_and_resumed_to_the_same_bits(
    tiny_bert_dropout: Path, data: Path, tmp_path: Path
) -> None:
    model = add_dense(Path(shutil.copytree(tiny_bert_dropout, tmp_path / "model")))
    settings = SETTINGS | {"ema_decay": 0.3, "val_data": data}
    assert run(model, data, tmp_path / "whole", **settings) == 0
    before, after = runs.weights(model), runs.weights(tmp_path / "whole")
    learned = {name for name in before if not torch.equal(before[name], after[name])}
    assert learned == {name for name in before if "pooler" not in name}
    assert sum("_Dense" in name for name in learned) == 6
    folder = runs.copy_run(tmp_path / "whole", tmp_path / "run", "checkpoint-6")
    assert run(model, data, folder, resume_from_checkpoint="latest", **settings) == 0
    assert_same_run(folder, tmp_path / "whole")
    assert read_settings(folder).dense == DENSE and load_encoder(folder).embedding_size == 24


def test_a_moving_average_may_begin_where_a_run_is_resumed(
    unbroken: Path, tmp_path: Path, resume: Callable[..., int]
) -> None:
    """With --allow_changed; it begins as the weights of the checkpoint, which holds none."""
    folder = runs.copy_run(unbroken, tmp_path / "run", "checkpoint-6")
    assert resume(folder, ema_decay=0.3, allow_changed="ema_decay", save_steps=1) == 0
    slow = {name: value.double() for name, value in runs.weights(folder / "checkpoint-3").items()}
    for update, step in enumerate(range(4, 9), start=1):
        decay = min(0.3, (1 + update) / (10 + update))
        for name, value in runs.weights(folder / f"checkpoint-{step}").items():
            slow[name] = decay * slow[name] + (1 - decay) * value.double()
    for name, value in runs.weights(folder).items():
        torch.testing.assert_close(value.double(), slow[name], rtol=1e-6, atol=1e-6)


def test_two_processes_keep_the_moving_average_of_one(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """Each by itself: the same but for sums in another order; they score it together, and resume to the same bits."""
    settings = {
        "negatives_cross_device": True, "save_steps": 2, "adam_epsilon": 1e-3, "learning_rate": 1e-2, "ema_decay": 0.3,
        "val_data": data, "eval_steps": 2, "max_steps": 4,
    }  # fmt: skip
    train_in(2, tiny_bert, data, tmp_path / "two", **settings)
    assert run(tiny_bert, data, tmp_path / "one", **settings) == 0
    learned, differ = (distance(tmp_path / "one", other) for other in (tiny_bert, tmp_path / "two"))
    assert learned > 0.1 and differ < 1e-4 * learned, (learned, differ)
    scores = [[line for line in read_steps(tmp_path / name) if "MRR@10" in line] for name in ("one", "two")]
    assert len(scores[0]) == 2 and scores[0] == scores[1]
    folder = runs.copy_run(tmp_path / "two", tmp_path / "again", "checkpoint-4")
    train_in(2, tiny_bert, data, folder, resume_from_checkpoint="latest", **settings)
    assert_same_run(folder, tmp_path / "two")


def test_a_resumed_run_may_log_and_work_otherwise(unbroken: Path, tmp_path: Path, resume: Callable[..., int]) -> None:
    folder = runs.copy_run(unbroken, tmp_path / "run", "checkpoint-6")
    assert resume(folder, dataloader_num_workers=0, logging_steps=1, save_steps=0, val_data=None, eval_steps=None) == 0
    assert runs.equal_weights(folder, unbroken)
    steps = [line["step"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
    assert steps == [2, 4, 5, 6, 7, 8]


def test_resume_of_a_finished_run_changes_nothing(unbroken: Path, tmp_path: Path, resume: Callable[..., int]) -> None:
    shutil.copytree(unbroken, tmp_path / "run")
    assert resume(tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", unbroken)


def test_resume_from_a_named_checkpoint(unbroken: Path, tmp_path: Path, resume: Callable[..., int]) -> None:
    """Of its own folder, though there is a later one, and into an empty folder."""
    folder = runs.copy_run(unbroken, tmp_path / "run")
    assert resume(folder, resume_from_checkpoint=folder / "checkpoint-3") == 0
    assert_same_run(folder, unbroken)
    assert resume(tmp_path / "new", resume_from_checkpoint=folder / "checkpoint-3") == 0
    assert runs.equal_weights(tmp_path / "new", unbroken)
    assert read_lines(tmp_path / "new" / "metrics.jsonl")[0]["step"] == 4


def test_latest_begins_anew_where_there_is_no_checkpoint(
    unbroken: Path, tmp_path: Path, resume: Callable[..., int]
) -> None:
    """An empty folder, and that of a run which ended before its first checkpoint."""
    empty = tmp_path / "empty"
    empty.mkdir()
    young = runs.copy_run(unbroken, tmp_path / "young", "checkpoint-3", "checkpoint-6")
    for folder in (empty, young):
        assert resume(folder) == 0
        assert_same_run(folder, unbroken)


def test_a_run_that_stopped_early_and_is_resumed_stays_stopped(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill between the last checkpoint and the final model."""
    scores = iter([0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    monkeypatch.setattr(train, "evaluate_encoder", lambda *a, **k: SimpleNamespace(means={"MRR@10": next(scores)}))
    settings = {"val_data": data, "eval_steps": 1, "early_stopping_patience": 2, "save_steps": 1}
    assert run(tiny_bert, data, tmp_path / "whole", **settings) == 0
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "whole")][-1] == "checkpoint-3"
    folder = runs.copy_run(tmp_path / "whole", tmp_path / "run")
    assert run(tiny_bert, data, folder, resume_from_checkpoint="latest", **settings) == 0
    assert runs.equal_weights(folder, tmp_path / "whole")


def test_another_global_batch_is_refused(
    unbroken: Path, tmp_path: Path, resume: Callable[..., int], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Accelerate's environment may change the accumulation without any flag. The flags that fit are printed."""
    folder = runs.copy_run(unbroken, tmp_path / "run")
    before = runs.tree(folder)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    for changes, words in (
        ({"gradient_accumulation_steps": None}, "micro-batches of a step 2, now 3"),
        ({"per_device_train_batch_size": 2}, "rows of a micro-batch over all processes 4, now 2"),
    ):
        assert resume(folder, **changes) == 2
        err = capsys.readouterr().err
        assert words in err and "--per_device_train_batch_size 4 --gradient_accumulation_steps 2" in err
        assert runs.tree(folder) == before


def test_other_rows_in_the_same_file_are_refused_unless_allowed(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same rows in another place are the same data."""
    settings = {"max_steps": 2, "save_steps": 1, "resume_from_checkpoint": "latest"}
    data = runs.write_rows(tmp_path / "train.jsonl", 26)
    folder = tmp_path / "run"
    assert run(tiny_bert, data, folder, **settings) == 0
    moved = shutil.copy(data, tmp_path / "moved.jsonl")
    runs.write_rows(data, 26, seed=1)
    before = runs.tree(folder)
    assert run(tiny_bert, data, folder, **settings) == 2
    assert f"train_data: other content in {data}" in capsys.readouterr().err
    assert runs.tree(folder) == before
    assert run(tiny_bert, moved, folder, **settings) == 0
    assert run(tiny_bert, data, folder, allow_changed="train_data", **settings) == 0


def test_another_loss_is_refused_also_in_a_new_folder(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint itself knows its settings; the function's name is the same, its file is not."""
    loss = tmp_path / "loss.py"
    loss.write_text("from bge_core.loss import training_loss as my_loss\n")
    settings = {"loss": f"{loss}:my_loss", "max_steps": 2, "save_steps": 1}
    assert run(tiny_bert, data, tmp_path / "run", **settings) == 0
    settings["resume_from_checkpoint"] = tmp_path / "run" / "checkpoint-1"
    loss.write_text("from bge_core.loss import training_loss as my_loss  # improved\n")
    assert run(tiny_bert, data, tmp_path / "new", **settings, seed=7) == 2
    err = capsys.readouterr().err
    assert f"loss: other content in {loss}" in err and "seed: 42, now 7" in err
    assert "--allow_changed seed loss" in err
    assert os.listdir(tmp_path / "new") == []
    assert run(tiny_bert, data, tmp_path / "new", **settings, seed=7, allow_changed=["loss", "seed"]) == 0


def test_data_that_change_during_the_run_change_nothing(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are memory-mapped from a cache that follows the content."""
    settings = {"num_train_epochs": 2, "save_steps": 3, "dataloader_num_workers": 1}
    assert run(tiny_bert, data, tmp_path / "quiet", **settings) == 0
    own = Path(shutil.copy(data, tmp_path / "own.jsonl"))
    append = train.append_metrics

    def append_and_spoil(path: Path, values: Row) -> None:
        append(path, values)
        if values["step"] == 2:
            own.write_text('{"half a')

    monkeypatch.setattr(train, "append_metrics", append_and_spoil)
    assert run(tiny_bert, own, tmp_path / "run", **settings) == 0
    assert own.read_text() == '{"half a'
    assert runs.equal_weights(tmp_path / "run", tmp_path / "quiet")


def test_two_then_one_then_four_processes(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """The same rows, losses and weights as with two throughout, dropout 0.

    Bound: sums in another order differ by some 1e-7 of a gradient (float32), 1e-5 allowed in the matrix of section 1;
    AdamW carries it on for three steps, here with an epsilon above that noise, as it would blow up gradients that are 0
    but for rounding (the bias of the keys). So 1e-5 of what was learned since.
    """
    settings = {
        "gradient_accumulation_steps": 2, "negatives_cross_device": True, "save_steps": 1, "adam_epsilon": 1e-3,
        "learning_rate": 1e-2,
    }  # fmt: skip

    whole = tmp_path / "whole"
    train_in(2, tiny_bert, data, whole, **settings)
    assert [path.name for path in checkpoint.checkpoints(whole)] == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    one = runs.copy_run(whole, tmp_path / "one", "checkpoint-2", "checkpoint-3", "checkpoint-4")
    assert run(tiny_bert, data, one, resume_from_checkpoint="latest", **settings) == 0
    four = runs.copy_run(one, tmp_path / "four", "checkpoint-3", "checkpoint-4")
    train_in(4, tiny_bert, data, four, resume_from_checkpoint="latest", **settings)
    for line, want in zip(read_lines(four / "metrics.jsonl"), read_lines(whole / "metrics.jsonl"), strict=True):
        assert line["step"] == want["step"] and line["loss"] == pytest.approx(want["loss"], rel=1e-5)
    learned, differ = (distance(whole, other) for other in (whole / "checkpoint-1", four))
    assert learned > 0.1 and differ < 1e-5 * learned, (learned, differ)


# ------------------------------------------------------------------------------------------------------- folders of others


def test_folders_that_are_refused(
    unbroken: Path, data: Path, tiny_bert_dropout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another run's, the own one without a word about resuming, and one of something else: nothing is touched."""
    own = runs.copy_run(unbroken, tmp_path / "own")
    foreign = tmp_path / "foreign"
    (foreign / "checkpoint-3").mkdir(parents=True)
    (foreign / "thesis.txt").write_text("years of work")
    before = runs.tree(tmp_path)
    latest, other = {"resume_from_checkpoint": "latest"}, {"learning_rate": 2e-3, "weight_decay": 0.1}
    for folder, changes, words in (
        (own, {}, ["holds this very run", "--resume_from_checkpoint latest"]),
        (own, other, ["learning_rate: 0.001, now 0.002; weight_decay: 0.0, now 0.1", "--overwrite_output_dir"]),
        (own, other | latest, ["learning_rate: 0.001, now 0.002", "--allow_changed learning_rate weight_decay"]),
        (foreign, {}, ["is not empty", "thesis.txt"]),
        (foreign, latest, ["is not empty", "thesis.txt"]),
        (own, {"resume_from_checkpoint": own / "checkpoint-4"}, ["checkpoint-4: is not a checkpoint"]),
    ):
        assert run(tiny_bert_dropout, data, folder, val_data=data, **SETTINGS | changes) == 2
        err = capsys.readouterr().err
        assert all(word in err for word in words) and ("\n" + err).count("\nerror: ") == 1, err
        assert runs.tree(tmp_path) == before


def test_overwrite_begins_anew_and_removes_the_earlier_run_only(
    unbroken: Path, data: Path, tiny_bert_dropout: Path, tmp_path: Path
) -> None:
    folder = runs.copy_run(unbroken, tmp_path / "run")
    (folder / "notes.txt").write_text("mine")
    assert run(tiny_bert_dropout, data, folder, max_steps=2, save_steps=2, overwrite_output_dir=True) == 0
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["checkpoint-2"]
    assert [line["step"] for line in read_steps(folder)] == [1, 2]
    assert (folder / "notes.txt").read_text() == "mine"
    assert run(tiny_bert_dropout, data, tmp_path / "new", max_steps=2) == 0
    assert runs.equal_weights(folder, tmp_path / "new")


def test_overwrite_keeps_the_checkpoint_to_resume_from(
    unbroken: Path, tmp_path: Path, resume: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Continue with another learning rate in the same folder: done or refused, but nothing is lost and none ignored."""
    folder = runs.copy_run(unbroken, tmp_path / "run")
    code = resume(folder, resume_from_checkpoint=folder / "checkpoint-3", overwrite_output_dir=True, learning_rate=2e-3)
    assert (folder / "checkpoint-3").is_dir()
    assert code == 2 or read_lines(folder / "metrics.jsonl")[0]["step"] > 3


def flip(file: Path) -> None:
    """One bit of the byte in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def halve(file: Path) -> None:
    """The first half."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {"a flipped bit": flip, "half a file": halve, "no file": Path.unlink}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_of_any_file_is_found_and_named(unbroken: Path, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(unbroken / "checkpoint-6", tmp_path / "checkpoint-6"))
    assert checkpoint.find_damage(folder) is None
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"model.safetensors", "training_state.pt", "manifest.json"} < {path.name for path in files}
    for file in files:
        content = file.read_bytes()
        DAMAGES[kind](file)
        assert str(file) in str(checkpoint.find_damage(folder))
        file.write_bytes(content)
    assert checkpoint.find_damage(folder) is None


@pytest.mark.parametrize(
    "kind, name", list(zip(DAMAGES, ("model.safetensors", "training_state.pt", "manifest.json"), strict=True))
)
def test_a_damaged_checkpoint_is_passed_over(
    unbroken: Path, tmp_path: Path, resume: Callable[..., int], caplog: pytest.LogCaptureFixture, kind: str, name: str
) -> None:
    """The one before it is taken, which is said, and the run ends as the unbroken one did."""
    folder = runs.copy_run(unbroken, tmp_path / "run")
    newest, before = folder / "checkpoint-6", folder / "checkpoint-3"
    DAMAGES[kind](newest / name)
    assert resume(folder) == 0
    (warning,) = (record.getMessage() for record in caplog.records if "going on from" in record.getMessage())
    assert str(newest / name) in warning and warning.endswith(str(before))
    assert_same_run(folder, unbroken)


def test_a_damaged_checkpoint_never_counts_as_the_newest(
    unbroken: Path, tmp_path: Path, resume: Callable[..., int]
) -> None:
    """Else a run that keeps one checkpoint would keep that and remove its own."""
    folder = runs.copy_run(unbroken, tmp_path / "run")
    flip(folder / "checkpoint-6" / "model.safetensors")
    assert resume(folder, save_steps=5, save_total_limit=1) == 0
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6.aside"]
    assert runs.equal_weights(folder, unbroken)


def test_where_no_checkpoint_is_whole(
    unbroken: Path, tmp_path: Path, resume: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """All damaged, or the one that was named (then a whole one is offered): refused, nothing is touched."""
    folder = runs.copy_run(unbroken, tmp_path / "run")
    older, newer = folder / "checkpoint-3", folder / "checkpoint-6"
    halve(newer / "training_state.pt")
    before = runs.tree(folder)
    assert resume(folder, resume_from_checkpoint=newer) == 2
    err = capsys.readouterr().err
    assert str(newer / "training_state.pt") in err and f"--resume_from_checkpoint {older} is whole" in err
    assert runs.tree(folder) == before
    flip(older / "tokenizer.json")
    before = runs.tree(folder)
    assert resume(folder) == 2
    err = capsys.readouterr().err
    assert "no checkpoint is whole" in err and str(older / "tokenizer.json") in err and str(newer) in err
    assert resume(folder, resume_from_checkpoint=newer) == 2
    assert "no other beside it is whole" in capsys.readouterr().err
    assert runs.tree(folder) == before


def test_a_state_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Whatever torch makes of it."""
    for content in (b"", b"no pickle at all"):
        (tmp_path / "training_state.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"training_state.pt: is damaged"):
            checkpoint.load_checkpoint(tmp_path)


# -------------------------------------------------------------------------------------------------------------- full disk


@contextmanager
def no_file_beyond(num_bytes: int) -> Iterator[None]:
    """Every write past this size fails (the kernel's own error, as with a full disk)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="module")
def three_steps(tiny_bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "three_steps"
    assert run(tiny_bert, data, folder, max_steps=3) == 0
    return folder


@pytest.mark.parametrize("limit", [100_000, 300_000, None], ids=["weights", "state", "manifest"])
def test_a_full_disk_costs_no_earlier_checkpoint(
    three_steps: Path, tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, limit: int | None,
) -> None:  # fmt: skip
    """The second checkpoint does not fit: the weights have 255 kB, optimizer and the rest 530 kB."""
    write, write_json = checkpoint.write_checkpoint, atomic.write_json

    def write_on_full_disk(folder: Path, *args: Any) -> None:
        with no_file_beyond(limit if limit and folder.name == "checkpoint-2" else 10**9):
            write(folder, *args)

    def write_no_manifest(path: Path, value: Any) -> None:
        if ".checkpoint-2.tmp-" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_json(path, value)

    monkeypatch.setattr(checkpoint, "write_checkpoint", write_on_full_disk)
    if limit is None:
        monkeypatch.setattr(atomic, "write_json", write_no_manifest)
    settings = {"max_steps": 3, "save_steps": 1}
    assert run(tiny_bert, data, tmp_path / "run", **settings) == 2
    err = capsys.readouterr().err
    assert ("\n" + err).count("\nerror: ") == 1 and "Traceback" not in err
    assert f"{tmp_path / 'run' / 'checkpoint-2'}: could not be written" in err and ".tmp-" not in err
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    monkeypatch.undo()
    assert run(tiny_bert, data, tmp_path / "run", resume_from_checkpoint="latest", **settings) == 0
    assert runs.equal_weights(tmp_path / "run", three_steps)


def no_second_checkpoint() -> None:
    """The disk is full when checkpoint-4 is written; and half a second after each step, in which that is noticed."""
    save = torch.save

    def save_or_fail(state: Any, file: Any, **kwargs: Any) -> None:
        if ".checkpoint-4.tmp-" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        save(state, file, **kwargs)

    torch.save = save_or_fail
    slow_logging()


def test_an_error_in_the_background_ends_the_loop_of_all(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    settings = {"num_train_epochs": 4, "save_steps": 2, "per_device_train_batch_size": 2}
    children = runs.start_two(runs.flags(tiny_bert, data, folder, **settings), log, no_second_checkpoint)
    assert runs.finish(children) == [2, 2]
    said = [log.with_suffix(f".{rank}").read_text(encoding="utf-8") for rank in (0, 1)]
    assert f"error: {folder / 'checkpoint-4'}: could not be written: [Errno 28] No space left" in said[0]
    assert ".tmp-" not in said[0] and "Traceback" not in said[0] + said[1]
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["checkpoint-2"]
    assert checkpoint.find_damage(folder / "checkpoint-2") is None
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")][-1] < 8  # of 28


def test_a_full_disk_at_the_end_keeps_the_last_checkpoint(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = checkpoint.publish_model

    def publish_on_full_disk(*args: Any) -> None:
        with no_file_beyond(100_000):
            publish(*args)

    monkeypatch.setattr(checkpoint, "publish_model", publish_on_full_disk)
    settings = {"max_steps": 2, "save_steps": 2}
    assert run(tiny_bert, data, tmp_path / "run", **settings) == 2
    err = capsys.readouterr().err
    assert ("\n" + err).count("\nerror: ") == 1 and "Traceback" not in err
    assert not (tmp_path / "run" / "model.safetensors").exists()
    monkeypatch.setattr(checkpoint, "publish_model", publish)
    assert run(tiny_bert, data, tmp_path / "run", resume_from_checkpoint="latest", **settings) == 0
    assert runs.equal_weights(tmp_path / "run", tmp_path / "run" / "checkpoint-2")
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


# --------------------------------------------------------------------------------------------------------------- kill -9


def slow_saving() -> None:
    """Stretch the writing of a checkpoint, which takes milliseconds with so small a model: 0.3 s before the state."""
    save = torch.save

    def save_slowly(*args: Any, **kwargs: Any) -> None:
        time.sleep(0.3)
        save(*args, **kwargs)

    torch.save = save_slowly


def slow_publishing() -> None:
    """Stretch the moving of the final model's files: 0.2 s before the weights."""
    replace = os.replace

    def replace_slowly(source: Any, target: Any) -> None:
        if ".model.tmp-" in str(source) and str(source).endswith(".safetensors"):
            time.sleep(0.2)
        replace(source, target)

    os.replace = replace_slowly


def logged(folder: Path, step: int) -> bool:
    """Has this step been logged?"""
    file = folder / "metrics.jsonl"
    return file.exists() and f'"step": {step},' in file.read_text(encoding="utf-8", errors="replace")


def hidden(folder: Path, pattern: str) -> bool:
    """Is something of this name being written?"""
    return any(folder.glob(pattern))


def assert_nothing_half_written(folder: Path) -> None:
    """Every file that is not hidden can be read, every checkpoint loads; only metrics.jsonl may lack its last words."""
    for path in checkpoint.checkpoints(folder):
        load_encoder(path)
        assert checkpoint.load_checkpoint(path)["step"] == int(path.name.split("-")[1])
    assert {path.name for path in folder.glob("checkpoint-*")} == {p.name for p in checkpoint.checkpoints(folder)}
    for path in folder.rglob("*"):
        if path.suffix == ".json" and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            json.loads(path.read_text(encoding="utf-8"))
    if (folder / "model.safetensors").exists():
        runs.weights(folder)
    if (folder / "metrics.jsonl").exists():
        *lines, _ = (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
        for line in lines:
            json.loads(line)


# when to begin to count, seconds to wait then, how to stretch it, and what must be there
Moment = tuple[Callable[[Path], bool], float, Callable[[], None] | None, str]
MOMENTS: dict[str, Moment] = {
    "between checkpoints": (lambda f: logged(f, 4) and hidden(f, "checkpoint-3"), 0.01, None, "checkpoint-3"),
    "saving": (lambda f: hidden(f, ".checkpoint-6.tmp-*"), 0.05, slow_saving, ".checkpoint-6.tmp-*"),
    "publishing": (lambda f: hidden(f, ".model.tmp-*"), 0.1, slow_publishing, ".model.tmp-*"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_minus_9(
    unbroken: Path, tiny_bert_dropout: Path, data: Path, tmp_path: Path, resume: Callable[..., int], moment: str
) -> None:
    begun, seconds, stretch, there = MOMENTS[moment]
    folder = tmp_path / "run"
    child = runs.start(
        runs.flags(tiny_bert_dropout, data, folder, val_data=data, **SETTINGS), tmp_path / "log", patch=stretch
    )
    while child.is_alive() and not begun(folder):
        time.sleep(0.001)
    time.sleep(seconds)
    child.kill()
    assert runs.finish([child]) == [-9], (tmp_path / "log").read_text(encoding="utf-8")
    assert list(folder.glob(there)), "killed at another moment than was meant"
    assert (folder / ".lock").exists()  # and yet free, though its data workers may live on for a while
    assert_nothing_half_written(folder)
    assert resume(folder) == 0
    assert_same_run(folder, unbroken)


# -------------------------------------------------------------------------------------------------------- told to stop


def slow_logging() -> None:
    """Half a second after each logged step, in which a signal can arrive."""
    append = train.append_metrics

    def append_slowly(*args: Any) -> None:
        append(*args)
        time.sleep(0.5)

    train.append_metrics = append_slowly


def in_a_group_of_its_own() -> None:
    """As under a shell, `timeout` or torchrun, whose signals reach the data workers of the run, too."""
    os.setpgrp()
    slow_logging()


@pytest.mark.parametrize(
    "num_processes, number", [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGUSR1)], ids=str
)
def test_a_signal_stops_after_a_checkpoint(
    unbroken: Path, tiny_bert_dropout: Path, data: Path, tmp_path: Path, resume: Callable[..., int],
    num_processes: int, number: signal.Signals,
) -> None:  # fmt: skip
    """Told after step 4, with its workers (the last of two processes alone): 75 after a step and a checkpoint of it."""
    folder, log = tmp_path / "run", tmp_path / "log"
    settings = SETTINGS | {"per_device_train_batch_size": 4 // num_processes}
    argv = runs.flags(tiny_bert_dropout, data, folder, val_data=data, **settings)
    if num_processes == 1:
        children = [runs.start(argv, log, patch=in_a_group_of_its_own)]
    else:
        children = runs.start_two(argv, log, slow_logging)
    while children[0].is_alive() and not logged(folder, 4):
        time.sleep(0.001)
    (os.killpg if num_processes == 1 else os.kill)(children[-1].pid, number)
    assert runs.finish(children) == [75] * num_processes, [file.read_text() for file in tmp_path.glob("log*")]
    assert_nothing_half_written(folder)
    first, last = checkpoint.checkpoints(folder)
    assert first.name == "checkpoint-3" and runs.manifest(folder)["status"] == "running"
    assert last.name == "checkpoint-5" or (num_processes == 2 and last.name == "checkpoint-6")  # it may be a step ahead
    assert not (folder / "model.safetensors").exists()
    if num_processes == 1:
        assert resume(folder) == 0
        shutil.rmtree(last)  # the unbroken run has none of this step
        assert_same_run(folder, unbroken)


@pytest.mark.parametrize("told_at", [1, 3, "evaluation"], ids=["before", "before the last", "while evaluating"])
def test_what_is_done_is_saved_before_it_is_evaluated(
    told_at: int | str, tiny_bert_dropout: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to stop where an evaluation is due: that is left to the run that goes on, which does it once."""
    settings = {"max_steps": 4, "eval_steps": 2, "save_steps": 0, "load_best_model_at_end": True, "val_data": data}
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert run(tiny_bert_dropout, data, whole, **settings) == 0
    append, evaluate_encoder = train.append_metrics, train.evaluate_encoder

    def append_and_tell(path: Path, values: Row) -> None:
        append(path, values)
        if values["step"] == told_at and "loss" in values:
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluate_and_tell(*args: Any, **kwargs: Any) -> Any:
        if told_at == "evaluation":
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_encoder(*args, **kwargs)

    monkeypatch.setattr(train, "append_metrics", append_and_tell)
    monkeypatch.setattr(train, "evaluate_encoder", evaluate_and_tell)
    assert run(tiny_bert_dropout, data, folder, **settings) == 75
    (*_, last) = checkpoint.checkpoints(folder)
    evaluated = [line["step"] for line in read_steps(folder) if "MRR@10" in line]
    assert (last.name, evaluated) == {1: ("checkpoint-2", []), 3: ("checkpoint-4", [2])}.get(
        told_at, ("checkpoint-3", [2])
    )
    monkeypatch.undo()
    assert run(tiny_bert_dropout, data, folder, resume_from_checkpoint="latest", **settings) == 0
    assert read_steps(folder) == read_steps(whole) and runs.equal_weights(folder, whole)
    assert runs.manifest(folder)["scores"] == runs.manifest(whole)["scores"]


def test_a_run_killed_in_its_evaluation_saves_the_step_no_second_time(
    tiny_bert_dropout: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is there; what the owed evaluation finds is not in that of the unbroken run either."""
    settings = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True, "val_data": data}
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert run(tiny_bert_dropout, data, whole, **settings) == 0
    scores = [line["MRR@10"] for line in read_steps(whole) if "MRR@10" in line]
    assert scores[0] < scores[1]  # so that the best model is that of the last step
    evaluate_encoder, calls = train.evaluate_encoder, []

    def die_in_the_second(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise SystemExit(9)
        return evaluate_encoder(*args, **kwargs)

    monkeypatch.setattr(train, "evaluate_encoder", die_in_the_second)
    with pytest.raises(SystemExit):
        run(tiny_bert_dropout, data, folder, **settings)
    monkeypatch.undo()
    assert run(tiny_bert_dropout, data, folder, resume_from_checkpoint="latest", **settings) == 0
    assert_same_run(folder, whole)


def test_a_second_run_in_the_same_folder_is_refused(
    unbroken: Path, tiny_bert_dropout: Path, data: Path, tmp_path: Path, resume: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Whatever it asks for; the first goes on unharmed."""
    folder, log = tmp_path / "run", tmp_path / "log"
    child = runs.start(runs.flags(tiny_bert_dropout, data, folder, val_data=data, **SETTINGS), log, patch=slow_logging)
    while child.is_alive() and not logged(folder, 2):
        time.sleep(0.001)
    for changes in ({}, {"overwrite_output_dir": True, "resume_from_checkpoint": None}):
        assert resume(folder, **changes) == 2
        assert f"{folder}: another run is writing there" in capsys.readouterr().err
    assert child.is_alive()
    assert runs.finish([child]) == [0]
    assert_same_run(folder, unbroken)


def test_a_data_worker_that_is_killed(
    unbroken: Path, tiny_bert_dropout: Path, data: Path, tmp_path: Path, resume: Callable[..., int]
) -> None:
    """As the kernel does when memory runs out: the step is finished and saved, one message, exit 2."""
    folder, log = tmp_path / "run", tmp_path / "log"
    settings = SETTINGS | {"dataloader_num_workers": 1}
    child = runs.start(runs.flags(tiny_bert_dropout, data, folder, val_data=data, **settings), log, patch=impatient)
    while child.is_alive() and not logged(folder, 4):
        time.sleep(0.001)
    (worker,) = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    assert runs.finish([child]) == [2]
    said = log.read_text(encoding="utf-8")
    assert said.count("error: ") == 1 and "DataLoader worker" in said and "fewer --dataloader_num_workers" in said
    assert "Traceback" not in said and not list(folder.glob(".*"))
    assert_nothing_half_written(folder)
    (*_, last) = checkpoint.checkpoints(folder)
    assert f"saved after step {last.name.split('-')[1]};" in said and last.name != "checkpoint-3"
    assert resume(folder) == 0
    for path in set(folder.glob("checkpoint-*")) - {folder / path.name for path in unbroken.glob("checkpoint-*")}:
        shutil.rmtree(path)  # the unbroken run has none of this step
    assert_same_run(folder, unbroken)


def impatient() -> None:
    """In a child: look after the workers ten times a second, not every five seconds."""
    worker_loop = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    worker_loop._try_get_data.__defaults__ = (0.1,)
    slow_logging()


class Broken(torch.utils.data.Dataset):
    """Data with a fault in item 1."""

    def __getitem__(self, step: int) -> list[int]:
        if step == 1:
            raise RuntimeError("a fault of the data")
        return [step]


def test_an_error_in_a_worker_is_no_lost_worker() -> None:
    reader = ReadAhead(Broken(), 1)
    with pytest.raises(RuntimeError, match="a fault of the data"):
        list(reader.steps(0, 3))
    assert not reader.lost


@pytest.mark.parametrize(
    "message", ["DataLoader worker (pid(s) 7) exited unexpectedly", "Pin memory thread exited unexpectedly"]
)
def test_a_lost_worker_costs_no_step(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loader says of it depends on who was waiting for the worker; the steps are read and packed here."""

    def lose(*args: Any, **kwargs: Any) -> Iterator[Any]:
        yield pack([torch.tensor(0)])
        raise RuntimeError(message)

    monkeypatch.setattr(torch.utils.data, "DataLoader", lose)
    reader = ReadAhead([[torch.tensor(step)] for step in range(3)], 1, torch.device("cpu"))
    assert [int(step[0]) for step in reader.steps(0, 3)] == [0, 1, 2] and reader.lost


def test_signal_handlers_are_given_back_and_nohup_is_kept() -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ExitStack() as at_end:
            caught = catch_stop_signals(at_end)
            for number in STOP_SIGNALS:
                os.kill(os.getpid(), number)
            assert sorted(caught) == sorted(set(STOP_SIGNALS) - {signal.SIGHUP})
    finally:
        signal.signal(signal.SIGHUP, hangup)
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


def press_ctrl_c_twice() -> None:
    caught = catch_stop_signals(ExitStack())
    for _ in range(2):  # once by itself and once with the group: one press
        os.kill(os.getpid(), signal.SIGINT)
    assert caught == [signal.SIGINT] * 2
    stop._SAME_PRESS_SECONDS = -1.0
    os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_ends_at_once() -> None:
    child = multiprocessing.get_context("fork").Process(target=press_ctrl_c_twice)
    child.start()
    assert runs.finish([child], 10) == [-signal.SIGINT]


# ----------------------------------------------------------------------------------------------------------------- parts


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    def steps() -> list[int]:
        return [int(path.name.split("-")[1]) for path in checkpoint.checkpoints(tmp_path)]

    for step in (2, 10, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "training_state.pt").touch()
    (tmp_path / "checkpoint-12").mkdir()  # without a state: not one of ours
    (tmp_path / "checkpoint-best").mkdir()
    assert steps() == [2, 4, 6, 8, 10]  # by number, not by name
    checkpoint.prune(tmp_path, None, None)
    checkpoint.prune(tmp_path, 9, None)
    assert steps() == [2, 4, 6, 8, 10]
    checkpoint.prune(tmp_path, 3, "checkpoint-4")
    assert steps() == [4, 8, 10]
    checkpoint.prune(tmp_path, 1, "checkpoint-4")
    assert steps() == [4, 10]
    checkpoint.prune(tmp_path, 1, "checkpoint-10")
    assert steps() == [10]
    assert (tmp_path / "checkpoint-12").is_dir() and (tmp_path / "checkpoint-best").is_dir()


def test_a_checkpoint_that_fails_leaves_the_earlier_one_of_its_name(tmp_path: Path, tiny_bert: Path) -> None:
    saver = checkpoint.Saver(tmp_path, load_encoder(tiny_bert), {}, None)
    saver.save(1, {"a": 1})
    saver.wait()
    before = runs.tree(tmp_path)
    saver.save(1, {"a": lambda: None})
    with pytest.raises(Exception, match="pickle"):
        saver.wait()
    assert saver.failed() and runs.tree(tmp_path) == before
    saver = checkpoint.Saver(tmp_path, load_encoder(tiny_bert), {}, None)
    saver.save(1, {"a": 2})
    saver.wait()
    assert not saver.failed() and checkpoint.load_checkpoint(tmp_path / "checkpoint-1")["a"] == 2
    assert os.listdir(tmp_path) == ["checkpoint-1"]


def test_what_is_saved_is_the_moment_of_the_save(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop goes on with weights, optimizer and counts while they are written, and the next save waits."""
    encoder, told, order = load_encoder(tiny_bert), threading.Event(), []
    want = runs.weights(tiny_bert)
    write = checkpoint.write_checkpoint

    def write_when_told(folder: Path, *args: Any) -> None:
        assert told.wait(30)
        order.append(f"begin {folder.name}")
        write(folder, *args)
        order.append(f"end {folder.name}")

    monkeypatch.setattr(checkpoint, "write_checkpoint", write_when_told)
    saver = checkpoint.Saver(tmp_path, encoder, {}, None)
    state = {"moments": {0: [torch.ones(3)]}, "window": {"loss": 1.0}}
    saver.save(1, state)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1)
    state["moments"][0][0].add_(1)
    state["window"].clear()
    told.set()
    saver.save(2, state)
    saver.wait()
    assert order == ["begin checkpoint-1", "end checkpoint-1", "begin checkpoint-2", "end checkpoint-2"]
    got = runs.weights(tmp_path / "checkpoint-1")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert not runs.equal_weights(tmp_path / "checkpoint-1", tmp_path / "checkpoint-2")
    loaded = checkpoint.load_checkpoint(tmp_path / "checkpoint-1")
    assert torch.equal(loaded["moments"][0][0], torch.ones(3)) and loaded["window"] == {"loss": 1.0}


def test_the_random_state_comes_back(tmp_path: Path, tiny_bert: Path) -> None:
    torch.manual_seed(1)
    torch.rand(3)
    saver = checkpoint.Saver(tmp_path, load_encoder(tiny_bert), {}, None)
    saver.save(1, {})
    want = torch.rand(5)
    saver.wait()
    torch.manual_seed(2)
    restore_random_state(checkpoint.load_checkpoint(tmp_path / "checkpoint-1")["random_states"][0])
    assert torch.equal(torch.rand(5), want)


def test_the_random_state_of_another_number_of_processes() -> None:
    """A function of seed, step and rank, none of which may be forgotten."""

    def draw(*key: int) -> float:
        seed_random_state(*key)
        return float(torch.rand(()))

    keys = list(itertools.product((42, 43), (0, 3, 4), (0, 1, 2)))
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(*keys[0]) == draw(*keys[0])


def test_the_output_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file; name a folder"):
        run_folder.lock_run_folder(tmp_path / "file").__enter__()
    assert (tmp_path / "file").read_text() == "mine"


def test_settings_that_change_no_weight_may_change() -> None:
    """Every free setting is a setting (a renamed one would silently be bound); no other is free, unless allowed."""
    config = as_dict(TrainConfig(model_name_or_path="m", output_dir="o", train_data=["d"]))
    order = {"train_data": [["d", "1"]], "loss": [["l", "2"]], "rows": 8, "accumulation": 1, "candidates": "all"}
    manifest = {"config": config, "data_order": order}
    by_order = {"train_data"} | {setting for setting, _ in run_folder.ORDER_SETTINGS.values()}
    assert config.keys() >= run_folder.FREE_SETTINGS | by_order
    for name, value in config.items():
        if name == "allow_changed":
            continue
        changed = config | {name: "another" if value != "another" else 0}
        bound = set() if name in run_folder.FREE_SETTINGS | by_order else {name}
        assert run_folder.changed_settings(manifest, changed, order).keys() == bound
        assert run_folder.changed_settings(manifest, changed | {"allow_changed": [name]}, order) == {}


def test_what_a_batch_amounts_to_may_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 x 8 -> 1 x 16 -> 4 x 4 is the same; what is not names the flags, or the numbers of processes, that fit."""
    config = as_dict(TrainConfig(model_name_or_path="m", output_dir="o", train_data=["d"]))
    before = {"train_data": [["d", "1"]], "loss": [["l", "2"]], "rows": 16, "accumulation": 2, "candidates": "all"}

    def changed(num_processes: int, before: Row = before, **now: Any) -> dict[str, str]:
        monkeypatch.setattr(run_folder, "world", lambda: (0, num_processes))
        return run_folder.changed_settings({"config": config, "data_order": before}, config, before | now)

    assert changed(4) == {}
    assert changed(4, train_data=[["elsewhere/d", "1"]]) == {}
    assert changed(4, train_data=[["d", "1"], ["e", "3"]]) == {"train_data": "['d'], now ['d', 'e']"}
    assert changed(4, train_data=[["d", "3"]]) == {"train_data": "other content in d"}
    fit = "(use --per_device_train_batch_size 4 --negatives_cross_device True --gradient_accumulation_steps 2)"
    assert changed(4, rows=32) == {
        "per_device_train_batch_size": f"rows of a micro-batch over all processes 16, now 32 {fit}"
    }
    assert changed(4, candidates=4)["negatives_cross_device"].endswith(f"together all, now 4 {fit}")
    assert changed(1, accumulation=1)["gradient_accumulation_steps"].endswith(
        "of a step 2, now 1 (use --per_device_train_batch_size 16 --gradient_accumulation_steps 2)"
    )
    assert "(use 1, 2, 4, 8, 16 processes: 3 do not divide a batch of 16)" in str(changed(3, rows=15))
    # each of two processes for itself: no other number has these candidates
    alone = before | {"candidates": 8}
    assert "(use 2 processes and --per_device_train_batch_size 8 --grad" in str(changed(4, alone, candidates=4))
