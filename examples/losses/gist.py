"""GISTEmbed: a frozen guide says which candidates are no negatives (Solatorio 2024, section 3.1).

train.py ... --loss examples/losses/gist.py:gist_loss --guide_encoder BAAI/bge-large-zh-v1.5
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bge_core.loss import LossConfig, LossInput, LossOutput, by_row_blocks, info_nce, negative_mask, ranking_metrics


def gist_loss(x: LossInput, cfg: LossConfig) -> LossOutput:
    """InfoNCE without the candidates that the guide finds closer to the query than its positive.

    j is a negative of i only if  cos(g(q_i), g(d_j)) <= cos(g(q_i), g(p_i)), and it is no known positive.
    """
    if x.guide_query_BE is None or x.guide_candidate_NE is None:
        raise ValueError("the guided loss needs --guide_encoder")

    def row_losses(scores: list[Tensor], rows: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        assert rows.guide_query_BE is not None and rows.guide_candidate_NE is not None
        with torch.no_grad():
            guide_bN = F.normalize(rows.guide_query_BE, dim=-1) @ F.normalize(rows.guide_candidate_NE, dim=-1).T
            closer_bN = guide_bN > guide_bN.gather(1, rows.positive_B[:, None])
            mask_bN = negative_mask(rows, cfg) & ~closer_bN
            metrics = ranking_metrics(scores[0], mask_bN, rows, cfg)
        return info_nce(scores[0], mask_bN, rows.positive_B), metrics

    return by_row_blocks([(x.query_BD / cfg.temperature, x.candidate_ND)], row_losses, x, cfg)
