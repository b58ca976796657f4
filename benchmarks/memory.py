"""Memory and time of what fits nowhere else: the loss by row blocks, and GradCache.

    python benchmarks/memory.py --encoder outputs/encoder --data examples/faq_zh --threads 2

Every measurement is a process of its own. Memory is the peak resident size of that process: for the loss beyond its
inputs and their gradients, for a training step both in all and beyond model and optimizer. Times are ratios: both ways
are measured in turn, five pairs, and the median ratio with the smallest and the largest is printed. The loss runs on
random unit vectors; a step runs forward_backward on the question/answer pairs of --data, repeated with other numbers
behind them where the batch wants more. Encoding writes 10,000 and 1,000,000 texts of one token into a memory-mapped
file, with a small random model; its memory is the peak of the process's anonymous pages (those of the file are not
among them).

    benchmarks/results/memory.json, memory.md
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, BertConfig, BertModel

from bge_core.encoder.encode import encode
from bge_core.encoder.load import load_encoder
from bge_core.encoder.model import Encoder
from bge_core.encoder.settings import EncoderSettings
from bge_core.files import atomic, records
from bge_core.loss import LossConfig, LossInput, training_loss
from bge_core.reports.tables import text_table
from bge_core.runtime.config import TrainConfig
from bge_core.training.data import TrainingData
from bge_core.training.optim import build_optimizer
from bge_core.training.step import StepSettings, forward_backward

ROOT = Path(__file__).resolve().parent.parent
PAIRS = 5


def resident_mb() -> float:
    """What this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_mb() -> float:
    """The most it ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure_loss(rows: int, candidates: int, size: int, block_size: int | None) -> dict[str, Any]:
    """One forward and backward of the built-in loss over random unit vectors."""
    generator = torch.Generator().manual_seed(0)

    def vectors(count: int) -> torch.Tensor:
        made = torch.empty(count, size)
        for part in made.split(1024):  # so that making them is not the peak
            part.copy_(F.normalize(torch.randn(len(part), size, generator=generator), dim=1))
        return made.requires_grad_()

    query_BD, candidate_ND = vectors(rows), vectors(candidates)
    own_BG = torch.arange(candidates).view(rows, -1)
    ids = torch.arange(candidates) + rows
    x = LossInput(
        query_BD, query_BD, 0, candidate_ND, own_BG[:, 0], own_BG, ids,
        torch.stack([ids[own_BG[:, 0]], torch.arange(rows)], dim=1),
    )  # fmt: skip
    config = LossConfig(block_size=block_size)
    small = LossInput(
        query_BD[:8].detach(), query_BD[:8].detach(), 0, candidate_ND[:64].detach(), torch.arange(8),
        torch.arange(8)[:, None], ids[:64], ids[:8, None],
    )  # fmt: skip
    training_loss(small, config)  # the libraries' own memory
    before, started = resident_mb(), time.perf_counter()
    loss = training_loss(x, config).loss
    loss.backward()
    seconds = time.perf_counter() - started
    gradients_mb = (rows + candidates) * size * 4 / 2**20
    return {"loss": loss.item(), "seconds": seconds, "extra_mb": peak_mb() - before - gradients_mb}


def anonymous_mb() -> float:
    """What this process holds now that is no page of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 2**10


class ShortTexts(Sequence[str]):
    """`count` texts of one character, made when they are asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, slice):
            return [self[i] for i in range(*which.indices(self.count))]
        return chr(0x4E00 + which % 5000)


def measure_encode(encoder_name: str, num_texts: int) -> dict[str, Any]:
    """Encode short texts into a float16 memory map."""
    tokenizer = AutoTokenizer.from_pretrained(encoder_name)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    backbone = BertModel(BertConfig(vocab_size=len(tokenizer), **sizes), add_pooling_layer=False)
    encoder = Encoder(backbone, tokenizer, EncoderSettings(pooling="mean", normalize=True), "padded").eval()
    peak, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], anonymous_mb())

    encode(encoder, ["一"] * 100)  # the libraries' own memory
    with tempfile.TemporaryDirectory() as folder:
        output = np.lib.format.open_memmap(f"{folder}/vectors.npy", "w+", np.float16, (num_texts, 32))
        before, started = anonymous_mb(), time.perf_counter()
        watcher = threading.Thread(target=watch)
        watcher.start()
        encode(encoder, ShortTexts(num_texts), output=output)
        ended.set()
        watcher.join()
    return {"extra_mb": peak[0] - before, "peak_mb": peak[0], "seconds": time.perf_counter() - started}


def measure_step(encoder_name: str, file: str, batch_size: int, chunk_size: int | None, bf16: bool) -> dict[str, Any]:
    """One forward_backward and one update with `batch_size` queries, after a warm-up of two rows."""
    encoder = load_encoder(encoder_name)
    encoder.freeze()
    encoder.train()
    config = TrainConfig(
        model_name_or_path=encoder_name, output_dir="unused", train_data=[file], query_max_len=32, passage_max_len=64,
        train_group_size=2, per_device_train_batch_size=batch_size, query_instruction_for_retrieval="",
        passage_instruction_for_retrieval="",
    )  # fmt: skip
    data = TrainingData(config, encoder.tokenizer, encoder.max_positions, 0, 1, 1)
    settings = StepSettings(
        chunk_size=chunk_size, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)
    )
    optimizer = build_optimizer(encoder, 1e-5, 0.0, (0.9, 0.999), 1e-8)
    (batch,) = data[0]
    examples, _ = next(data.examples(0))
    forward_backward(encoder, [data.collate(examples[:2], [(2, sum(len(e.passages) for e in examples[:2]))])], settings)
    optimizer.step()  # its state exists from now on
    before, started = resident_mb(), time.perf_counter()
    forward_backward(encoder, [batch], settings)
    optimizer.step()
    return {
        "seconds": time.perf_counter() - started, "tokens": sum(batch.tokens.lengths), "peak_mb": peak_mb(),
        "extra_mb": peak_mb() - before,
    }  # fmt: skip


def write_pairs(folder: Path, file: Path, num_rows: int) -> None:
    """At least `num_rows` training rows from the raw pairs of `folder`; a copy gets a number behind its texts."""
    with tempfile.TemporaryDirectory() as raw:
        command = [sys.executable, str(ROOT / "prepare.py"), "--input_dir", str(folder), "--output_dir", raw + "/data"]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        rows = [row for _, row in records.read_jsonl(raw + "/data/train.jsonl", records.check_training_row)]

    def copies() -> Any:
        for i in range(num_rows):
            row, mark = rows[i % len(rows)], f" {i // len(rows)}" if i >= len(rows) else ""
            other = rows[(i + 7) % len(rows)]["pos"][0]
            yield {"query": row["query"] + mark, "pos": [row["pos"][0] + mark], "neg": [other + mark + "。"]}

    atomic.write_jsonl(file, copies())


def child(kind: str, **arguments: Any) -> dict[str, Any]:
    """A measurement in a fresh process."""
    words = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps({"kind": kind, **arguments})]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {kind} {arguments}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(kind, arguments, result, file=sys.stderr, flush=True)
    return result


def in_turn(kind: str, first: dict[str, Any], second: dict[str, Any]) -> tuple[str, list[float]]:
    """PAIRS ratios of the time of `first` to that of `second`; as text and as numbers."""
    ratios = []
    for pair in range(PAIRS):
        order = (first, second) if pair % 2 == 0 else (second, first)
        seconds = [child(kind, **arguments)["seconds"] for arguments in order]
        ratios.append(seconds[0] / seconds[1] if pair % 2 == 0 else seconds[1] / seconds[0])
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})", ratios


def main() -> None:
    """All measurements, or with --child one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="outputs/encoder")
    parser.add_argument("--data", type=Path, default=ROOT / "examples/faq_zh", help="raw question/answer files")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch_size", type=int, default=4096)
    parser.add_argument("--bf16", action="store_true", help="the training steps in bf16 autocast")
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        arguments = json.loads(args.child)
        kinds = {"loss": measure_loss, "step": measure_step, "encode": measure_encode}
        print(json.dumps(kinds[arguments.pop("kind")](**arguments)))
        return
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}", "threads": args.threads,
        "date": str(date.today()), "seed": 0, "command": " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]]),
    }  # fmt: skip
    rows = []

    size = {"rows": 1024, "candidates": 8192, "size": 1024}
    text, results["loss_time_ratios"] = in_turn("loss", size | {"block_size": 256}, size | {"block_size": 0})
    rows.append(["loss in blocks of 256 / dense, time, B 1,024, N 8,192, D 1,024", text])
    whole, blocks = (child("loss", **size, block_size=b) for b in (0, 256))
    results["loss_memory_small"] = {"dense": whole, "blocks": blocks}
    rows.append(["the same, memory", f"{blocks['extra_mb']:.0f} MB / {whole['extra_mb']:.0f} MB"])
    large = child("loss", rows=8192, candidates=65536, size=1024, block_size=None)
    results["loss_large"] = large
    rows.append(["loss by default, B 8,192, N 65,536, D 1,024, memory", f"{large['extra_mb']:.0f} MB"])

    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/train.jsonl"
        write_pairs(args.data, Path(file), args.batch_size)
        step = {"encoder_name": args.encoder, "file": file, "bf16": args.bf16}
        results["gradcache_time_ratios"] = {}
        for batch_size, chunk_size in ((32, 32), (128, 64)):
            sizes = step | {"batch_size": batch_size}
            text, ratios = in_turn("step", sizes | {"chunk_size": chunk_size}, sizes | {"chunk_size": None})
            results["gradcache_time_ratios"][str(batch_size)] = ratios
            rows.append([f"step with GradCache ({chunk_size} texts) / plain, time, batch {batch_size}", text])
        plain = child("step", **step, batch_size=32, chunk_size=None)
        cached = [child("step", **step, batch_size=b, chunk_size=32) for b in (32, args.batch_size)]
        results["gradcache_memory"] = {
            "plain_32": plain,
            "cached_32": cached[0],
            f"cached_{args.batch_size}": cached[1],
        }
    for name, measured in (("plain, batch 32", plain), ("GradCache, batch 32", cached[0]),
                           (f"GradCache, batch {args.batch_size:,}", cached[1])):  # fmt: skip
        text = f"{measured['peak_mb']:.0f} MB in all, {measured['extra_mb']:.0f} MB beyond model and optimizer"
        rows.append([f"step, {name}: memory", text])
    rows.append(["whole memory of that batch / plain batch 32", f"{cached[1]['peak_mb'] / plain['peak_mb']:.2f}"])
    per_token = [m["seconds"] / m["tokens"] for m in (cached[1], plain)]
    rows.append(["time per token of that batch / plain batch 32", f"{per_token[0] / per_token[1]:.2f}"])

    few, many = (child("encode", encoder_name=args.encoder, num_texts=n) for n in (10_000, 1_000_000))
    results["encode_memory"] = {"10000": few, "1000000": many}
    text = f"{few['extra_mb']:.0f} MB / {many['extra_mb']:.0f} MB"
    rows.append(["encoding 10,000 / 1,000,000 short texts, memory beyond the model", text])

    atomic.write_json(ROOT / "benchmarks/results/memory.json", results)
    table = text_table(["what", "measured"], rows, left=True)
    markdown = "\n".join(["| what | measured |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)])
    (ROOT / "benchmarks/results/memory.md").write_text(
        f"{markdown}\n\n{results['machine']}, {args.threads} threads, {results['date']}: `{results['command']}`\n"
    )
    print(table)


if __name__ == "__main__":
    main()
