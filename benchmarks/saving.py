"""What saving adds to the mean time of the 50 steps between two saves.

    python benchmarks/saving.py --data outputs/demo/data/train_minedHN.jsonl --encoder outputs/encoder --threads 1

One run of train.py, a checkpoint every --steps steps, --saves times, every step logged. A save stops the loop for the
copy, and then takes processor time from the steps during which it writes: from the first --window steps after it. The
later steps of the period say what a token costs without saving. So

    added seconds = sum over the window (seconds - tokens * cost)        share = added seconds / (50 * median step)

The same for the run's first period, which follows no save, says how far noise goes.
Writes benchmarks/results/saving.json.
"""

import json
import os
import statistics
import tempfile
from pathlib import Path

import harness
from harness import read_lines

BATCH_SIZE = 32


def added_seconds(seconds: list[float], tokens: list[float], window: int) -> float:
    """What the first steps of a period took beyond the cost of a token in the others."""
    cost = statistics.median(s / t for s, t in zip(seconds[window:], tokens[window:], strict=True))
    return sum(s - t * cost for s, t in zip(seconds[:window], tokens[:window], strict=True))


def main() -> None:
    parser = harness.parser(__doc__, "encoder", "threads", "results")
    parser.add_argument("--data", type=os.path.abspath, required=True, help="training data")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--saves", type=int, default=3)
    args = parser.parse_args()
    num_steps = args.steps * (args.saves + 1)
    with tempfile.TemporaryDirectory() as folder:
        files = {"model_name_or_path": os.path.abspath(args.encoder), "train_data": args.data, "output_dir": folder}
        sizes = {"per_device_train_batch_size": BATCH_SIZE, "train_group_size": 2, "bf16": True}
        steps = {"max_steps": num_steps, "save_steps": args.steps, "save_total_limit": 2, "logging_steps": 1}
        harness.stage("train", args.threads, **files, **sizes, **steps, query_max_len=32, passage_max_len=64)
        lines = read_lines(f"{folder}/metrics.jsonl")
        newest = Path(folder) / f"checkpoint-{num_steps}"
        checkpoint_mb = sum(file.stat().st_size for file in newest.rglob("*")) / 2**20
    seconds = [BATCH_SIZE / line["queries_per_second"] for line in lines]
    tokens = [line["tokens_per_second"] * s for line, s in zip(lines, seconds, strict=True)]
    periods = [slice(max(1, start), start + args.steps) for start in range(0, num_steps, args.steps)]
    added = [added_seconds(seconds[period], tokens[period], args.window) for period in periods]  # step 0 warms up
    step = statistics.median(seconds)
    found = {"added_seconds": [round(x, 3) for x in added[1:]], "without_a_save": round(added[0], 3)}
    found |= {"share_of_50_steps": [round(x / (50 * step), 5) for x in added[1:]], "seconds_per_step": round(step, 3)}
    found |= {"checkpoint_mb": round(checkpoint_mb, 1), "steps": args.steps}
    harness.save("saving", found | harness.facts(threads=args.threads, seed=42), folder=args.results)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
