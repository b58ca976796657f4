"""Where the time of a training step goes, on this machine's CPU.

    python benchmarks/step.py --data path/to/cmrc [--encoder outputs/encoder] [--threads 2]

Everything runs in one process on CMRC's training questions with random negatives (query 64, passage 128 tokens, group
size 2, float32, AdamW, the checkpoint's dropout, dropout's seed 0); what is compared takes turns, --rounds times.

    linear      seconds per token at batch 8 to 512, over those at batch 32; beyond --fits queries with GradCache
    matmul      time of the step's matrix products alone, forward and both backward, over the whole step: its share of
                the FLOP/s that they reach (attention's products are not among them)
    dropout     a step with the checkpoint's attention dropout over one with --attention_dropout 0
    compile     a step over one with --torch_compile (needs a C++ compiler)
    wait        time in which the loop waits for the next batch, over the step, with the default number of workers
    profile     the operators' own time, packed and as trainers without packing do it: a padded rectangle for the
                queries and one for each 32 passages

Writes benchmarks/results/step.json and step.md.
"""

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from harness import spread, timed
from models import Padded, Step, make_step, training_data
from torch import nn
from transformers import AutoModel

from bge_core.encoder import Encoder, load_encoder
from bge_core.encoder.model import compile_layers
from bge_core.runtime.launch import start
from bge_core.training.batch import Batch
from bge_core.training.data import TrainingData
from bge_core.training.step import StepSettings

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear"),
    "attention": ("scaled_dot_product", "softmax", "flash"),
    "dropout's random numbers": ("bernoulli",),
    "GELU": ("gelu",),
    "LayerNorm": ("layer_norm",),
    "AdamW": ("adam",),
    "embedding": ("embedding",),
}


def build(name: str, **settings: Any) -> Encoder:
    """The encoder as train.py prepares it."""
    encoder = load_encoder(name, **settings)
    encoder.freeze()
    return encoder.train()


def compare(first: Step, second: Step, data: TrainingData, rounds: int) -> str:
    """Time of the first way over that of the second, in turn on the same batches, after a round that warms up."""
    ways = (lambda pair, step=step: timed_on(data[pair][0], step) for step in (first, second))
    pairs = harness.in_turn(*ways, rounds + 1)
    return spread(one / other for one, other in pairs[1:])


def timed_on(batch: Batch, step: Step) -> float:
    """Seconds of a step on a batch."""
    return timed(lambda: step(batch))


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


def linear_layers(encoder: Encoder) -> list[nn.Linear]:
    """Those of the backbone."""
    return [m for name, m in encoder.backbone.named_modules() if isinstance(m, nn.Linear) and "pooler" not in name]


def matrix_products(encoder: Encoder, num_tokens: int) -> Callable[[], None]:
    """What the linear layers of the backbone multiply in one step: x W, and backward g W' and g' x."""
    weights = [layer.weight.detach() for layer in linear_layers(encoder)]
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
    step = make_step(encoder, StepSettings())

    def whole(pair: int) -> float:
        return timed_on(data[pair][0], step)

    def alone(pair: int) -> float:
        products = matrix_products(encoder, sum(data[pair][0].tokens.lengths))
        products()
        return timed(products)

    times = harness.in_turn(whole, alone, rounds + 1)[1:]
    per_token = 6 * sum(layer.weight.numel() for layer in linear_layers(encoder))
    tokens = [sum(data[pair + 1][0].tokens.lengths) for pair in range(rounds)]
    gflops = spread(per_token * n / step_s / 1e9 for n, (step_s, _) in zip(tokens, times, strict=True))
    return {"share": spread(products_s / step_s for step_s, products_s in times), "gflops": gflops}


def measure_dropout(name: str, data: TrainingData, rounds: int) -> str:
    """The checkpoint's attention dropout against none."""
    return compare(*(make_step(build(name, attention_dropout=x), StepSettings()) for x in (None, 0.0)), data, rounds)


def measure_compile(name: str, data: TrainingData, rounds: int) -> str:
    """As it is against compiled layers."""
    encoders = [build(name) for _ in range(2)]
    compile_layers(encoders[1].backbone)
    return compare(*(make_step(encoder, StepSettings()) for encoder in encoders), data, rounds)


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
    options = harness.parser(__doc__, "data", "encoder", "threads", "results")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--fits", type=int, default=256, help="largest batch without GradCache")
    args = options.parse_args()
    start()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    encoder, rounds = build(args.encoder), args.rounds
    padded = AutoModel.from_pretrained(args.encoder, dtype=torch.float32, add_pooling_layer=False)
    rectangles = Padded(padded, "mean", lambda tokens: tokens.split(32, None)).train()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = harness.write_training_rows(args.data, Path(folder) / "train.jsonl", 7)
        data = training_data(encoder, file, 32)
        parts: dict[str, Callable[[], Any]] = {
            "matmul": lambda: measure_matmul(encoder, data, rounds),
            "dropout": lambda: measure_dropout(args.encoder, data, rounds),
            "compile": lambda: measure_compile(args.encoder, data, rounds),
            "wait": lambda: measure_wait(encoder, data, rounds, data.config.dataloader_num_workers),
            "profile_packed": lambda: measure_profile(encoder, data[0][0]),
            "profile_padded": lambda: measure_profile(rectangles, data[0][0]),
            "linear": lambda: measure_linear(encoder, file, args.fits, rounds),
        }
        for name, measure in parts.items():
            result[name] = measure()
            print(name, json.dumps(result[name]), file=sys.stderr, flush=True)
    facts = harness.facts(threads=args.threads, seed=0)
    harness.save("step", result | facts, f"{as_markdown(result)}\n\n{harness.note(facts)}", args.results)


def as_markdown(result: dict[str, Any]) -> str:
    """Both tables."""
    packed, padded = result["profile_packed"], result["profile_padded"]
    rows = [[kind, f"{padded.get(kind, 0):,.0f}", f"{packed.get(kind, 0):,.0f}"] for kind in padded]
    rows.append(["together", *(f"{sum(times.values()):,.0f}" for times in (padded, packed))])
    profile = harness.table(["milliseconds of a step", "padded", "packed"], rows)
    rows = [
        ["FLOP/s of a step over those of its matrix products alone", result["matmul"]["share"]],
        ["time with attention dropout over without", result["dropout"]],
        ["time over that with --torch_compile", result["compile"]],
        ["waiting for input, percent of a step", result["wait"]["percent"]],
    ]
    for size, ratio in result["linear"]["per_token_over_batch_32"].items():
        cached = ", GradCache" if size > result["linear"]["gradcache_above"] else ""
        rows.append([f"seconds per token at batch {size}{cached}, over batch 32", ratio])
    return f"{profile}\n\n{harness.table(['what', 'median (smallest-largest)'], rows, left=2)}"


if __name__ == "__main__":
    main()
