"""The whole job on examples/faq_zh: prepare -> mine -> train -> merge -> evaluate, each stage by its own command.

    python examples/demo.py [--seed 42] [--model BAAI/bge-small-zh-v1.5]

Every command is printed as you would type it. The encoder keeps its own pooling and prompts, so what improves is
learned, not repaired. Everything lands in outputs/demo.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from get_encoder import get_encoder

from bge_core import UserError
from bge_core.reports.tables import text_table

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = Path("outputs/demo")
DATA, TRAINED, MERGED = OUTPUT / "data", OUTPUT / "trained", OUTPUT / "merged"
ENCODER = Path("outputs/encoder")
METRICS = ("MRR@1", "MRR@10", "Recall@1", "Recall@10", "nDCG@10")


def main() -> int:
    """Run the demo from the project's folder; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--model", help="hub name or folder; default: a small encoder built from a PyPI wheel")
    args = parser.parse_args()
    try:
        base = args.model or str(get_encoder(ROOT / ENCODER).relative_to(ROOT))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shutil.rmtree(ROOT / OUTPUT, ignore_errors=True)
    seconds = {}
    for stage, words in commands(base, args.seed).items():
        command = [str(word) for word in words]
        print(f"\n[{stage}] python {shlex.join(command)}", flush=True)
        began = time.perf_counter()
        code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
        seconds[stage] = f"{time.perf_counter() - began:.0f}"
        if code:
            print(f"error: the stage {stage} ended with exit code {code}; its message is above", file=sys.stderr)
            return code
    show_scores(args.seed)
    print("\n" + text_table(["stage", "seconds"], [list(row) for row in seconds.items()]))
    print(f"""
data        {DATA}/train.jsonl test.jsonl corpus.jsonl train_minedHN.jsonl
trained     {TRAINED}   (curves.png, metrics.jsonl, README.md)
merged      {MERGED}
evaluation  {OUTPUT}/evaluation   (report.html, metrics.json, per_query.jsonl)

next: make ask     type a question, see the five best answers before and after""")
    return 0


def commands(base: str, seed: int) -> dict[str, list[object]]:
    """The words of each stage's command."""
    stages: dict[str, list[object]] = {
        "prepare": [
            "prepare.py", "--input_dir", "examples/faq_zh", "--output_dir", DATA, "--split_by", "question",
            "--train_num", 1100, "--seed", seed,
        ],
        "mine": [
            "mine.py", "--model_name_or_path", base, "--input_file", DATA / "train.jsonl",
            "--output_file", DATA / "train_minedHN.jsonl", "--candidate_pool", DATA / "corpus.jsonl",
            "--range_for_sampling", "1-30", "--negative_number", 15, "--seed", seed,
        ],
        "train": [
            "train.py", "--model_name_or_path", base, "--train_data", DATA / "train_minedHN.jsonl",
            "--output_dir", TRAINED, "--num_train_epochs", 1, "--per_device_train_batch_size", 32,
            "--train_group_size", 2, "--learning_rate", "1e-4", "--warmup_ratio", 0.1, "--query_max_len", 64,
            "--passage_max_len", 128, "--logging_steps", 5, "--save_steps", 0, "--seed", seed,
        ],
        "merge": ["merge.py", "--models", base, TRAINED, "--weights", 0.5, 0.5, "--output_path", MERGED],
        "evaluate": [
            "evaluate.py", "--encoder", base, TRAINED, MERGED, "--val_data", DATA / "test.jsonl",
            "--corpus", DATA / "corpus.jsonl", "--add_instruction", "--k", 100, "--output_dir", OUTPUT / "evaluation",
        ],
    }  # fmt: skip
    return stages


def show_scores(seed: int) -> None:
    """Print the three models' metrics on the held-out questions, and what training gained."""
    found = json.loads((ROOT / OUTPUT / "evaluation/metrics.json").read_text(encoding="utf-8"))
    before, after, merged = found.values()
    rows = {"before": before, "after": after, "merged": merged}
    gain = [f"{after[metric] - before[metric]:+.3f}" for metric in METRICS]
    num_questions = len((ROOT / DATA / "test.jsonl").read_text(encoding="utf-8").splitlines())
    print(f"\n{num_questions} held-out questions, seed {seed}\n")
    shown = [[name, *(f"{values[metric]:.3f}" for metric in METRICS)] for name, values in rows.items()]
    print(text_table(["", *METRICS], [*shown, ["after - before", *gain]]))


if __name__ == "__main__":
    sys.exit(main())
