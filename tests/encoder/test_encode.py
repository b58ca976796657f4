"""Texts to vectors: in input order, the same for every batch size, never silently NaN. Two ranks: test_distributed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bge_core.encoder.encode as encode_module
from bge_core import UserError
from bge_core.encoder.encode import encode, plan_batches
from bge_core.encoder.load import load_encoder
from bge_core.encoder.model import Encoder
from bge_core.encoder.tokens import Tokens

TEXTS = [
    "信用卡怎么申请？",
    "",
    "loan",
    "快递" * 40,
    "卡",
    "快递",
    "loan",
    *(f"第{i}号" * (i % 9 + 1) for i in range(20)),
]


@pytest.fixture(scope="module")
def encoder(tiny_bert: Path) -> Encoder:
    return load_encoder(tiny_bert)


def alone(encoder: Encoder, text: str, max_length: int = 512) -> np.ndarray:
    """The vector of one text by the backbone itself."""
    ids = encoder.tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
    with torch.no_grad():
        vector_D = encoder.backbone(**ids).last_hidden_state[0, 0]
    return (vector_D / vector_D.norm()).numpy()


def test_vectors_are_in_input_order(encoder: Encoder) -> None:
    vectors = encode(encoder, TEXTS, batch_size=4)
    assert vectors.shape == (len(TEXTS), 32) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, [alone(encoder, text) for text in TEXTS], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(vectors[2], vectors[6], atol=1e-6)  # the same text twice
    assert abs(vectors[2] - vectors[4]).max() > 1e-2


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_the_batch_size_hardly_matters(batch_size: int, encoder: Encoder) -> None:
    want = encode(encoder, TEXTS, batch_size=8)
    assert abs(encode(encoder, TEXTS, batch_size=batch_size) - want).max() < 1e-6


@pytest.mark.parametrize("max_tokens", [1, 30, 10**6])
def test_the_budget_of_tokens_hardly_matters(max_tokens: int, encoder: Encoder) -> None:
    assert abs(encode(encoder, TEXTS, max_tokens=max_tokens) - encode(encoder, TEXTS)).max() < 1e-6


@given(st.lists(st.integers(1, 40), max_size=50), st.integers(1, 8) | st.none(), st.integers(1, 100))
def test_batches_keep_to_both_limits(lengths: list[int], batch_size: int | None, max_tokens: int) -> None:
    batches = list(plan_batches(lengths, batch_size, max_tokens))
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
    for batch, after in zip(batches, [*batches, []][1:], strict=True):
        num_tokens = sum(lengths[i] for i in batch)
        assert len(batch) == 1 or (num_tokens <= max_tokens and len(batch) <= (batch_size or 50))
        if after:
            assert len(batch) == batch_size or num_tokens + lengths[after[0]] > max_tokens


def test_blocks_are_put_together_in_order(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    want = encode(encoder, TEXTS)
    monkeypatch.setattr(encode_module, "BLOCK", 4)
    assert abs(encode(encoder, TEXTS) - want).max() < 1e-6
    assert abs(encoder.encode(TEXTS, prompt="问题：") - encode(encoder, TEXTS, prompt="问题：")).max() == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_vectors_go_into_a_memory_map(dtype: Any, encoder: Encoder, tmp_path: Path) -> None:
    output = np.lib.format.open_memmap(tmp_path / "vectors.npy", "w+", dtype, (len(TEXTS), 32))
    assert encode(encoder, TEXTS, output=output) is output
    output.flush()
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), encode(encoder, TEXTS), atol=1e-3)
    with pytest.raises(UserError, match=r"output has the shape \(27, 32\); 3 vectors of this model need \(3, 32\)"):
        encode(encoder, TEXTS[:3], output=output)


def test_no_texts(encoder: Encoder) -> None:
    assert encode(encoder, []).shape == (0, 32)


def test_long_texts_are_cut(encoder: Encoder) -> None:
    text = "快递退款" * 1000
    vectors = encode(encoder, [text, "短"], max_length=10_000)  # more than the backbone takes
    np.testing.assert_allclose(vectors[0], alone(encoder, text, 512), atol=1e-6)
    np.testing.assert_allclose(encode(encoder, [text], max_length=16)[0], alone(encoder, text, 16), atol=1e-6)


def test_the_prompt_stands_before_each_text(encoder: Encoder) -> None:
    vectors = encode(encoder, ["信用卡", ""], prompt="问题：")
    np.testing.assert_allclose(vectors, [alone(encoder, "问题：信用卡"), alone(encoder, "问题：")], atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_comes_back(training: bool, tiny_bert: Path, tiny_bert_dropout: Path) -> None:
    with_dropout = load_encoder(tiny_bert_dropout).train(training)
    vectors = encode(with_dropout, TEXTS[:3])
    assert with_dropout.training == training == with_dropout.backbone.training
    np.testing.assert_allclose(vectors, encode(load_encoder(tiny_bert), TEXTS[:3]), atol=1e-6)
    with_dropout.train()
    with_dropout(Tokens.from_lists([[2, 3]])).sum().backward()  # what encode left behind can still be trained


def test_vectors_are_float32_whatever_computes_them(encoder: Encoder, tiny_bert_float64: Path) -> None:
    half = encode(encoder, TEXTS, precision="bf16")
    assert half.dtype == np.float32
    difference = abs(half - encode(encoder, TEXTS)).max()
    assert 1e-5 < difference < 0.2
    assert encode(load_encoder(tiny_bert_float64, dtype=torch.float64), TEXTS[:2]).dtype == np.float32


def test_a_broken_model_is_named_with_a_text(tiny_bert: Path) -> None:
    broken = load_encoder(tiny_bert).train()
    with torch.no_grad():
        broken.backbone.embeddings.word_embeddings.weight[broken.tokenizer.convert_tokens_to_ids("卡")] = float("nan")
    with pytest.raises(UserError, match="NaN for 2 of 4 texts, first '卡费'"):
        encode(broken, ["快递", "卡费", "loan", "信用卡"])
    assert broken.training
