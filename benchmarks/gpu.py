"""One GPU, bge-large's shape with random weights: training and encoding packed, against padded SDPA and flash-attn.

    python benchmarks/gpu.py [--minutes 8]          needs torch, transformers and accelerate alone

Texts have the lengths of CMRC 2018's questions and sentences, scaled so that the longest sentence has 512 tokens. Steps
are forward_backward and the update, AdamW, hidden dropout 0.1, attention dropout 0 (and 0.1 once). Larger batches go
through GradCache, padded and packed alike, as many texts at a time as the batch 32 has. In turn:

    padded    a rectangle of the queries and one of the passages, each padded to its longest text: transformers' SDPA,
              as trainers without packing do it
    packed    ours, the kernel that kernels.py chooses;  flash: the same with flash-attn, if it is installed
    compiled  packed with --torch_compile, once

TFLOP/s: 6 x matrix parameters x real tokens of the step, without attention and without what the last layer leaves out
(8 x with GradCache, whose second forward is counted). `peak` is a bf16 product of two 8,192 x 8,192 matrices in the
same run. What --minutes leave no time for is listed as not measured. Writes benchmarks/results/gpu.json and prints a
table.
"""

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import harness
import torch
from harness import Row
from models import LARGE, VOCABULARY, Padded, make_step, random_batch, random_bert, random_encoder
from torch import nn

from bge_core.encoder.model import compile_layers
from bge_core.encoder.tokens import Tokens
from bge_core.loss import LossConfig
from bge_core.training.step import StepSettings

# Every twentieth of the sorted lengths, in tokens with [CLS] and [SEP].
SENTENCES = [3, 13, 16, 19, 22, 24, 26, 29, 31, 34, 36, 39, 42, 46, 49, 54, 59, 66, 76, 95, 476]
QUESTIONS = [8, 11, 12, 13, 13, 14, 15, 15, 16, 16, 17, 18, 18, 19, 20, 21, 23, 24, 27, 31, 62]
SCALE = 512 / SENTENCES[-1]
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
REPEATS = 3
BF16, FP16 = torch.bfloat16, torch.float16
CASES = [  # precision, queries, group size, attention dropout: the most telling first
    (BF16, 32, 8, 0.0),
    (BF16, 32, 2, 0.0),
    (BF16, 128, 8, 0.0),
    (BF16, 128, 2, 0.0),
    (FP16, 32, 8, 0.0),
    (BF16, 32, 8, 0.1),
    (BF16, 512, 2, 0.0),
    (BF16, 512, 8, 0.0),
    (FP16, 32, 2, 0.0),
]


def draw_lengths(quantiles: list[int], count: int, generator: torch.Generator) -> list[int]:
    """Lengths with the distribution of the quantiles, scaled, 3 to 512."""
    place = torch.rand(count, generator=generator) * (len(quantiles) - 1)
    low, share = place.long(), place - place.long()
    table = torch.tensor([*quantiles, quantiles[-1]], dtype=torch.float)
    lengths = (table[low] * (1 - share) + table[low + 1] * share) * SCALE
    return lengths.round().clamp(3, 512).long().tolist()


class Bench:
    """Times what it is given, while there is time."""

    def __init__(self, minutes: float) -> None:
        self.end, self.cuda = time.perf_counter() + 60 * minutes, torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")

    def seconds(self, function: Callable[[], object]) -> float | str:
        """Median of REPEATS after one call, or why there is none."""
        if time.perf_counter() > self.end:
            return "not measured: no time left"

        def whole() -> None:
            function()
            if self.cuda:
                torch.cuda.synchronize()

        try:
            return statistics.median([harness.timed(whole) for _ in range(REPEATS + 1)][1:])
        except torch.OutOfMemoryError:
            return "out of memory"
        finally:
            if self.cuda:
                torch.cuda.empty_cache()


def make_model(way: str, shape: dict[str, int], dropout: float, num_queries: int, device: torch.device) -> nn.Module:
    """Random weights, the same for every way; padded: the first `num_queries` texts are a rectangle of their own."""
    sizes = shape | {"attention_probs_dropout_prob": dropout}
    if way != "padded":
        encoder = random_encoder(sizes, "flash" if way == "flash" else "auto")
        if way == "compiled":
            compile_layers(encoder.backbone)
        return encoder.to(device)

    def parts(tokens: Tokens) -> list[Tokens]:
        cut = sum(tokens.lengths[:num_queries])
        halves = [Tokens(tokens.input_id_T[:cut], tokens.lengths[:num_queries])] if num_queries else []
        return [*halves, Tokens(tokens.input_id_T[cut:], tokens.lengths[num_queries:])]

    return Padded(random_bert(sizes), "cls", parts).to(device).train()


def train_case(
    bench: Bench, way: str, shape: dict[str, int], dtype: torch.dtype, queries: int, group: int, dropout: float
) -> Row:
    """A training step: seconds, tokens per second, TFLOP/s, memory."""
    cached = queries * group > 32 * 8
    model = make_model(way, shape, dropout, 0 if cached else queries, bench.device)
    generator = torch.Generator().manual_seed(queries + group)
    lengths = draw_lengths(QUESTIONS, queries, generator), draw_lengths(SENTENCES, queries * group, generator)
    batch = random_batch(*lengths, VOCABULARY, seed=queries + group)
    scaler = torch.amp.GradScaler(bench.device.type, enabled=dtype == FP16 and bench.cuda)
    autocast, chunk_size = (lambda: torch.autocast(bench.device.type, dtype)), 32 * 9 if cached else None
    settings = StepSettings(loss_config=LossConfig(), chunk_size=chunk_size, scaler=scaler, autocast=autocast)
    on_device, step = replace(batch, tokens=batch.tokens.to(bench.device)), make_step(model, settings)
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = bench.seconds(lambda: step(on_device))
    case: Row = {"way": way, "dtype": str(dtype)[6:], "batch": queries, "group": group, "attention_dropout": dropout}
    case |= {"gradcache": cached, "seconds": seconds}
    if isinstance(seconds, str):
        return case
    tokens = sum(batch.tokens.lengths)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embedding" not in n)
    if way != "padded":  # 10 of the last layer's 12 D x D products are for first tokens alone
        matrices *= 1 - 10 / 12 / shape["num_hidden_layers"]
    tflops = (8 if cached else 6) * matrices * tokens / seconds / 1e12
    memory = torch.cuda.max_memory_allocated() / 2**30 if bench.cuda else None
    return case | {"tokens_per_second": round(tokens / seconds), "tflops": tflops, "memory_gb": memory}


def encode_case(bench: Bench, way: str, shape: dict[str, int], texts: int) -> Row:
    """bf16 encoding of sentences, sorted by length, 16,384 tokens (padded: 64 texts) at a time."""
    model = make_model(way, shape, 0.0, 0, bench.device).eval()
    lengths = sorted(draw_lengths(SENTENCES, texts, torch.Generator().manual_seed(0)))
    tokens = Tokens(torch.randint(5, VOCABULARY, (sum(lengths),)), lengths)
    batches = tokens.split(64, None) if way == "padded" else tokens.split(None, 16_384)

    def run() -> None:
        with torch.inference_mode(), torch.autocast(bench.device.type, BF16):
            for batch in batches:
                model(batch.to(bench.device)).cpu()

    seconds = bench.seconds(run)
    speed = {} if isinstance(seconds, str) else {"texts_per_second": round(texts / seconds, 1)}
    return {"way": way, "texts": texts, "seconds": seconds} | speed


def line_of(case: Row, cases: list[Row], peak: float) -> str:
    """A case as a person reads it, with its ratio to the same one padded."""
    alike = ("dtype", "batch", "group", "attention_dropout")
    same = [c for c in cases if c["way"] == "padded" and all(c[key] == case[key] for key in alike)]
    speed = case["seconds"]
    if "tflops" in case:
        speed = f"{speed:.3f} s, {case['tokens_per_second']:,} tokens/s, {case['tflops'] / peak:.2f} of peak"
        if case["way"] != "padded" and same and "tflops" in same[0]:
            speed += f", {same[0]['seconds'] / case['seconds']:.2f} x padded"
    name = f"{case['way']:<8} {case['dtype']:<9} batch {case['batch']:>3} x {case['group']}"
    return f"{name}, dropout {case['attention_dropout']:g}: {speed}"


def main() -> None:
    options = harness.parser(__doc__, "results")
    options.add_argument("--minutes", type=float, default=7.5)
    options.add_argument("--tiny", action="store_true", help="a small model and small batches: does it run?")
    args = options.parse_args()
    bench, (shape, small) = Bench(args.minutes), (TINY, 4) if args.tiny else (LARGE, 1)
    side = 8192 // (8 if args.tiny else 1)
    a = torch.randn(side, side, device=bench.device, dtype=BF16)
    peak_seconds = bench.seconds(lambda: a @ a)
    peak = 2 * side**3 / peak_seconds / 1e12 if not isinstance(peak_seconds, str) else float("nan")
    ways = ["packed", "padded", *(["flash"] if importlib.util.find_spec("flash_attn") else [])]
    result = harness.facts(peak_tflops=peak, seed=0, train=[], encode=[])

    def keep() -> None:
        """A run that is cut off loses one case."""
        if bench.cuda:
            harness.save("gpu", result, folder=args.results)

    for dtype, queries, group, dropout in CASES:
        some = [*ways, "compiled"] if (dtype, queries, group, dropout) == CASES[0] else ways
        for way in some:
            result["train"].append(train_case(bench, way, shape, dtype, queries // small, group, dropout))
            print(json.dumps(result["train"][-1]), file=sys.stderr, flush=True)
            keep()
        if (dtype, queries, group, dropout) == CASES[1]:
            result["encode"] = [encode_case(bench, way, shape, 2048 // small) for way in ways]
    keep()
    print(f"{result['machine']}, torch {result['torch']}, peak {peak:.0f} TFLOP/s")
    for case in result["train"]:
        print(line_of(case, result["train"], peak))
    for case in result["encode"]:
        print(json.dumps(case))


if __name__ == "__main__":
    main()
