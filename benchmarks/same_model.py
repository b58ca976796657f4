"""Train the same model with 1, 2 and 4 processes: the losses of 200 steps and the final embeddings must agree.

    python benchmarks/same_model.py --cmrc ../shared/data/cmrc/qa --encoder outputs/encoder

The global batch is the same (per-device batch = global batch / processes), negatives are of all processes, dropout is
0, float32. What then differs is the order in which floating-point numbers are added, and Adam carries that difference
on. It must stay below the bounds beneath; else the exit code is 1.

    outputs/same_model/                      the runs, one folder each; --reuse takes those that have finished
    benchmarks/results/same_model.json       the golden file: losses of one process, differences, bounds, settings
    benchmarks/results/same_model.png        the losses on each other, their differences below

If a golden file of the same settings exists, its losses are compared, too, under the same bound.
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import NO_INSTRUCTION, ROOT, Row, read_lines

from bge_core.encoder import load_encoder

PROCESSES = (1, 2, 4)
# Largest difference to one process that passes: |loss - loss_1| / (mean loss_1) of any step, for the loss of a batch
# that is solved comes near 0; and |x - x_1| of any number of a unit vector after the last step.
LOSS_BOUND = 1e-3
EMBEDDING_BOUND = 1e-4
NUM_TEXTS = 200  # held-out questions and their answers, half each
SETTINGS: dict[str, Any] = {
    "sentence_pooling_method": "cls",
    "train_group_size": 1,
    "query_max_len": 32,
    "passage_max_len": 64,
    "learning_rate": 2e-5,
    "temperature": 0.02,
    "max_grad_norm": 1.0,
    **NO_INSTRUCTION,
}


def without_dropout(encoder: Path, folder: Path) -> None:
    """A copy of a model folder whose two dropouts are 0."""
    shutil.copytree(encoder, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def read_json(file: Path) -> Row:
    """A JSON file's object; empty where there is no file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def sha256(file: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def train(args: argparse.Namespace, work: Path, num_processes: int) -> Path:
    """One training run of one thread per process; its folder."""
    folder = work / f"processes-{num_processes}"
    if args.reuse and read_json(folder / "manifest.json").get("status") == "finished":
        return folder
    files = {"model_name_or_path": work / "encoder", "train_data": work / "data/train.jsonl", "output_dir": folder}
    steps = {"max_steps": args.steps, "per_device_train_batch_size": args.batch_size // num_processes}
    steps |= {"seed": args.seed, "logging_steps": 1, "save_steps": 0, "overwrite_output_dir": True}
    negatives = {"negatives_cross_device": True if num_processes > 1 else None}
    words = harness.flags(**files, **steps, **negatives, **SETTINGS)
    done = harness.run(harness.torchrun(num_processes, ROOT / "train.py", *words), threads=1)
    print(f"{num_processes} processes: {done.seconds:.0f} s", flush=True)
    return folder


def losses_of(folder: Path) -> np.ndarray:
    """Of every step of a run."""
    return np.array([line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line])


def held_out_vectors(model: Path, data: Path) -> np.ndarray:
    """(NUM_TEXTS, D) vectors of the first held-out questions and answers."""
    rows = read_lines(data / "test.jsonl")[: NUM_TEXTS // 2]
    texts = [row["query"] for row in rows] + [row["pos"][0] for row in rows]
    return load_encoder(model, pooling="cls").encode(texts, max_length=SETTINGS["passage_max_len"])


def difference(losses: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Of every step, relative to the mean loss of the reference."""
    return np.abs(losses - reference) / np.mean(reference)


def plot(losses: dict[int, np.ndarray], title: str, picture: Path) -> None:
    """The losses on each other; below, their relative differences to one process, logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    styles = {1: ("#bbbbbb", "-", 5.0), 2: ("#d95f02", "-", 1.8), 4: ("#1f4e9c", (0, (3, 2)), 1.4)}
    for num_processes, loss in losses.items():
        color, line, width = styles[num_processes]
        steps = np.arange(1, len(loss) + 1)
        plural = "es" * (num_processes > 1)
        above.plot(steps, loss, color=color, linestyle=line, linewidth=width, label=f"{num_processes} process{plural}")
        if num_processes > 1:
            found = difference(loss, losses[1])
            shown = np.where(found > 0, found, np.nan)  # equal to the last bit: no place on this axis
            label = f"{num_processes} against 1 ({(found == 0).sum()} steps equal to the bit)"
            below.plot(steps, shown, ".", color=color, markersize=4, label=label)
    below.axhline(LOSS_BOUND, color="black", linestyle=":", linewidth=1)
    below.annotate("bound", (len(losses[1]), LOSS_BOUND), xytext=(0, 2), textcoords="offset points", ha="right")
    above.set(ylabel="loss", title=title)
    below.set(ylabel="difference / mean loss", xlabel="step", yscale="log", ylim=(1e-8, 10 * LOSS_BOUND))
    for axis in (above, below):
        axis.grid(alpha=0.3)
        axis.margins(x=0.01)
    above.legend(loc="upper right")
    below.legend(loc="lower right", ncols=2)
    figure.savefig(picture, dpi=130)


def main() -> None:
    parser = harness.parser(__doc__, "seed", "results")
    parser.add_argument("--cmrc", type=Path, default=ROOT.parent / "shared/data/cmrc/qa", help="question, answer files")
    parser.add_argument("--encoder", type=Path, default=ROOT / "outputs/encoder", help="model folder to start from")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8, help="of all processes together")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/same_model", help="where the runs go")
    parser.add_argument("--reuse", action="store_true", help="take finished runs of --work instead of running them")
    args = parser.parse_args()

    work = args.work.resolve()
    data = work / "data"
    if not (data / "manifest.json").is_file():
        files = {"input_dir": args.cmrc.resolve(), "output_dir": data}
        harness.stage("prepare", **files, train_num=3219, split_by="question")
    without_dropout(args.encoder, work / "encoder")
    folders = {w: train(args, work, w) for w in PROCESSES}
    losses = {w: losses_of(folder) for w, folder in folders.items()}
    assert all(len(loss) == args.steps for loss in losses.values())
    vectors = {w: held_out_vectors(folder, data) for w, folder in folders.items()}
    start = held_out_vectors(work / "encoder", data)
    settings = SETTINGS | {"steps": args.steps, "batch_size": args.batch_size, "seed": args.seed}
    settings |= {"encoder": sha256(args.encoder / "model.safetensors"), "train_data": sha256(data / "train.jsonl")}
    found: Row = {
        "moved": float(np.abs(vectors[1] - start).max()),  # what the steps change: the measure of the differences
        "loss": {w: float(difference(losses[w], losses[1]).max()) for w in PROCESSES[1:]},
        "embedding": {w: float(np.abs(vectors[w] - vectors[1]).max()) for w in PROCESSES[1:]},
        "cosine": {w: float((vectors[w] * vectors[1]).sum(axis=1).min()) for w in PROCESSES[1:]},
    }
    golden = read_json(args.results / "same_model.json")
    if golden.get("settings") == settings:
        found["loss"]["golden"] = float(difference(losses[1], np.array(golden["losses"])).max())
    print(json.dumps(found, indent=2))
    if max(found["loss"].values()) > LOSS_BOUND or max(found["embedding"].values()) > EMBEDDING_BOUND:
        sys.exit(f"NOT the same model: bounds are {LOSS_BOUND} (loss) and {EMBEDDING_BOUND} (embedding)")
    bounds = {"loss": LOSS_BOUND, "embedding": EMBEDDING_BOUND}
    record = harness.facts(settings=settings, bounds=bounds, largest=found, losses=losses[1].tolist())
    harness.save("same_model", record, folder=args.results)
    title = f"CMRC 2018, global batch {args.batch_size}, dropout 0, float32: one loss on 1, 2 and 4 processes"
    plot(losses, title, args.results / "same_model.png")


if __name__ == "__main__":
    main()
