"""SigLIP: every query/passage pair is a yes/no question of its own (Zhai et al. 2023, section 3.2).

    train.py ... --loss examples/losses/siglip.py:siglip_loss --temperature 0.1 --loss_args '{"bias": -10}'

`bias` is a setting here, while the paper learns it: a loss has no parameters. Its start, -10, suits thousands of
negatives a query; ln(1/N) is the value at which a random guess costs least.
"""

import torch.nn.functional as F
from torch import Tensor

from bge_core.loss import LossConfig, LossInput, LossOutput, by_row_blocks, negative_mask, ranking_metrics


def siglip_loss(x: LossInput, cfg: LossConfig) -> LossOutput:
    """L_i = -log sigmoid(s_ip + bias) - sum over negatives j of log sigmoid(-s_ij - bias).

    s_ij = <q_i, d_j> / temperature, p the column of query i's positive.
    """
    bias = cfg.args.get("bias", -10.0)

    def row_losses(scores: list[Tensor], rows: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        mask_bN = negative_mask(rows, cfg)
        logit_bN = scores[0] + bias
        positive_b = logit_bN.gather(1, rows.positive_B[:, None])[:, 0]
        negative_b = F.softplus(logit_bN).masked_fill(~mask_bN, 0.0).sum(dim=1)
        return F.softplus(-positive_b) + negative_b, ranking_metrics(scores[0].detach(), mask_bN, rows, cfg)

    return by_row_blocks([(x.query_BD / cfg.temperature, x.candidate_ND)], row_losses, x, cfg)
