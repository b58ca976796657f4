"""recipe.py: what runs, what is skipped, what is gone on with; its refusals, exit codes and signals.

The stages are the real ones, run in this process; where processes and signals matter, a stand-in or train.py itself
run in a process of their own.
"""

import argparse
import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import yaml
from conftest import ROOT

import recipe
import train
from bge_core.runtime.cli import parse_config
from bge_core.runtime.config import EvaluateConfig, MergeConfig, MineConfig, TrainConfig

MINE = {"stage": "mine", "range_for_sampling": "1-20", "negative_number": 3}
TRAIN = {
    "stage": "train", "model": "base", "max_steps": 2, "per_device_train_batch_size": 4, "train_group_size": 3,
    "learning_rate": "1e-3", "dataloader_num_workers": 0, "logging_steps": 1, "save_steps": 1,
}  # fmt: skip
ALL = ["mined", "round1", "mined2", "round2", "model", "evaluation"]
Row = dict[str, Any]


def two_rounds() -> list[Row]:
    """The stages of a recipe, as a YAML file has them."""
    return [
        {"name": "mined", "model": "base", "candidate_pool": "$corpus", **MINE},
        {"name": "round1", "data": "mined", **TRAIN},
        {"name": "mined2", "model": "round1", **MINE},
        {"name": "round2", "data": "mined2", **TRAIN},
        {"name": "model", "stage": "merge", "models": ["base", "round2"], "weights": [0.3, 0.7]},
    ]


class Workplace:
    """A folder with data and a recipe; `run` runs it and returns the exit code, `started` the commands it gave."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.started = folder, model, list[list[str]]()

    @property
    def names(self) -> list[str]:
        """Names of the stages that were started."""
        flags = ("--output_dir", "--output_file", "--output_path")
        found = [command[command.index(flag) + 1] for command in self.started for flag in flags if flag in command]
        return [Path(path).stem for path in found]

    def argv(self, stages: list[Row] | None = None, **flags: Any) -> list[str]:
        """Words of the command line, after the recipe is written."""
        file = self.folder / "recipe.yaml"
        file.write_text(yaml.safe_dump({"stages": stages or two_rounds()}), encoding="utf-8")
        paths = {"train_data": "train.jsonl", "corpus": "corpus.jsonl", "output_dir": "out"}
        settings = {"config": file, "model_name_or_path": self.model}
        settings |= {name: self.folder / path for name, path in paths.items()} | flags
        return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]

    def run(self, stages: list[Row] | None = None, **flags: Any) -> int:
        self.started.clear()
        return recipe.main(self.argv(stages, **flags))

    def record(self, name: str) -> Row:
        return dict(json.loads((self.folder / f"out/{name}.recipe.json").read_text(encoding="utf-8")))


def in_this_process(started: list[list[str]]) -> Callable[..., Any]:
    """What stands for Popen: the stage's main, at once."""

    def popen(command: list[str], **_: Any) -> Any:
        started.append(command)
        for state in (runs.AcceleratorState, runs.GradientState):
            state._reset_state(*([True] if state is runs.AcceleratorState else []))
        code = importlib.import_module(Path(command[1]).stem).main(command[2:])
        return SimpleNamespace(returncode=code, poll=lambda: code)

    return popen


@pytest.fixture(autouse=True)
def handlers_stay() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def write_data(folder: Path) -> None:
    rows = runs.read_lines(runs.write_rows(folder / "train.jsonl", 24))
    texts = dict.fromkeys(text for row in rows for text in row["pos"] + row["neg"])
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    (folder / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def finished(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the two rounds have run. Read only."""
    folder = tmp_path_factory.mktemp("recipe")
    write_data(folder)
    place = Workplace(folder, tiny_bert)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe.subprocess, "Popen", in_this_process(place.started))
        assert place.run(val_data=folder / "train.jsonl") == 0
    assert place.names == ALL
    return folder


@pytest.fixture
def place(finished: Path, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A copy of it to work in: the same contents elsewhere."""
    folder = tmp_path / "work"
    shutil.copytree(finished, folder)
    place = Workplace(folder, tiny_bert)
    monkeypatch.setattr(recipe.subprocess, "Popen", in_this_process(place.started))
    return place


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Stage -> its line."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    return {line[1:].split("]")[0]: line.split("] ", 1)[1] for line in lines}


# ---------------------------------------------------------------------------------------------- what runs, what does not


def test_each_stage_works_on_what_it_names(finished: Path, tiny_bert: Path) -> None:
    out = finished / "out"
    manifests = {name: json.loads((out / f"{name}.jsonl.manifest.json").read_text()) for name in ("mined", "mined2")}
    assert [manifests[name]["encoder"]["model"] for name in manifests] == [str(tiny_bert), str(out / "round1")]
    assert [entry["path"] for entry in manifests["mined"]["inputs"]] == [
        str(finished / "train.jsonl"), str(finished / "corpus.jsonl"),
    ]  # fmt: skip
    assert runs.manifest(out / "round2")["config"]["train_data"] == [str(out / "mined2.jsonl")]
    assert runs.manifest(out / "round2")["config"]["val_data"] is None  # only where the recipe says so
    base, trained, merged = (runs.weights(folder) for folder in (tiny_bert, out / "round2", out / "model"))
    for name in merged:
        assert (merged[name] - (0.3 * base[name] + 0.7 * trained[name])).abs().max() < 1e-6
    assert set(json.loads((out / "evaluation/metrics.json").read_text())) == {tiny_bert.name, "model"}


def test_nothing_changed_nothing_runs(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run(val_data=place.folder / "train.jsonl") == 0
    assert place.names == []
    out, err = capsys.readouterr()
    assert err.splitlines() == [f"[{name}] skipped: settings, inputs and output are unchanged" for name in ALL]
    assert out == f"model: {place.folder / 'out/model'}\n"


def test_a_changed_setting_runs_from_there(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    stages = two_rounds()
    stages[3]["learning_rate"] = "2e-3"
    before = runs.weights(place.folder / "out/round2")
    assert place.run(stages, val_data=place.folder / "train.jsonl") == 0
    assert place.names == ["round2", "model", "evaluation"]
    lines = said(capsys)
    assert lines["mined2"].startswith("skipped") and lines["round2"].startswith("runs, changed learning_rate: ")
    assert lines["model"].startswith("runs, changed models: ")
    after = runs.weights(place.folder / "out/round2")
    assert any((after[name] != before[name]).any() for name in after)
    assert place.run(stages) == 0 and place.names == []


def test_a_changed_training_file_runs_all(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    file = place.folder / "train.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:-2]), encoding="utf-8")
    assert place.run(val_data=file) == 0
    assert place.names == ALL
    assert "changed input_file: " in said(capsys)["mined"]
    assert place.run(val_data=file) == 0 and place.names == []


@pytest.mark.parametrize("harm", ["weights lost", "weights damaged", "manifest lost", "mined file cut"])
def test_an_output_that_is_not_whole_is_made_again(place: Workplace, harm: str) -> None:
    out = place.folder / "out"
    file = out / ("mined.jsonl" if harm == "mined file cut" else "model/model.safetensors")
    whole = file.read_bytes()
    if harm == "weights lost":
        file.unlink()
    elif harm == "weights damaged":
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif harm == "manifest lost":
        (out / "model/manifest.json").unlink()
    else:
        file.write_bytes(whole[:-40])
    assert place.run() == 0
    assert place.names == ["mined" if harm == "mined file cut" else "model"]  # what depends on it sees the same again
    assert file.read_bytes() == whole


# -------------------------------------------------------------------------------------------------------------- refusals


def changed(index: int, **settings: Any) -> list[Row]:
    stages = two_rounds()
    stages[index] |= settings
    return stages


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (changed(2, model="rond1"), ["stage 'mined2': model 'rond1' is unknown here; did you mean 'round1'?"]),
        (changed(1, model="round2"), ["stage 'round1': model 'round2'", "did you mean 'base'?"]),  # a later one
        (changed(2, model="mined"), ["stage 'mined2': model 'mined'"]),  # not a model
        (changed(3, data="mined3"), ["stage 'round2': data 'mined3' is unknown here; did you mean 'mined'?"]),
        (changed(3, data="round1"), ["stage 'round2': data 'round1'"]),
        (two_rounds()[1:], ["stage 'round1': data 'mined'", "did you mean '$train_data'?"]),
        (changed(4, models=["base", "round3"]), ["stage 'model': models 'round3'", "'round2'"]),
        (changed(0, candidate_pool="$corpora"), ["'$corpora' is unknown here; did you mean '$corpus'?"]),
        (changed(1, val_data="$val_data"), ["stage 'round1': val_data '$val_data'", "give --val_data"]),
        (changed(1, stage="trian"), ["stage 'trian' is unknown here; did you mean 'train'?"]),
        (changed(4, name="merged"), ["the last train or merge makes the model of the recipe: name it `model`"]),
        (two_rounds()[:1], ["name it `model`"]),
        (changed(1, name="mined"), ["stage 'mined': give each stage a `name` of its own"]),
        (changed(1, name="base"), ["stage 'base': give each stage a `name` of its own"]),
        (changed(1, name="a/b"), ["stage 'a/b': give each stage"]),
        (changed(1, name=""), ["stage '': give each stage"]),
        (["mined"], ["is no recipe; write `stages:`"]),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(
    stages: list[Row], words: list[str], tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path)
    assert Workplace(tmp_path, tiny_bert).run(stages) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not (tmp_path / "out").exists()


def test_what_the_command_line_lacks_is_refused(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path)
    place = Workplace(tmp_path, tiny_bert)
    assert place.run(corpus=tmp_path / "corpora.jsonl") == 2
    assert f"--corpus {tmp_path / 'corpora.jsonl'}: no such file" in capsys.readouterr().err
    assert place.run(model_name_or_path=None) == 2
    assert "lacks model_name_or_path; add it, or give --model_name_or_path" in capsys.readouterr().err
    assert place.run(config=tmp_path / "none.yaml") == 2
    (tmp_path / "bad.yaml").write_text("stage: [{name: mined}]", encoding="utf-8")
    assert place.run(config=tmp_path / "bad.yaml") == 2
    (tmp_path / "bad.yaml").write_text("stages: [{name: mined}]\nevaluations: {k: 10}", encoding="utf-8")
    capsys.readouterr()
    assert place.run(config=tmp_path / "bad.yaml") == 2
    assert "the key 'evaluations' is unknown here; did you mean 'evaluation'?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_stage_that_fails_ends_the_recipe_with_its_code(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    stages = changed(3, learning_rat="1e-3")
    assert place.run(stages) == 2
    assert place.names == ["round2"]
    assert "error: unknown flag --learning_rat: did you mean --learning_rate?" in capsys.readouterr().err
    assert place.run(stages) == 2 and place.names == ["round2"]  # not taken for finished
    assert place.run() == 0
    assert place.names == ["round2"]  # what it left is what it was: the merge needs nothing


# ----------------------------------------------------------------------------------------------------------- from a YAML


def plan_of(place: Workplace, stages: list[Row], **flags: Any) -> dict[str, recipe.Stage]:
    parser = argparse.ArgumentParser()
    for name in ("config", "train_data", "corpus", "val_data", "output_dir", "model_name_or_path", "seed"):
        parser.add_argument(f"--{name}")
    return {stage.name: stage for stage in recipe.plan(parser.parse_args(place.argv(stages, **flags)))}


def test_words_of_the_yaml_become_words_of_a_command(tiny_bert: Path, tmp_path: Path) -> None:
    write_data(tmp_path)
    place = Workplace(tmp_path, tiny_bert)
    more = {"fp16": False, "mrl_dims": [8, 16], "run_name": None, "query_instruction_for_retrieval": ""}
    stages = changed(1, data=["mined", "$train_data", "./more.jsonl"], model="BAAI/some-model", **more)
    flags = plan_of(place, stages)["round1"].flags
    assert flags["train_data"] == [str(tmp_path / "out/mined.jsonl"), str(tmp_path / "train.jsonl"), "./more.jsonl"]
    assert flags["model_name_or_path"] == ["BAAI/some-model"]
    assert (flags["fp16"], flags["mrl_dims"], flags["learning_rate"]) == (["False"], ["8", "16"], ["1e-3"])
    assert "run_name" not in flags and flags["query_instruction_for_retrieval"] == [""]
    assert not {"name", "stage", "model", "data"} & flags.keys()


def test_the_base_of_a_merge_is_named_like_any_model(tiny_bert: Path, tmp_path: Path) -> None:
    write_data(tmp_path)
    stages = changed(4, models=["round1", "round2"], weights=None, method="ties", base_model="base")
    flags = plan_of(Workplace(tmp_path, tiny_bert), stages)["model"].flags
    assert flags["base_model"] == [str(tiny_bert)] and flags["method"] == ["ties"]
    assert flags["models"] == [str(tmp_path / "out/round1"), str(tmp_path / "out/round2")]


@pytest.mark.parametrize("recipe_name", ["best", "two_rounds"])
def test_shipped_recipes_score_each_model_with_its_own_prompts(recipe_name: str, tmp_path: Path) -> None:
    write_data(tmp_path)
    options = {"config": ROOT / f"configs/recipes/{recipe_name}.yaml", "val_data": tmp_path / "train.jsonl"}
    assert plan_of(Workplace(tmp_path, tmp_path), [], **options)["evaluation"].flags["add_instruction"] == ["True"]


def test_the_shipped_recipe_gives_flags_that_every_stage_accepts(tmp_path: Path) -> None:
    write_data(tmp_path)
    file = ROOT / "configs/recipes/two_rounds.yaml"
    place = Workplace(tmp_path, tmp_path)
    options = {"config": file, "model_name_or_path": None, "val_data": tmp_path / "train.jsonl", "seed": 3}
    stages = plan_of(place, [], **options)
    assert list(stages) == ALL
    configs: dict[str, Any] = {
        "mine": MineConfig,
        "train": TrainConfig,
        "merge": MergeConfig,
        "evaluate": EvaluateConfig,
    }
    parsed: dict[str, Any] = {}
    for name, stage in stages.items():
        words = [word for flag, values in stage.flags.items() for word in (f"--{flag}", *values)]
        parsed[name] = parse_config(configs[stage.kind], words)
    assert [getattr(parsed[name], "seed", None) for name in ALL] == [3] * 5 + [
        0
    ]  # that of the resamples is no training seed
    assert parsed["mined2"].model_name_or_path == str(tmp_path / "out/round1")
    assert parsed["round2"].train_data == [str(tmp_path / "out/mined2.jsonl")]
    assert parsed["round2"].learning_rate == parsed["round1"].learning_rate == 2e-5
    assert parsed["mined"].model_name_or_path == parsed["round2"].model_name_or_path == "BAAI/bge-small-zh-v1.5"
    assert parsed["evaluation"].encoder == ["BAAI/bge-small-zh-v1.5", str(tmp_path / "out/model")]


# --------------------------------------------------------------------------------------------------- what a word stands for


def test_identity_is_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "1_Pooling/config.json"):
        (folder / name).write_text(name)
    first = recipe.identity(str(folder))
    (folder / "checkpoint-2").mkdir()
    for name in ("checkpoint-2/model.safetensors", "manifest.json", "README.md", ".lock"):
        (folder / name).write_text("new")
        assert recipe.identity(str(folder)) == first
    shutil.copytree(folder, tmp_path / "copy")
    assert recipe.identity(str(tmp_path / "copy")) == first
    for name in ("model.safetensors", "1_Pooling/config.json"):
        (folder / name).write_text("other")
        assert recipe.identity(str(folder)) != first
        first = recipe.identity(str(folder))
    (folder / "config.json").rename(folder / "tokenizer.json")
    assert recipe.identity(str(folder)) != first

    loss = tmp_path / "loss.py"
    loss.write_text("one")
    first = recipe.identity(f"{loss}:my_loss")
    loss.write_text("two")
    assert recipe.identity(f"{loss}:my_loss") not in (first, f"{loss}:my_loss")

    monkeypatch.chdir(tmp_path)
    for word in ("", "2-200", "1e-3", "为这个句子生成表示：", "x" * 5000, "what/is--this", "../none", "a/b/c"):
        assert recipe.identity(word) == word


def fetch(cache: Path, revision: str) -> None:
    """What a download of BAAI/bge-small-zh-v1.5 leaves in the hub's cache."""
    model = cache / "models--BAAI--bge-small-zh-v1.5"
    for file in (model / "refs/main", model / "snapshots" / revision / "config.json"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(revision)


def test_a_hub_model_stands_for_its_cached_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_cache = functools.partial(recipe.try_to_load_from_cache, cache_dir=tmp_path)
    monkeypatch.setattr(recipe, "try_to_load_from_cache", from_cache)
    assert recipe.identity("BAAI/bge-small-zh-v1.5") == "BAAI/bge-small-zh-v1.5"  # not fetched yet
    fetch(tmp_path, "a" * 40)
    assert "a" * 40 in recipe.identity("BAAI/bge-small-zh-v1.5")
    fetch(tmp_path, "b" * 40)
    assert "b" * 40 in recipe.identity("BAAI/bge-small-zh-v1.5")


# ---------------------------------------------------------------------------------------------- interrupted and gone on with

STAND_IN = """
import os, sys, time
from pathlib import Path
script, words = Path(sys.argv[1]).stem, sys.argv[2:]
flags = dict(zip(words[::2], words[1::2], strict=True))
output = Path(flags.get("--output_file") or flags["--output_dir"])
print("started", script, flush=True)
if "--wait" in flags:
    Path(flags["--wait"]).write_text(str(os.getpid()))
    time.sleep(60)
if script == "mine":
    output.write_text(flags["--input_file"])
    Path(f"{output}.manifest.json").write_text("{}")
else:
    output.mkdir(exist_ok=True)
    (output / "model.safetensors").write_text(str(sorted(flags.items())))
    (output / "manifest.json").write_text("{}")
sys.exit(int(flags.get("--exit", 0)))
"""


@pytest.fixture
def light(tiny_bert: Path, tmp_path: Path) -> Workplace:
    """Data and a stand-in for the stages, which --launcher starts."""
    write_data(tmp_path)
    (tmp_path / "stand in.py").write_text(STAND_IN, encoding="utf-8")
    return Workplace(tmp_path, tiny_bert)


def short(**settings: Any) -> list[Row]:
    """Three stages of the stand-in; the last with these settings."""
    return [
        {"name": "mined", "stage": "mine", "model": "base"},
        {"name": "round1", "stage": "train", "model": "base", "data": "mined"},
        {"name": "model", "stage": "train", "model": "round1", "data": "mined", **settings},
    ]


def launcher(place: Workplace) -> str:
    return f"{sys.executable} '{place.folder / 'stand in.py'}'"


def test_a_hub_model_that_a_stage_fetched_is_no_change(light: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = light.folder / "cache"
    from_cache = functools.partial(recipe.try_to_load_from_cache, cache_dir=cache)
    monkeypatch.setattr(recipe, "try_to_load_from_cache", from_cache)
    started: list[list[str]] = []
    popen = subprocess.Popen

    def fetching(command: list[str], **settings: Any) -> Any:
        started.append(command)
        fetch(cache, "a" * 40)
        return popen(command, **settings)

    monkeypatch.setattr(recipe.subprocess, "Popen", fetching)
    flags = {"launcher": launcher(light), "model_name_or_path": "BAAI/bge-small-zh-v1.5"}
    assert light.run(short(), **flags) == 0 and len(started) == 3
    assert light.run(short(), **flags) == 0 and len(started) == 3
    assert "a" * 40 in light.record("round1")["made_from"]["model_name_or_path"][0]


@pytest.mark.parametrize("code", [2, 75, 1])
def test_exit_codes_of_real_processes_pass_through(light: Workplace, code: int) -> None:
    assert light.run(short(exit=code), launcher=launcher(light)) == code
    assert light.record("round1")["output"] is not None and light.record("model")["output"] is None
    assert light.run(short(), launcher=launcher(light)) == 0
    assert light.record("model")["output"] is not None


def stop_when(file: Path, number: int) -> None:
    """Send this process a signal once the file holds something; after a minute nothing."""
    end = time.monotonic() + 60
    while not (file.exists() and file.read_text()):
        if time.monotonic() > end:
            return
        time.sleep(0.02)
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_the_stage(light: Workplace, number: int) -> None:
    pid = light.folder / "pid"

    threading.Thread(target=stop_when, args=(pid, number), daemon=True).start()
    began = time.monotonic()
    assert light.run(short(wait=str(pid)), launcher=launcher(light)) == 128 + number
    assert time.monotonic() - began < 30
    assert subprocess.run(["ps", "-p", pid.read_text()], capture_output=True).returncode == 1


def test_a_recipe_killed_between_its_stages_goes_on(light: Workplace, capfd: pytest.CaptureFixture[str]) -> None:
    pid = light.folder / "pid"
    words = light.argv(short(wait=str(pid)), launcher=launcher(light))
    driver = subprocess.Popen([sys.executable, ROOT / "recipe.py", *words], cwd=light.folder)
    try:
        while not (pid.exists() and pid.read_text()):
            assert driver.poll() is None
            time.sleep(0.02)
        driver.kill()
        assert driver.wait() == -signal.SIGKILL
    finally:
        driver.kill()
        if pid.exists():
            os.kill(int(pid.read_text()), signal.SIGKILL)
    capfd.readouterr()
    assert light.run(short(), launcher=launcher(light)) == 0
    out, err = capfd.readouterr()
    assert out.count("started") == 1
    assert err.count("skipped") == 2 and "[model] runs, changed wait: " in err


def test_the_launcher_starts_all_but_the_merge(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def popen(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=0, poll=lambda: 0)

    monkeypatch.setattr(recipe.subprocess, "Popen", popen)
    flags: Row = {"val_data": place.folder / "train.jsonl", "output_dir": place.folder / "new"}
    assert place.run(launcher="accelerate launch --num_processes 2", **flags) == 0
    for command, stage in zip(commands, ("mine", "train", "mine", "train", "merge", "evaluate"), strict=True):
        start = [sys.executable] if stage == "merge" else ["accelerate", "launch", "--num_processes", "2"]
        assert command[: len(start) + 1] == [*start, str(ROOT / f"{stage}.py")]


RESUME, OVERWRITE = ["--resume_from_checkpoint", "latest"], ["--overwrite_output_dir", "True"]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], []),
        (["killed"], RESUME),
        (["killed", "killed"], RESUME),
        (["killed early"], OVERWRITE),
        (["finished", "other model", "killed early"], OVERWRITE),  # what lies there is of the other model
        (["finished", "other model", "killed"], RESUME),
        (["killed", "other setting"], RESUME + OVERWRITE),  # train.py knows which settings may change
        (["killed", "other data"], OVERWRITE),
        (["killed", "other model"], OVERWRITE),
        (["finished", "other setting"], RESUME + OVERWRITE),
        (["finished", "other model"], OVERWRITE),
        (["finished", "lost weights"], RESUME),
        (["finished", "lost manifest"], OVERWRITE),
    ],
    ids=", ".join,
)
def test_how_a_training_is_told_of_what_lies_there(
    steps: list[str], expected: list[str], light: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = tmp_path / "base", tmp_path / "out/model"
    base.mkdir()
    (base / "model.safetensors").write_text("one")
    light.model = base
    settings: Row = {"name": "model", "stage": "train", "model": "base"}

    def start(code: int, wrote: str | None) -> list[str]:
        """A training that writes this into its folder (None: it has not come that far); the last words of its command."""

        def popen(command: list[str], **_: Any) -> Any:
            light.started.append(command)
            for name in ("manifest.json", "model.safetensors") if wrote else ():
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(f"{wrote} {settings} {base / 'model.safetensors'}")
            return SimpleNamespace(returncode=code, poll=lambda: code)

        monkeypatch.setattr(recipe.subprocess, "Popen", popen)
        assert light.run([settings]) == abs(code) + 128 * (code < 0)
        (command,) = light.started
        return command[command.index("--output_dir") + 2 :]

    actions: dict[str, Callable[[], Any]] = {
        "killed early": lambda: start(-9, None),
        "killed": lambda: start(-9, "running"),
        "finished": lambda: start(0, "finished"),
        "other setting": lambda: settings.update(max_steps=3),
        "other data": lambda: (light.folder / "train.jsonl").write_text("other"),
        "other model": lambda: (base / "model.safetensors").write_text("other"),
        "lost weights": (folder / "model.safetensors").unlink,
        "lost manifest": (folder / "manifest.json").unlink,
    }
    for step in steps:
        actions[step]()
    assert start(0, "finished") == expected


def slow_steps() -> None:
    """Half a second after each logged step, in which a signal can arrive."""
    append = train.append_metrics
    train.append_metrics = lambda *args: (append(*args), time.sleep(0.5))  # type: ignore[assignment, func-returns-value]


def test_a_training_that_a_signal_stopped_goes_on_to_the_same_weights(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [{"name": "model", **TRAIN, "max_steps": 4, "save_steps": 0}]
    assert place.run(stages, output_dir=place.folder / "whole") == 0
    in_process = recipe.subprocess.Popen
    metrics = place.folder / "out/model/metrics.jsonl"
    shutil.rmtree(place.folder / "out/model")
    (place.folder / "out/model.recipe.json").unlink()

    def popen(command: list[str], **_: Any) -> Any:
        child = runs.start(command[2:], place.folder / "log", None, slow_steps)

        threading.Thread(target=stop_when, args=(metrics, signal.SIGTERM), daemon=True).start()

        class Child:
            returncode = property(lambda _: child.exitcode)

            def poll(self) -> int | None:
                return child.exitcode

            def send_signal(self, number: int) -> None:
                os.kill(child.pid, number)

        return Child()

    monkeypatch.setattr(recipe.subprocess, "Popen", popen)
    assert place.run(stages) == 75, (place.folder / "log").read_text()
    (checkpoint,) = (place.folder / "out/model").glob("checkpoint-*")
    assert not (place.folder / "out/model/model.safetensors").exists()
    monkeypatch.setattr(recipe.subprocess, "Popen", in_process)
    capsys.readouterr()
    assert place.run(stages) == 0
    assert place.names == ["model"] and place.started[0][-2:] == RESUME
    assert "runs, not finished or not whole: " in said(capsys)["model"]
    assert [line["step"] for line in runs.read_lines(metrics)] == [1, 2, 3, 4] and checkpoint.name != "checkpoint-4"
    assert runs.equal_weights(place.folder / "out/model", place.folder / "whole/model")
