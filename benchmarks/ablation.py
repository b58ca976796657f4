"""What each choice in mining and training is worth on CMRC 2018: one change at a time, then together.

    python benchmarks/ablation.py --data path/to/cmrc --phase both [--bf16] [--jobs 3]

choose  trains every variant on the training questions less 400, which are cut off by connected group (questions that
        share a positive stay together, seed 0) and on which it is scored. The test questions are not read. The best
        variant that reads at most 3 times the reference's tokens in training goes on.
final   the reference and that variant on all training questions with seeds 42, 43 and 44, and some in between with seed
        42, scored once on the test questions. Paired bootstrap over questions, 10,000 resamples.

The reference is benchmarks/README.md's recipe with FlagEmbedding's mining: no guards, group size 2, batch 32, learning
rate 2e-5, one epoch. `time` is the time of training over the reference's, mining again and merging included; `tokens`
is the same ratio of tokens that go through the model in training, about one a character. Results are kept in
<output>/results.jsonl, and what is there is not run again; the tables go to benchmarks/results/.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import random
import sys
import time
import traceback
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
from cmrc_table import bootstrap_interval  # noqa: E402

from bge_core.files import atomic, records  # noqa: E402
from bge_core.files.text import text_id  # noqa: E402

NUM_VALIDATION = 400
MAX_COST = 3  # times the reference's tokens in training
UNGUARDED = {
    "guard_identical": False, "guard_near_duplicates": False, "guard_same_questions": False, "guard_answers": False,
}  # fmt: skip
MINE = {"range_for_sampling": "2-200", "negative_number": 15}
TRAIN = {
    "learning_rate": 2e-5, "num_train_epochs": 1, "per_device_train_batch_size": 32, "train_group_size": 2,
    "temperature": 0.02, "lr_scheduler_type": "linear", "max_grad_norm": 1.0,
}  # fmt: skip
REFERENCE: dict[str, Any] = {"mine": MINE | UNGUARDED, "train": TRAIN, "pooling": "mean", "merge": None, "rounds": 1}


def variant(mine: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """The reference with guards, and some settings changed."""
    return REFERENCE | {"mine": MINE | (mine or {}), "train": TRAIN | (train or {})} | more


HARD = {"range_for_sampling": "0-30"}
FASTER = {"learning_rate": 5e-5}
MORE = {"learning_rate": 5e-5, "num_train_epochs": 2, "train_group_size": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    # one change at a time
    "reference": REFERENCE,
    "reference, CLS": REFERENCE | {"pooling": "cls"},
    "guards": variant(),
    "guards, CLS": variant(pooling="cls"),
    "relative margin 0.05": variant({"relative_margin": 0.05}),
    "relative margin 0": variant({"relative_margin": 0.0}),
    "range 2-50": variant({"range_for_sampling": "2-50"}),
    "range 0-30": variant(HARD),
    # from here on with the range 0-30
    "5e-5": variant(HARD, FASTER),
    "1e-4": variant(HARD, {"learning_rate": 1e-4}),
    "group 3, 2 epochs, 5e-5": variant(HARD, MORE),
    "group 3, 2 epochs, 2e-5": variant(HARD, MORE | {"learning_rate": 2e-5}),
    "group 3, 2 epochs, 1e-4": variant(HARD, MORE | {"learning_rate": 1e-4}),
    "group 2, 3 epochs, 5e-5": variant(HARD, MORE | {"num_train_epochs": 3, "train_group_size": 2}),
    "group 5, 1 epoch, 5e-5": variant(HARD, MORE | {"num_train_epochs": 1, "train_group_size": 5}),
    # from here on with 5e-5, one epoch, group 2
    "merged 0.7": variant(HARD, FASTER, merge=0.7),
    "teacher": variant(HARD, FASTER, teacher=True),
    "no guards": variant(HARD | UNGUARDED, FASTER),
    "range 0-10": variant({"range_for_sampling": "0-10", "negative_number": 8}, FASTER),
    "hybrid": variant(HARD | {"retriever": "hybrid"}, FASTER),
    "batch 64": variant(HARD, FASTER | {"per_device_train_batch_size": 64}),
    "temperature 0.03": variant(HARD, FASTER | {"temperature": 0.03}),
    "temperature 0.01": variant(HARD, FASTER | {"temperature": 0.01}),
    "relative margin 0.05, hard": variant(HARD | {"relative_margin": 0.05}, FASTER),
    "sampling by score": variant({"range_for_sampling": "0-100", "sampling": "score"}, FASTER),
    # with group 3, 5e-5
    "two rounds, 1 epoch each": variant(HARD, MORE | {"num_train_epochs": 1}, rounds=2),
}
ABLATION = ("guards", "range 0-30", "5e-5", "merged 0.7", "no guards", "two rounds, 1 epoch each", "hybrid")


def split_validation(data: Path, folder: Path) -> None:
    """train.jsonl -> choose.jsonl and validation.jsonl: whole groups of questions that share a positive, seeded."""
    rows = records.read_rows(data / "train.jsonl", records.check_training_row)
    group = list(range(len(rows)))

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    first: dict[int, int] = {}
    for i, row in enumerate(rows):
        for text in (*row["pos"], row["query"]):
            group[root(i)] = root(first.setdefault(text_id(text), i))
    members: defaultdict[int, list[int]] = defaultdict(list)
    for i in range(len(rows)):
        members[root(i)].append(i)
    groups = list(members.values())
    random.Random(0).shuffle(groups)
    taken: set[int] = set()
    for some in groups:
        if len(taken) + len(some) <= NUM_VALIDATION:
            taken.update(some)
    atomic.write_jsonl(folder / "validation.jsonl", (row for i, row in enumerate(rows) if i in taken))
    atomic.write_jsonl(folder / "choose.jsonl", (row for i, row in enumerate(rows) if i not in taken))


def words(flags: dict[str, Any]) -> list[str]:
    """Flags as a command line has them."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def run_variant(job: dict[str, Any]) -> dict[str, Any]:
    """Mine, train, merge and score one variant in this process; the log goes to a file beside the model."""
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger().handlers.clear()  # those of the variant before write to its log
    with (
        open(folder / "log.txt", "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            return job | _run(job, folder)
        except BaseException as error:
            traceback.print_exc(file=log)
            return job | {"error": f"{type(error).__name__}: {error}"}


def _run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    import evaluate
    import merge
    import mine
    import train

    settings, half = job["settings"], ["--bf16"] if job["bf16"] else []
    lengths = {"query_max_len": 64, "passage_max_len": 128}
    none = ["--query_instruction_for_retrieval", "", "--passage_instruction_for_retrieval", ""]
    pooling = ["--sentence_pooling_method", settings["pooling"]]

    def check(code: int) -> None:
        if code:
            raise RuntimeError(f"exit code {code}, see {folder / 'log.txt'}")

    def mined(model: str, name: str, **more: Any) -> str:
        output = folder / f"{name}.jsonl"
        check(mine.main([
            "--model_name_or_path", model, "--input_file", job["rows"], "--candidate_pool", job["corpus"],
            "--output_file", str(output), "--cache_dir", job["cache"], *words(settings["mine"] | lengths | more),
            *none, *pooling, *half,
        ]))  # fmt: skip
        return str(output)

    def trained(rows: str, name: str, *more: str) -> str:
        output = str(folder / name)
        check(train.main([
            "--model_name_or_path", job["encoder"], "--train_data", rows, "--output_dir", output,
            "--save_steps", "0", "--dataloader_num_workers", "0", "--seed", str(job["seed"]),
            "--overwrite_output_dir", "True", *words(settings["train"] | lengths), *none, *pooling, *half, *more,
        ]))  # fmt: skip
        return output

    first = mined(job["encoder"], "mined")
    begun = time.perf_counter()
    model = trained(first, "trained")
    if settings["rounds"] == 2 or settings.get("teacher"):
        more = {"teacher_encoder": model} if settings.get("teacher") else {}
        second = mined(model if settings["rounds"] == 2 else job["encoder"], "mined2", **more)
        model = trained(second, "trained2", *(["--knowledge_distillation", "True"] if more else []))
    if settings["merge"] is not None:
        share = settings["merge"]
        check(merge.main([
            "--models", job["encoder"], model, "--weights", str(round(1 - share, 6)), str(share),
            "--output_path", str(folder / "merged"), "--overwrite_output_dir", "True",
        ]))  # fmt: skip
        model = str(folder / "merged")
    seconds = time.perf_counter() - begun
    tokens = count_tokens(settings["train"], folder) * sum((folder / name).exists() for name in ("trained", "trained2"))
    check(evaluate.main([
        "--encoder", model, "--val_data", job["questions"], "--corpus", job["corpus"], "--k", "100",
        "--max_query_length", "64", "--max_passage_length", "128", "--output_dir", str(folder / "scores"),
        "--overwrite_output_dir", "True", "--pooling_method", settings["pooling"], *half,
    ]))  # fmt: skip
    with open(folder / "scores" / "per_query.jsonl", encoding="utf-8") as lines_of:
        per_query = [json.loads(line)["MRR@10"] for line in lines_of]
    for weights in folder.rglob("*.safetensors"):  # a hundred models would fill the disk
        weights.unlink()
    return {"mrr": float(np.mean(per_query)), "per_query": per_query, "seconds": seconds, "tokens": tokens}


def count_tokens(train: dict[str, Any], folder: Path) -> int:
    """Tokens of a training, about: characters of what it read, one a token, cut at the limits."""
    rows = records.read_rows(folder / "mined.jsonl", records.check_training_row)
    total = 0
    for row in rows:
        texts = [row["pos"][0], *row["neg"][: train["train_group_size"] - 1]]
        total += min(len(row["query"]) + 2, 64) + sum(min(len(text) + 2, 128) for text in texts)
    return int(total * train["num_train_epochs"])


def jobs_of(args: argparse.Namespace, phase: str, best: str | None) -> list[dict[str, Any]]:
    """What is to be run in a phase."""
    folder = args.output
    shared = {"encoder": args.encoder, "corpus": str(args.data / "corpus.jsonl"), "bf16": args.bf16,
              "cache": str(folder / "cache")}  # fmt: skip
    if phase == "choose":
        shared |= {"rows": str(folder / "choose.jsonl"), "questions": str(folder / "validation.jsonl")}
        chosen = [(name, 42) for name in VARIANTS if not args.only or name in args.only]
    else:
        shared |= {"rows": str(args.data / "train.jsonl"), "questions": str(args.data / "test.jsonl")}
        chosen = [(name, seed) for seed in (42, 43, 44) for name in ("reference", str(best))]
        chosen += [("reference, CLS", 42), *((name, 42) for name in ABLATION if name != best)]
    return [
        shared | {"name": name, "seed": seed, "phase": phase, "settings": VARIANTS[name],
                  "folder": str(folder / phase / f"{name.replace(' ', '_').replace(',', '')}-{seed}")}
        for name, seed in chosen
    ]  # fmt: skip


def choose_best(results: list[dict[str, Any]]) -> str:
    """The variant with the best MRR@10 on the validation questions among those of at most MAX_COST."""
    found = {result["name"]: result for result in results if result["phase"] == "choose"}
    limit = MAX_COST * found["reference"]["tokens"]
    return max((result["mrr"], name) for name, result in found.items() if result["tokens"] <= limit)[1]


def table(results: list[dict[str, Any]]) -> list[str]:
    """Markdown: MRR@10, difference to the reference with its interval, time and tokens over the reference's."""
    lines = [
        "| variant | seeds | MRR@10 | difference to the reference (95 %) | time | tokens |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    by_name: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        by_name[result["name"]].append(result)
    base = {result["seed"]: result for result in by_name["reference"]}
    for name in (name for name in VARIANTS if base and name in by_name):
        runs = by_name[name]
        scores = [run["mrr"] for run in runs]
        paired = [run for run in runs if run["seed"] in base]
        ours = np.mean([run["per_query"] for run in paired], axis=0)
        theirs = np.mean([base[run["seed"]]["per_query"] for run in paired], axis=0)
        difference, low, high = bootstrap_interval(ours - theirs)
        spread = f" ({min(scores):.4f}-{max(scores):.4f})" if len(scores) > 1 else ""
        times = [run["seconds"] / base[run["seed"]]["seconds"] for run in paired]
        tokens = [run["tokens"] / base[run["seed"]]["tokens"] for run in paired]
        gain = "" if name == "reference" else f"{difference:+.4f} [{low:+.4f}, {high:+.4f}]"
        lines.append(
            f"| {name} | {len(runs)} | {np.mean(scores):.4f}{spread} | {gain} | {np.mean(times):.2f} "
            f"| {np.mean(tokens):.2f} |"
        )
    return lines


def main() -> None:
    """Run a phase and write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", default="outputs/encoder")
    parser.add_argument("--output", type=Path, default=Path("outputs/ablation"))
    parser.add_argument("--phase", choices=("choose", "final", "both"), required=True)
    parser.add_argument("--best", help="final: the variant that won; default: what `choose` says")
    parser.add_argument("--only", nargs="*", default=[], help="choose: these variants alone")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=1e9, help="choose: begin nothing new after this")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.output / "choose.jsonl").exists():
        split_validation(args.data, args.output)
    kept = args.output / "results.jsonl"
    done = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()] if kept.exists() else []
    context = multiprocessing.get_context("spawn")
    begun = time.monotonic()
    with ProcessPoolExecutor(args.jobs, context) as pool, open(kept, "a", encoding="utf-8") as lines:
        for phase in ("choose", "final") if args.phase == "both" else (args.phase,):
            best = None if phase == "choose" else args.best or choose_best(done)
            names = {(result["phase"], result["name"], result["seed"]) for result in done}
            jobs = [job for job in jobs_of(args, phase, best) if (job["phase"], job["name"], job["seed"]) not in names]
            running: list[Any] = []
            while jobs or running:
                spent = time.monotonic() - begun
                while jobs and len(running) < args.jobs and (phase == "final" or spent < args.seconds):
                    running.append(pool.submit(run_variant, jobs.pop(0)))
                if not running:
                    break
                time.sleep(0.2)
                for future in [one for one in running if one.done()]:
                    running.remove(future)
                    result = future.result()
                    shown = result.get("mrr", result.get("error"))
                    print(phase, result["name"], result["seed"], shown, file=sys.stderr, flush=True)
                    if "error" not in result:
                        done.append(result)
                        lines.write(json.dumps(result, ensure_ascii=False) + "\n")
                        lines.flush()
            write_table(phase, done, args.bf16)


def write_table(phase: str, results: list[dict[str, Any]], bf16: bool) -> None:
    """The phase's table, printed and kept."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    made = f"{phase}; {device}, torch {torch.__version__}, {'bf16' if bf16 else 'float32'}, {date.today()}"
    text = "\n".join([*table([result for result in results if result["phase"] == phase]), "", made])
    (ROOT / f"benchmarks/results/ablation_{phase}.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
