"""Attention over the texts of one row as an operator: what a compiled layer or a CUDA graph can hold.

    o_i = sum_j a_ij v_j        a_i = softmax over j of scale * <q_i, k_j>,  j in the text of i (and in its window)

Where texts begin is a tensor on the device, so nothing that depends on the data reaches Python, and an operator with
rules of its own for shapes and for the gradient is no break in a graph. On a CPU it is the formula written out, every
token against every other: the truth for tests, and not for work (rectangles.py). On CUDA it is flash attention:

    torch       torch's own, compiled into it
    flash_attn  the package flash-attn, where it is installed

Which of them is taken, and whether it computes what it should: kernels.py.

Shapes: Q queries and T keys of N texts, H heads (keys and values may have fewer: grouped queries), d size of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bge_core.encoder.rectangles import Rule


@torch.library.custom_op("bge_core::varlen", mutates_args=(), device_types="cpu")
def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_query: Tensor,
    cu_key: Tensor,
    longest_query: int,
    longest_key: int,
    scale: float,
    causal: bool,
    window: int,
    dropout: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum above for every query.

    Args:
        query, key, value: (Q, H, d), (T, H, d), (T, H, d); with ones before, as transformers' (1, T, H, d), so that no
            view is an operation of its own, nor its gradient.
        cu_query, cu_key: (N + 1,) int32, where the queries and keys of each text begin, and Q or T. The two differ only
            without `causal` and `window`.
        longest_query, longest_key: at least the longest text.
        scale, causal, window, dropout: as `Rule`; window -1 for none.
        kernel: see above; a CPU does not read it.

    Returns:
        As query; the logarithm of each softmax's denominator, (H, Q), and the random state (2,), for the backward.
    """
    shape, (query, key, value) = query.shape, _rows(query, key, value)
    weight_HQT, lse_HQ = _weights(query, key, cu_query, cu_key, scale, causal, window)
    state = torch.zeros(2, dtype=torch.uint64)
    if dropout:
        state = torch.randint(1 << 62, (2,)).to(torch.uint64)
        weight_HQT = weight_HQT * _kept(weight_HQT, dropout, state)
    out_QHd = torch.einsum("hij,jhd->ihd", weight_HQT, _for_all_heads(value, query))
    return out_QHd.contiguous().view(shape), lse_HQ, state


@torch.library.custom_op("bge_core::varlen_backward", mutates_args=(), device_types="cpu")
def varlen_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Tensor,
    cu_query: Tensor,
    cu_key: Tensor,
    longest_query: int,
    longest_key: int,
    scale: float,
    causal: bool,
    window: int,
    dropout: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, from that of `varlen`'s first result."""
    shapes, (gradient, query, key, value) = (query.shape, key.shape, value.shape), _rows(gradient, query, key, value)
    groups = (key.shape[1], query.shape[1] // key.shape[1])
    weight_HQT, _ = _weights(query, key, cu_query, cu_key, scale, causal, window)
    kept = _kept(weight_HQT, dropout, state) if dropout else torch.ones_like(weight_HQT)
    of_value = torch.einsum("hij,ihd->jhd", weight_HQT * kept, gradient)
    of_weight = torch.einsum("ihd,jhd->hij", gradient, _for_all_heads(value, query)) * kept
    of_score = weight_HQT * (of_weight - (of_weight * weight_HQT).sum(-1, keepdim=True)) * scale
    of_query = torch.einsum("hij,jhd->ihd", of_score, _for_all_heads(key, query))
    of_key = torch.einsum("hij,ihd->jhd", of_score, query)
    of_key, of_value = (x.unflatten(1, groups).sum(2) for x in (of_key, of_value))
    return _shaped(shapes, of_query, of_key, of_value)


def _rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Without the ones before (rows, H, d)."""
    return tuple(x.flatten(0, -3) for x in tensors)


def _shaped(shapes: Sequence[torch.Size], *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse for three gradients."""
    of_query, of_key, of_value = (x.contiguous().view(shape) for x, shape in zip(tensors, shapes, strict=True))
    return of_query, of_key, of_value


def _weights(
    query: Tensor, key: Tensor, cu_query: Tensor, cu_key: Tensor, scale: float, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    """Softmax (H, Q, T) and the logarithm of its denominator (H, Q); 0 for tokens that are not seen."""
    text_Q, text_T = (
        torch.searchsorted(cu[1:].contiguous(), torch.arange(len(x), dtype=torch.int32), right=True)
        for cu, x in ((cu_query, query), (cu_key, key))
    )
    distance_QT = torch.arange(len(query))[:, None] - torch.arange(len(key))
    seen_QT = text_Q[:, None] == text_T
    if causal:
        seen_QT &= distance_QT >= 0
    if window >= 0:
        seen_QT &= distance_QT.abs() <= window
    score_HQT = torch.einsum("ihd,jhd->hij", query, _for_all_heads(key, query)) * scale
    score_HQT = score_HQT.masked_fill(~seen_QT, -torch.inf)
    return score_HQT.softmax(-1), score_HQT.logsumexp(-1)


def _for_all_heads(x: Tensor, query: Tensor) -> Tensor:
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def _kept(weight_HQT: Tensor, dropout: float, state: Tensor) -> Tensor:
    """0 for what is dropped, 1 / (1 - dropout) for the rest."""
    generator = torch.Generator().manual_seed(int(state[0]))
    drawn = torch.rand(weight_HQT.shape, generator=generator, dtype=torch.float32)
    return (drawn >= dropout).to(weight_HQT.dtype) / (1 - dropout)


@varlen.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    like_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    dtype = torch.promote_types(query.dtype, torch.float32)
    return (
        like_query,
        query.new_empty((query.shape[-2], query.shape[-3]), dtype=dtype),
        query.new_empty(2, dtype=torch.uint64),
    )


@varlen_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    of_query, of_key, of_value = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    )
    return of_query, of_key, of_value


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, cu_query, cu_key, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, *output, cu_query, cu_key)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of what has none, no zeros are made


def _backward(ctx: Any, gradient: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    of_inputs = varlen_backward(gradient.contiguous(), *ctx.saved_tensors, *ctx.options)
    return (*of_inputs, *[None] * (2 + len(ctx.options)))


varlen.register_autograd(_backward, setup_context=_save)


def _sides(scale: float, causal: bool, window: int) -> tuple[int, int, bool]:
    """The window as flash attention takes it, and its own causality: with a window it is the window that is cut off."""
    before, after = Rule(scale, causal, None if window < 0 else window).sides
    return before, after, (before, after) == (-1, 0)


@varlen.register_kernel("cuda")
def _(query: Tensor, key: Tensor, value: Tensor, *told: Any) -> tuple[Tensor, Tensor, Tensor]:
    *texts, scale, causal, window, dropout, kernel = told
    before, after, is_causal = _sides(scale, causal, window)
    shape, of_texts = query.shape, (*_rows(query, key, value), *texts)
    if kernel == "flash_attn":
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward as flash

        out, lse, _, state = flash(
            *of_texts, dropout, scale, causal=is_causal, window_size_left=before, window_size_right=after
        )
    else:
        out, lse, state, *_ = torch.ops.aten._flash_attention_forward(
            *of_texts, dropout, is_causal, False, scale=scale, window_size_left=before, window_size_right=after
        )
    # Without dropout there is no state, and what stands for it differs between versions.
    state = state.view(torch.uint64) if dropout else query.new_empty(2, dtype=torch.uint64)
    return out.contiguous().view(shape), lse, state  # a kernel's output lies as its queries do


@varlen_backward.register_kernel("cuda")
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, state: Tensor, *told: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *texts, scale, causal, window, dropout, kernel = told
    before, after, is_causal = _sides(scale, causal, window)
    of_texts = (*texts, dropout)
    shapes, rows = (query.shape, key.shape, value.shape), _rows(gradient, query, key, value, out)
    if kernel == "flash_attn":
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward as flash

        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in rows[1:4]]
        flash(
            *(*rows, lse, *gradients, *of_texts, scale, is_causal, before, after),
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            rng_state=state.view(torch.int64) if dropout else None,
        )
    else:
        gradients = torch.ops.aten._flash_attention_backward(
            *(*rows, lse, *of_texts, is_causal, state, query.new_empty(0)),
            scale=scale,
            window_size_left=before,
            window_size_right=after,
        )
    return _shaped(shapes, *gradients)
