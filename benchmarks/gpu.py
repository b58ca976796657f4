"""One GPU, bge-large's shape with random weights: training and encoding packed, against padded SDPA and flash-attn.

    python benchmarks/gpu.py [--minutes 8]          needs torch, transformers and accelerate; faiss-gpu is used if there

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

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import BertConfig, BertModel  # noqa: E402

from bge_core.encoder.model import Encoder, compile_layers  # noqa: E402
from bge_core.encoder.settings import EncoderSettings  # noqa: E402
from bge_core.encoder.tokens import Tokens, pad_buckets  # noqa: E402
from bge_core.loss import LossConfig  # noqa: E402
from bge_core.training.batch import Batch  # noqa: E402
from bge_core.training.optim import build_optimizer  # noqa: E402
from bge_core.training.step import StepSettings, forward_backward  # noqa: E402

# Every twentieth of the sorted lengths, in tokens with [CLS] and [SEP].
SENTENCES = [3, 13, 16, 19, 22, 24, 26, 29, 31, 34, 36, 39, 42, 46, 49, 54, 59, 66, 76, 95, 476]
QUESTIONS = [8, 11, 12, 13, 13, 14, 15, 15, 16, 16, 17, 18, 18, 19, 20, 21, 23, 24, 27, 31, 62]
SCALE = 512 / SENTENCES[-1]
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
VOCABULARY = 21_128
REPEATS = 3


class Padded(nn.Module):
    """The same backbone and CLS vectors on padded rectangles: the first `num_queries` texts, and the others."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone, self.num_queries = backbone, 0

    def forward(self, tokens: Tokens) -> Tensor:
        lengths, cut = tokens.lengths, sum(tokens.lengths[: self.num_queries])
        queries = Tokens(tokens.input_id_T[:cut], lengths[: self.num_queries])
        passages = Tokens(tokens.input_id_T[cut:], lengths[self.num_queries :])
        vectors = []
        for part in (queries, passages):
            for order, id_sL, mask_sL in pad_buckets(part, 0, max_waste=1.0):
                vector_sD = self.backbone(input_ids=id_sL, attention_mask=mask_sL).last_hidden_state[:, 0].float()
                vectors.append(vector_sD[torch.tensor(order, device=vector_sD.device).argsort()])
        return F.normalize(torch.cat(vectors), dim=-1)


def draw_lengths(quantiles: list[int], count: int, generator: torch.Generator) -> list[int]:
    """Lengths with the distribution of the quantiles, scaled, 3 to 512."""
    place = torch.rand(count, generator=generator) * (len(quantiles) - 1)
    low, share = place.long(), place - place.long()
    table = torch.tensor([*quantiles, quantiles[-1]], dtype=torch.float)
    lengths = (table[low] * (1 - share) + table[low + 1] * share) * SCALE
    return lengths.round().clamp(3, 512).long().tolist()


def make_batch(queries: int, group: int, device: torch.device) -> Batch:
    """Random tokens, real lengths."""
    generator = torch.Generator().manual_seed(queries + group)
    lengths = draw_lengths(QUESTIONS, queries, generator) + draw_lengths(SENTENCES, queries * group, generator)
    ids = torch.randint(5, VOCABULARY, (sum(lengths),), generator=generator)
    passage_ids = torch.arange(queries * group)
    own = passage_ids.view(queries, group)
    counts = [(queries, queries * group)]
    return Batch(Tokens(ids, lengths).to(device), own, passage_ids, own[:, :1], None, counts, list(range(queries)))


class Bench:
    """Times what it is given, while there is time."""

    def __init__(self, minutes: float) -> None:
        self.end, self.cuda = time.perf_counter() + 60 * minutes, torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")

    def seconds(self, function: Callable[[], object]) -> float | str:
        """Median of REPEATS after one call, or why there is none."""
        if time.perf_counter() > self.end:
            return "not measured: no time left"
        times = []
        try:
            for _ in range(REPEATS + 1):
                if self.cuda:
                    torch.cuda.synchronize()
                begin = time.perf_counter()
                function()
                if self.cuda:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
        except torch.OutOfMemoryError:
            return "out of memory"
        finally:
            if self.cuda:
                torch.cuda.empty_cache()
        return statistics.median(times[1:])


def make_model(way: str, shape: dict[str, int], attention_dropout: float, device: torch.device) -> Any:
    """Random weights, the same for every way."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCABULARY, attention_probs_dropout_prob=attention_dropout, **shape)
    backbone = BertModel(config, add_pooling_layer=False)
    if way == "padded":
        return Padded(backbone).to(device).train()
    settings = EncoderSettings(pooling="cls", normalize=True)
    tokenizer = SimpleNamespace(pad_token_id=0)
    if way == "compiled":
        compile_layers(backbone)
    return Encoder(backbone, tokenizer, settings, "flash" if way == "flash" else "auto").to(device).train()


def train_case(
    bench: Bench, way: str, shape: dict[str, int], dtype: torch.dtype, batch_size: int, group: int, dropout: float
) -> dict[str, Any]:
    """A training step: seconds, tokens per second, TFLOP/s, memory."""
    model, batch = make_model(way, shape, dropout, bench.device), make_batch(batch_size, group, bench.device)
    optimizer = build_optimizer(model, 1e-5, 0.01, (0.9, 0.999), 1e-8)
    scaler = torch.amp.GradScaler(bench.device.type, enabled=dtype == torch.float16 and bench.cuda)
    cached = batch_size * group > 32 * 8
    if way == "padded" and not cached:
        model.num_queries = batch_size
    settings = StepSettings(
        loss_config=LossConfig(), chunk_size=32 * 9 if cached else None, scaler=scaler,
        autocast=lambda: torch.autocast(bench.device.type, dtype),
    )  # fmt: skip

    def step() -> None:
        forward_backward(model, [batch], settings)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = bench.seconds(step)
    case = {
        "way": way, "dtype": str(dtype)[6:], "batch": batch_size, "group": group, "attention_dropout": dropout,
        "gradcache": cached, "seconds": seconds,
    }  # fmt: skip
    if not isinstance(seconds, str):
        tokens = sum(batch.tokens.lengths)
        matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embedding" not in n)
        if way != "padded":  # 10 of the last layer's 12 D x D products are for first tokens alone
            matrices *= 1 - 10 / 12 / shape["num_hidden_layers"]
        case |= {
            "tokens_per_second": round(tokens / seconds),
            "tflops": (8 if cached else 6) * matrices * tokens / seconds / 1e12,
            "memory_gb": torch.cuda.max_memory_allocated() / 2**30 if bench.cuda else None,
        }
    return case


def encode_case(bench: Bench, way: str, shape: dict[str, int], texts: int) -> dict[str, Any]:
    """bf16 encoding of sentences, sorted by length, 16,384 tokens (padded: 64 texts) at a time."""
    model = make_model(way, shape, 0.0, bench.device).eval()
    lengths = sorted(draw_lengths(SENTENCES, texts, torch.Generator().manual_seed(0)))
    tokens = Tokens(torch.randint(5, VOCABULARY, (sum(lengths),)), lengths)
    batches = tokens.split(64 if way == "padded" else None, None if way == "padded" else 16_384)

    def run() -> None:
        with torch.inference_mode(), torch.autocast(bench.device.type, torch.bfloat16):
            for batch in batches:
                model(batch.to(bench.device)).cpu()

    seconds = bench.seconds(run)
    speed = {} if isinstance(seconds, str) else {"texts_per_second": round(texts / seconds, 1)}
    return {"way": way, "texts": texts, "seconds": seconds} | speed


def search_case(bench: Bench, rows: int, size: int) -> dict[str, Any]:
    """Exact search of 1,000 queries among `rows` vectors on the GPU."""
    try:
        from bge_core.search.exact import exact_search, gpu_available

        if not gpu_available():
            return {"not measured": "faiss has no GPU here"}
    except Exception as error:  # no faiss at all
        return {"not measured": str(error)}
    vectors = F.normalize(torch.randn(rows, size), dim=1).numpy()
    seconds = bench.seconds(lambda: exact_search(vectors[:1000], vectors, 100, use_gpu=True))
    return {"queries": 1000, "rows": rows, "size": size, "k": 100, "seconds": seconds}


def keep(result: dict[str, Any], bench: Bench) -> None:
    """Write what there is so far: a run that is cut off loses one case."""
    if bench.cuda:
        (ROOT / "benchmarks/results/gpu.json").write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    """Everything, the most telling cases first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--tiny", action="store_true", help="a small model and small batches: does it run?")
    args = parser.parse_args()
    bench = Bench(args.minutes)
    shape, small = (TINY, 4) if args.tiny else (LARGE, 1)
    side = 8192 // (8 if args.tiny else 1)
    a = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
    peak_seconds = bench.seconds(lambda: a @ a)
    peak = 2 * side**3 / peak_seconds / 1e12 if not isinstance(peak_seconds, str) else float("nan")
    ways = ["packed", "padded"]
    try:
        import flash_attn  # noqa: F401

        ways.append("flash")
    except ImportError:
        pass
    cases = [(torch.bfloat16, 32, 8, 0.0), (torch.bfloat16, 32, 2, 0.0), (torch.bfloat16, 128, 8, 0.0),
             (torch.bfloat16, 128, 2, 0.0), (torch.float16, 32, 8, 0.0), (torch.bfloat16, 32, 8, 0.1),
             (torch.bfloat16, 512, 2, 0.0), (torch.bfloat16, 512, 8, 0.0), (torch.float16, 32, 2, 0.0)]  # fmt: skip
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if bench.cuda else "CPU, not a figure of a GPU",
        "torch": torch.__version__, "date": str(date.today()), "peak_tflops": peak, "seed": 0,
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]), "train": [], "encode": [],
    }  # fmt: skip
    for dtype, batch_size, group, dropout in cases:
        for way in ways:
            case = train_case(bench, way, shape, dtype, batch_size // small, group, dropout)
            result["train"].append(case)
            print(json.dumps(case), file=sys.stderr, flush=True)
            keep(result, bench)
        if dtype == torch.bfloat16 and (batch_size, group, dropout) == (32, 8, 0.1):
            result["train"].append(train_case(bench, "compiled", shape, dtype, batch_size // small, group, 0.0))
        if dtype == torch.bfloat16 and (batch_size, group, dropout) == (32, 2, 0.0):
            result["encode"] = [encode_case(bench, way, shape, 2048 // small) for way in ways]
            result["search"] = search_case(bench, 1_000_000, 1024)
    keep(result, bench)
    print(f"{result['device']}, torch {result['torch']}, peak {peak:.0f} TFLOP/s")
    for case in result["train"]:
        same = [c for c in result["train"] if c["way"] == "padded" and all(
            c[key] == case[key] for key in ("dtype", "batch", "group", "attention_dropout"))]  # fmt: skip
        speed = ""
        if "tflops" in case:
            speed = (
                f"{case['seconds']:.3f} s, {case['tokens_per_second']:,} tokens/s, {case['tflops'] / peak:.2f} of peak"
            )
            if case["way"] != "padded" and same and "tflops" in same[0]:
                speed += f", {same[0]['seconds'] / case['seconds']:.2f} x padded"
        name = f"{case['way']:<7} {case['dtype']:<9} batch {case['batch']:>3} x {case['group']}"
        print(f"{name}, dropout {case['attention_dropout']:g}: {speed or case['seconds']}")
    for case in [*result["encode"], result["search"]]:
        print(json.dumps(case))


if __name__ == "__main__":
    main()
