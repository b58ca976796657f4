"""Which merge weight: chosen on validation questions, reported on others, with a general set beside it.

    python benchmarks/sweep.py --data path/to/cmrc [--bf16] [--sweep 0:1.2:0.1]
    make demo && python benchmarks/sweep.py --demo

CMRC 2018  domain: questions -> the sentence that answers them. Trained by the reference recipe of benchmarks/README.md,
           but with mine.py's defaults and the encoder's own prompts (seed 42), on the training questions less 400,
           which choose the weight (ablation.py's split); reported on the 1,002 test questions.
           general: another task, on paragraphs that no training question is about: a sentence -> the one that follows
           it. The sentences of the test paragraphs in their order are the corpus, every second a query; every second of
           those chooses, the others report.
           About one pair in ten crosses the border of two paragraphs, which costs every model the same.
demo       the model of `make demo`; of its test questions every second chooses, the others report. General: examples/
           general_zh, likewise.

Writes benchmarks/results/sweep_cmrc.json and .png, or sweep_demo.*; all else lands in --output.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ablation import split_validation  # noqa: E402

from bge_core.files import atomic, records, sources  # noqa: E402

LENGTHS = ["--query_max_len", "64", "--passage_max_len", "128"]
Row = dict[str, Any]


def write_halves(rows: list[Row], folder: Path, name: str) -> None:
    """<name>_choose.jsonl and <name>_report.jsonl: every second row each."""
    atomic.write_jsonl(folder / f"{name}_choose.jsonl", rows[::2])
    atomic.write_jsonl(folder / f"{name}_report.jsonl", rows[1::2])


def prepare_cmrc(data: Path, encoder: str, out: Path, half: list[str]) -> tuple[Path, Path, Path | None]:
    """The trained model, the corpus, the general corpus."""
    split_validation(data, out)
    shutil.copy(out / "validation.jsonl", out / "domain_choose.jsonl")
    shutil.copy(data / "test.jsonl", out / "domain_report.jsonl")
    texts = sources.read_corpus(data / "corpus.jsonl")
    place = {text: i for i, text in enumerate(texts)}
    rows = records.read_rows(data / "train.jsonl", records.check_training_row)
    start = 1 + max(place[text] for row in rows for text in row["pos"])  # the test questions' paragraphs come last
    pairs = [{"query": texts[i], "pos": [texts[i + 1]]} for i in range(start, len(texts) - 1, 2)]
    write_halves(pairs, out, "general")
    general_corpus = out / "general_corpus.jsonl"
    atomic.write_jsonl(general_corpus, ({"text": text} for text in texts[start:]))
    model, corpus = out / "trained", data / "corpus.jsonl"
    if not (model / "manifest.json").exists():
        run("mine.py", "--model_name_or_path", encoder, "--input_file", out / "choose.jsonl", "--candidate_pool",
            corpus, "--output_file", out / "mined.jsonl", "--range_for_sampling", "2-200", "--negative_number", "15",
            "--cache_dir", out / "cache",  *LENGTHS, *half)  # fmt: skip
        run("train.py", "--model_name_or_path", encoder, "--train_data", out / "mined.jsonl", "--output_dir", model,
            "--num_train_epochs", "1", "--per_device_train_batch_size", "32", "--train_group_size", "2",
            "--learning_rate", "2e-5", "--save_steps", "0", "--overwrite_output_dir", "True", 
            *LENGTHS, *half)  # fmt: skip
    return model, corpus, general_corpus


def prepare_demo(out: Path) -> tuple[Path, Path, Path | None]:
    """Likewise; the general corpus is the passages of its file."""
    demo = ROOT / "outputs/demo"
    if not (demo / "trained/manifest.json").exists():
        raise SystemExit("run `make demo` first")
    write_halves(records.read_rows(demo / "data/test.jsonl", records.check_evaluation_row), out, "domain")
    general = records.read_rows(ROOT / "examples/general_zh/general.jsonl", records.check_evaluation_row)
    write_halves(general, out, "general")
    corpus = out / "general_corpus.jsonl"  # all passages, so that halves do not make it easy
    atomic.write_jsonl(corpus, ({"text": text} for row in general for text in row["pos"]))
    return demo / "trained", demo / "data/corpus.jsonl", corpus


def run(*words: object) -> None:
    """A stage, in a process of its own."""
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def main() -> None:
    """Train, sweep, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CMRC 2018")
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--encoder", default="outputs/encoder")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--sweep", default="0:1.2:0.1")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    if args.demo == bool(args.data):
        parser.error("give --data or --demo")
    name = "demo" if args.demo else "cmrc"
    out, half = (args.output or ROOT / f"outputs/sweep_{name}").resolve(), ["--bf16"] if args.bf16 else []
    out.mkdir(parents=True, exist_ok=True)
    model, corpus, general_corpus = (
        prepare_demo(out) if args.demo else prepare_cmrc(args.data.resolve(), args.encoder, out, half)
    )
    run("merge.py", "--models", args.encoder, model, f"--sweep={args.sweep}", "--val_data", out / "domain_choose.jsonl",
        "--corpus", corpus, "--general_data", out / "general_choose.jsonl", "--general_corpus", general_corpus,
        "--output_path", out / "merged", "--overwrite_output_dir", "True", "--max_input_length", "128",
        *half)  # fmt: skip
    run("merge.py", "--models", args.encoder, model, "--weights", "0.5", "0.5", "--output_path", out / "half",
        "--overwrite_output_dir", "True")  # fmt: skip
    run("evaluate.py", "--encoder", args.encoder, model, out / "half", out / "merged", "--val_data",
        out / "domain_report.jsonl", out / "general_report.jsonl", "--corpus", corpus, general_corpus,
        "--add_instruction", "--max_passage_length", "128", "--metrics", "MRR@10", "Recall@10", "nDCG@10",
        "--output_dir", out / "report", "--overwrite_output_dir", "True", "--cache_dir", out / "cache",
        *half)  # fmt: skip
    found = atomic.read_json(out / "merged/sweep.json")
    found["report"] = {
        part: {
            "metrics": atomic.read_json(out / f"report/{part}_report/metrics.json"),
            "significance": atomic.read_json(out / f"report/{part}_report/significance.json"),
        }
        for part in ("domain", "general")
    }
    results = ROOT / "benchmarks/results"
    atomic.write_json(results / f"sweep_{name}.json", found)
    shutil.copy(out / "merged/sweep.png", results / f"sweep_{name}.png")
    print(json.dumps(found["report"], ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
