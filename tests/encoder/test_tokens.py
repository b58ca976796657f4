"""Texts in one row: joined, split, cut into rectangles, none lost and little wasted."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bge_core.encoder.tokens import Tokens, pad_buckets, tokenize

texts_of_tokens = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=40), max_size=30)


def as_lists(tokens: Tokens) -> list[list[int]]:
    return [text.tolist() for text in tokens.texts()]


def test_texts_lie_in_one_row() -> None:
    tokens = Tokens.from_lists([[101, 7, 102], [101, 102]])
    assert tokens.input_id_T.tolist() == [101, 7, 102, 101, 102] and tokens.input_id_T.dtype == torch.int64
    assert tokens.lengths == [3, 2] and len(tokens) == 2
    assert as_lists(tokens.to(torch.device("cpu"))) == [[101, 7, 102], [101, 102]]


def test_no_text_at_all() -> None:
    tokens = Tokens.from_lists([])
    assert len(tokens) == 0 and tokens.input_id_T.dtype == torch.int64
    assert [len(chunk) for chunk in tokens.split(3)] == [0]
    assert [len(chunk) for chunk in tokens.split()] == [0]
    assert list(pad_buckets(tokens, 0)) == []


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=12), st.integers(1, 8))
def test_distinct_texts_and_their_places_are_the_texts(texts: list[list[int]], size: int) -> None:
    for chunk in Tokens.from_lists(texts).split(size):
        tokens, place_S = chunk.distinct()
        once = as_lists(tokens)
        assert [once[place] for place in place_S] == as_lists(chunk)
        assert once == [text for i, text in enumerate(as_lists(chunk)) if text not in as_lists(chunk)[:i]]


def test_texts_of_unknown_numbers_count_as_distinct() -> None:
    tokens = Tokens(torch.tensor([5, 5, 5]), [1, 1, 1])
    assert tokens.distinct() == (tokens, [0, 1, 2])


@given(texts_of_tokens, st.integers(1, 8))
def test_chunks_are_the_texts_in_order(texts: list[list[int]], size: int) -> None:
    chunks = Tokens.from_lists(texts).split(size)
    assert [text for chunk in chunks for text in as_lists(chunk)] == texts
    assert [len(chunk) for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
    assert len(chunks) == max(1, -(-len(texts) // size))
    assert all(sum(chunk.lengths) == len(chunk.input_id_T) for chunk in chunks)


@given(texts_of_tokens, st.integers(1, 8) | st.none(), st.integers(1, 60) | st.none())
def test_chunks_keep_to_both_limits_and_are_as_full_as_they_can_be(
    texts: list[list[int]], max_texts: int | None, max_tokens: int | None
) -> None:
    chunks = Tokens.from_lists(texts).split(max_texts, max_tokens)
    assert [text for chunk in chunks for text in as_lists(chunk)] == texts
    most, budget = max_texts or 10**9, max_tokens or 10**9
    for chunk, after in zip(chunks, [*chunks[1:], None], strict=True):
        assert len(chunk) <= most and (len(chunk) <= 1 or sum(chunk.lengths) <= budget)
        if after is not None:
            assert len(chunk) == most or sum(chunk.lengths) + after.lengths[0] > budget


@given(texts_of_tokens, st.sampled_from([0.0, 0.125, 0.5, 1.0]))
def test_rectangles_hold_every_text_once_and_waste_little(texts: list[list[int]], max_waste: float) -> None:
    pad_id, found = 0, {}
    for positions, id_sL, mask_sL in pad_buckets(Tokens.from_lists(texts), pad_id, max_waste):
        assert id_sL.shape == mask_sL.shape == (len(positions), max(len(texts[i]) for i in positions))
        assert mask_sL.dtype == torch.int64
        assert (mask_sL == 0).sum() <= max_waste * mask_sL.numel() + 1e-9
        assert (id_sL[mask_sL == 0] == pad_id).all()
        for i, ids, mask in zip(positions, id_sL, mask_sL, strict=True):
            assert i not in found
            assert mask.tolist() == [1] * len(texts[i]) + [0] * (len(mask) - len(texts[i])), "padding stands right"
            found[i] = ids[: len(texts[i])].tolist()
    assert [found[i] for i in range(len(texts))] == texts


def test_equal_lengths_share_a_rectangle_and_very_unequal_ones_do_not() -> None:
    tokens = Tokens.from_lists([[1] * length for length in (10, 3, 10, 9, 3)])
    assert [positions for positions, _, _ in pad_buckets(tokens, 0)] == [[1, 4], [3, 0, 2]]
    assert [positions for positions, _, _ in pad_buckets(tokens, 0, max_waste=0.0)] == [[1, 4], [3], [0, 2]]
    assert len(list(pad_buckets(tokens, 0, max_waste=1.0))) == 1


@pytest.mark.parametrize("max_length", [4, 512])
def test_tokenize_cuts_and_does_not_pad(max_length: int, tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    ids = tokenize(tokenizer, ["信用卡信用卡", "", "卡"], max_length)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert [len(text) for text in ids] == [min(8, max_length), 2, 3]
    assert all(text[0] == cls and text[-1] == sep for text in ids)
    assert tokenize(tokenizer, [], max_length) == []
