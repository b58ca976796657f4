"""The table of benchmarks/cmrc.sh: means and spread over seeds, and a paired bootstrap over the questions.

python benchmarks/cmrc_table.py outputs/cmrc/scores [--command "..."] -> benchmarks/results/cmrc.md and cmrc.json
"""

import argparse
import json
import os
import platform
from datetime import date
from pathlib import Path

import numpy as np
import torch

METRICS = ("Recall@1", "MRR@10", "Recall@10", "Recall@100", "nDCG@10")
# What a plain implementation of the same recipe reached; the issue asks for at most .01 less.
PLAIN = {"base-cls": (0.427, 0.526, 0.730), "trained-cls": (0.588, 0.669, 0.837), "merged-cls": (0.530, 0.618, 0.813),
         "base-mean": (0.562, 0.655, 0.850), "trained-mean": (0.616, 0.699, 0.881)}  # fmt: skip
RESULTS = Path(__file__).resolve().parent / "results"
RESAMPLES = 10_000


def read_scores(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """{run: {metric: value of each question}} of every evaluation below `folder`."""
    runs = {}
    for file in sorted(folder.glob("*/per_query.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        runs[file.parent.name] = {metric: np.array([row[metric] for row in rows]) for metric in METRICS}
    return runs


def bootstrap_interval(differences: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean of paired differences with its 95 % percentile interval over resampled questions (Efron 1979)."""
    rng = np.random.default_rng(seed)
    means = np.array(
        [differences[rng.integers(len(differences), size=len(differences))].mean() for _ in range(RESAMPLES)]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scores", type=Path)
    parser.add_argument("--command", default="bash benchmarks/cmrc.sh")
    args = parser.parse_args()
    runs = read_scores(args.scores)
    lines = ["| model | seeds | " + " | ".join(METRICS) + " | plain implementation (R@1, MRR@10, R@10) |",
             "| --- | ---: |" + " ---: |" * len(METRICS) + " --- |"]  # fmt: skip
    figures: dict[str, object] = {}
    groups = [f"{kind}-{pooling}" for pooling in ("cls", "mean") for kind in ("base", "trained", "merged")]
    for group in groups:
        members = [name for name in runs if name == group or name.startswith(f"{group}-")]
        if not members:
            continue
        values = {metric: [runs[name][metric].mean() for name in members] for metric in METRICS}
        cells = [f"{np.mean(v):.3f}" + (f" ({min(v):.3f}-{max(v):.3f})" if len(v) > 1 else "") for v in values.values()]
        plain = ", ".join(f"{value:.3f}" for value in PLAIN.get(group, ())) or "-"
        lines.append(f"| {group} | {len(members)} | " + " | ".join(cells) + f" | {plain} |")
        figures[group] = {metric: {"seeds": v, "mean": float(np.mean(v))} for metric, v in values.items()}
    for pooling in ("cls", "mean"):
        trained = [runs[name]["MRR@10"] for name in runs if name.startswith(f"trained-{pooling}-")]
        if trained:
            gain, low, high = bootstrap_interval(np.mean(trained, axis=0) - runs[f"base-{pooling}"]["MRR@10"])
            lines += ["", f"trained - base, {pooling}, MRR@10: {gain:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}] "
                      f"(paired bootstrap over {len(trained[0])} questions, {RESAMPLES} resamples, "
                      f"mean of {len(trained)} seeds)"]  # fmt: skip
            figures[f"gain-{pooling}"] = {"MRR@10": gain, "interval": [low, high]}
    cpu_info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in cpu_info.splitlines() if line.startswith("model name")]
    cpu = names[0] if names else platform.machine()
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} x {cpu}"
    lines += ["", f"`{args.command}`; {machine}; torch {torch.__version__}; {date.today()}"]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cmrc.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    record = {
        "command": args.command,
        "machine": machine,
        "torch": torch.__version__,
        "date": str(date.today()),
        **figures,
    }
    (RESULTS / "cmrc.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
