"""The encoder: a stock transformers backbone, pooling and normalization; loaded from and saved for everybody.

    text -> tokens -> backbone -> pooling -> Dense modules, if any -> normalization -> vector

A saved folder opens in transformers, in sentence-transformers (which would silently use mean pooling without the files
that state otherwise) and in FlagEmbedding, and gives the same vectors.

Shapes: T tokens of all texts, S texts, L longest text of a padded rectangle, D embedding size.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from bge_core import UserError
from bge_core.encoder import packing
from bge_core.encoder.code import save_code
from bge_core.encoder.dense import save_dense
from bge_core.encoder.dropout import replace_dropout
from bge_core.encoder.encode import encode
from bge_core.encoder.fixed import FixedRow, FixedRows
from bge_core.encoder.settings import EncoderSettings, save_tokenizer, write_settings
from bge_core.encoder.tokens import Tokens, pad_buckets
from bge_core.runtime.flags import POOLINGS, Attention, Pooling
from bge_core.runtime.parcel import send

logger = logging.getLogger(__name__)


class Encoder(nn.Module):
    """Backbone, pooling, Dense modules and normalization.

    Args:
        backbone: a transformers encoder whose output has `last_hidden_state`.
        tokenizer: its fast tokenizer.
        settings: pooling and normalize must be stated.
        attention: the kernel to pack with (packing.py), or "padded".
        dense: the modules that `settings.dense` states, with their weights.
    """

    def __init__(
        self,
        backbone: Any,
        tokenizer: Any,
        settings: EncoderSettings,
        attention: Attention = "padded",
        dense: nn.Sequential | None = None,
    ) -> None:
        super().__init__()
        if settings.pooling not in POOLINGS:
            raise UserError(f"pooling {settings.pooling!r}: use one of {', '.join(POOLINGS)}")
        replace_dropout(backbone)
        self.backbone = backbone
        self.draws = has_dropout(backbone)
        self.dense = nn.Sequential() if dense is None else dense
        assert len(self.dense) == len(settings.dense)
        self.tokenizer = tokenizer
        self.settings = settings
        self.attention = attention
        self.represent: Callable[[FixedRow], Tensor] | None = None  # `vectors` without gradient, where graphs are held
        self._rows = packing.FixedRowsOf(backbone, attention, tokenizer.pad_token_id)
        if attention != "padded":
            packing.enable(backbone)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.backbone.parameters()).device

    @property
    def embedding_size(self) -> int:
        """D."""
        stated = self.settings.dense
        return stated[-1].out_features if stated else int(self.backbone.config.hidden_size)

    @property
    def max_length(self) -> int:
        """Longest text in tokens that the backbone takes."""
        return packing.max_length(self.backbone)

    def freeze(self, *, position_embeddings: bool = False) -> None:
        """Switch off the gradient of what gets none (BERT's pooler) and, on request, of the position embeddings.

        A pass over a few tokens tells: what its graph does not reach gets no gradient. Warned of, but for a pooler: of
        a mixture of experts they are those that none of these tokens went to.
        """
        was_training = self.training
        num_tokens = min(self.backbone.get_input_embeddings().num_embeddings, self.max_length, 64)
        self.eval()
        id_1T = torch.arange(num_tokens, device=self.device)[None]
        with torch.enable_grad():
            hidden_1TD = self.backbone(input_ids=id_1T, attention_mask=torch.ones_like(id_1T)).last_hidden_state
        self.train(was_training)
        reached = _leaves_of(hidden_1TD)
        unreached = {name for name, parameter in self.backbone.named_parameters() if id(parameter) not in reached}
        for name, parameter in self.backbone.named_parameters():
            if name in unreached or (position_embeddings and "position_embeddings" in name):
                parameter.requires_grad_(False)
        if odd := sorted(name for name in unreached if not name.startswith("pooler.")):
            logger.warning("%d weights get no gradient and stay as they are, as %s", len(odd), odd[0])

    def train(self, mode: bool = True) -> "Encoder":
        """As nn.Module."""
        self.draws = mode and has_dropout(self.backbone)
        return super().train(mode)

    def fixed_rows(self) -> FixedRows | None:
        """How texts become rows of fixed shape here and now; None: not at all."""
        return self._rows.now(distinct=not self.draws)

    def forward(self, texts: Tokens | FixedRow) -> Tensor:
        """Vectors of S texts; what occurs twice is computed once, unless dropout makes the two differ.

        Args:
            texts: S may be 0 in Tokens: a rank without rows still takes part in the backward.

        Returns:
            (S, D), float32 or wider, of length 1 where `settings.normalize`.
        """
        if isinstance(texts, FixedRow):
            vectors = self.vectors if torch.is_grad_enabled() or self.represent is None else self.represent
            return vectors(texts)[texts.place_S]
        if not len(texts):
            return self(Tokens(texts.input_id_T.new_full((1,), self.tokenizer.pad_token_id), [1]))[:0]
        if rows := self.fixed_rows():
            return self(send(rows.row(texts), self.device))
        tokens, place_S = texts.to(self.device), list(range(len(texts)))
        if not self.draws:
            tokens, place_S = tokens.distinct()
        token_vectors = self._padded if self.attention == "padded" else self._packed
        hidden_TD, lengths, order = token_vectors(tokens)
        length_S, skipped_S = torch.tensor(lengths).to(self.device, non_blocking=True), None
        if tokens.prompt_lengths:
            skipped_S = torch.tensor([tokens.prompt_lengths[i] for i in order]).to(self.device, non_blocking=True)
        vector_SD = self._behind_pooling(hidden_TD, length_S, skipped_S)
        return vector_SD[torch.tensor(order).argsort()[place_S].to(vector_SD.device, non_blocking=True)]

    def vectors(self, row: FixedRow) -> Tensor:
        """Vectors (N, D) of all texts of a row: a function of its tensors alone, for a graph."""
        first_only = self._first_only(row.skipped_N is not None)
        hidden_TD = packing.fixed_hidden(self.backbone, row, first_only=first_only)
        length_N = torch.ones_like(row.cu_seqlens[1:]) if first_only else row.cu_seqlens.diff()
        return self._behind_pooling(hidden_TD, length_N.to(torch.int64), row.skipped_N)

    def _first_only(self, has_prompts: bool) -> bool:
        """Whether the last layer may work on first tokens alone."""
        return self.settings.pooling == "cls" and not has_prompts and packing.has_bert_layers(self.backbone)

    def _behind_pooling(self, hidden_TD: Tensor, length_S: Tensor, skipped_S: Tensor | None) -> Tensor:
        vector_SD = self.dense(pool(hidden_TD, length_S, self.settings.pooling, skipped_S))
        return F.normalize(vector_SD, dim=-1) if self.settings.normalize else vector_SD

    def _packed(self, tokens: Tokens) -> tuple[Tensor, list[int], list[int]]:
        first_only = self._first_only(tokens.prompt_lengths is not None)
        return packing.packed_hidden(self.backbone, tokens, first_only=first_only)

    def _padded(self, tokens: Tokens) -> tuple[Tensor, list[int], list[int]]:
        """As `packed_hidden`, on padded rectangles."""
        # Where FSDP made a module of shards of this one, every rank has to run the layers equally often: once.
        max_waste = 1.0 if hasattr(self, "unshard") else 0.125
        parts, order = [], []
        for bucket, id_sL, mask_sL in pad_buckets(tokens, self.tokenizer.pad_token_id, max_waste):
            hidden_sLD = self.backbone(input_ids=id_sL, attention_mask=mask_sL).last_hidden_state
            parts.append(hidden_sLD[mask_sL.bool()])
            order += bucket
        return torch.cat(parts), [tokens.lengths[i] for i in order], order

    def encode(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        """Vectors (n, D) of texts, as they are; a prompt, half precision and more: see `encode.encode`."""
        return encode(self, texts, **options)

    def save(self, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write weights, tokenizer and the files that sentence-transformers reads into an existing or new folder.

        Args:
            folder: where to.
            weights: a copy of the state dict, to be saved in the place of its own.
        """
        folder = Path(folder)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in (self.state_dict() if weights is None else weights).items():
            part, _, name = name.partition(".")
            parts.setdefault(part, {})[name] = tensor
        try:
            self.backbone.save_pretrained(folder, state_dict=parts["backbone"])
            save_dense(folder, self.settings.dense, parts.get("dense", {}))
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(f"{folder}: the weights could not be written: {str(error).split('error: ')[-1]}") from None
        for path in ("", *(dense.path for dense in self.settings.dense)):
            for file in (folder / path).glob("*.safetensors"):  # the library makes them readable by their owner alone
                file.chmod((folder / "config.json").stat().st_mode)
        save_code(folder, self.backbone)
        save_tokenizer(self.tokenizer, folder)
        write_settings(folder, self.settings, self.embedding_size, min(self.max_length, 8192))


def pool(hidden_TD: Tensor, length_S: Tensor, pooling: Pooling | None, skipped_S: Tensor | None = None) -> Tensor:
    """One vector a text from the token vectors of S texts in one row, in float32 or wider; (S, D).

    cls: the first token. last_token: the last one. max: the largest entry of each dimension. mean: sum of the n tokens
    / n. mean_sqrt_len: sum / sqrt(n). weightedmean: sum of i * the i-th token / sum of i.

    Args:
        hidden_TD: the token vectors.
        length_S: int64, of the texts; their sum is T.
        pooling: see above.
        skipped_S: int64, so many first tokens of each text are left out, fewer than it has; the others keep their
            number i. None: none are.
    """
    hidden_TD = hidden_TD.to(torch.promote_types(hidden_TD.dtype, torch.float32))
    end_S = length_S.cumsum(0)
    if pooling in ("cls", "last_token"):
        first_S = end_S - length_S
        return hidden_TD[
            end_S - 1 if pooling == "last_token" else first_S if skipped_S is None else first_S + skipped_S
        ]
    num_tokens, num_texts = len(hidden_TD), len(length_S)
    text_T = torch.arange(num_texts, device=length_S.device).repeat_interleave(length_S, output_size=num_tokens)
    number_T = torch.arange(1, num_tokens + 1, device=length_S.device) - (end_S - length_S)[text_T]
    if skipped_S is not None:
        is_left_out_T = number_T <= skipped_S[text_T]
        hidden_TD = hidden_TD.masked_fill(is_left_out_T[:, None], -torch.inf if pooling == "max" else 0.0)
        number_T, length_S = number_T.masked_fill(is_left_out_T, 0), length_S - skipped_S
    if pooling == "max":
        least_SD = hidden_TD.new_full((num_texts, hidden_TD.shape[1]), -torch.inf)
        return least_SD.scatter_reduce(0, text_T[:, None].expand_as(hidden_TD), hidden_TD, "amax")
    divisor_S = length_S.to(hidden_TD.dtype) ** 0.5 if pooling == "mean_sqrt_len" else length_S
    if pooling == "weightedmean":
        hidden_TD = hidden_TD * number_T[:, None]
        divisor_S = torch.zeros_like(length_S).index_add(0, text_T, number_T)
    sum_SD = hidden_TD.new_zeros((num_texts, hidden_TD.shape[1])).index_add(0, text_T, hidden_TD)
    return sum_SD / divisor_S[:, None]


def _leaves_of(tensor: Tensor) -> set[int]:
    """The ids of the parameters that a backward from `tensor` would reach."""
    leaves, seen, nodes = set(), set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions]
    return leaves


def has_dropout(backbone: Any) -> bool:
    """Whether the model draws random numbers in training: by its modules, or by what its config says of any dropout."""
    rates = [value for name, value in vars(backbone.config).items() if "drop" in name]
    rates += [module.p for module in backbone.modules() if isinstance(module, nn.Dropout)]
    return any(rates)


def compile_layers(backbone: Any, *, fixed: bool = False) -> None:
    """Let torch.compile fuse what stands between a layer's matrix products.

    Each layer is compiled by itself, but for the last one, which may work on first tokens alone. Random numbers are
    torch's own, so that dropout is the same with and without a gradient.

    Args:
        backbone: its layers.
        fixed: for rows of fixed shape: one graph without a break for each bucket; otherwise for any number of tokens,
            around the attention.
    """
    if fixed:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    for layer in packing.layers_of(backbone)[:-1]:
        layer.compile(dynamic=not fixed, fullgraph=fixed, options={"fallback_random": True, "deterministic": True})
