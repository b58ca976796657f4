"""GTE's improved contrastive loss: queries and passages among themselves, too (Li et al. 2023, eq. 3-4).

train.py ... --loss examples/losses/gte.py:gte_loss --negatives_cross_device
"""

import torch
from torch import Tensor

from bge_core.loss import LossConfig, LossInput, LossOutput, by_row_blocks, negative_mask, ranking_metrics


def gte_loss(x: LossInput, cfg: LossConfig) -> LossOutput:
    """L_i = -log( e^s(q_i,p_i) / Z_i ), p_i the positive, s = cosine / temperature, and

    Z_i = sum_j e^s(q_i,d_j) + sum_{j != i} ( e^s(q_i,q_j) + e^s(q_j,p_i) ) + sum_{d_j != p_i} e^s(d_j,p_i)

    over the queries j and the candidates d_j of all ranks; a known positive of query i is no candidate.
    """
    query_BD, positive_BD = x.query_BD / cfg.temperature, x.candidate_ND[x.positive_B] / cfg.temperature
    pairs = [
        (query_BD, x.candidate_ND), (query_BD, x.all_query_MD),
        (positive_BD, x.all_query_MD), (positive_BD, x.candidate_ND),
    ]  # fmt: skip

    def row_losses(scores: list[Tensor], rows: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        mask_bN, positive_b1 = negative_mask(rows, cfg), rows.positive_B[:, None]
        own_b1 = rows.row_offset + torch.arange(len(positive_b1), device=positive_b1.device)[:, None]
        with_positive_bN = mask_bN.scatter(1, positive_b1, True)
        others_bM = torch.ones_like(scores[1], dtype=torch.bool).scatter(1, own_b1, False)
        masks = (with_positive_bN, others_bM, others_bM, mask_bN)
        kept = [score.masked_fill(~mask, -torch.inf) for score, mask in zip(scores, masks, strict=True)]
        log_z_b = torch.cat(kept, dim=1).logsumexp(dim=1)
        metrics = ranking_metrics(scores[0].detach(), mask_bN, rows, cfg)
        return log_z_b - scores[0].gather(1, positive_b1)[:, 0], metrics

    return by_row_blocks(pairs, row_losses, x, cfg)
