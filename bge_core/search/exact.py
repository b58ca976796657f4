"""Exact inner-product search: for each query the k best corpus rows, the same on every machine, memory bounded.

faiss searches fast, but a float32 score depends in its last bits on the shape of the blocks, on the number of threads
and on the device, so near-equal scores change places, and equal vectors need not tie. So faiss only nominates here:

    1. it searches k + EXTRA rows per query, block by block;
    2. the nominees are scored again in float64, in an order of summation that depends on nothing but the dimension;
    3. they are ordered by that score, rounded to float32, then by corpus row.

A float32 inner product is wrong by at most a known bound E. Whoever belongs to the k best has a float32 score of at
least t - 2E, where t is the k-th best float32 score. If the last nominee lies below that, nobody was missed; otherwise
(many ties, near-equal vectors) that query is searched once more, over all rows from t - 2E up.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from bge_core import UserError
from bge_core.runtime.distributed import gather_objects, world

logger = logging.getLogger(__name__)

EXTRA = 32  # nominees beyond k: enough that hardly any query of an ordinary encoder needs the second search
GPU_MAX_K = 2048  # the most neighbours that faiss returns on a GPU
Search = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def exact_search(
    queries: np.ndarray, corpus: np.ndarray, k: int, *, memory_mb: float = 512, use_gpu: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The k corpus rows with the largest inner product for each query.

        score(q, c) = float32(sum over i of float64(q_i) * float64(c_i))

    Best first; of equal scores the smaller row first, also where they straddle the k-th place. The result is a
    function of the vectors and k alone: bitwise the same for any `memory_mb`, any number of threads, any split of the
    queries, on CPU and GPU. Rows with equal vectors always have equal scores.

    Args:
        queries: (Q, D) float32 or float16, an array or a memory map; whatever is not float32 becomes so block by block.
        corpus: (N, D), likewise.
        k: how many rows per query, at least 1.
        memory_mb: about how much memory to work in, in MiB. It bounds the blocks; the result, 12 * Q * k bytes, one
            float32 for each query, and faiss's own buffers (some 20 MB) come on top. Nothing grows with Q * N.
        use_gpu: let faiss search on all GPUs, in float32; without one (or with k above about 2,000) warn once and
            search on the CPU.

    Returns:
        scores (Q, k) float32 and rows (Q, k) int64. Where the corpus has fewer than k rows (or none), the places
        left over have score -inf and row -1. Without queries: shapes (0, k).

    Raises:
        UserError: an array is not two-dimensional floating point, the dimensions differ, k or memory_mb is not
            positive, a vector holds NaN or infinity (its array and the first bad row are named) or faiss is missing.

    Source: the bound is Higham, Accuracy and Stability of Numerical Algorithms, eq. 3.5; the search is faiss's
        brute-force `knn`.
    """
    scores, rows = empty_result(queries, corpus, k, memory_mb)
    if len(queries) == 0 or len(corpus) == 0:
        return scores, rows
    dim = queries.shape[1]
    num_nominees = min(k + EXTRA, len(corpus))
    search = _gpu_search(dim) if use_gpu and can_use_gpu(num_nominees) else _cpu_search
    # Half of the memory for two corpus blocks, the one that is searched and the next; a quarter for the queries and
    # what is kept per nominee (score, row, the copies of a merge); a quarter for the float64 products. Blocks of one
    # row are slow, but still right.
    budget = memory_mb * 2**20
    corpus_rows = max(1, int(budget / 4 / (4 * dim + 8)))
    query_rows = max(1, int(budget / 4 / (4 * dim + 64 * num_nominees)))
    pair_rows = max(1, int(min(budget / 4, 2**21) / (20 * dim)))  # at most 2 MiB: it stays in the cache

    query_norm = np.concatenate([norms for _, _, norms in checked_blocks(queries, "queries", corpus_rows)])
    # E, for any order of summation: D roundings, one more for the final score, and some for the norms themselves.
    unit = (dim + 8) * 2.0**-24

    for start, block in _blocks(queries, query_rows):
        near, nominees, corpus_norm = _nominate(block, corpus, num_nominees, corpus_rows, search)
        kth = -np.partition(-near, min(k, num_nominees) - 1, axis=1)[:, min(k, num_nominees) - 1]
        bound = unit / (1 - unit) * query_norm[start : start + len(block)].astype(np.float64) * corpus_norm
        floor = kth - 2 * bound
        # A query is done once every row is nominated, or the worst nominee is below the floor.
        is_done = (near.min(axis=1) < floor) | (num_nominees == len(corpus))
        exact = _scores(block, corpus, nominees, pair_rows)
        best = np.lexsort((nominees, -exact))[:, :k]
        for result, of_nominees, empty in ((scores, exact, -np.inf), (rows, nominees, -1)):
            found = np.where(is_done[:, None], np.take_along_axis(of_nominees, best, axis=1), empty)
            result[start : start + len(block), : found.shape[1]] = found
        for offset, corpus_block in _blocks(corpus, corpus_rows) if not is_done.all() else ():
            for i in np.flatnonzero(~is_done):
                above = np.flatnonzero(corpus_block @ block[i] >= floor[i])
                exact = _scores(block[i : i + 1], corpus_block, above[None], pair_rows)
                _keep_best(scores[start + i], rows[start + i], exact[0], above + offset)
    return scores, rows


def search_in_shares(
    queries: np.ndarray, corpus: np.ndarray, k: int, *, memory_mb: float = 512, use_gpu: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """`exact_search` by all processes together, to the same bits: each searches for its share of the queries.

    Every rank calls it with the same vectors and gets the whole result. `memory_mb` is that of all processes of a
    machine; with `use_gpu` each uses its own.

    Raises:
        UserError: as `exact_search`, on every rank.
    """
    rank, world_size = world()
    if world_size == 1:
        return exact_search(queries, corpus, k, memory_mb=memory_mb, use_gpu=use_gpu)
    empty_result(queries, corpus, k, memory_mb)
    for _ in checked_blocks(queries, "queries", 4096):  # here, where a bad row still has its number
        pass
    share = slice(len(queries) * rank // world_size, len(queries) * (rank + 1) // world_size)
    memory_mb /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    found: tuple[np.ndarray, np.ndarray] | None = None
    problem = None
    try:
        found = exact_search(queries[share], corpus, k, memory_mb=memory_mb, use_gpu=use_gpu)
    except UserError as error:
        problem = error
    parts = gather_objects((found, problem))
    for _, other in parts:
        if other:
            raise other
    scores, rows = (np.concatenate([part[i] for part, _ in parts]) for i in (0, 1))
    return scores, rows


def empty_result(queries: np.ndarray, corpus: np.ndarray, k: int, memory_mb: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores (Q, k) of -inf and rows (Q, k) of -1, once the arguments of a search are checked.

    Raises:
        UserError: see `exact_search`.
    """
    for name, array in (("queries", queries), ("corpus", corpus)):
        if len(array.shape) != 2 or not np.issubdtype(array.dtype, np.floating):
            raise UserError(f"{name}: expected a (rows, dimension) float array, found {array.dtype} {array.shape}")
    if k < 1 or not memory_mb > 0:
        raise UserError(f"k={k}, memory_mb={memory_mb}: both must be positive")
    if len(queries) and len(corpus) and queries.shape[1] != corpus.shape[1]:
        raise UserError(
            f"queries have dimension {queries.shape[1]}, the corpus has {corpus.shape[1]}: "
            "encode both with the same model"
        )
    return np.full((len(queries), k), -np.inf, dtype=np.float32), np.full((len(queries), k), -1, dtype=np.int64)


def score_pairs(queries: np.ndarray, vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The scores (B, m) float32 of B queries (B, D) with the vectors' `rows` (B, m), as `exact_search` gives them."""
    return _scores(np.asarray(queries, dtype=np.float32), vectors, rows, max(1, 2**21 // (20 * queries.shape[1])))


def gpu_available() -> bool:
    """Whether the installed faiss can search on a GPU: built for it, and a GPU is there.

    Raises:
        UserError: faiss is not installed.
    """
    faiss = import_faiss()
    # faiss-cpu has get_num_gpus (which says 0) in some versions and lacks the other GPU names in all.
    return hasattr(faiss, "GpuMultipleClonerOptions") and faiss.get_num_gpus() > 0


def _nominate(
    queries: np.ndarray, corpus: np.ndarray, num_nominees: int, corpus_rows: int, search: Search
) -> tuple[np.ndarray, np.ndarray, float]:
    """Of a block of queries faiss's best `num_nominees`, (B, num_nominees), in no order, and the corpus's largest norm.

    The whole corpus is read once.
    """
    near = np.empty((len(queries), 0), dtype=np.float32)
    nominees = np.empty((len(queries), 0), dtype=np.int64)
    largest_norm = 0.0
    for offset, block, norms in checked_blocks(corpus, "corpus", corpus_rows):
        largest_norm = max(largest_norm, float(norms.max()))
        block_near, block_rows = search(queries, block, min(num_nominees, len(block)))
        near = np.concatenate([near, block_near], axis=1)
        nominees = np.concatenate([nominees, block_rows + offset], axis=1)
        if near.shape[1] > num_nominees:
            best = np.argpartition(-near, num_nominees - 1, axis=1)[:, :num_nominees]
            near = np.take_along_axis(near, best, axis=1)
            nominees = np.take_along_axis(nominees, best, axis=1)
    return near, nominees, largest_norm


def _scores(queries: np.ndarray, vectors: np.ndarray, rows: np.ndarray, num_pairs: int) -> np.ndarray:
    """The final float32 scores (B, m) of B queries with `rows` (B, m) of the vectors, about `num_pairs` at a time.

    float64 holds each product of two float32 numbers exactly, and numpy's sum along a row adds in an order that
    depends on its length only. A matrix product would be faster, but its order depends on the shape.
    """
    scores = np.empty(rows.shape, dtype=np.float32)
    width = max(1, min(rows.shape[1], num_pairs))
    height = max(1, num_pairs // width)
    for top in range(0, len(rows), height):
        for left in range(0, rows.shape[1], width):
            part = slice(top, top + height), slice(left, left + width)
            chosen = vectors[rows[part]].astype(np.float32, copy=False)
            scores[part] = np.multiply(chosen, queries[part[0], None], dtype=np.float64, order="C").sum(axis=2)
    return scores


def _keep_best(scores: np.ndarray, rows: np.ndarray, more_scores: np.ndarray, more_rows: np.ndarray) -> None:
    """Merge further (score, row) pairs into the k best of one query, in place, by (-score, row)."""
    all_scores, all_rows = np.concatenate([scores, more_scores]), np.concatenate([rows, more_rows])
    best = np.lexsort((all_rows, -all_scores))[: len(scores)]
    scores[:], rows[:] = all_scores[best], all_rows[best]


def _blocks(array: np.ndarray, num_rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, float32 block) over an array or a memory map; float32 blocks are views, not copies."""
    for start in range(0, len(array), num_rows):
        yield start, np.ascontiguousarray(array[start : start + num_rows], dtype=np.float32)


def checked_blocks(array: np.ndarray, name: str, num_rows: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (first row, float32 block, its rows' Euclidean norms) over an array or a memory map.

    Each is read and checked while the one before is in use, so that a search does not wait for the disk.

    Raises:
        UserError: a vector holds NaN or infinity; `name` and the first bad row are named.
    """

    def check(start: int, block: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        squares = np.einsum("nd,nd->n", block, block)
        bad = np.flatnonzero(~np.isfinite(squares))
        if len(bad):
            raise UserError(
                f"{name}: row {start + bad[0]} holds NaN, infinity or numbers above 1e19 (rows count from 0):"
                " encode again; if it was fp16 that overflowed, in bf16 or float32"
            )
        # Squares below `tiny` lose digits or become 0, but the search's bound needs norms that are never too small.
        return start, block, np.sqrt(squares + block.shape[1] * np.finfo(np.float32).tiny)

    blocks = (check(start, block) for start, block in _blocks(array, num_rows))
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, blocks, None)
        while (checked := coming.result()) is not None:
            coming = reader.submit(next, blocks, None)
            yield checked


def _cpu_search(queries: np.ndarray, block: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    faiss = import_faiss()
    scores, rows = faiss.knn(queries, block, k, metric=faiss.METRIC_INNER_PRODUCT)
    return scores, rows


def _gpu_search(dim: int) -> Search:
    """A search on all GPUs, each with a share of the block. One index for all blocks: making one takes long.

    Of several processes of a machine each takes the GPU of its number.
    """
    faiss = import_faiss()
    alone = os.environ.get("LOCAL_WORLD_SIZE", "1") == "1"
    gpus = None if alone else [int(os.environ["LOCAL_RANK"]) % faiss.get_num_gpus()]
    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    options.useFloat16 = False  # FlagEmbedding's miner uses True; the error bound is that of float32
    index = faiss.index_cpu_to_gpus_list(faiss.IndexFlatIP(dim), co=options, gpus=gpus)

    def search(queries: np.ndarray, block: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        index.reset()
        index.add(block)
        scores, rows = index.search(queries, k)
        return scores, rows

    return search


def can_use_gpu(num_nominees: int) -> bool:
    """Whether faiss can find so many rows a query on a GPU; if not, the reason is logged once."""
    if not gpu_available():
        warn_once("faiss sees no GPU (faiss-cpu, or none in this machine): searching on the CPU, with the same result")
        return False
    if num_nominees > GPU_MAX_K:
        warn_once(f"faiss on a GPU returns at most {GPU_MAX_K} rows a query: searching on the CPU")
        return False
    return True


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, each text once in a process."""
    logger.warning(message)


def import_faiss() -> Any:
    """The package, imported where it is needed, so that everything else works without it.

    By default faiss 1.15 multiplies pair by pair where queries * dimension < 128,000, at an eighth of the speed of a
    matrix product (measured). Below 20, as here, it does not matter.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            'searching needs faiss, which is not installed: pip install -e ".[cpu]", or ".[gpu]" for CUDA'
        ) from error
    faiss.cvar.distance_compute_blas_threshold = 20
    return faiss
