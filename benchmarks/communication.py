"""What training on 8 GPUs and on several nodes costs: bytes and seconds by term.

    python benchmarks/communication.py      prints the tables, and writes them into docs/scaling.md and its Chinese twin

Nothing here was run on more than one GPU. The step is measured on one H200 (benchmarks/results/gpu.json), the networks
are what others measured and published (docs/scaling.md names each source), and the rest is arithmetic: bytes by the
formulas of scaling.py, which are counted on up to 4 processes, divided by those rates.

A rate is a bus bandwidth as nccl-tests define it: bytes that a ring passes from GPU to GPU, (W-1)/W of the message in
an all-gather or a reduce-scatter, twice that in an all-reduce, over the time. It falls with the size of the message.
"""

import json
import math
from dataclasses import dataclass

import scaling
from harness import RESULTS, Row, parser
from scaling import Cells, Shape, Work, milliseconds, reduce_bytes, size

MB = 2**20
BUCKET_BYTES = 25 * MB  # of torch's DDP: gradients are reduced in parts of this size, as backward makes them
MODELS = {
    "bge-small-zh": Shape(4, 512, 2048, 21_128),
    "bge-base-zh": Shape(12, 768, 3072, 21_128),
    "bge-large-zh": Shape(24, 1024, 4096, 21_128),
    "bge-large-en": Shape(24, 1024, 4096, 30_522),
    "bge-m3": Shape(24, 1024, 4096, 250_002, 8192),
}
LARGE = MODELS["bge-large-zh"]

# Bus bandwidth of an all-reduce, GB/s, by the size of the message in MiB: 8 B200 in a node, and four such nodes with
# 8 x 400 Gb/s each. Only the shape of the curve is used here, its end is that of each network.
ONE_NODE = {1: 36.06, 2: 63.09, 4: 76.48, 8: 126.49, 16: 254.96, 32: 325.97, 64: 400.60, 128: 568.38, 256: 646.11}
ONE_NODE |= {512: 688.99, 1024: 723.34, 2048: 734.97, 4096: 740.64, 8192: 839.07, 16384: 845.67}
FOUR_NODES = {1: 5.37, 2: 10.38, 4: 18.90, 8: 35.12, 16: 64.43, 32: 91.19, 64: 156.74, 128: 197.94, 256: 229.09}
FOUR_NODES |= {512: 326.90, 1024: 361.99, 2048: 372.42, 4096: 377.34, 8192: 380.39, 16384: 381.80}
FLAT = {1: 1.0}  # a slow network is full with small messages, too


@dataclass(frozen=True)
class Network:
    """W GPUs and what joins them: bus bandwidths of very large messages, bytes per second."""

    gpus: int
    all_reduce: float
    gather: float  # all-gather and reduce-scatter
    latency: float  # seconds of an all-reduce of a few numbers
    curve: dict[int, float]

    def share(self, message: float) -> float:
        """Of the bandwidth that a message of this many bytes reaches: straight lines over the logarithm of its size."""
        sizes = sorted(self.curve)
        x = min(max(message / MB, sizes[0]), sizes[-1])
        low = max(s for s in sizes if s <= x)
        high = min(s for s in sizes if s >= x)
        part = math.log(x / low) / math.log(high / low) if high > low else 0.0
        return ((1 - part) * self.curve[low] + part * self.curve[high]) / self.curve[sizes[-1]]

    def all_reduce_seconds(self, message: float) -> float:
        """2 (W-1)/W of the message at its rate, and the latency."""
        moved = 2 * (self.gpus - 1) / self.gpus * message
        return self.latency + moved / (self.all_reduce * self.share(message))

    def gather_seconds(self, message: float) -> float:
        """Of an all-gather or a reduce-scatter; the message is what all ranks have together."""
        moved = (self.gpus - 1) / self.gpus * message
        return self.latency + moved / (self.gather * self.share(message))


NETWORKS = {
    "8, NVLink": Network(8, 473e9, 366e9, 13e-6, ONE_NODE),
    "2 x 8, 8 x 400 Gb/s": Network(16, 463e9, 360e9, 47e-6, FOUR_NODES),
    "4 x 8, 8 x 400 Gb/s": Network(32, 365e9, 360e9, 47e-6, FOUR_NODES),
    "4 x 8, 100 Gb/s RDMA": Network(32, 12e9, 12e9, 1e-4, FLAT),
    "4 x 8, 100 Gb/s TCP": Network(32, 5e9, 5e9, 1e-4, FLAT),
    "2 x 8, 25 Gb/s TCP": Network(16, 1.7e9, 1.7e9, 1e-4, FLAT),
}
# NVIDIA, H200 data sheet: float32 without tensor cores, memory. The shares of them are assumed.
LOSS_RATE, MEMORY_RATE = 0.6 * 67e12, 0.7 * 4.8e12


@dataclass(frozen=True)
class Step:
    """A step of bge-large's shape on one H200: measured, and what CUDA graphs aim at."""

    seconds: float
    aim: float  # seconds
    tokens: int
    queries: int
    group: int
    chunks: int  # of GradCache; 1: without

    def window(self, seconds: float) -> float:
        """Of a step, the backward that DDP's reduction can hide behind: the last chunk's.

        Backward is 2 of 3 equal parts of the arithmetic, with GradCache 2 of 4.
        """
        return seconds * (2 / 3 if self.chunks == 1 else 2 / 4 / self.chunks)


AIMS = {(32, 2): 0.30, (32, 8): 0.55, (128, 8): 0.60}  # of the measured time; not reached by any measurement yet


def steps() -> dict[str, Step]:
    """The packed bf16 steps of benchmarks/results/gpu.json, smallest first."""
    found = {}
    for case in json.loads((RESULTS / "gpu.json").read_text(encoding="utf-8"))["train"]:
        queries, group = case["batch"], case["group"]
        if case["way"] == "packed" and (queries, group) in AIMS:
            chunks = math.ceil(queries * (1 + group) / (32 * 9)) if case["gradcache"] else 1
            seconds, tokens = case["seconds"], round(case["tokens_per_second"] * case["seconds"])
            name = f"{queries} x {group}" + (", GradCache" if case["gradcache"] else "")
            found[name] = Step(seconds, AIMS[queries, group] * seconds, tokens, queries, group, chunks)
    return dict(sorted(found.items(), key=lambda item: item[1].seconds))


# ----------------------------------------------------------------------------------------------------------- the terms


def flat_reduction(shape: Shape, network: Network) -> float:
    """Seconds of one all-reduce of the whole gradient in float32."""
    return network.all_reduce_seconds(4 * shape.parameters)


def embedding_bytes(shape: Shape) -> int:
    """Of the embeddings' gradient: the last that backward makes, so that nothing is left to hide its reduction."""
    return 4 * (shape.vocabulary + shape.positions + 2) * shape.hidden


def ddp_reduction(shape: Shape, network: Network, window: float = 0.0) -> float:
    """Seconds of DDP's reductions that no backward hides, bucket by bucket, the embeddings last."""
    last = network.all_reduce_seconds(embedding_bytes(shape))
    buckets = (4 * shape.parameters - embedding_bytes(shape)) / BUCKET_BYTES
    return max(last, buckets * network.all_reduce_seconds(BUCKET_BYTES) + last - window)


def vectors_exchange(shape: Shape, network: Network, queries: int, group: int) -> float:
    """Seconds of the gather of queries, passages and ids, and of the reduce-scatter of the passages' gradients."""
    of_all = network.gpus * queries * 4 * shape.hidden
    messages = (of_all, of_all * group, network.gpus * queries * group * 8, of_all * group)
    return sum(map(network.gather_seconds, messages))


def loss_seconds(shape: Shape, work: Work, bytes_per_pair: float) -> float:
    """Products, and the elementwise passes over B x N pairs."""
    passes = work.queries * work.candidates * bytes_per_pair
    return scaling.loss_operations(shape, work) / LOSS_RATE + passes / MEMORY_RATE


def fsdp_seconds(shape: Shape, network: Network, chunks: int = 0) -> float:
    """Of FSDP2's all-gathers and its reduce-scatter, a layer at a time, none hidden."""
    moved = scaling.fsdp_bytes(shape, network.gpus, chunks)
    return moved / (network.gather * network.share(4 * shape.matrix_parameters / shape.layers))


# ---------------------------------------------------------------------------------------------------------- the tables


def network_rows(_: Row) -> Cells:
    """What was published, and what messages of 25 MiB and of bge-large's gradient reach of it."""
    rows = []
    for name, network in NETWORKS.items():
        rates = (network.all_reduce, network.gather)
        reached = (network.all_reduce * network.share(message) for message in (BUCKET_BYTES, 4 * LARGE.parameters))
        latency = f"{1e6 * network.latency:.0f}"
        rows.append([name, *(f"{rate / 1e9:.3g}" for rate in rates), latency, *(f"{r / 1e9:.3g}" for r in reached)])
    return rows


def term_rows(results: Row) -> Cells:
    """bge-large, 32 queries of 8 passages on each GPU, cross-device negatives."""
    rows = []
    for name, network in NETWORKS.items():
        work = Work(network.gpus, 32, 8)
        times = (flat_reduction(LARGE, network), ddp_reduction(LARGE, network))
        cells = [name, size(reduce_bytes(LARGE, network.gpus)), *map(milliseconds, times)]
        cells += [size(sum(scaling.gather_bytes(LARGE, work))), milliseconds(vectors_exchange(LARGE, network, 32, 8))]
        loss, matrix = loss_seconds(LARGE, work, results["bytes_per_pair"]), 4 * work.queries * work.candidates
        rows.append([*cells, f"{work.candidates:,}", milliseconds(loss), size(matrix), milliseconds(network.latency)])
    return rows


def model_rows(_: Row) -> Cells:
    """One reduction of the gradient, for the family's shapes."""
    rows = []
    for name, shape in MODELS.items():
        cells = [name, f"{shape.parameters / 1e6:.0f}", f"{embedding_bytes(shape) / (4 * shape.parameters):.0%}"]
        rows.append([*cells, *(milliseconds(flat_reduction(shape, network)) for network in NETWORKS.values())])
    return rows


def added(seconds: float, step: float) -> str:
    """In ms, and how many times as long the step is with it."""
    return f"{milliseconds(seconds)} (x {1 + seconds / step:.3g})"


def step_rows(_: Row) -> Cells:
    """What a step takes longer than on one GPU: DDP and today's time, one reduction and the time aimed at."""
    rows = []
    for step_name, step in steps().items():
        for name, network in NETWORKS.items():
            exchange = vectors_exchange(LARGE, network, step.queries, step.group) + network.latency  # the metrics, too
            ddp = ddp_reduction(LARGE, network, step.window(step.seconds)) + exchange
            flat = flat_reduction(LARGE, network) + exchange
            seconds = [f"{1000 * s:.0f}" for s in (step.seconds, step.aim)]
            cells = [added(ddp, step.seconds), added(flat, step.seconds), added(flat, step.aim)]
            rows.append([step_name, name, seconds[0], *cells[:2], seconds[1], cells[2]])
    return rows


def limit_rows(_: Row) -> Cells:
    """How long a step must be, and how many tokens a GPU needs for it, so that one reduction is a tenth of it."""
    case = steps()["32 x 8"]
    rows = []
    for name, network in NETWORKS.items():
        least = 10 * flat_reduction(LARGE, network)
        tokens = (least / seconds * case.tokens for seconds in (case.seconds, case.aim))
        rows.append([name, milliseconds(least), *(f"{float(f'{count:.2g}'):,.0f}" for count in tokens)])
    return rows


def fsdp_rows(_: Row) -> Cells:
    """Bytes and time of gradient and weights, DDP against FSDP2."""
    rows = []
    for name, network in NETWORKS.items():
        volumes = (reduce_bytes(LARGE, network.gpus), *(scaling.fsdp_bytes(LARGE, network.gpus, c) for c in (0, 4)))
        times = (ddp_reduction(LARGE, network), *(fsdp_seconds(LARGE, network, chunks) for chunks in (0, 4)))
        pairs = zip(volumes, times, strict=True)
        rows.append([name, *(cell for volume, time in pairs for cell in (size(volume), milliseconds(time)))])
    return rows


def loading_rows(_: Row) -> Cells:
    """As benchmarks/loading.py measured it."""
    found = json.loads((RESULTS / "loading.json").read_text(encoding="utf-8"))["now"]
    return [[ranks, f"{times['ms']:.0f}", f"{times['all_rows_ms']:.0f}"] for ranks, times in found.items()]


ROWS: scaling.Tables = {
    "loading": loading_rows,
    "networks": network_rows,
    "terms": term_rows,
    "models": model_rows,
    "steps": step_rows,
    "limits": limit_rows,
    "fsdp": fsdp_rows,
}


def main() -> None:
    parser(__doc__).parse_args()
    results = json.loads(scaling.RESULTS.read_text(encoding="utf-8"))
    for name, rows_of in ROWS.items():
        print(name, *(" | ".join(cells) for cells in rows_of(results)), sep="\n", end="\n\n")
    scaling.write_tables(ROWS, results)


if __name__ == "__main__":
    main()
