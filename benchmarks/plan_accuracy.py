"""What --plan predicts against what the run then measures: memory and time of five settings.

    python benchmarks/plan_accuracy.py --data path/to/cmrc --encoder outputs/encoder [--output benchmarks/results]

Each setting is planned in a fresh process and then trained in another, on CMRC 2018's questions (or any folder with
train.jsonl and corpus.jsonl) with three random sentences of the corpus as negatives of each. Memory is the last
`memory_mb` of metrics.jsonl, time the sum over its steps. Writes plan.json and plan.md. It needs a quiet machine.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import harness
from harness import LENGTHS, Row, read_lines, stage

SETTINGS: dict[str, dict[str, int]] = {
    "batch 8, group 2": {"per_device_train_batch_size": 8, "train_group_size": 2},
    "batch 16, group 4": {"per_device_train_batch_size": 16, "train_group_size": 4},
    "batch 32, group 2": {"per_device_train_batch_size": 32, "train_group_size": 2},
    "batch 16, group 2, GradCache 8": {"per_device_train_batch_size": 16, "train_group_size": 2, "sub_batch_size": 8},
    "batch 32, group 4, GradCache 16": {"per_device_train_batch_size": 32, "train_group_size": 4, "sub_batch_size": 16},
}


def compare(name: str, common: Row, threads: int, folder: Path) -> Row:
    """Plan one setting, then train it."""
    given = common | SETTINGS[name] | {"output_dir": folder / name.replace(",", "").replace(" ", "-")}
    plan = json.loads(stage("train", threads, **given, plan=True).stdout)
    stage("train", threads, **given)
    logged = read_lines(given["output_dir"] / "metrics.jsonl")
    assert len(logged) == common["max_steps"] == plan["steps"]
    seconds = sum(given["per_device_train_batch_size"] / line["queries_per_second"] for line in logged)
    measured = {"memory_mb": logged[-1]["memory_mb"], "seconds": seconds}
    predicted = {key: plan[key] for key in measured}
    ratios = {key: predicted[key] / measured[key] for key in measured}
    found = {"setting": name, "predicted": predicted, "measured": measured}
    return found | {"predicted_over_measured": ratios, "plan": plan}


def table(runs: list[Row]) -> str:
    """A line for each setting."""
    rows = []
    for run in runs:
        rows.append([run["setting"]])
        for key, digits in (("memory_mb", 0), ("seconds", 1)):
            rows[-1] += [f"{run[kind][key]:,.{digits}f}" for kind in ("predicted", "measured")]
            rows[-1].append(f"{run['predicted_over_measured'][key]:.3f}")
    heads = ["setting", "memory predicted, MB", "measured", "ratio", "time predicted, s", "measured", "ratio"]
    return harness.table(heads, rows)


def main() -> None:
    parser = harness.parser(__doc__, "data", "encoder", "threads", "seed")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", choices=SETTINGS, action="append", help="these settings alone; may be repeated")
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    args = parser.parse_args()
    runs: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = harness.write_training_rows(args.data, folder / "train.jsonl", 3, args.seed)
        common = {"model_name_or_path": os.path.abspath(args.encoder), "train_data": rows, "learning_rate": 2e-5}
        common |= {"logging_steps": 1, "save_steps": 0, "max_steps": args.steps, "seed": args.seed} | LENGTHS
        for name in args.only or SETTINGS:
            runs.append(compare(name, common, args.threads, folder))
            print(table(runs).splitlines()[-1], file=sys.stderr, flush=True)
    keys = ("memory_mb", "seconds")
    worst = {key: max(abs(run["predicted_over_measured"][key] - 1) for run in runs) for key in keys}
    facts = harness.facts(steps=args.steps, threads=args.threads, seed=args.seed)
    largest = f"Largest difference: memory {worst['memory_mb']:.1%}, time {worst['seconds']:.1%}."
    text = f"{table(runs)}\n\n{largest} {harness.note(facts)}"
    harness.save("plan", facts | {"worst": worst, "runs": runs}, text, args.output)


if __name__ == "__main__":
    main()
