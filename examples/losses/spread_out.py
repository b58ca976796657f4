"""InfoNCE with the spread-out term: texts that differ shall be nearly orthogonal (Zhang et al. 2017, arXiv 1708.06320).

train.py ... --loss examples/losses/spread_out.py:spread_out_loss --negatives_cross_device

--loss_args '{"weight": 2}' doubles the term, also known as global orthogonal regularization (GOR). jina-embeddings-v5
(Akram et al. 2026, arXiv 2602.15547) has M2 alone and without the hinge, which above 1/D is a constant apart:
`"mean_weight": 0` then has its gradient.

The term is no sum over rows: M1 is squared and M2 cut off after the mean over all pairs. Yet it is exact on many
processes, because each computes it of the same gathered texts, and what is the same for every row is its own mean.
Without --negatives_cross_device each process spreads its own texts alone, which is another loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bge_core.loss import LossConfig, LossInput, LossOutput, training_loss


def spread_out_loss(x: LossInput, cfg: LossConfig) -> LossOutput:
    """L_i = InfoNCE_i + weight (R(queries) + R(passages)),      R = mean_weight M1^2 + max(0, M2 - 1/D)

    The passages are all of the batch, mined negatives included; copies of a text, told by id, count once. Queries come
    without ids: a question that stands in two rows is a pair like any other.
    """
    mean_weight = cfg.args.get("mean_weight", 1.0)
    every_query_M = x.all_query_MD.new_ones(len(x.all_query_MD), dtype=torch.bool)
    spread = overlap(x.all_query_MD, every_query_M, mean_weight)
    spread = spread + overlap(x.candidate_ND, first_copies(x.candidate_id_N), mean_weight)
    output = training_loss(x, cfg)
    loss = output.loss + cfg.args.get("weight", 1.0) * spread
    return LossOutput(loss, {**output.metrics, "spread_out": spread.detach()})


def overlap(vector_ND: Tensor, counted_N: Tensor, mean_weight: float) -> Tensor:
    """mean_weight M1^2 + max(0, M2 - 1/D), M1 and M2 the means of <v_i, v_j> and <v_i, v_j>^2 over pairs i != j.

    On the unit sphere evenly spread vectors have 0 and 1/D. Instead of N x N inner products, and so without row blocks:

        sum_ij <v_i, v_j> = |sum_i v_i|^2        sum_ij <v_i, v_j>^2 = |V^T V|^2, a matrix (D, D)

    less the pairs i = j. `counted_N`: vectors that take part; fewer than two have no pair, and cost nothing.
    """
    counted_ND = vector_ND * counted_N[:, None]
    square_N = counted_ND.square().sum(dim=1)
    num_counted = counted_N.sum()
    num_pairs = (num_counted * (num_counted - 1)).clamp(min=1)
    mean = (counted_ND.sum(dim=0).square().sum() - square_N.sum()) / num_pairs
    second_moment = ((counted_ND.T @ counted_ND).square().sum() - square_N.square().sum()) / num_pairs
    return mean_weight * mean.square() + F.relu(second_moment - 1 / vector_ND.shape[1])


def first_copies(id_N: Tensor) -> Tensor:
    """True for the first text of each id, without waiting for the device as `unique` would."""
    sorted_N, order_N = id_N.sort(stable=True)
    first_N = torch.ones_like(sorted_N, dtype=torch.bool)
    first_N[1:] = sorted_N[1:] != sorted_N[:-1]
    return torch.empty_like(first_N).scatter(0, order_N, first_N)
