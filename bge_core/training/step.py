"""One optimizer step's gradient: plain or cached (GradCache), one contract.

    forward_backward(model, micro_batches, ...) adds to every parameter's .grad exactly

        d/dtheta  1/M sum_i l_i        over the M rows of all micro-batches and all ranks,

whatever the number of ranks, the micro-batches' sizes or the chunk size. DDP and FSDP average over the W ranks, so each
rank scales the mean over its B rows by W * B / M. Within a micro-batch the passages of all ranks are candidates
(cross-device negatives); micro-batches stay apart.

GradCache (Gao et al. 2021, section 3), per micro-batch:
    1. represent   encode every chunk without a graph, remembering the random state before each
    2. loss        on the representations alone, giving d loss / d representation
    3. replay      encode every chunk again, with a graph, from the remembered random state (same dropout)
    4. backward    from the representations' gradients, chunk by chunk; the ranks average once, on the last chunk

Shapes: B queries and R passages of this rank's micro-batch, S = B + R texts, D embedding size.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bge_core.encoder.fixed import Chunk
from bge_core.encoder.tokens import Tokens
from bge_core.loss import LossConfig, LossInput, LossOutput, training_loss
from bge_core.runtime.distributed import (
    gather_counts,
    gather_rows,
    is_sharded,
    sum_over_ranks,
    sync_only_if,
    unwrap,
    world,
)
from bge_core.training.batch import Batch
from bge_core.training.random_state import random_state, restore_random_state

LossFunction = Callable[[LossInput, LossConfig], LossOutput]


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed.

    Args:
        loss, loss_config: what is learned.
        cross_device: passages of every rank are candidates.
        chunk_size, max_tokens: texts and tokens encoded at a time with GradCache; both None: all, graph kept.
        scaler: loss scaling for fp16; a disabled one otherwise.
        autocast: makes the context in which the model runs.
        guide: a frozen encoder whose vectors the loss sees, too.
    """

    loss: LossFunction = training_loss
    loss_config: LossConfig = field(default_factory=LossConfig)
    cross_device: bool = False
    chunk_size: int | None = None
    max_tokens: int | None = None
    scaler: Any = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    guide: nn.Module | None = None

    @property
    def plain(self) -> bool:
        """Everything at once, without GradCache."""
        return self.chunk_size is None and self.max_tokens is None


def forward_backward(model: nn.Module, micro_batches: Sequence[Batch], settings: StepSettings) -> dict[str, Tensor]:
    """Add the gradient of one optimizer step to the parameters' .grad (times the scaler's scale).

    Args:
        model: an Encoder, or what `distributed.wrap` made of it.
        micro_batches: this rank's; every rank has equally many.
        settings: see there.

    Returns:
        This rank's share of the loss ("loss") and of each metric: summed over ranks, the means over all M rows.
    """
    device = next(model.parameters()).device
    num_total_rows = sum(batch.num_global_rows for batch in micro_batches)
    shares: dict[str, Tensor] = {}
    for k, batch in enumerate(micro_batches):
        share = batch.num_queries / num_total_rows
        chunks: list[Chunk] = [*(batch.chunks or batch.tokens.split(settings.chunk_size, settings.max_tokens))]
        if is_sharded(model):
            chunks += [Tokens(torch.empty(0, dtype=torch.int64), [])] * _missing_chunks(len(chunks), device)
        is_last = k == len(micro_batches) - 1
        if settings.plain:
            output = _plain(model, chunks[0], batch, share, settings, is_last)
        else:
            output = _cached(model, chunks, batch, share, settings, is_last)
        for name, value in {"loss": output.loss.detach(), **output.metrics}.items():
            counted = value * share if batch.num_queries else torch.zeros_like(value)  # the mean of no rows is NaN
            shares[name] = shares[name] + counted if name in shares else counted
    return shares


def sum_figures(shares: Mapping[str, Tensor], norm: Tensor, counts: Mapping[str, float]) -> dict[str, Tensor]:
    """What is told of a step, over all ranks: one copy to the device, one collective, no wait.

    Args:
        shares: what `forward_backward` returned: scalars.
        norm: the gradient's, on the device, the same on every rank.
        counts: this rank's numbers, to be summed, too.

    Returns:
        float32 scalars on the device: the means of the shares, "grad_norm", the sums of the counts.
    """
    device = norm.device
    mine = {**shares, "grad_norm": norm / world()[1]}  # so that its sum is the norm
    counted = torch.tensor([*counts.values()], dtype=torch.float32, pin_memory=device.type == "cuda")
    values = torch.stack([value.to(device, torch.float32) for value in mine.values()])
    summed = sum_over_ranks(torch.cat([values, counted.to(device, non_blocking=True)]))
    return dict(zip([*mine, *counts], summed.unbind(), strict=True))


def warm_up_ddp(model: nn.Module) -> None:
    """Two throw-away passes: DDP orders its buckets anew after the first, which changes sums in the last bit.

    Done at every start, they leave the first real step the same order in a fresh and in a resumed run.
    """
    for _ in range(2 if world()[1] > 1 else 0):
        model(Tokens(torch.zeros(1, dtype=torch.int64), [1])).sum().backward()
        model.zero_grad(set_to_none=True)


def _missing_chunks(num_chunks: int, device: torch.device) -> int:
    """How many empty ones a rank adds: where weights lie in shards, every rank has to run the layers equally often."""
    (counts,) = gather_counts(num_chunks, device=device)
    return max(counts) - num_chunks


def _plain(
    model: nn.Module, chunk: Chunk, batch: Batch, share: float, settings: StepSettings, is_last: bool
) -> LossOutput:
    with sync_only_if(is_last, model):
        with settings.autocast():
            vector_SD = model(chunk)
        return _backward_loss(vector_SD, batch, share, settings)


def _cached(
    model: nn.Module, chunks: list[Chunk], batch: Batch, share: float, settings: StepSettings, is_last: bool
) -> LossOutput:
    states, parts = [], []
    for chunk in chunks:  # 1. represent
        states.append(random_state())
        with torch.no_grad(), settings.autocast():
            parts.append(unwrap(model)(chunk))
    vector_SD = torch.cat(parts).requires_grad_()
    output = _backward_loss(vector_SD, batch, share, settings)  # 2. loss
    assert vector_SD.grad is not None
    gradients = vector_SD.grad.split([len(chunk) for chunk in chunks])
    for i, (chunk, gradient, state) in enumerate(zip(chunks, gradients, states, strict=True)):
        with sync_only_if(is_last and i == len(chunks) - 1, model):
            restore_random_state(state)
            with settings.autocast():
                vector_sD = model(chunk)  # 3. replay
            vector_sD.backward(gradient)  # 4. backward
    return output


def _backward_loss(vector_SD: Tensor, batch: Batch, share: float, settings: StepSettings) -> LossOutput:
    """The loss on representations, in float32 or wider, and its backward scaled for the average over ranks."""
    guide_SE = guide_vectors(batch, settings)
    with torch.autocast(vector_SD.device.type, enabled=False):
        output = settings.loss(loss_input(vector_SD, batch, settings.cross_device, guide_SE), settings.loss_config)
        settings.scaler.scale(output.loss * (share * world()[1])).backward()
    return output


@torch.no_grad()
def guide_vectors(batch: Batch, settings: StepSettings) -> Tensor | None:
    """The guide's vectors (S, E) of a micro-batch, `chunk_size` texts at a time; None without a guide."""
    if settings.guide is None:
        return None
    assert batch.guide_tokens is not None
    chunks = batch.guide_chunks or batch.guide_tokens.split(settings.chunk_size, settings.max_tokens)
    with settings.autocast():
        return torch.cat([settings.guide(chunk) for chunk in chunks])


def loss_input(vector_SD: Tensor, batch: Batch, cross_device: bool, guide_SE: Tensor | None = None) -> LossInput:
    """What the loss sees: this rank's queries, and the passages of all ranks (or of this one alone)."""
    device = vector_SD.device
    query_BD, passage_RD = vector_SD.split([batch.num_queries, len(vector_SD) - batch.num_queries])
    own_BG, passage_id_R = batch.own_BG.to(device), batch.passage_id_R.to(device)
    all_query_MD, row_offset = query_BD, 0
    candidate_ND, candidate_id_N = passage_RD, passage_id_R
    guide_query_BE = None if guide_SE is None else guide_SE[: len(query_BD)]
    guide_candidate_NE = None if guide_SE is None else guide_SE[len(query_BD) :]
    rank, world_size = world()
    if cross_device and world_size > 1:
        query_counts, passage_counts = map(list, zip(*batch.rank_counts, strict=True))
        all_query_MD = gather_rows(query_BD, query_counts)
        candidate_ND = gather_rows(passage_RD, passage_counts)
        candidate_id_N = gather_rows(passage_id_R, passage_counts)
        if guide_candidate_NE is not None:
            guide_candidate_NE = gather_rows(guide_candidate_NE, passage_counts)
        row_offset = sum(query_counts[:rank])
        own_BG = torch.where(own_BG >= 0, own_BG + sum(passage_counts[:rank]), -1)
    return LossInput(
        query_BD=query_BD,
        all_query_MD=all_query_MD,
        row_offset=row_offset,
        candidate_ND=candidate_ND,
        positive_B=own_BG[:, 0] if len(own_BG) else own_BG.new_empty(0),
        own_BG=own_BG,
        candidate_id_N=candidate_id_N,
        excluded_BX=batch.excluded_BX.to(device),
        teacher_BG=None if batch.teacher_BG is None else batch.teacher_BG.to(device, vector_SD.dtype),
        guide_query_BE=guide_query_BE,
        guide_candidate_NE=guide_candidate_NE,
        own_only_B=None if batch.own_only_B is None else batch.own_only_B.to(device),
    )
