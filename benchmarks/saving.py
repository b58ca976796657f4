"""What saving adds to the mean time of the 50 steps between two saves.

    python benchmarks/saving.py --data outputs/demo/data/train_minedHN.jsonl --encoder outputs/encoder --threads 1

One run of train.py, a checkpoint every --steps steps, --saves times, every step logged. A save stops the loop for the
copy, and then takes processor time from the steps during which it writes: from the first --window steps after it. The
later steps of the period say what a token costs without saving. So

    added seconds = sum over the window (seconds - tokens * cost)        share = added seconds / (50 * median step)

The same for the run's first period, which follows no save, says how far noise goes.
Writes benchmarks/results/saving.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def added_seconds(seconds: list[float], tokens: list[float], window: int) -> float:
    """What the first steps of a period took beyond the cost of a token in the others."""
    cost = statistics.median(s / t for s, t in zip(seconds[window:], tokens[window:], strict=True))
    return sum(s - t * cost for s, t in zip(seconds[:window], tokens[:window], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="training data")
    parser.add_argument("--encoder", default="outputs/encoder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="of the training; a core less than there are writes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "train.py", "--model_name_or_path", args.encoder, "--train_data", args.data, "--output_dir",
            f"{folder}/run", "--max_steps", str(args.steps * (args.saves + 1)), "--save_steps", str(args.steps),
            "--logging_steps", "1", "--per_device_train_batch_size", str(args.batch_size), "--train_group_size", "2",
            "--query_max_len", "32", "--passage_max_len", "64", "--bf16", "--save_total_limit", "2",
        ]  # fmt: skip
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)})
        lines = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]
        newest = Path(f"{folder}/run/checkpoint-{args.steps * (args.saves + 1)}")
        checkpoint_mb = sum(file.stat().st_size for file in newest.rglob("*")) / 2**20
    seconds = [args.batch_size / line["queries_per_second"] for line in lines]
    tokens = [line["tokens_per_second"] * s for line, s in zip(lines, seconds, strict=True)]
    starts = range(0, len(lines), args.steps)
    periods = [slice(max(1, start), start + args.steps) for start in starts]  # the run's first step warms up
    added = [added_seconds(seconds[period], tokens[period], args.window) for period in periods]
    step = statistics.median(seconds)
    result = {
        "added_seconds": [round(x, 3) for x in added[1:]], "without_a_save": round(added[0], 3),
        "share_of_50_steps": [round(x / (50 * step), 5) for x in added[1:]], "checkpoint_mb": round(checkpoint_mb, 1),
        "seconds_per_step": round(step, 3), "steps": args.steps, "seed": 42,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}", "threads": args.threads,
        "date": str(date.today()), "command": " ".join(["python", "benchmarks/saving.py", *sys.argv[1:]]),
    }  # fmt: skip
    (ROOT / "benchmarks/results/saving.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
