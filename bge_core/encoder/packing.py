"""Texts as the model takes them: all tokens of a batch in one row, without padding.

A batch of S texts is one vector of their T tokens, each text's positions counted from its own start:

    input_id_T    [ 101 102 | 101 2769 102 | 101 791 102 | 101 791 1921 102 ]      lengths  [2, 3, 3, 4]
    position_T    [   0   1 |   0    1   2 |   0   1   2 |   0   1    2   3 ]      cu_seqlens  [0, 2, 5, 8, 12]

Embeddings, linear layers, norms and activations work on single tokens, so they need not know where a text ends: the row
goes through a stock transformers model as a batch of one. Attention alone mixes tokens,

    o_i = sum_j a_ij v_j        a_i = softmax over j of scale * <q_i, k_j>,  j in the text of i (and in its window)

and it is the one place where transformers lets a caller in (`AttentionInterface`): `packed_attention` computes the sum
over each text's own tokens, with a kernel of kernels.py. The model's class, weights and files are untouched, and a
batch costs its real tokens.

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

from bge_core.encoder.kernels import KERNELS, Packed, Rule, choose_kernel, int32
from bge_core.encoder.tokens import Tokens
from bge_core.runtime.flags import Attention

IMPLEMENTATION = "bge_packed"  # the name by which transformers finds `packed_attention`


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
    attention: Attention = "auto",
    first_only: bool = False,
    token_type_id_T: Tensor | None = None,
) -> tuple[Tensor, list[int], list[int]]:
    """Run the backbone once on all texts in one row.

    Args:
        backbone: a transformers model after `enable`.
        tokens: at least one text.
        attention: the kernel that is wished for.
        first_only: only the first token's vector of each text is needed; others may be left out.
        token_type_id_T: the token types of texts that are pairs; None: the model's default.

    Returns:
        Token vectors, texts by rising length; how many of each text there are (its length, or 1); the position in
        `tokens` of each text in that order.
    """
    order = sorted(range(len(tokens)), key=tokens.lengths.__getitem__)
    texts, device = tokens.texts(), tokens.input_id_T.device
    lengths = [tokens.lengths[i] for i in order]
    packed = Packed(lengths, int32([0, *accumulate(lengths)], device), attention)
    start_T = packed.cu_seqlens[:-1].to(torch.int64)[packed.text_T]
    position_T = torch.arange(len(start_T), device=device) - start_T + first_position(backbone)
    first_only = first_only and has_bert_layers(backbone)
    more: dict[str, Any] = {"use_cache": False} if hasattr(backbone.config, "use_cache") else {}
    if token_type_id_T is not None:
        types = token_type_id_T.split(tokens.lengths)
        more["token_type_ids"] = torch.cat([types[i] for i in order])[None]
    with _last_layer_on_first_tokens(backbone) if first_only else nullcontext():
        hidden_1TD = backbone(
            input_ids=torch.cat([texts[i] for i in order])[None],
            position_ids=position_T[None],
            # Four dimensions tell transformers that the mask is made: it makes none of T x T.
            attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device),
            packed=packed,
            **more,
        ).last_hidden_state
    return hidden_1TD[0], [1] * len(lengths) if first_only else lengths, order


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
        out_SHd = KERNELS["sdpa"](query, key, value, packed, Rule(own.scaling, dropout=own.dropout.p * own.training))
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
    kernel = choose_kernel(packed.attention, query, key, rule)
    return KERNELS[kernel](query[0], key[0], value[0], packed, rule)[None], None
