"""Texts as the model takes them: all tokens of a batch in one row, without padding.

A batch of S texts is one vector of their T tokens, each text's positions counted from its own start:

    input_id_T    [ 101 102 | 101 2769 102 | 101 791 102 | 101 791 1921 102 ]      lengths  [2, 3, 3, 4]
    position_T    [   0   1 |   0    1   2 |   0   1   2 |   0   1    2   3 ]      cu_seqlens  [0, 2, 5, 8, 12]

Embeddings, linear layers, norms and activations work on single tokens, so they need not know where a text ends: the row
goes through a stock transformers model as a batch of one. Attention alone mixes tokens,

    o_i = sum_j a_ij v_j        a_i = softmax over j of scale * <q_i, k_j>,  j in the text of i (and in its window)

and it is the one place where transformers lets a caller in (`AttentionInterface`): `packed_attention` computes the sum
over each text's own tokens. The model's class, weights and files are untouched, and a batch costs its real tokens.

Kernels, the first that works here is taken (`usable_kernels`):
    varlen  torch's variable-length attention: CUDA, half precision, no dropout
    flash   the same of the package flash-attn, with dropout
    sdpa    torch's scaled_dot_product_attention on texts of equal length together: everywhere, everything
    flex    torch's flex_attention with a block mask: on request; no dropout

Shapes: T tokens of all texts, S texts, s texts of one length L, H heads, d size of a head, D hidden size.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bge_core.batch import Tokens
from bge_core.config import Attention
from bge_core.dropout import dropout

logger = logging.getLogger(__name__)

IMPLEMENTATION = "bge_packed"  # the name by which transformers finds `packed_attention`


# --- one row ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """How S texts lie in the row, as attention needs it: equal lengths side by side.

    Args:
        lengths: of the texts, in the order of the row.
        cu_seqlens: (S + 1,) int32, where each text begins, and T; on the device.
        attention: the kernel that is wished for, or "auto".
    """

    lengths: list[int]
    cu_seqlens: Tensor
    attention: Attention = "auto"

    @functools.cached_property
    def runs(self) -> list[tuple[int, int]]:
        """(length, number) of neighbours of equal length."""
        return [(length, len(list(texts))) for length, texts in groupby(self.lengths)]

    @functools.cached_property
    def text_T(self) -> Tensor:
        """The number of the text to which each token belongs, int64."""
        counts = self.cu_seqlens.diff().to(torch.int64)
        return torch.arange(len(self.lengths), device=counts.device).repeat_interleave(
            counts, output_size=sum(self.lengths)
        )


@dataclass(frozen=True)
class Rule:
    """Which tokens of its text a token sees, and how: what a layer says of its attention.

    Args:
        scale: of the inner products.
        causal: no later token.
        window: tokens at a distance above it are not seen; None: all are.
        dropout: of the weights.
    """

    scale: float
    causal: bool = False
    window: int | None = None
    dropout: float = 0.0

    def mask(self, length: int, device: torch.device) -> Tensor | None:
        """(L, L), True where row i sees column j; None where causality, or nothing, says it all."""
        if self.window is None or self.window >= length - 1:
            return None
        distance_LL = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
        near_LL = distance_LL.abs() <= self.window
        return near_LL & (distance_LL >= 0) if self.causal else near_LL

    @property
    def sides(self) -> tuple[int, int]:
        """The window as (tokens before, tokens after), -1 for all, as flash attention takes it."""
        before = -1 if self.window is None else self.window
        return before, 0 if self.causal else before


def enable(backbone: Any) -> None:
    """Let the model's attention be `packed_attention`; whoever calls the model otherwise still gets the stock one."""
    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    backbone.config._attn_implementation = IMPLEMENTATION


def packed_hidden(
    backbone: Any, tokens: Tokens, *, first_position: int = 0, attention: Attention = "auto", first_only: bool = False
) -> tuple[Tensor, list[int], list[int]]:
    """Run the backbone once on all texts in one row.

    Args:
        backbone: a transformers model after `enable`.
        tokens: at least one text.
        first_position: number of a text's first position (RoBERTa's is not 0).
        attention: the kernel that is wished for.
        first_only: only the first token's vector of each text is needed; others may be left out.

    Returns:
        Token vectors, texts by rising length; how many of each text there are (its length, or 1); the position in
        `tokens` of each text in that order.
    """
    order = sorted(range(len(tokens)), key=tokens.lengths.__getitem__)
    texts, device = tokens.texts(), tokens.input_id_T.device
    lengths = [tokens.lengths[i] for i in order]
    packed = Packed(lengths, _int32([0, *accumulate(lengths)], device), attention)
    start_T = packed.cu_seqlens[:-1].to(torch.int64)[packed.text_T]
    position_T = torch.arange(len(start_T), device=device) - start_T + first_position
    first_only = first_only and has_bert_layers(backbone)
    with _last_layer_on_first_tokens(backbone) if first_only else nullcontext():
        hidden_1TD = backbone(
            input_ids=torch.cat([texts[i] for i in order])[None],
            position_ids=position_T[None],
            # Four dimensions tell transformers that the mask is made: it makes none of T x T.
            attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device),
            packed=packed,
            **({"use_cache": False} if hasattr(backbone.config, "use_cache") else {}),
        ).last_hidden_state
    return hidden_1TD[0], [1] * len(lengths) if first_only else lengths, order


def _int32(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)


def has_bert_layers(backbone: Any) -> bool:
    """Whether the model's layers are BERT's, in whose last one work can be saved."""
    return backbone.config.model_type in ("bert", "roberta", "xlm-roberta") and not backbone.config.is_decoder


@contextmanager
def _last_layer_on_first_tokens(backbone: Any) -> Iterator[None]:
    """For one call, the last layer of a BERT gives the vectors (1, S, D) of the texts' first tokens alone.

    They need the keys and values of all tokens; queries, output projection, feed-forward network and norms take S rows
    instead of T. Of the layer's 12 D x D products for every token 2 are left.
    """
    layer = backbone.encoder.layer[-1]

    def forward(hidden_1TD: Tensor, *others: Any, packed: Packed, **more: Any) -> Tensor:
        own, first_1SD = layer.attention.self, hidden_1TD[:, packed.cu_seqlens[:-1]]
        vectors = own.query(first_1SD), own.key(hidden_1TD), own.value(hidden_1TD)
        query, key, value = (x[0].unflatten(-1, (-1, own.attention_head_size)).transpose(0, 1) for x in vectors)
        out_SHd = _sdpa(query, key, value, packed, Rule(own.scaling, dropout=own.dropout.p * own.training))
        return layer.feed_forward_chunk(layer.attention.output(out_SHd.flatten(1)[None], first_1SD))

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


@torch.compiler.disable  # its loop over lengths is another one in every batch
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    packed: Packed | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer over each text's own tokens; without `packed` that of stock transformers.

    Args:
        module: the layer's attention; its `is_causal` counts where the argument says nothing.
        query, key, value: (1, H, T, d); key and value may have fewer heads (grouped queries).
        attention_mask: not read, the texts' ends are in `packed`.
        sliding_window: in transformers' meaning, a token sees those nearer than it.
        others: whatever else the model tells its attention. What would change the result is refused.

    Returns:
        (1, T, H, d), None.

    Raises:
        NotImplementedError: the layer asks for capped logits, sinks or a bias by position.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if packed is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} asks for {name}")
    window = None if sliding_window is None else sliding_window - 1
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, causal, window, dropout)
    kernel = _choose_kernel(packed.attention, query, key, rule)
    return KERNELS[kernel](query[0], key[0], value[0], packed, rule)[None], None


# --- kernels: (H, T, d) each -> (T, H, d) -----------------------------------------------------------------------------


def _sdpa(query: Tensor, key: Tensor, value: Tensor, packed: Packed, rule: Rule) -> Tensor:
    """A call for all texts of one length: they lie side by side, so none is copied and none is padded.

    The queries may be those of the texts' first tokens alone: (H, S, d) -> (S, H, d).
    """
    sizes = [length * number for length, number in packed.runs]
    query_sizes = [number for _, number in packed.runs] if query.shape[1] == len(packed.lengths) else sizes
    parts = []
    for (length, number), *of_run in zip(
        packed.runs, query.split(query_sizes, 1), key.split(sizes, 1), value.split(sizes, 1), strict=True
    ):
        query_sHLd, key_sHLd, value_sHLd = (x.unflatten(1, (number, -1)).transpose(0, 1) for x in of_run)
        mask_LL = rule.mask(length, query.device)
        grouped = key.shape[0] != query.shape[0]
        if rule.dropout and not (rule.causal or grouped or mask_LL is not None):
            # What torch itself does with dropout on a CPU, but with faster random numbers.
            weight_sHLL = (query_sHLd @ (key_sHLd * rule.scale).mT).softmax(-1)
            out_sHLd = dropout(weight_sHLL, rule.dropout) @ value_sHLd
        else:
            out_sHLd = F.scaled_dot_product_attention(
                query_sHLd, key_sHLd, value_sHLd, mask_LL, rule.dropout, rule.causal and mask_LL is None,
                scale=rule.scale, enable_gqa=grouped,
            )  # fmt: skip
        parts.append(out_sHLd.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)


def _varlen(query: Tensor, key: Tensor, value: Tensor, packed: Packed, rule: Rule) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query_THd, key_THd, value_THd = (x.transpose(0, 1).contiguous() for x in (query, key, value))
    starts, longest = packed.cu_seqlens, max(packed.lengths)
    out = varlen_attn(
        query_THd, key_THd, value_THd, starts, starts, longest, longest, scale=rule.scale, window_size=rule.sides,
        enable_gqa=key.shape[0] != query.shape[0],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def _flash(query: Tensor, key: Tensor, value: Tensor, packed: Packed, rule: Rule) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    query_THd, key_THd, value_THd = (x.transpose(0, 1) for x in (query, key, value))
    starts, longest = packed.cu_seqlens, max(packed.lengths)
    out: Tensor = flash_attn_varlen_func(
        query_THd, key_THd, value_THd, starts, starts, longest, longest, dropout_p=rule.dropout,
        softmax_scale=rule.scale, causal=rule.causal, window_size=rule.sides,
    )  # fmt: skip
    return out


def _flex(query: Tensor, key: Tensor, value: Tensor, packed: Packed, rule: Rule) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    text_T, num_tokens = packed.text_T, query.shape[1]

    def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = text_T[i] == text_T[j]
        if rule.causal:
            seen = seen & (j <= i)
        return seen if rule.window is None else seen & ((i - j).abs() <= rule.window)

    blocks = create_block_mask(sees, None, None, num_tokens, num_tokens, device=str(query.device))
    out: Tensor = _flex_attention(query.device.type)(
        query[None], key[None], value[None], block_mask=blocks, scale=rule.scale,
        enable_gqa=key.shape[0] != query.shape[0],
    )  # fmt: skip
    return out[0].transpose(0, 1)


@functools.cache
def _flex_attention(device_type: str) -> Callable[..., Tensor]:
    """Compiled on a GPU; on a CPU, where its backward cannot be compiled, as written."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention  # type: ignore[return-value]


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, Packed, Rule], Tensor]] = {
    "sdpa": _sdpa, "varlen": _varlen, "flash": _flash, "flex": _flex,
}  # fmt: skip


def usable_kernels(attention: Attention, device_type: str, dtype: torch.dtype, rule: Rule) -> list[str]:
    """The kernels that honour all that is asked, the fastest first (or the one wished for); "sdpa" always can."""
    half = device_type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    can = {
        "varlen": half and not rule.dropout and importlib.util.find_spec("torch.nn.attention.varlen") is not None,
        "flash": half and importlib.util.find_spec("flash_attn") is not None,
        "flex": attention == "flex" and not rule.dropout,
        "sdpa": True,
    }
    found = [kernel for kernel, possible in can.items() if possible]
    return sorted(found, key=lambda kernel: kernel != attention)


def _choose_kernel(attention: Attention, query: Tensor, key: Tensor, rule: Rule) -> str:
    if query.device.type == "cpu" and attention != "flex":
        return "sdpa"
    return _checked_kernel(attention, query.device, query.dtype, query.shape[-3], key.shape[-3], query.shape[-1], rule)


@functools.cache
def _checked_kernel(
    attention: Attention, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int, rule: Rule
) -> str:
    """The first usable kernel that computes what "sdpa" does in float32, value and gradient; once for each case.

    The bound for 16 bits: 2 % of the largest entry, some four roundings of bfloat16.
    """
    kernels = usable_kernels(attention, device.type, dtype, rule)
    if attention not in ("auto", kernels[0]):
        logger.warning("--attention %s: cannot be used here (%s, dropout %g); using %s",
                       attention, dtype, rule.dropout, kernels[0])  # fmt: skip
    for kernel in kernels:
        if kernel == "sdpa":
            break
        try:
            error = kernel_error(kernel, device, dtype, heads, key_heads, size, replace(rule, dropout=0.0))
        except Exception as problem:  # whatever a kernel of another build or GPU may raise
            logger.warning("attention kernel %s does not run here: %s", kernel, str(problem).strip().split("\n")[0])
            continue
        if error < (0.02 if dtype.itemsize == 2 else 1e-4):
            break
        logger.warning("attention kernel %s differs by %.2g of the largest value; not used", kernel, error)
    logger.info("attention: %s", kernel)
    return kernel


def kernel_error(
    kernel: str, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int, rule: Rule
) -> float:
    """The largest difference of output or gradient to "sdpa" in float32, relative to the largest entry."""
    window = rule.window if rule.window is not None and rule.window < 1024 else 0
    lengths = sorted([1, 3, 3, 130, 2 * window + 5])
    packed = Packed(lengths, _int32([0, *accumulate(lengths)], device))
    generator = torch.Generator().manual_seed(0)
    shapes = [(h, sum(lengths), size) for h in (heads, key_heads, key_heads)]
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    weight = torch.randn((sum(lengths), heads, size), generator=generator).to(device)
    results = []
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for name, of_dtype in ((kernel, dtype), ("sdpa", torch.float32)):
            query, key, value = inputs = [x.clone().to(of_dtype).requires_grad_() for x in drawn]
            out = KERNELS[name](query, key, value, packed, rule).float()
            results.append([out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)])
    return max(relative_error(got, want) for got, want in zip(*results, strict=True))


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference / largest entry."""
    return float((got.detach().double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30))
