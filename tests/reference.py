"""The loss, slow and obviously right: loops over rows and candidates in float64, no mask, no scatter.

It is written from the definitions, not from `bge_core/loss.py`. A row names passages by their index and texts by
their id. Everything is a scalar or a vector torch tensor, so that autograd gives the gradients to compare with.

    M  rows (queries) of the global batch     N  passages of the global batch     D  size of a vector
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bge_core.loss import LossInput


@dataclass(frozen=True)
class Row:
    """One training example.

    Args:
        own: indices of its passages, the positive first, then its own negatives (none: a group of one).
        excluded: ids of its known positives and of the query's own text.
        teacher: the teacher's score of each of `own`.
        own_only: nobody else's passage is a negative of it.
    """

    own: list[int]
    excluded: frozenset[int]
    teacher: list[float]
    own_only: bool = False


Passages = tuple[Tensor, list[int]]  # vectors (N, D) and the text id of each


# ---------------------------------------------------------------------------------------------------------- definitions


def excluded_of(queries: Sequence[str], positives: Sequence[Sequence[str]]) -> list[set[str]]:
    """For each row the texts that are no negative of it: what answers its query in any row, and the query itself."""
    return [
        {query} | {text for other, texts in zip(queries, positives, strict=True) if other == query for text in texts}
        for query in queries
    ]


def negatives_of(row: Row, ids: list[int], *, in_batch_negatives: bool, exclude_positives: bool) -> list[int]:
    """Indices of the passages that are a negative of this row."""
    negatives = []
    for j in range(len(ids)):
        if j == row.own[0]:
            continue  # the positive itself
        if (row.own_only or not in_batch_negatives) and j not in row.own:
            continue  # somebody else's passage
        if exclude_positives and ids[j] in row.excluded:
            continue  # the text of a known positive, or of the query
        negatives.append(j)
    return negatives


def similarity_of(query_D: Tensor, passage_D: Tensor, dim: int, normalize: bool) -> Tensor:
    """<q, p> over the leading `dim` numbers; a true part of a unit vector is made a unit vector again."""
    q, p = query_D[:dim], passage_D[:dim]
    if normalize and dim < len(query_D):
        return q.dot(p) / (q.dot(q) * p.dot(p)).sqrt()
    return q.dot(p)


def log_share(chosen: Tensor, others: list[Tensor]) -> Tensor:
    """log( exp(chosen) / (exp(chosen) + sum of exp(others)) ), which is -log(1 + sum of exp(other - chosen))."""
    return -sum(((other - chosen).exp() for other in others), torch.zeros_like(chosen)).log1p()


def teacher_share(teacher: list[float]) -> list[float]:
    """Softmax of the teacher's scores."""
    weights = [math.exp(t - max(teacher)) for t in teacher]
    return [w / sum(weights) for w in weights]


def info_nce_row(scores: dict[int, Tensor], positive: int, negatives: list[int]) -> Tensor:
    """-log( exp(s+) / (exp(s+) + sum over negatives of exp(s)) )      (van den Oord et al. 2018, eq. 4)."""
    return -log_share(scores[positive], [scores[j] for j in negatives])


def kl_row(scores: dict[int, Tensor], row: Row) -> Tensor:
    """-sum_g t_g log softmax_g over the row's own passages           (FlagEmbedding 1.4.2, "kl_div")."""
    loss = torch.zeros((), dtype=torch.float64)
    for g, share in zip(row.own, teacher_share(row.teacher), strict=True):
        loss = loss - share * log_share(scores[g], [scores[j] for j in row.own if j != g])
    return loss


def m3_row(scores: dict[int, Tensor], row: Row, negatives: list[int]) -> Tensor:
    """-sum_g t_g log( exp(s_g) / sum over candidates but own passages before g )   (FlagEmbedding 1.4.2, "m3_kd_loss").

    The candidates are the row's negatives and all its own passages: what the teacher scored is learned from as scored.
    """
    loss = torch.zeros((), dtype=torch.float64)
    for position, (g, share) in enumerate(zip(row.own, teacher_share(row.teacher), strict=True)):
        candidates = set(negatives) | set(row.own)
        rest = candidates - set(row.own[: position + 1])
        loss = loss - share * log_share(scores[g], [scores[j] for j in sorted(rest)])
    return loss


def reference_loss(
    query_MD: Tensor,
    passages: Passages,
    rows: Sequence[Row],
    *,
    temperature: float = 0.02,
    in_batch_negatives: bool = True,
    distillation: str | None = None,
    mrl_dims: Sequence[int] = (),
    normalize: bool = True,
    exclude_positives: bool = True,
) -> Tensor:
    """The loss of the whole global batch: the mean over rows of the mean over `mrl_dims` of the row's loss."""
    candidate_ND, ids = passages
    query_MD, candidate_ND = query_MD.double(), candidate_ND.double()
    dims = list(mrl_dims) or [query_MD.shape[1]]
    total = torch.zeros((), dtype=torch.float64)
    for query_D, row in zip(query_MD, rows, strict=True):
        negatives = negatives_of(row, ids, in_batch_negatives=in_batch_negatives, exclude_positives=exclude_positives)
        for dim in dims:
            scores = {
                j: similarity_of(query_D, candidate_ND[j], dim, normalize) / temperature for j in {*row.own, *negatives}
            }
            if distillation == "m3_kd_loss":
                loss = m3_row(scores, row, negatives)
            else:
                loss = info_nce_row(scores, row.own[0], negatives)
            if distillation == "kl_div":
                loss = loss + kl_row(scores, row)
            total = total + loss / len(dims)
    return total / len(rows)


def siglip_loss(query_MD: Tensor, passages: Passages, rows: Sequence[Row], *, scale: float, bias: float) -> Tensor:
    """-1/M sum_i sum_j log sigmoid( z_ij (scale <q_i, p_j> + bias) )      (Zhai et al. 2023, section 3.2).

    z is 1 for a query's positive and -1 for each of its negatives; other known positives are in neither.
    """
    candidate_ND, ids = passages
    total = torch.zeros((), dtype=torch.float64)
    for query_D, row in zip(query_MD, rows, strict=True):
        for j in [row.own[0], *negatives_of(row, ids, in_batch_negatives=True, exclude_positives=True)]:
            z = 1.0 if j == row.own[0] else -1.0
            total = total + (-z * (scale * query_D.dot(candidate_ND[j]) + bias)).exp().log1p()
    return total / len(rows)


def gte_loss(query_MD: Tensor, passages: Passages, rows: Sequence[Row], *, temperature: float) -> Tensor:
    """-1/M sum_i log( exp s(q_i, d_i) / Z_i )      (Li et al. 2023, eq. 3 and 4).

        Z_i = sum_j exp s(q_i, d_j) + sum_{j != i} exp s(q_i, q_j) + sum_j exp s(q_j, d_i) + sum_{j != i} exp s(d_j, d_i)

    with s = cosine / temperature. The first and the last sum run over every passage; a text known to be right for query
    i stands in neither. The pair's own score, which the paper's first and third sum share, counts once.
    """
    candidate_ND, ids = passages
    total = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(rows):
        query_D, positive_D = query_MD[i], candidate_ND[row.own[0]]
        negatives = negatives_of(row, ids, in_batch_negatives=True, exclude_positives=True)
        others = [query_MD[j] for j in range(len(rows)) if j != i]
        scores = [query_D.dot(candidate_ND[j]) for j in negatives]
        scores += [query_D.dot(other_D) for other_D in others]
        scores += [other_D.dot(positive_D) for other_D in others]
        scores += [candidate_ND[j].dot(positive_D) for j in negatives]
        total = total - log_share(query_D.dot(positive_D) / temperature, [score / temperature for score in scores])
    return total / len(rows)


def gist_loss(
    query_MD: Tensor, passages: Passages, rows: Sequence[Row], *, guide: Sequence[Sequence[Tensor]], temperature: float
) -> Tensor:
    """InfoNCE without the negatives that the guide holds for closer than the positive      (Solatorio 2024, section 3).

    `guide`: the frozen guide's unit vectors of the queries and of the passages.
    """
    candidate_ND, ids = passages
    guide_queries, guide_candidates = guide
    total = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(rows):
        closeness = [guide_queries[i].dot(candidate).item() for candidate in guide_candidates]
        negatives = [
            j
            for j in negatives_of(row, ids, in_batch_negatives=True, exclude_positives=True)
            if not closeness[j] > closeness[row.own[0]]
        ]
        scores = {j: query_MD[i].dot(candidate_ND[j]) / temperature for j in [row.own[0], *negatives]}
        total = total + info_nce_row(scores, row.own[0], negatives)
    return total / len(rows)


def margin_mse_loss(query_MD: Tensor, passages: Passages, rows: Sequence[Row], *, temperature: float) -> Tensor:
    """1/M sum_i mean_n ( s(q_i, p_i) - s(q_i, n) - t(q_i, p_i) + t(q_i, n) )^2      (Hofstaetter et al. 2020).

    n are the row's own negatives, s = cosine / temperature, t the teacher's score; without negatives the mean is 0.
    """
    candidate_ND, _ = passages
    total = torch.zeros((), dtype=torch.float64)
    for query_D, row in zip(query_MD, rows, strict=True):
        positive, *negatives = [query_D.dot(candidate_ND[j]) / temperature for j in row.own]
        for negative, score in zip(negatives, row.teacher[1:], strict=True):
            total = total + ((positive - negative) - (row.teacher[0] - score)) ** 2 / len(negatives)
    return total / len(rows)


def spread_out_loss(
    query_MD: Tensor,
    passages: Passages,
    rows: Sequence[Row],
    *,
    temperature: float,
    weight: float = 1.0,
    mean_weight: float = 1.0,
) -> Tensor:
    """InfoNCE + weight (R(queries) + R(passages)), R = mean_weight M1^2 + max(0, M2 - 1/D)      (Zhang et al. 2017).

    M1 and M2 are the means of the inner product and of its square over pairs; of several copies of a passage the first
    counts.
    """
    candidate_ND, ids = passages
    total = reference_loss(query_MD, passages, rows, temperature=temperature)
    for texts in (list(query_MD), [candidate_ND[j] for j in range(len(ids)) if ids[j] not in ids[:j]]):
        products = [texts[i].dot(texts[j]) for i in range(len(texts)) for j in range(i)]
        if products:
            mean = sum(products) / len(products)
            second_moment = sum(product**2 for product in products) / len(products)
            total = total + weight * (mean_weight * mean**2 + (second_moment - 1 / query_MD.shape[1]).clamp(min=0))
    return total


def reference_metrics(
    query_MD: Tensor,
    passages: Passages,
    rows: Sequence[Row],
    *,
    in_batch_negatives: bool = True,
    mrl_dims: Sequence[int] = (),
    normalize: bool = True,
    exclude_positives: bool = True,
) -> dict[str, float]:
    """Means over the given rows, at the last of `mrl_dims`; the hardest negative's is 0 for a row without one."""
    candidate_ND, ids = passages
    dim = list(mrl_dims)[-1] if mrl_dims else query_MD.shape[1]
    right, beaten, positives, hardest, masked, sizes = [], [], [], [], [], []
    for query_D, row in zip(query_MD.detach().double(), rows, strict=True):
        similarity = [similarity_of(query_D, p, dim, normalize).item() for p in candidate_ND.detach().double()]
        negatives = negatives_of(row, ids, in_batch_negatives=in_batch_negatives, exclude_positives=exclude_positives)
        reachable = range(len(ids)) if in_batch_negatives and not row.own_only else row.own
        positive = similarity[row.own[0]]
        right.append(all(positive > similarity[j] for j in negatives))
        beaten.append(any(similarity[j] > positive for j in negatives))
        positives.append(positive)
        hardest.append(max((similarity[j] for j in negatives), default=0.0))
        masked.append(sum(ids[j] in row.excluded for j in reachable if j != row.own[0]))
        sizes.append(math.log(1 + len(negatives)))

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values) if values else math.nan

    return {
        "accuracy": mean(right),
        "negative_beats_positive": mean(beaten),
        "positive_similarity": mean(positives),
        "hardest_negative_similarity": mean(hardest),
        "masked_negatives": mean(masked),
        "log_candidates": mean(sizes),
    }


# ------------------------------------------------------------------------------------------------------- random batches


@dataclass(frozen=True)
class Batch:
    """A global batch: the same on any number of ranks."""

    query_MD: Tensor
    candidate_ND: Tensor
    ids: list[int]
    rows: list[Row]

    @property
    def passages(self) -> Passages:
        return self.candidate_ND, self.ids

    def leaves(self, dtype: torch.dtype = torch.float64) -> "Batch":
        """The same batch with vectors of this dtype that gather gradients of their own."""
        return replace(
            self,
            query_MD=self.query_MD.detach().to(dtype, copy=True).requires_grad_(),
            candidate_ND=self.candidate_ND.detach().to(dtype, copy=True).requires_grad_(),
        )

    def gradients(self) -> tuple[Tensor, Tensor]:
        """What backward left in the vectors; zeros where nothing arrived."""
        found = [torch.zeros_like(v) if v.grad is None else v.grad for v in (self.query_MD, self.candidate_ND)]
        return found[0].double(), found[1].double()


def make_batch(
    seed: int,
    num_rows: int,
    group_sizes: int | Sequence[int] = 3,
    dim: int = 8,
    *,
    duplicates: bool = True,
    unit: bool = True,
) -> Batch:
    """A random global batch; a row's group has its positive and `group_sizes - 1` own negatives.

    With `duplicates` it holds what real data hold: rows with the same positive text, an own negative equal to the
    positive, and among the negatives of other rows the row's positive, another known positive, and the query itself.
    Equal texts have nearly equal vectors, as under dropout. Ids are 0 and neighbours above 2**53, where float64 would
    confuse them. With `unit` vectors have length 1.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = [group_sizes] * num_rows if isinstance(group_sizes, int) else list(group_sizes)
    assert len(sizes) == num_rows and min(sizes) >= 1
    starts = [sum(sizes[:i]) for i in range(num_rows)]
    own = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]

    num_texts = sum(sizes) + 2 * num_rows
    texts = [0, *rng.sample(range(2**60, 2**60 + num_texts), num_texts - 1)]
    ids, query_ids, unused = texts[: sum(sizes)], texts[sum(sizes) : -num_rows], texts[-num_rows:]
    if duplicates:
        ids[starts[min(1, num_rows - 1)]] = ids[starts[0]]
        for row in own[::2]:
            if len(row) > 2:
                ids[row[1]] = ids[row[0]]
        free = [j for row in own for j in (row[2:] or row[1:])]
        rng.shuffle(free)
        for i, row in enumerate(own):  # one of another row's negatives: a positive, the query, or another positive
            foreign = [j for j in free if j not in row]
            if foreign:
                free.remove(foreign[0])
                ids[foreign[0]] = (ids[row[0]], query_ids[i], unused[i])[i % 3]

    base = {text: torch.randn(dim, generator=generator, dtype=torch.float64) for text in sorted(texts)}

    def vector(text: int, noise: float) -> Tensor:
        v = base[text] + noise * torch.randn(dim, generator=generator, dtype=torch.float64)
        return v / v.norm() if unit else v

    for i, row in enumerate(own):  # a row's passages lie near its query: its own negatives are hard
        for text in sorted({ids[j] for j in row} & set(texts[: sum(sizes)])):
            base[text] = 0.8 * base[text] + base[query_ids[i]]
    rows = []
    for i, row in enumerate(own):
        known = {ids[row[0]], query_ids[i]} | ({unused[i]} if i % 3 != 1 else set())  # rows differ in how many
        rows.append(Row(row, frozenset(known), teacher=[rng.gauss(0, 1) for _ in row]))
    return Batch(
        query_MD=torch.stack([vector(text, 0.0) for text in query_ids]),
        candidate_ND=torch.stack([vector(text, 0.05) for text in ids]),
        ids=ids,
        rows=rows,
    )


def rank_rows(num_rows: int, world_size: int, uneven: bool = False) -> list[range]:
    """The contiguous rows of each rank; `uneven` gives the earlier ranks more, every rank at least one."""
    counts = [num_rows // world_size + (rank < num_rows % world_size) for rank in range(world_size)]
    if uneven:
        for rank in range(world_size // 2):
            if counts[-1 - rank] > 1:
                counts[rank], counts[-1 - rank] = counts[rank] + 1, counts[-1 - rank] - 1
    return [range(sum(counts[:r]), sum(counts[: r + 1])) for r in range(world_size)]


def loss_input(
    batch: Batch, rank: int = 0, world_size: int = 1, *, uneven: bool = False, teacher: bool = True, padding: int = 0
) -> LossInput:
    """The batch as this rank sees it: its own rows, the passages of all. `padding` adds columns that hold nothing."""
    here = rank_rows(len(batch.rows), world_size, uneven)[rank]
    rows = [batch.rows[i] for i in here]
    G = max(len(row.own) for row in rows) + padding
    X = max(len(row.excluded) for row in rows) + padding
    return LossInput(
        query_BD=batch.query_MD[here.start : here.stop],
        all_query_MD=batch.query_MD,
        row_offset=here.start,
        candidate_ND=batch.candidate_ND,
        positive_B=torch.tensor([row.own[0] for row in rows]),
        own_BG=torch.tensor([row.own + [-1] * (G - len(row.own)) for row in rows]),
        candidate_id_N=torch.tensor(batch.ids),
        excluded_BX=torch.tensor([sorted(row.excluded) + [-1] * (X - len(row.excluded)) for row in rows]),
        teacher_BG=(
            torch.tensor(
                [row.teacher + [1e4] * (G - len(row.own)) for row in rows],  # any number where there is no passage
                dtype=batch.query_MD.dtype,
            )
            if teacher
            else None
        ),
        own_only_B=torch.tensor([row.own_only for row in rows]) if any(row.own_only for row in batch.rows) else None,
    )
