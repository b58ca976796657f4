"""BM25 and rank fusion against slow references; segmentation by examples."""

import math
import os
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_core import UserError
from bge_core.search.words import bm25_search, reciprocal_rank_fusion, segment

# --- segment ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("我爱北京大学。", ["我", "爱", "北京", "大学", "北京大学"]),
        ("张晓萌", ["张", "晓", "萌"]),  # a name that no dictionary has: its characters, which a shorter form shares
        ("GPT-4o、ｉＰｈｏｎｅ １５", ["gpt", "4o", "iphone", "15"]),
        ("v1.5的价格是1,000.50元，约90%", ["v1.5", "的", "价格", "是", "1,000.50", "元", "约", "90"]),
        ("在1,2,3和3.14.", ["在", "1", "2", "3", "和", "3.14"]),
        ("Café naïve НАУКА 한국어", ["café", "naïve", "наука", "한국어"]),  # jieba cuts these into letters
        ("Cafe\u0301", ["café"]),
        ("a_b\tc\u3000\n①", ["a", "b", "c", "1"]),
        ("，。！？…… 👍🏻《》 ", []),
        ("", []),
    ],
)
def test_words_are_what_a_reader_would_say(text: str, words: list[str]) -> None:
    assert sorted(segment(text)) == sorted(words)


@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_no_word_is_empty_or_holds_punctuation_or_white_space(text: str) -> None:
    for word in segment(text):
        assert word and not [c for c in word if unicodedata.category(c)[0] in "PZSM" and c not in ".,"]


def test_case_and_width_change_nothing() -> None:
    assert segment("ＢＥＲＴ模型２０１８年") == segment("bert模型2018年") == ["bert", "模型", "2018", "年"]


# --- BM25 -------------------------------------------------------------------------------------------------------------


def slow_bm25(queries: Sequence[str], corpus: Sequence[str], k: int) -> tuple[list[list[float]], list[list[int]]]:
    """The formula of the docstring in float64, one query and one row at a time; unpadded."""
    documents = [segment(text) for text in corpus]
    mean = sum(map(len, documents)) / max(1, len(documents))
    holding = Counter(word for document in documents for word in set(document))
    scores, rows = [], []
    for query in queries:
        found = []
        for row, document in enumerate(documents):
            score = 0.0
            for word in segment(query):
                if tf := document.count(word):
                    idf = math.log(1 + (len(documents) - holding[word] + 0.5) / (holding[word] + 0.5))
                    score += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean))
            if score:
                found.append((-np.float32(round(score, 5)), row))  # rounded: rows with the same words tie
        found = sorted(found)[:k]
        scores.append([-float(score) for score, _ in found])
        rows.append([row for _, row in found])
    return scores, rows


short_texts = st.lists(st.sampled_from(["猫", "狗", "大学", "北京大学", "cat", "3.14", "，", "的"]), max_size=5).map(
    "、".join
)


@settings(deadline=None)
@given(st.lists(short_texts, max_size=4), st.lists(short_texts, max_size=12), st.integers(1, 14))
def test_bm25_equals_its_formula(queries: list[str], corpus: list[str], k: int) -> None:
    scores, rows = bm25_search(queries, corpus, k)
    assert scores.shape == rows.shape == (len(queries), k)
    assert scores.dtype == np.float32 and rows.dtype == np.int64
    every, _ = slow_bm25(queries, corpus, len(corpus) + 1)
    for score, row, of_all in zip(scores, rows, every, strict=True):
        num = min(k, len(of_all))
        np.testing.assert_allclose(score[:num], of_all[:num], atol=2e-5)
        assert (score[num:] == -np.inf).all() and (row[num:] == -1).all() and (row[:num] >= 0).all()
        assert all(
            (a > b) or (a == b and i < j) for a, b, i, j in zip(score, score[1:num], row, row[1:num], strict=False)
        )
        assert len(set(row[:num].tolist())) == num


def test_rows_equal_the_slow_reference() -> None:
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(60)]
    weight = 1 / np.arange(1, 61)
    corpus = [" ".join(rng.choice(words, rng.integers(1, 20), p=weight / weight.sum())) for _ in range(200)]
    queries = [" ".join(rng.choice(words, 4)) for _ in range(25)]
    scores, rows = bm25_search(queries, corpus, 10)
    want_scores, want_rows = slow_bm25(queries, corpus, 10)
    assert rows.tolist() == [row + [-1] * (10 - len(row)) for row in want_rows]
    for found, want in zip(scores, want_scores, strict=True):
        np.testing.assert_allclose(found[: len(want)], want, atol=2e-5)


def test_ties_go_to_the_smaller_row_also_at_the_last_place() -> None:
    corpus = ["狗", "猫 猫", "猫 狗", "猫 狗", "猫 狗", "鸟", "猫 狗"]
    scores, rows = bm25_search(["猫"], corpus, 3)
    assert rows.tolist() == [[1, 2, 3]] and scores[0, 1] == scores[0, 2] < scores[0, 0]


def test_no_shared_word_is_no_hit() -> None:
    scores, rows = bm25_search(["鸟", "", "猫"], ["猫", "", "。"], 2)
    assert rows.tolist() == [[-1, -1], [-1, -1], [0, -1]]
    assert (scores[rows < 0] == -np.inf).all() and scores[2, 0] > 0


@pytest.mark.parametrize("corpus", [[], ["", "。。。"]])
def test_a_corpus_without_words(corpus: list[str]) -> None:
    scores, rows = bm25_search(["猫", "狗"], corpus, 3)
    assert (rows == -1).all() and (scores == -np.inf).all() and rows.shape == (2, 3)


def test_k_must_be_positive() -> None:
    with pytest.raises(UserError, match="k=0: must be at least 1"):
        bm25_search(["猫"], ["猫"], 0)


SEARCH = """
from bge_core.search.words import bm25_search
corpus = [f"北京大学 第{i % 7}年 w{i % 11} {'猫' * (i % 3)}" for i in range(300)]
scores, rows = bm25_search(["第3年的猫 w5", "大学 w7 w8"], corpus, 50, show_progress=SHOW)
open(OUT, "w").write(repr((scores.tolist(), rows.tolist())))
"""


def test_silent_and_the_same_in_every_process(tmp_path: Path) -> None:
    """Python's sets have another order in each; the library must not print, nor show bars unless asked to."""
    found = []
    for seed, show in (("1", False), ("2", True)):
        out = tmp_path / seed
        script = SEARCH.replace("SHOW", str(show)).replace("OUT", repr(str(out)))
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and done.stdout == ""
        assert ("BM25" in done.stderr) == show and (done.stderr == "") != show
        found.append(out.read_text())
    assert found[0] == found[1] and "-1" not in found[0]


# --- fusion -----------------------------------------------------------------------------------------------------------


def slow_fusion(rankings: Sequence[np.ndarray], k: int, constant: int = 60) -> list[list[int]]:
    """In fractions, so that ties are ties; one query at a time."""
    fused = []
    for of_query in zip(*rankings, strict=True):
        score: Counter[int] = Counter()
        for ranking in of_query:
            for rank, row in enumerate(ranking.tolist(), start=1):
                if row >= 0:
                    score[row] += Fraction(1, constant + rank)  # type: ignore[assignment]
        best = sorted(score, key=lambda row: (-score[row], row))[:k]
        fused.append(best + [-1] * (k - len(best)))
    return fused


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    widths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    num_queries=st.integers(0, 5),
    k=st.integers(1, 20),
    constant=st.sampled_from([0, 1, 60]),
)
def test_fusion_equals_fractions(seed: int, widths: list[int], num_queries: int, k: int, constant: int) -> None:
    rng = np.random.default_rng(seed)
    rankings = []
    for width in widths:
        ranking = np.full((num_queries, width), -1, dtype=np.int64)
        for places in ranking:
            num = rng.integers(0, width + 1)
            places[:num] = rng.choice(10, num, replace=False)
        rankings.append(ranking)
    found = reciprocal_rank_fusion(rankings, k, constant)
    assert found.dtype == np.int64 and found.shape == (num_queries, k)
    assert found.tolist() == slow_fusion(rankings, k, constant)


def test_what_several_rankings_hold_wins() -> None:
    rankings = [np.array([[5, 9, 2], [1, -1, -1]]), np.array([[9, 3], [-1, -1]])]
    assert reciprocal_rank_fusion(rankings, 5).tolist() == [[9, 5, 3, 2, -1], [1, -1, -1, -1, -1]]


def test_a_sum_in_another_order_is_no_other_score() -> None:
    """1/67 + 1/61 + 1/62 is larger than 1/61 + 1/62 + 1/67 in the last bit of a float."""
    places = [{1: 3, 7: 9}, {1: 9, 2: 3}, {2: 9, 7: 3}]
    rankings = [np.array([[row.get(rank, 100 * i + rank) for rank in range(1, 8)]]) for i, row in enumerate(places, 1)]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        assert reciprocal_rank_fusion([rankings[i] for i in order], 2).tolist() == [[3, 9]]


def test_many_queries_in_blocks_equal_the_reference_and_take_seconds() -> None:
    rng = np.random.default_rng(1)
    rankings = [rng.permuted(np.tile(np.arange(300), (3000, 1)), axis=1)[:, :200] for _ in range(2)]
    start = time.process_time()
    found = reciprocal_rank_fusion(rankings, 200)
    assert time.process_time() - start < 5  # 0.3 s where nothing else runs: 100,000 queries are some 10 s
    for some in (slice(0, 3), slice(1023, 1026), slice(2997, 3000)):
        assert found[some].tolist() == slow_fusion([ranking[some] for ranking in rankings], 200)


def test_rankings_of_other_queries_are_refused() -> None:
    with pytest.raises(UserError, match=r"rankings of \[2, 3\] queries"):
        reciprocal_rank_fusion([np.zeros((2, 1), int), np.zeros((3, 1), int)], 1)
    with pytest.raises(UserError, match="at least one"):
        reciprocal_rank_fusion([], 1)
