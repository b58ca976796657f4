"""THE FILE TO EDIT: what the model learns. Torch only; paste it into a notebook and it works.

A loss sees representations, never the model, the ranks or the chunks: with --negatives_cross_device the step has
gathered them (with gradient) before, so a loss written for one process is exact on many and under GradCache. It
computes this rank's rows only and returns their mean; it does no communication, draws no random number and never
synchronizes with the device.

The score matrix of B queries and N candidates is the one thing here that can outgrow the memory. `by_row_blocks` never
makes it: each block of rows gets its scores, its loss and its gradient in one pass, and is forgotten. Five losses,
each from its paper, are in examples/losses/.

Two queries with a positive and a negative each, to try a loss on:

    query, passage = (F.normalize(torch.randn(n, 8), dim=1).requires_grad_() for n in (2, 4))
    own = torch.tensor([[0, 1], [2, 3]])
    x = LossInput(query, query, 0, passage, own[:, 0], own, torch.arange(4), excluded_BX=torch.tensor([[0], [2]]))
    training_loss(x, LossConfig()).loss.backward()

Shapes:
    B  queries of this rank             M  queries of all ranks          N  passages (candidates) of all ranks
       (without --negatives_cross_device M and N are those of this rank, too)
    b  queries of one block of rows
    G  most passages of one query's own group: its positive, then its own negatives
    X  most texts that are known positives of one query, the query itself included
    D  embedding size                   E  size of a guide model's embedding
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores in a block by default, 16 MB in float32: rows enough for a good matrix product, and little beside the vectors.
DEFAULT_BLOCK_SCORES = 1 << 22


@dataclass(frozen=True)
class LossConfig:
    """Settings of the loss.

    Args:
        temperature: scores are divided by it.
        in_batch_negatives: passages of other queries are negatives; False: a query's own group alone.
        distillation: learn from `teacher_BG`: "kl_div" or "m3_kd_loss"; None: contrastive only.
        mrl_dims: leading dimensions that shall work alone (Matryoshka); the loss is the mean over them.
        normalize: vectors have length 1 (a leading part is scaled to length 1 again).
        exclude_positives: a known positive of a query is never its negative.
        block_size: rows of the score matrix at a time; 0: all at once; None: so many that a block holds
            `DEFAULT_BLOCK_SCORES` scores. It changes memory and time, and no value.
        args: whatever --loss_args holds, for a loss of your own.
    """

    temperature: float = 0.02
    in_batch_negatives: bool = True
    distillation: Literal["kl_div", "m3_kd_loss"] | None = None
    mrl_dims: tuple[int, ...] = ()
    normalize: bool = True
    exclude_positives: bool = True
    block_size: int | None = None
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LossInput:
    """One micro-batch as one rank sees it. Vectors are float32 or wider; ids and columns are int64.

    B, and N with it, may be 0 on a rank of a last, short batch; whatever the loss is then counts nothing, but it must
    keep its graph.

    Args:
        query_BD: this rank's queries.
        all_query_MD: the queries of all ranks, with gradient; this rank's begin at row `row_offset`.
        candidate_ND: the passages of all ranks, with gradient.
        positive_B: column (of candidate_ND) of each query's positive.
        own_BG: columns of the query's own passages, the positive first; -1 where it has fewer.
        candidate_id_N: hash of each passage's normalized text, >= 0.
        excluded_BX: hashes that are never a negative of this query: its positives, those of equal queries, itself; -1
            is padding.
        teacher_BG: teacher scores of `own_BG` (any number where own_BG is -1), or None.
        guide_query_BE, guide_candidate_NE: a frozen guide model's vectors, or None.
        own_only_B: True where no passage outside the query's own group is a negative; None: nowhere.
    """

    query_BD: Tensor
    all_query_MD: Tensor
    row_offset: int
    candidate_ND: Tensor
    positive_B: Tensor
    own_BG: Tensor
    candidate_id_N: Tensor
    excluded_BX: Tensor
    teacher_BG: Tensor | None = None
    guide_query_BE: Tensor | None = None
    guide_candidate_NE: Tensor | None = None
    own_only_B: Tensor | None = None

    def rows(self, start: int, stop: int) -> "LossInput":
        """The same micro-batch with the queries [start, stop) alone; the candidates stay. Vectors are detached."""
        return replace(
            self,
            query_BD=self.query_BD.detach()[start:stop],
            all_query_MD=self.all_query_MD.detach(),
            row_offset=self.row_offset + start,
            candidate_ND=self.candidate_ND.detach(),
            positive_B=self.positive_B[start:stop],
            own_BG=self.own_BG[start:stop],
            excluded_BX=self.excluded_BX[start:stop],
            teacher_BG=None if self.teacher_BG is None else self.teacher_BG[start:stop],
            guide_query_BE=None if self.guide_query_BE is None else self.guide_query_BE[start:stop],
            own_only_B=None if self.own_only_B is None else self.own_only_B[start:stop],
        )


@dataclass(frozen=True)
class LossOutput:
    """`loss`: mean over this rank's B queries, a scalar. `metrics`: detached scalars, likewise means over B."""

    loss: Tensor
    metrics: dict[str, Tensor]


def training_loss(x: LossInput, cfg: LossConfig) -> LossOutput:
    """The built-in loss: InfoNCE, plus distillation and Matryoshka where `cfg` says so.

    With s_ij = <q_i, p_j> / temperature and C_i the candidates of query i,

        L_i = -log( exp(s_i,pos(i)) / sum_{j in C_i} exp(s_ij) )          (van den Oord et al. 2018, eq. 4)

    Returns:
        The mean over rows (and over `mrl_dims`, Kusupati et al. 2022, eq. 1) with the metrics of the last dimension.
    """
    dims = cfg.mrl_dims or (x.query_BD.shape[-1],)
    pairs = [(leading(x.query_BD, dim, cfg) / cfg.temperature, leading(x.candidate_ND, dim, cfg)) for dim in dims]

    def row_losses(scores: list[Tensor], rows: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        mask_bN = negative_mask(rows, cfg)
        losses = [_row_losses(score_bN, mask_bN, rows, cfg) for score_bN in scores]
        with torch.no_grad():
            metrics = ranking_metrics(scores[-1], mask_bN, rows, cfg)
        return torch.stack(losses).mean(dim=0), metrics

    return by_row_blocks(pairs, row_losses, x, cfg)


def leading(vectors: Tensor, dim: int, cfg: LossConfig) -> Tensor:
    """The first `dim` dimensions, of length 1 again where `cfg.normalize`."""
    if dim == vectors.shape[-1]:
        return vectors
    return F.normalize(vectors[:, :dim], dim=-1) if cfg.normalize else vectors[:, :dim]


def rows_per_block(num_rows: int, num_columns: int, cfg: LossConfig) -> int:
    """How many of the rows of a score matrix are computed at a time, by `cfg.block_size`."""
    size = cfg.block_size
    if size is None:
        size = 1 + DEFAULT_BLOCK_SCORES // max(1, num_columns)
    return min(size, num_rows) if size else num_rows


RowLosses = Callable[[list[Tensor], LossInput], tuple[Tensor, dict[str, Tensor]]]


def by_row_blocks(
    pairs: Sequence[tuple[Tensor, Tensor]], row_losses: RowLosses, x: LossInput, cfg: LossConfig
) -> LossOutput:
    """The mean over B rows of a loss of score matrices, `cfg.block_size` rows at a time.

    With S_k = U_k V_k^T, one for each pair, and L_i a function of row i of every S_k,

        dL/dU_k = dL/dS_k V_k        dL/dV_k = dL/dS_k^T U_k

    need the rows of one block alone, so each block adds its share and no B x N matrix exists at any time. Memory:
    O((B + N) D + b N) for blocks of b rows; the arithmetic is that of one block with all rows.

    Args:
        pairs: (U_k (B, D), V_k (N, D)): one score matrix (B, N) each; N may differ between pairs.
        row_losses: (the b rows of each S_k, `x.rows(...)` of the block) -> (loss of each row (b,), metrics (b,) each).
            All gradient goes through the scores; the vectors in the block's LossInput carry none.
        x: the micro-batch.
        cfg: see there.

    Returns:
        The mean over rows of the loss and of each metric. With several blocks its backward can run only once.
    """
    num_rows = len(x.query_BD)
    block_size = rows_per_block(num_rows, max(len(v_ND) for _, v_ND in pairs), cfg)
    if block_size == num_rows:
        loss_B, metrics_B = row_losses([u_BD @ v_ND.T for u_BD, v_ND in pairs], x.rows(0, num_rows))
        return LossOutput(loss_B.mean(), {name: value_B.detach().mean() for name, value_B in metrics_B.items()})

    vectors = [vector for pair in pairs for vector in pair]
    gradients = [torch.zeros_like(vector) for vector in vectors]

    def add_block(block: slice) -> dict[str, Tensor]:
        """Sums of loss and metrics over some rows; their gradients are added. What it makes dies with it."""
        scores = [(u_BD.detach()[block] @ v_ND.detach().T).requires_grad_() for u_BD, v_ND in pairs]
        with torch.enable_grad():
            loss_b, metrics_b = row_losses(scores, x.rows(block.start, block.stop))
        for k, gradient_bN in enumerate(torch.autograd.grad(loss_b.sum() / num_rows, scores)):
            u_BD, v_ND = pairs[k]
            gradients[2 * k][block] = gradient_bN @ v_ND.detach()
            gradients[2 * k + 1].addmm_(gradient_bN.T, u_BD.detach()[block])
        return {"loss": loss_b.detach().sum(), **{name: value_b.sum() for name, value_b in metrics_b.items()}}

    sums: dict[str, Tensor] = {}  # added in place: a small tensor left by every block would keep its memory in pieces
    for start in range(0, num_rows, block_size):
        for name, sum_of_block in add_block(slice(start, start + block_size)).items():
            sums[name] = sums[name].add_(sum_of_block) if name in sums else sum_of_block
    means = {name: value / num_rows for name, value in sums.items()}
    loss = _KnownGradient.apply(means.pop("loss"), gradients, *vectors)  # type: ignore[no-untyped-call]
    return LossOutput(loss, means)


class _KnownGradient(torch.autograd.Function):
    """A value with its gradient with regard to `vectors`, known beforehand; backward gives the gradients away."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *vectors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        del ctx.gradients  # so that they can be handed on without a copy
        return None, None, *(gradient.mul_(scales[0]) for gradient in gradients)


def negative_mask(x: LossInput, cfg: LossConfig) -> Tensor:
    """True where candidate j is a negative of query i; shape (B, N), the positive's own column is False.

    Not a negative: a text that is one of the query's positives or the query itself, wherever it stands (by id, so that
    every rank's copies count), and, without in-batch negatives, every passage outside the query's own group.
    """
    mask_BN = candidate_mask(x, cfg)
    if cfg.exclude_positives:
        mask_BN &= known_positives(x).logical_not_()
    return mask_BN.scatter_(1, x.positive_B[:, None], False)


def candidate_mask(x: LossInput, cfg: LossConfig) -> Tensor:
    """True where candidate j stands against query i at all: everywhere, or in its own group alone; shape (B, N)."""
    if not cfg.in_batch_negatives:
        return own_columns(x)
    if x.own_only_B is not None:
        return own_columns(x).logical_or_(~x.own_only_B[:, None])
    return x.own_BG.new_ones((x.own_BG.shape[0], x.candidate_ND.shape[0]), dtype=torch.bool)


def known_positives(x: LossInput) -> Tensor:
    """True where candidate j is one of the query's positives, or the query itself; shape (B, N)."""
    known_BN = x.own_BG.new_zeros((x.own_BG.shape[0], x.candidate_ND.shape[0]), dtype=torch.bool)
    for id_B in x.excluded_BX.unbind(dim=1):
        known_BN |= x.candidate_id_N[None, :] == id_B[:, None]
    return known_BN


def own_columns(x: LossInput) -> Tensor:
    """True where candidate j belongs to the query's own group; shape (B, N)."""
    num_candidates = x.candidate_ND.shape[0]
    own_BN1 = x.own_BG.new_zeros((x.own_BG.shape[0], num_candidates + 1), dtype=torch.bool)
    column_BG = torch.where(x.own_BG >= 0, x.own_BG, num_candidates)  # padding goes to an extra column, cut off here
    return own_BN1.scatter(1, column_BG, True)[:, :num_candidates]


def _row_losses(score_BN: Tensor, mask_BN: Tensor, x: LossInput, cfg: LossConfig) -> Tensor:
    """L_i of every row; shape (B,)."""
    if cfg.distillation is None:
        return info_nce(score_BN, mask_BN, x.positive_B)
    if x.teacher_BG is None:
        raise ValueError("distillation needs teacher scores: --knowledge_distillation with pos_scores and neg_scores")
    teacher_BG = x.teacher_BG.to(score_BN.dtype).masked_fill(x.own_BG < 0, -torch.inf).softmax(dim=1)
    if cfg.distillation == "kl_div":
        return info_nce(score_BN, mask_BN, x.positive_B) + group_cross_entropy(score_BN, x.own_BG, teacher_BG)
    if cfg.distillation != "m3_kd_loss":
        raise ValueError(f"distillation {cfg.distillation!r}: use 'kl_div', 'm3_kd_loss' or None")
    return m3_distillation(score_BN, mask_BN | own_columns(x), x.own_BG, teacher_BG)


def info_nce(score_BN: Tensor, mask_BN: Tensor, positive_B: Tensor) -> Tensor:
    """-log softmax of the positive among itself and the negatives in `mask_BN`; shape (B,)."""
    left_out_BN = (~mask_BN).scatter_(1, positive_B[:, None], False)
    return F.cross_entropy(score_BN.masked_fill(left_out_BN, -torch.inf), positive_B, reduction="none")


def group_cross_entropy(score_BN: Tensor, own_BG: Tensor, teacher_BG: Tensor) -> Tensor:
    """-sum_g t_g log softmax_g of the query's own passages; shape (B,).

    It is KL(teacher || student) plus the teacher's entropy, which has no gradient. Source: FlagEmbedding 1.4.2,
    abc/finetune/embedder/AbsModeling.py, distill_loss "kl_div".
    """
    own_score_BG = score_BN.gather(1, own_BG.clamp(min=0)).masked_fill(own_BG < 0, -torch.inf)
    log_prob_BG = own_score_BG.log_softmax(dim=1).masked_fill(own_BG < 0, 0.0)
    return -(teacher_BG * log_prob_BG).sum(dim=1)


def m3_distillation(score_BN: Tensor, kept_BN: Tensor, own_BG: Tensor, teacher_BG: Tensor) -> Tensor:
    """sum_g t_g * -log( exp(s_g) / sum over the candidates in `kept_BN` without own passages 0..g-1 ); shape (B,).

    Source: FlagEmbedding 1.4.2, abc/finetune/embedder/AbsModeling.py, distill_loss "m3_kd_loss".
    """
    loss_B = score_BN[:, :0].sum(dim=1)  # zeros that keep the graph where there is no row
    for g, column_B in enumerate(own_BG.unbind(dim=1)):
        present_B = column_B >= 0
        if g > 0:  # drop passage g-1, but only where g exists: an empty sum would be log 0, and its gradient NaN
            dropped_BN = torch.zeros_like(kept_BN).scatter(1, own_BG[:, g - 1 : g].clamp(min=0), True)
            kept_BN = kept_BN & ~(dropped_BN & present_B[:, None])
        log_total_B = score_BN.masked_fill(~kept_BN, -torch.inf).logsumexp(dim=1)
        own_score_B = score_BN.gather(1, column_B.clamp(min=0)[:, None])[:, 0]
        loss_B = loss_B + torch.where(present_B, teacher_BG[:, g] * (log_total_B - own_score_B), 0.0)
    return loss_B


def ranking_metrics(score_BN: Tensor, mask_BN: Tensor, x: LossInput, cfg: LossConfig) -> dict[str, Tensor]:
    """What the batch looks like to the model, for each row (one without negatives counts as right); shape (B,) each.

    accuracy: share of rows whose positive is above every negative. negative_beats_positive: share of rows with a
    negative above the positive (a tie is in neither). positive_similarity, hardest_negative_similarity: the scores
    times the temperature; without negatives the latter is 0. masked_negatives: copies of known
    positives among a row's candidates. log_candidates: ln of the number of candidates, the InfoNCE of a random guess.
    """
    positive_B = score_BN.gather(1, x.positive_B[:, None])[:, 0]
    masked_BN = score_BN.masked_fill(~mask_BN, -torch.inf)
    hardest_B = masked_BN.amax(dim=1) if masked_BN.numel() else positive_B  # a rank without rows has no column either
    num_negatives_B = mask_BN.sum(dim=1)
    known_BN = known_positives(x).logical_and_(candidate_mask(x, cfg))
    masked_B = known_BN.scatter_(1, x.positive_B[:, None], False).sum(dim=1)
    return {
        "accuracy": (positive_B > hardest_B).to(positive_B.dtype),
        "negative_beats_positive": (positive_B < hardest_B).to(positive_B.dtype),
        "positive_similarity": positive_B * cfg.temperature,
        "hardest_negative_similarity": torch.where(num_negatives_B > 0, hardest_B * cfg.temperature, 0.0),
        "masked_negatives": masked_B.to(positive_B.dtype),
        "log_candidates": (num_negatives_B + 1).to(positive_B.dtype).log(),
    }
