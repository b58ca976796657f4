"""A teacher's scores of (query, passage) pairs: a cross-encoder's, or the cosines of a second encoder.

Distillation takes the softmax of what is written, so that is score / temperature: an encoder's cosines lie so close
together that their own softmax is nearly uniform, and it was trained with cosine / 0.02 itself.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bge_core.encoder.encode import encode_for_search
from bge_core.encoder.graphs import hold_passes
from bge_core.encoder.load import load_encoder
from bge_core.encoder.prompts import choose_prompts
from bge_core.encoder.reranker import load_reranker
from bge_core.files.records import Row
from bge_core.runtime.config import MineConfig
from bge_core.search.cache import EmbeddingCache

COSINE_TEMPERATURE = 0.02  # that of BGE's training


class Teacher:
    """The model that --reranker_name_or_path or --teacher_encoder names, one of which is given.

    Its `temperature`, by which the scores that are written are divided: --teacher_temperature, else 0.02 for cosines
    and 1 for a cross-encoder's logits or inner products of vectors of any length.

    Args:
        config: names it, and how texts are read.
        device: where it runs.
        precision: "fp16", "bf16" or "no".
        cache: keeps the second encoder's vectors; None: nothing does.
    """

    def __init__(
        self, config: MineConfig, device: torch.device, precision: str, cache: EmbeddingCache | None = None
    ) -> None:
        common: dict[str, Any] = {"attention": config.attention, "trust_remote_code": config.trust_remote_code}
        if config.reranker_name_or_path:
            name, length = config.reranker_name_or_path, config.reranker_max_length
            self.reranker = load_reranker(name, max_length=length, **common).to(device)
        else:
            self.encoder = load_encoder(str(config.teacher_encoder), **common).to(device)
            if config.cuda_graphs:
                hold_passes(self.encoder, precision)
            self.prompts = choose_prompts(str(config.teacher_encoder), self.encoder.settings)
        cosines = not config.reranker_name_or_path and self.encoder.settings.scored_by == "cosine"
        self.temperature = config.teacher_temperature or (COSINE_TEMPERATURE if cosines else 1.0)
        self.config, self.cache = config, cache
        self.options: dict[str, Any] = {
            "precision": precision,
            "max_tokens": config.max_tokens,
            "batch_size": config.batch_size,
        }
        self._vectors: dict[tuple[str, str], np.ndarray] = {}

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """(n,) scores of n pairs, higher where the passage answers better; on every rank."""
        if self.config.reranker_name_or_path:
            return self.reranker.score(pairs, **self.options)
        self._encode("query", [query for query, _ in pairs], self.config.query_max_len, self.prompts[0])
        self._encode("passage", [text for _, text in pairs], self.config.passage_max_len, self.prompts[1])
        return np.array([self._vectors["query", query] @ self._vectors["passage", text] for query, text in pairs])

    def _encode(self, side: str, texts: Sequence[str], max_length: int, prompt: str | None) -> None:
        encode_texts = self.cache.vectors if self.cache else encode_for_search
        new = [text for text in dict.fromkeys(texts) if (side, text) not in self._vectors]
        found = encode_texts(
            self.encoder,
            new,
            prompt=prompt or "",
            max_length=max_length,
            description=f"teacher: {side}",
            **self.options,
        )
        self._vectors.update(zip(((side, text) for text in new), np.asarray(found, dtype=np.float32), strict=True))


class TeacherScores:
    """A teacher's scores of the texts of rows, each asked once.

    Args:
        teacher: has `score`.
        rows: of training data; their positives and `more` texts of each are scored at once.
        more: of each row further texts.
        pool: the candidates.
        margin: a negative scores (as the teacher does) at least this much below the row's lowest positive; None: any
            score will do.
    """

    def __init__(
        self,
        teacher: Teacher,
        rows: Sequence[Row],
        more: Sequence[Sequence[str]],
        pool: Sequence[str],
        margin: float | None,
    ) -> None:
        self.teacher, self.rows, self.pool, self.margin = teacher, rows, pool, margin
        self._known: dict[tuple[int, str], float] = {}
        self._ask([(i, text) for i, row in enumerate(rows) for text in (*row["pos"], *more[i])])

    def over_temperature(self, number: int, texts: Sequence[str]) -> list[float]:
        """score / temperature of some texts of row `number` that were asked before."""
        return [self._known[number, text] / self.teacher.temperature for text in texts]

    def accepts(self, candidates: Sequence[tuple[int, int]]) -> list[bool]:
        """Whether each (row, row of the pool) may be a negative."""
        pairs = [(i, self.pool[row]) for i, row in candidates]
        self._ask(pairs)
        if self.margin is None:
            return [True] * len(pairs)
        lowest = {i: min(self._known[i, text] for text in self.rows[i]["pos"]) for i, _ in candidates}
        return [self._known[i, text] <= lowest[i] - self.margin for i, text in pairs]

    def _ask(self, pairs: Sequence[tuple[int, str]]) -> None:
        new = list(dict.fromkeys(pair for pair in pairs if pair not in self._known))
        if new:
            scores = self.teacher.score([(self.rows[i]["query"], text) for i, text in new]).tolist()
            self._known.update(zip(new, scores, strict=True))
