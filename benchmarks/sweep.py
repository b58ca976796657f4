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
import shutil
from pathlib import Path

import harness
from ablation import split_validation
from harness import LENGTHS, ROOT, Row, read_lines, read_texts, stage, write_lines

PARTS = ("domain", "general")


def write_halves(rows: list[Row], folder: Path, name: str) -> None:
    """<name>_choose.jsonl and <name>_report.jsonl: every second row each."""
    write_lines(folder / f"{name}_choose.jsonl", rows[::2])
    write_lines(folder / f"{name}_report.jsonl", rows[1::2])


def prepare_cmrc(data: Path, encoder: Path, out: Path, half: Row) -> tuple[Path, Path, Path]:
    """The trained model, the corpus, the general corpus."""
    split_validation(data, out)
    shutil.copy(out / "validation.jsonl", out / "domain_choose.jsonl")
    shutil.copy(data / "test.jsonl", out / "domain_report.jsonl")
    texts = read_texts(data)
    place = {text: i for i, text in enumerate(texts)}
    positives = [text for row in read_lines(data / "train.jsonl") for text in row["pos"]]
    start = 1 + max(place[text] for text in positives)  # the test questions' paragraphs come last
    pairs = [{"query": texts[i], "pos": [texts[i + 1]]} for i in range(start, len(texts) - 1, 2)]
    write_halves(pairs, out, "general")
    write_lines(out / "general_corpus.jsonl", ({"text": text} for text in texts[start:]))
    model, corpus = out / "trained", data / "corpus.jsonl"
    if not (model / "manifest.json").exists():
        files = {"input_file": out / "choose.jsonl", "candidate_pool": corpus, "output_file": out / "mined.jsonl"}
        settings = {"range_for_sampling": "2-200", "negative_number": 15, "embedding_cache_dir": out / "cache"}
        stage("mine", model_name_or_path=encoder, **files, **settings, **LENGTHS, **half)
        files = {"model_name_or_path": encoder, "train_data": out / "mined.jsonl", "output_dir": model}
        settings = {"num_train_epochs": 1, "per_device_train_batch_size": 32, "train_group_size": 2}
        once = {"learning_rate": 2e-5, "save_steps": 0, "overwrite_output_dir": True}
        stage("train", **files, **settings, **once, **LENGTHS, **half)
    return model, corpus, out / "general_corpus.jsonl"


def prepare_demo(out: Path) -> tuple[Path, Path, Path]:
    """Likewise; the general corpus is all passages of its file, so that halves do not make it easy."""
    demo = ROOT / "outputs/demo"
    if not (demo / "trained/manifest.json").exists():
        raise SystemExit("run `make demo` first")
    write_halves(read_lines(demo / "data/test.jsonl"), out, "domain")
    general = read_lines(ROOT / "examples/general_zh/general.jsonl")
    write_halves(general, out, "general")
    write_lines(out / "general_corpus.jsonl", ({"text": text} for row in general for text in row["pos"]))
    return demo / "trained", demo / "data/corpus.jsonl", out / "general_corpus.jsonl"


def main() -> None:
    parser: argparse.ArgumentParser = harness.parser(__doc__, "encoder", "bf16", "results")
    parser.add_argument("--data", type=Path, help="CMRC 2018")
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--sweep", default="0:1.2:0.1")
    args = parser.parse_args()
    if args.demo == bool(args.data):
        parser.error("give --data or --demo")
    name, half = "demo" if args.demo else "cmrc", {"bf16": True} if args.bf16 else {}
    out, encoder = (args.output or ROOT / f"outputs/sweep_{name}").resolve(), Path(args.encoder).resolve()
    out.mkdir(parents=True, exist_ok=True)
    model, corpus, general = prepare_demo(out) if args.demo else prepare_cmrc(args.data.resolve(), encoder, out, half)
    mixed = {"models": [encoder, model], "overwrite_output_dir": True}
    choose = {"val_data": out / "domain_choose.jsonl", "corpus": corpus, "max_input_length": harness.PASSAGE_LENGTH}
    choose |= {"general_data": out / "general_choose.jsonl", "general_corpus": general, "sweep": args.sweep}
    stage("merge", **mixed, **choose, output_path=out / "merged", **half)
    stage("merge", **mixed, weights=[0.5, 0.5], output_path=out / "half")
    tasks = {"val_data": [out / f"{part}_report.jsonl" for part in PARTS], "corpus": [corpus, general]}
    settings = {"max_passage_length": harness.PASSAGE_LENGTH, "metrics": ["MRR@10", "Recall@10", "nDCG@10"]}
    settings |= {"output_dir": out / "report", "overwrite_output_dir": True, "embedding_cache_dir": out / "cache"}
    models = [encoder, model, out / "half", out / "merged"]
    stage("evaluate", encoder=models, **tasks, **settings, add_instruction=True, **half)

    def report(part: str) -> Row:
        folder = out / f"report/{part}_report"
        return {file: json.loads((folder / f"{file}.json").read_text()) for file in ("metrics", "significance")}

    found = json.loads((out / "merged/sweep.json").read_text(encoding="utf-8"))
    found["report"] = {part: report(part) for part in PARTS}
    harness.save(f"sweep_{name}", found, folder=args.results)
    shutil.copy(out / "merged/sweep.png", args.results / f"sweep_{name}.png")
    print(json.dumps(found["report"], ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
