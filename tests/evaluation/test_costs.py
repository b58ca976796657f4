"""What smaller vectors cost: against exact search, numpy and a slow reference."""

import numpy as np
import pytest

from bge_core import UserError
from bge_core.evaluation.costs import cut, measure_costs
from bge_core.evaluation.evaluator import rank
from bge_core.evaluation.metrics import mean_metrics, per_query_metrics
from bge_core.evaluation.tasks import RetrievalTask

METRICS = ("MRR@10", "nDCG@10", "Recall@100")


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def made() -> tuple[np.ndarray, np.ndarray, RetrievalTask]:
    rng = np.random.default_rng(0)
    corpus = unit(rng.standard_normal((300, 32)))
    queries = unit(corpus[:40] + 0.25 * rng.standard_normal((40, 32)))
    ids = [str(i) for i in range(300)]
    task = RetrievalTask(
        "t", ids[:40], ids[:40], ids, ids, [{i: 1} for i in range(40)], [[]] * 40, [], [{}] * 40
    )  # fmt: skip
    return queries, corpus, task


def test_all_of_the_numbers_are_exact_search(made: tuple[np.ndarray, np.ndarray, RetrievalTask]) -> None:
    queries, corpus, task = made
    (line,) = measure_costs(queries, corpus, task, k=100)
    assert list(line.row()) == ["dimension", "type", *METRICS, "bytes_per_passage", "queries_per_second"]
    want = rank(queries, corpus, task, k=100, metrics=METRICS).means
    assert line.metrics == pytest.approx(want)
    assert (line.dimension, line.type, line.bytes_per_passage) == (32, "float32", 128)
    assert 0.3 < line.metrics["MRR@10"] < 1 and line.queries_per_second > 0


def test_cut_vectors_have_length_one(made: tuple[np.ndarray, np.ndarray, RetrievalTask]) -> None:
    queries, corpus, task = made
    np.testing.assert_allclose(cut(corpus, 8), unit(corpus[:, :8]), rtol=1e-6)
    full, half = measure_costs(queries, corpus, task, dims=[32, 8], k=100)
    want = rank(unit(queries[:, :8]), unit(corpus[:, :8]), task, k=100, metrics=METRICS).means
    assert half.metrics == pytest.approx(want)
    assert half.metrics["MRR@10"] < full.metrics["MRR@10"] and half.bytes_per_passage == 32


def test_number_types(made: tuple[np.ndarray, np.ndarray, RetrievalTask]) -> None:
    queries, corpus, task = made
    lines = measure_costs(queries, corpus, task, dtypes=["float32", "float16", "int8", "binary"], k=20,
                          metrics=["MRR@10"])  # fmt: skip
    assert [line.bytes_per_passage for line in lines] == [128, 64, 32, 4]
    scores = [line.metrics["MRR@10"] for line in lines]
    assert scores[1] == pytest.approx(scores[0], abs=0.02) and scores[2] == pytest.approx(scores[0], abs=0.05)
    # binary: the 4 k nearest by bits, then by q . sign(c), the slow way
    ranked = []
    for query in queries:
        apart = ((corpus > 0) != (query > 0)).sum(axis=1)
        sure = np.argsort(apart, kind="stable")[:80]
        exact = [float(query @ np.where(corpus[row] > 0, 1, -1)) for row in sure]
        ranked.append(sure[np.argsort(-np.array(exact), kind="stable")][:20])
    want = mean_metrics(per_query_metrics(ranked, task.relevant, task.missing, ["MRR@10"]))
    assert scores[3] == pytest.approx(want["MRR@10"], abs=1e-9) and scores[3] < scores[0]


def test_index_types(made: tuple[np.ndarray, np.ndarray, RetrievalTask]) -> None:
    queries, corpus, task = made
    flat, graph = measure_costs(queries, corpus, task, factories=["HNSW16"], k=20)
    assert graph.type == "HNSW16" and graph.metrics["MRR@10"] == pytest.approx(flat.metrics["MRR@10"], abs=0.02)
    assert graph.bytes_per_passage > 128


def test_bad_input(made: tuple[np.ndarray, np.ndarray, RetrievalTask]) -> None:
    queries, corpus, task = made
    with pytest.raises(UserError, match="--dims 33: these vectors have 32 dimensions"):
        measure_costs(queries, corpus, task, dims=[33])
    with pytest.raises(UserError, match="--dims 0"):
        measure_costs(queries, corpus, task, dims=[0])
    with pytest.raises(UserError, match="12 dimensions do not divide by 8"):
        measure_costs(queries, corpus, task, dims=[12], dtypes=["binary"])
