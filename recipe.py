"""Several stages in a row, as a YAML file names them; a stage for which nothing has changed is not run again.

    python recipe.py --config configs/recipes/two_rounds.yaml --train_data T --corpus C --val_data V --output_dir OUT

`{name: round1, stage: train, model: base, data: mined, learning_rate: 2e-5}` is train.py with that flag; its output is
OUT/round1 (of mine: OUT/NAME.jsonl), and OUT/round1.recipe.json says what it was made from. `model`, `data`, `models`,
`base_model` and `encoder` name stages before, `base`, or, with a slash, a path or hub model. With --val_data, base and
OUT/model are scored. --launcher "accelerate launch --num_processes 2" starts mine, train and evaluate, not this Python.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from bge_core import UserError
from bge_core.files import atomic
from bge_core.runtime.cli import as_words

Stage = tuple[str, str, dict[str, list[str]], Path]  # name, kind, the words behind each flag, output
OUTPUT_FLAG = {"mine": "output_file", "train": "output_dir", "merge": "output_path", "evaluate": "output_dir"}
DATA_FLAG = {"mine": "input_file", "train": "train_data"}
MODEL_FLAG = {"model": "model_name_or_path", "models": "models", "base_model": "base_model", "encoder": "encoder"}
REPORTS = {"manifest.json", "metrics.jsonl", "curves.png", "README.md"}  # they tell times and paths: no content


def known(name: Any, names: Any, where: str) -> str:
    """The name; UserError, with the nearest one, if it is not among the names."""
    if name not in names:
        nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0) or ["$train_data"]
        remedy = "give --val_data" if name == "$val_data" else f"did you mean {nearest[0]!r}?"
        raise UserError(f"{where} {name!r} is unknown here; {remedy}")
    return str(name)


def plan(args: argparse.Namespace) -> list[Stage]:
    """All stages, every name resolved, before any of them runs. UserError: what is wrong with the recipe."""
    given = {f"${name}": getattr(args, name) for name in ("train_data", "corpus", "val_data") if getattr(args, name)}
    if missing := [f"--{name[1:]} {path}" for name, path in given.items() if not os.path.exists(path)]:
        raise UserError(f"{', '.join(missing)}: no such file")
    recipe = yaml.safe_load(Path(args.config).read_bytes())
    parts = [*(recipe.get("stages") or [None]), recipe.get("evaluation") or {}] if isinstance(recipe, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"--config {args.config}: is no recipe; write `stages:` and below it a list of mappings")
    for key in recipe:
        known(key, ("model_name_or_path", "stages", "evaluation"), f"{args.config}: the key")
    files, stages = dict[str, str](), list[Stage]()
    models = {"base": str(args.model_name_or_path or recipe.get("model_name_or_path") or "")}
    if not models["base"]:
        raise UserError(f"{args.config}: lacks model_name_or_path; add it, or give --model_name_or_path")
    scored = {"name": "evaluation", "stage": "evaluate", "val_data": "$val_data", "corpus": "$corpus"}
    scored |= {"encoder": ["base", "model"]} | (recipe.get("evaluation") or {})
    for entry in recipe["stages"] + [scored] * bool(args.val_data):
        where = f"{args.config}: stage {(name := str(entry.pop('name', '')))!r}:"
        if not re.fullmatch(r"[\w-]+", name) or name in models | files:
            raise UserError(f"{where} give each stage a `name` of its own, of letters, digits, _ and -")
        kind = known(entry.pop("stage", None), OUTPUT_FLAG, f"{where} stage")
        entry = {"data": "$train_data"} | entry if kind in DATA_FLAG else entry
        entry |= {"seed": args.seed} if args.seed and kind != "evaluate" else {}
        flags, flag_of = dict[str, list[str]](), MODEL_FLAG | {"data": DATA_FLAG.get(kind, "data")}
        for key, value in entry.items():
            values = [one for one in (value if isinstance(value, list) else [value]) if one is not None]
            words = [json.dumps(one) if isinstance(one, dict) else str(one) for one in values]
            for i, word in enumerate(words):
                names = given if word.startswith("$") else files if key == "data" else models
                if word.startswith("$") or (key in flag_of and "/" not in word):
                    words[i] = names[known(word, names, f"{where} {key}")]
            flags |= {flag_of.get(key, str(key)): words} if words else {}
        output = Path(args.output_dir, name + ".jsonl" * (kind == "mine"))
        stages.append((name, kind, flags | {OUTPUT_FLAG[kind]: [str(output)]}, output))
        (files if kind == "mine" else models)[name] = str(output)
    if [name for name, kind, *_ in stages if kind in ("train", "merge")][-1:] != ["model"]:
        raise UserError(f"{args.config}: the last train or merge makes the model of the recipe: name it `model`")
    return stages


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
    """Run the stages that must be, hand on the signals; the exit code."""
    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: told.append(number))
    for name, kind, flags, output in stages:
        manifest = Path(f"{output}.manifest.json") if kind == "mine" else output / "manifest.json"
        file = output.with_name(f"{name}.recipe.json")
        record = atomic.read_json(file) or {"made_from": {}, "found": None, "output": None}
        words = {flag: flags[flag] for flag in flags if not re.search("output|cache", flag)}
        now = {flag: list(map(identity, words[flag])) for flag in words} | {"stage": [kind]}
        before = record["made_from"]
        changed = [flag for flag in now | before if before.get(flag) not in (now.get(flag), words.get(flag))]
        if not changed and manifest.is_file() and record["output"] == identity(str(output)):
            print(f"[{name}] skipped: settings, inputs and output are unchanged", file=sys.stderr)
            continue
        why = "new" if not before else f"changed {', '.join(changed)}" if changed else "not finished or not whole"
        found = atomic.sha256(manifest) if manifest.is_file() else None
        begun = kind == "train" and found not in (None, record["found"])  # the manifest is of this run
        command = shlex.split(launcher) if launcher and kind != "merge" else [sys.executable]
        command += [str(Path(__file__).with_name(f"{kind}.py")), *as_words(flags)]
        if begun and all(now.get(flag) == words.get(flag) for flag in changed):  # the inputs are the same
            command += ["--resume_from_checkpoint", "latest"]
        if kind != "mine" and before and (changed or not begun):
            command += ["--overwrite_output_dir", "True"]
        print(f"[{name}] runs, {why}: {shlex.join(command)}", file=sys.stderr)
        atomic.write_json(file, {"made_from": now, "found": found if changed else record["found"], "output": None})
        child = subprocess.Popen(command, start_new_session=True)  # a Ctrl-C, too, reaches it from here alone
        while child.poll() is None:
            time.sleep(0.05)
            while told:
                child.send_signal(told.pop())
        if code := child.returncode:
            return code if code > 0 else 128 - code
        atomic.write_json(file, {"made_from": now, "found": None, "output": identity(str(output))})
    print(f"model: {stages[0][3].with_name('model')}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse, run, return the exit code: that of the stage that did not end well, or 2."""
    cli = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    for flag in ("config", "train_data", "corpus", "output_dir", "val_data", "model_name_or_path", "seed", "launcher"):
        cli.add_argument(f"--{flag}", required=flag in ("config", "train_data", "corpus", "output_dir"))
    try:
        return run(plan(args := cli.parse_args(argv)), args.launcher)
    except (UserError, OSError, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
