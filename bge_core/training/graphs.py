"""An encoder in training whose passes are held as graphs (encoder/graphs.py): to the step it is a model like others.

    chunk -> forward of its bucket -> vectors -> any loss -> backward of its bucket -> one flat gradient

To autograd a bucket's forward and backward are a single node, `_Pass`.
"""

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn

from bge_core.encoder.fixed import Chunk, FixedRow
from bge_core.encoder.graphs import Bucket, Buckets, Capture, in_half
from bge_core.encoder.kernels import first_line
from bge_core.encoder.model import Encoder, compile_layers
from bge_core.encoder.packing import layers_of
from bge_core.runtime.distributed import FlatGradients

logger = logging.getLogger(__name__)


class GraphedEncoder(FlatGradients):
    """An encoder in training whose passes over rows of fixed shape are held.

    The passes run on a working copy: weights and biases of linear layers rounded to `half` once an update, as autocast
    would round them in every pass; all else is the encoder's own.

    Args:
        encoder: on its device, in training mode; its weights stay where they are.
        half: the precision of autocast; None: there is none.
        working_copy: False: autocast rounds in every pass.
        compiled: layers are compiled.
    """

    def __init__(
        self, encoder: Encoder, half: torch.dtype | None, *, working_copy: bool = True, compiled: bool = False
    ) -> None:
        super().__init__(encoder)
        work, self.copies = _working_copy(encoder, half if working_copy else None)
        if compiled:
            compile_layers(work.backbone, fixed=True)
        weights = [weight for weight in work.parameters() if weight.requires_grad]
        vectors, capture, sums = in_half(work, half), Capture(encoder.device), self.views

        def make(row: FixedRow) -> Bucket:
            bucket = Bucket(vectors, row, capture, weights, sums)
            if compiled:
                _compile_or_not(work.backbone, bucket)
            return bucket

        self.buckets = Buckets(make)
        self.anchor = torch.zeros((), requires_grad=True)  # lets autograd call `_Pass.backward`

    def forward(self, chunk: Chunk) -> Tensor:
        """As the encoder's."""
        if self.begin_step() and self.copies[0]:
            torch._foreach_copy_(*self.copies)
        if not isinstance(chunk, FixedRow):
            return self.module(chunk)  # type: ignore[no-any-return]
        bucket = self.buckets.of(chunk)
        assert bucket is not None
        if not torch.is_grad_enabled():
            return bucket.represent(chunk)[chunk.place_S]
        vector_ND: Tensor = _Pass.apply(self.anchor, bucket, chunk)  # type: ignore[no-untyped-call]
        return vector_ND[chunk.place_S]


class _Pass(torch.autograd.Function):
    """A bucket's forward and backward as one node."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, bucket: Bucket, row: FixedRow) -> Tensor:
        ctx.bucket = bucket
        return bucket.forward(row)

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        ctx.bucket.backward(gradient_ND)
        return None, None, None


def _compile_or_not(backbone: Any, bucket: Bucket) -> None:
    """Compile the layers for a bucket; where they cannot be, say so once and let them run as they are from then on."""
    layers = [layer for layer in layers_of(backbone) if layer._compiled_call_impl is not None]
    try:
        if layers:
            bucket.capture.rehearse(bucket.rehearse)
    except Exception as problem:  # of a compiler
        logger.warning("--torch_compile: these layers cannot be compiled, going on without: %s", first_line(problem))
        for layer in layers:
            layer._compiled_call_impl = None


def _working_copy(encoder: Encoder, half: torch.dtype | None) -> tuple[Encoder, tuple[list[Tensor], list[Tensor]]]:
    """The same encoder with its linear layers in `half`, and (their weights there, and in the encoder)."""
    linear = {
        id(weight): weight
        for module in encoder.modules()
        if isinstance(module, nn.Linear)
        for weight in module.parameters(recurse=False)
    }
    kept: dict[int, Any] = {id(encoder.tokenizer): encoder.tokenizer}
    for weight in encoder.parameters():
        is_rounded = half is not None and id(weight) in linear
        kept[id(weight)] = nn.Parameter(weight.detach().to(half), weight.requires_grad) if is_rounded else weight
    rounded = [weight for key, weight in linear.items() if kept[key] is not weight]
    return copy.deepcopy(encoder, kept), (
        [kept[id(weight)].detach() for weight in rounded],
        [w.detach() for w in rounded],
    )
