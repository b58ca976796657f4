"""Attention over the texts of a packed row by torch's scaled_dot_product_attention: everywhere, everything.

Neighbouring texts of equal or nearly equal length lie side by side in a rectangle and go through one call.

Shapes: T tokens of all texts, S texts, t tokens of the n texts of one rectangle, L the longest of them, H heads, d size
of a head.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bge_core.encoder.dropout import dropout
from bge_core.encoder.tokens import bucket_texts

MAX_WASTE = {"cpu": 0.0}  # of a rectangle may be padding: on other devices, where a call costs more, an eighth


@dataclass(frozen=True)
class Packed:
    """How S texts lie in the row, as attention needs it.

    Args:
        lengths: of the texts, rising, as in the row.
        cu_seqlens: (S + 1,) int32, where each text begins, and T; on the device.
    """

    lengths: list[int]
    cu_seqlens: Tensor

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
    def numbers(self) -> tuple[float, bool, int, float]:
        """Scale, causality, window (-1: none) and dropout, as an operator takes them."""
        return self.scale, self.causal, -1 if self.window is None else self.window, self.dropout

    @property
    def sides(self) -> tuple[int, int]:
        """The window as (tokens before, tokens after), -1 for all, as flash attention takes it."""
        before = -1 if self.window is None else self.window
        return before, 0 if self.causal else before


def sdpa(query: Tensor, key: Tensor, value: Tensor, packed: Packed, rule: Rule) -> Tensor:
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


def int32(values: Sequence[int], device: torch.device) -> Tensor:
    """A vector on a device."""
    return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference / largest entry."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
