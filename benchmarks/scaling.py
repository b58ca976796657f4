"""What a training step costs: counted, and measured on this machine.

    python benchmarks/scaling.py             count and measure with 1, 2 and 4 processes, then write the tables
    python benchmarks/scaling.py --tables    only write the tables again, from the figures that are there

Everything lands in benchmarks/results/scaling.json, and the tables of docs/scaling.md and its Chinese twin.
Run the first on a quiet machine: it takes the medians of many repeats, but of what else runs it knows nothing.

A step is the sum of five terms (docs/scaling.md derives them): compute, gather, all-reduce, loss, update. Their
constants are measured one by one; the whole step is measured apart from them, on a small BERT, and compared with the
sum. What 8 GPUs and several nodes cost is communication.py's.

Symbols: W processes, B queries of a process, G passages of a query, R = B G, N = W R candidates, D embedding size, T
tokens of a process, P parameters.
"""

import argparse
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import harness
import torch
import torch.distributed as dist
from harness import RESULTS as FOLDER
from harness import ROOT, Row
from models import WITHOUT_DROPOUT, make_step, random_batch, random_encoder
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bge_core.encoder import Encoder
from bge_core.loss import LossConfig, LossInput, training_loss
from bge_core.runtime.distributed import gather_objects, world, wrap
from bge_core.runtime.launch import start
from bge_core.training.batch import Batch
from bge_core.training.optim import build_optimizer
from bge_core.training.step import StepSettings, loss_input

RESULTS = FOLDER / "scaling.json"
DOCS = {"en": ROOT / "docs/scaling.md", "zh": ROOT / "docs/scaling.zh-CN.md"}
PROCESSES = (1, 2, 4)
REPEATS = 15

# ------------------------------------------------------------------------------------------------------ the cost model


@dataclass(frozen=True)
class Shape:
    """A BERT."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    positions: int = 512

    @property
    def matrix_parameters(self) -> int:
        """Of the layers' matrices: each multiplies every token."""
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate)

    @property
    def parameters(self) -> int:
        """All that are trained: matrices, their biases, norms, embeddings; without the pooler."""
        biases_and_norms = self.layers * (9 * self.hidden + self.intermediate) + 2 * self.hidden
        return self.matrix_parameters + biases_and_norms + (self.vocabulary + self.positions + 2) * self.hidden


@dataclass(frozen=True)
class Work:
    """One update of one process."""

    processes: int
    queries: int  # B
    group: int  # G
    query_tokens: int = 0  # of each
    passage_tokens: int = 0  # of each

    @property
    def candidates(self) -> int:
        """N."""
        return self.queries * self.group * self.processes

    @property
    def tokens(self) -> int:
        """T."""
        return self.queries * (self.query_tokens + self.group * self.passage_tokens)


@dataclass(frozen=True)
class Machine:
    """What one process gets: operations and bytes per second, seconds."""

    compute: float  # operations per second in the encoder
    loss: float  # in the loss's products, float32
    memory: float  # bytes per second of the loss's elementwise passes; infinite: contained in `loss`
    gather: float  # bytes per second received in the all-gather
    scatter: float  # and in the reduce-scatter
    reduce: float  # and in the all-reduce
    latency: float  # seconds of a collective with nothing in it
    update: float  # seconds per parameter: clipping and AdamW


def encoder_operations(shape: Shape, work: Work) -> float:
    """6 P_matrix T + 12 L D sum(T_i^2)."""
    squares = work.queries * (work.query_tokens**2 + work.group * work.passage_tokens**2)
    return 6 * shape.matrix_parameters * work.tokens + 12 * shape.layers * shape.hidden * squares


def loss_operations(shape: Shape, work: Work) -> int:
    """6 B N D: the product of B queries with N candidates, and two products of that size in backward."""
    return 6 * work.queries * work.candidates * shape.hidden


def gather_bytes(shape: Shape, work: Work) -> tuple[int, int]:
    """Received by a process: forward (W-1) (4 (B + R) D + 8 R), backward (W-1) 4 R D.

    Float32 vectors, int64 ids; backward has the candidates alone, for no built-in loss learns from
    other queries' vectors.
    """
    others, passages = work.processes - 1, work.queries * work.group
    forward = 4 * (work.queries + passages) * shape.hidden + 8 * passages
    return others * forward, others * 4 * passages * shape.hidden


def reduce_bytes(shape: Shape, processes: int) -> float:
    """DDP, ring: 2 (W-1)/W 4 P sent, and as much received, by a process."""
    return 2 * (processes - 1) / processes * 4 * shape.parameters


def fsdp_bytes(shape: Shape, processes: int, chunks: int = 0) -> float:
    """FSDP2 in float32: (W-1)/W 4 P for each all-gather of the weights and for the reduce-scatter of the gradient.

    The weights are gathered for forward and for backward; with GradCache twice forward and once backward per chunk.
    """
    return (max(3 * chunks, 2) + 1) * (processes - 1) / processes * 4 * shape.parameters


def step_seconds(shape: Shape, work: Work, machine: Machine, bytes_per_pair: float) -> dict[str, float]:
    """The five terms of an update, none hidden behind another."""
    forward, backward = gather_bytes(shape, work)
    pairs = work.queries * work.candidates
    gather = 4 * machine.latency + forward / machine.gather + backward / machine.scatter
    reduce = machine.latency + reduce_bytes(shape, work.processes) / machine.reduce
    return {
        "compute": encoder_operations(shape, work) / machine.compute,
        "gather": gather if work.processes > 1 else 0.0,
        "all-reduce": reduce if work.processes > 1 else 0.0,
        "loss": loss_operations(shape, work) / machine.loss + pairs * bytes_per_pair / machine.memory,
        "update": machine.update * shape.parameters,
    }


# ------------------------------------------------------------------------------------------------- one of W processes

SMALL = Shape(layers=4, hidden=256, intermediate=1024, vocabulary=8192, positions=128)
GLOBAL_QUERIES, GROUP, QUERY_TOKENS, PASSAGE_TOKENS = 16, 2, 16, 64
LOSS_ROWS, LOSS_CANDIDATES = 128, 1024  # of the measurement of the loss alone


def make_encoder() -> Encoder:
    """The small BERT, random weights, no dropout."""
    shape = {"vocab_size": SMALL.vocabulary, "hidden_size": SMALL.hidden, "num_hidden_layers": SMALL.layers}
    shape |= {"num_attention_heads": SMALL.hidden // 64, "intermediate_size": SMALL.intermediate}
    return random_encoder(shape | {"max_position_embeddings": SMALL.positions} | WITHOUT_DROPOUT)


def make_batch(num_queries: int, num_processes: int, seed: int = 0) -> Batch:
    """Random tokens; every text of its kind has the same length, so that nothing is padded."""
    lengths = [QUERY_TOKENS] * num_queries, [PASSAGE_TOKENS] * (num_queries * GROUP)
    return random_batch(*lengths, SMALL.vocabulary, seed, num_processes)


def make_loss_input(num_queries: int, num_candidates: int, dim: int) -> LossInput:
    """Random unit vectors that want a gradient."""

    def draw(rows: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, dim), dim=1).requires_grad_()

    query, own = draw(num_queries), torch.arange(num_queries * GROUP).reshape(num_queries, GROUP)
    ids = torch.arange(num_candidates)
    return LossInput(query, query, 0, draw(num_candidates), own[:, 0], own, ids, ids[own[:, :1]])


class BytesMoved(TorchDispatchMode):
    """Counts the bytes of every operation's tensors, read and written; views move nothing."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs, result)):
                if isinstance(tensor, torch.Tensor):
                    self.total += tensor.numel() * tensor.element_size()
        return result


@contextmanager
def counted_collectives() -> Iterator[dict[str, int]]:
    """Counts the bytes that this process receives from the others in the gather, by the sizes of the tensors."""
    counts = {"all_gather": 0, "reduce_scatter": 0}
    originals = {name: getattr(dist, name) for name in counts}

    def counting(name: str, the_list: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            parts = args[the_list]
            own = dist.get_rank() if dist.is_initialized() else 0
            counts[name] += sum(p.numel() * p.element_size() for i, p in enumerate(parts) if i != own)
            return originals[name](*args, **kwargs)

        return call

    dist.all_gather, dist.reduce_scatter = counting("all_gather", 0), counting("reduce_scatter", 1)
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def count(num_queries: int) -> dict[str, int]:
    """Operations of the loss and bytes of the gather of one process, forward and backward."""
    batch = make_batch(num_queries, world()[1], seed=world()[0])
    vectors = torch.randn(num_queries * (1 + GROUP), SMALL.hidden).requires_grad_()
    with counted_collectives() as received:
        x = loss_input(vectors, batch, cross_device=True)
        with FlopCounterMode(display=False) as counter:
            training_loss(x, LossConfig()).loss.backward()
    return {"operations": counter.get_total_flops(), **received}


def bytes_per_pair() -> float:
    """Bytes that the loss's elementwise passes move for each pair of a query and a candidate, forward and backward."""
    x = make_loss_input(64, 4096, 8)  # few dimensions: what moves is B x N, not vectors
    with BytesMoved() as moved:
        training_loss(x, LossConfig()).loss.backward()
    return moved.total / (64 * 4096)


def seconds(function: Callable[[], object]) -> float:
    """Median over repeats of the slowest process's time; two calls before do not count."""
    times = []
    for _ in range(REPEATS + 2):
        if world()[1] > 1:
            dist.barrier()
        times.append(harness.timed(function))
    every = gather_objects(times)
    return statistics.median(max(column) for column in list(zip(*every, strict=True))[2:])


def measure_constants() -> dict[str, float]:
    """Each constant of `Machine` alone, with all W processes busy."""
    world_size = world()[1]
    encoder, batch = make_encoder(), make_batch(GLOBAL_QUERIES // world_size, world_size)
    work = Work(world_size, GLOBAL_QUERIES // world_size, GROUP, QUERY_TOKENS, PASSAGE_TOKENS)
    alone = seconds(lambda: encoder(batch.tokens).sum().backward())
    found = {"compute": encoder_operations(SMALL, work) / alone}

    x = make_loss_input(LOSS_ROWS, LOSS_CANDIDATES, SMALL.hidden)
    operations = 6 * LOSS_ROWS * LOSS_CANDIDATES * SMALL.hidden
    found["loss"] = operations / seconds(lambda: training_loss(x, LossConfig()).loss.backward())

    optimizer = build_optimizer(encoder, 1e-5, 0.0, (0.9, 0.999), 1e-8)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()

    found["update"] = seconds(update) / SMALL.parameters
    if world_size > 1:
        small, large = torch.zeros(1), torch.zeros(1 << 20)  # 4 bytes and 4 MiB from each process
        whole, others = torch.zeros(SMALL.parameters), (world_size - 1) * large.numel() * 4

        def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
            return [torch.empty_like(tensor) for _ in range(world_size)]

        found["latency"] = seconds(lambda: dist.all_gather(parts(small), small))
        gathered, scattered = parts(large), parts(large)
        found["gather"] = others / (seconds(lambda: dist.all_gather(gathered, large)) - found["latency"])
        found["scatter"] = others / (seconds(lambda: dist.reduce_scatter(large, scattered)) - found["latency"])
        reduced = seconds(lambda: dist.all_reduce(whole)) - found["latency"]
        found["reduce"] = reduce_bytes(SMALL, world_size) / reduced
    return found


def measure_step() -> float:
    """Seconds of a whole update at the same global batch, through the project's own step."""
    rank, world_size = world()
    step = make_step(wrap(make_encoder()), StepSettings(cross_device=True), clip=True)
    batch = make_batch(GLOBAL_QUERIES // world_size, world_size, seed=rank)
    return seconds(lambda: step(batch))


def worker() -> None:
    """What one of W processes does; rank 0 prints one JSON line."""
    start()
    torch.manual_seed(0)
    rank, world_size = world()
    sizes = {"fixed_global": GLOBAL_QUERIES // world_size, "fixed_per_process": GLOBAL_QUERIES}
    result = {name: {"queries": queries, **count(queries)} for name, queries in sizes.items()}
    result |= {"bytes_per_pair": bytes_per_pair(), "constants": measure_constants(), "step": measure_step()}
    if rank == 0:
        print(json.dumps(result), flush=True)


def measure_all() -> Row:
    """What W workers of one thread each found, for every W."""
    load = round(os.getloadavg()[0], 1)  # near 0 on a quiet machine
    found = {}
    for w in PROCESSES:
        said = harness.run(harness.torchrun(w, __file__, "--worker"), threads=1).stdout
        found[str(w)] = json.loads(next(line for line in said.splitlines() if line.startswith('{"fixed_global"')))

    def of(name: str) -> Row:
        return {w: one[name] for w, one in found.items()}

    counts = {name: of(name) for name in ("fixed_global", "fixed_per_process")}
    record = harness.facts(repeats=REPEATS, load=load, counts=counts, bytes_per_pair=found["1"]["bytes_per_pair"])
    return record | {"constants": of("constants"), "step": of("step")}


# --------------------------------------------------------------------------------------------------------- the tables

Cells = list[list[str]]


def size(num_bytes: float) -> str:
    """As GB, MB or KB (powers of ten)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}" if num_bytes < 1000 * scale else f"{num_bytes / scale:,.0f} {unit}"
    return f"{num_bytes:.0f}"


def milliseconds(seconds: float) -> str:
    """Two significant digits and more."""
    value = 1000 * seconds
    return "0" if value == 0 else f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def count_rows(results: Row) -> Cells:
    """Counted against the formulas."""
    rows = []
    for kind in ("fixed_global", "fixed_per_process"):
        for w in PROCESSES:
            found = results["counts"][kind][str(w)]
            work = Work(w, found["queries"], GROUP, QUERY_TOKENS, PASSAGE_TOKENS)
            operations, received = loss_operations(SMALL, work), sum(gather_bytes(SMALL, work))
            numbers = (found["operations"], operations, w * operations, found["all_gather"] + found["reduce_scatter"])
            cells = [f"{w * work.queries}", str(w), str(work.queries), str(work.candidates)]
            rows.append([*cells, *(f"{number:,}" for number in (*numbers, received))])
    return rows


def constant_rows(results: Row) -> Cells:
    """What was measured alone."""
    rows = []
    for w, found in results["constants"].items():
        rates = [f"{found[name] / 1e6:,.0f}" if name in found else "-" for name in ("gather", "scatter", "reduce")]
        latency = f"{1e3 * found['latency']:.2g}" if "latency" in found else "-"
        compute, loss = f"{found['compute'] / 1e9:.1f}", f"{found['loss'] / 1e9:.1f}"
        rows.append([w, compute, loss, f"{1e9 * found['update']:.2f}", latency, *rates])
    return rows


def check_rows(results: Row) -> Cells:
    """The sum of the terms against the measured step."""
    rows = []
    for w in PROCESSES:
        found = {name: results["constants"][str(w)].get(name, math.inf) for name in Machine.__dataclass_fields__}
        work = Work(w, GLOBAL_QUERIES // w, GROUP, QUERY_TOKENS, PASSAGE_TOKENS)
        terms = step_seconds(SMALL, work, Machine(**found), results["bytes_per_pair"])
        total, measured = sum(terms.values()), results["step"][str(w)]
        times = [*terms.values(), total, measured]
        rows.append([str(w), *map(milliseconds, times), f"{total / measured:.2f}"])
    return rows


Tables = dict[str, Callable[[Row], Cells]]
ROWS: Tables = {
    "counts": count_rows,
    "constants": constant_rows,
    "check": check_rows,
}
STAMPS = {
    "en": "`python benchmarks/scaling.py`; medians of {repeats} repeats, one thread per process; {machine}, "
    "load {load} before the start; torch {torch}; {date}",
    "zh": "`python benchmarks/scaling.py`；{repeats} 次重复取中位数，每进程一个线程；{machine}，"
    "开始前负载 {load}；torch {torch}；{date}",
}


def with_tables(page: str, language: str, tables: Tables, results: Row) -> str:
    """The page with the rows of the tables between its markers made anew; what was timed says where and when."""
    for name, rows_of in tables.items():
        inside = rf"(<!-- {name} -->\n.*\n.*\n)(?s:.*?)(\n<!-- /{name} -->)"  # its two head lines stay
        rows = "\n".join("| " + " | ".join(cells) + " |" for cells in rows_of(results))
        rows += "\n\n" + STAMPS[language].format(**results) if name in ("constants", "check") else ""
        page, found = re.subn(inside, rf"\g<1>{rows}\g<2>", page)
        assert found == 1, f"{language}: no marker {name}"
    return page


def write_tables(tables: Tables, results: Row) -> None:
    """Into both pages."""
    for language, file in DOCS.items():
        page = with_tables(file.read_text(encoding="utf-8"), language, tables, results)
        file.write_text(page, encoding="utf-8")


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--tables", action="store_true", help="write the tables from the figures that are there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker()
        return
    if not args.tables:
        harness.save("scaling", measure_all())
    write_tables(ROWS, json.loads(RESULTS.read_text(encoding="utf-8")))
    print("wrote the tables of", *DOCS.values())


if __name__ == "__main__":
    main()
