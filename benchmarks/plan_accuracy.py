"""What --plan predicts against what the run then measures: memory and time of five settings.

    python benchmarks/plan_accuracy.py --data path/to/cmrc --encoder outputs/encoder [--output benchmarks/results]

Each setting is planned in a fresh process and then trained in another, on CMRC 2018's questions (or any folder with
train.jsonl and corpus.jsonl) with three random sentences of the corpus as negatives of each. Memory is the last
`memory_mb` of metrics.jsonl, time the sum over its steps. Writes plan.json and plan.md. It needs a quiet machine.

This process imports no torch: a child's peak memory begins at that of the process it was started from.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SETTINGS: dict[str, dict[str, int]] = {
    "batch 8, group 2": {"per_device_train_batch_size": 8, "train_group_size": 2},
    "batch 16, group 4": {"per_device_train_batch_size": 16, "train_group_size": 4},
    "batch 32, group 2": {"per_device_train_batch_size": 32, "train_group_size": 2},
    "batch 16, group 2, GradCache 8": {
        "per_device_train_batch_size": 16, "train_group_size": 2, "sub_batch_size": 8,
    },
    "batch 32, group 4, GradCache 16": {
        "per_device_train_batch_size": 32, "train_group_size": 4, "sub_batch_size": 16,
    },
}  # fmt: skip


def write_training_rows(source: Path, target: Path, seed: int) -> None:
    """The rows of source/train.jsonl, each with three random texts of source/corpus.jsonl as negatives."""
    rng = random.Random(seed)
    with open(source / "corpus.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    with open(source / "train.jsonl", encoding="utf-8") as lines, open(target, "w", encoding="utf-8") as rows:
        for line in lines:
            rows.write(json.dumps(json.loads(line) | {"neg": rng.sample(texts, 3)}, ensure_ascii=False) + "\n")


def train(words: list[str], threads: int) -> str:
    """Run train.py in a process of its own; its stdout."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "train.py", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"train.py {' '.join(words)}\nended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def compare(name: str, common: list[str], steps: int, threads: int, folder: Path) -> dict[str, Any]:
    """Plan one setting, then train it."""
    values = SETTINGS[name]
    words = [*common, "--max_steps", str(steps), *(word for k, v in values.items() for word in (f"--{k}", str(v)))]
    words += ["--output_dir", str(folder / name.replace(",", "").replace(" ", "-"))]
    planned = json.loads(train([*words, "--plan"], threads))
    train(words, threads)
    with open(Path(words[-1]) / "metrics.jsonl", encoding="utf-8") as lines:
        logged = [json.loads(line) for line in lines]
    assert len(logged) == steps == planned["steps"]
    measured = {
        "memory_mb": logged[-1]["memory_mb"],
        "seconds": sum(values["per_device_train_batch_size"] / line["queries_per_second"] for line in logged),
    }
    predicted = {key: planned[key] for key in measured}
    ratios = {key: predicted[key] / measured[key] for key in measured}
    return {
        "setting": name, "predicted": predicted, "measured": measured, "predicted_over_measured": ratios,
        "plan": planned,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and corpus.jsonl")
    parser.add_argument("--encoder", default="outputs/encoder")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--only", choices=SETTINGS, action="append", help="these settings alone; may be repeated")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    rows, names = [], args.only or list(SETTINGS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_training_rows(args.data, folder / "train.jsonl", args.seed)
        common = [
            "--model_name_or_path", str(Path(args.encoder).resolve()), "--train_data", str(folder / "train.jsonl"),
            "--query_max_len", "64", "--passage_max_len", "128", "--learning_rate", "2e-5", "--logging_steps", "1",
            "--save_steps", "0", "--seed", str(args.seed),
        ]  # fmt: skip
        for name in names:
            rows.append(compare(name, common, args.steps, args.threads, folder))
            print(table(rows).splitlines()[-1], file=sys.stderr, flush=True)
    worst = {key: max(abs(row["predicted_over_measured"][key] - 1) for row in rows) for key in ("memory_mb", "seconds")}
    cpu_info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpus = [line.split(":")[1].strip() for line in cpu_info.splitlines() if line.startswith("model name")]
    machine = f"{os.cpu_count()} x {cpus[0] if cpus else platform.machine()}"
    note = (
        f"Largest difference: memory {worst['memory_mb']:.1%}, time {worst['seconds']:.1%}. {args.steps} steps each, "
        f"{args.threads} threads, seed {args.seed}; {machine}; torch {version('torch')}; {date.today()}"
    )
    record = {
        "steps": args.steps, "threads": args.threads, "seed": args.seed, "machine": machine, "torch": version("torch"),
        "date": str(date.today()), "worst": worst, "runs": rows,
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "plan.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (args.output / "plan.md").write_text(f"{table(rows)}\n\n{note}\n", encoding="utf-8")
    print(f"{table(rows)}\n\n{note}")


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, a line for each setting."""
    lines = [
        "| setting | memory predicted, MB | measured | ratio | time predicted, s | measured | ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [row["setting"]]
        for key, digits in (("memory_mb", 0), ("seconds", 1)):
            predicted, measured = row["predicted"][key], row["measured"][key]
            cells += [f"{predicted:,.{digits}f}", f"{measured:,.{digits}f}", f"{predicted / measured:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
