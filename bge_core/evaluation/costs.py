"""What smaller vectors cost in quality, and save in memory and time: dimensions, number types, index types.

    full vectors -> the first d dimensions -> float32, float16, int8 or binary -> search, all by faiss -> metrics

Shapes: Q questions, N passages, D embedding size, d dimensions kept, k depth.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bge_core import UserError
from bge_core.evaluation.metrics import mean_metrics, per_query_metrics, search_depth
from bge_core.evaluation.tasks import RetrievalTask
from bge_core.runtime.flags import Similarity
from bge_core.search.approximate import approximate_search, empty_index
from bge_core.search.exact import import_faiss

COST_METRICS = ("MRR@10", "nDCG@10", "Recall@100")
RESCORED = 4  # times k: as many are found by their bits and ordered by their inner products
Search = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Cost:
    """What vectors of one form give and take.

    Args:
        dimension, type: how many numbers a vector has and as what they are kept, or the index type.
        metrics: {name: mean}.
        bytes_per_passage: of what is searched.
        queries_per_second: all questions at once, the faster of two runs, faiss's threads.
    """

    dimension: int
    type: str
    metrics: dict[str, float]
    bytes_per_passage: float
    queries_per_second: float

    def row(self) -> dict[str, Any]:
        """The figures by their names, in the order of a table."""
        speed = {"bytes_per_passage": self.bytes_per_passage, "queries_per_second": self.queries_per_second}
        return {"dimension": self.dimension, "type": self.type} | self.metrics | speed


def cut(vectors: np.ndarray, dim: int, similarity: Similarity = "cosine") -> np.ndarray:
    """The first `dim` numbers of each vector, for cosines of length 1 (Matryoshka; Kusupati et al. 2022, sec. 3)."""
    part = np.ascontiguousarray(vectors[:, :dim], dtype=np.float32)
    return part if similarity == "dot" else part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)


def refuse_costs(size: int, dims: Sequence[int], dtypes: Sequence[str], factories: Sequence[str]) -> None:
    """UserError where vectors of this size cannot be cut, packed or indexed so; before they are made."""
    if bad := [dim for dim in dims if not 0 < dim <= size]:
        raise UserError(f"--dims {bad[0]}: these vectors have {size} dimensions; use 1 to {size}")
    if "binary" in dtypes and (bad := [dim for dim in dims or (size,) if dim % 8]):
        raise UserError(f"--dtypes binary: packs eight numbers in a byte, and {bad[0]} dimensions do not divide by 8")
    for factory in factories:
        empty_index(size, factory)


def measure_costs(
    query_QD: np.ndarray,
    corpus_ND: np.ndarray,
    task: RetrievalTask,
    *,
    dims: Sequence[int] = (),
    dtypes: Sequence[str] = ("float32",),
    factories: Sequence[str] = (),
    k: int = 100,
    metrics: Sequence[str] = COST_METRICS,
    similarity: Similarity = "cosine",
) -> list[Cost]:
    """Quality, bytes and speed of every dimension with every number type, then of the index types at full size.

        float16  rounded to nearest                     2 d bytes
        int8     256 equal steps from the least to the largest number of each dimension in the corpus    d bytes
        binary   one bit for the sign of each number    d / 8 bytes
                 4 k nearest by Hamming distance, then ordered by q . sign(c), q in float32

    Args:
        query_QD, corpus_ND: float32 or float16.
        task: whose texts they are.
        dims: d; empty: D alone.
        dtypes: some of float32, float16, int8 and binary.
        factories: faiss's index_factory strings; bytes are those of the index without the vectors that rescore.
        k: depth; a metric that needs a deeper one gets it.
        metrics: names as in `per_query_metrics`.
        similarity: of the model; cosine: what is left of a vector is scaled to length 1.

    Returns:
        One for each dimension with each type, then for each index type.

    Raises:
        UserError: a dimension above D, binary with d that eight does not divide, or as `approximate_search`.

    Source: binary with rescoring, Yamada et al. 2021, "Efficient Passage Retrieval with Hashing".
    """
    query_QD, corpus_ND = (np.asarray(vectors, dtype=np.float32) for vectors in (query_QD, corpus_ND))
    size, found = corpus_ND.shape[1], list[Cost]()
    refuse_costs(size, dims, dtypes, factories)

    def add(dim: int, kind: str, bytes_each: float, search: Search, queries: np.ndarray) -> None:
        took = []
        for _ in range(2):
            started = time.perf_counter()
            rows = search(queries)
            took.append(time.perf_counter() - started)
        rows = task.drop_own(rows, rows)[1]
        means = mean_metrics(per_query_metrics(rows, task.relevant, task.missing, metrics))
        whole = int(bytes_each) if bytes_each == int(bytes_each) else bytes_each
        found.append(Cost(dim, kind, means, whole, len(queries) / min(took)))

    k = task.depth(search_depth(k, metrics, task.relevant, task.missing))
    for dim in dims or (size,):
        queries, corpus = cut(query_QD, dim, similarity), cut(corpus_ND, dim, similarity)
        for dtype in dtypes:
            if dtype == "binary":
                add(dim, dtype, dim / 8, _binary_search(corpus, k), queries)
            else:
                index = _flat_index(corpus, dtype)
                add(dim, dtype, index.code_size, lambda some, index=index: index.search(some, k)[1], queries)  # type: ignore[misc]
    for factory in factories:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "index.faiss"

            def search(some: np.ndarray, factory: str = factory, path: Path = path) -> np.ndarray:
                return approximate_search(some, corpus_ND, k, factory, content_key="costs", path=path)[1]

            search(query_QD[:1])  # makes it
            add(size, factory, path.stat().st_size / len(corpus_ND), search, query_QD)
    return found


def _flat_index(corpus: np.ndarray, dtype: str) -> Any:
    """All vectors in the type, compared one by one."""
    faiss = import_faiss()
    if dtype == "float32":
        index = faiss.IndexFlatIP(corpus.shape[1])
    else:
        kind = {"float16": faiss.ScalarQuantizer.QT_fp16, "int8": faiss.ScalarQuantizer.QT_8bit}[dtype]
        index = faiss.IndexScalarQuantizer(corpus.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
        index.train(corpus)
    index.add(corpus)
    return index


def _binary_search(corpus: np.ndarray, k: int) -> Search:
    faiss, dim = import_faiss(), corpus.shape[1]
    bits = np.packbits(corpus > 0, axis=1)
    index = faiss.IndexBinaryFlat(dim)
    index.add(bits)

    def search(queries: np.ndarray) -> np.ndarray:
        near = index.search(np.packbits(queries > 0, axis=1), min(RESCORED * k, len(corpus)))[1]
        best = np.full((len(queries), k), -1)
        for i, rows in enumerate(near):
            signs = np.unpackbits(bits[rows], axis=1).astype(np.float32) * 2 - 1
            order = np.lexsort((rows, -(signs @ queries[i])))[:k]
            best[i, : len(order)] = rows[order]
        return best

    return search
