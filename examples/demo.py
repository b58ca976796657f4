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
    seed = ["--seed", str(args.seed)]
    data, trained, merged = OUTPUT / "data", OUTPUT / "trained", OUTPUT / "merged"

    stages = {
        "prepare": [
            "prepare.py", "--input_dir", "examples/faq_zh", "--output_dir", data, "--split_by", "question",
            "--train_num", "1100", *seed,
        ],
        "mine": [
            "mine.py", "--model_name_or_path", base, "--input_file", data / "train.jsonl",
            "--output_file", data / "train_minedHN.jsonl", "--candidate_pool", data / "corpus.jsonl",
            "--range_for_sampling", "1-30", "--negative_number", "15", *seed,
        ],
        "train": [
            "train.py", "--model_name_or_path", base, "--train_data", data / "train_minedHN.jsonl",
            "--output_dir", trained, "--num_train_epochs", "1", "--per_device_train_batch_size", "32",
            "--train_group_size", "2", "--learning_rate", "1e-4", "--warmup_ratio", "0.1", "--query_max_len", "64",
            "--passage_max_len", "128", "--logging_steps", "5", "--save_steps", "0", *seed,
        ],
        "merge": ["merge.py", "--models", base, trained, "--weights", "0.5", "0.5", "--output_path", merged],
        "evaluate": [
            "evaluate.py", "--encoder", base, trained, merged, "--val_data", data / "test.jsonl",
            "--corpus", data / "corpus.jsonl", "--add_instruction", "--k", "100", "--output_dir", OUTPUT / "evaluation",
        ],
    }  # fmt: skip
    seconds = {}
    for stage, words in stages.items():
        command = [str(word) for word in words]
        print(f"\n[{stage}] python {shlex.join(command)}", flush=True)
        began = time.perf_counter()
        code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
        seconds[stage] = time.perf_counter() - began
        if code:
            print(f"error: the stage {stage} ended with exit code {code}; its message is above", file=sys.stderr)
            return code

    found = json.loads((ROOT / OUTPUT / "evaluation/metrics.json").read_text(encoding="utf-8"))
    scores = dict(zip(("before", "after", "merged"), found.values(), strict=True))
    rows = [[name, *(f"{values[metric]:.3f}" for metric in METRICS)] for name, values in scores.items()]
    gain = [f"{scores['after'][metric] - scores['before'][metric]:+.3f}" for metric in METRICS]
    num_questions = len((ROOT / data / "test.jsonl").read_text(encoding="utf-8").splitlines())
    print(f"\n{num_questions} held-out questions, seed {args.seed}\n")
    print(text_table(["", *METRICS], [*rows, ["after - before", *gain]]))
    print("\n" + text_table(["stage", "seconds"], [[name, f"{value:.0f}"] for name, value in seconds.items()]))
    print(f"""
data        {data}/train.jsonl test.jsonl corpus.jsonl train_minedHN.jsonl
trained     {trained}   (curves.png, metrics.jsonl, README.md)
merged      {merged}
evaluation  {OUTPUT}/evaluation   (report.html, metrics.json, per_query.jsonl)

next: make ask     type a question, see the five best answers before and after""")
    return 0


if __name__ == "__main__":
    sys.exit(main())
