"""Where the time of a training step goes, on this machine's CPU.

    python benchmarks/step.py --data path/to/cmrc [--encoder outputs/encoder] [--threads 2]

Everything runs in one process on CMRC's training questions with random negatives (query 64, passage 128 tokens, group
size 2, float32, AdamW, the checkpoint's dropout, dropout's seed 0); what is compared takes turns, --rounds times.

    linear      seconds per token at batch 8 to 512, over those at batch 32; beyond --fits queries with GradCache
    matmul      time of the step's matrix products alone, forward and both backward, over the whole step: its share of
                the FLOP/s that they reach (attention's products are not among them)
    dropout     a step with the checkpoint's attention dropout over one with --attention_dropout 0
    first       with CLS pooling, a step whose last layer computes every token over one with the first tokens alone
    compile     a step over one with --torch_compile (needs a C++ compiler)
    wait        time in which the loop waits for the next batch, over the step, with the default number of workers
    profile     the operators' own time, packed and as trainers without packing do it: a padded rectangle for the
                queries and one for each 32 passages

Writes benchmarks/results/step.json and step.md.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from peers import PASSAGE_LENGTH, QUERY_LENGTH, spread, write_rows  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoModel  # noqa: E402

from bge_core.encoder import packing  # noqa: E402
from bge_core.encoder.load import load_encoder  # noqa: E402
from bge_core.encoder.model import Encoder, compile_layers  # noqa: E402
from bge_core.encoder.tokens import Tokens, pad_buckets  # noqa: E402
from bge_core.files import atomic  # noqa: E402
from bge_core.runtime.config import TrainConfig  # noqa: E402
from bge_core.runtime.launch import start  # noqa: E402
from bge_core.training.batch import Batch  # noqa: E402
from bge_core.training.data import TrainingData  # noqa: E402
from bge_core.training.optim import build_optimizer  # noqa: E402
from bge_core.training.step import StepSettings, forward_backward  # noqa: E402

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear"),
    "attention": ("scaled_dot_product", "softmax", "flash"),
    "dropout's random numbers": ("bernoulli",),
    "GELU": ("gelu",),
    "LayerNorm": ("layer_norm",),
    "AdamW": ("adam",),
    "embedding": ("embedding",),
}


class Rectangles(nn.Module):
    """The stock model with padding: `size` texts at a time, filled up to the longest of them."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__()
        self.backbone, self.size = AutoModel.from_pretrained(name, dtype=torch.float32, add_pooling_layer=False), size

    def forward(self, tokens: Tokens) -> Tensor:
        vectors = []
        for part in tokens.split(self.size, None):
            ((order, id_sL, mask_sL),) = pad_buckets(part, 0, max_waste=1.0)
            hidden_sLD = self.backbone(input_ids=id_sL, attention_mask=mask_sL).last_hidden_state
            mean_sD = (hidden_sLD * mask_sL[..., None]).sum(1) / mask_sL.sum(1, keepdim=True)
            vectors.append(nn.functional.normalize(mean_sD, dim=-1)[torch.tensor(order).argsort()])
        return torch.cat(vectors)


def timed(function: Callable[[], object]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def training_data(encoder: Encoder, file: str, batch_size: int) -> TrainingData:
    """The rows as train.py reads them."""
    config = TrainConfig(
        model_name_or_path="unused", output_dir="unused", train_data=[file], query_max_len=QUERY_LENGTH,
        passage_max_len=PASSAGE_LENGTH, train_group_size=2, per_device_train_batch_size=batch_size,
        query_instruction_for_retrieval="", passage_instruction_for_retrieval="", num_train_epochs=100,
    )  # fmt: skip
    return TrainingData(config, encoder.tokenizer, encoder.max_positions, 0, 1, 1)


def build(name: str, attention_dropout: float | None = None) -> Encoder:
    """The encoder as train.py prepares it."""
    encoder = load_encoder(name, attention_dropout=attention_dropout)
    encoder.freeze()
    return encoder.train()


def make_step(model: nn.Module, settings: StepSettings) -> Callable[[Batch], None]:
    """forward_backward and the update."""
    optimizer = build_optimizer(model, 1e-6, 0.0, (0.9, 0.999), 1e-8)

    def step(batch: Batch) -> None:
        forward_backward(model, [batch], settings)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure_linear(encoder: Encoder, file: str, fits: int, rounds: int) -> dict[str, Any]:
    """Seconds per token of each batch size, over those of batch 32 in the same round."""
    sizes = [size for size in (8, 16, 32, 64, 128, 256, 512) if size <= max(512, fits)]
    batches = {size: training_data(encoder, file, size)[0][0] for size in sizes}
    steps = {size: make_step(encoder, StepSettings(chunk_size=None if size <= fits else 64)) for size in sizes}
    steps[32](batches[32])
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(rounds):
        for size in sizes if number % 2 == 0 else reversed(sizes):
            tokens = sum(batches[size].tokens.lengths)
            repeats = max(1, 32 // size)
            total = timed(lambda size=size, repeats=repeats: [steps[size](batches[size]) for _ in range(repeats)])
            seconds[size].append(total / repeats / tokens)
    ratios = {
        size: [a / b for a, b in zip(times, seconds[32], strict=True)] for size, times in seconds.items() if size != 32
    }
    return {"gradcache_above": fits, "per_token_over_batch_32": {size: spread(r) for size, r in ratios.items()}}


def matrix_products(encoder: Encoder, num_tokens: int) -> Callable[[], None]:
    """What the linear layers of the backbone multiply in one step: x W, and backward g W' and g' x."""
    layers = [m for n, m in encoder.backbone.named_modules() if isinstance(m, nn.Linear) and "pooler" not in n]
    weights = [layer.weight.detach() for layer in layers]
    inputs = {w.shape[1]: torch.randn(num_tokens, w.shape[1]) for w in weights}
    outputs = {w.shape[0]: torch.randn(num_tokens, w.shape[0]) for w in weights}

    def run() -> None:
        for w in weights:
            inputs[w.shape[1]] @ w.T
            outputs[w.shape[0]] @ w
            outputs[w.shape[0]].T @ inputs[w.shape[1]]

    return run


def measure_matmul(encoder: Encoder, data: TrainingData, rounds: int) -> dict[str, Any]:
    """Share of the step that its matrix products would take alone."""
    step, shares, flops = make_step(encoder, StepSettings()), [], []
    (warm,) = data[0]
    step(warm)
    for number in range(rounds):
        (batch,) = data[number + 1]
        num_tokens = sum(batch.tokens.lengths)
        products = matrix_products(encoder, num_tokens)
        products()
        calls = [lambda batch=batch: step(batch), products]
        times = [timed(call) for call in (calls if number % 2 == 0 else calls[::-1])]
        whole, alone = times if number % 2 == 0 else times[::-1]
        shares.append(alone / whole)
        linears = [m for n, m in encoder.backbone.named_modules() if isinstance(m, nn.Linear) and "pooler" not in n]
        flops.append(6 * sum(m.weight.numel() for m in linears) * num_tokens / whole / 1e9)
    return {"share": spread(shares), "gflops": spread(flops)}


def compare(steps: Sequence[Callable[[Batch], None]], data: TrainingData, rounds: int) -> str:
    """Time of the first way over that of the second, in turn on the same batches, after a round that warms up."""
    ratios = []
    for number in range(rounds + 1):
        (batch,) = data[number]
        order = (0, 1) if number % 2 == 0 else (1, 0)
        times = {which: timed(lambda which=which, batch=batch: steps[which](batch)) for which in order}
        ratios.append(times[0] / times[1])
    return spread(ratios[1:])


def measure_dropout(name: str, data: TrainingData, rounds: int) -> str:
    """The checkpoint's attention dropout against none."""
    return compare([make_step(build(name, value), StepSettings()) for value in (None, 0.0)], data, rounds)


def measure_first(name: str, data: TrainingData, rounds: int) -> str:
    """CLS pooling: the last layer on all tokens against the first ones alone."""
    step = make_step(load_encoder(name, pooling="cls").train(), StepSettings())
    first_tokens = packing.has_bert_layers

    def whole(batch: Batch) -> None:
        packing.has_bert_layers = lambda backbone: False
        step(batch)
        packing.has_bert_layers = first_tokens

    return compare([whole, step], data, rounds)


def measure_compile(name: str, data: TrainingData, rounds: int) -> str:
    """As it is against compiled layers."""
    encoders = [build(name) for _ in range(2)]
    compile_layers(encoders[1].backbone)
    return compare([make_step(encoder, StepSettings()) for encoder in encoders], data, rounds)


def measure_wait(encoder: Encoder, data: TrainingData, rounds: int, workers: int) -> dict[str, Any]:
    """Time between asking for a batch and having it."""
    step, shares = make_step(encoder, StepSettings()), []
    loader = iter(torch.utils.data.DataLoader(data, batch_size=None, sampler=range(1000), num_workers=workers))
    step(next(loader)[0])
    for _ in range(rounds):
        started = time.perf_counter()
        (batch,) = next(loader)
        waited = time.perf_counter() - started
        step(batch)
        shares.append(waited / (time.perf_counter() - started))
    return {"workers": workers, "percent": spread([100 * share for share in shares])}


def measure_profile(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Milliseconds of each kind of operator in one step."""
    step = make_step(model, StepSettings())
    step(batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(batch)
    times: Counter[str] = Counter()
    for event in profile.key_averages():
        kind = next((k for k, parts in KINDS.items() if any(p in event.key.lower() for p in parts)), "everything else")
        times[kind] += event.self_cpu_time_total / 1000
    return {kind: round(ms, 1) for kind, ms in times.most_common()}


def main() -> None:
    """All of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CMRC 2018: train.jsonl, corpus.jsonl")
    parser.add_argument("--encoder", default="outputs/encoder")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fits", type=int, default=256, help="largest batch without GradCache")
    args = parser.parse_args()
    start()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    encoder = build(args.encoder)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/train.jsonl"
        write_rows(args.data, Path(file))
        data = training_data(encoder, file, 32)
        parts: dict[str, Callable[[], Any]] = {
            "matmul": lambda: measure_matmul(encoder, data, args.rounds),
            "dropout": lambda: measure_dropout(args.encoder, data, args.rounds),
            "first": lambda: measure_first(args.encoder, data, args.rounds),
            "compile": lambda: measure_compile(args.encoder, data, args.rounds),
            "wait": lambda: measure_wait(encoder, data, args.rounds, data.config.dataloader_num_workers),
            "profile_packed": lambda: measure_profile(encoder, data[0][0]),
            "profile_padded": lambda: measure_profile(Rectangles(args.encoder, 32).train(), data[0][0]),
            "linear": lambda: measure_linear(encoder, file, args.fits, args.rounds),
        }
        for name, measure in parts.items():
            result[name] = measure()
            print(name, json.dumps(result[name]), file=sys.stderr, flush=True)
    result |= {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}", "threads": args.threads,
        "seed": 0, "date": str(date.today()), "command": " ".join(["python", "benchmarks/step.py", *sys.argv[1:]]),
    }  # fmt: skip
    atomic.write_json(ROOT / "benchmarks/results/step.json", result)
    packed, padded = result["profile_packed"], result["profile_padded"]
    lines = ["| milliseconds of a step | padded | packed |", "| --- | ---: | ---: |"]
    lines += [f"| {kind} | {padded.get(kind, 0):,.0f} | {packed.get(kind, 0):,.0f} |" for kind in padded]
    lines.append(f"| together | {sum(padded.values()):,.0f} | {sum(packed.values()):,.0f} |")
    lines += ["", "| what | median (smallest-largest) |", "| --- | --- |"]
    lines.append(f"| FLOP/s of a step over those of its matrix products alone | {result['matmul']['share']} |")
    lines.append(f"| time with attention dropout over without | {result['dropout']} |")
    lines.append(f"| CLS pooling: time with a whole last layer over first tokens alone | {result['first']} |")
    lines.append(f"| time over that with --torch_compile | {result['compile']} |")
    lines.append(f"| waiting for input, percent of a step | {result['wait']['percent']} |")
    for size, ratio in result["linear"]["per_token_over_batch_32"].items():
        cached = ", GradCache" if size > args.fits else ""
        lines.append(f"| seconds per token at batch {size}{cached}, over batch 32 | {ratio} |")
    note = f"{result['machine']}, {args.threads} threads, seed 0, {result['date']}: `{result['command']}`"
    (ROOT / "benchmarks/results/step.md").write_text("\n".join([*lines, "", note, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
