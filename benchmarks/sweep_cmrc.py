"""Which merge weight on CMRC 2018: chosen on validation questions, reported on test ones, with a general set beside.

    python benchmarks/sweep_cmrc.py --data path/to/cmrc [--bf16] [--sweep 0:1.2:0.1]

Domain   questions -> the sentence that answers them. Trained on the training questions less 400, which choose the
         weight (ablation.py's split); reported on the 1,002 test questions.
General  another task, on paragraphs that no training question is about: a sentence -> the one that follows it. The
         sentences of the test paragraphs in their order, every second a query; halves choose and report. About one pair
         in ten crosses the border of two paragraphs, which costs every model the same.

The model is trained by the reference recipe of benchmarks/README.md with mine.py's defaults (seed 42). Writes
benchmarks/results/sweep_cmrc.json, .md and .png; all else lands in --output.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ablation import split_validation  # noqa: E402

from bge_core import records  # noqa: E402

NO_INSTRUCTION = ["--query_instruction_for_retrieval", "", "--passage_instruction_for_retrieval", ""]
LENGTHS = ["--query_max_len", "64", "--passage_max_len", "128"]


def write_general(data: Path, folder: Path) -> None:
    """general_choose.jsonl and general_report.jsonl."""
    texts = records.read_corpus(data / "corpus.jsonl")[1]
    place = {text: i for i, text in enumerate(texts)}
    rows = records.read_rows(data / "train.jsonl", records.check_training_row)
    start = 1 + max(place[text] for row in rows for text in row["pos"])  # the test questions' paragraphs come last
    pairs = [{"query": texts[i], "pos": [texts[i + 1]]} for i in range(start, len(texts) - 1, 2)]
    half = len(pairs) // 2
    records.write_jsonl(folder / "general_choose.jsonl", pairs[:half])
    records.write_jsonl(folder / "general_report.jsonl", pairs[half:])


def run(*words: object) -> None:
    """A stage, in a process of its own."""
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def main() -> None:
    """Train, sweep, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", default="outputs/encoder")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/sweep_cmrc")
    parser.add_argument("--sweep", default="0:1.2:0.1")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    data, out, half = args.data.resolve(), args.output.resolve(), ["--bf16"] if args.bf16 else []
    out.mkdir(parents=True, exist_ok=True)
    split_validation(data, out)
    write_general(data, out)
    corpus, model, merged, cache = data / "corpus.jsonl", out / "trained", out / "merged", out / "cache"
    if not (model / "manifest.json").exists():
        run("mine.py", "--model_name_or_path", args.encoder, "--input_file", out / "choose.jsonl", "--candidate_pool",
            corpus, "--output_file", out / "mined.jsonl", "--range_for_sampling", "2-200", "--negative_number", "15",
            "--cache_dir", cache, *NO_INSTRUCTION, *LENGTHS, *half)  # fmt: skip
        run("train.py", "--model_name_or_path", args.encoder, "--train_data", out / "mined.jsonl", "--output_dir",
            model, "--num_train_epochs", "1", "--per_device_train_batch_size", "32", "--train_group_size", "2",
            "--learning_rate", "2e-5", "--save_steps", "0", "--overwrite_output_dir", "True", *NO_INSTRUCTION, *LENGTHS,
            *half)  # fmt: skip
    run("merge.py", "--models", args.encoder, model, f"--sweep={args.sweep}", "--val_data", out / "validation.jsonl",
        "--corpus", corpus, "--general_data", out / "general_choose.jsonl", "--general_corpus", corpus,
        "--output_path", merged, "--overwrite_output_dir", "True", "--max_input_length", "128", *half)  # fmt: skip
    half_way = out / "half"
    run("merge.py", "--models", args.encoder, model, "--weights", "0.5", "0.5", "--output_path", half_way,
        "--overwrite_output_dir", "True")  # fmt: skip
    run("evaluate.py", "--encoder", args.encoder, model, half_way, merged, "--val_data", data / "test.jsonl",
        out / "general_report.jsonl", "--corpus", corpus, "--max_passage_length", "128", "--metrics", "MRR@10",
        "Recall@10", "nDCG@10", "--output_dir", out / "report", "--overwrite_output_dir", "True", "--cache_dir", cache,
        *half)  # fmt: skip
    results = ROOT / "benchmarks/results"
    found = records.read_json(merged / "sweep.json")
    found["report"] = {
        name: {"metrics": records.read_json(out / "report" / name / "metrics.json"),
               "significance": records.read_json(out / "report" / name / "significance.json")}
        for name in ("test", "general_report")
    }  # fmt: skip
    records.write_json(results / "sweep_cmrc.json", found)
    shutil.copy(merged / "sweep.png", results / "sweep_cmrc.png")
    print(json.dumps(found["report"], ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
