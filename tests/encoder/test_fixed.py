"""Rows of fixed shape: what was recorded of one batch, as a CUDA graph is, gives another one of its bucket its own."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_packing import MODELS, assert_close, make, texts_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from bge_core.encoder import packing
from bge_core.encoder.fixed import FixedRow, FixedRows
from bge_core.encoder.model import Encoder
from bge_core.encoder.packing import fixed_hidden
from bge_core.encoder.settings import EncoderSettings
from bge_core.encoder.tokens import Tokens
from bge_core.runtime.flags import POOLINGS

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


@pytest.mark.parametrize("name", MODELS)
def test_padding_may_be_longer_than_the_model_takes(name: str) -> None:
    """Two texts of padding with 113 tokens each, where the model has 80 positions."""
    encoder, texts = make_encoder(name), texts_of([2] * 13 + [4])
    row = row_of(encoder, texts)
    assert row.cu_seqlens.diff().tolist()[14:] == [113, 113]
    vector_ND = encoder(row)
    assert_close([vector_ND[:14].detach()], [by_hand(encoder, texts, [0] * 14).detach()], 1e-11)


def test_rows_with_skipped_tokens_are_another_bucket() -> None:
    """What a graph of rows without them would not read."""
    encoder, texts = make_encoder("bert", "cls"), texts_of(ONE)
    buckets = {row_of(encoder, texts, skipped).bucket for skipped in (None, [0] * len(ONE))}
    assert len(buckets) == 2


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


QUICK = [("bert", compiled_whole), ("qwen2_window", compiled_whole), ("modernbert", compiled_layers)]
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
