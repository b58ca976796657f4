"""Global batches of token lists, as ranks' `Batch`es and as the slow float64 truth of their loss and gradient.

A row names its texts by number, the same number being the same text; what `bge_core.training.data` would make of them is
written out here by hand, and so is the encoder: one text at a time, without padding.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import reference
import torch
from torch import Tensor

from bge_core.encoder.load import load_encoder
from bge_core.encoder.model import Encoder
from bge_core.encoder.tokens import Tokens
from bge_core.loss import LossConfig
from bge_core.training.batch import Batch

MODES: dict[str, dict[str, Any]] = {
    "info_nce": {},
    "keep_positives": {"exclude_positives": False},
    "no_in_batch": {"in_batch_negatives": False},
    "kl_div": {"distillation": "kl_div"},
    "m3_kd_loss": {"distillation": "m3_kd_loss"},
    "mrl": {"mrl_dims": (8, 16, 32)},
}
EXAMPLES: dict[str, dict[str, float]] = {
    "siglip": {"bias": -25.0},
    "gte": {},
    "gist": {},
    "margin_mse": {},
    "spread_out": {"weight": 20.0},  # as large as InfoNCE, which alone would hide an error of it
}
"""The losses of examples/losses and the `args` they are run with; their truth is `reference.<name>_loss`."""
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class TextRow:
    """One training example: its texts by number, the positive first; other known positives; teacher scores."""

    number: int
    query: int
    passages: tuple[int, ...]
    other_positives: tuple[int, ...]
    teacher: tuple[float, ...]

    @property
    def known(self) -> list[int]:
        """Ids that are never a negative of this row."""
        return [text_id_of(text) for text in (self.passages[0], *self.other_positives, self.query)]


def text_id_of(text: int) -> int:
    """An id as wide as real ones: neighbours that float64 would confuse."""
    return 2**62 + text


@cache
def tokens_of(text: int) -> tuple[int, ...]:
    """[CLS], 1 to 18 tokens, [SEP]: the same for the same number."""
    rng = random.Random(text)
    return (2, *(rng.randrange(5, 500) for _ in range(rng.choice((1, 2, 3, 5, 9, 18)))), 3)


def make_rows(seed: int, group_sizes: Sequence[int], texts: Sequence[int] = range(10_000)) -> tuple[TextRow, ...]:
    """Rows of 1 positive and group_size - 1 negatives, among them positives and queries of other rows."""
    rng = random.Random(seed)
    fresh = iter(rng.sample(texts, 1000))
    queries, positives = [[next(fresh) for _ in group_sizes] for _ in range(2)]
    if len(group_sizes) > 2:
        positives[2] = positives[0]  # two rows with the same answer
    rows = []
    for i, size in enumerate(group_sizes):
        others = [j for j in range(len(group_sizes)) if j != i]
        negatives = [next(fresh) for _ in range(size - 1)]
        if others and negatives:  # another row's positive, or the text of its question
            other = rng.choice(others)
            negatives[0] = (positives[other], queries[other], negatives[0])[i % 3]
        teacher = tuple(rng.gauss(0, 1) for _ in range(size))
        rows.append(TextRow(i, queries[i], (positives[i], *negatives), (next(fresh),) * (i % 2), teacher))
    return tuple(rows)


def rank_batch(rows: Sequence[TextRow], of_ranks: Sequence[Sequence[TextRow]] | None = None, *, teacher: bool) -> Batch:
    """One rank's micro-batch, as `TrainingData.collate` makes it; `of_ranks`: the rows of every rank (default: one)."""
    queries = [row.query for row in rows]
    passages = [text for row in rows for text in row.passages]
    most_passages = max((len(row.passages) for row in rows), default=0)
    most_known = max((len(row.known) for row in rows), default=0)
    own, column = [], 0
    for row in rows:
        own.append([*range(column, column + len(row.passages)), *[-1] * (most_passages - len(row.passages))])
        column += len(row.passages)
    known = [[*row.known, *[-1] * (most_known - len(row.known))] for row in rows]
    scores = [[*row.teacher, *[0.0] * (most_passages - len(row.teacher))] for row in rows]
    return Batch(
        tokens=Tokens.from_lists([tokens_of(text) for text in (*queries, *passages)]),
        own_BG=torch.tensor(own, dtype=torch.int64).reshape(len(rows), most_passages),
        passage_id_R=torch.tensor([text_id_of(text) for text in passages], dtype=torch.int64),
        excluded_BX=torch.tensor(known, dtype=torch.int64).reshape(len(rows), most_known),
        teacher_BG=torch.tensor(scores, dtype=torch.float64).reshape(len(rows), most_passages) if teacher else None,
        rank_counts=[(len(part), sum(len(row.passages) for row in part)) for part in of_ranks or [rows]],
        rows=[row.number for row in rows],
    )


def load(folder: Path | str, dtype: torch.dtype, **options: Any) -> Encoder:
    """The encoder in training mode, with what gets no gradient frozen."""
    encoder = load_encoder(folder, dtype=dtype, **options)
    encoder.freeze()
    return encoder.train()


def gradients_of(encoder: Encoder) -> Gradients:
    """A copy of every trainable parameter's gradient; the parameters' own are cleared."""
    found = {}
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            found[name] = parameter.grad.clone()
    encoder.zero_grad(set_to_none=True)
    return found


def encode_one(encoder: Encoder, text: int) -> Tensor:
    """The unit CLS vector of one text, without padding, mask or batch."""
    hidden_LD = encoder.backbone(input_ids=torch.tensor([tokens_of(text)])).last_hidden_state[0]
    vector_D = behind_pooling(encoder, hidden_LD[0])
    return vector_D / vector_D.dot(vector_D).sqrt()


def behind_pooling(encoder: Encoder, vector_D: Tensor) -> Tensor:
    """What the Dense modules make of a vector, by their formula: tanh(W x + b) or W x, and + x or + R x."""
    weights = dict(encoder.dense.named_parameters())
    for i, stated in enumerate(encoder.settings.dense):
        product = weights[f"{i}.linear.weight"] @ vector_D + weights.get(f"{i}.linear.bias", 0)
        product = product.tanh() if stated.activation.endswith("Tanh") else product
        residual = weights[f"{i}.residual.weight"] @ vector_D if f"{i}.residual.weight" in weights else vector_D
        vector_D = product + residual if stated.residual else product
    return vector_D


def true_gradients(
    folder: Path,
    pools: Sequence[Sequence[TextRow]],
    mode: str,
    temperature: float = LossConfig.temperature,
    guide_folder: Path | None = None,
) -> tuple[float, Gradients]:
    """Loss and gradient in float64 of the mean over all rows of all pools.

    Args:
        folder: the model, with dropout 0.
        pools: rows whose passages are each other's candidates: a micro-batch of all ranks, or of one rank alone.
        mode: of MODES or of EXAMPLES.
        temperature: of the loss.
        guide_folder: the frozen guide of "gist".
    """
    encoder = load(folder, torch.float64)
    num_rows = sum(map(len, pools))
    total = torch.zeros((), dtype=torch.float64)
    for pool in (pool for pool in pools if pool):
        passages = [text for row in pool for text in row.passages]
        rows, start = [], 0
        for row in pool:
            own = list(range(start, start + len(row.passages)))
            rows.append(reference.Row(own, frozenset(row.known), list(row.teacher)))
            start += len(own)
        queries = torch.stack([encode_one(encoder, row.query) for row in pool])
        candidates = torch.stack([encode_one(encoder, text) for text in passages])
        ids = [text_id_of(text) for text in passages]
        if mode == "siglip":
            loss = reference.siglip_loss(queries, (candidates, ids), rows, scale=1 / temperature, **EXAMPLES[mode])
        elif mode in ("gte", "margin_mse", "spread_out"):
            slow_loss = getattr(reference, f"{mode}_loss")
            loss = slow_loss(queries, (candidates, ids), rows, temperature=temperature, **EXAMPLES[mode])
        elif mode == "gist":
            guide = load(guide_folder, torch.float64)
            with torch.no_grad():
                seen = [
                    [encode_one(guide, text) for text in texts] for texts in ([row.query for row in pool], passages)
                ]
            loss = reference.gist_loss(queries, (candidates, ids), rows, guide=seen, temperature=temperature)
        else:
            loss = reference.reference_loss(queries, (candidates, ids), rows, temperature=temperature, **MODES[mode])
        total = total + loss * len(pool) / num_rows
    total.backward()
    return total.item(), gradients_of(encoder)


def gradient_error(got: Gradients, want: Gradients) -> tuple[float, str]:
    """The largest error of a parameter's gradient, as a share of the norm of the whole gradient, and its parameter."""
    norm = sum(float(g.double().pow(2).sum()) for g in want.values()) ** 0.5
    assert got.keys() == want.keys()
    assert norm > 0
    errors = {name: float((got[name].double() - want[name].double()).norm()) / norm for name in want}
    return max((math.inf if math.isnan(error) else error, name) for name, error in errors.items())


def assert_same_gradients(got: Gradients, want: Gradients, rtol: float) -> None:
    """Every parameter's gradient, to `rtol` of the norm of the whole gradient."""
    error, worst = gradient_error(got, want)
    assert error <= rtol, f"{worst}: off by {error:.2e} of the whole gradient's norm"
