"""Rows of fixed shape: buckets, padding, and whether what is recorded of one batch, as by a CUDA graph, is right for others."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from batches import gradients_of, load, make_rows, rank_batch
from test_packing import MODELS, assert_close, make, texts_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from bge_core.encoder import packing
from bge_core.encoder.fixed import FixedRow, FixedRows, bucket_of
from bge_core.encoder.graphs import MAX_BUCKETS
from bge_core.encoder.model import Encoder
from bge_core.encoder.packing import fixed_hidden
from bge_core.encoder.settings import EncoderSettings
from bge_core.encoder.tokens import Tokens
from bge_core.runtime.flags import POOLINGS
from bge_core.training.step import StepSettings, forward_backward

PAD = 1
FULL = 80 - (PAD + 1)  # tokens of the longest text that each of MODELS takes
ONE, OTHER = [7, 1, 3, 30, 3, FULL, 1, 12], [5, 9, 30, 2, 70, 3]  # of one bucket


def make_encoder(name: str, pooling: Any = "mean", num_layers: int = 2) -> Encoder:
    """In float64 and training mode, without dropout."""
    backbone = make(name)
    del packing.layers_of(backbone)[num_layers:]
    tokenizer = SimpleNamespace(pad_token_id=PAD)
    return Encoder(backbone, tokenizer, EncoderSettings(pooling=pooling, normalize=True), "auto").train()


def row_of(encoder: Encoder, texts: Sequence[Tensor], skipped: Sequence[int] | None = None) -> FixedRow:
    """The row of these texts, and `place_S` that of all N, so that the encoder gives all vectors of the row."""
    rows = FixedRows("", packing.first_position(encoder.backbone), PAD, distinct=False)
    row = rows.row(Tokens.from_lists([text.tolist() for text in texts], skipped))
    return replace(row, place_S=torch.arange(row.bucket[1]))


def tensors_of(row: FixedRow) -> dict[str, Tensor]:
    return {name: value for name, value in vars(row).items() if isinstance(value, Tensor)}


def trained(encoder: Encoder) -> list[Tensor]:
    return [p for name, p in encoder.named_parameters() if ".pooler." not in name]


def step(encoder: Encoder, vector_ND: Tensor, weight_ND: Tensor) -> list[Tensor]:
    """The vectors, and every parameter's gradient of their weighted sum."""
    return [vector_ND.detach(), *torch.autograd.grad((vector_ND * weight_ND).sum(), trained(encoder))]


def weights_of(row: FixedRow, num_texts: int) -> Tensor:
    """Of N vectors, 0 for the padding's."""
    weight_ND = torch.zeros(row.bucket[1], 32, dtype=torch.float64)
    return weight_ND.index_copy_(0, torch.arange(num_texts), torch.randn(num_texts, 32, dtype=torch.float64))


def by_hand(encoder: Encoder, texts: Sequence[Tensor], skipped: Sequence[int]) -> Tensor:
    """The vectors of single texts by stock transformers, pooled by formula."""
    parts = []
    for text, skip in zip(texts, skipped, strict=True):
        hidden_LD = encoder.backbone(input_ids=text[None]).last_hidden_state[0][skip:]
        number_L1 = torch.arange(skip + 1, len(text) + 1)[:, None]
        pooled = {
            "cls": hidden_LD[0],
            "last_token": hidden_LD[-1],
            "max": hidden_LD.amax(0),
            "mean": hidden_LD.mean(0),
            "mean_sqrt_len": hidden_LD.sum(0) / len(hidden_LD) ** 0.5,
            "weightedmean": (number_L1 * hidden_LD).sum(0) / number_L1.sum(),
        }[encoder.settings.pooling]
        parts.append(pooled / pooled.dot(pooled).sqrt())
    return torch.stack(parts)


# --- a graph's contract -------------------------------------------------------------------------------------------------


CASES = [
    (name, pooling, False) for name, pooling in zip(MODELS, ["cls"] * 3 + ["mean"] + ["last_token"] * 3, strict=True)
]
CASES += [
    ("bert", pooling, prompts)
    for pooling in POOLINGS
    for prompts in (False, True)
    if (pooling, prompts) != ("cls", False)
]


@pytest.mark.parametrize("name, pooling, prompts", CASES)
def test_a_recorded_step_is_right_for_another_batch(name: str, pooling: str, prompts: bool) -> None:
    """Forward and backward recorded as operations, all that Python derived from the first batch being constants."""
    encoder = make_encoder(name, pooling)
    first, second = texts_of(ONE), texts_of(OTHER, 7)
    skipped = [[min(2, len(text) - 1) * prompts for text in texts] for texts in (first, second)]
    one, other = (row_of(encoder, t, s if prompts else None) for t, s in zip((first, second), skipped, strict=True))
    assert one.bucket == other.bucket

    def both_ways(tensors: dict[str, Tensor], weight_ND: Tensor) -> list[Tensor]:
        return step(encoder, encoder(replace(one, **tensors)), weight_ND)

    recorded = make_fx(both_ways, tracing_mode="real")(tensors_of(one), weights_of(one, len(first)))
    weight_ND = weights_of(other, len(second))
    with torch.no_grad():
        vector_ND, *gradients = recorded(tensors_of(other), weight_ND)
    want = step(encoder, by_hand(encoder, second, skipped[1]), weight_ND[: len(second)])
    assert_close([vector_ND[: len(second)], *gradients], want, 1e-11)


def test_the_contract_is_broken_by_rectangles() -> None:
    """What Python derives from the lengths of the first batch is wrong for another of as many tokens and texts."""
    encoder, lengths = make_encoder("bert"), ([7, 1, 3, 30, 3], [9, 2, 10, 20, 3])
    weight_SD = torch.randn(5, 32, dtype=torch.float64)
    one, other = (torch.cat(texts_of(part, seed)) for seed, part in enumerate(lengths))

    def both_ways(input_id_T: Tensor) -> list[Tensor]:
        return step(encoder, encoder(Tokens(input_id_T, lengths[0])), weight_SD)

    recorded = make_fx(both_ways, tracing_mode="real")(one)
    right = step(encoder, encoder(Tokens(one, lengths[0])), weight_SD)
    want = step(encoder, encoder(Tokens(other, lengths[1])), weight_SD)
    with torch.no_grad():
        again, got = recorded(one), recorded(other)
    assert_close(again, right, 1e-12)
    for found, true in zip(got, want, strict=True):
        assert float((found - true).norm()) > 0.1 * float(true.norm()) or true.abs().max() < 1e-12


# --- one graph ----------------------------------------------------------------------------------------------------------


def compiled_whole(encoder: Encoder, backend: Any) -> Callable[[FixedRow], Tensor]:
    return torch.compile(  # type: ignore[no-any-return]
        lambda row: fixed_hidden(encoder.backbone, row), fullgraph=True, dynamic=False, backend=backend
    )


def compiled_layers(encoder: Encoder, backend: Any) -> Callable[[FixedRow], Tensor]:
    for layer in packing.layers_of(encoder.backbone):
        layer.compile(fullgraph=True, dynamic=False, backend=backend)
    return lambda row: fixed_hidden(encoder.backbone, row)


QUICK = [("bert", compiled_whole), ("modernbert", compiled_layers)]
COMPILED = [
    pytest.param(name, how, marks=[] if (name, how) in QUICK else pytest.mark.slow)
    for name in MODELS
    for how in (compiled_whole, compiled_layers)
]


@pytest.mark.parametrize("name, how", COMPILED)
def test_a_row_is_one_graph(name: str, how: Callable[[Encoder, Any], Callable[[FixedRow], Tensor]]) -> None:
    """Compiled once for a bucket, without a break; a layer once for each kind of its attention."""
    encoder, backend = make_encoder(name), CompileCounterWithBackend("aot_eager")
    row, same, more = (row_of(encoder, texts_of(lengths)) for lengths in (ONE, OTHER, [FULL] * 8))
    assert row.bucket == same.bucket != more.bucket
    want = [
        step(encoder, hidden, torch.ones(())) for r in (row, same) for hidden in [fixed_hidden(encoder.backbone, r)]
    ]
    torch._dynamo.reset()
    try:
        compiled = how(encoder, backend)
        got = [step(encoder, compiled(r), torch.ones(())) for r in (row, same)]
        once = 2 if how is compiled_layers and name in ("modernbert", "qwen2_window") else 1
        assert backend.frame_count == once
        compiled(more)
        assert backend.frame_count == 2 * once
    finally:
        torch._dynamo.reset()
    for of_got, of_want in zip(got, want, strict=True):
        assert_close(of_got, of_want, 1e-11)


# --- buckets ------------------------------------------------------------------------------------------------------------

LENGTHS: list[list[int]] = [
    [], [1], [FULL], [128], [129], [512], [8192], [1] * 3000, [16] * 16, [17] * 15, [256], [255], [241],
    *([2**i - 1, 2**i, 2**i + 1] for i in range(1, 13)),
]  # fmt: skip


def drawn_lengths(seed: int) -> list[int]:
    """Up to thousands of texts, of a length of any order up to a longest of any order."""
    rng = random.Random(seed)
    num_texts, longest = int(2 ** rng.uniform(0, 12)), 2 ** rng.uniform(0, 13)
    return [max(1, int(longest ** rng.uniform(0, 1))) for _ in range(num_texts)]


def is_step(number: int, least: int, parts: int) -> bool:
    """Whether it is a multiple of so many parts of the power of two at or below it, and of `least`."""
    return number % least == 0 and number % max(1, 2 ** int(np.log2(number)) // parts) == 0


def test_a_bucket_is_the_smallest_that_holds_the_texts() -> None:
    """By search: the least number of texts, and of it the least number of tokens, whose padding can be dealt out."""
    for i, lengths in enumerate([*LENGTHS, *map(drawn_lengths, range(200))]):
        max_tokens = (None, 1024, 8192)[i % 3]
        parts = 2 if max_tokens and sum(lengths) < 0.75 * max_tokens else 16  # what is left over of a batch: coarser
        num_tokens, num_texts, longest = bucket_of(lengths, max_tokens)
        assert longest == next(n for n in (512, 2048, 8192) if n >= max(lengths, default=0))
        for texts in (n for n in count(max(1, len(lengths))) if is_step(n, 16, 2)):
            tokens = next(n for n in count(sum(lengths) + texts - len(lengths)) if n and is_step(n, 256, parts))
            if tokens - sum(lengths) <= (texts - len(lengths)) * longest:
                break
        assert (num_tokens, num_texts) == (tokens, texts), f"{len(lengths)} texts of {sum(lengths)} tokens"


@pytest.mark.parametrize("seed", range(24))
def test_a_row_is_the_texts_and_padding_behind_them(seed: int) -> None:
    """Distinct ones, first positions, prompts and types in all combinations."""
    rng, distinct, first_position = random.Random(seed), seed % 2 == 1, seed // 2 % 2 * 2
    texts = [[rng.randrange(10, 99) for _ in range(length)] for length in drawn_lengths(seed)[:300] if length < 4000]
    texts = [*texts, *rng.choices(texts, k=5)] if texts and seed > 1 else []
    told = [rng.randrange(3) for _ in texts] if seed % 3 else None  # of 24 seeds, 2 x 2 x 3 x 2 cases
    tokens = Tokens.from_lists(texts, told)
    types = None if distinct or seed % 4 else torch.tensor([t % 2 for text in texts for t in text], dtype=torch.int64)
    row = FixedRows("torch", first_position, PAD, distinct).row(tokens, types)
    lengths = row.cu_seqlens.diff().tolist()
    ids, positions = (x.split(lengths) for x in (row.input_id_T, row.position_T))
    num_tokens, num_texts, longest, *_ = row.bucket
    assert (row.cu_seqlens[0], row.cu_seqlens[-1], len(lengths)) == (0, num_tokens, num_texts)
    assert min(lengths) >= 1 and max(lengths) <= longest and row.cu_seqlens.dtype == torch.int32
    assert [ids[place].tolist() for place in row.place_S] == texts and len(row) == len(texts)
    keys = [(*text, skip) for text, skip in zip(texts, tokens.prompt_lengths or [0] * len(texts), strict=True)]
    num_used = len(set(keys)) if distinct else len(texts)
    assert sorted(set(row.place_S.tolist())) == [*range(num_used)]
    for place in range(num_used):
        assert positions[place].tolist() == [*range(first_position, first_position + lengths[place])]
    padding = slice(sum(lengths[:num_used]), None)
    assert set(row.input_id_T[padding].tolist()) <= {PAD}
    assert set(row.position_T[padding].tolist()) <= {first_position}  # however few the model has
    assert (row.skipped_N is None) == (told is None)
    if row.skipped_N is not None:
        assert row.skipped_N[row.place_S].tolist() == tokens.prompt_lengths
        assert len(row.skipped_N) == num_texts and not row.skipped_N[num_used:].any()
    assert (row.token_type_id_T is None) == (types is None)
    if types is not None:
        assert row.token_type_id_T.tolist() == [*types.tolist(), *[0] * (num_tokens - len(types))]


def test_texts_of_pairs_are_not_joined() -> None:
    """Equal tokens may have other types."""
    tokens = Tokens.from_lists([[5, 6], [5, 6]])
    row = FixedRows("", 0, PAD, distinct=True).row(tokens, torch.tensor([0, 0, 0, 1]))
    assert row.place_S.tolist() == [0, 1] and row.token_type_id_T[:4].tolist() == [0, 0, 0, 1]


def test_rows_of_other_fields_are_of_other_buckets() -> None:
    """A graph made of a row without prompts would not read those of another one."""
    rows, texts = FixedRows("", 0, PAD, distinct=False), [[5, 6], [5, 7]]
    of = [rows.row(Tokens.from_lists(texts, told)).bucket for told in (None, [0, 0], [1, 1])]
    assert of[0] != of[1] == of[2]
    assert rows.row(Tokens.from_lists([], [])).bucket == of[1]  # nor does a rank without rows make a graph of its own


@pytest.mark.parametrize("num_texts, max_tokens, most", [(64, None, 16), (512, None, 8), (2000, 8192, MAX_BUCKETS)])
def test_realistic_batches_need_few_buckets(num_texts: int, max_tokens: int | None, most: int) -> None:
    """Questions of some 12 tokens, passages of some 120, cut at 512: 95 % of the rows lie in few buckets, 3 % is padding."""
    rng, buckets, num_tokens = np.random.default_rng(0), Counter(), 0
    for _ in range(200):
        is_query = np.arange(num_texts) < num_texts // 8
        lengths = np.where(is_query, rng.lognormal(2.5, 0.4, num_texts), rng.lognormal(4.8, 1.0, num_texts))
        cut = lengths.clip(3, 512).astype(int).tolist()
        num_tokens += sum(cut)
        chunks = Tokens(torch.empty(sum(cut)), cut).split(None, max_tokens)
        buckets.update(bucket_of(part.lengths, max_tokens) for part in chunks)
    assert sum(size for _, size in buckets.most_common(most)) > 0.95 * buckets.total()
    assert num_tokens > 0.97 * sum(bucket[0] * size for bucket, size in buckets.items())


# --- padding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_row_of_any_texts_is_every_text_alone(name: str) -> None:
    """One text, one token, as many as the model takes; padding in one text, longer than the model takes."""
    encoder = make_encoder(name, "cls" if packing.has_bert_layers(make(name)) else "last_token")
    for lengths in ([1], [FULL], [1] * 20, [8] * 14 + [17], [FULL] * 3):
        texts = texts_of(lengths)
        row, weight_SD = row_of(encoder, texts), torch.randn(len(texts), 32, dtype=torch.float64)
        vector_SD = encoder(row)[: len(texts)]
        want = step(encoder, by_hand(encoder, texts, [0] * len(texts)), weight_SD)
        assert_close(step(encoder, vector_SD, weight_SD), want, 1e-11)
    assert row_of(encoder, texts_of([8] * 14 + [17])).cu_seqlens.diff()[-1] > FULL


def other_padding(row: FixedRow, num_tokens: int, num_texts: int) -> FixedRow:
    """Other tokens at other places in texts of other lengths."""
    rest, more = row.bucket[0] - num_tokens, row.bucket[1] - num_texts
    ends = torch.arange(num_tokens + 1, num_tokens + more).clamp(max=num_tokens + rest - 1)
    return replace(
        row,
        input_id_T=torch.cat([row.input_id_T[:num_tokens], torch.randint(2, 10, (rest,))]),
        position_T=torch.cat([row.position_T[:num_tokens], torch.randint(PAD + 1, PAD + 9, (rest,))]),
        cu_seqlens=torch.cat([row.cu_seqlens[: num_texts + 1], ends, row.cu_seqlens[-1:]]).to(torch.int32),
    )


@pytest.mark.parametrize("name, pooling", dict.fromkeys(case[:2] for case in CASES))
def test_padding_reaches_neither_vectors_nor_gradients(name: str, pooling: str) -> None:
    """The same bits whatever the padding is; no gradient for what only padding has."""
    encoder, texts = make_encoder(name, pooling), texts_of(ONE)
    row = row_of(encoder, texts)
    weight_ND = weights_of(row, len(texts))
    rows = row, other_padding(row, sum(ONE), len(ONE))
    (vector_ND, *gradients), (other_ND, *others) = (step(encoder, encoder(r), weight_ND) for r in rows)
    assert torch.equal(vector_ND[: len(texts)], other_ND[: len(texts)]) and not torch.equal(vector_ND, other_ND)
    assert all(map(torch.equal, gradients, others))
    gradient_of = dict(zip(map(id, trained(encoder)), others, strict=True))
    of_tokens = gradient_of[id(encoder.backbone.get_input_embeddings().weight)]
    unused = torch.ones(len(of_tokens), dtype=torch.bool).index_fill_(0, torch.cat(texts), False)
    assert not of_tokens[unused].any() and of_tokens[~unused].any(1).all()
    if packing.has_bert_layers(encoder.backbone):
        of_positions = gradient_of[id(encoder.backbone.embeddings.position_embeddings.weight)]
        first = packing.first_position(encoder.backbone)
        assert not of_positions[:first].any() and not of_positions[first + FULL :].any()


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_padding_reaches_neither_loss_nor_metrics(chunk_size: int | None, tiny_bert: Path) -> None:
    """The same bits with another padding token."""
    encoder, results = load(tiny_bert, torch.float32), []
    for pad_id in (0, 77):
        rows, batch = FixedRows("", 0, pad_id, distinct=True), rank_batch(make_rows(0, (2, 3, 1)), teacher=False)
        batch = replace(batch, chunks=[rows.row(part) for part in batch.tokens.split(chunk_size)])
        shares = forward_backward(encoder, [batch], StepSettings(chunk_size=chunk_size))
        results.append(shares | gradients_of(encoder))
    assert results[0].keys() == results[1].keys() and len(results[0]) > 40
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("dropout", [{}, {"attention_dropout": 0.5}], ids=str)
def test_dropout_comes_from_the_random_state(
    dropout: dict[str, float], tiny_bert: Path, tiny_bert_dropout: Path
) -> None:
    """The same state, the same bits, with and without a gradient; all dropouts, and that of attention alone."""
    encoder = load(tiny_bert if dropout else tiny_bert_dropout, torch.float32, **dropout)
    row, found = row_of(encoder, texts_of([5, 9, 30])), []
    for seed, gradient in ((3, False), (3, True), (4, True)):
        torch.manual_seed(seed)
        with torch.set_grad_enabled(gradient):
            found.append(encoder(row)[:3].detach())
    assert encoder.draws and torch.equal(found[0], found[1]) and not torch.allclose(found[1], found[2])
