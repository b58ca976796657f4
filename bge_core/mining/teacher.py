"""Scores of (query, passage) pairs by a cross-encoder or a second encoder."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from accelerate import Accelerator

from bge_core.encoder.model import Encoder
from bge_core.encoder.reranker import load_reranker
from bge_core.runtime.config import MineConfig


def load_teacher(
    config: MineConfig, load: Callable[..., Encoder], accelerator: Accelerator, vectors_by: Callable[..., Any]
) -> Callable[[Sequence[tuple[str, str]]], np.ndarray] | None:
    """Scores of (query, passage) pairs by the reranker or the second encoder that the flags name, if they name one."""
    if config.reranker_name_or_path:
        reranker = load_reranker(
            config.reranker_name_or_path,
            max_length=config.reranker_max_length,
            attention=config.attention,
            trust_remote_code=config.trust_remote_code,
        ).to(accelerator.device)
        return partial(
            reranker.score,
            precision=accelerator.mixed_precision,
            max_tokens=config.max_tokens,
            batch_size=config.batch_size,
        )
    if not config.teacher_encoder:
        return None
    encoder = load(config.teacher_encoder).to(accelerator.device)
    known: dict[tuple[str, str], np.ndarray] = {}

    def cosines(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        sides = (
            ("query", 0, config.query_max_len, encoder.settings.query_prompt),
            ("passage", 1, config.passage_max_len, encoder.settings.passage_prompt),
        )
        for side, place, length, prompt in sides:
            new = [text for text in dict.fromkeys(pair[place] for pair in pairs) if (side, text) not in known]
            found = vectors_by(encoder, new, prompt=prompt or "", max_length=length, description=f"teacher: {side}")
            known.update(zip(((side, text) for text in new), np.asarray(found, dtype=np.float32), strict=True))
        return np.array([known["query", query] @ known["passage", passage] for query, passage in pairs])

    return cosines
