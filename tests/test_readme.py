"""What the READMEs say is true: their commands and code run, their flags, files and links exist.

And what four pages of docs/ promise: the guide's commands run, every flag of FlagEmbedding is named, every message is the
code's, and what is done after training works. tests/test_docs.py holds what is common to all pages.

The walk-throughs' commands are run from the pages' own text, in order, in a fresh folder with small raw files. Rules of
the substitution, the only ones:

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
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from test_architecture import ROOMS

from bge_core.files import records
from bge_core.loss import LossConfig, LossInput, training_loss
from bge_core.runtime import config
from bge_core.runtime.cli import make_parser, parse_config

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh-CN.md")
GUIDE, FORMATS, TROUBLE, AFTER = (
    f"docs/{name}.md" for name in ("from-flagembedding", "formats", "troubleshooting", "after-training")
)
HUB_MODEL = "BAAI/bge-large-zh-v1.5"
STAGES = {
    "prepare.py": config.PrepareConfig,
    "mine.py": config.MineConfig,
    "train.py": config.TrainConfig,
    "merge.py": config.MergeConfig,
    "evaluate.py": config.EvaluateConfig,
}
# 40 questions instead of thousands, and 2 updates instead of 30 epochs.
APPENDED = {"prepare.py": ["--train_num", "32"], "train.py": ["--max_steps", "2"]}
# Flags of what starts a stage, of recipe.py and the benchmarks, and of the programs that the pages name.
OTHERS_FLAGS = {
    "max-restarts", "shutdown-timeout", "nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "config_file",
    "main_process_ip", "machine_rank", "num_processes", "mixed_precision", "cpu", "nodes", "launcher", "local-dir",
    "config", "model-id", "port", "runner", "phase", "best", "demo", "data", "cmrc", "encoder",
}  # fmt: skip
FLAG = re.compile(r"(?<![\w-])--([A-Za-z][\w-]*)")


def chinese(page: str) -> str:
    """Its twin."""
    return page.removesuffix(".md") + ".zh-CN.md"


def both(page: str) -> pytest.MarkDecorator:
    """Run a test on a page and its twin."""
    return pytest.mark.parametrize("page", [page, chinese(page)])


@cache
def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def between(page: str, marker: str) -> str:
    """The text between <!-- marker --> and <!-- /marker -->, each of which is there once."""
    (found,) = re.findall(rf"<!-- {marker} -->\n(.*?)<!-- /{marker} -->", text(page), re.DOTALL)
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


def stage_commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """(script, what follows it) of every command that starts a stage."""
    for words in commands(text(page)):
        if words[0] == "sbatch":
            assert any((ROOT / word).is_file() for word in words if word.endswith(".sh")), words
            yield "train.py", words[words.index("--config") :]
        elif (place := stage_of(words)) is not None:
            assert words[0] in ("python", "torchrun", "accelerate"), words
            yield words[place], words[place + 1 :]


def code(page: str) -> list[str]:
    """What is to be the same in both languages: Python without comments, JSON, YAML, examples of files."""
    blocks_of_it = [block for language in ("python", "json", "yaml", "") for block in blocks(text(page), language)]
    return [re.sub(r"(^|  )# .*", "", block, flags=re.MULTILINE) for block in blocks_of_it]


@cache
def known_flags(stage: str) -> frozenset[str]:
    parser = make_parser(STAGES[stage])
    return frozenset(option.lstrip("-") for action in parser._actions for option in action.option_strings)


# ---------------------------------------------------------------------------------------------------- the walk-throughs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands are run: 40 questions about 40 answers in raw/, as a CSV with Chinese names and a JSONL."""
    (tmp_path / "raw").mkdir()
    words = ["信用卡", "贷款", "密码", "快递", "退款", "酒店", "签证", "发票", "会员", "物流"]
    pairs = [(f"{word}第{i}种怎么办理", f"{word}第{i}种在{i}号页面办理") for i in range(4) for word in words]
    with open(tmp_path / "raw/one.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("问题", "答案"), *pairs[:20]])
    with open(tmp_path / "raw/two.jsonl", "w", encoding="utf-8") as file:
        for question, answer in pairs[20:]:
            file.write(json.dumps({"question": question, "answer": answer}, ensure_ascii=False) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


def walk(page: str, model: Path, processes: int) -> None:
    """Run the five commands of a page, and see what README says of the files that each stage leaves."""
    steps = commands(between(page, "walk-through"))
    assert [words[stage_of(words) or 0] for words in steps] == list(STAGES)
    for words in steps:
        assert run(words, model) == 0, shlex.join(words)
    trained, merged, report = (
        Path(words[words.index(flag) + 1])
        for words, flag in zip(steps[2:], ("--output_dir", "--output_path", "--output_dir"), strict=True)
    )
    for file in ("train.jsonl", "test.jsonl", "corpus.jsonl", "manifest.json", "train_minedHN.jsonl.manifest.json"):
        assert Path("data", file).is_file(), file
    rows = runs.read_lines(Path("data/train_minedHN.jsonl"))
    assert len(rows) == 32 and all(len(row["neg"]) == 15 for row in rows)
    for file in ("model.safetensors", "README.md", "modules.json", "metrics.jsonl", "curves.png", "checkpoint-1"):
        assert (trained / file).exists(), file
    manifest = runs.manifest(trained)
    assert manifest["status"] == "finished" and manifest["facts"]["processes"] == processes
    metrics = runs.read_lines(trained / "metrics.jsonl")
    assert {"step", "epoch", "loss", "lr", "grad_norm", "queries_per_second", "memory_mb"} <= metrics[-1].keys()
    assert (merged / "model.safetensors").is_file()
    scores = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    assert len(scores) == 3 and all("MRR@10" in values for values in scores.values())
    for name in scores:
        assert (report / f"run.{name}.trec").is_file()


def execute(page: str, marker: str, model: Path) -> None:
    """Run the Python blocks of a page one after another, with the names of those before."""
    names: dict[str, Any] = {}
    for code in blocks(between(page, marker), "python"):
        exec(compile(code.replace(HUB_MODEL, str(model)), page, "exec"), names)


def test_what_we_recommend_runs(folder: Path, tiny_bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One test, since each part needs what the one before it left: the README, then what to do after training."""
    walk("README.md", tiny_bert, processes=1)
    _, mine, train, *_ = commands(between("README.md", "walk-through"))
    after_prepare = capfd.readouterr().out.split("next: ")[1].replace("\\\n", "").splitlines()[0]
    assert sorted(shlex.split(after_prepare)) == sorted(mine)
    assert run(train, tiny_bert) == 0  # "Interrupted: the same line again"
    words = [*commands(between("README.md", "loss"))[0], "--save_steps", "1"]
    Path("my_loss.py").write_text(blocks(between("README.md", "loss"), "python")[0], encoding="utf-8")
    capfd.readouterr()
    assert [run(words, tiny_bert), run(words, tiny_bert)] == [0, 2]
    assert "add --resume_from_checkpoint latest to go on" in capfd.readouterr().err
    (line,) = runs.read_lines(Path("outputs/my-loss/metrics.jsonl"))
    assert line["step"] == 2 and "positive_similarity" in line
    execute("README.md", "library", tiny_bert)
    execute(AFTER, "library", tiny_bert)
    printed = capfd.readouterr().out
    assert "号页面办理" in printed and "the index" in printed


def test_the_guide_runs(folder: Path, tiny_bert: Path) -> None:
    walk(GUIDE, tiny_bert, processes=2)
    execute(GUIDE, "library", tiny_bert)
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
    x = LossInput(query_BD, query_BD, 0, candidate_ND, own_BG[:, 0], own_BG, torch.arange(6), own_BG[:, :1])
    plain = training_loss(x, LossConfig()).loss
    assert torch.allclose(names["my_loss"](x, LossConfig(args={"margin": 0.0})).loss, plain)
    assert names["my_loss"](x, LossConfig(args={"margin": 0.1})).loss > plain


def test_the_recommended_settings_are_those_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = commands(between("README.md", "walk-through"))[2]
    ours = parse_config(config.TrainConfig, ["--config", "configs/train/recommended.yaml"])
    said = parse_config(config.TrainConfig, [*words[2:], "--negatives_cross_device"])  # with one process: no effect
    assert ours == said


# --------------------------------------------------------------------------------------------------- flags and messages


@both("README.md")
def test_every_command_is_accepted_and_every_flag_exists(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line that starts a stage, anywhere, gives a valid configuration, YAML files included."""
    monkeypatch.chdir(ROOT)
    for script, words in stage_commands(page):
        parse_config(STAGES[script], words)
    known = {flag for stage in STAGES for flag in known_flags(stage)} | OTHERS_FLAGS
    assert set(FLAG.findall(text(page))) - known == set()


def golden_flags() -> dict[str, dict[str, Any]]:
    return dict(json.loads((ROOT / "tests/golden/flagembedding_flags.json").read_text(encoding="utf-8")))


@both(GUIDE)
def test_every_flag_of_flagembedding_is_named_where_it_belongs(page: str) -> None:
    """`same`, with its default, in the paragraph, or in the table with what changed; a refused one in a row that says so."""
    same, table = between(page, "flags").split("\n| ", 1)
    rows = [row.split(" | ") for row in ("| " + table).splitlines()]
    mentioned = {flag: row for row in rows for flag in FLAG.findall(row[0])}
    unchanged = set(FLAG.findall(same))
    says_refused = "不接受" if page == chinese(GUIDE) else "refused"
    for stage, flags in golden_flags().items():
        parser = make_parser(STAGES[f"{stage}.py"])
        ours = {option.lstrip("-"): action for action in parser._actions for option in action.option_strings}
        for name, flag in flags.items():
            if name in unchanged:
                assert name in ours, f"{stage}: --{name} is said to be the same"
                free = ours[name].required or ours[name].default == [] or name == "model_name_or_path"
                assert free or ours[name].default in (flag["default"], argparse.SUPPRESS), f"{stage}: --{name}"
            else:
                assert name in mentioned, f"{stage}: --{name}"
                refused = mentioned[name][1].startswith(says_refused)
                assert refused == (name not in ours and "`--" not in mentioned[name][1]), f"{stage}: --{name}"


@cache
def message_parts() -> str:
    """Every string of the code, literals that stand side by side joined, what is filled in left out."""
    parts = []
    for file in (*(ROOT / stage for stage in STAGES), *sorted((ROOT / "bge_core").rglob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts.append("...".join(str(v.value) for v in node.values if isinstance(v, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts.append(re.sub(r"%[.\d]*[dsfgr%]", "...", node.value))
    return "\n".join(parts)


@both(TROUBLE)
def test_every_message_is_one_that_the_code_gives(page: str) -> None:
    rows = [row.split(" | ")[0] for row in between(page, "messages").splitlines() if row.startswith("| ")]
    assert len(rows) > 60
    code = message_parts()
    for row in rows:
        if not row.startswith("| torch"):  # torch's own
            for message in re.findall(r"`([^`]+)`", row):
                for part in message.split("..."):
                    assert part in code, f"{message}: no {part!r} in the code"


# ------------------------------------------------------------------------------------------------ structure, both alike


def skeleton(page: str) -> list[str]:
    """Levels of the headings, markers, fences and the number of cells of tables' rows, in order."""
    kinds = []
    in_block = False
    for line in text(page).splitlines():
        if line.startswith("```"):
            in_block = not in_block
            kinds += [line] * in_block
        elif in_block:
            continue
        elif re.match(r"#+ |<!-- ", line):
            kinds.append(line.split(" ")[0] if line.startswith("#") else line)
        elif line.startswith("|"):
            kinds.append("row" + str(line.replace("\\|", "").count(" | ")))
        elif re.match(r"(-|\d\.) ", line):
            kinds.append("item")
    return kinds


def test_both_readmes_have_the_same_structure_commands_and_code() -> None:
    english, other = READMES
    assert skeleton(english) == skeleton(other)
    assert commands(text(english)) == commands(text(other))
    assert code(english) == code(other)
    assert other in text(english) and english in text(other)


@pytest.mark.parametrize("page", [*READMES, "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_files_and_links_exist(page: str) -> None:
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\((?!http)([^)#\s]+)", text(page)):
        assert (folder / link).exists(), link
    for name in re.findall(r"(?<!-)\b((?:bge_core|configs|examples|benchmarks|tests|docs)/[\w./-]*[\w/])", text(page)):
        assert (ROOT / name).exists() or name.startswith("benchmarks/results/"), name
    for name in re.findall(r"`([\w-]+\.(?:py|toml|txt))`", text(page)):
        places = (ROOT, ROOT / "bge_core", ROOT / "tests", ROOT / "examples", folder)
        assert name == "my_loss.py" or any((place / name).is_file() for place in places), name
    for target in re.findall(r"`make (\w+)", text(page)):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), target


@pytest.mark.parametrize("page", [*READMES, "CONTRIBUTING.md"])
def test_every_room_is_named(page: str) -> None:
    """In the order of the imports."""
    assert re.findall(r"^\| `(\w+)/` \|", text(page), re.MULTILINE) == ROOMS


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [name for extra in project["optional-dependencies"].values() for name in extra]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text("CONTRIBUTING.md"), re.MULTILINE)
    named = {name for cell, reason in rows if reason.strip() for name in re.findall(r"[\w-]+", cell.lower())}
    for requirement in [*project["dependencies"], *extras]:
        name = re.split(r"[<>=!~;\s]", requirement)[0]
        assert name.lower() in named, f"{name}: say in CONTRIBUTING.md what it is for"


@both(FORMATS)
def test_the_json_examples_are_valid_rows(page: str) -> None:
    (block,) = blocks(text(page), "json")
    plain, scored, passage = map(json.loads, block.splitlines())
    assert records.check_training_row(plain) is None
    assert records.check_training_row(scored, with_scores=True) is None
    assert records.check_corpus_row(passage) is None
