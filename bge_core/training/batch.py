"""A micro-batch: tokens in one row, and which passage is whose."""

from dataclasses import dataclass

from torch import Tensor

from bge_core.encoder.fixed import FixedRow
from bge_core.encoder.tokens import Tokens


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch.

    Args:
        tokens: the B queries, then the R passages.
        own_BG: columns (of this rank's R passages) of each query's passages, the positive first, -1 where fewer.
        passage_id_R: hash of each passage's normalized text.
        excluded_BX: hashes that are never a negative of a query: its positives, those of equal queries, itself; -1 is
            padding.
        teacher_BG: teacher scores of `own_BG`, or None.
        rank_counts: (queries, passages) of this micro-batch on each rank.
        rows: the B numbers of the rows.
        guide_tokens: the same texts for the guide encoder, if there is one.
        own_only_B: True for queries whose own passages alone are their negatives; None: for none.
        chunks, guide_chunks: the texts as rows of fixed shape, as many at a time as go through the model and the guide;
            None: those take `tokens` and `guide_tokens`.
    """

    tokens: Tokens
    own_BG: Tensor
    passage_id_R: Tensor
    excluded_BX: Tensor
    teacher_BG: Tensor | None
    rank_counts: list[tuple[int, int]]
    rows: list[int]
    guide_tokens: Tokens | None = None
    own_only_B: Tensor | None = None
    chunks: list[FixedRow] | None = None
    guide_chunks: list[FixedRow] | None = None

    @property
    def num_queries(self) -> int:
        """B."""
        return len(self.rows)

    @property
    def num_global_rows(self) -> int:
        """M, the queries of all ranks."""
        return sum(queries for queries, _ in self.rank_counts)
