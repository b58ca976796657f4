"""What a training step of bge-large's shape asks of a GPU, counted without one (fake_gpu.py).

    python benchmarks/operations.py --name before          needs g++; any torch, also one built for CPUs
    python benchmarks/operations.py --json --case "32 x 2" the counts of one case alone, by phase

Three cases: batch 32 with group size 2 and 8, and GradCache of 128 x 8, 288 texts at a time; bf16, hidden dropout 0.1,
attention dropout 0, lengths as in gpu.py. What runs is train.py, on a model without numbers. Counted is its second
step, when all is there that a run makes once: from where it begins to where the third one begins. An operation is what
torch dispatches to the device, at some cost for the host whatever its size; a kernel is one that starts work there. A
copy to the device is pinned (the host goes on), pageable (asynchronous by its flag, but the host copies first) or
blocking. A wait is a point where the host stands still until the GPU has caught up: a blocking copy, a read.

Phases: represent (GradCache's forward without a gradient), forward, loss, backward, clip, read (the figures of the step
before) and loop, which is the rest. With --cuda_graphs a pass is one operation of many kernels; what is asked while a
graph is captured is a phase of its own, and in no sum. The counts of each --name are kept in
benchmarks/results/operations.json, with the commit; operations.md has all sums.
"""

import fake_gpu

# isort: split
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import torch
from accelerate.state import AcceleratorState
from gpu import QUESTIONS, SENTENCES, draw_lengths
from harness import Row
from models import LARGE, random_encoder
from transformers import AutoTokenizer

import train
from bge_core.encoder import Encoder
from bge_core.encoder.graphs import Capture
from bge_core.training.graphs import GraphedEncoder

CASES = {"32 x 2": (32, 2, None), "32 x 8": (32, 8, None), "GradCache 128 x 8": (128, 8, 288)}
COPIES = ("blocking to device", "pageable to device", "pinned to device")
COUNTED = 2  # the step


class Counted(Exception):
    """The counted step is over."""


def make_model(layers: int, tokenizer: Any) -> Encoder:
    """bge-large's shape, without numbers."""
    sizes = {"num_hidden_layers": layers, "attention_probs_dropout_prob": 0.0}
    with torch.device("meta"):
        encoder = random_encoder(LARGE | sizes, "auto")
    encoder.tokenizer = tokenizer
    encoder.to = lambda device: encoder.to_empty(device=device)  # what has no numbers cannot be copied
    return encoder


def write_data(file: Path, queries: int, group: int) -> str:
    """Rows of one batch, of the lengths of gpu.py; the tiny model has a token for each of these characters."""
    generator, draw = torch.Generator().manual_seed(queries + group), random.Random(0)

    def texts(quantiles: list[int], count: int) -> list[str]:
        lengths = draw_lengths(quantiles, count, generator)  # with [CLS] and [SEP]
        return ["".join(draw.choices("的一是不了在人有我他这个们中来上", k=length - 2)) for length in lengths]

    query, passage = texts(QUESTIONS, queries), texts(SENTENCES, queries * group)
    rows = [
        {"query": query[i], "pos": passage[i * group : i * group + 1], "neg": passage[i * group + 1 : (i + 1) * group]}
        for i in range(queries)
    ]
    return harness.write_lines(file, rows)


def in_phases(gpu: fake_gpu.FakeGpu, at_end: ExitStack) -> None:
    """Let the loop's parts be phases, and the counted step the only one in the log."""
    steps = iter(range(1, COUNTED + 2))

    def begin() -> None:
        step = next(steps)
        if step == COUNTED:
            gpu.log.clear()
        if step > COUNTED:
            raise Counted

    def within(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            without = phase == "forward" and not torch.is_grad_enabled()
            with gpu.phase("represent" if without else phase):
                return function(*args, **options)

        return run

    for owner, name, phase in (
        (train, "forward_backward", "loss"),
        (Encoder, "forward", "forward"),
        (GraphedEncoder, "forward", "forward"),
        (Capture, "__call__", fake_gpu.CAPTURED),
        (train, "clip_gradients", "clip"),
        (train.Reading, "take", "read"),
    ):
        at_end.enter_context(mock.patch.object(owner, name, within(phase, getattr(owner, name))))
    at_end.enter_context(mock.patch.object(train.watchdog, "step_begins", begin))


def count_case(
    queries: int, group: int, sub_batch_size: int | None, layers: int = 24, **more: Any
) -> dict[str, dict[str, int]]:
    """The counts of a step by phase; `more` flags of train.py."""
    with ExitStack() as at_end:
        folder = Path(at_end.enter_context(tempfile.TemporaryDirectory()))
        words = {
            "model_name_or_path": harness.tiny_bert(folder / "model"),
            "train_data": write_data(folder / "rows.jsonl", queries, group),
            "output_dir": folder / "run",
            "per_device_train_batch_size": queries,
            "train_group_size": group,
            "query_max_len": 512,
            "passage_max_len": 512,
            "num_train_epochs": 100,
            "bf16": "fp16" not in more,
            "dataloader_num_workers": 0,
            **({"sub_batch_size": sub_batch_size} if sub_batch_size else {}),
            **more,
        }
        tokenizer = AutoTokenizer.from_pretrained(words["model_name_or_path"])
        gpu = at_end.enter_context(fake_gpu.FakeGpu())
        encoder = make_model(layers, tokenizer)
        at_end.enter_context(mock.patch.object(train.build, "build_encoder", lambda *_: encoder))
        in_phases(gpu, at_end)
        at_end.callback(AcceleratorState._reset_state, reset_partial_state=True)  # the next may have another precision
        with gpu.phase("loop"):
            with suppress(Counted):
                sys.exit(train.main([word for name, value in words.items() for word in (f"--{name}", str(value))]))
    return fake_gpu.count(gpu.log)


def sums(phases: dict[str, dict[str, int]]) -> list[int]:
    """Operations of the forward passes, of the backward and of all else; kernels, casts, copies, waits."""

    phases = {name: counts for name, counts in phases.items() if name != fake_gpu.CAPTURED}  # once, and not every step

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
    options.add_argument("--cuda_graphs", action="store_true", help="passes are held as graphs: one operation each")
    options.add_argument("--json", action="store_true", help="print the counts, keep nothing")
    args = options.parse_args()
    graphs = {"cuda_graphs": True} if args.cuda_graphs else {}
    cases = {case: count_case(*CASES[case], args.layers, **graphs) for case in args.case or CASES}
    if args.json:
        print(json.dumps(cases))
    else:
        write(args.name, cases, vars(args))


if __name__ == "__main__":
    main()
