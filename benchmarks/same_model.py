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
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bge_core.encoder.encode import encode
from bge_core.encoder.load import load_encoder
from bge_core.files import atomic, records
from bge_core.runtime.log import read_metrics

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = (1, 2, 4)
# Largest difference to one process that passes: |loss - loss_1| / (mean loss_1) of any step, for the loss of a batch
# that is solved comes near 0; and |x - x_1| of any number of a unit vector after the last step.
LOSS_BOUND = 1e-3
EMBEDDING_BOUND = 1e-4
NUM_TEXTS = 200  # held-out questions and their answers, half each
SETTINGS: dict[str, Any] = {
    "sentence_pooling_method": "cls", "train_group_size": 1, "query_max_len": 32, "passage_max_len": 64,
    "learning_rate": 2e-5, "temperature": 0.02, "max_grad_norm": 1.0,
    "query_instruction_for_retrieval": "", "passage_instruction_for_retrieval": "",
}  # fmt: skip


def prepare_data(pairs: Path, folder: Path) -> None:
    """Questions for training and held-out ones, by the prepare stage."""
    if not (folder / "manifest.json").is_file():
        command = ["--input_dir", str(pairs), "--output_dir", str(folder), "--train_num", "3219"]
        run([sys.executable, str(ROOT / "prepare.py"), *command, "--split_by", "question"])


def without_dropout(encoder: Path, folder: Path) -> None:
    """A copy of a model folder whose two dropouts are 0."""
    shutil.copytree(encoder, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    atomic.write_json(folder / "config.json", config)


def run(words: list[str]) -> float:
    """A command with one thread per process; its wall time in seconds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run(words, env=environment, check=False)
    if done.returncode:
        sys.exit(f"error: {shlex.join(words)} ended with {done.returncode}")
    return time.perf_counter() - started


def train(args: argparse.Namespace, num_processes: int) -> Path:
    """One training run; its folder."""
    folder = args.work / f"processes-{num_processes}"
    settings = SETTINGS | {
        "model_name_or_path": args.work / "encoder", "train_data": args.work / "data/train.jsonl",
        "output_dir": folder, "per_device_train_batch_size": args.batch_size // num_processes,
        "max_steps": args.steps, "seed": args.seed, "logging_steps": 1, "save_steps": 0,
    }  # fmt: skip
    if args.reuse and (atomic.read_json(folder / "manifest.json") or {}).get("status") == "finished":
        return folder
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    words += [str(ROOT / "train.py"), "--overwrite_output_dir"]
    words += ["--negatives_cross_device"] * (num_processes > 1)
    seconds = run(words + [word for name, value in settings.items() for word in (f"--{name}", str(value))])
    print(f"{num_processes} processes: {seconds:.0f} s", flush=True)
    return folder


def held_out_vectors(model: Path, data: Path) -> np.ndarray:
    """(NUM_TEXTS, D) vectors of the first held-out questions and answers."""
    rows = records.read_rows(data / "test.jsonl", records.check_evaluation_row)[: NUM_TEXTS // 2]
    texts = [row["query"] for row in rows] + [row["pos"][0] for row in rows]
    return encode(load_encoder(model, pooling="cls"), texts, max_length=SETTINGS["passage_max_len"])


def difference(losses: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Of every step, relative to the mean loss of the reference."""
    return np.abs(losses - reference) / np.mean(reference)


def plot(losses: dict[int, np.ndarray], title: str, picture: Path) -> None:
    """The losses on each other; below, their relative differences to one process, logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
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
    with atomic.atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def machine() -> str:
    """Number and name of the processors."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cmrc", type=Path, default=ROOT.parent / "shared/data/cmrc/qa", help="question, answer files")
    parser.add_argument("--encoder", type=Path, default=ROOT / "outputs/encoder", help="model folder to start from")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8, help="of all processes together")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/same_model", help="where the runs go")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--reuse", action="store_true", help="take finished runs of --work instead of running them")
    args = parser.parse_args()

    prepare_data(args.cmrc, args.work / "data")
    without_dropout(args.encoder, args.work / "encoder")
    folders = {num_processes: train(args, num_processes) for num_processes in PROCESSES}

    losses = {w: np.array([line["loss"] for line in read_metrics(f / "metrics.jsonl")]) for w, f in folders.items()}
    assert all(len(loss) == args.steps for loss in losses.values())
    vectors = {w: held_out_vectors(folder, args.work / "data") for w, folder in folders.items()}
    start = held_out_vectors(args.work / "encoder", args.work / "data")
    settings = SETTINGS | {
        "steps": args.steps, "batch_size": args.batch_size, "seed": args.seed,
        "encoder": atomic.sha256(args.encoder / "model.safetensors"),
        "train_data": atomic.sha256(args.work / "data/train.jsonl"),
    }  # fmt: skip
    found: dict[str, Any] = {
        "moved": float(np.abs(vectors[1] - start).max()),  # what 200 steps change: the measure of the differences
        "loss": {w: float(difference(losses[w], losses[1]).max()) for w in PROCESSES[1:]},
        "embedding": {w: float(np.abs(vectors[w] - vectors[1]).max()) for w in PROCESSES[1:]},
        "cosine": {w: float((vectors[w] * vectors[1]).sum(axis=1).min()) for w in PROCESSES[1:]},
    }
    golden = atomic.read_json(args.results / "same_model.json") or {}
    if golden.get("settings") == settings:
        found["loss"]["golden"] = float(difference(losses[1], np.array(golden["losses"])).max())
    print(json.dumps(found, indent=2))
    failed = max(found["loss"].values()) > LOSS_BOUND or max(found["embedding"].values()) > EMBEDDING_BOUND
    if failed:
        print(f"NOT the same model: bounds are {LOSS_BOUND} (loss) and {EMBEDDING_BOUND} (embedding)", file=sys.stderr)
        return 1

    words = f"python benchmarks/same_model.py --steps {args.steps} --batch_size {args.batch_size} --seed {args.seed}"
    record = {
        "command": words, "machine": machine(), "torch": torch.__version__, "date": str(date.today()),
        "settings": settings, "bounds": {"loss": LOSS_BOUND, "embedding": EMBEDDING_BOUND}, "largest": found,
        "losses": losses[1].tolist(),
    }  # fmt: skip
    args.results.mkdir(parents=True, exist_ok=True)
    atomic.write_json(args.results / "same_model.json", record)
    title = f"CMRC 2018, global batch {args.batch_size}, dropout 0, float32: one loss on 1, 2 and 4 processes"
    plot(losses, title, args.results / "same_model.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
