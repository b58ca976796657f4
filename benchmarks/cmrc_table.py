"""The table of benchmarks/cmrc.sh: means and spread over seeds, and a paired bootstrap over the questions.

python benchmarks/cmrc_table.py outputs/cmrc/scores [--command "..."] -> benchmarks/results/cmrc.md and cmrc.json
"""

from pathlib import Path

import harness
import numpy as np
from harness import read_lines

from bge_core.evaluation.significance import bootstrap_means

METRICS = ("Recall@1", "MRR@10", "Recall@10", "Recall@100", "nDCG@10")
# What a plain implementation of the same recipe reached: Recall@1, MRR@10, Recall@10.
PLAIN = {
    "base-cls": (0.427, 0.526, 0.730),
    "trained-cls": (0.588, 0.669, 0.837),
    "merged-cls": (0.530, 0.618, 0.813),
    "base-mean": (0.562, 0.655, 0.850),
    "trained-mean": (0.616, 0.699, 0.881),
}
RESAMPLES = 10_000


def read_scores(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """{run: {metric: value of each question}} of every evaluation below `folder`."""
    files = {file.parent.name: read_lines(file) for file in sorted(folder.glob("*/per_query.jsonl"))}
    return {name: {m: np.array([row[m] for row in rows]) for m in METRICS} for name, rows in files.items()}


def main() -> None:
    parser = harness.parser(__doc__, "results")
    parser.add_argument("scores", type=Path)
    parser.add_argument("--command", default="bash benchmarks/cmrc.sh")
    args = parser.parse_args()
    runs = read_scores(args.scores)
    rows, gains, figures = [], [], dict[str, object]()
    for group in (f"{kind}-{pooling}" for pooling in ("cls", "mean") for kind in ("base", "trained", "merged")):
        members = [name for name in runs if name == group or name.startswith(f"{group}-")]
        if not members:
            continue
        values = {metric: [float(runs[name][metric].mean()) for name in members] for metric in METRICS}
        cells = [f"{np.mean(v):.3f}" + (f" ({min(v):.3f}-{max(v):.3f})" if len(v) > 1 else "") for v in values.values()]
        plain = ", ".join(f"{value:.3f}" for value in PLAIN.get(group, ())) or "-"
        rows.append([group, len(members), *cells, plain])
        figures[group] = {metric: {"seeds": v, "mean": float(np.mean(v))} for metric, v in values.items()}
    for pooling in ("cls", "mean"):
        trained = [runs[name]["MRR@10"] for name in runs if name.startswith(f"trained-{pooling}-")]
        if trained:
            differences = np.mean(trained, axis=0) - runs[f"base-{pooling}"]["MRR@10"]
            gain, low, high = map(float, bootstrap_means(differences, RESAMPLES))
            gains.append(
                f"trained - base, {pooling}, MRR@10: {gain:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}] (paired "
                f"bootstrap over {len(differences)} questions, {RESAMPLES} resamples, mean of {len(trained)} seeds)"
            )
            figures[f"gain-{pooling}"] = {"MRR@10": gain, "interval": [low, high]}
    heads = ["model", "seeds", *METRICS, "plain implementation (R@1, MRR@10, R@10)"]
    facts = harness.facts() | {"command": args.command}
    text = "\n\n".join([harness.table(heads, rows), *gains, harness.note(facts)])
    harness.save("cmrc", facts | figures, text, args.results)


if __name__ == "__main__":
    main()
