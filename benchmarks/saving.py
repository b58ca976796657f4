"""What saving adds to the mean time of the steps between two saves: the share of a run with checkpoints that is theirs.

    python benchmarks/saving.py --data outputs/demo/data/train_minedHN.jsonl --encoder outputs/encoder --threads 1

One run of train.py, a checkpoint every --steps steps, --saves times, every step logged. A save stops the loop for the
copy, and then takes processor time from the steps during which it writes. A period is the --steps steps after a save;
those of its second half, when all is written, say what a token costs
without saving. What the first half takes beyond that is what the save added:

    added = sum over the first half (seconds - tokens * cost) / (all tokens * cost)

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


def added_share(seconds: list[float], tokens: list[float]) -> float:
    """What the steps of a period's first half took beyond the cost of its second half, as a share of the period."""
    half = len(seconds) // 2
    cost = statistics.median(s / t for s, t in zip(seconds[half:], tokens[half:], strict=True))
    extra = sum(s - t * cost for s, t in zip(seconds[:half], tokens[:half], strict=True))
    return extra / (cost * sum(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="training data")
    parser.add_argument("--encoder", default="outputs/encoder")
    parser.add_argument("--steps", type=int, default=50)
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
        checkpoint_mb = sum(f.stat().st_size for f in Path(f"{folder}/run/checkpoint-{args.steps}").rglob("*")) / 2**20
    seconds = [args.batch_size / line["queries_per_second"] for line in lines]
    tokens = [line["tokens_per_second"] * s for line, s in zip(lines, seconds, strict=True)]
    periods = [
        slice(max(1, first), first + args.steps) for first in range(0, len(lines), args.steps)
    ]  # step 1 warms up
    shares = [added_share(seconds[period], tokens[period]) for period in periods]
    result = {
        "added": [round(share, 4) for share in shares[1:]], "median": round(statistics.median(shares[1:]), 4),
        "without a save": round(shares[0], 4), "checkpoint_mb": round(checkpoint_mb, 1),
        "seconds_per_step": round(statistics.median(seconds), 2), "steps": args.steps, "seed": 42,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}", "threads": args.threads,
        "date": str(date.today()), "command": " ".join(["python", "benchmarks/saving.py", *sys.argv[1:]]),
    }  # fmt: skip
    (ROOT / "benchmarks/results/saving.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
