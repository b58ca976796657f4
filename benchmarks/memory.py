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

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import torch.nn.functional as F
from harness import ROOT, Row, fresh, held_mb, private_peak, read_lines, spread, timed, write_lines
from models import make_step, random_bert, training_data
from transformers import AutoTokenizer

from bge_core.encoder import Encoder, load_encoder
from bge_core.encoder.encode import encode
from bge_core.encoder.settings import EncoderSettings
from bge_core.loss import LossConfig, LossInput, training_loss
from bge_core.training.step import StepSettings

PAIRS = 5


def measure_loss(rows: int, candidates: int, size: int, block_size: int | None) -> Row:
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
    excluded_BX = torch.stack([ids[own_BG[:, 0]], torch.arange(rows)], dim=1)
    x = LossInput(query_BD, query_BD, 0, candidate_ND, own_BG[:, 0], own_BG, ids, excluded_BX)
    config, eight = LossConfig(block_size=block_size), torch.arange(8)
    few_BD, few_ND = query_BD[:8].detach(), candidate_ND[:64].detach()
    training_loss(LossInput(few_BD, few_BD, 0, few_ND, eight, eight[:, None], ids[:64], ids[:8, None]), config)
    before = held_mb("VmRSS")  # with the libraries' own memory
    seconds = timed(lambda: training_loss(x, config).loss.backward())
    gradients_mb = (rows + candidates) * size * 4 / 2**20
    return {"seconds": seconds, "extra_mb": held_mb("VmHWM") - before - gradients_mb}


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


def measure_encode(encoder_name: str, num_texts: int) -> Row:
    """Encode short texts into a float16 memory map."""
    tokenizer = AutoTokenizer.from_pretrained(encoder_name)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    backbone = random_bert(shape | {"vocab_size": len(tokenizer)})
    encoder = Encoder(backbone, tokenizer, EncoderSettings(pooling="mean", normalize=True), "padded").eval()
    encode(encoder, ["一"] * 100)  # the libraries' own memory
    with tempfile.TemporaryDirectory() as folder:
        output = np.lib.format.open_memmap(f"{folder}/vectors.npy", "w+", np.float16, (num_texts, 32))
        before = held_mb("RssAnon")
        with private_peak() as peak:
            seconds = timed(lambda: encode(encoder, ShortTexts(num_texts), output=output))
    return {"extra_mb": peak[0] - before, "peak_mb": peak[0], "seconds": seconds}


def measure_step(encoder_name: str, file: str, batch_size: int, chunk_size: int | None, bf16: bool) -> Row:
    """One forward_backward and one update with `batch_size` queries, after a warm-up of two rows."""
    encoder = load_encoder(encoder_name)
    encoder.freeze()

    def batch_of(size: int) -> Any:
        return training_data(encoder, file, size, query_max_len=32, passage_max_len=64)[0][0]

    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)
    step = make_step(encoder.train(), StepSettings(chunk_size=chunk_size, autocast=lambda: autocast))
    batch = batch_of(batch_size)
    step(batch_of(2))  # the optimizer's state exists from now on
    before = held_mb("VmRSS")
    seconds, peak_mb = timed(lambda: step(batch)), held_mb("VmHWM")
    tokens = sum(batch.tokens.lengths)
    return {"seconds": seconds, "tokens": tokens, "peak_mb": peak_mb, "extra_mb": peak_mb - before}


def write_pairs(folder: Path, file: Path, num_rows: int) -> str:
    """At least `num_rows` training rows from the raw pairs of `folder`; a copy gets a number behind its texts."""
    with tempfile.TemporaryDirectory() as raw:
        harness.stage("prepare", input_dir=folder, output_dir=f"{raw}/data")
        rows = read_lines(f"{raw}/data/train.jsonl")

    def copies() -> Iterator[Row]:
        for i in range(num_rows):
            row, mark = rows[i % len(rows)], f" {i // len(rows)}" if i >= len(rows) else ""
            other = rows[(i + 7) % len(rows)]["pos"][0]
            yield {"query": row["query"] + mark, "pos": [row["pos"][0] + mark], "neg": [other + mark + "。"]}

    return write_lines(file, copies())


def compare(function: Any, threads: int, first: Row, second: Row) -> str:
    """PAIRS ratios of the time of the first settings to that of the second."""
    ways = (lambda _, given=given: fresh(function, threads, **given)["seconds"] for given in (first, second))
    return spread(one / other for one, other in harness.in_turn(*ways, PAIRS))


def loss_rows(threads: int) -> Iterator[list[str]]:
    """The loss by blocks against dense, and a large one."""
    size = {"rows": 1024, "candidates": 8192, "size": 1024}
    time = compare(measure_loss, threads, size | {"block_size": 256}, size | {"block_size": 0})
    yield ["loss in blocks of 256 / dense, time, B 1,024, N 8,192, D 1,024", time]
    dense, blocks = (fresh(measure_loss, threads, **size, block_size=b) for b in (0, 256))
    yield ["the same, memory", f"{blocks['extra_mb']:.0f} MB / {dense['extra_mb']:.0f} MB"]
    large = fresh(measure_loss, threads, rows=8192, candidates=65536, size=1024, block_size=None)
    yield ["loss by default, B 8,192, N 65,536, D 1,024, memory", f"{large['extra_mb']:.0f} MB"]


def step_rows(threads: int, batch_size: int, given: Row) -> Iterator[list[str]]:
    """GradCache against a plain step: time at equal batches, memory at a large one."""
    for size, chunk in ((32, 32), (128, 64)):
        sizes = given | {"batch_size": size}
        time = compare(measure_step, threads, sizes | {"chunk_size": chunk}, sizes | {"chunk_size": None})
        yield [f"step with GradCache ({chunk} texts) / plain, time, batch {size}", time]
    cases = {"plain, batch 32": (32, None), "GradCache, batch 32": (32, 32)}
    cases[f"GradCache, batch {batch_size:,}"] = (batch_size, 32)
    found = [fresh(measure_step, threads, **given, batch_size=b, chunk_size=c) for b, c in cases.values()]
    for name, one in zip(cases, found, strict=True):
        memory = f"{one['peak_mb']:.0f} MB in all, {one['extra_mb']:.0f} MB beyond model and optimizer"
        yield [f"step, {name}: memory", memory]
    plain, _, large = found
    yield ["whole memory of that batch / plain batch 32", f"{large['peak_mb'] / plain['peak_mb']:.2f}"]
    per_token = [one["seconds"] / one["tokens"] for one in (large, plain)]
    yield ["time per token of that batch / plain batch 32", f"{per_token[0] / per_token[1]:.2f}"]


def encode_rows(threads: int, encoder: str, counts: Sequence[int] = (10_000, 1_000_000)) -> Iterator[list[str]]:
    """Few texts and many."""
    few, many = (fresh(measure_encode, threads, encoder_name=encoder, num_texts=n) for n in counts)
    memory = f"{few['extra_mb']:.0f} MB / {many['extra_mb']:.0f} MB"
    yield [f"encoding {counts[0]:,} / {counts[1]:,} short texts, memory beyond the model", memory]


def main() -> None:
    options = harness.parser(__doc__, "encoder", "threads", "results")
    options.add_argument("--data", type=Path, default=ROOT / "examples/faq_zh", help="raw question/answer files")
    options.add_argument("--batch_size", type=int, default=4096)
    options.add_argument("--bf16", action="store_true", help="the training steps in bf16 autocast")
    args = options.parse_args()
    rows = [*loss_rows(args.threads)]
    with tempfile.TemporaryDirectory() as folder:
        file = write_pairs(args.data, Path(folder) / "train.jsonl", args.batch_size)
        given = {"encoder_name": os.path.abspath(args.encoder), "file": file, "bf16": args.bf16}
        rows += step_rows(args.threads, args.batch_size, given)
    rows += encode_rows(args.threads, args.encoder)
    facts = harness.facts(threads=args.threads, seed=0)
    text = f"{harness.table(['what', 'measured'], rows, left=2)}\n\n{harness.note(facts)}"
    harness.save("memory", facts | dict(rows), text, args.results)


if __name__ == "__main__":
    main()
