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
import json
import random
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import LENGTHS, NO_INSTRUCTION, Row, read_lines, write_lines

from bge_core.evaluation.significance import bootstrap_means
from bge_core.files.text import text_id

NUM_VALIDATION = 400
MAX_COST = 3  # times the reference's tokens in training
GUARDS = ("identical", "near_duplicates", "same_questions", "answers")
UNGUARDED = {f"guard_{name}": False for name in GUARDS}
MINE = {"range_for_sampling": "2-200", "negative_number": 15}
TRAIN = {"learning_rate": 2e-5, "num_train_epochs": 1, "per_device_train_batch_size": 32, "train_group_size": 2}
TRAIN |= {"temperature": 0.02, "lr_scheduler_type": "linear", "max_grad_norm": 1.0}
REFERENCE: Row = {"mine": MINE | UNGUARDED, "train": TRAIN, "pooling": "mean", "merge": None, "rounds": 1}


def variant(mine: Row | None = None, train: Row | None = None, **more: Any) -> Row:
    """The reference with guards, and some settings changed."""
    return REFERENCE | {"mine": MINE | (mine or {}), "train": TRAIN | (train or {})} | more


HARD = {"range_for_sampling": "0-30"}
FASTER = {"learning_rate": 5e-5}
MORE = {"learning_rate": 5e-5, "num_train_epochs": 2, "train_group_size": 3}
VARIANTS: dict[str, Row] = {
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
    "teacher": variant(HARD, FASTER, teacher={"teacher_temperature": 0.02}),
    "teacher, cosines as they are": variant(HARD, FASTER, teacher={"teacher_temperature": 1.0}),
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
    rows = read_lines(data / "train.jsonl")
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
    write_lines(folder / "validation.jsonl", (row for i, row in enumerate(rows) if i in taken))
    write_lines(folder / "choose.jsonl", (row for i, row in enumerate(rows) if i not in taken))


def run_variant(job: Row) -> Row:
    """Mine, train, merge and score one variant; the log goes to a file beside the model."""
    folder, settings = Path(job["folder"]), job["settings"]
    folder.mkdir(parents=True, exist_ok=True)
    common = {"sentence_pooling_method": settings["pooling"]} | LENGTHS | NO_INSTRUCTION | job["half"]
    spent = []

    def stage(name: str, **values: Any) -> float:
        return harness.stage(name, log=folder / "log.txt", **values).seconds

    def mined(model: str, name: str, **more: Any) -> str:
        files = {"model_name_or_path": model, "input_file": job["rows"], "candidate_pool": job["corpus"]}
        files |= {"output_file": str(folder / f"{name}.jsonl"), "embedding_cache_dir": job["cache"]}
        spent.append(stage("mine", **files, **settings["mine"], **common, **more))
        return files["output_file"]

    def trained(rows: str, name: str, **more: Any) -> str:
        files = {"model_name_or_path": job["encoder"], "train_data": rows, "output_dir": str(folder / name)}
        once = {"save_steps": 0, "dataloader_num_workers": 0, "overwrite_output_dir": True, "seed": job["seed"]}
        spent.append(stage("train", **files, **once, **settings["train"], **common, **more))
        return files["output_dir"]

    first = mined(job["encoder"], "mined")
    spent.clear()  # what every variant needs once is not counted
    model, trainings = trained(first, "trained"), 1
    if settings["rounds"] == 2 or settings.get("teacher"):
        teacher = {"teacher_encoder": model, **settings["teacher"]} if settings.get("teacher") else {}
        second = mined(model if settings["rounds"] == 2 else job["encoder"], "mined2", **teacher)
        model = trained(second, "trained2", **({"knowledge_distillation": True} if teacher else {}))
        trainings = 2
    if settings["merge"] is not None:
        weights = [round(1 - settings["merge"], 6), settings["merge"]]
        merged = {"models": [job["encoder"], model], "weights": weights, "output_path": folder / "merged"}
        spent.append(stage("merge", **merged, overwrite_output_dir=True))
        model = str(folder / "merged")
    lengths = {"max_query_length": harness.QUERY_LENGTH, "max_passage_length": harness.PASSAGE_LENGTH, "k": 100}
    scores = {"output_dir": folder / "scores", "overwrite_output_dir": True, "pooling_method": settings["pooling"]}
    files = {"encoder": model, "val_data": job["questions"], "corpus": job["corpus"]}
    stage("evaluate", **files, **lengths, **scores, **job["half"])
    per_query = [line["MRR@10"] for line in read_lines(folder / "scores/per_query.jsonl")]
    for weights_file in folder.rglob("*.safetensors"):  # a hundred models would fill the disk
        weights_file.unlink()
    tokens = trainings * count_tokens(settings["train"], folder)
    return job | {"mrr": float(np.mean(per_query)), "per_query": per_query, "seconds": sum(spent), "tokens": tokens}


def count_tokens(train: Row, folder: Path) -> int:
    """Tokens of a training, about: characters of what it read, one a token, cut at the limits."""
    rows = read_lines(folder / "mined.jsonl")
    total = 0
    for row in rows:
        texts = [row["pos"][0], *row["neg"][: train["train_group_size"] - 1]]
        total += min(len(row["query"]) + 2, 64) + sum(min(len(text) + 2, 128) for text in texts)
    return int(total * train["num_train_epochs"])


def jobs_of(args: argparse.Namespace, phase: str, best: str | None) -> list[Row]:
    """What is to be run in a phase."""
    folder, data = args.output.resolve(), args.data.resolve()
    files = {"rows": data / "train.jsonl", "questions": data / "test.jsonl"}
    if phase == "choose":
        files = {"rows": folder / "choose.jsonl", "questions": folder / "validation.jsonl"}
        chosen = [(name, 42) for name in VARIANTS if not args.only or name in args.only]
    else:
        chosen = [(name, seed) for seed in (42, 43, 44) for name in ("reference", str(best))]
        chosen += [("reference, CLS", 42), *((name, 42) for name in ABLATION if name != best)]
    files |= {"corpus": data / "corpus.jsonl", "encoder": Path(args.encoder).resolve(), "cache": folder / "cache"}
    shared = {name: str(path) for name, path in files.items()} | {"phase": phase}
    shared["half"] = {"bf16": True} if args.bf16 else {}
    jobs = []
    for name, seed in chosen:
        own = str(folder / phase / f"{name.replace(' ', '_').replace(',', '')}-{seed}")
        jobs.append(shared | {"name": name, "seed": seed, "settings": VARIANTS[name], "folder": own})
    return jobs


def choose_best(results: list[Row]) -> str:
    """The variant with the best MRR@10 on the validation questions among those of at most MAX_COST."""
    found = {result["name"]: result for result in results if result["phase"] == "choose"}
    limit = MAX_COST * found["reference"]["tokens"]
    return max((result["mrr"], name) for name, result in found.items() if result["tokens"] <= limit)[1]


def table(results: list[Row]) -> str:
    """Markdown: MRR@10, difference to the reference with its interval, time and tokens over the reference's."""
    by_name: defaultdict[str, list[Row]] = defaultdict(list)
    for result in results:
        by_name[result["name"]].append(result)
    base, rows = {result["seed"]: result for result in by_name["reference"]}, []
    for name in (name for name in VARIANTS if base and name in by_name):
        runs = by_name[name]
        scores = [run["mrr"] for run in runs]
        spread = f" ({min(scores):.4f}-{max(scores):.4f})" if len(scores) > 1 else ""
        pairs = [(run, base[run["seed"]]) for run in runs if run["seed"] in base]
        differences = np.mean([np.subtract(run["per_query"], other["per_query"]) for run, other in pairs], axis=0)
        difference, low, high = bootstrap_means(differences)
        gain = "" if name == "reference" else f"{difference:+.4f} [{low:+.4f}, {high:+.4f}]"
        costs = [np.mean([run[key] / other[key] for run, other in pairs]) for key in ("seconds", "tokens")]
        rows.append([name, len(runs), f"{np.mean(scores):.4f}{spread}", gain, *(f"{cost:.2f}" for cost in costs)])
    return harness.table(["variant", "seeds", "MRR@10", "difference to the reference (95 %)", "time", "tokens"], rows)


def main() -> None:
    parser = harness.parser(__doc__, "data", "encoder", "bf16", "results")
    parser.add_argument("--output", type=Path, default=Path("outputs/ablation"))
    parser.add_argument("--phase", choices=("choose", "final", "both"), required=True)
    parser.add_argument("--best", help="final: the variant that won; default: what `choose` says")
    parser.add_argument("--only", nargs="*", default=[], choices=VARIANTS, help="choose: these variants alone")
    parser.add_argument("--jobs", type=int, default=1, help="variants at a time")
    parser.add_argument("--seconds", type=float, default=1e9, help="choose: begin nothing new after this")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.output / "choose.jsonl").exists():
        split_validation(args.data, args.output)
    kept = args.output / "results.jsonl"
    done, begun = read_lines(kept) if kept.exists() else [], time.monotonic()

    def run_late(job: Row) -> Row:
        late = job["phase"] == "choose" and time.monotonic() - begun > args.seconds
        return job | {"skipped": "no time left"} if late else run_variant(job)

    for phase in ("choose", "final") if args.phase == "both" else (args.phase,):
        best = None if phase == "choose" else args.best or choose_best(done)
        names = {(result["phase"], result["name"], result["seed"]) for result in done}
        jobs = [job for job in jobs_of(args, phase, best) if (phase, job["name"], job["seed"]) not in names]
        with ThreadPoolExecutor(args.jobs) as pool, open(kept, "a", encoding="utf-8") as lines:
            for future in as_completed([pool.submit(run_late, job) for job in jobs]):
                if error := future.exception():  # the others go on
                    print(phase, error, file=sys.stderr, flush=True)
                    continue
                result = future.result()
                print(phase, result["name"], result["seed"], result.get("mrr"), file=sys.stderr, flush=True)
                if "mrr" in result:
                    done.append(result)
                    lines.write(json.dumps(result, ensure_ascii=False) + "\n")
                    lines.flush()
        found = [result for result in done if result["phase"] == phase]
        text = f"{table(found)}\n\n{phase}; {harness.note(harness.facts())}"
        harness.save(f"ablation_{phase}", None, text, args.results)


if __name__ == "__main__":
    main()
