"""Several stages in a row, as a YAML file names them; a stage for which nothing has changed is not run again.

    python recipe.py --config configs/recipes/two_rounds.yaml --train_data T --corpus C --val_data V --output_dir OUT

`{name: round1, stage: train, model: base, data: mined, learning_rate: 2e-5}` is train.py with that flag; its output is
OUT/round1 (of mine: OUT/NAME.jsonl), and OUT/round1.recipe.json says what it was made from. `model`, `data`, `models`,
`base_model` and `encoder` name stages before, `base`, or, with a slash, a path or hub model. With --val_data, base and
OUT/model are scored, each with its own prompts. --launcher "accelerate launch --num_processes 2" starts mine, train and
evaluate, not this Python.
"""

import argparse
import difflib
import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import try_to_load_from_cache

from bge_core import UserError
from bge_core.files import atomic
from bge_core.runtime.cli import as_texts, as_words, expand_home

OUTPUT_FLAG = {"mine": "output_file", "train": "output_dir", "merge": "output_path", "evaluate": "output_dir"}
DATA_FLAG = {"mine": "input_file", "train": "train_data"}
MODEL_FLAG = {"model": "model_name_or_path", "models": "models", "base_model": "base_model", "encoder": "encoder"}
REPORTS = {"manifest.json", "metrics.jsonl", "curves.png", "README.md"}  # they tell times and paths: no content


@dataclass(frozen=True)
class Stage:
    """A stage with every name resolved: the words behind each flag of its script, and where its output goes."""

    name: str
    kind: str
    flags: dict[str, list[str]]
    output: Path

    @property
    def manifest(self) -> Path:
        """What the stage itself writes when it begins (train) or ends."""
        return Path(f"{self.output}.manifest.json") if self.kind == "mine" else self.output / "manifest.json"

    @property
    def record(self) -> Path:
        """What it was made from, in this file's words."""
        return self.output.with_name(f"{self.name}.recipe.json")


def known(name: Any, names: Any, where: str) -> str:
    """The name; UserError, with the nearest one, if it is not among the names."""
    if name not in names:
        nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0) or ["$train_data"]
        remedy = "give --val_data" if name == "$val_data" else f"did you mean {nearest[0]!r}?"
        raise UserError(f"{where} {name!r} is unknown here; {remedy}")
    return str(name)


def read_recipe(file: str) -> dict[str, Any]:
    """What the YAML file holds: `stages`, and if stated `model_name_or_path` and `evaluation`."""
    recipe = yaml.safe_load(Path(file).read_bytes())
    parts = [*(recipe.get("stages") or [None]), recipe.get("evaluation") or {}] if isinstance(recipe, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"--config {file}: is no recipe; write `stages:` and below it a list of mappings")
    for key in recipe:
        known(key, ("model_name_or_path", "stages", "evaluation"), f"{file}: the key")
    return cast(dict[str, Any], recipe)


def plan(args: argparse.Namespace) -> list[Stage]:
    """All stages, every name resolved, before any of them runs. UserError: what is wrong with the recipe."""
    given = {f"${name}": getattr(args, name) for name in ("train_data", "corpus", "val_data") if getattr(args, name)}
    if missing := [f"--{name[1:]} {path}" for name, path in given.items() if not os.path.exists(path)]:
        raise UserError(f"{', '.join(missing)}: no such file")
    recipe = read_recipe(args.config)
    base = expand_home(str(args.model_name_or_path or recipe.get("model_name_or_path") or ""))
    if not base:
        raise UserError(f"{args.config}: lacks model_name_or_path; add it, or give --model_name_or_path")
    scored = {"name": "evaluation", "stage": "evaluate", "val_data": "$val_data", "corpus": "$corpus"}
    scored |= {"encoder": ["base", "model"], "add_instruction": True} | (recipe.get("evaluation") or {})
    models, files, stages = {"base": base}, dict[str, str](), list[Stage]()
    for entry in recipe["stages"] + [scored] * bool(args.val_data):
        where = f"{args.config}: stage {(name := str(entry.pop('name', '')))!r}:"
        if not re.fullmatch(r"[\w-]+", name) or name in models | files:
            raise UserError(f"{where} give each stage a `name` of its own, of letters, digits, _ and -")
        kind = known(entry.pop("stage", None), OUTPUT_FLAG, f"{where} stage")
        entry = {"data": "$train_data"} | entry if kind in DATA_FLAG else entry
        entry |= {"seed": args.seed} if args.seed and kind != "evaluate" else {}
        output = Path(args.output_dir, name + ".jsonl" * (kind == "mine"))
        flags = resolve(entry, kind, models, files, given, where) | {OUTPUT_FLAG[kind]: [str(output)]}
        stages.append(Stage(name, kind, flags, output))
        (files if kind == "mine" else models)[name] = str(output)
    if [stage.name for stage in stages if stage.kind in ("train", "merge")][-1:] != ["model"]:
        raise UserError(f"{args.config}: the last train or merge makes the model of the recipe: name it `model`")
    return stages


def resolve(
    entry: dict[str, Any], kind: str, models: dict[str, str], files: dict[str, str], given: dict[str, str], where: str
) -> dict[str, list[str]]:
    """The flags of a stage as its script has them: names of stages and $names become the paths they stand for."""
    flags, flag_of = dict[str, list[str]](), MODEL_FLAG | {"data": DATA_FLAG.get(kind, "data")}
    for key, value in entry.items():
        words = list(map(expand_home, as_texts(value)))
        for i, word in enumerate(words):
            names = given if word.startswith("$") else files if key == "data" else models
            if word.startswith("$") or (key in flag_of and "/" not in word):
                words[i] = names[known(word, names, f"{where} {key}")]
        flags |= {flag_of.get(key, str(key)): words} if words else {}
    return flags


def identity(word: str) -> str:
    """What a word stands for: the SHA-256 of a file or folder, the cached revision of a hub model, or itself."""
    path, total = Path(re.sub(r"(?<=\.py):\w+$", "", word)), hashlib.sha256()  # FILE.py:FUNCTION
    if not word or not os.path.exists(path):
        is_hub_name = re.fullmatch(r"\w+([.-]\w+)*/\w+([.-]\w+)*", word, re.ASCII)
        return str((is_hub_name and try_to_load_from_cache(word, "config.json")) or word)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        parts = file.relative_to(path).parts
        if file.is_file() and not any(part in REPORTS or part.startswith((".", "checkpoint-")) for part in parts):
            total.update(f"{parts} {atomic.sha256(file)}\n".encode())
    return total.hexdigest()


def run(stages: list[Stage], launcher: str | None) -> int:
    """Run the stages that must be; the exit code."""
    told: list[int] = []  # signals that no stage has got so far
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: told.append(number))
    for stage in stages:
        record = atomic.read_json(stage.record) or {"made_from": {}, "found": None, "output": None}
        words = {flag: stage.flags[flag] for flag in stage.flags if not re.search("output|cache", flag)}
        now = {flag: list(map(identity, words[flag])) for flag in words} | {"stage": [stage.kind]}
        before = record["made_from"]
        changed = [flag for flag in now | before if before.get(flag) not in (now.get(flag), words.get(flag))]
        if not changed and stage.manifest.is_file() and record["output"] == identity(str(stage.output)):
            print(f"[{stage.name}] skipped: settings, inputs and output are unchanged", file=sys.stderr)
            continue
        found = atomic.sha256(stage.manifest) if stage.manifest.is_file() else None
        begun = stage.kind == "train" and found not in (None, record["found"])  # the manifest is of this run
        command = shlex.split(launcher) if launcher and stage.kind != "merge" else [sys.executable]
        command += [str(Path(__file__).with_name(f"{stage.kind}.py")), *as_words(stage.flags)]
        if begun and all(now.get(flag) == words.get(flag) for flag in changed):  # the inputs are the same
            command += ["--resume_from_checkpoint", "latest"]
        if stage.kind != "mine" and before and (changed or not begun):
            command += ["--overwrite_output_dir", "True"]
        why = "new" if not before else f"changed {', '.join(changed)}" if changed else "not finished or not whole"
        print(f"[{stage.name}] runs, {why}: {shlex.join(command)}", file=sys.stderr)
        left = {"made_from": now, "found": found if changed else record["found"], "output": None}
        atomic.write_json(stage.record, left)
        if code := run_process(command, told):
            return code
        atomic.write_json(stage.record, {"made_from": now, "found": None, "output": identity(str(stage.output))})
    print(f"model: {stages[0].output.with_name('model')}")
    return 0


def run_process(command: list[str], told: list[int]) -> int:
    """The exit code of a command, to which signals that come in are handed on; as a shell's, if one ends it."""
    child = subprocess.Popen(command, start_new_session=True)  # a Ctrl-C, too, reaches it from here alone
    while child.poll() is None:
        time.sleep(0.05)
        while told:
            child.send_signal(told.pop())
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def main(argv: list[str] | None = None) -> int:
    """Parse, run, return the exit code: that of the stage that did not end well, or 2."""
    cli = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    for flag in ("config", "train_data", "corpus", "output_dir", "val_data", "model_name_or_path", "seed", "launcher"):
        cli.add_argument(f"--{flag}", required=flag in ("config", "train_data", "corpus", "output_dir"))
    try:
        words = list(map(expand_home, sys.argv[1:] if argv is None else argv))
        return run(plan(args := cli.parse_args(words)), args.launcher)
    except (UserError, OSError, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
