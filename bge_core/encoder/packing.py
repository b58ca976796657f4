"""Texts as the model takes them: all tokens of a batch in one row, without padding.

A batch of S texts is one vector of their T tokens, each text's positions counted from its own start:

    input_id_T    [ 101 102 | 101 2769 102 | 101 791 102 | 101 791 1921 102 ]      lengths  [2, 3, 3, 4]
    position_T    [   0   1 |   0    1   2 |   0   1   2 |   0   1    2   3 ]      cu_seqlens  [0, 2, 5, 8, 12]

Embeddings, linear layers, norms and activations work on single tokens, so they need not know where a text ends: the row
goes through a stock transformers model as a batch of one. Attention alone mixes tokens,

    o_i = sum_j a_ij v_j        a_i = softmax over j of scale * <q_i, k_j>,  j in the text of i (and in its window)

and it is the one place where transformers lets a caller in (`AttentionInterface`): `packed_attention` computes the sum
over each text's own tokens. The model's class, weights and files are untouched, and a batch costs its real tokens.

There are two ways to compute it. `packed_hidden`: rectangles of texts of about equal length, everywhere
(rectangles.py). `fixed_hidden`: a row whose shapes are a bucket's (fixed.py), through one operator (varlen.py), on
CUDA in half precision.

Shapes: T tokens of all texts, S texts, H heads, d size of a head, D hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bge_core.encoder.fixed import FixedRow, FixedRows
from bge_core.encoder.kernels import choose_kernel
from bge_core.encoder.rectangles import Packed, Rule, int32, sdpa
from bge_core.encoder.tokens import Tokens
from bge_core.encoder.varlen import varlen
from bge_core.runtime.flags import Attention

IMPLEMENTATION = "bge_packed"  # the name by which transformers finds `packed_attention`
_NOTING = "bge_noting"  # and what notes the calls of attention


def first_position(backbone: Any) -> int:
    """The number of a text's first position: RoBERTa and its kin keep those up to the padding's for padding."""
    tables = (module for name, module in backbone.named_modules() if name.endswith("position_embeddings"))
    paddings = [table.padding_idx for table in tables if isinstance(table, nn.Embedding)]
    return 0 if not paddings or paddings[0] is None else paddings[0] + 1


def max_length(backbone: Any) -> int:
    """Longest text in tokens that the backbone takes."""
    limit = getattr(backbone.config, "max_position_embeddings", None) or 1 << 30
    return int(limit - first_position(backbone))


def layers_of(backbone: Any) -> nn.ModuleList:
    """The model's list of layers: of its lists of modules the one with most weights, or an empty one."""
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=nn.ModuleList())


def enable(backbone: Any) -> None:
    """Let the model's attention be `packed_attention`; whoever calls the model otherwise still gets the stock one."""
    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    backbone.config._attn_implementation = IMPLEMENTATION


def packed_hidden(
    backbone: Any,
    tokens: Tokens,
    *,
    first_only: bool = False,
    token_type_id_T: Tensor | None = None,
) -> tuple[Tensor, list[int], list[int]]:
    """Run the backbone once on all texts in one row, attention by rectangles.

    Args:
        backbone: a transformers model after `enable`.
        tokens: at least one text.
        first_only: only the first token's vector of each text is needed; others may be left out.
        token_type_id_T: the token types of texts that are pairs; None: the model's default.

    Returns:
        Token vectors, texts by rising length; how many of each text there are (its length, or 1); the position in
        `tokens` of each text in that order.
    """
    order = sorted(range(len(tokens)), key=tokens.lengths.__getitem__)
    texts, device = tokens.texts(), tokens.input_id_T.device
    lengths = [tokens.lengths[i] for i in order]
    packed = Packed(lengths, int32([0, *accumulate(lengths)], device))
    start_T = packed.cu_seqlens[:-1].to(torch.int64)[packed.text_T]
    position_T = torch.arange(len(start_T), device=device) - start_T + first_position(backbone)
    first_only = first_only and has_bert_layers(backbone)
    if token_type_id_T is not None:
        types = token_type_id_T.split(tokens.lengths)
        token_type_id_T = torch.cat([types[i] for i in order])
    input_id_T = torch.cat([texts[i] for i in order])
    hidden_TD = _run(backbone, input_id_T, position_T, token_type_id_T, first_only, packed=packed)
    return hidden_TD, [1] * len(lengths) if first_only else lengths, order


def fixed_hidden(backbone: Any, row: FixedRow, *, first_only: bool = False) -> Tensor:
    """Run the backbone once on a row of fixed shape: nothing that depends on the texts reaches Python.

    Args:
        backbone: a transformers model after `enable`.
        row: on its device.
        first_only: of a model `has_bert_layers`, the first token's vector of each text alone.

    Returns:
        (T, D), or (N, D).
    """
    more = {"cu_seqlens": row.cu_seqlens, "longest": row.longest, "kernel": row.kernel}
    return _run(backbone, row.input_id_T, row.position_T, row.token_type_id_T, first_only, **more)


def _run(
    backbone: Any, input_id_T: Tensor, position_T: Tensor, type_T: Tensor | None, first_only: bool, **more: Any
) -> Tensor:
    """The last layer's vectors; `more` is what `packed_attention` is told of the texts."""
    more |= {"use_cache": False} if hasattr(backbone.config, "use_cache") else {}
    more |= {} if type_T is None else {"token_type_ids": type_T[None]}
    with _last_layer_on_first_tokens(backbone) if first_only else nullcontext():
        hidden_1TD: Tensor = backbone(
            input_ids=input_id_T[None],
            position_ids=position_T[None],
            # Four dimensions tell transformers that the mask is made: it makes none of T x T.
            attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=input_id_T.device),
            **more,
        ).last_hidden_state
    return hidden_1TD[0]


class FixedRowsOf:
    """How a model's texts become rows of fixed shape, if at all; found out once for each case.

    Args:
        backbone: after `enable`, or one that is never packed.
        attention: the kernel that is wished for, or "padded".
        pad_id: the padding token.
    """

    def __init__(self, backbone: Any, attention: Attention, pad_id: int) -> None:
        self.backbone, self.attention, self.pad_id = backbone, attention, pad_id
        self._found: dict[tuple[torch.device, torch.dtype, bool], str | None] = {}

    def now(self, *, distinct: bool) -> FixedRows | None:
        """For the device, mode (train or eval) and precision of now; None: by rectangles, or padded."""
        weight = next(self.backbone.parameters())
        device, dtype = weight.device, weight.dtype
        if device.type != "cuda" or self.attention == "padded":
            return None
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        case = (device, dtype, self.backbone.training)
        if case not in self._found:
            calls = _attention_calls(self.backbone)
            kernels = {choose_kernel(self.attention, device, dtype, *call) for call in calls}
            self._found[case] = kernels.pop() if len(kernels) == 1 else None
        kernel = self._found[case]
        return None if kernel is None else FixedRows(kernel, first_position(self.backbone), self.pad_id, distinct)


def _attention_calls(backbone: Any) -> set[tuple[tuple[int, int], int, Rule]]:
    """Heads of queries and of keys, size of a head and rule of every layer's attention, by a pass over one token."""
    calls = set()

    def note(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **told: Any
    ) -> tuple[Tensor, None]:
        calls.add(((query.shape[1], key.shape[1]), query.shape[-1], _rule(module, query, **told)))
        return query.transpose(1, 2), None

    AttentionInterface.register(_NOTING, note)
    AttentionMaskInterface.register(_NOTING, sdpa_mask)
    backbone.config._attn_implementation = _NOTING
    try:
        device = next(backbone.parameters()).device
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            id_1 = torch.zeros(1, dtype=torch.int64, device=device)
            _run(backbone, id_1, id_1 + first_position(backbone), None, first_only=False)
    finally:
        backbone.config._attn_implementation = IMPLEMENTATION
    return calls


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

    def forward(hidden_1TD: Tensor, *others: Any, packed: Packed | None = None, **more: Any) -> Tensor:
        own, starts = layer.attention.self, (more["cu_seqlens"] if packed is None else packed.cu_seqlens)[:-1]
        first_1SD = hidden_1TD[:, starts]
        vectors = own.query(first_1SD), own.key(hidden_1TD), own.value(hidden_1TD)
        query, key, value = (x.squeeze(0).unflatten(-1, (-1, own.attention_head_size)) for x in vectors)
        rule = Rule(own.scaling, dropout=own.dropout.p * own.training)
        if packed is not None:
            out_SHd = sdpa(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), packed, rule)
        else:
            one_each = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
            texts = (one_each, more["cu_seqlens"], 1, more["longest"])
            out_SHd = varlen(query, key, value, *texts, *rule.numbers, more["kernel"])[0]
        return layer.feed_forward_chunk(layer.attention.output(out_SHd.flatten(1)[None], first_1SD))

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: Packed | None = None,
    cu_seqlens: Tensor | None = None,
    longest: int = 0,
    kernel: str = "",
    **told: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer over each text's own tokens; of a caller who tells of no texts, stock transformers'.

    Args:
        module: the layer's attention.
        query, key, value: (1, H, T, d); key and value may have fewer heads (grouped queries).
        attention_mask: not read, the texts' ends are in `packed` or `cu_seqlens`.
        packed: the texts, for rectangles.
        cu_seqlens, longest, kernel: the texts of a row of fixed shape, for `varlen`.
        told: whatever else the model tells its attention, see `_rule`.

    Returns:
        (1, T, H, d), None.

    Raises:
        NotImplementedError: as `_rule`.
    """
    if cu_seqlens is not None:
        # What a model with norms or rotations computes in float32 takes the dtype of what it does not touch.
        query, key, value = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
        texts = (cu_seqlens, cu_seqlens, longest, longest)
        return varlen(query, key, value, *texts, *_rule(module, query, **told).numbers, kernel)[0], None
    if packed is not None:
        return _by_rectangles(query[0], key[0], value[0], packed, _rule(module, query, **told))[None], None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **told)  # type: ignore[return-value]


@torch.compiler.disable  # its loop over lengths is another one in every batch
def _by_rectangles(query: Tensor, key: Tensor, value: Tensor, packed: Packed, rule: Rule) -> Tensor:
    return sdpa(query, key, value, packed, rule)


def _rule(
    module: nn.Module,
    query: Tensor,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> Rule:
    """What a layer asks of its attention.

    Args:
        module: the layer's attention; its `is_causal` counts where the argument says nothing.
        query: (..., d).
        sliding_window: in transformers' meaning, a token sees those nearer than it.
        others: what would change the result is refused.

    Raises:
        NotImplementedError: the layer asks for capped logits, sinks or a bias by position.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} asks for {name}")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    window = None if sliding_window is None else sliding_window - 1
    return Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, causal, window, dropout)
