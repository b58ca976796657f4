"""Approximate search against the exact one: recall, exact scores, and an index on disk that is right or refused."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from bge_core import UserError
from bge_core.search import approximate
from bge_core.search import exact as search_exact
from bge_core.search.approximate import approximate_search, default_parameters, measure_recall, recall_of
from bge_core.search.exact import exact_search

FACTORIES = ["HNSW16", "IVF32,Flat", "IVF32,PQ8x4", "L2norm,IVF32,Flat", "IVF32_HNSW16,SQ8", "PQ8x4"]
Vectors = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    """200 queries and 4,000 rows of dimension 24 in 80 clusters, of length 1."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((80, 24))

    def near_centers(num: int) -> np.ndarray:
        some = (centers[rng.integers(80, size=num)] + 0.5 * rng.standard_normal((num, 24))).astype(np.float32)
        return some / np.linalg.norm(some, axis=1, keepdims=True)

    return near_centers(200), near_centers(4000)


@pytest.fixture(autouse=True)
def warnings_start_afresh() -> Iterator[None]:
    search_exact.warn_once.cache_clear()
    yield
    search_exact.warn_once.cache_clear()


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


def assert_same(found: tuple[np.ndarray, np.ndarray, Any], expected: tuple[np.ndarray, np.ndarray, Any]) -> None:
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("factory", FACTORIES)
def test_finds_most_and_scores_exactly(factory: str, vectors: Vectors) -> None:
    queries, corpus = vectors
    scores, rows, facts = approximate_search(queries, corpus, 20, factory, content_key="a")
    assert scores.dtype == np.float32 and rows.dtype == np.int64 and scores.shape == rows.shape == (200, 20)
    assert recall_of(rows, exact_search(queries, corpus, 20)[1]) > 0.95
    everything = (queries.astype(np.float64) @ corpus.astype(np.float64).T).astype(np.float32)
    np.testing.assert_array_equal(scores, np.take_along_axis(everything, rows, axis=1))
    for own_scores, own_rows in zip(scores, rows, strict=True):
        assert list(zip(-own_scores, own_rows, strict=True)) == sorted(zip(-own_scores, own_rows, strict=True))
        assert len(set(own_rows)) == 20
    assert facts["index_factory"] == factory and not facts["index_reused"] and facts["device"] == "cpu"


def test_codes_are_rescored_from_more_candidates_than_are_returned(vectors: Vectors) -> None:
    queries, corpus = vectors
    exact_rows = exact_search(queries, corpus, 20)[1]
    index = faiss.index_factory(24, "PQ8x4np", faiss.METRIC_INNER_PRODUCT)
    index.train(corpus)
    index.add(corpus)
    by_codes = recall_of(index.search(queries, 20)[1], exact_rows)
    assert (
        by_codes
        < 0.8
        < 0.95
        < recall_of(approximate_search(queries, corpus, 20, "PQ8x4", content_key="")[1], exact_rows)
    )


def test_ties_and_padding_are_those_of_the_exact_search(vectors: Vectors) -> None:
    queries, corpus = vectors[0][:30], vectors[1][:300].copy()
    corpus[100:140] = corpus[7]
    for k in (1, 50, 300, 310):
        expected = exact_search(queries, corpus, k)
        for memory_mb in (0.001, 0.05, 512):
            found = approximate_search(queries, corpus, k, "Flat", content_key="a", memory_mb=memory_mb)
            if k != 50:  # at 50 the tie may straddle the last candidate
                np.testing.assert_array_equal(found[1], expected[1])
            np.testing.assert_array_equal(found[0], expected[0])


def test_what_is_not_found_is_minus_one_at_the_end(vectors: Vectors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximate, "default_parameters", lambda *arguments: "nprobe=1")
    scores, rows, facts = approximate_search(*vectors, 1500, "IVF32,Flat", content_key="a")
    missing = rows < 0
    assert missing.any() and not missing.all() and facts["parameters"] == "nprobe=1"
    np.testing.assert_array_equal(missing, np.sort(missing, axis=1))
    np.testing.assert_array_equal(missing, scores == -np.inf)


def test_empty_corpus_and_empty_queries(tmp_path: Path) -> None:
    some, none = np.ones((3, 5), np.float32), np.empty((0, 5), np.float32)
    scores, rows, _ = approximate_search(some, none, 2, "HNSW16", content_key="a", path=tmp_path / "i")
    assert (rows == -1).all() and (scores == -np.inf).all() and rows.shape == scores.shape == (3, 2)
    assert approximate_search(none, some, 2, "HNSW16", content_key="a")[1].shape == (0, 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("factory", ["HNSW16", "IVF32,PQ8x4"])
def test_memory_maps_half_precision_and_array_likes(factory: str, vectors: Vectors, tmp_path: Path) -> None:
    class View:
        """What a cache of vectors offers: neither an array nor a memory map."""

        shape, dtype = (4000, 24), np.dtype(np.float16)

        def __len__(self) -> int:
            return 4000

        def __getitem__(self, which: Any) -> np.ndarray:
            return np.asarray(mapped[which])

    queries, corpus = vectors[0], vectors[1].astype(np.float16)
    corpus.tofile(tmp_path / "corpus.bin")
    mapped = np.memmap(tmp_path / "corpus.bin", dtype=np.float16, mode="r", shape=corpus.shape)
    expected = approximate_search(queries, corpus, 10, factory, content_key="a")
    for other in (mapped, View(), corpus.astype(np.float32)):
        assert_same(approximate_search(queries, other, 10, factory, content_key="a"), expected)
    assert measure_recall(queries, View(), expected[1], 10) > 0.9  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ the index on disk


@pytest.mark.parametrize("factory", [*FACTORIES, "Flat"])
def test_an_index_is_reused_mapped_and_not_written_again(
    factory: str, vectors: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, corpus = vectors
    path, flags = tmp_path / "new" / "index.faiss", []
    first = approximate_search(queries, corpus, 10, factory, content_key="a", path=path)
    written = files_of(path.parent)
    assert set(written) == {"index.faiss", "index.faiss.json"}
    stated = json.loads(written["index.faiss.json"][0])
    assert stated == {
        "index_factory": factory, "dimension": 24, "rows": 4000, "content_key": "a", "seed": 0,
        "train_rows": 0 if factory in ("HNSW16", "Flat") else 4000, "faiss": faiss.__version__,
        "bytes": path.stat().st_size,
    }  # fmt: skip

    read_index = faiss.read_index
    monkeypatch.setattr(faiss, "index_factory", None)  # nothing is built
    monkeypatch.setattr(faiss, "read_index", lambda name, flag: flags.append(flag) or read_index(name, flag))
    again = approximate_search(queries, corpus, 10, factory, content_key="a", path=str(path), seed=5)
    assert_same(again, first)
    assert again[2] == first[2] | {"index_reused": True}
    assert files_of(path.parent) == written
    assert flags == [faiss.IO_FLAG_MMAP if "IVF" in factory else faiss.IO_FLAG_MMAP_IFC]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"factory": "HNSW16"}, "index_factory 'IVF32,Flat', not 'HNSW16'"),
        ({"content_key": "b"}, "content_key 'a', not 'b'"),
        ({"rows": 3999}, "rows 4000, not 3999"),
        ({"dim": 23}, "dimension 24, not 23"),
    ],
)
def test_an_index_of_something_else_is_refused(
    change: dict[str, Any], says: str, vectors: Vectors, tmp_path: Path
) -> None:
    queries, corpus = vectors
    path = tmp_path / "index.faiss"
    approximate_search(queries, corpus, 5, "IVF32,Flat", content_key="a", path=path)
    written = files_of(tmp_path)
    dim = change.get("dim", 24)
    with pytest.raises(UserError, match=f"^{path}: .*{says}; name another --index_path, or delete"):
        approximate_search(
            queries[:, :dim], corpus[: change.get("rows"), :dim], 5, change.get("factory", "IVF32,Flat"),
            content_key=change.get("content_key", "a"), path=path,
        )  # fmt: skip
    assert files_of(tmp_path) == written


@pytest.mark.parametrize("factory", ["HNSW16", "IVF32,Flat"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("shorter", "is broken: 5,000 bytes, not"),
        ("longer", "is broken: .* bytes, not"),
        ("zeros", "is broken, or of a newer faiss"),
        ("other", "holds 10 rows of dimension 24, unlike its .json"),
        ("no json", "index.faiss.json, which says what an index holds, is not beside it"),
        ("json list", "index.faiss.json, which says what an index holds, is not beside it"),
        ("half json", "not JSON"),
        ("folder", "is a folder"),
    ],
)
def test_a_broken_index_is_refused(factory: str, damage: str, says: str, vectors: Vectors, tmp_path: Path) -> None:
    queries, corpus = vectors
    path, beside = tmp_path / "index.faiss", tmp_path / "index.faiss.json"
    approximate_search(queries, corpus, 5, factory, content_key="a", path=path)
    whole = path.read_bytes()
    if damage in ("shorter", "longer"):
        path.write_bytes(whole[:5000] if damage == "shorter" else whole + b"\0")
    elif damage == "zeros":
        path.write_bytes(bytes(len(whole)))
    elif damage == "other":
        index = faiss.IndexFlatIP(24)
        index.add(corpus[:10])
        faiss.write_index(index, str(path))
        beside.write_text(json.dumps(json.loads(beside.read_text()) | {"bytes": path.stat().st_size}))
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "no json":
        beside.unlink()
    else:
        beside.write_text("[]" if damage == "json list" else '{"rows": ')
    with pytest.raises(UserError, match=f"^{tmp_path}/index.faiss.*{says}"):
        approximate_search(queries, corpus, 5, factory, content_key="a", path=path)


@pytest.mark.parametrize("moment", ["half", "between"])
def test_killed_while_writing_it_leaves_nothing_half(moment: str, vectors: Vectors, tmp_path: Path) -> None:
    queries, corpus = vectors
    path = tmp_path / "index.faiss"
    child = os.fork()
    if child == 0:
        try:
            if moment == "half":
                faiss.write_index = lambda index, name: (Path(name).write_bytes(b"half"), os._exit(9))
            else:
                write_json = approximate.write_json
                approximate.write_json = lambda *args: (write_json(*args), os._exit(9))  # type: ignore[assignment]
            approximate_search(queries, corpus, 5, "IVF32,Flat", content_key="a", path=path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not path.exists() and (tmp_path / "index.faiss.json").exists() == (moment == "between")
    # another key: what the killed run left behind binds nobody
    expected = approximate_search(queries, corpus, 5, "IVF32,Flat", content_key="b")
    for reused in (False, True):
        found = approximate_search(queries, corpus, 5, "IVF32,Flat", content_key="b", path=path)
        assert_same(found, expected)
        assert found[2]["index_reused"] is reused


def test_a_failed_write_leaves_nothing(vectors: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(index: Any, name: str) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(faiss, "write_index", full_disk)
    with pytest.raises(OSError, match="no space"):
        approximate_search(*vectors, 5, "Flat", content_key="a", path=tmp_path / "index.faiss")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused_before_the_work(vectors: Vectors, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    broken = vectors[1].copy()
    broken[0] = np.nan  # building would name it
    with pytest.raises(UserError, match="file: cannot be written"):
        approximate_search(vectors[0], broken, 5, "Flat", content_key="a", path=tmp_path / "file" / "index.faiss")


@pytest.mark.parametrize("factory", ["HNSW16", "IVF32,PQ8x4"])
def test_with_one_thread_it_is_a_function_of_its_inputs(
    factory: str, vectors: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, corpus = vectors
    monkeypatch.setattr(approximate, "TRAIN_PER_CENTROID", 4)  # so that the seed chooses some rows
    faiss.omp_set_num_threads(1)
    made = {}
    for name, seed, memory_mb in (("a", 0, 512), ("b", 0, 0.1), ("c", 1, 512)):
        path = tmp_path / name
        found = approximate_search(
            queries, corpus, 10, factory, content_key="a", path=path, seed=seed, memory_mb=memory_mb
        )
        made[name] = (*found[:2], path.read_bytes())
    assert_same(made["a"], made["b"])
    assert made["a"][2] == made["b"][2]
    assert (made["a"][2] == made["c"][2]) == (factory == "HNSW16")  # which is not trained


# ------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        (
            "HNSX",
            "makes no such index for vectors of dimension 24 .could not parse index string HNSX.; for example Flat",
        ),
        ("", "makes no such index"),
        ("PQ7", "should be a multiple of the number of subquantizers .*IVF4096,PQ64"),
        ("IDMap,Flat", "cannot fill it"),
        ("IVF512,Flat", "4,000 rows to train on are too few for 512 lists, which need 5,120; write IVF32, or HNSW32"),
    ],
)
def test_factory_strings_that_do_not_go(factory: str, says: str, vectors: Vectors, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^--index_factory '{factory}': .*{says}"):
        approximate_search(*vectors, 5, factory, content_key="a", path=tmp_path / "index.faiss")
    assert not list(tmp_path.iterdir())


def test_default_parameters_follow_the_formula() -> None:
    def of(factory: str, num_rows: int, num_candidates: int) -> str:
        index = faiss.index_factory(8, factory, faiss.METRIC_INNER_PRODUCT)
        index.ntotal = num_rows
        faiss.extract_index_ivf(index).ntotal = num_rows if "IVF" in factory else 0
        return default_parameters(index, factory, num_candidates)

    assert default_parameters(faiss.index_factory(8, "Flat"), "Flat", 100) == ""
    assert default_parameters(faiss.index_factory(8, "HNSW16"), "HNSW16", 10) == "efSearch=128"
    assert default_parameters(faiss.index_factory(8, "OPQ4,HNSW16"), "OPQ4,HNSW16", 300) == "efSearch=600"
    assert of("IVF4096,Flat", 10**7, 200) == "nprobe=128"  # 2 sqrt(4096)
    assert of("IVF4096,Flat", 5 * 10**4, 200) == "nprobe=164"  # lists of 12 rows, 2,000 rows
    assert of("OPQ4,IVF4,PQ4", 10**5, 200) == "nprobe=4"
    assert of("IVF65536_HNSW32,Flat", 10**9, 200) == "nprobe=512,quantizer_efSearch=1024"


@pytest.mark.parametrize(
    ("k", "dim", "memory_mb", "says"),
    [(0, 24, 1, "k=0"), (5, 24, 0, "memory_mb=0"), (5, 20, 1, "queries have dimension 20, the corpus has 24")],
)
def test_bad_arguments(k: int, dim: int, memory_mb: float, says: str, vectors: Vectors) -> None:
    with pytest.raises(UserError, match=says):
        approximate_search(vectors[0][:, :dim], vectors[1], k, "Flat", content_key="a", memory_mb=memory_mb)


@pytest.mark.parametrize("factory", ["HNSW16", "IVF32,Flat", "SQ8"])
def test_nan_is_named_by_its_row(factory: str, vectors: Vectors) -> None:
    queries, corpus = vectors[0].copy(), vectors[1].copy()
    corpus[1234, 3] = np.nan
    with pytest.raises(UserError, match="^corpus: row 1234 holds NaN"):
        approximate_search(queries, corpus, 5, factory, content_key="a", memory_mb=0.1)
    queries[17, 0] = np.inf
    with pytest.raises(UserError, match="^queries: row 17 holds NaN"):
        approximate_search(queries, vectors[1], 5, factory, content_key="a")


def test_pq_is_made_without_the_order_of_bits_that_nobody_uses(
    vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def note(dim: int, factory: str, metric: int) -> None:
        asked.append(factory)
        raise RuntimeError("Error: that is enough")

    monkeypatch.setattr(faiss, "index_factory", note)
    for factory in ("OPQ8,IVF32,PQ8x4", "PQ8", "IVF32,PQ8x4fs", "IVF32,PQ8np,RFlat"):
        with pytest.raises(UserError, match=f"'{factory}': .*that is enough"):
            approximate_search(*vectors, 5, factory, content_key="a")
    assert asked == ["OPQ8,IVF32,PQ8x4np", "PQ8np", "IVF32,PQ8x4fs", "IVF32,PQ8np,RFlat"]


# ------------------------------------------------------------------------------------------------------ GPUs and recall


def test_an_index_goes_to_all_gpus_or_says_why_not(
    vectors: Vectors, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The GPU's code path with a CPU index in the GPU's place."""

    def to_all_gpus(index: Any, co: Any) -> Any:
        assert co.shard is True and co.useFloat16 is True
        if isinstance(index, faiss.IndexHNSW):
            raise RuntimeError("Error in x at a.cpp:7: This index type is not implemented on GPU.")
        return index

    fakes = {
        "get_num_gpus": lambda: 1, "GpuMultipleClonerOptions": SimpleNamespace, "index_cpu_to_all_gpus": to_all_gpus
    }  # fmt: skip
    stub = SimpleNamespace(**{name: getattr(faiss, name) for name in dir(faiss)} | fakes)
    for module in (approximate, search_exact):
        monkeypatch.setattr(module, "import_faiss", lambda: stub)
    with caplog.at_level(logging.WARNING):
        for factory, device in (("IVF32,Flat", "gpu"), ("HNSW16", "cpu"), ("HNSW16", "cpu")):
            expected = approximate_search(*vectors, 5, factory, content_key="a")
            found = approximate_search(*vectors, 5, factory, content_key="a", use_gpu=True)
            assert_same(found, expected)
            assert found[2]["device"] == device
    assert [record.message for record in caplog.records] == [
        "faiss has no HNSW16 for GPUs (This index type is not implemented on GPU.): searching on the CPU"
    ]


def test_without_a_gpu_it_warns_once(vectors: Vectors, caplog: pytest.LogCaptureFixture) -> None:
    if search_exact.gpu_available():
        pytest.skip("there is one")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert approximate_search(*vectors, 5, "Flat", content_key="a", use_gpu=True)[2]["device"] == "cpu"
    assert len([record for record in caplog.records if "searching on the CPU" in record.message]) == 1


def test_recall_by_hand() -> None:
    exact = np.array([[4, 2, 9], [1, 3, -1], [-1, -1, -1]])
    assert recall_of(exact, exact) == 1
    assert recall_of(np.array([[9, 4, 7], [-1, -1, -1], [5, -1, 0]]), exact) == 2 / 5
    assert recall_of(exact[2:], exact[2:]) == 1


def test_recall_is_measured_on_a_seeded_sample(vectors: Vectors) -> None:
    queries, corpus = vectors
    rows = exact_search(queries, corpus, 10)[1]
    assert measure_recall(queries, corpus, rows, 10) == 1
    rows[::2, 5:] = -1  # half of the queries lack half
    assert measure_recall(queries, corpus, rows, 10) == 0.75
    assert measure_recall(queries, corpus, rows, 5) == 1
    found = [measure_recall(queries, corpus, rows, 10, sample=21, seed=seed) for seed in (1, 1, 2, 3, 4)]
    assert found[0] == found[1] and len(set(found)) > 1 and all(0.5 < recall < 1 for recall in found)


def test_few_queries_are_multiplied_as_a_matrix_too(vectors: Vectors) -> None:
    faiss.cvar.distance_compute_blas_threshold = 128_000  # the default of faiss 1.15: pair by pair, eight times as long
    exact_search(vectors[0][:5], vectors[1], 3)
    assert faiss.cvar.distance_compute_blas_threshold == 20
