"""Approximate search: a faiss index nominates the candidates, their scores are exact.

    factory string -> index, trained on a sample and filled block by block -> candidates -> exact scores -> the best k

What is returned means the same as in `search.exact_search`: score(q, c) is that one's, and the order is by it. Only
which rows are found is approximate, and `measure_recall` says how much of the exact result that is. An index may stay
on disk: beside it lies a JSON file with what it was made of, and it is opened mapped into memory, not read.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from bge_core import UserError
from bge_core.files.atomic import atomic_path, read_json, refuse_unwritable, write_json
from bge_core.files.records import Row
from bge_core.search.exact import (
    can_use_gpu,
    checked_blocks,
    empty_result,
    exact_search,
    import_faiss,
    score_pairs,
    warn_once,
)

EXAMPLES = "for example Flat, HNSW32, IVF1024,Flat or IVF4096,PQ64"
CODES = re.compile("PQ|SQ|RQ|BitQ|ITQ|PCA")  # what keeps codes in place of vectors, so that its own order is rough
BLOCK = 16_384  # rows that are added together: always the same, as the graph of an HNSW depends on it
TRAIN_PER_CENTROID, MIN_PER_CENTROID = 64, 10  # faiss wants 39 to 256, and warns below


def approximate_search(
    queries: np.ndarray,
    corpus: np.ndarray,
    k: int,
    factory: str,
    *,
    content_key: str,
    path: str | Path | None = None,
    seed: int = 0,
    memory_mb: float = 512,
    use_gpu: bool = False,
) -> tuple[np.ndarray, np.ndarray, Row]:
    """About the k corpus rows with the largest inner product for each query, with their exact scores.

        score(q, c) = float32(sum over i of float64(q_i) * float64(c_i)), as in `search.exact_search`

    Candidates: k of an index that keeps the vectors, 4 k where it keeps codes (PQ, SQ, ...) whose order is rough. With
    one thread the result is a function of the vectors, factory and seed; with more, faiss links the graph of an HNSW in
    the order in which threads come along.

    Args:
        queries: (Q, D) float32 or float16, an array or a memory map.
        corpus: (N, D), likewise, or what has a shape, a dtype and a length and takes slices and arrays of rows.
        k: how many rows per query, at least 1.
        factory: what `faiss.index_factory` takes, for example "HNSW32" or "IVF4096,PQ64".
        content_key: names what the corpus's vectors are made of; an index on disk is reused only under the same.
        path: the index's file; `path` + ".json" says what it holds. None: it is made in memory and gone afterwards.
        seed: of the choice of the rows to train on, 64 for each centroid.
        memory_mb: about how much memory to search in, in MiB. Making an index takes what it takes: the sample of
            256 * D bytes a centroid, then the whole index and two blocks of 16,384 rows.
        use_gpu: search on all GPUs, in float16; without one, or where faiss has no such index for them, warn once and
            search on the CPU. The index is made on the CPU.

    Returns:
        scores (Q, k) float32 and rows (Q, k) int64, best first, of equal scores the smaller row; where fewer than k
        were found, the places left over have score -inf and row -1. And facts for a report: index_factory, index_path,
        index_reused, parameters, device ("cpu" or "gpu").

    Raises:
        UserError: as `exact_search`; faiss does not know the factory string; too few rows to train;
            the index on disk holds something else or is broken.

    Source: faiss, `index_factory` and `ParameterSpace`.
    """
    scores, rows = empty_result(queries, corpus, k, memory_mb)
    facts: Row = {
        "index_factory": factory,
        "index_path": path and str(path),
        "index_reused": False,
        "parameters": "",
        "device": "cpu",
    }
    if len(queries) == 0 or len(corpus) == 0:
        return scores, rows, facts
    num_candidates = min((4 if CODES.search(factory) else 1) * k, len(corpus))
    on_gpu = use_gpu and can_use_gpu(num_candidates)

    dim, num_rows = corpus.shape[1], len(corpus)
    holds: Row = {"index_factory": factory, "dimension": dim, "rows": num_rows, "content_key": content_key}
    index = None if path is None else _open(Path(path), holds, mapped=not on_gpu)
    facts["index_reused"] = index is not None
    if index is None:
        if path is not None:
            refuse_unwritable(Path(path).parent)
        index, made = _build(corpus, factory, seed)
        if path is not None:
            _write(index, Path(path), holds | made)
    facts["parameters"] = default_parameters(index, factory, num_candidates)
    import_faiss().ParameterSpace().set_index_parameters(index, facts["parameters"])
    if on_gpu:
        index, facts["device"] = _to_gpus(index, factory)

    # A quarter of the memory for the queries and what is kept per candidate, as in exact_search.
    query_rows = max(1, int(memory_mb * 2**18 / (4 * dim + 64 * num_candidates)))
    for start, block, _ in checked_blocks(queries, "queries", query_rows):
        candidates = index.search(block, num_candidates)[1]
        exact = np.where(candidates < 0, -np.inf, score_pairs(block, corpus, np.maximum(candidates, 0)))
        best = np.lexsort((candidates, -exact))[:, :k]
        for result, of_candidates in ((scores, exact), (rows, candidates)):
            result[start : start + len(block), : best.shape[1]] = np.take_along_axis(of_candidates, best, axis=1)
    return scores, rows, facts


def default_parameters(index: Any, factory: str, num_candidates: int) -> str:
    """How thoroughly an index is searched, as `faiss.ParameterSpace` reads it: m candidates of N rows.

    IVF:   nprobe   = max(8, 2 sqrt(nlist), as many lists as hold 10 m rows on average)
    HNSW:  efSearch = max(128, 2 m); in front of an IVF: max(128, 2 nprobe)
    """
    ivf = _ivf(index)
    if ivf is None:
        return f"efSearch={max(128, 2 * num_candidates)}" if "HNSW" in factory else ""
    holding = -(-10 * num_candidates * ivf.nlist // max(1, index.ntotal))
    num_probes = min(max(8, 2 * round(ivf.nlist**0.5), holding), ivf.nlist)
    return f"nprobe={num_probes}" + (f",quantizer_efSearch={max(128, 2 * num_probes)}" if "HNSW" in factory else "")


def recall_of(rows: np.ndarray, exact_rows: np.ndarray) -> float:
    """The share of the exact rows (Q, k) that are among the `rows` (Q, k); -1 counts as none. 1 where there is none."""
    found = [np.isin(exact[exact >= 0], some) for some, exact in zip(rows, exact_rows, strict=True)]
    return float(np.concatenate(found).mean()) if (exact_rows >= 0).any() else 1.0


def measure_recall(
    queries: np.ndarray,
    corpus: np.ndarray,
    rows: np.ndarray,
    k: int,
    *,
    sample: int = 200,
    seed: int = 0,
    memory_mb: float = 512,
    use_gpu: bool = False,
) -> float:
    """recall@k of the `rows` (Q, k) of an approximate search against `exact_search`, on a sample of the queries.

    Args:
        queries, corpus, memory_mb, use_gpu: as in `exact_search`.
        rows: what the approximate search found for all the queries.
        k: of each query's rows the first k are looked at.
        sample: how many queries; with fewer, all of them.
        seed: of their choice.
    """
    chosen = np.sort(np.random.default_rng(seed).choice(len(queries), min(sample, len(queries)), replace=False))
    exact_rows = exact_search(queries[chosen], corpus, k, memory_mb=memory_mb, use_gpu=use_gpu)[1]
    return recall_of(rows[chosen, :k], exact_rows)


def _build(corpus: np.ndarray, factory: str, seed: int) -> tuple[Any, Row]:
    """A trained and filled index, and what is worth knowing of how it was made."""
    faiss = import_faiss()
    index, num_trained = empty_index(corpus.shape[1], factory), 0
    try:
        if not index.is_trained:
            vectors = _sample(corpus, factory, _ivf(index), seed)
            num_trained = len(vectors)
            if not np.isfinite(vectors).all():
                for _ in checked_blocks(corpus, "corpus", BLOCK):  # to name the row
                    pass
            index.train(vectors)
            del vectors
        for _, block, _ in checked_blocks(corpus, "corpus", BLOCK):
            index.add(block)
    except RuntimeError as error:
        raise UserError(f"--index_factory {factory!r}: faiss cannot fill it ({_reason(error)}); {EXAMPLES}") from None
    return index, {"seed": seed, "train_rows": num_trained, "faiss": faiss.__version__}


def empty_index(dim: int, factory: str) -> Any:
    """The index that faiss makes for vectors of this size, untrained; UserError where it makes none."""
    faiss = import_faiss()
    # Without np faiss also orders PQ codes for a search by their bits, which nobody uses: a hundred times as long.
    quick = re.sub(r"(?<!O)(PQ\d+(x\d+)?)(?=,|$)", r"\1np", factory)
    try:
        return faiss.index_factory(dim, quick, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(
            f"--index_factory {factory!r}: faiss makes no such index for vectors of dimension {dim}"
            f" ({_reason(error)}); {EXAMPLES}"
        ) from None


def _sample(corpus: np.ndarray, factory: str, ivf: Any, seed: int) -> np.ndarray:
    """The rows that an index is trained on, (n, D) float32, in the order of the corpus."""
    num_lists = 0 if ivf is None else ivf.nlist
    num_rows = min(TRAIN_PER_CENTROID * max(num_lists, 256), len(corpus))  # 256: of each PQ
    if num_rows < MIN_PER_CENTROID * num_lists:
        fitting = 2 ** int(np.log2(max(1, num_rows // TRAIN_PER_CENTROID)))
        raise UserError(
            f"--index_factory {factory!r}: {num_rows:,} rows to train on are too few for {num_lists:,} lists, which"
            f" need {MIN_PER_CENTROID * num_lists:,}; write IVF{fitting}, or HNSW32, which needs no training, or Flat"
        )
    chosen = np.sort(np.random.default_rng(seed).choice(len(corpus), num_rows, replace=False, shuffle=False))
    return np.ascontiguousarray(corpus[chosen], dtype=np.float32)


def _write(index: Any, path: Path, holds: Row) -> None:
    """Put an index on disk, whole or not at all."""
    with atomic_path(path) as temporary:
        import_faiss().write_index(index, str(temporary))
        # The JSON first: killed between the two, a run leaves a JSON without an index, and the next writes both.
        write_json(f"{path}.json", holds | {"bytes": temporary.stat().st_size})


def _open(path: Path, holds: Row, *, mapped: bool) -> Any | None:
    """The index on disk, if there is one; UserError unless it is whole and holds what is expected."""
    remedy = "name another --index_path, or delete this file to have it made anew"
    if not path.exists():
        return None
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file for the index")
    stated = read_json(f"{path}.json")
    if not isinstance(stated, dict):
        raise UserError(f"{path}: {path.name}.json, which says what an index holds, is not beside it; {remedy}")
    wrong = [
        f"{name} {stated.get(name)!r}, not {value!r}" for name, value in holds.items() if stated.get(name) != value
    ]
    if wrong:
        raise UserError(f"{path}: is the index of something else, by its .json: {'; '.join(wrong)}; {remedy}")
    if path.stat().st_size != stated.get("bytes"):
        raise UserError(f"{path}: is broken: {path.stat().st_size:,} bytes, not {stated.get('bytes')}; {remedy}")
    faiss = import_faiss()
    # Lists of an IVF are mapped by one flag, vectors and graphs of other types by another, which older faiss lacks.
    flag = faiss.IO_FLAG_MMAP if "IVF" in holds["index_factory"] else getattr(faiss, "IO_FLAG_MMAP_IFC", 0)
    try:
        index = faiss.read_index(str(path), flag if mapped else 0)
    except RuntimeError as error:
        raise UserError(f"{path}: is broken, or of a newer faiss ({_reason(error)}); {remedy}") from None
    if (index.d, index.ntotal) != (holds["dimension"], holds["rows"]):
        raise UserError(f"{path}: holds {index.ntotal:,} rows of dimension {index.d}, unlike its .json; {remedy}")
    return index


def _to_gpus(index: Any, factory: str) -> tuple[Any, str]:
    """The index on all GPUs, each with a share, and "gpu"; or, where faiss cannot, as it is, and "cpu"."""
    faiss = import_faiss()
    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    options.useFloat16 = True  # what it gets wrong, the exact scores set right
    try:
        return faiss.index_cpu_to_all_gpus(index, co=options), "gpu"
    except RuntimeError as error:
        warn_once(f"faiss has no {factory} for GPUs ({_reason(error)}): searching on the CPU")
        return index, "cpu"


def _ivf(index: Any) -> Any | None:
    """The inverted lists within an index, if it has any."""
    return import_faiss().try_extract_index_ivf(index)


def _reason(error: RuntimeError) -> str:
    """What faiss says, without the C++ function and file."""
    said = re.sub(r"^Error in .*? at \S+:\d+: (Error: )?", "", str(error), flags=re.DOTALL)
    return " ".join(said.split())
