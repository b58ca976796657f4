"""Attention over the texts of a packed row: the kernels, which one is taken, and whether it computes what it should.

A kernel maps queries, keys and values (H, T, d) of all tokens to (T, H, d). The first that works here is taken
(`usable_kernels`), once it has been compared with "sdpa" in float32 (`kernel_error`):

    varlen  torch's variable-length attention: CUDA, half precision, no dropout
    flash   the same of the package flash-attn, with dropout
    sdpa    torch's scaled_dot_product_attention on rectangles of texts: everywhere, everything

Shapes: T tokens of all texts, S texts, t tokens of the n texts of one rectangle, L the longest of them, H heads, d size
of a head.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from bge_core.encoder.dropout import dropout
from bge_core.encoder.tokens import bucket_texts
from bge_core.runtime.flags import Attention

logger = logging.getLogger(__name__)
MAX_WASTE = {"cpu": 0.0}  # of a rectangle may be padding: on other devices, where a call costs more, an eighth


@dataclass(frozen=True)
class Packed:
    """How S texts lie in the row, as attention needs it.

    Args:
        lengths: of the texts, rising, as in the row.
        cu_seqlens: (S + 1,) int32, where each text begins, and T; on the device.
        attention: the kernel that is wished for, or "auto".
    """

    lengths: list[int]
    cu_seqlens: Tensor
    attention: Attention = "auto"

    @functools.cached_property
    def rectangles(self) -> list["Rectangle"]:
        """Neighbours of about equal length, which go through sdpa together."""
        device = self.cu_seqlens.device
        buckets = bucket_texts(self.lengths, MAX_WASTE.get(device.type, 0.125))
        return [Rectangle.of([self.lengths[i] for i in bucket], device) for bucket in buckets]

    @functools.cached_property
    def text_T(self) -> Tensor:
        """The number of the text to which each token belongs, int64."""
        counts = self.cu_seqlens.diff().to(torch.int64)
        return torch.arange(len(self.lengths), device=counts.device).repeat_interleave(
            counts, output_size=sum(self.lengths)
        )


@dataclass(frozen=True)
class Rectangle:
    """n texts side by side as (n, L).

    Args:
        lengths: of the texts.
        place_t: where in the rectangle, row after row, each token lies, int64; None: all texts have L tokens.
        is_token_nL: False where a text has ended; None likewise.
    """

    lengths: list[int]
    place_t: Tensor | None = None
    is_token_nL: Tensor | None = None

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> "Rectangle":
        """The rectangle of texts of these lengths."""
        if min(lengths) == max(lengths):
            return cls(lengths)
        is_token_nL = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        place_t = is_token_nL.flatten().nonzero()[:, 0]
        return cls(lengths, place_t.to(device, non_blocking=True), is_token_nL.to(device, non_blocking=True))

    def spread(self, x_Htd: Tensor) -> Tensor:
        """Token vectors (H, t, d), or one of each text (H, n, d), as (n, H, L or 1, d)."""
        if self.place_t is not None and x_Htd.shape[1] != len(self.lengths):
            empty = x_Htd.new_zeros((x_Htd.shape[0], len(self.lengths) * max(self.lengths), x_Htd.shape[2]))
            x_Htd = empty.index_copy(1, self.place_t, x_Htd)
        return x_Htd.unflatten(1, (len(self.lengths), -1)).transpose(0, 1)

    def collect(self, x_nHLd: Tensor) -> Tensor:
        """The inverse, (t or n, H, d)."""
        flat = x_nHLd.transpose(1, 2).flatten(0, 1)
        return flat if self.place_t is None or len(flat) == len(self.lengths) else flat[self.place_t]


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

    def mask(self, rectangle: Rectangle, device: torch.device) -> Tensor | None:
        """(n or 1, 1, L or 1, L), True where row i sees column j; None where causality, or nothing, says it all."""
        length, is_token_nL = max(rectangle.lengths), rectangle.is_token_nL
        window = length if self.window is None else self.window
        if window >= length - 1 and not (self.causal and is_token_nL is not None):
            return None if is_token_nL is None else is_token_nL[:, None, None]
        distance_LL = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
        seen_LL = distance_LL.abs() <= window
        if self.causal:
            seen_LL &= distance_LL >= 0
        if is_token_nL is None:
            return seen_LL[None, None]
        # What stands behind a text's end sees itself: its result is dropped, but a row that sees nothing is NaN.
        return seen_LL & is_token_nL[:, None, None] | (distance_LL == 0)

    @property
    def sides(self) -> tuple[int, int]:
        """The window as (tokens before, tokens after), -1 for all, as flash attention takes it."""
        before = -1 if self.window is None else self.window
        return before, 0 if self.causal else before


def _sdpa(query: Tensor, key: Tensor, value: Tensor, packed: Packed, rule: Rule) -> Tensor:
    """A call for each rectangle. The queries may be those of the texts' first tokens alone: (H, S, d) -> (S, H, d)."""
    rectangles, grouped, parts = packed.rectangles, key.shape[0] != query.shape[0], []
    sizes = [sum(rectangle.lengths) for rectangle in rectangles]
    first_only = query.shape[1] == len(packed.lengths)
    query_sizes = [len(rectangle.lengths) for rectangle in rectangles] if first_only else sizes
    split = zip(query.split(query_sizes, 1), key.split(sizes, 1), value.split(sizes, 1), strict=True)
    for rectangle, of_texts in zip(rectangles, split, strict=True):
        query_nHLd, key_nHLd, value_nHLd = map(rectangle.spread, of_texts)
        mask = rule.mask(rectangle, query.device)
        if query.device.type == "cpu" and rule.dropout and mask is None and not (rule.causal or grouped):
            # What torch itself does with dropout on a CPU, but with faster random numbers.
            weight_nHLL = (query_nHLd @ (key_nHLd * rule.scale).mT).softmax(-1)
            out_nHLd = dropout(weight_nHLL, rule.dropout) @ value_nHLd
        else:
            out_nHLd = F.scaled_dot_product_attention(
                query_nHLd,
                key_nHLd,
                value_nHLd,
                mask,
                rule.dropout,
                rule.causal and mask is None,
                scale=rule.scale,
                enable_gqa=grouped,
            )
        parts.append(rectangle.collect(out_nHLd))
    return torch.cat(parts)


def _varlen(query: Tensor, key: Tensor, value: Tensor, packed: Packed, rule: Rule) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[0] // key.shape[0]
    if groups > 1:  # torch 2.11's function knows no grouped queries
        key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    query_THd, key_THd, value_THd = (x.transpose(0, 1).contiguous() for x in (query, key, value))
    starts, longest = packed.cu_seqlens, max(packed.lengths)
    out = varlen_attn(
        query_THd, key_THd, value_THd, starts, starts, longest, longest, scale=rule.scale, window_size=rule.sides
    )
    assert isinstance(out, Tensor)
    return out


def _flash(query: Tensor, key: Tensor, value: Tensor, packed: Packed, rule: Rule) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    query_THd, key_THd, value_THd = (x.transpose(0, 1) for x in (query, key, value))
    starts, longest = packed.cu_seqlens, max(packed.lengths)
    out: Tensor = flash_attn_varlen_func(
        query_THd,
        key_THd,
        value_THd,
        starts,
        starts,
        longest,
        longest,
        dropout_p=rule.dropout,
        softmax_scale=rule.scale,
        causal=rule.causal,
        window_size=rule.sides,
    )
    return out


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, Packed, Rule], Tensor]] = {
    "sdpa": _sdpa,
    "varlen": _varlen,
    "flash": _flash,
}


def usable_kernels(attention: Attention, device_type: str, dtype: torch.dtype, rule: Rule) -> list[str]:
    """The kernels that honour all that is asked, the fastest first (or the one wished for); "sdpa" always can."""
    half = device_type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    can = {
        "varlen": half and not rule.dropout and importlib.util.find_spec("torch.nn.attention.varlen") is not None,
        "flash": half and importlib.util.find_spec("flash_attn") is not None,
        "sdpa": True,
    }
    found = [kernel for kernel, possible in can.items() if possible]
    return sorted(found, key=lambda kernel: kernel != attention)


def choose_kernel(attention: Attention, query: Tensor, key: Tensor, rule: Rule) -> str:
    """The name of the kernel for these tensors."""
    if query.device.type == "cpu":
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
        logger.warning(
            "--attention %s: cannot be used here (%s, dropout %g); using %s", attention, dtype, rule.dropout, kernels[0]
        )
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
    without = usable_kernels("auto", device.type, dtype, replace(rule, dropout=0.0))[0]
    if rule.dropout and without not in kernels:
        logger.info(
            "%s is faster, but has no dropout of attention weights (%g): --attention_dropout 0 would give it",
            without,
            rule.dropout,
        )
    return kernel


def kernel_error(
    kernel: str, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int, rule: Rule
) -> float:
    """The largest difference of output or gradient to "sdpa" in float32, relative to the largest entry."""
    window = rule.window if rule.window is not None and rule.window < 1024 else 0
    lengths = sorted([1, 3, 3, 130, 2 * window + 5])
    packed = Packed(lengths, int32([0, *accumulate(lengths)], device))
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


def int32(values: Sequence[int], device: torch.device) -> Tensor:
    """A vector on a device."""
    return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference / largest entry."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
