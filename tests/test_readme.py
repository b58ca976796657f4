"""What the two READMEs say is true: their commands and code run, their flags, files and messages exist.

The walk-through's commands are run from the README's own text, in order, in a fresh folder with small raw files. Rules
of the substitution, the only ones:

- BAAI/bge-large-zh-v1.5 becomes the tiny model; other words stay as they are written;
- flags are appended, never changed: APPENDED below;
- `python STAGE.py ...` runs STAGE.main(...) in this process; `torchrun ...` starts two real processes,
  with --standalone, which picks a free port.
"""

import argparse
import ast
import csv
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from transformers import HfArgumentParser

from bge_core.files import records
from bge_core.loss import LossConfig, LossInput, training_loss
from bge_core.runtime import config
from bge_core.runtime.cli import parse_config
from bge_core.runtime.config import REFUSED

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh-CN.md")
HUB_MODEL = "BAAI/bge-large-zh-v1.5"
STAGES = {
    "prepare.py": config.PrepareConfig, "mine.py": config.MineConfig, "train.py": config.TrainConfig,
    "merge.py": config.MergeConfig, "evaluate.py": config.EvaluateConfig,
}  # fmt: skip
# 40 questions instead of thousands, and 2 updates instead of 30 epochs.
APPENDED = {"prepare.py": ["--train_num", "32"], "train.py": ["--max_steps", "2"]}
WALK_THROUGH = ["prepare.py", "mine.py", "train.py", "train.py", "merge.py", "evaluate.py"]
# Flags of what starts a stage, and of the programs that the READMEs name.
OTHERS_FLAGS = {
    "max-restarts",
    "nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "config_file", "main_process_ip",
    "machine_rank", "num_processes", "mixed_precision", "cpu", "nodes", "local-dir", "config",
}  # fmt: skip
FLAG = re.compile(r"(?<![\w-])--([A-Za-z][\w-]*)")


@cache
def text(readme: str) -> str:
    return (ROOT / readme).read_text(encoding="utf-8")


def between(readme: str, marker: str) -> str:
    """The text between <!-- marker --> and <!-- /marker -->, each of which is there once."""
    (found,) = re.findall(rf"<!-- {marker} -->\n(.*?)<!-- /{marker} -->", text(readme), re.DOTALL)
    return str(found)


def blocks(part: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", part, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def commands(part: str) -> list[list[str]]:
    """Every command of the bash blocks as its words: continued lines joined, comments dropped."""
    lines = "".join(blocks(part, "bash")).replace("\\\n", " ").splitlines()
    parsed = (shlex.split(line, comments=True) for line in lines if "<" not in line)
    return [words for words in parsed if words]


def stage_of(words: list[str]) -> int | None:
    """Where the script stands in a command line."""
    return next((i for i, word in enumerate(words) if word in STAGES), None)


@cache
def known_flags(stage: str) -> frozenset[str]:
    parser = HfArgumentParser(STAGES[stage])  # type: ignore[arg-type]
    return frozenset(option.lstrip("-") for action in parser._actions for option in action.option_strings)


# ----------------------------------------------------------------------------------------------------- the walk-through


def write_raw_files(folder: Path) -> None:
    """40 questions about 40 answers, as a CSV with Chinese names and a JSONL."""
    folder.mkdir()
    words = ["信用卡", "贷款", "密码", "快递", "退款", "酒店", "签证", "发票", "会员", "物流"]
    pairs = [(f"{word}第{i}种怎么办理", f"{word}第{i}种在{i}号页面办理") for i in range(4) for word in words]
    with open(folder / "one.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("问题", "答案"), *pairs[:20]])
    with open(folder / "two.jsonl", "w", encoding="utf-8") as file:
        for question, answer in pairs[20:]:
            file.write(json.dumps({"question": question, "answer": answer}, ensure_ascii=False) + "\n")


def run(words: list[str], model: Path) -> int:
    """Run one command as the rules at the top of this file say; its exit code."""
    place = stage_of(words)
    assert place is not None, words
    script = words[place]
    words = [str(model) if word == HUB_MODEL else word for word in words] + APPENDED.get(script, [])
    if words[0] == "python":
        for state in (runs.AcceleratorState, runs.GradientState):
            state._reset_state(*([True] if state is runs.AcceleratorState else []))
        return int(importlib.import_module(script.removesuffix(".py")).main(words[place + 1 :]))
    assert words[0] == "torchrun"
    words[place] = str(ROOT / script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
    process = subprocess.Popen(launch, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)
    try:
        return process.wait(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # the launcher ends its workers
        process.wait()
        raise


def test_the_walk_through_and_the_examples_run(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One test, since each part needs what the one before it left."""
    write_raw_files(tmp_path / "raw")
    monkeypatch.chdir(tmp_path)
    steps = commands(between("README.md", "walk-through"))
    assert [words[stage_of(words) or 0] for words in steps] == WALK_THROUGH
    for words in steps:
        assert run(words, tiny_bert) == 0, shlex.join(words)
    check_what_the_stages_left(tmp_path)
    check_the_loss_and_resuming(tiny_bert, capfd)
    check_the_python_examples(tiny_bert, capfd)


def check_what_the_stages_left(walked: Path) -> None:
    for file in ("train.jsonl", "test.jsonl", "corpus.jsonl", "manifest.json", "train_minedHN.jsonl.manifest.json"):
        assert (walked / "data" / file).is_file(), file
    rows = runs.read_lines(walked / "data/train_minedHN.jsonl")
    assert len(rows) == 32 and all(len(row["neg"]) == 15 for row in rows)
    trained = walked / "outputs/bge-large-zh-finetuned"
    for file in ("model.safetensors", "README.md", "modules.json", "metrics.jsonl", "curves.png", "checkpoint-1"):
        assert (trained / file).exists(), file
    manifest = runs.manifest(trained)
    assert manifest["status"] == "finished" and manifest["facts"]["processes"] == 2
    metrics = runs.read_lines(trained / "metrics.jsonl")
    assert {"step", "epoch", "loss", "lr", "grad_norm", "queries_per_second", "memory_mb"} <= metrics[-1].keys()
    assert (walked / "outputs/bge-large-zh-merged/model.safetensors").is_file()
    scores = json.loads((walked / "outputs/evaluation/metrics.json").read_text(encoding="utf-8"))
    assert len(scores) == 3 and all("MRR@10" in values for values in scores.values())
    for name in scores:
        assert (walked / f"outputs/evaluation/run.{name}.trec").is_file()


def check_the_loss_and_resuming(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The README's loss from its own text; and what it says of the same command given twice."""
    words = [*commands(between("README.md", "loss"))[0], "--save_steps", "1"]
    Path("my_loss.py").write_text(blocks(between("README.md", "loss"), "python")[0], encoding="utf-8")
    capfd.readouterr()
    assert [run(words, model), run(words, model)] == [0, 2]
    assert "add --resume_from_checkpoint latest to go on" in capfd.readouterr().err
    assert run([*words, "--resume_from_checkpoint", "latest"], model) == 0
    (line,) = runs.read_lines(Path("outputs/my-loss/metrics.jsonl"))
    assert line["step"] == 2 and "positive_similarity" in line


def check_the_python_examples(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for code in blocks(between("README.md", "library"), "python"):
        exec(compile(code.replace(HUB_MODEL, str(model)), "README.md", "exec"), {})
    assert "在登录页点" in capfd.readouterr().out
    assert Path("outputs/mixed_model_1/model.safetensors").is_file()


def test_the_loss_of_the_readme_takes_ten_lines_and_its_margin() -> None:
    (code,) = blocks(between("README.md", "loss"), "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    names: dict[str, Any] = {}
    exec(compile(code, "my_loss.py", "exec"), names)
    generator = torch.Generator().manual_seed(0)
    query_BD, candidate_ND = (
        torch.nn.functional.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (3, 6)
    )
    own_BG = torch.arange(6).reshape(3, 2)
    x = LossInput(
        query_BD, query_BD, 0, candidate_ND, own_BG[:, 0], own_BG, torch.arange(6), own_BG[:, :1]
    )  # fmt: skip
    plain = training_loss(x, LossConfig()).loss
    assert torch.allclose(names["my_loss"](x, LossConfig(args={"margin": 0.0})).loss, plain)
    assert names["my_loss"](x, LossConfig(args={"margin": 0.1})).loss > plain


# --------------------------------------------------------------------------------------------------- flags and messages


@pytest.mark.parametrize("readme", READMES)
def test_every_command_is_accepted(readme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line that starts a stage, anywhere, gives a valid configuration, YAML files included."""
    monkeypatch.chdir(ROOT)
    count = 0
    for words in commands(text(readme)):
        place = stage_of(words)
        if words[0] == "sbatch":
            script = ROOT / next(word for word in words if word.endswith(".sh"))
            assert script.is_file()
            words, place = ["train.py", *words[words.index("--config") :]], 0
        if place is not None:
            assert words[0] in ("python", "torchrun", "accelerate", "train.py"), words
            parse_config(STAGES[words[place]], words[place + 1 :])
            count += 1
    assert count >= 12


@pytest.mark.parametrize("readme", READMES)
def test_every_flag_exists_or_is_refused(readme: str) -> None:
    known = {flag for stage in STAGES for flag in known_flags(stage)} | OTHERS_FLAGS
    refused = {
        name for flags in golden_flags().values() for name, flag in flags.items() if flag["verdict"] != "same"
    } | REFUSED.keys()
    found = set(FLAG.findall(text(readme)))
    assert found - known - refused == set()


def golden_flags() -> dict[str, dict[str, Any]]:
    return dict(json.loads((ROOT / "tests/golden/flagembedding_flags.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("readme", READMES)
def test_every_flag_of_flagembedding_is_named_where_it_belongs(readme: str) -> None:
    """`same` in the paragraph or, with what changed, in the table; what is refused: in a row that says so."""
    section = between(readme, "flags")
    same, table = section.split("\n| ", 1)
    rows = [row.split(" | ") for row in ("| " + table).splitlines()]
    mentioned = {flag: row for row in rows for flag in FLAG.findall(row[0])}
    unchanged = set(FLAG.findall(same))
    says_refused = {"README.md": "refused", "README.zh-CN.md": "不接受"}[readme]
    for stage, flags in golden_flags().items():
        for name in flags:
            assert name in unchanged or name in mentioned, f"{stage}: --{name}"
            accepted = name in known_flags(f"{stage}.py")
            if name in unchanged:
                assert accepted, f"{stage}: --{name} is said to be the same"
            else:
                refused = mentioned[name][1].startswith(says_refused)
                assert refused == (not accepted and not mentioned[name][1].count("`--")), f"{stage}: --{name}"


@pytest.mark.parametrize("readme", READMES)
def test_defaults_said_to_be_the_same_are(readme: str) -> None:
    same = set(FLAG.findall(between(readme, "flags").split("\n| ", 1)[0]))
    for stage, flags in golden_flags().items():
        parser = HfArgumentParser(STAGES[f"{stage}.py"])  # type: ignore[arg-type]
        ours = {option.lstrip("-"): action for action in parser._actions for option in action.option_strings}
        for name, flag in flags.items():
            if name not in same or ours[name].required:
                continue
            if ours[name].default != [] and name != "model_name_or_path":  # lists; what --check does not need
                assert ours[name].default in (flag["default"], argparse.SUPPRESS), f"{stage}: --{name}"


def message_parts() -> str:
    """Every string of the code, literals that stand side by side joined, what is filled in left out."""
    parts = []
    for file in (*(ROOT / stage for stage in STAGES), *sorted((ROOT / "bge_core").glob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts.append("...".join(str(v.value) for v in node.values if isinstance(v, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts.append(re.sub(r"%[.\d]*[dsfr%]", "...", node.value))
    return "\n".join(parts)


@pytest.mark.parametrize("readme", READMES)
def test_every_message_is_one_that_the_code_gives(readme: str) -> None:
    rows = [row.split(" | ")[0] for row in between(readme, "messages").strip().splitlines()[2:]]
    assert len(rows) > 20
    code = message_parts()
    for row in rows:
        if row.startswith("| torch"):  # torch's own
            continue
        for message in re.findall(r"`([^`]+)`", row):
            for part in message.split("..."):
                assert message.startswith("--") or part in code, f"{message}: no {part!r} in the code"


# ------------------------------------------------------------------------------------------------ structure, both alike


def skeleton(readme: str) -> list[str]:
    """Levels of the headings, markers, fences and the number of rows of tables, in order."""
    kinds = []
    in_block = False
    for line in text(readme).splitlines():
        if line.startswith("```"):
            in_block = not in_block
            kinds += [line] * in_block
        elif in_block:
            continue
        elif re.match(r"#+ |<!-- ", line):
            kinds.append(line.split(" ")[0] if line.startswith("#") else line)
        elif line.startswith("|"):
            kinds.append("row" + str(line.replace("\\|", "").count(" | ")))
        elif line.startswith("- "):
            kinds.append("item")
    return kinds


def test_both_readmes_have_the_same_structure_commands_and_code() -> None:
    english, chinese = READMES
    assert skeleton(english) == skeleton(chinese)
    assert commands(text(english)) == commands(text(chinese))
    for language in ("python", "json", ""):
        assert blocks(text(english), language) == blocks(text(chinese), language)
    assert chinese in text(english) and english in text(chinese)


@pytest.mark.parametrize("document", [*READMES, "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_files_and_links_exist(document: str) -> None:
    page = text(document)
    folder = (ROOT / document).parent
    for link in re.findall(r"\]\(([^)#\s]+)\)", page):
        assert link.startswith("http") or (folder / link).exists(), link
    for name in re.findall(r"\b((?:bge_core|configs|examples|benchmarks|tests|docs)/[\w./-]*[\w/])", page):
        assert (ROOT / name).exists() or name.startswith("benchmarks/results/"), name
    for name in re.findall(r"`([\w-]+\.(?:py|toml|txt))`", page):
        places = (ROOT, folder, ROOT / "bge_core", ROOT / "tests", ROOT / "examples")
        assert name == "my_loss.py" or any((place / name).is_file() for place in places), name
    for target in re.findall(r"`make (\w+)", page):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), target


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text("CONTRIBUTING.md"), re.MULTILINE)
    named = {name for cell, reason in rows if reason.strip() for name in re.findall(r"[\w-]+", cell.lower())}
    for requirement in needed:
        name = re.split(r"[<>=!~;\s]", requirement)[0]
        assert name.lower() in named, f"{name}: say in CONTRIBUTING.md what it is for"


@pytest.mark.parametrize("readme", READMES)
def test_the_json_examples_are_valid_rows(readme: str) -> None:
    (block,) = blocks(text(readme), "json")
    plain, scored, passage = map(json.loads, block.splitlines())
    assert records.check_training_row(plain) is None
    assert records.check_training_row(scored, with_scores=True) is None
    assert records.check_corpus_row(passage) is None
