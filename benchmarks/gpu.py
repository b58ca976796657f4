"""One GPU, bge-large's shape with random weights: what graphs, compiled layers and a working copy bring, and are right.

    python benchmarks/gpu.py [--minutes 5]      needs torch, transformers and accelerate alone; can be run twice
    python benchmarks/gpu.py --cpu              the same functions uncaptured on a tiny shape: do they run? prints alone

Texts have the lengths of CMRC 2018's questions and sentences, scaled so that the longest sentence has 512 tokens. A
step is train.py's: a pinned parcel, forward and backward, clip, fused AdamW, figures read a step late; hidden dropout
0.1, attention dropout 0 (0.1 in one case). GradCache takes 288 texts at a time. The ways:

    before      rows of fixed shape, eager; made in the loop, pageable copies, figures read in their own step: the parts
                of main before graphs, as far as they are still there. benchmarks/results/gpu.json measured it whole
    rectangles  attention by rectangles of texts of about equal length, as on a CPU; else as `before`
    eager       rows of fixed shape from the data worker, figures read late
    graphs      CUDA graphs; `copy`: on a working copy in half precision; `compiled`: with compiled layers
    padded      a rectangle of the queries and one of the passages, each padded to its longest: transformers' SDPA
    sentence-transformers, FlagEmbedding    where installed: model and loss of theirs on the same batches, padded by
                column; autocast, clip and fused AdamW around them, as transformers' Trainer does

TFLOP/s: 6 x matrix parameters x real tokens of the step, without attention and without what the last layer leaves out
(8 x with GradCache, 2 x encoding). `peak` is a bf16 product of two 8,192 x 8,192 matrices in the same run. A case that
fails is written down with what it said, and a fresh process goes on with the next one (a broken capture may leave a
process unusable); --resume does so by hand. Writes benchmarks/results/gpu_ways.json after every case.
"""

import copy
import gc
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import Row
from models import LARGE, VOCABULARY, Padded, random_batch, random_bert, random_encoder
from torch import Tensor, nn

from bge_core.encoder.encode import run_batches
from bge_core.encoder.fixed import FixedRows, bucket_of
from bge_core.encoder.graphs import hold_passes
from bge_core.encoder.kernels import dropout_error, kernel_error, usable_kernels
from bge_core.encoder.rectangles import Rule
from bge_core.encoder.tokens import Tokens, pad_buckets
from bge_core.loss import LossConfig
from bge_core.runtime.distributed import clip_gradients
from bge_core.runtime.parcel import Parcel, pack
from bge_core.training.batch import Batch
from bge_core.training.graphs import GraphedEncoder
from bge_core.training.optim import build_optimizer, update_if_finite
from bge_core.training.progress import Reading
from bge_core.training.random_state import random_state, restore_random_state
from bge_core.training.step import StepSettings, forward_backward, loss_input, sum_figures

# Every twentieth of the sorted lengths, in tokens with [CLS] and [SEP].
SENTENCES = [3, 13, 16, 19, 22, 24, 26, 29, 31, 34, 36, 39, 42, 46, 49, 54, 59, 66, 76, 95, 476]
QUESTIONS = [8, 11, 12, 13, 13, 14, 15, 15, 16, 16, 17, 18, 18, 19, 20, 21, 23, 24, 27, 31, 62]
SCALE = 512 / SENTENCES[-1]
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
CHUNK = 288
BF16, FP16 = torch.bfloat16, torch.float16
GRAPHS: dict[str, dict[str, bool]] = {
    "graphs": {"working_copy": False},
    "graphs, copy": {},  # what --cuda_graphs gives
    "graphs, compiled": {"working_copy": False, "compiled": True},
    "graphs, compiled, copy": {"compiled": True},  # and --torch_compile
}
PEERS = ("sentence-transformers", "FlagEmbedding")
Case = tuple[str, int, int, torch.dtype, float]  # name, queries, group size, precision, attention dropout
GROUP2: Case = ("group 2", 32, 2, BF16, 0.0)
GROUP8: Case = ("group 8", 32, 8, BF16, 0.0)
GRADCACHE: Case = ("GradCache", 128, 8, BF16, 0.0)
TARGETS = {"group 2": (0.30, 0.35), "group 8": (0.55, 0.45), "GradCache": (0.60, 0.45)}  # share of time, of peak


def draw_lengths(quantiles: list[int], count: int, generator: torch.Generator) -> list[int]:
    """Lengths with the distribution of the quantiles, scaled, 3 to 512."""
    place = torch.rand(count, generator=generator) * (len(quantiles) - 1)
    low, share = place.long(), place - place.long()
    table = torch.tensor([*quantiles, quantiles[-1]], dtype=torch.float)
    lengths = (table[low] * (1 - share) + table[low + 1] * share) * SCALE
    return lengths.round().clamp(3, 512).long().tolist()


def lengths_of(queries: int, group: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Of the queries and the passages of a batch."""
    generator = torch.Generator().manual_seed(queries + group + seed)
    return draw_lengths(QUESTIONS, queries, generator), draw_lengths(SENTENCES, queries * group, generator)


class Bench:
    """Device, shape and size of a run, and what is timed on it."""

    def __init__(self, cpu: bool) -> None:
        self.cuda = not cpu
        self.device = torch.device("cpu" if cpu else "cuda")
        self.shape, self.small, self.rounds = (TINY, 32, 1) if cpu else (LARGE, 1, 3)
        self.vectors: Any = None  # of the eager encoding

    def make(self, function: Callable[..., Any], *given: Any) -> Any:
        """A model, its weights drawn on the device: the same ones every time."""
        with self.device:
            return function(*given)

    def wait(self) -> None:
        """Until the device has done all."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], object], in_a_row: int = 1) -> float:
        """Of one call, median of the rounds; within a round nobody waits between calls."""

        in_a_row = in_a_row if self.cuda else 1

        def whole() -> None:
            for _ in range(in_a_row):
                function()
            self.wait()

        return statistics.median(harness.timed(whole) for _ in range(self.rounds)) / in_a_row

    def memory(self) -> Row:
        """GiB: the most that tensors took, and what the process holds, memory of graphs included."""
        if not self.cuda:
            return {}
        used, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
        return {"memory_gb": used / 2**30, "held_gb": held / 2**30}

    def clean(self) -> None:
        """Before a case."""
        torch._dynamo.reset()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


# ----------------------------------------------------------------------------------------------------------- training


class Trainer:
    """A model in training by one of the ways, as train.py trains it; `step` goes through the batches in turn.

    Args:
        bench, way, case: see there.
        batches: so many, of different lengths.
        hidden_dropout: its probability.
    """

    def __init__(self, bench: Bench, way: str, case: Case, batches: int = 1, hidden_dropout: float = 0.1) -> None:
        self.bench, self.way, self.num_steps = bench, way, 0
        _, queries, group, self.dtype, dropout = case
        self.queries, self.cached = max(2, queries // bench.small), queries * group > 32 * 8
        sizes = {"attention_probs_dropout_prob": dropout, "hidden_dropout_prob": hidden_dropout}
        self.model, self.weights = self.build(bench.shape | sizes)
        self.chunk = (CHUNK // bench.small if self.cached else None) if way not in PEERS else None
        scaler = torch.amp.GradScaler(bench.device.type, enabled=self.dtype == FP16 and bench.cuda)
        self.settings = StepSettings(chunk_size=self.chunk, scaler=scaler, autocast=self.autocast)
        self.optimizer = build_optimizer(self.weights, 1e-5, 0.01, (0.9, 0.999), 1e-8)
        self.late = way not in ("before", "rectangles")
        self.batches = [self.batch(lengths_of(self.queries, group, seed)) for seed in range(batches)]
        self.pending: Reading | None = None

    def autocast(self) -> Any:
        """Of the case; for float32 none."""
        return torch.autocast(self.bench.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def build(self, sizes: dict[str, Any]) -> tuple[Any, nn.Module]:
        """The model of this way and the module that holds the weights: the same numbers for every way."""
        way = self.way
        if way in PEERS:
            return peer(way, self.bench.make(random_bert, sizes))
        if way == "padded":
            padded = Padded(self.bench.make(random_bert, sizes), "cls", self.columns).train()
            return padded, padded
        encoder = self.bench.make(random_encoder, sizes, "sdpa" if way == "rectangles" else "auto")
        half = None if self.dtype == torch.float32 else self.dtype
        return (GraphedEncoder(encoder, half, **GRAPHS[way]) if way in GRAPHS else encoder), encoder

    def columns(self, tokens: Tokens) -> list[Tokens]:
        """Queries and passages; with GradCache each chunk is a rectangle."""
        if self.cached or len(tokens) <= self.queries:
            return [tokens]
        cut = sum(tokens.lengths[: self.queries])
        ids, lengths = tokens.input_id_T, tokens.lengths
        return [Tokens(ids[:cut], lengths[: self.queries]), Tokens(ids[cut:], lengths[self.queries :])]

    def batch(self, lengths: tuple[list[int], list[int]]) -> Batch | Parcel:
        """As the data worker hands it over: a parcel; `before`: tensors."""
        batch: Any = random_batch(*lengths, VOCABULARY, seed=self.queries)
        self.num_tokens = sum(batch.tokens.lengths)
        if not self.late:
            return batch
        if self.way in PEERS:
            batch = columns_of(batch, self.way)
        if self.way == "eager" or self.way in GRAPHS:
            with self.autocast():
                rows = self.weights.fixed_rows()
            if rows is None and self.bench.cuda:
                raise RuntimeError("no kernel takes rows of fixed shape here")
            rows = rows or FixedRows("", 0, 0, distinct=False)
            batch = replace(batch, chunks=[rows.row(part) for part in batch.tokens.split(self.chunk)])
        return pack(batch).pin_memory() if self.bench.cuda else pack(batch)

    def gradient(self, number: int = 0) -> dict[str, Tensor]:
        """Forward and backward of a batch; loss and metrics."""
        batch = self.batches[number % len(self.batches)]
        self.now = batch.to(self.bench.device) if isinstance(batch, Parcel) else batch
        if self.way not in PEERS:
            return forward_backward(self.model, [self.now], self.settings)
        with self.autocast():
            loss = self.model(self.now)
        self.settings.scaler.scale(loss).backward()
        return {"loss": loss.detach()}

    def step(self) -> None:
        """train.py's loop."""
        shares, scaler = self.gradient(self.num_steps), self.settings.scaler
        if self.pending:
            self.pending.take()
        scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.weights.parameters(), 1.0)
        figures = sum_figures(shares, norm, {"queries": self.queries})
        figures["left_out"] = update_if_finite(self.optimizer, 1e-5, figures)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1
        self.pending = Reading(self.num_steps, [], figures)
        if not self.late:
            self.pending.take()
            self.pending = None

    def flat_gradient(self) -> Tensor:
        """Of the first batch."""
        self.optimizer.zero_grad(set_to_none=True)
        self.gradient()
        trained = [p for p in self.weights.parameters() if p.requires_grad]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        return torch.cat([part.float().flatten() for part in parts])


def flop_of(model: nn.Module, layers: int, passes: int, whole: bool = False) -> float:
    """For a token; of the last layer's 12 D x D products 10 are for first tokens alone, unless it works on all."""
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embedding" not in n)
    return passes * matrices * (1 if whole else 1 - 10 / 12 / layers)


def train_case(bench: Bench, way: str, case: Case) -> Row:
    """A training step: seconds, the first one with captures and compilation, tokens per second, TFLOP/s, memory."""
    # On a CPU our dropout draws as no compiler can.
    trainer = Trainer(bench, way, case, hidden_dropout=0.1 if bench.cuda or "compiled" not in way else 0.0)
    first = harness.timed(lambda: (trainer.step(), bench.wait()))
    if bench.cuda:
        trainer.step()
    seconds = bench.seconds(trainer.step, 2 if trainer.cached else 5)
    flop = flop_of(
        trainer.weights, bench.shape["num_hidden_layers"], 8 if trainer.cached else 6, way in ("padded", *PEERS)
    )
    tokens = trainer.num_tokens
    return {
        "seconds": seconds,
        "first_seconds": first,
        "tokens_per_second": round(tokens / seconds),
        "tflops": flop * tokens / seconds / 1e12,
    } | bench.memory()


def gradient_case(bench: Bench, ways: list[str]) -> Row:
    """|g - g'| / |g'| of a batch's whole gradient without dropout: to float32, and to the way `before`."""
    name, queries, group, *_ = GROUP2
    found: dict[str, Tensor] = {}
    for way in ("float32", "before", *ways):
        dtype = torch.float32 if way == "float32" else BF16
        trainer = Trainer(
            bench, "rectangles" if way == "float32" else way, (name, queries, group, dtype, 0.0), 1, hidden_dropout=0.0
        )
        found[way] = trainer.flat_gradient()
        bench.clean()
    errors = {
        way: {to: float((got - found[to]).double().norm() / found[to].double().norm()) for to in ("float32", "before")}
        for way, got in found.items()
        if way != "float32"
    }
    return {"errors": errors}


def repeat_case(bench: Bench, way: str, deterministic: bool) -> Row:
    """20 steps of five batches twice, and once more from a state after 10: which numbers of the weights differ?"""
    half = 10 if bench.cuda else 2
    torch.use_deterministic_algorithms(deterministic)

    def begin() -> Trainer:
        trainer = Trainer(bench, way, GROUP2, batches=5)
        torch.manual_seed(1)
        return trainer

    def run(trainer: Trainer, steps: int) -> Tensor:
        for _ in range(steps):
            trainer.step()
        return torch.cat([weight.detach().flatten() for weight in trainer.weights.parameters()])

    whole, second, third = run(begin(), 2 * half), begin(), begin()
    middle, random = run(second, half).split([weight.numel() for weight in second.weights.parameters()]), random_state()
    state = copy.deepcopy(second.optimizer.state_dict())
    again = run(second, half)
    for weight, kept in zip(third.weights.parameters(), middle, strict=True):
        weight.data.copy_(kept.view_as(weight))
    third.optimizer.load_state_dict(state)
    third.num_steps = half
    restore_random_state(random)
    resumed = run(third, half)
    found = {"twice": again, "resumed": resumed}
    return {"deterministic": deterministic} | {
        name: {"differ": int((got != whole).sum()), "by": float((got - whole).abs().max())}
        for name, got in found.items()
    }


# ----------------------------------------------------------------------------------------------------------- the peers


def peer(way: str, bert: nn.Module) -> tuple[Any, nn.Module]:
    """A batch's loss as a peer computes it, and the module with the weights. ImportError where it is not installed."""
    device = next(bert.parameters()).device
    with tempfile.TemporaryDirectory() as name:
        folder = harness.tiny_bert(Path(name) / "model")  # for its tokenizer, which nothing here calls
        make = sentence_transformers if way == "sentence-transformers" else flagembedding
        loss, module = make(folder, bert)
    module.to(device).train()
    return loss, module


def columns_of(batch: Batch, way: str) -> list[Row]:
    """As a peer pads them: queries and passages; sentence-transformers has a column for each passage of a query."""
    group, texts = batch.own_BG.shape[1], batch.tokens.texts()
    queries, passages = texts[: batch.num_queries], texts[batch.num_queries :]
    others = [passages[i::group] for i in range(group)] if way == "sentence-transformers" else [passages]
    return [features(column) for column in (queries, *others)]


def features(texts: list[Tensor]) -> Row:
    """A padded column."""
    tokens = Tokens(torch.cat(texts), [len(text) for text in texts])
    ((order, id_sL, mask_sL),) = pad_buckets(tokens, 0, max_waste=1.0)
    back = torch.tensor(order, device=id_sL.device).argsort()
    return {"input_ids": id_sL[back], "attention_mask": mask_sL[back]}


def sentence_transformers(folder: str, bert: nn.Module) -> tuple[Callable[[list[Row]], Tensor], nn.Module]:
    """MultipleNegativesRankingLoss, its columns merged into one rectangle, as it is by default."""
    import sentence_transformers as theirs
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling

    model = theirs.SentenceTransformer(folder, device="cpu")
    model[0].model = bert
    model[1] = Pooling(bert.config.hidden_size, pooling_mode="cls")
    loss = MultipleNegativesRankingLoss(model, scale=50.0)
    return lambda columns: loss(columns, None), model


def flagembedding(folder: str, bert: nn.Module) -> tuple[Callable[[list[Row]], Tensor], nn.Module]:
    """BiEncoderOnlyEmbedderModel, its default settings but for the pooling that BGE states."""
    from FlagEmbedding.finetune.embedder.encoder_only.base.modeling import BiEncoderOnlyEmbedderModel
    from transformers import AutoTokenizer

    settings = {"temperature": 0.02, "sentence_pooling_method": "cls", "normalize_embeddings": True}
    model = BiEncoderOnlyEmbedderModel(bert, tokenizer=AutoTokenizer.from_pretrained(folder), **settings)
    return lambda columns: model(queries=columns[0], passages=columns[1]).loss, model


# ------------------------------------------------------------------------------------------- encoding, kernels, buckets


def encode_case(bench: Bench, way: str, max_tokens: int | None) -> Row:
    """Encoding 16,384 sentences in bf16 by encode's own loop (padded: 64 texts at a time), from token ids."""
    texts = 16_384 if bench.cuda else 64
    generator = torch.Generator().manual_seed(0)
    lists = [torch.randint(5, VOCABULARY, (n,), generator=generator).tolist() for n in lengths_of(1, texts)[1]]
    if way == "padded":
        model: Any = Padded(bench.make(random_bert, bench.shape), "cls", lambda tokens: [tokens])
    else:
        model = bench.make(random_encoder, bench.shape, "sdpa" if way == "rectangles" else "auto")
    model.eval()
    if way == "graphs":
        hold_passes(model, "bf16")
        assert model.represent or not bench.cuda, said
    vectors = np.empty((texts, bench.shape["hidden_size"]), np.float32)

    def forward(batch: list[list[int]]) -> Tensor:
        tokens = Tokens.from_lists(batch)
        found: Tensor = model(tokens.to(bench.device) if way == "padded" else tokens)
        return found

    def run() -> list[int]:
        size = 64 if way == "padded" else None
        budget = 1 << 30 if way == "padded" else max_tokens
        return run_batches(model, lists, list, forward, vectors, batch_size=size, max_tokens=budget, precision="bf16")

    first = harness.timed(run)
    seconds, tokens = bench.seconds(run), sum(map(len, lists))
    flop = flop_of(model, bench.shape["num_hidden_layers"], 2, way == "padded")
    row = {"seconds": seconds, "first_seconds": first, "texts_per_second": round(texts / seconds, 1)}
    row |= {"tflops": flop * tokens / seconds / 1e12} | bench.memory()
    if way == "eager":
        bench.vectors = vectors
    return row if bench.vectors is None else row | {"differs_by": float(abs(vectors - bench.vectors).max())}


def kernel_case(bench: Bench) -> Row:
    """What kernels.py finds of each kernel, with the bound of 0.02, and what it says of one that does not run."""
    rules = {"bert": Rule(0.125), "modernbert": Rule(0.125, window=64), "qwen3": Rule(0.125, causal=True)}
    found: Row = {}
    for dtype in (BF16, FP16) if bench.cuda else (BF16,):
        for kernel in usable_kernels("auto", bench.device.type, dtype) or [""]:
            for name, rule in rules.items():
                for heads in ((16, 16), (16, 8)):
                    key = f"{kernel or 'formula'} {str(dtype)[6:]} {name} {heads[0]}/{heads[1]}"
                    for dropout, error in ((0.0, kernel_error), (0.1, dropout_error)):
                        told = key + (f", dropout {dropout}" if dropout else "")
                        try:
                            found[told] = error(kernel, bench.device, dtype, heads, 64, replace(rule, dropout=dropout))
                        except Exception as problem:
                            found[told] = first_line(problem)
    return {"errors": found}


def bucket_case(bench: Bench, case: Case) -> Row:
    """How many buckets 20 and 200 batches have: each is a capture; those beyond 32 are captured again and again."""
    _, queries, group, *_ = case
    seen: set[Any] = set()
    counts = {}
    for number in range(200):
        lengths = [n for part in lengths_of(queries, group, number) for n in part]
        size = CHUNK if queries * group > 32 * 8 else len(lengths)
        seen |= {bucket_of(lengths[start : start + size]) for start in range(0, len(lengths), size)}
        counts[number + 1] = len(seen)
    return {"buckets": {batches: counts[batches] for batches in (20, 200)}}


KINDS = {  # of kernels, by parts of their names; the rest is norms and pointwise
    "attention": ("flash",),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk"),
    "optimizer, clipping, working copy": ("multi_tensor", "adam", "lpnorm"),
    "copies and casts": ("copy", "memcpy", "memset"),
}


def profile_case(bench: Bench, way: str, case: Case) -> Row:
    """Milliseconds of a step by kind of kernel, and those in which the device had nothing to do."""
    if not bench.cuda:
        return {"skipped": "a CPU has no kernels"}
    trainer = Trainer(bench, way, case)
    for _ in range(3):
        trainer.step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    bench.wait()
    with torch.profiler.profile(activities=activities) as profile:
        trainer.step()
        bench.wait()
    times: Counter[str] = Counter()
    spans = []
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            name, span = event.name.lower(), event.time_range
            kind = next((k for k, parts in KINDS.items() if any(part in name for part in parts)), "norms and pointwise")
            times[kind] += span.end - span.start
            spans.append((span.start, span.end))
    busy, end = 0.0, 0.0
    for start, stop in sorted(spans):
        busy, end = busy + max(0.0, stop - max(start, end)), max(end, stop)
    seconds = bench.seconds(trainer.step, 3)
    vector_SD = torch.randn(sum(trainer.now.rank_counts[0]), bench.shape["hidden_size"], device=bench.device)
    vector_SD = nn.functional.normalize(vector_SD, dim=-1).requires_grad_()

    def loss() -> None:
        trainer.settings.loss(loss_input(vector_SD, trainer.now, False), LossConfig()).loss.backward()

    loss()
    terms = {kind: us / 1000 for kind, us in times.most_common()}
    terms["nothing to do"] = max(0.0, 1000 * seconds - busy / 1000)
    return {"step_ms": 1000 * seconds, "terms_ms": terms, "loss_alone_ms": 1000 * bench.seconds(loss, 5)}


# ------------------------------------------------------------------------------------------------------------- the run


def all_cases(bench: Bench) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Name and measurement, the most telling first."""
    train = lambda way, case: (f"train | {case[0]} | {way}", partial(train_case, bench, way, case))  # noqa: E731
    eager, graphs = ["before", "eager"], [way for way in GRAPHS if "compiled" not in way]
    compiled = [way for way in GRAPHS if "compiled" in way]
    yield "kernels", partial(kernel_case, bench)
    for case in (GROUP2, GROUP8, GRADCACHE):
        yield from (train(way, case) for way in [*eager, *graphs])
    yield train(compiled[1], GROUP2)
    yield train(compiled[1], GROUP8)
    yield "gradient", partial(gradient_case, bench, ["eager", *graphs, "padded"])
    for deterministic in (False, True):
        name = f"repeat | {'deterministic' if deterministic else 'as it is'}"
        yield name, partial(repeat_case, bench, graphs[1], deterministic)
    for way, tokens in (("eager", 8192), ("graphs", 8192), ("graphs", 16_384), ("padded", None), ("rectangles", 8192)):
        yield f"encode | {way} {tokens or ''}".strip(), partial(encode_case, bench, way, tokens)
    yield from (train("padded", case) for case in (GROUP2, GROUP8))
    yield "profile | group 2", partial(profile_case, bench, graphs[1], GROUP2)
    yield "profile | group 8", partial(profile_case, bench, graphs[1], GROUP8)
    yield from (train(way, case) for case in (GROUP2, GROUP8) for way in PEERS)
    half: Case = ("group 8, fp16", 32, 8, FP16, 0.0)
    dropout: Case = ("group 8, attention dropout 0.1", 32, 8, BF16, 0.1)
    yield from (train(way, case) for case in (half, dropout) for way in ("eager", graphs[1]))
    yield from ((f"buckets | {case[0]}", partial(bucket_case, bench, case)) for case in (GROUP2, GROUP8, GRADCACHE))
    yield "gradient, compiled", partial(gradient_case, bench, compiled[1:])
    yield train(compiled[0], GROUP2)
    yield train(compiled[1], GRADCACHE)
    yield from (train("rectangles", case) for case in (GROUP2, GROUP8))
    yield train("padded", GRADCACHE)


said: list[str] = []  # warnings of the package


class Saying(logging.Handler):
    """Keeps what is said."""

    def emit(self, record: logging.LogRecord) -> None:
        """As logging."""
        said.append(record.getMessage())


def first_line(problem: BaseException) -> str:
    """What it says."""
    return f"{type(problem).__name__}: {str(problem).strip()}".split("\n")[0][:300]


def measure(name: str, case: Callable[[], Row], bench: Bench) -> tuple[Row, bool]:
    """A case's figures, or why there are none; whether the process may go on."""
    said.clear()
    bench.clean()
    started, log, saying = time.perf_counter(), logging.getLogger("bge_core"), Saying(logging.WARNING)
    log.addHandler(saying)
    try:
        row, goes_on = case(), True
        if "none can be captured" in " ".join(said):
            raise RuntimeError("no graph could be captured")
    except torch.OutOfMemoryError:
        row, goes_on = {"failed": "out of memory"}, True
    except ImportError as problem:
        row, goes_on = {"failed": f"not installed: {problem.name}"}, True
    except Exception as problem:  # of a driver, a compiler, a peer: the other cases are to be measured
        row, goes_on = {"failed": first_line(problem)}, not bench.cuda
    log.removeHandler(saying)
    torch.use_deterministic_algorithms(False)
    row |= {"said": [*dict.fromkeys(said)]} if said else {}
    row["whole_seconds"] = round(time.perf_counter() - started, 1)
    print(name, json.dumps(row), file=sys.stderr, flush=True)
    return row, goes_on


def peak_of(bench: Bench) -> float:
    """TFLOP/s of a matrix product."""
    side = 8192 if bench.cuda else 256
    a = torch.randn(side, side, device=bench.device, dtype=BF16)
    for _ in range(3):
        a @ a
    bench.wait()
    return 2 * side**3 / bench.seconds(lambda: a @ a, 10) / 1e12


# ----------------------------------------------------------------------------------------------------------- the table


def line_of(name: str, row: Row, peak: float) -> str:
    """A case as a person reads it."""
    if "failed" in row or "skipped" in row:
        return f"{name:<60} {row.get('failed') or row['skipped']}"
    parts = []
    if "seconds" in row:
        parts.append(f"{1000 * row['seconds']:.1f} ms, the first {row['first_seconds']:.1f} s")
        parts.append(f"{row['tflops'] / peak:.2f} of peak")
    parts += [f"{row['memory_gb']:.1f} GB, {row['held_gb']:.1f} held"] if "memory_gb" in row else []
    others = {k: v for k, v in row.items() if k not in ("seconds", "first_seconds", "tflops", "memory_gb", "held_gb")}
    return f"{name:<60} {', '.join(parts)}  {json.dumps(others)}"


def verdicts(result: Row) -> Iterator[str]:
    """The targets, and whether they are met."""
    cases, peak = result["cases"], result["peak_tflops"]
    best_way = lambda rows: min(rows, key=lambda way: rows[way]["seconds"], default=None)  # noqa: E731
    for name, (share, of_peak) in TARGETS.items():
        rows = {way: cases.get(f"train | {name} | {way}", {}) for way in ("before", *GRAPHS)}
        rows = {way: row for way, row in rows.items() if "seconds" in row}
        best = best_way({way: row for way, row in rows.items() if way != "before"})
        if best is None or "before" not in rows:
            yield f"{name}: not measured"
            continue
        got, reached = rows[best]["seconds"] / rows["before"]["seconds"], rows[best]["tflops"] / peak
        yield f"{name}: {best} takes {got:.2f} of the time before (at most {share}): {'yes' if got <= share else 'NO'}"
        yield f"{name}: {reached:.2f} of peak (at least {of_peak}): {'yes' if reached >= of_peak else 'NO'}"
        alone = rows.get("graphs, copy", rows.get("graphs"))
        if name == "group 2" and alone and alone["seconds"] > 0.5 * rows["before"]["seconds"]:
            yield "group 2: graphs give less than a factor of 2: PROFILE BEFORE GOING ON"
    encoded = {name: row for name, row in cases.items() if name.startswith("encode | graphs") and "seconds" in row}
    if encoded:
        best = best_way(encoded)
        reached = encoded[best]["tflops"] / peak
        yield f"{best}: {reached:.2f} of peak (at least 0.5): {'yes' if reached >= 0.5 else 'NO'}"
    for name, row in cases.items():
        if name.startswith("repeat") and "twice" in row:
            found = ((what, row[what]) for what in ("twice", "resumed"))
            answers = {what: f"NO, by {got['by']:.2g}" if got["differ"] else "yes" for what, got in found}
            yield f"{name}: bitwise equal, two runs: {answers['twice']}; resumed: {answers['resumed']}"
        if name.startswith("profile") and "terms_ms" in row:
            case = cases.get(f"train | {name.split(' | ')[1]} | graphs, copy", {})
            aim = row["step_ms"] * case.get("tflops", float("nan")) / (0.6 * peak)
            told = ", ".join(f"{kind} {ms:.1f}" for kind, ms in row["terms_ms"].items())
            yield f"{name}: {row['step_ms']:.1f} ms = {told}; at 0.6 of peak it would be {aim:.1f}"


def main() -> None:
    options = harness.parser(__doc__, "results")
    options.add_argument("--minutes", type=float, default=5, help="no case begins later; it may take one more")
    options.add_argument("--cpu", action="store_true", help="a tiny shape, no capture, nothing kept")
    options.add_argument("--resume", action="store_true", help="go on behind the cases that the file of results has")
    options.add_argument("--only", help="cases whose name has this in it")
    args = options.parse_args()
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # Hopper's own size, and allowed where all is determined
    bench, file = Bench(args.cpu), args.results / "gpu_ways.json"
    if args.resume:
        result = json.loads(file.read_text(encoding="utf-8"))
    else:
        result = harness.facts(seed=0, began=time.time(), peak_tflops=peak_of(bench), cases={})
    cases = result["cases"]

    def keep() -> None:
        if bench.cuda:
            harness.save("gpu_ways", result, folder=args.results)

    for name, case in all_cases(bench):
        if name in cases or (args.only and args.only not in name):
            continue
        if args.cpu and not args.only and "compiled" in name:
            cases[name] = {"skipped": "a CPU compiles for half a minute; --only compiled"}
            continue
        if time.time() - result["began"] > 60 * args.minutes:
            cases[name] = {"failed": "not measured: no time left"}
            continue
        cases[name] = {"failed": "the process ended"}
        keep()
        cases[name], goes_on = measure(name, case, bench)
        keep()
        if not goes_on:
            words = [word for word in sys.argv if word != "--resume"]
            os.execv(sys.executable, [sys.executable, *words, "--resume"])
    keep()
    print(f"{result['machine']}, torch {result['torch']}, peak {result['peak_tflops']:.0f} TFLOP/s")
    for name, row in cases.items():
        print(line_of(name, row, result["peak_tflops"]))
    if args.cpu:
        print("Figures of a CPU, which say nothing; the lines that a GPU's would give:")
    print(*verdicts(result), sep="\n")


if __name__ == "__main__":
    main()
