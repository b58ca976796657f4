"""The run folder: resuming to the same bits, kills at bad moments, full disks, folders of others."""

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import torch
from runs import Row, read_lines, read_steps, run

import train
from bge_core import UserError, checkpoint, records
from bge_core.model import load_encoder

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
    """Accelerate's environment may change the accumulation without any flag."""
    folder = runs.copy_run(unbroken, tmp_path / "run")
    state = runs.training_state(folder / "checkpoint-6")
    state["data_order"]["accumulation"] = 3
    torch.save(state, folder / "checkpoint-6" / "training_state.pt")
    before = runs.tree(folder)
    assert resume(folder) == 2
    assert "the steps would not be the same" in capsys.readouterr().err
    assert runs.tree(folder) == before


def test_other_rows_in_the_same_file_are_noticed(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = runs.write_rows(tmp_path / "train.jsonl", 26)
    assert run(tiny_bert, data, tmp_path / "run", max_steps=2, save_steps=1) == 0
    runs.write_rows(data, 26, seed=1)
    code = run(tiny_bert, data, tmp_path / "run", max_steps=2, save_steps=1, resume_from_checkpoint="latest")
    assert str(data) in (capsys.readouterr().err if code == 2 else caplog.text)


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
        (own, other, ["other settings (learning_rate, weight_decay)", "--overwrite_output_dir"]),
        (own, other | latest, ["other settings (learning_rate, weight_decay)", "--overwrite_output_dir"]),
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


def damage(file: Path, content: bytes | None) -> None:
    """Other content, or half of it."""
    old = file.read_bytes()
    file.write_bytes(old[: len(old) // 2] if content is None else content)


DAMAGES: dict[str, tuple[str, bytes | None]] = {
    "half a state": ("training_state.pt", None),
    "an empty state": ("training_state.pt", b""),
    "no state": ("training_state.pt", b"no pickle at all"),
    "half the weights": ("model.safetensors", None),
    "empty weights": ("model.safetensors", b""),
    "no weights": ("model.safetensors", b"no weights at all"),
}


@pytest.mark.parametrize(
    "name, content",
    [pytest.param(name, content, id=kind) for kind, (name, content) in DAMAGES.items()],
)
def test_a_damaged_checkpoint_is_named(
    unbroken: Path, tmp_path: Path, resume: Callable[..., int], capsys: pytest.CaptureFixture[str], name: str,
    content: bytes | None,
) -> None:  # fmt: skip
    folder = runs.copy_run(unbroken, tmp_path / "run")
    damage(folder / "checkpoint-6" / name, content)
    before = runs.tree(folder)
    assert resume(folder) == 2
    err = capsys.readouterr().err
    assert ("\n" + err).count("\nerror: ") == 1 and "checkpoint-6" in err and "Traceback" not in err
    assert runs.tree(folder) == before
    assert resume(folder, resume_from_checkpoint=folder / "checkpoint-3") == 0  # an older one still works
    assert_same_run(folder, unbroken)


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


@pytest.mark.parametrize(
    "limit",
    [
        pytest.param(100, id="config"),
        pytest.param(100_000, id="weights"),
        pytest.param(300_000, id="state"),
    ],
)
def test_a_full_disk_costs_no_earlier_checkpoint(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    limit: int,
) -> None:  # fmt: skip
    """The second checkpoint does not fit: the weights have 255 kB, optimizer and the rest 530 kB."""
    save = checkpoint.save_checkpoint

    def save_on_full_disk(output_dir: Path, step: int, *args: Any) -> Path:
        with no_file_beyond(limit if step == 2 else 10**9):
            return save(output_dir, step, *args)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_on_full_disk)
    settings = {"max_steps": 3, "save_steps": 1}
    assert run(tiny_bert, data, tmp_path / "run", **settings) == 2
    err = capsys.readouterr().err
    assert ("\n" + err).count("\nerror: ") == 1 and "Traceback" not in err
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    assert run(tiny_bert, data, tmp_path / "whole", **settings) == 0
    assert run(tiny_bert, data, tmp_path / "run", resume_from_checkpoint="latest", **settings) == 0
    assert runs.equal_weights(tmp_path / "run", tmp_path / "whole")


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


Moment = tuple[Callable[[Path], bool], float, Callable[[], None] | None, str]
MOMENTS: dict[
    str, Moment
] = {  # when to begin to count, seconds to wait then, how to stretch it, and what must be there
    "between checkpoints": (lambda folder: logged(folder, 4), 0.01, None, "checkpoint-3"),
    "saving": (lambda folder: hidden(folder, ".checkpoint-6.tmp-*"), 0.05, slow_saving, ".checkpoint-6.tmp-*"),
    "publishing": (lambda folder: hidden(folder, ".model.tmp-*"), 0.1, slow_publishing, ".model.tmp-*"),
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


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_signal_stops_after_a_checkpoint(
    unbroken: Path, tiny_bert_dropout: Path, data: Path, tmp_path: Path, resume: Callable[..., int], num_processes: int
) -> None:
    """Told after step 4 (the last of two processes alone): both end with 75 after a step and a checkpoint of it."""
    folder, log = tmp_path / "run", tmp_path / "log"
    settings = SETTINGS | {"per_device_train_batch_size": 4 // num_processes}
    argv = runs.flags(tiny_bert_dropout, data, folder, val_data=data, **settings)
    if num_processes == 1:
        children = [runs.start(argv, log, patch=slow_logging)]
    else:
        children = runs.start_two(argv, log, slow_logging)
    while children[0].is_alive() and not logged(folder, 4):
        time.sleep(0.001)
    os.kill(children[-1].pid, signal.SIGTERM)
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


def test_the_callers_signal_handler_is_given_back(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert run(tiny_bert, data, tmp_path / "run", max_steps=1) == 0
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


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
    encoder = load_encoder(tiny_bert)
    checkpoint.save_checkpoint(tmp_path, 1, encoder, {"a": 1})
    before = runs.tree(tmp_path)
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save_checkpoint(tmp_path, 1, encoder, {"a": lambda: None})
    assert runs.tree(tmp_path) == before
    checkpoint.save_checkpoint(tmp_path, 1, encoder, {"a": 2})
    assert checkpoint.load_checkpoint(tmp_path / "checkpoint-1")["a"] == 2
    assert os.listdir(tmp_path) == ["checkpoint-1"]


def test_the_random_state_comes_back(tmp_path: Path, tiny_bert: Path) -> None:
    torch.manual_seed(1)
    torch.rand(3)
    folder = checkpoint.save_checkpoint(tmp_path, 1, load_encoder(tiny_bert), {})
    want = torch.rand(5)
    torch.manual_seed(2)
    checkpoint.restore_random_state(checkpoint.load_checkpoint(folder)["random_states"][0])
    assert torch.equal(torch.rand(5), want)


def test_the_output_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file; name a folder"):
        checkpoint.open_run_folder(tmp_path / "file", {}, resume=None, overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_settings_that_change_no_weight_may_change(tmp_path: Path) -> None:
    """Every free setting is a setting (a renamed one would silently be bound), and no other is free."""
    from bge_core.config import TrainConfig, as_dict

    config = as_dict(TrainConfig(model_name_or_path="m", output_dir="o", train_data=["d"]))
    assert checkpoint.FREE_SETTINGS <= config.keys()
    records.write_json(tmp_path / "manifest.json", {"stage": "train", "config": config})
    for name, value in config.items():
        changed = config | {name: "another" if value != "another" else 0}
        if name in checkpoint.FREE_SETTINGS:
            assert checkpoint.open_run_folder(tmp_path, changed, resume="latest", overwrite=False) is None
        else:
            with pytest.raises(UserError, match=rf"other settings \({name}\)"):
                checkpoint.open_run_folder(tmp_path, changed, resume="latest", overwrite=False)
