"""Margin-MSE: the student's margins shall be the teacher's (Hofstaetter et al. 2020, arXiv 2010.02666).

train.py ... --loss examples/losses/margin_mse.py:margin_mse_loss --knowledge_distillation --temperature 0.1

The scale of the scores counts, unlike in a softmax. Cosines over the temperature have margins of up to 2 / temperature,
so choose one at which this is the range of the teacher's: about 0.1 for a reranker's raw scores from -10 to 10, 1 for
cosines of another embedder. A number added to all of a row's scores changes nothing.
"""

import torch
from torch import Tensor

from bge_core.loss import LossConfig, LossInput, LossOutput, by_row_blocks, negative_mask, ranking_metrics


def margin_mse_loss(x: LossInput, cfg: LossConfig) -> LossOutput:
    """L_i = mean over the query's own negatives n of ( (s(q_i,p_i) - s(q_i,n)) - (t(q_i,p_i) - t(q_i,n)) )^2

    s = cosine / temperature, t the teacher's score; no other row's passage takes part. A row without negatives has no
    margin: its loss is 0, and it counts in the mean over rows.
    """
    if x.teacher_BG is None:
        raise ValueError("Margin-MSE needs teacher scores: --knowledge_distillation with pos_scores and neg_scores")

    def row_losses(scores: list[Tensor], rows: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        assert rows.teacher_BG is not None
        own_score_bG = scores[0].gather(1, rows.own_BG.clamp(min=0))
        surplus_bG = own_score_bG - rows.teacher_BG.to(own_score_bG.dtype)
        present_bG = rows.own_BG[:, 1:] >= 0
        error_bG = (surplus_bG[:, :1] - surplus_bG[:, 1:]).masked_fill(~present_bG, 0.0)
        with torch.no_grad():
            metrics = ranking_metrics(scores[0], negative_mask(rows, cfg), rows, cfg)
        return error_bG.square().sum(dim=1) / present_bG.sum(dim=1).clamp(min=1), metrics

    return by_row_blocks([(x.query_BD / cfg.temperature, x.candidate_ND)], row_losses, x, cfg)
