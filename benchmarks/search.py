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

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bge_core.files import atomic  # noqa: E402
from bge_core.search.approximate import approximate_search, measure_recall  # noqa: E402
from bge_core.search.exact import exact_search  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
WHAT = ("memory", "speed", "growth", "indexes", "constants")
DIM, NUM_QUERIES, K, MEMORY_MB, BLOCK = 384, 1000, 200, 512, 65_536
KNN_ROWS = 500_000  # one block that fits
INDEX_ROWS, INDEX_K = 1_000_000, 100
FACTORIES = ("Flat", "IVF4096,Flat", "IVF4096,PQ64", "HNSW32", "OPQ64,IVF4096,PQ64")
Result = dict[str, Any]

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


def mapped(folder: Path, kind: str, num_rows: int) -> np.ndarray:
    """(num_rows, 384) as a memory map; the file is written if it is missing or shorter."""
    path = folder / f"{kind}.f32"
    if not path.exists() or path.stat().st_size < 4 * DIM * num_rows:
        with atomic.atomic_path(path) as temporary, open(temporary, "wb") as file:
            for start in range(0, num_rows, BLOCK):
                make_rows(kind, start // BLOCK, min(BLOCK, num_rows - start)).tofile(file)
    return np.memmap(path, dtype=np.float32, mode="r", shape=(num_rows, DIM))


def make_queries(kind: str, num_queries: int) -> np.ndarray:
    """Rows of a block that no corpus here reaches."""
    return make_rows(kind, 1_000_000, num_queries)


# ------------------------------------------------------------------------------------------------------ measuring


def seconds(function: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


@contextmanager
def private_peak() -> Iterator[list[float]]:
    """[0] becomes the most that this process held in anonymous pages, MiB, in between."""
    peak, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            held = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
            peak[0] = max(peak[0], held / 2**10)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def knn(queries: np.ndarray, block: np.ndarray) -> Callable[[], object]:
    """faiss's brute force."""
    import faiss

    return lambda: faiss.knn(queries, block, K, metric=faiss.METRIC_INNER_PRODUCT)


def measure_memory(folder: Path, rows: int, **_: Any) -> Result:
    """Peak private memory of one search."""
    corpus, queries = mapped(folder, "noise", rows), make_queries("noise", NUM_QUERIES)
    with private_peak() as peak:
        took = seconds(lambda: exact_search(queries, corpus, K, memory_mb=MEMORY_MB))
    return {"rows": rows, "file_gb": corpus.nbytes / 1e9, "seconds": took, "private_mb": peak[0]}


def measure_speed(folder: Path, rows: int, pairs: int, **_: Any) -> Result:
    """exact_search and knn in turn."""
    corpus, queries = mapped(folder, "noise", rows), make_queries("noise", NUM_QUERIES)
    block = np.array(corpus[:KNN_ROWS])
    knn(queries, block)()
    beside = [seconds(knn(queries, block))]
    searches = []
    for _ in range(pairs):
        searches.append(seconds(lambda: exact_search(queries, corpus, K, memory_mb=MEMORY_MB)))
        beside.append(seconds(knn(queries, block)))
    knn_pace = [2 * len(block) / (one + other) for one, other in pairwise(beside)]
    ratios = [rows / took / pace for took, pace in zip(searches, knn_pace, strict=True)]
    return {
        "rows": rows, "knn_rows": len(block), "seconds": searches, "knn_seconds": beside, "ratios": ratios,
        "pairs_per_second": rows * NUM_QUERIES / statistics.median(searches),
        "knn_pairs_per_second": len(block) * NUM_QUERIES / statistics.median(beside),
    }  # fmt: skip


def measure_growth(folder: Path, rows: int, **_: Any) -> Result:
    """Seconds of each number of vectors and of queries."""
    corpus = mapped(folder, "noise", rows)

    def took(num_rows: int, num_queries: int) -> float:
        queries = make_queries("noise", num_queries)
        return seconds(lambda: exact_search(queries, corpus[:num_rows], K, memory_mb=MEMORY_MB))

    sizes = [size for size in (250_000, 500_000, 1_000_000, 2_000_000, 5_000_000) if size <= rows]
    base = min(1_000_000, rows)
    return {
        "by_rows": [[size, took(size, NUM_QUERIES)] for size in sizes],
        "by_queries": [[number, took(base, number)] for number in (100, 250, 1000, 4000)],
        "rows_of_by_queries": base,
    }


def measure_index(folder: Path, factory: str, index_rows: int, **_: Any) -> Result:
    """Build, then search from disk."""
    corpus, queries = mapped(folder, "clustered", index_rows), make_queries("clustered", NUM_QUERIES)
    path = folder / "index.faiss"
    for file in (path, Path(f"{path}.json")):
        file.unlink(missing_ok=True)

    def search() -> Any:
        return approximate_search(
            queries, corpus, INDEX_K, factory, content_key="clustered", path=path, memory_mb=MEMORY_MB
        )

    with private_peak() as peak:
        built = seconds(search)
    found: list[Any] = []
    took = [seconds(lambda: found.append(search())) for _ in range(3)]
    rows, facts = found[-1][1:]
    assert facts["index_reused"]
    return {
        "factory": factory, "parameters": facts["parameters"], "rows": index_rows, "build_seconds": built - min(took),
        "build_private_mb": peak[0], "bytes_per_vector": path.stat().st_size / index_rows,
        "queries_per_second": NUM_QUERIES / min(took),
        "recall": measure_recall(queries, corpus, rows, INDEX_K, memory_mb=MEMORY_MB),
        "trained_on": atomic.read_json(f"{path}.json")["train_rows"],
    }  # fmt: skip


def measure_constants(folder: Path, index_rows: int, **_: Any) -> Result:
    """With one thread unless said otherwise."""
    import faiss

    corpus, queries = mapped(folder, "clustered", index_rows), make_queries("clustered", NUM_QUERIES)
    block = np.array(corpus[:100_000])
    found: Result = {}
    for threads in (1, 2):
        faiss.omp_set_num_threads(threads)
        took = min(seconds(knn(queries, block)) for _ in range(5))
        found[f"knn_gflops_{threads}"] = 2 * DIM * len(queries) * len(block) / took / 1e9
    faiss.omp_set_num_threads(1)
    index = faiss.index_factory(DIM, "PQ64np", faiss.METRIC_INNER_PRODUCT)
    index.train(block[:20_000])
    found["pq64_encode_per_second"] = 20_000 / seconds(lambda: index.add(block[:20_000]))
    index.add(np.tile(index.reconstruct_n(0, 20_000), (9, 1)))
    took = min(seconds(lambda: index.search(queries[:20], 100)) for _ in range(3))
    found["pq64_codes_per_second"] = 20 * index.ntotal / took
    graph = faiss.index_factory(DIM, "HNSW32", faiss.METRIC_INNER_PRODUCT)
    found["hnsw32_add_per_second_first_20000"] = 20_000 / seconds(lambda: graph.add(block[:20_000]))
    with open(folder / "clustered.f32", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found["cold_read_gb_per_second"] = corpus.nbytes / 1e9 / seconds(lambda: corpus.max())
    return found


MEASURES: dict[str, Callable[..., Result]] = {
    "memory": measure_memory, "speed": measure_speed, "growth": measure_growth, "index": measure_index,
    "constants": measure_constants,
}  # fmt: skip


def measure(kind: str, threads: int, **job: Any) -> Result:
    """In a fresh process."""
    load = os.getloadavg()[0]
    words = [sys.executable, __file__, "--job", json.dumps({"kind": kind, **job}, default=str)]
    done = subprocess.run(
        words, env=os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    result: Result = json.loads(done.stdout.splitlines()[-1]) | {
        "load_before": round(load, 2), "threads": threads, "date": date.today().isoformat()
    }  # fmt: skip
    print(kind, result, file=sys.stderr, flush=True)
    return result


# ------------------------------------------------------------------------------------------------------ prediction

LARGE_DIM, SERVER_CORES, EFFICIENCY = 1024, 64, 0.7  # bge-large; cores of a server, and what is left where all work
MINED_QUERIES, DEPTH = 1_000_000, 200
GPU_FLOPS = 8 * 0.5 * 67e12  # eight H100, float32 (vendor), of which half is assumed
CODE_BYTES = 64 + 8  # of PQ64, with the row's number


def predict(found: Result) -> list[tuple[int, str, float, float, float, str]]:
    """(vectors, index, bytes, seconds to make it, seconds of 1,000,000 queries, where): none of it was measured.

        Flat             2 D N FLOP a query
        IVFn,PQ64        to make: each vector is compared with its centroids, and its code is found
                         a query: the centroids, then nprobe / n of the codes, which stand beside each other
        HNSW32           the rate measured with 1,000,000 vectors, times log(1,000,000) / log(N): it visits log N
                         points, and time for each grows with D

    Constants as measured with 384 dimensions on one thread, FLOP-bound ones scaled by D, on SERVER_CORES at EFFICIENCY.
    """
    c, cores, scale = found["constants"], SERVER_CORES * EFFICIENCY, LARGE_DIM / DIM
    flops = c["knn_gflops_1"] * 1e9 * cores
    rows = []
    for num_rows, lists in ((10**8, 65_536), (10**9, 262_144)):
        product = 2 * LARGE_DIM * num_rows * MINED_QUERIES
        rows += [
            (num_rows, "Flat", 4 * LARGE_DIM * num_rows, 0.0, product / flops, "disk; 64 cores"),
            (num_rows, "Flat", 4 * LARGE_DIM * num_rows, 0.0, product / GPU_FLOPS, "disk; 8 x H100"),
        ]
        graph = found["indexes"]["HNSW32"]
        slower = np.log(num_rows) / np.log(graph["rows"]) * scale / cores * graph["threads"]
        rows.append((
            num_rows, "HNSW32", (4 * LARGE_DIM + 4 * 64 + 16) * num_rows,
            num_rows * graph["build_seconds"] / graph["rows"] * slower,
            MINED_QUERIES / graph["queries_per_second"] * slower, "memory; 64 cores",
        ))  # fmt: skip
        # A graph over the centroids visits some thousands of them instead of all.
        visited, probes = 4096, max(2 * lists**0.5, 10 * 4 * DEPTH * lists / num_rows)
        centroids = 2 * LARGE_DIM * visited / flops
        make = num_rows * (centroids + scale / (c["pq64_encode_per_second"] * cores))
        codes = probes / lists * num_rows / (c["pq64_codes_per_second"] * cores)
        rows.append((
            num_rows, f"IVF{lists}_HNSW32,PQ64", CODE_BYTES * num_rows + 4 * LARGE_DIM * lists, make,
            MINED_QUERIES * (centroids + codes), "memory; 64 cores",
        ))  # fmt: skip
    return rows


def time_of(took: float) -> str:
    """Seconds as a person says them, two digits."""
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if took >= 2 * unit:
            return f"{took / unit:.2g} {name}"
    return f"{took:.2g} s" if took else "-"


def prediction_table(found: Result) -> str:
    """Markdown, the same in both languages: docs/scaling.md has it between its marks."""
    lines = ["| N | index_factory | GB | build | 1,000,000 queries | |", "| ---: | --- | ---: | ---: | ---: | --- |"]
    lines += [
        f"| {num_rows / 1e6:,.0f} M | {name} | {size / 1e9:,.0f} | {time_of(made)} | {time_of(took)} | {where} |"
        for num_rows, name, size, made, took, where in predict(found)
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ what is shown


def spread(values: list[float], form: str = ".2f") -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def as_markdown(found: Result) -> str:
    """All tables."""
    lines = ["| exact_search, 1,000 queries, k = 200, memory_mb 512 | |", "| --- | ---: |"]
    if "memory" in found:
        m = found["memory"]
        lines += [
            f"| vectors | {m['rows']:,} x {DIM} float32, a file of {m['file_gb']:.1f} GB |",
            f"| peak private memory of the process | {m['private_mb']:,.0f} MiB |",
        ]
    if "speed" in found:
        s = found["speed"]
        lines += [
            f"| pairs per second over those of faiss.knn on {s['knn_rows']:,} vectors in memory |"
            f" {spread(s['ratios'])} |",
            f"| seconds (load before: {s['load_before']}) | {spread(s['seconds'], '.1f')} |",
            f"| (query, vector) pairs per second | {s['pairs_per_second'] / 1e6:,.0f} million |",
        ]
    if "growth" in found:
        g = found["growth"]
        lines += ["", f"| vectors | queries | seconds (load before: {g['load_before']}) |", "| ---: | ---: | ---: |"]
        lines += [f"| {rows:,} | {NUM_QUERIES:,} | {took:.1f} |" for rows, took in g["by_rows"]]
        lines += [f"| {g['rows_of_by_queries']:,} | {number:,} | {took:.1f} |" for number, took in g["by_queries"]]
    if found.get("indexes"):
        lines += [
            "",
            f"Clustered vectors of {DIM} dimensions, {NUM_QUERIES:,} queries, k = {INDEX_K}, all defaults:",
            "",
            "| index | vectors | build, s | memory, MiB | bytes/vector | queries/s | recall@100 | parameters | load |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
        ]
        lines += [
            f"| {one['factory']} | {one['rows']:,} | {one['build_seconds']:,.0f} | {one['build_private_mb']:,.0f} |"
            f" {one['bytes_per_vector']:,.0f} | {one['queries_per_second']:,.0f} | {one['recall']:.3f} |"
            f" {one['parameters'] or '-'} | {one['load_before']} |"
            for one in found["indexes"].values()
        ]
    if "constants" in found:
        c = found["constants"]
        lines += ["", f"| constant (one thread, load before: {c['load_before']}) | |", "| --- | ---: |"]
        lines += [
            f"| faiss.knn, k = 200, GFLOP/s | {c['knn_gflops_1']:.0f}; two threads {c['knn_gflops_2']:.0f} |",
            f"| scan of PQ64 codes, million a second | {c['pq64_codes_per_second'] / 1e6:.0f} |",
            f"| PQ64 encoding, vectors a second | {c['pq64_encode_per_second']:,.0f} |",
            f"| HNSW32, vectors added a second, the first 20,000 | {c['hnsw32_add_per_second_first_20000']:,.0f} |",
            f"| reading a mapped file that is not in the page cache, GB/s | {c['cold_read_gb_per_second']:.1f} |",
        ]
    lines += ["", f"{found['machine']}; benchmarks/search.py says how; the load counts what else the machine did."]
    return "\n".join(lines) + "\n"


def plot(growth: Result, picture: Path) -> None:
    """Two panels: time against vectors, and against queries."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
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
    FigureCanvasAgg(figure)
    with atomic.atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--index_rows", type=int, default=INDEX_ROWS)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--what", nargs="*", choices=WHAT, default=list(WHAT))
    parser.add_argument("--factories", nargs="+", default=list(FACTORIES))
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs/search", help="of vectors: 1.5 kB for each row")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = args.job | {"folder": Path(args.job["folder"])}
        print(json.dumps(MEASURES[job.pop("kind")](**job)))
        return

    found: Result = atomic.read_json(args.results / "search.json") or {}
    cores = f"{os.cpu_count()} cores, {args.threads} threads"
    import faiss

    found["machine"] = f"{platform.machine()}, {cores}, faiss {faiss.__version__}, {date.today().isoformat()}"
    common = {"folder": args.folder, "rows": args.rows, "index_rows": args.index_rows, "pairs": args.pairs}
    for what in args.what:
        mapped(args.folder, "clustered" if what in ("indexes", "constants") else "noise",
               args.index_rows if what in ("indexes", "constants") else args.rows)  # fmt: skip
        for factory in args.factories if what == "indexes" else [""]:
            if what == "indexes":
                result = measure("index", args.threads, factory=factory, **common)
                known = found.setdefault("indexes", {})
                known[factory] = result
                found["indexes"] = {name: known[name] for name in dict.fromkeys((*FACTORIES, *known)) if name in known}
            else:
                found[what] = measure(what, args.threads, **common)
            atomic.write_json(args.results / "search.json", found)
    with atomic.atomic_path(args.results / "search.md") as temporary:
        temporary.write_text(as_markdown(found), encoding="utf-8")
    if "constants" in found and "HNSW32" in found.get("indexes", {}):
        for page in ("scaling.md", "scaling.zh-CN.md"):
            path = ROOT / "docs" / page
            inside = re.compile(r"(<!-- vectors -->\n).*?(\n<!-- /vectors -->)", re.DOTALL)
            path.write_text(inside.sub(rf"\g<1>{prediction_table(found)}\g<2>", path.read_text(encoding="utf-8")))
    if "growth" in found:
        plot(found["growth"], args.results / "search.png")


if __name__ == "__main__":
    main()
