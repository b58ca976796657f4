"""Exact search against a brute-force float64 search, with blocks of every size, ties, and a faiss that errs."""

import logging
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_core import UserError
from bge_core.search import exact
from bge_core.search.exact import exact_search, gpu_available

BLOCK_SIZES_MB = (0.0001, 0.003, 0.01, 0.1, 512)  # from blocks of one row to everything in one block


def brute_force(queries: np.ndarray, corpus: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All scores in float64, rounded to float32, in a stable sort; padded to k."""
    all_scores = (queries.astype(np.float64) @ corpus.astype(np.float64).T).astype(np.float32)
    order = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]
    padding = ((0, 0), (0, k - order.shape[1]))
    scores = np.pad(np.take_along_axis(all_scores, order, axis=1), padding, constant_values=-np.inf)
    return scores, np.pad(order, padding, constant_values=-1)


def assert_same(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    assert found[0].dtype == np.float32 and found[1].dtype == np.int64
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


def unit_vectors(rng: np.random.Generator, num: int, dim: int) -> np.ndarray:
    vectors = rng.standard_normal((num, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def near_equal_vectors(rng: np.random.Generator, num: int, dim: int) -> np.ndarray:
    """One vector with noise in its last bits, and exact copies: an encoder that has collapsed."""
    vectors = unit_vectors(rng, 1, dim) + rng.standard_normal((num, dim)).astype(np.float32) * 3e-8
    vectors[::7] = vectors[0]
    return vectors.astype(np.float32)


@pytest.fixture(autouse=True)
def warnings_start_afresh() -> Iterator[None]:
    exact.warn_once.cache_clear()
    yield
    exact.warn_once.cache_clear()


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 60), st.integers(1, 5)),
    k=st.integers(1, 70),
    memory_mb=st.sampled_from(BLOCK_SIZES_MB),
    extra=st.integers(0, 4),
    half=st.booleans(),
)
def test_integer_vectors_tie_by_corpus_order(
    seed: int, sizes: tuple[int, int, int], k: int, memory_mb: float, extra: int, half: bool
) -> None:
    num_queries, num_rows, dim = sizes
    rng = np.random.default_rng(seed)
    dtype = np.float16 if half else np.float32
    queries = 100 * rng.integers(-2, 3, (num_queries, dim)).astype(dtype)  # 100: too large for sums in float16
    corpus = 100 * rng.integers(-2, 3, (num_rows, dim)).astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "EXTRA", extra)  # so that ties cross the last nominee in a corpus this small
        found = exact_search(queries, corpus, k, memory_mb=memory_mb)
    assert_same(found, brute_force(queries, corpus, k))


@pytest.mark.parametrize("make", [unit_vectors, near_equal_vectors])
@pytest.mark.parametrize("memory_mb", BLOCK_SIZES_MB[1:])
def test_real_vectors_equal_float64_in_blocks_of_any_size(make: Any, memory_mb: float) -> None:
    rng = np.random.default_rng(0)
    queries, corpus = unit_vectors(rng, 15, 48), make(rng, 700, 48)
    assert_same(exact_search(queries, corpus, 20, memory_mb=memory_mb), brute_force(queries, corpus, 20))


def test_copies_of_one_vector_tie_beyond_the_nominees() -> None:
    rng = np.random.default_rng(1)
    queries, corpus = unit_vectors(rng, 30, 32), unit_vectors(rng, 3000, 32)
    copies = np.sort(rng.choice(3000, 900, replace=False))
    corpus[copies] = queries[0]  # for query 0 the 900 copies are the best
    for memory_mb in (0.02, 0.1, 512):
        scores, rows = exact_search(queries, corpus, 50, memory_mb=memory_mb)
        np.testing.assert_array_equal(rows[0], copies[:50])
        assert len(set(scores[0].tolist())) == 1
        assert_same((scores, rows), brute_force(queries, corpus, 50))


def test_the_errors_of_the_float32_search_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order of summation, block shape or device: scores off by up to the bound give the same result."""
    rng = np.random.default_rng(2)
    dim, noise = 24, np.random.default_rng(3)

    def noisy_search(queries: np.ndarray, block: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(block, axis=1)
        worst = dim * 2.0**-24 * norms * noise.choice([-1, 1], norms.shape)
        return best_of(queries.astype(np.float64) @ block.astype(np.float64).T + worst, k)

    def best_of(all_scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.argsort(-all_scores, axis=1)[:, :k]
        return np.take_along_axis(all_scores, rows, axis=1).astype(np.float32), rows

    corpus = unit_vectors(rng, 1200, dim)
    for i in range(0, 1200, 40):  # thirty clusters, each about as wide as the error
        corpus[i : i + 40] = corpus[i] + rng.standard_normal((40, dim)).astype(np.float32) * 3e-7
    queries = unit_vectors(rng, 60, dim) * rng.uniform(0.01, 100, (60, 1)).astype(np.float32)
    monkeypatch.setattr(exact, "EXTRA", 5)
    monkeypatch.setattr(exact, "_cpu_search", noisy_search)
    for memory_mb in (0.03, 512):
        assert_same(exact_search(queries, corpus, 50, memory_mb=memory_mb), brute_force(queries, corpus, 50))


@pytest.mark.parametrize("dim", [1, 2, 7, 8, 9, 129, 384])
def test_a_score_depends_on_its_two_vectors_alone(dim: int) -> None:
    rng = np.random.default_rng(dim)
    queries, corpus = unit_vectors(rng, 25, dim), unit_vectors(rng, 300, dim)
    half, mixed = dim // 2, rng.permutation(dim)
    queries[:, half : 2 * half] = queries[:, :half]
    corpus[::2, half : 2 * half] = -corpus[::2, :half]  # products that cancel: what is left is the order of summation
    queries, corpus = queries[:, mixed], corpus[:, mixed]
    whole = exact_search(queries, corpus, 300)
    for i in range(25):
        assert_same(exact_search(queries[i : i + 1], corpus, 300), (whole[0][i : i + 1], whole[1][i : i + 1]))
    order = rng.permutation(300)
    scores, rows = exact_search(queries, corpus[order], 300, memory_mb=0.01)
    np.testing.assert_array_equal(scores, whole[0])
    as_found = np.take_along_axis(scores, np.argsort(order[rows], axis=1), axis=1)
    np.testing.assert_array_equal(as_found, np.take_along_axis(whole[0], np.argsort(whole[1], axis=1), axis=1))


def test_memory_maps_half_precision_and_odd_layouts(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    queries, corpus = unit_vectors(rng, 20, 16).astype(np.float16), unit_vectors(rng, 700, 16).astype(np.float16)
    corpus[100:400] = queries[0]  # the second search, too
    expected = brute_force(queries, corpus, 10)
    for dtype in (np.float16, np.float32):
        path = tmp_path / f"{np.dtype(dtype).name}.bin"
        corpus.astype(dtype).tofile(path)
        mapped = np.memmap(path, dtype=dtype, mode="r", shape=corpus.shape)
        assert_same(exact_search(queries, mapped, 10, memory_mb=0.01), expected)
    wide = np.repeat(corpus.astype(np.float32), 2, axis=1)
    assert_same(exact_search(np.asfortranarray(queries), np.asfortranarray(corpus), 10), expected)
    assert_same(exact_search(queries, wide[:, ::2], 10, memory_mb=0.01), expected)


def test_k_larger_than_the_corpus_is_padded() -> None:
    scores, rows = exact_search(np.ones((2, 3), np.float32), np.eye(3, dtype=np.float32)[:2], 4)
    np.testing.assert_array_equal(rows, [[0, 1, -1, -1]] * 2)
    np.testing.assert_array_equal(scores, [[1, 1, -np.inf, -np.inf]] * 2)


def test_empty_corpus_and_empty_queries() -> None:
    some, none = np.ones((3, 5), np.float32), np.empty((0, 5), np.float32)
    scores, rows = exact_search(some, none, 2)
    assert (rows == -1).all() and (scores == -np.inf).all() and rows.shape == scores.shape == (3, 2)
    scores, rows = exact_search(none, some, 2)
    assert rows.shape == scores.shape == (0, 2) and rows.dtype == np.int64 and scores.dtype == np.float32


@settings(deadline=None)
@given(
    array=st.sampled_from(["queries", "corpus"]),
    row=st.integers(0, 199),
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
    memory_mb=st.sampled_from([0.001, 512]),
)
def test_nan_and_infinity_name_array_and_first_row(array: str, row: int, value: float, memory_mb: float) -> None:
    vectors = {"queries": np.ones((200, 4), np.float32), "corpus": np.ones((200, 4), np.float16)}
    vectors[array][row:, 2] = value
    with pytest.raises(UserError, match=f"^{array}: row {row} holds NaN"):
        exact_search(vectors["queries"], vectors["corpus"], 3, memory_mb=memory_mb)


@pytest.mark.parametrize(
    ("queries", "corpus", "k", "memory_mb", "message"),
    [
        (np.ones((2, 3), np.float32), np.ones((2, 4), np.float32), 1, 1, "dimension 3, the corpus has 4"),
        (np.ones(3, np.float32), np.ones((2, 3), np.float32), 1, 1, r"queries: expected .*float32 \(3,\)"),
        (np.ones((2, 3), np.float32), np.ones((2, 3), np.int64), 1, 1, "corpus: expected .*int64"),
        (np.ones((2, 3), np.float32), np.ones((2, 3), np.float32), 0, 1, "k=0"),
        (np.ones((2, 3), np.float32), np.ones((2, 3), np.float32), 1, 0, "memory_mb=0"),
    ],
)
def test_bad_arguments(queries: np.ndarray, corpus: np.ndarray, k: int, memory_mb: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        exact_search(queries, corpus, k, memory_mb=memory_mb)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15])
def test_tiny_and_large_vectors(scale: float) -> None:
    rng = np.random.default_rng(5)
    queries, corpus = unit_vectors(rng, 10, 16), near_equal_vectors(rng, 400, 16) * np.float32(scale)
    assert_same(exact_search(queries, corpus, 20, memory_mb=0.05), brute_force(queries, corpus, 20))


def test_memory_does_not_grow_with_queries_times_corpus() -> None:
    rng = np.random.default_rng(6)
    queries, corpus = unit_vectors(rng, 8000, 4), unit_vectors(rng, 8000, 4)  # all scores: 244 MiB
    exact_search(queries[:2], corpus[:2], 1)
    for vectors in (corpus, np.ones_like(corpus)):  # the second: every query needs the second search
        num_queries = 8000 if vectors is corpus else 300
        tracemalloc.start()
        exact_search(queries[:num_queries], vectors, 5, memory_mb=4)
        peak_mb = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        assert peak_mb < 4 + 12 * 8000 * 5 / 2**20 + 2


@pytest.mark.parametrize(
    ("processes", "gpus"), [({}, None), ({"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"}, [1])], ids=["alone", "of four"]
)
def test_a_gpu_index_is_filled_block_by_block_and_gives_the_same(
    processes: dict[str, str], gpus: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's code path with a CPU index in the GPU's place: on all GPUs, or on this process's own of two."""
    made = []
    for name, value in processes.items():
        monkeypatch.setenv(name, value)

    def to_gpus(index: Any, co: Any, gpus: list[int] | None) -> Any:
        assert co.shard is True and co.useFloat16 is False
        made.append(gpus)
        return index

    stub = SimpleNamespace(
        get_num_gpus=lambda: 2,
        GpuMultipleClonerOptions=SimpleNamespace,
        IndexFlatIP=faiss.IndexFlatIP,
        index_cpu_to_gpus_list=to_gpus,
        knn=faiss.knn,
        METRIC_INNER_PRODUCT=faiss.METRIC_INNER_PRODUCT,
    )
    monkeypatch.setattr(exact, "import_faiss", lambda: stub)
    rng = np.random.default_rng(7)
    queries, corpus = unit_vectors(rng, 50, 16), unit_vectors(rng, 2500, 16)
    assert gpu_available()
    found = exact_search(queries, corpus, 10, memory_mb=0.05, use_gpu=True)
    assert_same(found, brute_force(queries, corpus, 10))
    exact_search(queries, corpus, 2040, use_gpu=True)  # more than faiss can return there: on the CPU
    assert made == [gpus]


def test_without_a_gpu_it_warns_once_and_searches_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_gpu_names = SimpleNamespace(knn=faiss.knn, METRIC_INNER_PRODUCT=faiss.METRIC_INNER_PRODUCT)
    monkeypatch.setattr(exact, "import_faiss", lambda: without_gpu_names)
    assert not gpu_available()
    vectors = unit_vectors(np.random.default_rng(8), 20, 8)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_same(exact_search(vectors, vectors, 3, use_gpu=True), brute_force(vectors, vectors, 3))
    assert [record.message for record in caplog.records if "GPU" in record.message] == [
        "faiss sees no GPU (faiss-cpu, or none in this machine): searching on the CPU, with the same result"
    ]


def test_gpu_available_with_the_installed_faiss() -> None:
    assert gpu_available() == (hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0)


def test_missing_faiss_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    vectors = np.ones((2, 3), np.float32)
    for use_gpu in (False, True):
        with pytest.raises(UserError, match=r'pip install -e "\.\[cpu\]", or "\.\[gpu\]"'):
            exact_search(vectors, vectors, 1, use_gpu=use_gpu)
