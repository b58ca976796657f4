"""Search over more vectors than the memory it may use, beside faiss's own brute force, and what the index types cost.

    python benchmarks/search.py [--rows 5000000] [--pairs 3] [--what memory speed growth indexes constants]
    python benchmarks/search.py --what                  only write the table and the plot again

Vectors have 384 dimensions, float32, length 1; they are written once, block by block, into --folder and mapped into
memory. Every measurement is a process of its own with --threads threads.

    memory     exact_search of 1,000 queries, k = 200, memory_mb 512: the peak of the process's anonymous pages (those
               of the mapped file and the page cache are not among them)
    speed      the same over faiss.knn on one block that lies in memory, in (query, vector) pairs per second: knn,
               exact_search, knn, exact_search, ..., knn; each search against the two knn beside it
    growth     seconds of exact_search against the number of vectors and of queries
    indexes    --index_rows clustered vectors, 1,000 queries, k = 100: time and peak memory of building, bytes a vector
               on disk, queries per second from the index on disk with exact rescoring, recall@100
    constants  what docs/scaling.md predicts with: faiss's matrix products, its scan of PQ codes, reading and adding

"noise" are independent normal numbers, the hardest case for an index and an easy one to state; "clustered": 10,000
centers, normal in 48 dimensions, each row a center plus 0.6 times normal noise, turned into 384 dimensions by a fixed
normal matrix, plus normal noise of a tenth of its size there. The queries are further rows of the same kind.

Ratios hold on a machine that does other work, too; seconds do not: the load before each measurement is beside it.
Threads that wait sleep (OMP_WAIT_POLICY=passive): by default they spin, which on a busy machine doubles the time.
Writes benchmarks/results/search.json, search.md and search.png; what is not measured again stays as it was.
"""

import os
import re
import statistics
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT, Row, facts, fresh, installed, parser, private_peak, save, spread, table, timed

from bge_core.files.atomic import atomic_path, read_json
from bge_core.search.approximate import approximate_search, measure_recall
from bge_core.search.exact import exact_search

DIM, NUM_QUERIES, K, MEMORY_MB, BLOCK = 384, 1000, 200, 512, 65_536
KNN_ROWS = 500_000  # one block that fits
INDEX_ROWS, INDEX_K = 1_000_000, 100
FACTORIES = ("Flat", "IVF4096,Flat", "IVF4096,PQ64", "HNSW32", "OPQ64,IVF4096,PQ64")

# ------------------------------------------------------------------------------------------------------ vectors


def make_rows(kind: str, block: int, num_rows: int) -> np.ndarray:
    """Some rows of length 1, (n, 384): a function of the kind and the block's number."""
    rng = np.random.default_rng([len(kind), block])
    if kind == "noise":
        rows = rng.standard_normal((num_rows, DIM), dtype=np.float32)
    else:
        world = np.random.default_rng(0)
        centers = world.standard_normal((10_000, 48), dtype=np.float32)
        turn = world.standard_normal((48, DIM), dtype=np.float32) / np.float32(48**0.5)
        latent = centers[rng.integers(10_000, size=num_rows)] + 0.6 * rng.standard_normal((num_rows, 48), np.float32)
        rows = latent @ turn + 0.1 * rng.standard_normal((num_rows, DIM), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def mapped(folder: str, kind: str, num_rows: int) -> np.ndarray:
    """(num_rows, 384) as a memory map; the file is written if it is missing or shorter."""
    path = Path(folder) / f"{kind}.f32"
    if not path.exists() or path.stat().st_size < 4 * DIM * num_rows:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            for start in range(0, num_rows, BLOCK):
                make_rows(kind, start // BLOCK, min(BLOCK, num_rows - start)).tofile(file)
    return np.memmap(path, dtype=np.float32, mode="r", shape=(num_rows, DIM))


def make_queries(kind: str, num_queries: int) -> np.ndarray:
    """Rows of a block that no corpus here reaches."""
    return make_rows(kind, 1_000_000, num_queries)


# ------------------------------------------------------------------------------------------------------ measuring


def knn(queries: np.ndarray, block: np.ndarray) -> Callable[[], object]:
    """faiss's brute force."""
    import faiss

    return lambda: faiss.knn(queries, block, K, metric=faiss.METRIC_INNER_PRODUCT)


def measure_memory(folder: str, rows: int, **_: Any) -> Row:
    """Peak private memory of one search."""
    corpus, queries = mapped(folder, "noise", rows), make_queries("noise", NUM_QUERIES)
    with private_peak() as peak:
        took = timed(lambda: exact_search(queries, corpus, K, memory_mb=MEMORY_MB))
    return {"rows": rows, "file_gb": corpus.nbytes / 1e9, "seconds": took, "private_mb": peak[0]}


def measure_speed(folder: str, rows: int, pairs: int, **_: Any) -> Row:
    """knn, exact_search, knn, ..., knn: each search against the two knn beside it."""
    corpus, queries = mapped(folder, "noise", rows), make_queries("noise", NUM_QUERIES)
    block = np.array(corpus[:KNN_ROWS])
    knn(queries, block)()
    beside, searches = [timed(knn(queries, block))], []
    for _ in range(pairs):
        searches.append(timed(lambda: exact_search(queries, corpus, K, memory_mb=MEMORY_MB)))
        beside.append(timed(knn(queries, block)))
    paces = [2 * len(block) / (one + other) for one, other in pairwise(beside)]
    ratios = [rows / took / pace for took, pace in zip(searches, paces, strict=True)]
    pace = rows * NUM_QUERIES / statistics.median(searches)
    found = {"rows": rows, "knn_rows": len(block), "seconds": searches, "knn_seconds": beside, "ratios": ratios}
    return found | {"pairs_per_second": pace}


def measure_growth(folder: str, rows: int, **_: Any) -> Row:
    """Seconds of each number of vectors and of queries."""
    corpus = mapped(folder, "noise", rows)

    def took(num_rows: int, num_queries: int) -> float:
        queries = make_queries("noise", num_queries)
        return timed(lambda: exact_search(queries, corpus[:num_rows], K, memory_mb=MEMORY_MB))

    sizes = [size for size in (250_000, 500_000, 1_000_000, 2_000_000) if size < rows] + [rows]
    base = min(1_000_000, rows)
    return {
        "by_rows": [[size, took(size, NUM_QUERIES)] for size in sizes],
        "by_queries": [[number, took(base, number)] for number in (100, 250, 1000, 4000)],
        "rows_of_by_queries": base,
    }


def measure_index(folder: str, factory: str, index_rows: int, **_: Any) -> Row:
    """Build, then search from disk."""
    corpus, queries = mapped(folder, "clustered", index_rows), make_queries("clustered", NUM_QUERIES)
    path = Path(folder) / "index.faiss"
    for file in (path, Path(f"{path}.json")):
        file.unlink(missing_ok=True)

    def search() -> Any:
        where = {"content_key": "clustered", "path": path, "memory_mb": MEMORY_MB}
        return approximate_search(queries, corpus, INDEX_K, factory, **where)

    with private_peak() as peak:
        built = timed(search)
    found: list[Any] = []
    took = [timed(lambda: found.append(search())) for _ in range(3)]
    rows, facts = found[-1][1:]
    assert facts["index_reused"]
    costs = {"build_seconds": built - min(took), "build_private_mb": peak[0], "parameters": facts["parameters"]}
    costs |= {"bytes_per_vector": path.stat().st_size / index_rows, "queries_per_second": NUM_QUERIES / min(took)}
    recall = measure_recall(queries, corpus, rows, INDEX_K, memory_mb=MEMORY_MB)
    trained_on = read_json(f"{path}.json")["train_rows"]
    return {"factory": factory, "rows": index_rows, "recall": recall, "trained_on": trained_on} | costs


def measure_constants(folder: str, index_rows: int, **_: Any) -> Row:
    """With one thread unless said otherwise."""
    import faiss

    corpus, queries = mapped(folder, "clustered", index_rows), make_queries("clustered", NUM_QUERIES)
    block = np.array(corpus[:100_000])
    found: Row = {}
    for threads in (1, 2):
        faiss.omp_set_num_threads(threads)
        took = min(timed(knn(queries, block)) for _ in range(5))
        found[f"knn_gflops_{threads}"] = 2 * DIM * len(queries) * len(block) / took / 1e9
    faiss.omp_set_num_threads(1)
    index = faiss.index_factory(DIM, "PQ64np", faiss.METRIC_INNER_PRODUCT)
    index.train(block[:20_000])
    found["pq64_encode_per_second"] = 20_000 / timed(lambda: index.add(block[:20_000]))
    index.add(np.tile(index.reconstruct_n(0, 20_000), (9, 1)))
    took = min(timed(lambda: index.search(queries[:20], 100)) for _ in range(3))
    found["pq64_codes_per_second"] = 20 * index.ntotal / took
    graph = faiss.index_factory(DIM, "HNSW32", faiss.METRIC_INNER_PRODUCT)
    found["hnsw32_add_per_second_first_20000"] = 20_000 / timed(lambda: graph.add(block[:20_000]))
    with open(f"{folder}/clustered.f32", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found["cold_read_gb_per_second"] = corpus.nbytes / 1e9 / timed(lambda: corpus.max())
    return found


# ------------------------------------------------------------------------------------------------------ prediction

LARGE_DIM, SERVER_CORES, EFFICIENCY = 1024, 64, 0.7  # bge-large; cores of a server, and what is left where all work
MINED_QUERIES, DEPTH = 1_000_000, 200
GPU_FLOPS = 8 * 0.5 * 67e12  # eight H100, float32 (vendor), of which half is assumed
CODE_BYTES = 64 + 8  # of PQ64, with the row's number


def predict(found: Row) -> list[tuple[int, str, float, float, float, str]]:
    """(vectors, index, bytes, seconds to make it, seconds of 1,000,000 queries, where): none of it was measured.

        Flat             2 D N FLOP a query
        IVFn,PQ64        to make: each vector is compared with its centroids, and its code is found
                         a query: the centroids, then nprobe / n of the codes, which stand beside each other
        HNSW32           the rate measured with 1,000,000 vectors, times log(1,000,000) / log(N): it visits log N
                         points, and time for each grows with D

    Constants as measured with 384 dimensions on one thread, FLOP-bound ones scaled by D, on SERVER_CORES at EFFICIENCY.
    """
    c, cores, scale, vector_bytes = found["constants"], SERVER_CORES * EFFICIENCY, LARGE_DIM / DIM, 4 * LARGE_DIM
    flops = c["knn_gflops_1"] * 1e9 * cores
    rows = []
    for num_rows, lists in ((10**8, 65_536), (10**9, 262_144)):
        product = 2 * LARGE_DIM * num_rows * MINED_QUERIES
        rows += [
            (num_rows, "Flat", vector_bytes * num_rows, 0.0, product / flops, "disk; 64 cores"),
            (num_rows, "Flat", vector_bytes * num_rows, 0.0, product / GPU_FLOPS, "disk; 8 x H100"),
        ]
        graph = found["indexes"]["HNSW32"]
        slower = np.log(num_rows) / np.log(graph["rows"]) * scale / cores * graph["threads"]
        make, ask = num_rows * graph["build_seconds"] / graph["rows"], MINED_QUERIES / graph["queries_per_second"]
        graph_bytes = vector_bytes + 4 * 64 + 16
        rows.append((num_rows, "HNSW32", graph_bytes * num_rows, make * slower, ask * slower, "memory; 64 cores"))
        # A graph over the centroids visits some thousands of them instead of all.
        visited, probes = 4096, max(2 * lists**0.5, 10 * 4 * DEPTH * lists / num_rows)
        centroids = 2 * LARGE_DIM * visited / flops
        make = num_rows * (centroids + scale / (c["pq64_encode_per_second"] * cores))
        codes = probes / lists * num_rows / (c["pq64_codes_per_second"] * cores)
        size, ask = CODE_BYTES * num_rows + vector_bytes * lists, MINED_QUERIES * (centroids + codes)
        rows.append((num_rows, f"IVF{lists}_HNSW32,PQ64", size, make, ask, "memory; 64 cores"))
    return rows


def time_of(took: float) -> str:
    """Seconds as a person says them, two digits."""
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if took >= 2 * unit:
            return f"{took / unit:.2g} {name}"
    return f"{took:.2g} s" if took else "-"


def prediction_table(found: Row) -> str:
    """Markdown, the same in both languages: docs/scaling.md has it between its marks."""
    head = "| N | index_factory | GB | build | 1,000,000 queries | |\n| ---: | --- | ---: | ---: | ---: | --- |"
    lines = [
        f"| {num_rows / 1e6:,.0f} M | {name} | {size / 1e9:,.0f} | {time_of(made)} | {time_of(took)} | {where} |"
        for num_rows, name, size, made, took, where in predict(found)
    ]
    return "\n".join([head, *lines])


# ------------------------------------------------------------------------------------------------------ what is shown


def as_markdown(found: Row) -> str:
    """All tables."""
    tables, rows = [], []
    if "memory" in found:
        m = found["memory"]
        rows += [["vectors", f"{m['rows']:,} x {DIM} float32, a file of {m['file_gb']:.1f} GB"]]
        rows += [["peak private memory of the process", f"{m['private_mb']:,.0f} MiB"]]
    if "speed" in found:
        s = found["speed"]
        beside = f"pairs per second over those of faiss.knn on {s['knn_rows']:,} vectors in memory"
        rows += [[beside, spread(s["ratios"])], [loaded("seconds", s), spread(s["seconds"], ".1f")]]
        rows += [["(query, vector) pairs per second", f"{s['pairs_per_second'] / 1e6:,.0f} million"]]
    tables.append(table([f"exact_search, 1,000 queries, k = {K}, memory_mb {MEMORY_MB}", ""], rows))
    if "growth" in found:
        g = found["growth"]
        rows = [[f"{rows:,}", f"{NUM_QUERIES:,}", f"{took:.1f}"] for rows, took in g["by_rows"]]
        rows += [[f"{g['rows_of_by_queries']:,}", f"{number:,}", f"{took:.1f}"] for number, took in g["by_queries"]]
        tables.append(table(["vectors", "queries", loaded("seconds", g)], rows, left=0))
    if found.get("indexes"):
        tables.append(f"Clustered vectors of {DIM} dimensions, {NUM_QUERIES:,} queries, k = {INDEX_K}, all defaults:")
        heads = ["index", "vectors", "build, s", "memory, MiB", "bytes/vector", "queries/s", "recall@100", "load"]
        names = ("rows", "build_seconds", "build_private_mb", "bytes_per_vector", "queries_per_second")
        rows = [
            [
                f"{one['factory']} {one['parameters'] or ''}",
                *(f"{one[name]:,.0f}" for name in names),
                f"{one['recall']:.3f}",
            ]
            + [one["load_before"]]
            for one in found["indexes"].values()
        ]
        tables.append(table(heads, rows))
    if "constants" in found:
        c = found["constants"]
        rows = [
            ["faiss.knn, k = 200, GFLOP/s", f"{c['knn_gflops_1']:.0f}; two threads {c['knn_gflops_2']:.0f}"],
            ["scan of PQ64 codes, million a second", f"{c['pq64_codes_per_second'] / 1e6:.0f}"],
            ["PQ64 encoding, vectors a second", f"{c['pq64_encode_per_second']:,.0f}"],
            ["HNSW32, vectors added a second, the first 20,000", f"{c['hnsw32_add_per_second_first_20000']:,.0f}"],
            ["reading a mapped file not in the page cache, GB/s", f"{c['cold_read_gb_per_second']:.1f}"],
        ]
        tables.append(table([loaded("constant (one thread)", c), ""], rows))
    return "\n\n".join([*tables, f"{found['machine']}; the load counts what else the machine did"])


def loaded(name: str, measured: Row) -> str:
    """A column's head with the load before the measurement."""
    return f"{name} (load before: {measured['load_before']})"


def plot(growth: Row, picture: Path) -> None:
    """Two panels: time against vectors, and against queries."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, points, label, title in (
        (panels[0], growth["by_rows"], "vectors", f"{NUM_QUERIES:,} queries"),
        (panels[1], growth["by_queries"], "queries", f"{growth['rows_of_by_queries']:,} vectors"),
    ):
        xs, ys = np.array(points, dtype=float).T
        panel.loglog(xs, ys, "o-", color="tab:blue", label="exact_search")
        panel.loglog(xs, ys[-1] * xs / xs[-1], "--", color="gray", label="proportional to the largest")
        panel.set_xticks(xs, [f"{x / 1e6:g} M" if x >= 1e5 else f"{x:,.0f}" for x in xs])
        ticks = [t for t in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if ys.min() / 2 < t < ys.max() * 2]
        panel.set_yticks(ticks, [f"{t:g}" for t in ticks])
        panel.minorticks_off()
        panel.set(xlabel=label, ylabel="seconds", title=title)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(f"exact_search, {DIM} dimensions, k = {K}, memory_mb {MEMORY_MB}, {growth['threads']} threads")
    figure.savefig(picture, dpi=130)


MEASURES: dict[str, Callable[..., Row]] = {
    "memory": measure_memory,
    "speed": measure_speed,
    "growth": measure_growth,
    "indexes": measure_index,
    "constants": measure_constants,
}


def main() -> None:
    options = parser(__doc__, "results")
    options.add_argument("--rows", type=int, default=5_000_000)
    options.add_argument("--index_rows", type=int, default=INDEX_ROWS)
    options.add_argument("--pairs", type=int, default=3)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--what", nargs="*", choices=MEASURES, default=[*MEASURES])
    options.add_argument("--factories", nargs="+", default=[*FACTORIES])
    options.add_argument("--folder", type=Path, default=ROOT / "outputs/search", help="of vectors: 1.5 kB for each row")
    args = options.parse_args()
    os.environ["OMP_WAIT_POLICY"] = "passive"
    found: Row = read_json(args.results / "search.json") or {}
    found["machine"] = f"{facts()['machine']}, {args.threads} threads, faiss {installed('faiss-cpu')}, {date.today()}"

    def measure(what: str, **more: Any) -> Row:
        load = round(os.getloadavg()[0], 2)
        sizes = {"rows": args.rows, "index_rows": args.index_rows, "pairs": args.pairs}
        measured = fresh(MEASURES[what], args.threads, folder=str(args.folder), **sizes, **more)
        return measured | {"load_before": load, "threads": args.threads}

    for what in args.what:
        clustered = what in ("indexes", "constants")
        mapped(args.folder, "clustered" if clustered else "noise", args.index_rows if clustered else args.rows)
        if what == "indexes":
            known = found.setdefault(what, {})
            for factory in args.factories:
                known[factory] = measure(what, factory=factory)
        else:
            found[what] = measure(what)
        save("search", found, as_markdown(found), args.results)
    if "constants" in found and "HNSW32" in found.get("indexes", {}):
        for page in ("scaling.md", "scaling.zh-CN.md"):
            path = ROOT / "docs" / page
            inside = re.compile(r"(<!-- vectors -->\n).*?(\n<!-- /vectors -->)", re.DOTALL)
            path.write_text(inside.sub(rf"\g<1>{prediction_table(found)}\g<2>", path.read_text(encoding="utf-8")))
    if "growth" in found:
        plot(found["growth"], args.results / "search.png")


if __name__ == "__main__":
    main()
