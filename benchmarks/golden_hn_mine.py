"""Record what FlagEmbedding's own hard-negative miner keeps, as tests/golden/hn_mine.json.

The miner left FlagEmbedding's package after 1.2.x, so this imports the module from an unpacked 1.2.11 source
distribution, with real faiss and a stand-in for its model that looks embeddings up by text. To rerun, in the
environment of benchmarks/requirements.txt:

    pip download --no-deps --no-binary :all: FlagEmbedding==1.2.11 && tar xf FlagEmbedding-1.2.11.tar.gz
    python benchmarks/golden_hn_mine.py FlagEmbedding-1.2.11

What is recorded, and how it is made deterministic: `find_knn_neg` keeps the corpus as a `set` (its order changes with
the hash seed), samples from the ranked candidates when there are more than `negative_number`, and fills up at random
from the corpus when there are fewer. Asked for more negatives than its range holds it does not sample, and the ranked
candidates are the first part of `neg`; the random filling behind them is cut off by patching `random.sample` to add
nothing. Embeddings without ties make the rank independent of the corpus order. The candidates are recorded as texts.
"""

import json
import sys
import tempfile
import types
import unittest.mock
from collections.abc import Iterable
from pathlib import Path

import harness
import numpy as np
from harness import ROOT, Row, read_lines, write_lines

SOURCE = {
    "package": "FlagEmbedding",
    "version": "1.2.11",
    "function": "FlagEmbedding.baai_general_embedding.finetune.hn_mine.find_knn_neg",
    "generator": "benchmarks/golden_hn_mine.py",
}
DIMENSION, NUM_QUERIES, NUM_CANDIDATES, SMALL_POOL = 16, 40, 120, 6
CASES = [  # name, range, pool
    ("range 2-20 of the rows' own passages", (2, 20), "none"),
    ("range 2-20 of a pool", (2, 20), "large"),
    ("range from the first hit", (0, 10), "large"),
    ("range of one", (5, 6), "large"),
    ("default range, its end beyond the pool", (10, 210), "large"),
    ("range larger than the rows' own passages", (2, 200), "none"),
    ("pool smaller than the range", (2, 20), "small"),
    ("pool too small: range begins after its end", (10, 20), "small"),
]


class LookupModel:
    """Stands in for FlagModel: the embedding of a text is the one that was drawn for it."""

    def __init__(self, embeddings: dict[str, np.ndarray]) -> None:
        self.embeddings = embeddings

    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        """Passage embeddings."""
        return np.stack([self.embeddings["passage:" + text] for text in texts])

    def encode_queries(self, texts: list[str], batch_size: int) -> np.ndarray:
        """Query embeddings; a query that is also a candidate has another one there, as with an instruction."""
        return np.stack([self.embeddings["query:" + text] for text in texts])


def draw_inputs(seed: int) -> tuple[list[Row], list[str], dict[str, np.ndarray]]:
    """Draw training rows, a candidate pool and unit embeddings in which a query is near its positives.

    Returns:
        The rows (several positives; some without `neg`, some whose query is a candidate), the pool (which lacks some
        positives, holds texts of no row, and repeats five of its own), and text -> embedding.
    """
    rng = np.random.default_rng(seed)
    texts = [f"passage {i}" for i in range(NUM_CANDIDATES)]
    embeddings: dict[str, np.ndarray] = {}

    def unit(vector: np.ndarray) -> np.ndarray:
        # Multiples of 1/4096: short in JSON, exact in float32, and inner products differ by much more than rounding.
        return (np.round(vector / np.linalg.norm(vector) * 4096) / 4096).astype(np.float32)

    for text in texts:
        embeddings["passage:" + text] = unit(rng.standard_normal(DIMENSION))
    rows: list[Row] = []
    for i in range(NUM_QUERIES):
        # Every eighth query is itself a passage (duplicate-question data): it must not become its own negative.
        query = texts[int(rng.integers(NUM_CANDIDATES))] if i % 8 == 3 else f"query {i}"
        positives = [texts[j] for j in rng.choice(NUM_CANDIDATES, size=1 + i % 3, replace=False)]
        row: Row = {"query": query, "pos": positives}
        if i % 4 != 1:  # `neg` absent in a quarter of the rows
            row["neg"] = [texts[j] for j in rng.choice(NUM_CANDIDATES, size=i % 3, replace=False)]
        rows.append(row)
        centre = np.mean([embeddings["passage:" + text] for text in positives], axis=0)
        if "passage:" + query in embeddings:
            centre = centre + (1.0 if i % 16 == 3 else 0.3) * embeddings["passage:" + query]
        embeddings["query:" + query] = unit(centre + 0.12 * rng.standard_normal(DIMENSION))
    pool = [*texts[10:95], *(f"pool passage {i}" for i in range(15)), *texts[20:25]]
    for i in range(15):
        embeddings[f"passage:pool passage {i}"] = unit(rng.standard_normal(DIMENSION))
    return rows, pool, embeddings


def check_no_ties(rows: Iterable[Row], embeddings: dict[str, np.ndarray]) -> None:
    """Fail if two candidates of a query score so alike that an exact search could order them either way."""
    passages = np.stack([v for k, v in embeddings.items() if k.startswith("passage:")]).astype(np.float64)
    for row in rows:
        scores = np.sort(passages @ embeddings["query:" + row["query"]].astype(np.float64))
        if np.diff(scores).min() < 1e-6:
            raise ValueError(f"query {row['query']!r}: two scores closer than 1e-6; choose another seed")


def ranked_candidates(
    module: types.ModuleType, model: LookupModel, rows: list[Row], pool: list[str] | None, sample_range: tuple[int, int]
) -> list[list[str]]:
    """Run their function so that it neither samples nor fills up; return the candidates of each row in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = write_lines(f"{folder}/in.jsonl", rows), f"{folder}/out.jsonl"
        texts = None if pool is None else write_lines(f"{folder}/pool.jsonl", ({"text": text} for text in pool))
        with unittest.mock.patch("random.sample", lambda population, k: []):
            module.find_knn_neg(model, source, texts, target, list(sample_range), 10**6, False)
        return [row["neg"] for row in read_lines(target)]


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("source", type=Path, help="folder of the unpacked FlagEmbedding 1.2.11 source distribution")
    parser.add_argument("--output", type=Path, default=ROOT / "tests/golden/hn_mine.json")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    stub = types.ModuleType("FlagEmbedding")  # the package imports much that has no part in mining
    stub.FlagModel = object  # type: ignore[attr-defined]
    sys.modules["FlagEmbedding"] = stub
    module = harness.load_miner(args.source)
    rows, pool, embeddings = draw_inputs(args.seed)
    check_no_ties(rows, embeddings)
    model, pools = LookupModel(embeddings), {"none": None, "large": pool, "small": pool[:SMALL_POOL]}
    result = {
        "source": SOURCE,
        "rows": rows,
        "pools": pools,
        "query_embeddings": [embeddings["query:" + row["query"]].tolist() for row in rows],
        "passage_embeddings": {k.removeprefix("passage:"): v.tolist() for k, v in embeddings.items() if k[0] == "p"},
    }
    cases = []
    for name, sample_range, pool_name in CASES:
        expected = ranked_candidates(module, model, rows, pools[pool_name], sample_range)
        stated = {"name": name, "range_for_sampling": f"{sample_range[0]}-{sample_range[1]}", "pool": pool_name}
        cases.append(json.dumps(stated | {"expected": expected}))
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items()]
    lines.append('"cases": [\n' + ",\n".join(cases) + "\n]")
    args.output.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
