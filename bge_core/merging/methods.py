"""Ways to merge the weights of models, and the greedy soup, which says which models to average at all.

A way takes the models' tensors of one name, flattened, and gives a function from a slice to the merged entries in that
place, float32: the result is never held whole. What a way must know of whole tensors first (an angle, a threshold) it
takes from one or two of them at a time. Each tensor is merged by itself, as in mergekit.

Shapes: M models, N entries of a tensor, P entries of a slice.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from bge_core import UserError

Merged = Callable[[slice], Tensor]
Model = TypeVar("Model")
BLOCK = 2**20  # entries that are converted at a time to compute an angle
PARALLEL = 1e-6  # of 1 - |cosine|; there, spherical and linear coefficients agree to the precision of float32
DENSITY = 0.2  # the share that TIES keeps, of its paper


def linear(flats: Sequence[Tensor], weights: Sequence[float]) -> Merged:
    """theta = sum_m w_m theta_m. A model of weight 0 is not read, so [1, 0] gives the first model bit for bit.

    Args:
        flats: M tensors (N,) of any floating type.
        weights: M numbers, used as they are.

    Returns:
        slice -> (P,) float32.

    Source: Xiao et al. 2023, "LM-Cocktail", and its package LM_Cocktail 0.0.4, utils.py, merge_param.
    """
    used = [(weight, flat) for weight, flat in zip(weights, flats, strict=True) if weight != 0]
    return lambda part: functools.reduce(Tensor.add_, (flat[part].to(torch.float32) * weight for weight, flat in used))


def slerp(flats: Sequence[Tensor], weights: Sequence[float]) -> Merged:
    """Two models a and b along the great circle between them, instead of the chord that shortens the result.

        cos(o) = <a, b> / (|a| |b|),     theta = sin(w_0 o) / sin(o) a + sin(w_1 o) / sin(o) b

    w_0 + w_1 = 1, so w_1 is the share of the way from a to b. The angle o is that of the whole tensors, in float64; the
    coefficients apply to the tensors as they are, of whatever length. Linear where one is zero or both are (nearly)
    parallel, in the same or in opposite directions: no one great circle leads to the opposite point.

    Args, Returns: of `linear`, with M = 2.

    Source: Shoemake 1985, "Animating rotation with quaternion curves", section 3.3; mergekit's slerp.
    """
    a, b = flats
    if 0 in weights:  # the other model is not read, as in `linear`
        return linear(flats, weights)
    products = torch.zeros(3, dtype=torch.float64)
    for a_P, b_P in zip(a.split(BLOCK), b.split(BLOCK), strict=True):
        a_P, b_P = a_P.double(), b_P.double()
        products += torch.stack([a_P @ b_P, a_P @ a_P, b_P @ b_P])
    dot, square_a, square_b = products.tolist()
    length = math.sqrt(square_a * square_b)
    cosine = dot / length if length else 1.0
    if 1 - abs(cosine) < PARALLEL:
        return linear(flats, weights)
    angle = math.acos(cosine)
    return linear(flats, [math.sin(weight * angle) / math.sin(angle) for weight in weights])


def task_arithmetic(flats: Sequence[Tensor], weights: Sequence[float]) -> Merged:
    """theta = theta_base + sum_m w_m (theta_m - theta_base): what each model learned, scaled, added to their base.

    Computed as (1 - sum_m w_m) theta_base + sum_m w_m theta_m, which is the same: where the weights sum to 1 the base
    cancels out, and with one weight 1 the result is that model bit for bit. A negative weight unlearns.

    Args:
        flats: M + 1 tensors (N,), the base last.
        weights: M numbers of any sum; the paper has one coefficient for all, tuned on held-out data.

    Returns:
        slice -> (P,) float32.

    Source: Ilharco et al. 2023, "Editing models with task arithmetic", section 2.
    """
    return linear(flats, [*weights, 1 - math.fsum(weights)])


def ties(flats: Sequence[Tensor], weights: Sequence[float], density: float = DENSITY) -> Merged:
    """TIES: what the models learned, without its small entries and without those that contradict the majority.

        tau_m = theta_m - theta_base
        trim:   t_m = tau_m where |tau_m| is among the largest round(density N) of this tensor (at least one), else 0
        elect:  s = sign(sum_m w_m t_m)
        merge:  theta = theta_base + sum_m w_m t_m / sum_m w_m,   both over the models with sign(t_m) = s

    Entries as large as the smallest one kept are kept, too. Where the sum is exactly 0, or all is trimmed, the base's
    value stays. Only the ratios of the weights count (the paper's lambda is 1). The paper trims over the whole model,
    this over each tensor, as mergekit does: else a few tensors would keep nearly all of their entries, others none.

    Args:
        flats: M + 1 tensors (N,), the base last.
        weights: M numbers, none below 0, not all 0.
        density: above 0, up to 1.

    Returns:
        slice -> (P,) float32.

    Source: Yadav et al. 2023, "TIES-Merging: resolving interference when merging models", section 4, algorithm 1.
    """
    *tuned, base = flats
    used = [(weight, flat) for weight, flat in zip(weights, tuned, strict=True) if weight != 0]
    weight_M1 = torch.tensor([weight for weight, _ in used])[:, None]
    smallest_M1 = torch.tensor([_smallest_kept(_task_vector(flat, base), density) for _, flat in used])[:, None]

    def merged(part: slice) -> Tensor:
        task_MP = torch.stack([_task_vector(flat[part], base[part]) for _, flat in used])
        task_MP.masked_fill_(task_MP.abs() < smallest_M1, 0)
        weighted_MP = weight_M1 * task_MP
        agrees_MP = task_MP.sign() == weighted_MP.sum(dim=0).sign()
        total_P, share_P = (weighted_MP * agrees_MP).sum(dim=0), (weight_M1 * agrees_MP).sum(dim=0)
        return base[part].to(torch.float32) + total_P / share_P.masked_fill_(share_P == 0, 1)

    return merged


def _task_vector(flat: Tensor, base: Tensor) -> Tensor:
    return flat.to(torch.float32) - base.to(torch.float32)


def _smallest_kept(task: Tensor, density: float) -> float:
    """The magnitude that an entry of a task vector, which is overwritten, must have to stay."""
    magnitude = task.abs_().numpy()
    place = len(magnitude) - max(1, round(density * len(magnitude)))
    magnitude.partition(place)  # in place, while torch.kthvalue needs three times the tensor's memory
    return float(magnitude[place])


def check_arguments(method: str, num_models: int, base_model: str | None, density: float | None) -> None:
    """Refuse what a method lacks, and what means nothing to it. UserError with the flag and the remedy."""
    if method == "slerp" and num_models != 2:
        remedy = "name two, or use --method linear"
        raise UserError(f"--method slerp: is between two models, and these are {num_models}: {remedy}")
    if needs_base(method) and base_model is None:
        raise UserError(f"--method {method}: needs --base_model, the model that those of --models started from")
    if base_model is not None and not needs_base(method):
        remedy = "drop it, name it among --models, or use task_arithmetic or ties"
        raise UserError(f"--base_model {base_model}: means nothing to --method {method}: {remedy}")
    if density is not None and method != "ties":
        raise UserError(f"--density {density}: means nothing to --method {method}: drop it, or use --method ties")
    if density is not None and not 0 < density <= 1:
        raise UserError(f"--density {density}: use a share above 0, up to 1")


def needs_base(method: str) -> bool:
    """Whether a method works on the differences to a base."""
    return method in ("task_arithmetic", "ties")


def check_weights(models: Sequence[str], weights: Sequence[float], method: str) -> None:
    """Refuse weights that are not one a model, or not such as the method takes."""
    what = f"weights {joined(weights)} for the models {joined(models)}"
    if len(weights) != len(models):
        raise UserError(f"{what}: give one a model ({len(models)})")
    total = math.fsum(weights) if all(map(math.isfinite, weights)) else math.nan
    if method == "task_arithmetic" and math.isnan(total):
        raise UserError(f"{what}: use finite numbers")
    if method != "task_arithmetic" and not abs(total - 1) <= 1e-3:
        raise UserError(f"{what}: they sum to {total:g}; make it 1")
    if method == "ties" and min(weights) < 0:
        raise UserError(f"{what}: --method ties takes none below 0")


def joined(values: Iterable[Any]) -> str:
    """The first five, with commas."""
    shown = [str(value) for value in values]
    return ", ".join(shown[:5]) + ", ..." * (len(shown) > 5)


@dataclass(frozen=True)
class Trial:
    """One average that was scored: the places of its models, the score, whether the soup became it."""

    members: tuple[int, ...]
    score: float
    kept: bool


def greedy_soup(models: Sequence[Model], score: Callable[[Sequence[Model]], float]) -> tuple[list[int], list[Trial]]:
    """Which models to average: the best one, and in decreasing order each that does not lower the average's score.

    Args:
        models: M, at least one.
        score: of the uniform average of some of them, larger is better; called 2 M - 1 times.

    Returns:
        The places of the models chosen, in the order in which they were taken; every trial in order: first each model
        alone, the best first (equal ones as given), then each average that was tried.

    Source: Wortsman et al. 2022, "Model soups", recipe 1.
    """
    own = [score([model]) for model in models]
    order = sorted(range(len(models)), key=own.__getitem__, reverse=True)
    chosen, best = order[:1], own[order[0]]
    trials = [Trial((place,), own[place], place == order[0]) for place in order]
    for place in order[1:]:
        members = [*chosen, place]
        value = score([models[member] for member in members])
        trials.append(Trial(tuple(members), value, value >= best))
        if value >= best:
            chosen, best = members, value
    return chosen, trials
