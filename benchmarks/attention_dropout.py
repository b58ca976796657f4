"""What dropout of the attention weights is worth on CMRC 2018: the recipe of cmrc.sh with 0.1 and with 0, three seeds.

    python benchmarks/attention_dropout.py --data path/to/cmrc [--output outputs/attention_dropout] [--threads 1]

Mean pooling, batch 32, group size 2, one epoch, learning rate 2e-5, bf16; scored on the test questions. The difference
is 0 less 0.1, of each question over the seeds, with a paired bootstrap over questions (10,000 resamples, seed 0). What
is finished is not run again. Writes benchmarks/results/attention_dropout.md and .json.
"""

from pathlib import Path

import harness
import numpy as np
from harness import LENGTHS, NO_INSTRUCTION, Row

from bge_core.evaluation.significance import bootstrap_means

SEEDS, DROPOUTS, METRICS = (42, 43, 44), (0.1, 0.0), ("MRR@10", "Recall@10", "nDCG@10")
TRAIN = {"learning_rate": 2e-5, "num_train_epochs": 1, "per_device_train_batch_size": 32, "train_group_size": 2}
TRAIN |= {"temperature": 0.02, "lr_scheduler_type": "linear", "max_grad_norm": 1.0, "save_steps": 50}
TRAIN |= {"save_total_limit": 1, "resume_from_checkpoint": "latest"}


def main() -> None:
    options = harness.parser(__doc__, "data", "encoder", "threads", "results")
    options.add_argument("--output", type=Path, default=Path("outputs/attention_dropout"))
    args = options.parse_args()
    corpus, mined, found = args.data / "corpus.jsonl", args.output / "mined.jsonl", {}
    args.output.mkdir(parents=True, exist_ok=True)
    if not Path(f"{mined}.manifest.json").exists():
        mine = {"input_file": args.data / "train.jsonl", "candidate_pool": corpus, "output_file": mined}
        mine |= {"range_for_sampling": "2-200", "negative_number": 15, "bf16": True} | LENGTHS | NO_INSTRUCTION
        harness.stage("mine", args.threads, model_name_or_path=args.encoder, **mine)
    for seed in SEEDS:
        for dropout in DROPOUTS:
            trained, scores = (args.output / kind / f"{seed}-{dropout}" for kind in ("trained", "scores"))
            if not (scores / "manifest.json").exists():
                run = TRAIN | LENGTHS | NO_INSTRUCTION | {"seed": seed, "attention_dropout": dropout, "bf16": True}
                files = {"model_name_or_path": args.encoder, "train_data": mined, "output_dir": trained}
                harness.stage("train", args.threads, **files, **run)
                files = {"encoder": trained, "val_data": args.data / "test.jsonl", "corpus": corpus}
                files |= {"output_dir": scores, "overwrite_output_dir": True, "k": 100, "bf16": True}
                harness.stage("evaluate", args.threads, **files, max_query_length=64, max_passage_length=128)
            lines = harness.read_lines(scores / "per_query.jsonl")
            found[seed, dropout] = np.array([[line[metric] for metric in METRICS] for line in lines])
    report(found, args.results)


def report(found: dict[tuple[int, float], np.ndarray], folder: Path) -> None:
    """The table, for each metric: its mean with each dropout (smallest and largest seed), and the difference."""
    rows, figures = [], []
    without, with_ = (np.stack([found[seed, dropout] for seed in SEEDS]) for dropout in (0.0, 0.1))
    for m, metric in enumerate(METRICS):
        mean, low, high = map(float, bootstrap_means((without - with_)[:, :, m].mean(axis=0)))
        of_seeds = {"0.1": with_[:, :, m].mean(axis=1).tolist(), "0": without[:, :, m].mean(axis=1).tolist()}
        figures.append({"metric": metric, "of_seeds": of_seeds, "difference": [mean, low, high]})
        cells = [f"{np.mean(means):.4f} ({min(means):.4f}-{max(means):.4f})" for means in of_seeds.values()]
        rows.append([metric, *cells, f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"])
    known: Row = harness.facts(seeds=list(SEEDS))
    text = harness.table(["metric", "dropout 0.1", "dropout 0", "0 less 0.1 (95 %)"], rows)
    harness.save("attention_dropout", known | {"figures": figures}, f"{text}\n\n{harness.note(known)}", folder)


if __name__ == "__main__":
    main()
