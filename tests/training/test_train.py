"""train.py from its command line: what a run leaves behind, what it says first, what it refuses, how it is launched."""

import importlib.util
import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
import torch
from runs import Row, read_lines, read_steps, run
from tiny_model import make_tiny_bert

import bge_core.runtime.launch
import train
from bge_core import UserError
from bge_core.encoder.load import load_encoder
from bge_core.training import progress
from bge_core.training.data import BatchPlan

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "loss_curve.json"
METRIC_NAMES = ["MRR@1", "MRR@10", "MRR@100", "Recall@1", "Recall@10", "Recall@100", "nDCG@10"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 rows: 7 micro-batches of 4, the last of them of 2."""
    return runs.write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 26)


def assert_refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> None:
    """Exit code 2, one message on stderr that holds these words, no traceback, nothing on stdout."""
    out, err = capsys.readouterr()
    assert code == 2
    assert ("\n" + err).count("\nerror: ") == 1 and "Traceback" not in err
    for word in words:
        assert word in err
    assert out == ""


# --------------------------------------------------------------------------------------------------- what a run leaves

FINISHED = {
    "num_train_epochs": 2, "gradient_accumulation_steps": 2, "save_steps": 0.2, "save_total_limit": 2, "eval_steps": 0.5,
    "logging_steps": 3, "run_name": "我的模型", "query_instruction_for_retrieval": "检索：",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 steps: 4 an epoch, of two micro-batches each but for the last. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run(tiny_bert, data, folder, val_data=data, **FINISHED) == 0
    return folder


def test_files_of_a_run(finished: Path) -> None:
    model_files = {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "modules.json",
        "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling", "2_Normalize",
    }  # fmt: skip
    own_files = {"README.md", "metrics.jsonl", "curves.png", "manifest.json"}
    # save_steps 0.2 of 8 steps is every ceil(1.6) = 2; of the four checkpoints the two newest are kept
    assert set(os.listdir(finished)) == model_files | own_files | {"checkpoint-6", "checkpoint-8"}
    for name in ("checkpoint-6", "checkpoint-8"):
        assert set(os.listdir(finished / name)) == model_files | {"training_state.pt", "manifest.json"}
    assert runs.equal_weights(finished, finished / "checkpoint-8")
    assert not runs.equal_weights(finished, finished / "checkpoint-6")
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    encoder = load_encoder(finished)
    assert encoder.settings.pooling == "cls" and encoder.settings.normalize is True
    assert encoder.settings.query_prompt == "检索：" and encoder.settings.passage_prompt == ""
    assert encoder.settings.max_length == 128  # --passage_max_len


def test_the_saved_tokenizer_cuts_no_more_than_the_base_does(finished: Path, tiny_bert: Path) -> None:
    """What reads tokenizer.json without transformers would silently cut passages to the length of queries."""

    def truncation(folder: Path) -> Any:
        return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["truncation"]

    assert truncation(finished) == truncation(finished / "checkpoint-6") == truncation(tiny_bert) is None


def test_metrics_of_a_run(finished: Path) -> None:
    lines = read_lines(finished / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 8]
    assert [(line["step"], line["epoch"]) for line in training] == [(3, 0.75), (6, 1.5), (8, 2.0)]
    for line in training:
        fields = {"loss", "lr", "grad_norm", "queries_per_second", "tokens_per_second", "memory_mb", "accuracy"}
        assert fields <= line.keys()
        assert all(math.isfinite(value) for value in line.values())
        assert line["tokens_per_second"] > line["queries_per_second"] > 0 and line["memory_mb"] > 10
        assert "skipped_steps" not in line  # only with loss scaling
    assert [line["lr"] for line in training] == pytest.approx([1e-3 * (8 - done) / 8 for done in (2, 5, 7)])
    for line in (line for line in lines if "loss" not in line):
        assert list(line) == ["step", *METRIC_NAMES]
        assert all(0 <= line[name] <= 1 for name in METRIC_NAMES)


def test_the_logged_loss_is_the_mean_since_the_last_log(
    finished: Path, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    every = {**FINISHED, "logging_steps": 1, "save_steps": 0, "eval_steps": None}
    assert run(tiny_bert, data, tmp_path / "every", **every) == 0
    single = [line for line in read_steps(tmp_path / "every") if "loss" in line]
    means = [line for line in read_steps(finished) if "loss" in line]
    for line, part in zip(means, (single[:3], single[3:6], single[6:]), strict=True):
        for name in ("loss", "accuracy", "positive_similarity"):
            assert line[name] == pytest.approx(sum(step[name] for step in part) / len(part), rel=1e-9)
        assert line["grad_norm"] == part[-1]["grad_norm"] and line["lr"] == part[-1]["lr"]  # of this very step


def test_manifest_of_a_run(finished: Path, tiny_bert: Path, data: Path) -> None:
    manifest = runs.manifest(finished)
    assert manifest["stage"] == "train" and manifest["status"] == "finished" and manifest["seed"] == 42
    assert manifest["config"]["model_name_or_path"] == str(tiny_bert) and manifest["config"]["learning_rate"] == 1e-3
    assert "token" not in manifest["config"]
    (entry,) = manifest["inputs"]
    assert (entry["path"], entry["rows"], len(entry["sha256"])) == (str(data), 26, 64)
    assert {"python", "torch", "transformers", "accelerate", "datasets"} <= manifest["libraries"].keys()
    facts = manifest["facts"]
    want = {
        "rows": 26, "steps": 8, "steps per epoch": 4, "processes": 1, "queries per update": 8, "candidates per query": 12,
        "random guess ln(N)": 2.485, "precision": "float32", "pooling": "cls", "query instruction": "检索：",
    }  # fmt: skip
    assert {name: facts[name] for name in want} == want
    last = read_lines(finished / "metrics.jsonl")[-1]
    assert manifest["scores"] == {name: last[name] for name in METRIC_NAMES} and manifest["skipped_steps"] == 0


def test_model_card_of_a_run(finished: Path, tiny_bert: Path, data: Path) -> None:
    card = (finished / "README.md").read_text(encoding="utf-8")
    for text in (
        "library_name: sentence-transformers", "# 我的模型", f"| base model | {tiny_bert} |", f"| training data | {data} |",
        "| precision | float32 |", "`learning_rate=0.001`", "SentenceTransformer(", "'检索：'",
    ):  # fmt: skip
        assert text in card
    for name, value in runs.manifest(finished)["scores"].items():
        assert f"| {name} | {value:.4f} |" in card


def test_max_steps_beats_epochs(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    assert run(tiny_bert, data, tmp_path / "run", max_steps=3, num_train_epochs=30, save_steps=1) == 0
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    assert [line["lr"] for line in read_steps(tmp_path / "run")] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
        f"checkpoint-{i}" for i in (1, 2, 3)
    ]


def test_grad_norm_is_of_the_gradient_before_clipping(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 2, "lr_scheduler_type": "constant"}
    for name, limit in (("none", 0), ("tight", 1e-12)):
        assert run(tiny_bert, data, tmp_path / name, max_grad_norm=limit, adam_epsilon=1.0, **settings) == 0
    free, clipped = read_steps(tmp_path / "none"), read_steps(tmp_path / "tight")
    assert free[0]["grad_norm"] == clipped[0]["grad_norm"] > 1
    start = runs.weights(tiny_bert)

    def moved(folder: str) -> float:  # of a layer, as the unused pooler is saved, too
        name = "encoder.layer.0.attention.self.query.weight"
        return (runs.weights(tmp_path / folder)[name] - start[name]).abs().max().item()

    assert moved("tight") < 1e-9 < moved("none")  # with so large an epsilon a step is proportional to the gradient


SCORES = [0.1, 0.5, 0.3, 0.4, 0.2, 0.45, 0.6]


def scripted(monkeypatch: pytest.MonkeyPatch, scores: list[float], first: int = 0) -> None:
    """Evaluations give these values of MRR@10, one after the other."""
    values = iter(scores[first:])
    monkeypatch.setattr(
        train, "evaluate_encoder", lambda *args, **kwargs: SimpleNamespace(means={"MRR@1": 0.0, "MRR@10": next(values)})
    )


@pytest.mark.parametrize("save_steps, kept", [(3, {2, 6}), (1, {2, 7}), (0, set())], ids=["between", "each", "none"])
def test_the_best_model_is_kept_and_published(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_steps: int, kept: set[int]
) -> None:
    """Best at step 2 of 7; only the newest checkpoint is kept beside it."""
    scripted(monkeypatch, [*SCORES[:6], 0.2])
    settings = {"eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    assert run(tiny_bert, data, tmp_path / "run", val_data=data, save_steps=save_steps, **settings) == 0
    kept = kept or {2}
    assert {int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*")} == kept
    assert runs.equal_weights(tmp_path / "run", tmp_path / "run" / "checkpoint-2")
    if save_steps == 1:
        assert not runs.equal_weights(tmp_path / "run", tmp_path / "run" / "checkpoint-7")
    assert not (tmp_path / "run" / "training_state.pt").exists()


def test_early_stopping(tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, SCORES)
    settings = {"eval_steps": 1, "early_stopping_patience": 3, "save_steps": 2}
    assert run(tiny_bert, data, tmp_path / "run", val_data=data, **settings) == 0
    assert [line["step"] for line in read_steps(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4, 5]
    assert runs.manifest(tmp_path / "run")["status"] == "finished"


@pytest.mark.parametrize("settings", [{"save_steps": 500}, {"save_steps": 0}, {"save_steps": 1, "eval_steps": 0}])
def test_val_data_is_scored_at_the_end(tiny_bert: Path, data: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    assert run(tiny_bert, data, tmp_path / "run", val_data=data, max_steps=2, **settings) == 0
    assert [line["step"] for line in read_steps(tmp_path / "run") if "MRR@10" in line] == [2]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time by the run's own work: a step takes 1 second, an evaluation 1,000."""
    now = [0.0]

    def taking(seconds: float, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return function(*args, **kwargs)

        return timed

    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(train, "forward_backward", taking(1, train.forward_backward))
    monkeypatch.setattr(train, "evaluate_encoder", taking(1000, train.evaluate_encoder))


@pytest.mark.usefixtures("clock")
def test_rates_count_the_time_of_training_alone(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """An evaluation in the middle of a window neither resets the clock nor adds to it, nor does a resume."""
    every = {"max_steps": 6, "logging_steps": 4, "eval_steps": 3, "save_steps": 3, "val_data": data}
    assert run(tiny_bert, data, tmp_path / "run", **every) == 0
    rates = [line["queries_per_second"] for line in read_lines(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert rates == [4, 4]  # the batch of 4 queries, a second each
    resumed = runs.copy_run(tmp_path / "run", tmp_path / "resumed", "checkpoint-6")
    assert run(tiny_bert, data, resumed, **every, resume_from_checkpoint="latest") == 0
    assert [line["queries_per_second"] for line in read_lines(resumed / "metrics.jsonl") if "loss" in line] == rates


def test_evaluation_at_the_end_alone(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    settings = {"val_data": data, "max_steps": 3, "save_steps": 1, "eval_steps": 0}
    assert run(tiny_bert, data, tmp_path / "run", **settings) == 0
    assert [line["step"] for line in read_steps(tmp_path / "run") if "MRR@10" in line] == [3]


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr_scheduler_type": "linaer"},
        {"adam_beta1": 1.5},
        {"eval_steps": -1},
        {"metric_for_best_model": "eval_loss"},
        {"loss": "no_such_file.py:loss"},
        {"use_mrl": True, "mrl_dims": [16, 64]},
        {"guide_encoder": "./nowhere"},
        {"report_to": "wandb_misspelt"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_refused_start_leaves_the_earlier_run_as_it_is(
    finished: Path, tiny_bert: Path, data: Path, capsys: pytest.CaptureFixture[str], wrong: Row
) -> None:
    before = runs.tree(finished)
    assert run(tiny_bert, data, finished, val_data=data, overwrite_output_dir=True, **wrong) == 2
    assert f"--{[*wrong][-1]}" in capsys.readouterr().err
    assert runs.tree(finished) == before


def golden_run(model: Path, folder: Path) -> list[Row]:
    """12 steps that use most of what changes a number: accumulation (of 5 and 3 rows), warm-up, decay, clipping."""
    rows = runs.write_rows(folder / "rows.jsonl", 28, seed=5)
    code = run(
        model, rows, folder / "run", num_train_epochs=4, per_device_train_batch_size=5, gradient_accumulation_steps=2,
        warmup_ratio=0.25, lr_scheduler_type="cosine", weight_decay=0.1, max_grad_norm=1.0, temperature=0.05,
    )  # fmt: skip
    assert code == 0
    return [{name: line[name] for name in ("step", "loss", "lr", "grad_norm")} for line in read_steps(folder / "run")]


def test_loss_curve_is_the_stored_one(tiny_bert: Path, tmp_path: Path) -> None:
    want = json.loads(GOLDEN.read_text(encoding="utf-8"))["curve"]
    got = golden_run(tiny_bert, tmp_path)
    assert [line["step"] for line in got] == [line["step"] for line in want] == list(range(1, 13))
    for line, stored in zip(got, want, strict=True):
        assert line == pytest.approx(stored, rel=1e-3), f"step {line['step']}"
    assert np.mean([line["loss"] for line in want[-3:]]) < 0.6 * want[0]["loss"]  # it learns


# ------------------------------------------------------------------------------------------ moving average of the weights

AVERAGED = {"ema_decay": 0.3, "save_steps": 1, "eval_steps": 2}  # the decay is reached at the third of 7 updates


@pytest.fixture(scope="module")
def averaged(tiny_bert_dropout: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 steps, each with its checkpoint. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "averaged"
    assert run(tiny_bert_dropout, data, folder, val_data=data, **AVERAGED) == 0
    return folder


def average_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The moving average that a checkpoint holds, by the names of the model's file."""
    average = runs.training_state(checkpoint)["ema"]["average"]
    return {name.removeprefix("backbone."): value for name, value in average.items()}


def test_the_final_model_is_the_moving_average_of_the_weights(averaged: Path, tiny_bert_dropout: Path) -> None:
    """Of the initial weights and those of all checkpoints, in float64; what is not trained stays as it was."""
    base = runs.weights(tiny_bert_dropout)
    slow = {name: value.double() for name, value in base.items()}
    for step in range(1, 8):
        decay = min(0.3, (1 + step) / (10 + step))
        for name, value in runs.weights(averaged / f"checkpoint-{step}").items():
            slow[name] = decay * slow[name] + (1 - decay) * value.double()
        assert runs.training_state(averaged / f"checkpoint-{step}")["ema"]["num_updates"] == step
        for name, value in average_of(averaged / f"checkpoint-{step}").items():
            torch.testing.assert_close(value.double(), slow[name], rtol=1e-6, atol=1e-6)
    final, last = runs.weights(averaged), average_of(averaged / "checkpoint-7")
    frozen = {name for name in base if name.startswith("pooler.")}
    assert last.keys() == base.keys() - frozen and frozen
    assert all(
        torch.equal(final[name], value) for name, value in (base | last).items() if name in last or name in frozen
    )
    assert not runs.equal_weights(averaged, averaged / "checkpoint-7")


def test_a_moving_average_changes_no_training(
    averaged: Path, tiny_bert_dropout: Path, data: Path, tmp_path: Path
) -> None:
    """With and without it, the same weights, optimizer and losses, bit for bit, though evaluations lie between."""
    assert run(tiny_bert_dropout, data, tmp_path / "run", val_data=data, **AVERAGED | {"ema_decay": None}) == 0
    for step in range(1, 8):
        one, other = (folder / f"checkpoint-{step}" for folder in (averaged, tmp_path / "run"))
        assert runs.equal_weights(one, other)
        state, plain = runs.training_state(one), runs.training_state(other)
        assert state.keys() - plain.keys() == {"ema"} and plain.keys() <= state.keys()
        for name in ("optimizer", "scaler", "random_states", "step"):
            assert runs.equal(state[name], plain[name])
    losses = [[line for line in read_steps(folder) if "loss" in line] for folder in (averaged, tmp_path / "run")]
    assert losses[0] == losses[1]
    assert runs.equal_weights(tmp_path / "run", tmp_path / "run" / "checkpoint-7")
    assert set(runs.tree(averaged)) == set(runs.tree(tmp_path / "run"))


def test_evaluations_score_the_moving_average(
    tiny_bert_dropout: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[dict[str, torch.Tensor]] = []

    def look(encoder: Any, *_: Any, **__: Any) -> SimpleNamespace:
        scored.append({name: value.clone() for name, value in encoder.backbone.state_dict().items()})
        return SimpleNamespace(means={"MRR@10": 0.0})

    monkeypatch.setattr(train, "evaluate_encoder", look)
    assert run(tiny_bert_dropout, data, tmp_path / "run", val_data=data, **AVERAGED) == 0
    for step, weights in zip((2, 4, 6, 7), scored, strict=True):
        expected = average_of(tmp_path / "run" / f"checkpoint-{step}")
        assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.mark.parametrize("save_steps", [3, 1, 0], ids=["between", "each", "none"])
def test_the_best_model_is_the_moving_average_that_was_scored(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_steps: int
) -> None:
    scripted(monkeypatch, [*SCORES[:6], 0.2])  # best at step 2
    settings = {"eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1, "ema_decay": 0.5}
    assert run(tiny_bert, data, tmp_path / "run", val_data=data, save_steps=save_steps, **settings) == 0
    final = runs.weights(tmp_path / "run")
    expected = average_of(tmp_path / "run" / "checkpoint-2")
    assert all(torch.equal(final[name], value) for name, value in expected.items())
    assert not runs.equal_weights(tmp_path / "run", tmp_path / "run" / "checkpoint-2")


# ------------------------------------------------------------------------------------------------- what it learns from


def test_files_of_a_folder_are_used_in_sorted_order(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "folder" / "below").mkdir(parents=True)
    (tmp_path / "folder" / "a.jsonl").write_text("".join(lines[:10]), encoding="utf-8")
    (tmp_path / "folder" / "below" / "b.jsonl").write_text("".join(lines[10:]), encoding="utf-8")
    (tmp_path / "folder" / "a.jsonl.manifest.json").write_text("{}", encoding="utf-8")
    for name, train_data in (("one", data), ("many", tmp_path / "folder")):
        assert run(tiny_bert, train_data, tmp_path / name, max_steps=2) == 0
    assert read_steps(tmp_path / "one") == read_steps(tmp_path / "many")
    assert [entry["rows"] for entry in runs.manifest(tmp_path / "many")["inputs"]] == [10, 16]


USER_LOSS = """
from dataclasses import replace
from bge_core.loss import LossOutput, training_loss

def my_loss(x, cfg):
    output = training_loss(x, cfg)
    return LossOutput(output.loss * cfg.args["factor"], {**output.metrics, "margin": output.loss * 0 + 0.5})
"""


def test_a_loss_of_the_users_own(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "my_file.py").write_text(USER_LOSS, encoding="utf-8")
    settings = {"loss": f"{tmp_path / 'my_file.py'}:my_loss", "loss_args": '{"factor": 4}', "max_steps": 1}
    assert run(tiny_bert, data, tmp_path / "plain", max_steps=1) == 0
    assert run(tiny_bert, data, tmp_path / "mine", **settings) == 0
    assert run(tiny_bert, data, tmp_path / "cached", sub_batch_size=3, **settings) == 0
    (plain,), (mine,), (cached,) = (read_steps(tmp_path / name) for name in ("plain", "mine", "cached"))
    assert mine["loss"] == 4 * plain["loss"] and mine["margin"] == 0.5
    assert mine["grad_norm"] == pytest.approx(4 * plain["grad_norm"], rel=1e-6)
    assert cached["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-5)


def test_matryoshka_and_distillation(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    def loss_of(name: str, **settings: Any) -> float:
        assert run(tiny_bert, data, tmp_path / name, max_steps=1, **settings) == 0
        return runs.losses(tmp_path / name)[0]

    plain, short = loss_of("plain"), loss_of("short", use_mrl=True, mrl_dims=[8])
    assert loss_of("both", use_mrl=True, mrl_dims=[8, 32]) == pytest.approx((plain + short) / 2, rel=1e-6)
    assert short != pytest.approx(plain, rel=1e-2)
    teacher = {"knowledge_distillation": True}
    kl, m3 = loss_of("kl", **teacher), loss_of("m3", kd_loss_type="m3_kd_loss", **teacher)
    assert kl > plain and m3 not in (kl, plain) and math.isfinite(m3)


def test_tensorboard_gets_the_figures(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(tiny_bert, data, tmp_path / "run", max_steps=2, report_to="tensorboard") == 0
    (file,) = [path for path in (tmp_path / "run").rglob("events.out.tfevents.*") if path.parent.name == "bge_core"]
    events = EventAccumulator(str(file)).Reload()
    want = runs.losses(tmp_path / "run")
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, pytest.approx(want[0], rel=1e-6)),
        (2, pytest.approx(want[1], rel=1e-6)),
    ]


# ------------------------------------------------------------------------------------------------------ before step 1


def test_show_batch_prints_one_batch_and_writes_nothing(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"query": "贷款怎么办理", "pos": ["在线办理贷款"], "neg": ["贷款要还" + "钱" * 40, "信用卡在哪里"]},
        {"query": "贷款在哪里办", "pos": ["在线办理贷款"], "neg": ["贷款怎么办理"]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    before = runs.tree(tmp_path)
    settings = {"passage_max_len": 12, "query_instruction_for_retrieval": "问：", "show_batch": True}
    assert run(tiny_bert, file, tmp_path / "out", **settings) == 0
    out = capsys.readouterr().out
    decoded = out.replace(" ", "")
    assert "first micro-batch: 2 of 2 queries" in out and "row 0" in out and "row 1" in out
    # every "问" and "：" is one token or [UNK]: what the model reads, instruction included, is what is shown
    assert "query" in out and decoded.count("贷款怎么办理[SEP]") == 2  # row 0's question, row 1's negative
    assert "[12 tokens, CUT from 46]" in out
    assert "masked   passage of row 0 is a known positive of this query: 在线办理贷款" in out
    assert "masked   passage of row 1 is a known positive of this query: 在线办理贷款" in out
    assert "masked   passage of row 1 is this query: 贷款怎么办理" in out
    assert out.count("masked") == 3
    assert runs.tree(tmp_path) == before and not (tmp_path / "out").exists()


def messages_of(caplog: pytest.LogCaptureFixture, model: Path, data: Path, folder: Path, **settings: Any) -> str:
    """What a run of one step logs."""
    caplog.clear()
    caplog.set_level(logging.INFO)
    assert run(model, data, folder, max_steps=1, **settings) == 0
    return caplog.text


def test_facts_before_step_1(
    tiny_bert: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = messages_of(caplog, tiny_bert, data, tmp_path / "run", fp16=True, query_max_len=10, learning_rate=1e-5)
    lines = {line.split("] ", 1)[-1].split()[-1]: line for line in text.splitlines()}
    for fact in ("rows: 26", "steps: 1", "processes: 1", "candidates per query: 12", "random guess ln(N): 2.485"):
        assert fact in " ".join(text.split()), fact
    assert "precision: 'float32'" in " ".join(text.split())
    if not torch.cuda.is_available():
        assert text.count("fp16 needs a GPU") == 1
        assert runs.manifest(tmp_path / "run")["facts"]["precision"] == "float32"
    rows = read_lines(data)
    cut = sum(len(row["query"]) + 2 > 10 for row in rows) / len(rows)  # a character a token, [CLS] and [SEP]
    assert 0.1 < cut < 0.99 and f"{cut:.1%} of a sample of 26 are longer than --query_max_len 10" in text
    assert "0.0% of a sample of" in text and lines


WARNINGS: dict[str, tuple[dict[str, Any], str]] = {
    "alone": ({"train_group_size": 1, "per_device_train_batch_size": 1}, "its positive as only candidate"),
    "alone in its group": ({"train_group_size": 1, "use_inbatch_neg": False}, "its positive as only candidate"),
    "few negatives": ({"train_group_size": 4}, "fewer than 3 negatives"),
    "high learning rate": ({"learning_rate": 0.1}, "--learning_rate 0.1 is far"),
    "low learning rate": ({"learning_rate": 1e-9}, "--learning_rate 1e-09 is far"),
    "flat temperature": ({"temperature": 1.0}, "--temperature 1 with cosines"),
    "inner products": ({"normlized": False}, "inner products"),
    "one process": ({"negatives_cross_device": True}, "no effect with one process"),
    "other pooling": ({"sentence_pooling_method": "mean"}, "cls pooling; you chose mean"),
}


def test_warnings_before_step_1(finished: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each for its own setting, and none for usual settings. `finished` states its pooling, as BGE models do."""
    usual = {"learning_rate": 1e-5, "train_group_size": 1, "query_instruction_for_retrieval": ""}
    assert "WARNING: " not in messages_of(caplog, finished, data, tmp_path / "usual", **usual)
    for name, (settings, words) in WARNINGS.items():
        text = messages_of(caplog, finished, data, tmp_path / name, **usual | settings)
        assert text.count(words) == 1, name


def test_a_contradicting_manifest_of_the_miner_is_named(
    tiny_bert: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The miner's own manifest, so that a renamed field is noticed."""
    import mine

    mined = tmp_path / "mined.jsonl"
    words = ["--model_name_or_path", str(tiny_bert), "--input_file", str(data), "--output_file", str(mined)]
    words += ["--range_for_sampling", "2-20", "--negative_number", "3", "--sentence_pooling_method", "mean"]
    assert mine.main([*words, "--query_instruction_for_retrieval", "挖："]) == 0
    text = messages_of(caplog, tiny_bert, mined, tmp_path / "run")
    assert f"{mined} was mined with query_instruction '挖：', this run trains with ''" in text
    assert f"{mined} was mined with mean pooling, this run trains with cls" in text
    agreeing = {"query_instruction_for_retrieval": "挖：", "sentence_pooling_method": "mean"}
    assert "was mined with" not in messages_of(caplog, tiny_bert, mined, tmp_path / "same", **agreeing)


# ---------------------------------------------------------------------------------------------------------- NaN and inf

NAN_LOSS = """
from dataclasses import replace
from bge_core.loss import training_loss

calls = 0

def my_loss(x, cfg):
    global calls
    calls += 1
    output = training_loss(x, cfg)
    return replace(output, loss=output.loss * float(cfg.args["value"])) if calls == 3 else output
"""


@pytest.mark.parametrize("value, scaled", [("nan", False), ("inf", False), ("nan", True)])
def test_a_loss_that_is_no_number_stops_the_run(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    value: str, scaled: bool,
) -> None:  # fmt: skip
    """Also with loss scaling, which would skip such a step for ever."""
    if scaled:
        monkeypatch.setattr(train, "start", train.start)  # undone at the end
        use_cpu_scaler()
    (tmp_path / "my_file.py").write_text(NAN_LOSS, encoding="utf-8")
    settings = {
        "loss": f"{tmp_path / 'my_file.py'}:my_loss",
        "loss_args": json.dumps({"value": value}),
        "save_steps": 1,
    }
    code = run(tiny_bert, data, tmp_path / "run", **settings)
    file = tmp_path / "run" / "not_finite-step3-rank0.jsonl"
    assert_refused(capsys, code, "step 3", str(file), "--learning_rate")
    source, written = read_lines(data), read_lines(file)
    want = BatchPlan((26,), 4, 1, seed=42).epoch(0)[2]
    assert [row["row"] for row in written] == want.tolist()
    assert [row["query"] for row in written] == [source[i]["query"] for i in want]
    assert [row["pos"] for row in written] == [source[i]["pos"] for i in want]
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert run(tiny_bert, data, tmp_path / "good", max_steps=2, lr_scheduler_type="constant") == 0
    capsys.readouterr()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert sorted(path.name for path in (tmp_path / "run").glob("*check*")) == ["checkpoint-1", "checkpoint-2"]
    assert all(tensor.isfinite().all() for tensor in runs.weights(tmp_path / "run" / "checkpoint-2").values())
    assert runs.training_state(tmp_path / "run" / "checkpoint-2")["step"] == 2


# --------------------------------------------------------------------------------------------------------- loss scaling
# The scaler is a real one on the CPU. The loss is finite, but the gradient of the third call is infinite (on the last
# rank only): scaler and ranks must notice by themselves.

POISON = """
import torch
import torch.distributed as dist
from dataclasses import replace
from bge_core.loss import training_loss

calls = 0

class Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")

def my_loss(x, cfg):
    global calls
    calls += 1
    output = training_loss(x, cfg)
    last_rank = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    return replace(output, loss=Poison.apply(output.loss)) if calls == 3 and last_rank else output
"""


def use_cpu_scaler() -> None:
    """Give the run what Accelerate gives on a GPU with fp16."""
    start = bge_core.runtime.launch.start

    def start_with_scaler(*args: Any, **kwargs: Any) -> Any:
        accelerator = start(*args, **kwargs)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        return accelerator

    train.start = start_with_scaler


@pytest.fixture
def poison(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "poison.py").write_text(POISON, encoding="utf-8")
    return {"loss": f"{tmp_path / 'poison.py'}:my_loss", "max_steps": 6, "save_steps": 1}


def assert_third_step_skipped(folder: Path) -> None:
    lines = read_steps(folder)
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1, 1]
    # it doubles after every second good step, and halves where one is skipped
    assert [line["loss_scale"] for line in lines] == [1024, 2048, 1024, 1024, 2048, 2048]
    assert [round(line["lr"] * 6e3) for line in lines] == [6, 5, 4, 4, 3, 2]  # step 4 has what step 3 did not use
    before, after = folder / "checkpoint-2", folder / "checkpoint-3"
    assert runs.equal_weights(before, after) and not runs.equal_weights(after, folder / "checkpoint-4")
    for state in (0, 20):  # the first moments of some parameter, its count of updates
        one, other = (runs.training_state(checkpoint)["optimizer"]["state"][state] for checkpoint in (before, after))
        assert runs.equal(one, other)
    assert runs.manifest(folder)["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in runs.weights(folder).values())


@pytest.mark.parametrize("chunk", [None, 3], ids=["plain", "gradcache"])
def test_a_step_with_an_infinite_gradient_is_skipped(
    tiny_bert_dropout: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: Row, chunk: int | None
) -> None:
    monkeypatch.setattr(train, "start", train.start)  # undone at the end
    use_cpu_scaler()
    settings = poison | {"sub_batch_size": chunk}
    whole = tmp_path / "whole"
    assert run(tiny_bert_dropout, data, whole, **settings) == 0
    assert_third_step_skipped(whole)
    # at step 4 one good step is counted, so that step 5 doubles the scale: the count must be resumed, too
    half = runs.copy_run(whole, tmp_path / "half", "checkpoint-5", "checkpoint-6")
    assert run(tiny_bert_dropout, data, half, resume_from_checkpoint="latest", **settings) == 0
    assert read_steps(half) == read_steps(whole) and runs.equal_weights(half, whole)
    assert runs.training_state(half / "checkpoint-6")["scaler"] == runs.training_state(whole / "checkpoint-6")["scaler"]


def test_a_skipped_step_is_no_update_of_the_moving_average(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: Row
) -> None:
    monkeypatch.setattr(train, "start", train.start)
    use_cpu_scaler()
    assert run(tiny_bert, data, tmp_path / "run", ema_decay=0.9, **poison) == 0
    states = [runs.training_state(tmp_path / "run" / f"checkpoint-{step}")["ema"] for step in range(1, 7)]
    assert [state["num_updates"] for state in states] == [1, 2, 2, 3, 4, 5]
    assert runs.equal(states[1], states[2]) and not runs.equal(states[2]["average"], states[3]["average"])


def test_metrics_of_a_skipped_step_are_json(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: Row
) -> None:
    monkeypatch.setattr(train, "start", train.start)
    use_cpu_scaler()
    assert run(tiny_bert, data, tmp_path / "run", **poison | {"max_steps": 3, "save_steps": 0}) == 0
    for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_two_processes_skip_together(tiny_bert: Path, data: Path, tmp_path: Path, poison: Row) -> None:
    """The gradient of the second rank alone is infinite. With GradCache and gathered negatives."""
    words = {"negatives_cross_device": True, "sub_batch_size": 3, "per_device_train_batch_size": 2} | poison
    argv = runs.flags(tiny_bert, data, tmp_path / "run", **words)
    children = runs.start_two(argv, tmp_path / "log", use_cpu_scaler)
    assert runs.finish(children) == [0, 0], (tmp_path / "log.0").read_text() + (tmp_path / "log.1").read_text()
    assert_third_step_skipped(tmp_path / "run")


def test_loss_scaling_changes_no_number(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales are powers of two, so even float32 gives the same losses and gradient norms."""
    monkeypatch.setattr(train, "start", train.start)
    settings = {"max_steps": 4, "gradient_accumulation_steps": 2}
    assert run(tiny_bert, data, tmp_path / "plain", **settings) == 0
    use_cpu_scaler()
    assert run(tiny_bert, data, tmp_path / "scaled", **settings) == 0
    for line, scaled in zip(read_steps(tmp_path / "plain"), read_steps(tmp_path / "scaled"), strict=True):
        assert {name: scaled[name] for name in line} == pytest.approx(line, rel=1e-6)


# --------------------------------------------------------------------------------------------------------- what it refuses

GOOD = {"query": "贷款怎么办", "pos": ["在线办理"], "neg": ["不办理"], "pos_scores": [1.0], "neg_scores": [0.5]}
BAD_LINES: dict[str, tuple[Any, str, str]] = {  # the line (or what changes in a good one), the field, what must be said
    "query missing": ({"query": None}, "query", "missing"),
    "query a number": ({"query": 7}, "query", "is 7; it must be a string"),
    "query empty": ({"query": "  "}, "query", "empty"),
    "pos missing": ({"pos": None}, "pos", 'add a list, as "pos": ["text"]'),
    "pos a string": ({"pos": "在线办理"}, "pos", '"在线办理"; it must be a list of strings, as ["在线办理"]'),
    "pos without text": ({"pos": []}, "pos", "empty list; a row needs at least one"),
    "pos of numbers": ({"pos": ["a", 3]}, "pos[1]", "is 3; it must be a string"),
    "neg a string": ({"neg": "不办理"}, "neg", "it must be a list of strings"),
    "neg of null": ({"neg": [None]}, "neg[0]", "null; it must be a string"),
    "pos_scores of another length": ({"pos_scores": [1, 2]}, "pos_scores", "a list of 1 numbers"),
    "neg_scores of another length": ({"neg_scores": []}, "neg_scores", "a list of 1 numbers"),
    "a score of words": ({"neg_scores": ["high"]}, "neg_scores[0]", "must be a finite number"),
    "a score of NaN": (
        b'{"query": "q", "pos": ["a"], "pos_scores": [NaN]}',
        "pos_scores[0]",
        "must be a finite number",
    ),
    "prompt a number": ({"prompt": 3}, "prompt", "is 3; it must be a string"),
    "broken JSON": (b'{"query": "q", "pos": ["a"', "", "not JSON"),
    "not an object": (b'["q", "a"]', "", "is a JSON list; write one object a line"),
    "GB18030": ('{"query": "贷款", "pos": ["办理"]}'.encode("gb18030"), "", "not UTF-8"),
}


def write_bad(file: Path, *bad: Any) -> Path:
    """Two good lines, then bad ones."""
    lines = [json.dumps(GOOD, ensure_ascii=False).encode()] * 2
    for line in bad:
        if isinstance(line, dict):
            row = {name: value for name, value in (GOOD | line).items() if value is not None}
            line = json.dumps(row, ensure_ascii=False).encode()
        lines.append(line)
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_of_the_training_data(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    line, field, remedy = BAD_LINES[kind]
    file = write_bad(tmp_path / "rows.jsonl", line)
    assert_refused(
        capsys,
        run(tiny_bert, file, tmp_path / "out"),
        f"{file}:3: ",
        f"'{field}'" if field else "",
        remedy,
        "1 bad line:",
    )
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_bad_lines_are_counted_and_the_first_ten_shown(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_bad(tmp_path / "rows.jsonl", *[line for line, *_ in BAD_LINES.values()])
    assert_refused(
        capsys, run(tiny_bert, file, tmp_path / "out"), f"{len(BAD_LINES)} bad lines:", f"{file}:12: ", "and 7 more"
    )
    assert run(tiny_bert, file, tmp_path / "out") == 2
    assert f"{file}:13: " not in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind", [kind for kind, line in BAD_LINES.items() if not line[1].startswith(("prompt", "pos_s", "neg_s"))]
)
def test_a_bad_line_of_the_evaluation_data(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    line, field, remedy = BAD_LINES[kind]
    file = write_bad(tmp_path / "val.jsonl", line)
    code = run(tiny_bert, data, tmp_path / "out", val_data=file)
    assert_refused(capsys, code, f"{file}:3: ", f"'{field}'" if field else "", remedy, "1 bad line:")
    assert os.listdir(tmp_path) == ["val.jsonl"]


def make_folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir(exist_ok=True)
    return tmp_path / "folder"


def write_text(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


REFUSED: dict[str, tuple[Callable[[Path], Row], list[str]]] = {
    "no such data": (lambda t: {"train_data": t / "none.jsonl"}, ["none.jsonl: no such file"]),
    "an empty folder": (lambda t: {"train_data": make_folder(t)}, ["folder: the folder holds no .jsonl file"]),
    "an empty file": (lambda t: {"train_data": write_text(t / "e.jsonl", "\n")}, ["e.jsonl: holds no row"]),
    "no such evaluation data": (lambda t: {"val_data": t / "none.jsonl"}, ["none.jsonl: no such file"]),
    "no such corpus": (lambda t: {"val_corpus": t / "none.jsonl"}, ["none.jsonl: no such file"]),
    "no scores": (
        lambda t: {
            "train_data": write_text(t / "s.jsonl", '{"query": "q", "pos": ["a"]}\n'),
            "knowledge_distillation": True,
        },
        ["s.jsonl:1:", "pos_scores", "--knowledge_distillation"],
    ),
    "no such model": (lambda t: {"model_name_or_path": t / "none"}, ["none: no such folder"]),
    "not a model": (lambda t: {"model_name_or_path": make_folder(t)}, ["not a model folder"]),
    "a model without weights": (
        lambda t: {"model_name_or_path": write_text(make_folder(t) / "config.json", '{"model_type": "bert"}').parent},
        ["could not be loaded as a model"],
    ),
    "a hub name without a hub": (lambda t: {"model_name_or_path": "nobody/nothing"}, ["nobody/nothing", "HF_ENDPOINT"]),
    "output is a file": (lambda t: {"output_dir": write_text(t / "file", "mine")}, ["file: is a file; name a folder"]),
    "output below a file": (lambda t: {"output_dir": write_text(t / "file", "mine") / "out"}, ["cannot be written"]),
    "output not writable": (lambda t: {"output_dir": "/proc/out"}, ["/proc/out: cannot be written"]),
    "an unknown flag": (lambda t: {"learning_rat": 1}, ["unknown flag --learning_rat", "did you mean --learning_rate?"]),
    "not a number": (lambda t: {"learning_rate": "much"}, ["--learning_rate", "much"]),
    "two precisions": (lambda t: {"fp16": True, "bf16": True}, ["--fp16", "--bf16", "choose one"]),
    "too few rows": (
        lambda t: {"dataloader_drop_last": True, "per_device_train_batch_size": 27},
        ["26 rows", "27", "--per_device_train_batch_size"],
    ),
    "no loss file": (lambda t: {"loss": t / "none.py:f"}, ["--loss", "FILE.py:FUNCTION", "none.py"]),
    "no function named": (lambda t: {"loss": write_text(t / "l.py", "x = 1\n")}, ["--loss", "FILE.py:FUNCTION"]),
    "no such function": (lambda t: {"loss": f"{write_text(t / 'l.py', 'x = 1')}:f"}, ["l.py has no function 'f'"]),
    "no function": (lambda t: {"loss": f"{write_text(t / 'l.py', 'x = 1')}:x"}, ["l.py has no function 'x'"]),
    "loss_args a list": (lambda t: {"loss_args": "[1]"}, ["--loss_args", "write a JSON object"]),
    "no such schedule": (lambda t: {"lr_scheduler_type": "steep"}, ["--lr_scheduler_type 'steep'", "linear"]),
    "best without evaluation": (lambda t: {"load_best_model_at_end": True, "val_data": None}, ["needs --val_data"]),
    "no checkpoint": (lambda t: {"resume_from_checkpoint": make_folder(t)}, ["folder: is not a checkpoint"]),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    REFUSED,
)
def test_input_that_is_refused(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    make, words = REFUSED[kind]
    settings = {"val_data": data, "max_steps": 1} | make(tmp_path)
    before = runs.tree(tmp_path)
    model = settings.pop("model_name_or_path", tiny_bert)
    train_data = settings.pop("train_data", data)
    code = run(model, train_data, settings.pop("output_dir", tmp_path / "out"), **settings)
    assert_refused(capsys, code, *words)
    assert runs.tree(tmp_path) == before  # an empty folder at most


def test_a_missing_tracker_is_named(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    code = run(tiny_bert, data, tmp_path / "out", report_to="wandb")
    assert_refused(capsys, code, "--report_to wandb", "not installed", "pip install")
    assert not (tmp_path / "out").exists()


def test_an_unknown_metric_is_refused_before_training(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(tiny_bert, data, tmp_path / "out", val_data=data, metric_for_best_model="eval_loss", max_steps=1)
    assert_refused(capsys, code, "--metric_for_best_model", "eval_loss", "MRR@10")
    assert not (tmp_path / "out").exists()


def test_matryoshka_dimensions_beyond_the_model_are_refused(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(tiny_bert, data, tmp_path / "out", use_mrl=True, mrl_dims=[16, 64], max_steps=1)
    assert_refused(capsys, code, "--mrl_dims", "64", "32")


def test_a_damaged_model_is_named(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_bert, tmp_path / "model")
    os.truncate(tmp_path / "model" / "model.safetensors", 100_000)
    code = run(tmp_path / "model", data, tmp_path / "out", max_steps=1)
    assert_refused(capsys, code, str(tmp_path / "model"))


def test_one_message_is_all_that_a_process_says(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """Both streams of a real process, and of two: the message once, nothing else."""
    file = write_bad(tmp_path / "rows.jsonl", {"pos": "在线办理"})
    argv = runs.flags(tiny_bert, file, tmp_path / "out")
    assert runs.finish([runs.start(argv, tmp_path / "log")]) == [2]
    assert runs.finish(runs.start_two(argv, tmp_path / "both.log")) == [2, 2]
    message = (tmp_path / "log").read_text(encoding="utf-8")
    assert len(message.splitlines()) == 2 and message.startswith("error: ") and f"{file}:3: field 'pos'" in message
    assert (tmp_path / "both.0").read_text(encoding="utf-8") == message
    assert (tmp_path / "both.1").read_text(encoding="utf-8") == ""
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ launchers


def launch(words: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run from the root of the repository, without a GPU, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PET_MASTER_PORT": port}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)


def processes_said(job: subprocess.CompletedProcess[str]) -> int:
    (line,) = [line for line in job.stderr.splitlines() if line.startswith("processes:")]
    return int(line.split()[-1])


def test_the_guides_command_with_two_processes(tiny_bert: Path, tmp_path: Path) -> None:
    """As in the design, word for word, but for the paths and the epochs; 160 rows in batches of 80 are two steps."""
    data = runs.write_rows(tmp_path / "train_minedHN.jsonl", 165)
    words = f"""--nproc_per_node 2 train.py --output_dir {tmp_path / "OUT"} --model_name_or_path {tiny_bert} --train_data {data}
        --learning_rate 1e-5 --fp16 --num_train_epochs 1 --per_device_train_batch_size 4 --gradient_accumulation_steps 10
        --dataloader_drop_last True --normlized True --temperature 0.02 --query_max_len 64 --passage_max_len 512
        --train_group_size 2 --negatives_cross_device --logging_steps 10 --save_steps 0.2""".split()
    job = launch(
        [sys.executable, "-m", "torch.distributed.run", *words, "--query_instruction_for_retrieval", ""], tmp_path
    )
    assert job.returncode == 0, job.stderr
    assert processes_said(job) == 2
    assert job.stdout.splitlines()[0] == f"model: {tmp_path / 'OUT'}" and "next: python evaluate.py" in job.stdout
    assert job.stderr.count("fp16 needs a GPU") == 1
    facts = runs.manifest(tmp_path / "OUT")["facts"]
    want = {
        "processes": 2, "steps": 2, "queries per update": 80, "candidates per query": 16, "precision": "float32",
        "cross-device negatives": True, "query instruction": "",
    }  # fmt: skip
    assert {name: facts[name] for name in want} == want
    assert {"checkpoint-1", "checkpoint-2", "model.safetensors"} <= set(os.listdir(tmp_path / "OUT"))


def test_python_and_accelerate_launch_train_alike(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """One process with batch 8 and two with batch 4 and gathered negatives: the same losses, the same weights."""
    settings = {"max_steps": 2, "negatives_cross_device": True}
    one = runs.flags(tiny_bert, data, tmp_path / "one", per_device_train_batch_size=8, **settings)
    two = runs.flags(tiny_bert, data, tmp_path / "two", per_device_train_batch_size=4, **settings)
    accelerate = Path(sys.executable).with_name("accelerate")
    if not accelerate.is_file():
        pytest.skip("no accelerate beside this Python")
    file = ROOT / "configs" / "accelerate" / "cpu_2proc.yaml"
    jobs = [
        launch([sys.executable, "train.py", *one], tmp_path),
        launch([str(accelerate), "launch", "--config_file", str(file), "train.py", *two], tmp_path),
    ]
    for job, folder, want in zip(jobs, ("one", "two"), (1, 2), strict=True):
        assert job.returncode == 0, job.stderr
        assert processes_said(job) == want == runs.manifest(tmp_path / folder)["facts"]["processes"]
        assert job.stdout.splitlines()[0] == f"model: {tmp_path / folder}"
    assert runs.losses(tmp_path / "two") == pytest.approx(runs.losses(tmp_path / "one"), rel=1e-5)
    a, b = runs.weights(tmp_path / "one"), runs.weights(tmp_path / "two")
    # Adam's first steps are the gradient's sign times the learning rate: a component near 0 may take either
    apart = [((a[name] - b[name]).abs() > 1e-5).sum().item() for name in a]
    assert sum(apart) <= 0.001 * sum(tensor.numel() for tensor in a.values())


def test_processes_that_did_not_find_each_other(
    monkeypatch: pytest.MonkeyPatch, tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a plain Accelerator does under torchrun without a GPU: two runs that both believe to be the first."""
    real = bge_core.runtime.launch.Accelerator

    def alone(*args: Any, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.delenv("WORLD_SIZE")
            return real(*args, **kwargs)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(bge_core.runtime.launch, "Accelerator", alone)
    code = run(tiny_bert, data, tmp_path / "out", max_steps=1)
    assert_refused(
        capsys, code, "started 2 processes, but 1 joined", "torchrun --nproc_per_node 2 train.py", "accelerate launch"
    )
    assert not (tmp_path / "out").exists()


def test_precision_of_flag_and_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = bge_core.runtime.launch.resolve_precision
    for launcher, flag, want in (
        (None, "no", "no"), ("no", "bf16", "bf16"), ("no", "fp16", "fp16"), ("bf16", "no", "bf16"), ("fp16", "no", "fp16"),
        ("bf16", "bf16", "bf16"),
    ):  # fmt: skip
        if launcher is None:
            monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        else:
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
        assert resolve(flag == "fp16", flag == "bf16", cuda=True) == want
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="choose one"):
        resolve(True, False, cuda=True)


if __name__ == "__main__":  # PYTHONPATH=. python tests/training/test_train.py: write the stored curve anew
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        curve = golden_run(make_tiny_bert(Path(folder) / "model"), Path(folder))
    about = {
        "command": "OMP_NUM_THREADS=1 PYTHONPATH=. python tests/training/test_train.py",
        "torch": torch.__version__,
    }
    GOLDEN.write_text(json.dumps({**about, "curve": curve}, indent=1) + "\n", encoding="utf-8")
