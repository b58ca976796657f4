"""What --plan tells: figures computed by hand, the two fitted lines, one JSON object on stdout, nothing written."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import Row, run

from bge_core.encoder.tokens import Tokens
from bge_core.runtime import log
from bge_core.training import plan
from bge_core.training.batch import Batch
from bge_core.training.plan import Line, fit_line, memory_line
from bge_core.training.step import StepSettings

SETTINGS: Row = {
    "num_train_epochs": 2, "gradient_accumulation_steps": 2, "save_steps": 0.3, "save_total_limit": 1, "plan": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 rows: 7 micro-batches of 4, the last of them of 2."""
    return runs.write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 26)


def model_mb(folder: Path) -> float:
    """What a model's float32 weights take."""
    return sum(weight.numel() for weight in runs.weights(folder).values()) * 4 / 2**20


def told_by(capsys: pytest.CaptureFixture[str]) -> Row:
    """The one JSON object on stdout."""
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.endswith("}\n")
    return dict(json.loads(out))


# ------------------------------------------------------------------------------------------------------------ functions


def test_a_line_through_exact_measurements_is_exact() -> None:
    line = fit_line([(100, 250.0), (200, 450.0), (400, 850.0)])
    assert (line.fixed, line.slope) == (pytest.approx(50), pytest.approx(2))
    assert line.at(1000) == pytest.approx(2050)


def test_a_line_neither_falls_nor_begins_below_zero() -> None:
    assert fit_line([(100, 6.0), (200, 4.0)]) == Line(5.0, 0.0)
    assert fit_line([(100, 6.0), (100, 4.0)]) == Line(5.0, 0.0)
    through_zero = fit_line([(1, 1.0), (2, 4.0)])  # sum(xy) / sum(x^2)
    assert (through_zero.fixed, through_zero.slope) == (0.0, pytest.approx(9 / 5))


def test_the_memory_line_leaves_out_the_peaks_of_updates() -> None:
    """One row: 700 MB, weights, gradients and optimizer. Beyond: 500 MB and 2 MB a token."""
    points = [(10, 700.0), (90, 700.0), (210, 920.0), (380, 1260.0), (400, 1300.0)]
    line = memory_line(points)
    assert (line.fixed, line.slope) == (pytest.approx(500), pytest.approx(2))


@pytest.mark.parametrize(
    "num_steps, save_every, limit, written, kept",
    [
        (8, 3, None, [3, 6], [3, 6]),
        (8, 3, 1, [3, 6], [6]),
        (8, 2, 3, [2, 4, 6, 8], [4, 6, 8]),
        (8, 2, 9, [2, 4, 6, 8], [2, 4, 6, 8]),
        (8, 9, None, [], []),
        (8, 0, 2, [], []),
    ],
)
def test_checkpoint_steps(num_steps: int, save_every: int, limit: int | None, written: list, kept: list) -> None:
    assert plan.checkpoint_steps(num_steps, save_every, limit) == (written, kept)


def test_largest_batch() -> None:
    assert plan.largest_batch(Line(100, 2), 2000) == 950
    assert [plan.largest_batch(Line(100, slope), limit) for slope, limit in ((2, 102), (2, 101), (0, 99))] == [1, 0, 0]
    assert plan.largest_batch(Line(100, 0), 100) is None  # any


def test_the_largest_of_many() -> None:
    assert plan.expected_largest([3, 5, 4], 3) == 5
    assert plan.expected_largest([4, 4, 4], 1000) == 4
    assert plan.expected_largest([3, 5], 100) == pytest.approx(4 + math.sqrt(2 * math.log(100)))
    assert plan.expected_largest([1, 1, 1, 1, 9], 6) == 9


def test_tokens_held_at_once() -> None:
    nothing = torch.empty(0)
    one, two = (
        Batch(Tokens(torch.zeros(sum(n), dtype=torch.int64), n), nothing, nothing, nothing, None, [(2, 3)], [0, 1])
        for n in ([2, 3, 1, 7, 1], [4, 4])
    )
    for settings, held in (({}, 14), ({"chunk_size": 1}, 7), ({"chunk_size": 2}, 8), ({"max_tokens": 5}, 7)):
        assert plan.count_tokens([one, two], StepSettings(**settings)) == (22, held)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can")
def test_the_peak_begins_anew() -> None:
    block = torch.ones(100 * 2**18)
    held = log.memory_mb()
    del block
    log.reset_peak_memory()
    assert log.memory_mb() < held - 50
    assert 0 < log.available_memory_mb() < 2**30


# ---------------------------------------------------------------------------------------------------------------- --plan


def test_a_plan_is_one_object_on_stdout_and_writes_nothing(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    before = runs.tree(data.parent)
    evaluated = {"val_data": data, "eval_steps": 0.4, "load_best_model_at_end": True}
    assert run(tiny_bert, data, tmp_path / "out", **SETTINGS, **evaluated) == 0
    told = told_by(capsys)
    assert list(tmp_path.iterdir()) == [] and runs.tree(data.parent) == before
    want = {
        "steps": 8, "steps_per_epoch": 4, "global_batch": 8, "candidates": 12, "ln_n": pytest.approx(math.log(12), abs=1e-4),
        "checkpoints_written": [3, 6], "checkpoints": [6], "evaluations": [4, 8], "fits": True,
    }  # fmt: skip
    assert {name: told[name] for name in want} == want
    assert 2.8 < told["checkpoint_mb"] / model_mb(tiny_bert) < 3  # Adam keeps two numbers for each; the pooler has none
    assert told["memory_mb"] >= max(step["peak_mb"] for step in told["measured"]) - 0.001
    assert told["memory_mb"] <= told["available_mb"]
    # one row a micro-batch twice, a quarter, a half, and whole steps; the smallest are the epochs' last ones
    tokens, held = ([step[name] for step in told["measured"]] for name in ("tokens", "held"))
    assert tokens[0] == tokens[1] <= tokens[2] < tokens[3] < min(tokens[-2:]) and tokens[4:-1] == sorted(tokens[4:-1])
    assert held[-1] == max(held)
    assert len(tokens) in (9, 10)
    for line in ("8, 4 an epoch", "12; a random guess has the loss ln(N) = 2.485", "at step 3, 6", "the steps alone"):
        assert line in caplog.text


@pytest.mark.parametrize("chunk", [None, 3], ids=["plain", "gradcache"])
def test_a_plan_adds_up(
    chunk: int | None, tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On made-up measurements: 3 s a step and 0.01 s a token, 1,000 MB and 0.5 MB a token held at once."""
    seen: list[plan.Step] = []

    def scan(*args: Any) -> Any:
        seen.extend(real_scan(*args)[0])
        return seen, 0.25

    def compute_steps(*_: Any) -> list[plan.Step]:
        parts = [plan.Step(0, 30, 30, seconds, 1100.0) for seconds in (5.0, 3.0, 3.0, 3.0)]
        return parts + [plan.Step(0, t, t, 3 + 0.01 * t, 1000 + 0.5 * t) for t in (100, 200, 400, 390)]

    real_scan = plan.scan
    monkeypatch.setattr(plan, "scan", scan)
    monkeypatch.setattr(plan, "compute_steps", compute_steps)
    monkeypatch.setattr(plan, "memory_mb", lambda: 900.0)
    monkeypatch.setattr(plan, "available_memory_mb", lambda: 2000.0)
    words = {"sub_batch_size": chunk, "dataloader_num_workers": 0, "ema_decay": 0.9}
    assert run(tiny_bert, data, tmp_path / "out", **SETTINGS, **words) == 0
    told = told_by(capsys)
    tokens, held = [step.tokens for step in seen], max(step.held for step in seen)
    assert len(seen) == 8 and held < max(tokens)  # all of the run: two epochs of four
    assert told["seconds"] == pytest.approx(8 * (3 + 0.25) + 0.01 * sum(tokens), abs=0.05)
    assert told["tokens_per_step"] == pytest.approx(sum(tokens) / 8, abs=0.1)
    assert 1.9 < told["checkpoint_mb"] / model_mb(tiny_bert) < 2  # no optimizer yet, but a moving average
    assert told["memory_mb"] == 1200 and told["fits"]  # the highest that was seen
    assert told["largest_batch"] == (None if chunk else int(1000 / (0.5 * held / 4)))


def test_what_does_not_fit_is_not_tried(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "available_memory_mb", lambda: 1.0)
    assert run(tiny_bert, data, tmp_path / "out", max_steps=3, plan=True) == 0
    told = told_by(capsys)
    assert told["fits"] is False and told["largest_batch"] == 0
    assert len(told["measured"]) == 4


def test_gradcache_holds_one_chunk(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_bert, data, tmp_path / "out", max_steps=3, sub_batch_size=2, plan=True) == 0
    told = told_by(capsys)
    whole = told["measured"][-1]
    assert whole["held"] < whole["tokens"] / 3
    assert told["largest_batch"] is None  # activations no longer grow with the batch


def test_two_processes_plan_together(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    words = {"per_device_train_batch_size": 2, "negatives_cross_device": True, "num_train_epochs": 1, "save_steps": 2}
    argv = runs.flags(tiny_bert, data, tmp_path / "out", plan=True, gradient_accumulation_steps=2, **words)
    assert runs.finish(runs.start_two(argv, tmp_path / "log")) == [0, 0], (tmp_path / "log.0").read_text()
    first, second = [(tmp_path / f"log.{rank}").read_text(encoding="utf-8").splitlines() for rank in range(2)]
    (line,) = [line for line in first if line.startswith("{")]
    told = json.loads(line)
    want = {"steps": 4, "steps_per_epoch": 4, "global_batch": 8, "candidates": 12, "checkpoints": [2, 4]}
    assert {name: told[name] for name in want} == want
    assert second == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lr_scheduler_type": "steep"}, "--lr_scheduler_type 'steep'"),
        ({"use_mrl": True, "mrl_dims": 4096}, "--mrl_dims [4096]"),
        ({"metric_for_best_model": "luck"}, "--metric_for_best_model 'luck'"),
        ({"loss": "absent.py:loss"}, "--loss absent.py:loss"),
        ({"train_data": "absent.jsonl"}, "absent.jsonl"),
        ({"per_device_train_batch_size": 64, "dataloader_drop_last": True}, "fewer than one global batch"),
        ({"temperature": 0}, "--temperature 0"),
    ],
)
def test_a_plan_of_wrong_settings_is_refused_before_it_measures(
    settings: Row, message: str, tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(plan, "forward_backward", lambda *_: pytest.fail("measured"))
    assert run(tiny_bert, data, tmp_path / "out", plan=True, **settings) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("error: ") == 1 and message in err
