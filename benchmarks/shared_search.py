"""What a search costs each of W processes of one machine: memory and work, as ratios to one process.

    python benchmarks/shared_search.py            prints the table of docs/scaling.md

Random vectors of length 1, float32, written into the array that the processes share, as `encode` writes them; then each
process searches for its share of the queries (evaluate.py, an evaluation in training, mine.py). One thread a process;
its work is its CPU seconds, which do not grow when processes share cores. Memory: the vectors once, and the most that
all processes together hold in anonymous pages beyond what they held before. Every row is a run of its own.
"""

import json
import sys
import time

import numpy as np
from harness import held_mb, private_peak, run, table

from bge_core.runtime.distributed import gather_objects, shared_array, world
from bge_core.runtime.launch import start
from bge_core.search.exact import search_in_shares

NUM_ROWS, DIM, NUM_QUERIES, K, BLOCK = 200_000, 256, 4_000, 100, 16_384


def unit_rows(seed: int, num_rows: int) -> np.ndarray:
    """(n, DIM) of length 1."""
    rows = np.random.default_rng(seed).standard_normal((num_rows, DIM), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def measure() -> None:
    """In each process: MiB in anonymous pages, CPU seconds of the search, a sum of the rows found; rank 0 prints."""
    start()
    queries, before = unit_rows(0, NUM_QUERIES), held_mb("RssAnon")
    with private_peak() as peak:
        corpus = shared_array((NUM_ROWS, DIM))
        for first in range(0, NUM_ROWS, BLOCK):
            corpus[first : first + BLOCK] = unit_rows(1 + first, min(BLOCK, NUM_ROWS - first))
        began = time.process_time()
        _, rows = search_in_shares(queries, corpus, K)
        seconds = time.process_time() - began
    told = gather_objects([peak[0] - before, seconds, int(rows.sum())])
    if world()[0] == 0:
        print(json.dumps(told))


def main() -> None:
    """Run with 1, 2 and 4 processes; the table."""
    vectors_mb = NUM_ROWS * DIM * 4 / 2**20
    measured, lines, found = {}, [], set()
    for num_processes in (1, 2, 4):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", num_processes]
        told = json.loads(run([sys.executable, *launcher, __file__, "--measure"], threads=1).stdout)
        held = sum(mb for mb, _, _ in told) + (vectors_mb if num_processes > 1 else 0)
        measured[num_processes] = held, max(seconds for _, seconds, _ in told)
        found |= {total for _, _, total in told}
        alone = num_processes * measured[1][0] / vectors_mb
        ratios = [held / vectors_mb, alone, measured[num_processes][1] / measured[1][1]]
        lines.append([str(num_processes), *(f"{ratio:.2f}" for ratio in ratios)])
    assert len(found) == 1, "the processes found different rows"
    print(table(["W", "memory / vectors", "each by itself", "CPU seconds of a process / one process"], lines, left=0))


if __name__ == "__main__":
    measure() if "--measure" in sys.argv else main()
