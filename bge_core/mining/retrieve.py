"""The best candidates of each query, by vectors, by words or by both, and the scores that the vectors give.

Shapes: Q rows, U distinct queries, N candidates, E other texts, K depth of the ranking, D embedding size.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bge_core import UserError
from bge_core.encoder.encode import encode_for_search
from bge_core.encoder.fingerprint import fingerprint
from bge_core.encoder.model import Encoder
from bge_core.encoder.prompts import choose_prompts
from bge_core.files.records import Row, distinct_texts
from bge_core.files.text import text_id
from bge_core.runtime.config import MineConfig
from bge_core.runtime.distributed import on_main
from bge_core.search.approximate import approximate_search, measure_recall
from bge_core.search.cache import EmbeddingCache
from bge_core.search.exact import EXTRA, GPU_MAX_K, gpu_available, score_pairs, search_in_shares
from bge_core.search.words import bm25_search, reciprocal_rank_fusion


@dataclass(frozen=True)
class Embedded:
    """The vectors of all texts: arrays, or views of a cache.

    Args:
        query_UD: of the distinct queries.
        place_Q: of each row its query among them.
        first_U: of each distinct query its first row.
        pool_ND: of the candidates.
        other_ED: of the rows' texts that are no candidates.
        pool_row, other_row: `text_id` -> row of `pool_ND`, of `other_ED`.
        query_instruction, passage_instruction: what stood before the texts; "" for none.
    """

    query_UD: Any
    place_Q: np.ndarray
    first_U: np.ndarray
    pool_ND: Any
    other_ED: Any
    pool_row: dict[int, int]
    other_row: dict[int, int]
    query_instruction: str
    passage_instruction: str

    def scores(self, number: int, candidates: Sequence[int]) -> np.ndarray:
        """(n,) float32 scores of some rows of the pool for the query of row `number`."""
        return self._scores(number, self.pool_ND, candidates)

    def text_scores(self, number: int, texts: Sequence[str]) -> list[float]:
        """The same for texts of the data, candidates or not."""
        ids = list(map(text_id, texts))
        inside = [i for i in ids if i in self.pool_row]
        outside = [i for i in ids if i not in self.pool_row]
        found = dict(zip(inside, self.scores(number, [self.pool_row[i] for i in inside]), strict=True))
        others = self._scores(number, self.other_ED, [self.other_row[i] for i in outside])
        found |= zip(outside, others, strict=True)
        return [float(found[i]) for i in ids]

    def _scores(self, number: int, vectors: Any, rows: Sequence[int]) -> np.ndarray:
        place = self.place_Q[number]
        return score_pairs(self.query_UD[place : place + 1], vectors, np.array([rows], dtype=np.int64))[0]


def embed(
    encoder: Encoder,
    rows: Sequence[Row],
    pool: Sequence[str],
    config: MineConfig,
    *,
    precision: str = "no",
    cache: EmbeddingCache | None = None,
) -> Embedded:
    """Encode every distinct query, every candidate, and what else the rows hold; on every process.

    A row's own `prompt` replaces the query instruction.
    """
    prompts = choose_prompts(str(config.model_name_or_path), encoder.settings, config)
    query_instruction, passage_instruction = (prompt or "" for prompt in prompts)
    encode_texts = cache.vectors if cache else encode_for_search
    options: dict[str, Any] = {
        "precision": precision,
        "batch_size": config.batch_size,
        "max_tokens": config.max_tokens,
    }
    as_passage = options | {"prompt": passage_instruction, "max_length": config.passage_max_len}

    # One vector for each distinct query as it is encoded, for rows may repeat it.
    own = [row.get("prompt") for row in rows]
    asked = [(query_instruction if o is None else o) + row["query"] for o, row in zip(own, rows, strict=True)]
    as_query = options | {"max_length": config.query_max_len}
    if not encoder.settings.include_prompt:  # its tokens are left out of the pooling: it has to be told apart
        if any(own):
            raise UserError(
                f"{config.input_file}: rows have a prompt of their own, and {config.model_name_or_path} leaves prompts "
                "out of its pooling (include_prompt is false), which is done for one prompt alone: drop theirs"
            )
        asked, as_query = [row["query"] for row in rows], as_query | {"prompt": query_instruction}
    places = {text: place for place, text in enumerate(dict.fromkeys(asked))}
    place_Q = np.array([places[text] for text in asked])
    query_UD: Any = encode_texts(encoder, list(places), description="encode queries", **as_query)
    pool_ND: Any = encode_texts(encoder, pool, description="encode candidates", **as_passage)
    if math.prod(pool_ND.shape) * pool_ND.dtype.itemsize <= config.search_memory * 2**20:
        # Views of a cache are gathered once, where that fits, not row by row.
        query_UD, pool_ND = np.asarray(query_UD), np.asarray(pool_ND)
    pool_row = {text_id(text): row for row, text in enumerate(pool)}
    others = [text for text in distinct_texts(rows, "pos", "neg") if text_id(text) not in pool_row]
    return Embedded(
        query_UD,
        place_Q,
        np.unique(place_Q, return_index=True)[1],
        pool_ND,
        encode_texts(encoder, others, description="encode positives", **as_passage) if others else pool_ND[:0],
        pool_row,
        {text_id(text): row for row, text in enumerate(others)},
        query_instruction,
        passage_instruction,
    )


def rank_pool(
    rows: Sequence[Row], pool: Sequence[str], embedded: Embedded, config: MineConfig, index_key: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """The best rows of the pool for each distinct query, (U, K), and how they were found; every process gets them.

    Raises:
        UserError: faiss is missing; an index does not fit.
    """
    depth = min(config.sampling_range[1], len(pool))
    on_gpu = config.use_gpu_for_searching and gpu_available() and min(depth + EXTRA, len(pool)) <= GPU_MAX_K
    facts: dict[str, Any] = {
        "retriever": config.retriever,
        "index_factory": config.index_factory,
        "device": "gpu" if on_gpu else "cpu",
    }
    rankings = []
    if config.retriever != "bm25":
        if config.index_factory == "Flat":
            how: dict[str, Any] = {"memory_mb": config.search_memory, "use_gpu": config.use_gpu_for_searching}
            found = search_in_shares(embedded.query_UD, embedded.pool_ND, depth, **how)[1]
        else:
            found, more = on_main(lambda: _search_index(embedded, depth, config, index_key))
            facts |= more
        rankings.append(found)
    if config.retriever != "dense":
        queries = [rows[i]["query"] for i in embedded.first_U]
        rankings.append(on_main(lambda: bm25_search(queries, pool, depth)[1]))
    return (rankings[0] if len(rankings) == 1 else reciprocal_rank_fusion(rankings, depth)), facts


def _search_index(
    embedded: Embedded, depth: int, config: MineConfig, index_key: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """The rows (U, depth) that an approximate index finds, and what it is, with its recall."""
    query_UD, pool_ND = embedded.query_UD, embedded.pool_ND
    _, found, facts = approximate_search(
        query_UD,
        pool_ND,
        depth,
        config.index_factory,
        path=index_path(config, index_key),
        content_key=index_key,
        seed=config.seed,
        memory_mb=config.search_memory,
        use_gpu=config.use_gpu_for_searching,
    )
    return found, facts | {"recall": measure_recall(query_UD, pool_ND, found, depth, seed=config.seed)}


def index_key(
    encoder: Encoder, pool: Sequence[str], passage_instruction: str, config: MineConfig, precision: str
) -> str:
    """16 hexadecimal digits that name what the pool's vectors are made of, so that no other index is reused."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (fingerprint(encoder), passage_instruction, str(config.passage_max_len), precision, *pool):
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def index_path(config: MineConfig, key: str) -> str | None:
    """Where the index lies: what the flag names, else in the vectors' folder, else nowhere."""
    if config.index_path or not config.embedding_cache_dir:
        return config.index_path
    return str(Path(config.embedding_cache_dir) / f"{config.index_factory.replace(',', '-')}-{key}.faiss")
