"""What a training step of bge-large's shape asks of a GPU, counted without one (fake_gpu.py).

    python benchmarks/operations.py --name before          needs g++; any torch, also one built for CPUs
    python benchmarks/operations.py --json --case "32 x 2" the counts of one case alone, by phase

Three cases: batch 32 with group size 2 and 8, and GradCache of 128 x 8, 288 texts at a time; bf16, hidden dropout 0.1,
attention dropout 0. The step is train.py's: gradient, clipping, the metrics' read, AdamW. Counted is the second step,
when all is there that a run makes once. An operation is what torch dispatches to the device, at some cost for the host
whatever its size; a kernel is one that starts work there. A copy to the device is pinned (the host goes on), pageable
(asynchronous by its flag, but the host copies first) or blocking. A wait is a point where the host stands still until
the GPU has caught up: a blocking copy, a read.

Phases: represent (GradCache's forward without a graph), forward, loss, backward, clip, metrics, update. The counts of
each --name are kept in benchmarks/results/operations.json, with the commit; the sums of all are operations.md.
"""

import fake_gpu

# isort: split
import json
import subprocess
from collections.abc import Callable, Iterable
from functools import partial

import harness
import torch
from gpu import QUESTIONS, SENTENCES, draw_lengths
from harness import Row
from models import LARGE, VOCABULARY, random_batch, random_encoder

import train
from bge_core.encoder import Encoder
from bge_core.runtime.distributed import clip_gradients
from bge_core.training.batch import Batch
from bge_core.training.optim import build_optimizer
from bge_core.training.step import StepSettings, forward_backward

CASES = {"32 x 2": (32, 2, None), "32 x 8": (32, 8, None), "GradCache 128 x 8": (128, 8, 288)}
COPIES = ("blocking to device", "pageable to device", "pinned to device")


def make_model(gpu: fake_gpu.FakeGpu, layers: int) -> Encoder:
    """bge-large's shape on the GPU; its forward is a phase."""
    with torch.device("meta"):
        encoder = random_encoder({**LARGE, "num_hidden_layers": layers, "attention_probs_dropout_prob": 0.0}, "auto")
    encoder.to_empty(device="cuda")
    forward = encoder.forward

    def in_phase(*args: object) -> torch.Tensor:
        with gpu.phase("forward" if torch.is_grad_enabled() else "represent"):
            return forward(*args)

    encoder.forward = in_phase
    return encoder


def make_batch(queries: int, group: int) -> Batch:
    """The batch of gpu.py."""
    generator, seed = torch.Generator().manual_seed(queries + group), queries + group
    lengths = draw_lengths(QUESTIONS, queries, generator), draw_lengths(SENTENCES, queries * group, generator)
    return random_batch(*lengths, VOCABULARY, seed)


def make_step(gpu: fake_gpu.FakeGpu, encoder: Encoder, chunk_size: int | None) -> Callable[[Batch], None]:
    """One step as train.py takes it."""
    optimizer = build_optimizer(encoder, 1e-5, 0.01, (0.9, 0.999), 1e-8)
    settings = StepSettings(chunk_size=chunk_size, autocast=partial(torch.autocast, "cuda", torch.bfloat16))
    scaler = settings.scaler

    def step(batch: Batch) -> None:
        with gpu.phase("loss"):
            shares = forward_backward(encoder, [batch], settings)
        with gpu.phase("clip"):
            scaler.unscale_(optimizer)
            shares["grad_norm"] = clip_gradients(encoder.parameters(), 1.0)
        with gpu.phase("metrics"):
            shares |= train.count([batch], signals=0, workers_lost=0, save_failed=0)
            torch.stack([share.to("cuda", torch.float32) for share in shares.values()]).tolist()
        with gpu.phase("update"):
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

    return step


def count_case(queries: int, group: int, chunk_size: int | None, layers: int = 24) -> dict[str, dict[str, int]]:
    """The counts of a step by phase."""
    with fake_gpu.FakeGpu() as gpu:
        step, batch = make_step(gpu, make_model(gpu, layers), chunk_size), make_batch(queries, group)
        step(batch)  # makes the optimizer's state, compares the attention kernel
        gpu.log.clear()
        step(batch)
    return fake_gpu.count(gpu.log)


def sums(phases: dict[str, dict[str, int]]) -> list[int]:
    """Operations of the forward passes, of the backward and of all else; kernels, casts, copies, waits."""

    def total(kind: str, names: Iterable[str] = phases) -> int:
        return sum(phases[name].get(kind, 0) for name in names if name in phases)

    forward, backward = total("operations", ["represent", "forward"]), total("operations", ["backward"])
    others = total("operations") - forward - backward
    return [forward, backward, others, *(total(kind) for kind in ("kernels", "casts", *COPIES, "waits"))]


def write(name: str, cases: dict[str, dict[str, dict[str, int]]], options: Row) -> None:
    """Keep the counts of this commit under `name`; the table of all names."""
    file = options["results"] / "operations.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    record[name] = harness.facts(commit=commit.strip(), cases=cases)
    heads = ["", "case", "forward", "backward", "else", "kernels", "casts"]
    heads += [f"{how.split()[0]} copies" for how in COPIES] + ["waits"]
    rows = [
        [f"{name} ({kept['commit']})", case, *(f"{number:,}" for number in sums(phases))]
        for name, kept in record.items()
        for case, phases in kept["cases"].items()
    ]
    text = "Operations of one step on a GPU, bge-large's shape, bf16; counted without a GPU, nothing was timed.\n\n"
    harness.save("operations", record, text + harness.table(heads, rows, left=2), options["results"])


def main() -> None:
    options = harness.parser(__doc__, "results")
    options.add_argument("--name", default="now", help="under which the counts are kept")
    options.add_argument("--case", choices=CASES, action="append", help="default: all")
    options.add_argument("--layers", type=int, default=LARGE["num_hidden_layers"])
    options.add_argument("--json", action="store_true", help="print the counts, keep nothing")
    args = options.parse_args()
    cases = {case: count_case(*CASES[case], args.layers) for case in args.case or CASES}
    if args.json:
        print(json.dumps(cases))
    else:
        write(args.name, cases, vars(args))


if __name__ == "__main__":
    main()
