"""Does a model compute the same on a packed row as on single texts?"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bge_core.encoder import packing
from bge_core.encoder.rectangles import relative_error
from bge_core.encoder.tokens import Tokens
from bge_core.runtime.flags import Attention

logger = logging.getLogger(__name__)
PACKING_BOUND = 1e-4  # of the largest entry, value or gradient, in float32


def packed_or_padded(name: str | Path, backbone: Any, attention: Attention) -> Attention:
    """`attention` if the model computes the same on a packed row as on single texts, else "padded", with a warning."""
    error = packing_error(backbone)
    if error < (PACKING_BOUND if next(backbone.parameters()).dtype.itemsize >= 4 else 0.03):
        return attention
    logger.warning(
        "%s: on texts in one row a %s computes otherwise than on single ones (by %.2g of the largest value): "
        "batches are padded",
        name,
        type(backbone).__name__,
        error,
    )
    return "padded"


def packing_error(backbone: Any) -> float:
    """How far a model run on one row is from the same model run on each text alone, as transformers does it.

    In eval mode, on texts of 1 token, 3 tokens, more than every window of the config, and the longest, in two orders,
    and for the first tokens alone; token vectors and gradients of the first layer. The first layers of each kind of
    attention stand for all.

    Returns:
        The largest difference relative to the largest entry; infinity where the model does not run like that.
    """
    windows = [w for w in _config_values(backbone.config, ("sliding_window", "local_attention")) if w]
    longest = min(packing.max_length(backbone), 8192)
    lengths = list(dict.fromkeys(min(n, longest) for n in (1, 3, 3 + max(windows, default=60), longest)))
    generator = torch.Generator().manual_seed(0)
    device = next(backbone.parameters()).device
    ids = [torch.randint(10, backbone.config.vocab_size, (n,), generator=generator).to(device) for n in lengths]
    was_training, stock = backbone.training, backbone.config._attn_implementation
    with torch.inference_mode(False), torch.enable_grad(), _first_layers(backbone) as layer:
        inputs = [p for p in layer.parameters() if p.requires_grad and p.dim() > 1]
        try:
            backbone.eval()
            alone = [backbone(input_ids=text[None]).last_hidden_state[0] for text in ids]
            weights = [torch.randn(h.shape, generator=generator).to(h) for h in alone]
            packing.enable(backbone)
            error = 0.0
            for step, first_only in ((1, False), (-1, False), (-1, packing.has_bert_layers(backbone))):
                tokens = Tokens(torch.cat(ids[::step]), [len(text) for text in ids[::step]])
                vectors, num_vectors, order = packing.packed_hidden(backbone, tokens, first_only=first_only)
                parts = dict(zip(order, vectors.split(num_vectors), strict=True))
                packed = [parts[i] for i in range(len(ids))][::step]
                got, want = (
                    _value_and_gradient([h[:1] if first_only else h for h in hidden], weights, inputs)
                    for hidden in (packed, alone)
                )
                error = max(error, *(relative_error(a, b) for a, b in zip(got, want, strict=True)))
            return error
        except Exception as problem:  # another author's model: it may raise anything
            logger.debug("packing failed: %r", problem)
            return math.inf
        finally:
            backbone.config._attn_implementation = stock
            backbone.train(was_training)


def _value_and_gradient(vectors: list[Tensor], weights: list[Tensor], inputs: list[nn.Parameter]) -> list[Tensor]:
    loss = sum((vector * weight[: len(vector)]).sum() for vector, weight in zip(vectors, weights, strict=True))
    gradients = torch.autograd.grad(loss, inputs, retain_graph=True)  # type: ignore[arg-type]
    return [*(vector.detach() for vector in vectors), *gradients]


def _config_values(config: Any, names: Sequence[str]) -> list[int]:
    return [value for name in names if isinstance(value := getattr(config, name, None), int)]


@contextmanager
def _first_layers(backbone: Any) -> Iterator[nn.Module]:
    """For a while the model has only as many layers as show each kind of attention; the first of them is given."""
    layers = packing.layers_of(backbone)
    kinds = list(getattr(backbone.config, "layer_types", None) or ["full_attention"])
    left_out = layers[1 + max(kinds.index(kind) for kind in set(kinds)) :]
    if left_out:
        del layers[-len(left_out) :]
    try:
        yield layers[0] if layers else backbone
    finally:
        layers.extend(left_out)
