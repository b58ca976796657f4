"""What a row's candidates must not be: perhaps an answer (guards.py), or scored outside the limits."""

from collections.abc import Sequence

import numpy as np

from bge_core.files.records import Row
from bge_core.mining.guards import Guards
from bge_core.mining.retrieve import Embedded
from bge_core.runtime.config import MineConfig

SCORE_FILTERS = ("max_score", "min_score", "absolute_margin", "relative_margin")
MAX_EXAMPLES = 200  # of what a guard or a filter took out, for the report


class CandidateFilter:
    """Says why a candidate is no negative of a row: guards on the texts, then the limits on its score.

        score <= max_score        score >= min_score
        score <= p - absolute_margin        score <= p - relative_margin * |p|        p: lowest score of the positives

    Args:
        rows: of training data.
        pool: the candidates.
        embedded: their vectors, which give the scores.
        config: names the limits.
        lowest_Q: p of each row.
        guards: of the rows; None: none stands.

    Attributes:
        removed: for each guard and filter some of what it took out, each once: query, positive, candidate, score.

    Source: NV-Retriever, Moreira et al. 2024, sec. 4.1 (TopK-MarginPos, TopK-PercPos).
    """

    def __init__(
        self,
        rows: Sequence[Row],
        pool: Sequence[str],
        embedded: Embedded,
        config: MineConfig,
        lowest_Q: Sequence[float],
        guards: Guards | None = None,
    ) -> None:
        self.rows, self.pool, self.embedded, self.lowest_Q, self.guards = rows, pool, embedded, lowest_Q, guards
        limits = {name: getattr(config, name) for name in SCORE_FILTERS}
        self.limits: dict[str, float] = {name: limit for name, limit in limits.items() if limit is not None}
        self.removed: dict[str, list[Row]] = {}
        self._shown: set[tuple[int, int]] = set()

    @property
    def excludes_any(self) -> bool:
        """Whether a guard or a limit stands."""
        return self.guards is not None or bool(self.limits)

    def reasons(self, number: int, candidates: Sequence[int]) -> list[str | None]:
        """For some rows of the pool, why each is no negative of row `number`: a guard's or limit's name, or None."""
        texts = [self.pool[row] for row in candidates]
        reasons: list[str | None] = self.guards.reasons(number, texts) if self.guards else [None] * len(texts)
        if not texts or not (self.limits or any(reasons)):
            return reasons
        scores = self.embedded.scores(number, candidates)
        lowest = self.lowest_Q[number]
        for name, limit in self.limits.items():
            if name == "min_score":
                outside = scores < limit
            else:
                margin = {"absolute_margin": limit, "relative_margin": limit * abs(lowest)}.get(name)
                outside = scores > (limit if margin is None else lowest - margin)
            reasons = [
                reason or (name if is_out else None) for reason, is_out in zip(reasons, outside.tolist(), strict=True)
            ]
        self._keep_examples(number, candidates, reasons, scores)
        return reasons

    def _keep_examples(
        self, number: int, candidates: Sequence[int], reasons: Sequence[str | None], scores: np.ndarray
    ) -> None:
        row = self.rows[number]
        for candidate, reason, score in zip(candidates, reasons, scores.tolist(), strict=True):
            # What the range held may be asked again, to fill up at random.
            if reason and (number, candidate) not in self._shown:
                found = self.removed.setdefault(reason, [])
                if len(found) < MAX_EXAMPLES:
                    self._shown.add((number, candidate))
                    text = self.pool[candidate]
                    found.append({"query": row["query"], "positive": row["pos"][0], "candidate": text, "score": score})
