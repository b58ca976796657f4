"""A cross-encoder as teacher: it reads query and passage together and says how well the one answers the other.

    (query, passage) -> [CLS] query [SEP] passage [SEP] -> transformer -> first token's vector -> head -> one logit

As bge-reranker and its kin: `AutoModelForSequenceClassification` with one label. Pairs are sorted by length and packed
without padding, as texts are for the encoder. A pair's tokens do not depend on the pairs beside it, nor its batch on
the number of processes.

Shapes: T tokens of all pairs, S pairs, D hidden size; s pairs of one padded rectangle, L its longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    RobertaForSequenceClassification,
    XLMRobertaForSequenceClassification,
)

from bge_core import UserError
from bge_core.encoder import packing
from bge_core.encoder.encode import run_batches
from bge_core.encoder.load import open_pretrained
from bge_core.encoder.selfcheck import packed_or_padded
from bge_core.encoder.tokens import Tokens, pad_buckets
from bge_core.runtime.flags import Attention
from bge_core.runtime.parcel import send

FLAG = "--reranker_name_or_path"

# Models whose head is known to read the first token's vector alone.
PACKABLE = (BertForSequenceClassification, RobertaForSequenceClassification, XLMRobertaForSequenceClassification)


@dataclass(frozen=True, slots=True)
class PairTokens:
    """A pair's token ids, special ones included, and their types: none where the model has none."""

    ids: list[int]
    types: list[int]

    def __len__(self) -> int:
        return len(self.ids)


class Reranker(nn.Module):
    """A cross-encoder.

    Args:
        model: a transformers model for sequence classification with one label.
        tokenizer: its fast tokenizer.
        max_length: longest pair in tokens, cut to what the model takes.
        attention: the kernel to pack with (packing.py), for a model of `PACKABLE`; or "padded".
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int, attention: Attention = "padded") -> None:
        super().__init__()
        self.model, self.tokenizer, self.attention = model, tokenizer, attention
        self.max_length = min(max_length, packing.max_length(model))
        names = tokenizer.model_input_names
        self.uses_types = getattr(model.config, "type_vocab_size", 0) > 1 and "token_type_ids" in names
        num_special = tokenizer.num_special_tokens_to_add(pair=True)
        if self.max_length < num_special + 2:
            raise UserError(
                f"--reranker_max_length {max_length}: a pair needs {num_special} special tokens and one token of each "
                f"text; use {num_special + 2} or more"
            )
        self._rows = packing.FixedRowsOf(model.base_model, attention, tokenizer.pad_token_id)
        if attention != "padded":
            packing.enable(model.base_model)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        precision: str = "no",
        description: str = "rerank",
        **options: Any,
    ) -> np.ndarray:
        """The logit of each (query, passage), higher where the passage answers better; on every rank.

        Args:
            pairs: n pairs. Of one that is too long the passage is cut; the longer text, where the query alone is.
            precision: "fp16" or "bf16" autocast, or "no".
            description: of the progress bar.
            options: batch_size and max_tokens of `run_batches`.

        Returns:
            (n,) float32, in input order, as the model gives them: no sigmoid.

        Raises:
            UserError: a logit is not finite; the pair is named.
        """
        scores = np.empty(len(pairs), dtype=np.float32)
        more = {"precision": precision, "description": description, "unit": "pair", **options}
        if broken := run_batches(self, pairs, self.tokenize, self._logits, scores, **more):
            query, passage = pairs[broken[0]]
            raise UserError(
                f"{FLAG}: the model gives NaN for {len(broken)} of {len(pairs)} pairs, first {query[:40]!r} and "
                f"{passage[:40]!r}: is it broken?" + " Or is fp16 too small for it? Try --bf16." * (precision == "fp16")
            )
        return scores

    def tokenize(self, pairs: Sequence[tuple[str, str]]) -> list[PairTokens]:
        """What the model reads of each pair."""
        queries = list(dict.fromkeys(query for query, _ in pairs))
        query_ids = self.tokenizer(queries, add_special_tokens=False, verbose=False)["input_ids"]
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True)
        # The tokenizer cuts the passage alone only as long as something of it is left.
        too_long = {query for query, ids in zip(queries, query_ids, strict=True) if len(ids) >= room}
        pair_tokens = [PairTokens([], [])] * len(pairs)
        for cut in ("only_second", "longest_first"):
            rows = [i for i, (query, _) in enumerate(pairs) if (query in too_long) == (cut == "longest_first")]
            if rows:
                found = self.tokenizer(
                    [pairs[i][0] for i in rows],
                    [pairs[i][1] for i in rows],
                    truncation=cut,
                    max_length=self.max_length,
                    return_token_type_ids=self.uses_types,
                    verbose=False,
                )
                types = found["token_type_ids"] if self.uses_types else [[]] * len(rows)
                for i, *of_pair in zip(rows, found["input_ids"], types, strict=True):
                    pair_tokens[i] = PairTokens(*of_pair)
        return pair_tokens

    def _logits(self, batch: list[PairTokens]) -> Tensor:
        tokens = Tokens.from_lists([pair.ids for pair in batch])
        return self(tokens, torch.tensor([t for pair in batch for t in pair.types]) if self.uses_types else None)

    def forward(self, tokens: Tokens, type_T: Tensor | None = None) -> Tensor:
        """The logits (S,) of S pairs, float32.

        Args:
            tokens: the pairs, each with its special tokens.
            type_T: 0 for tokens of the query, 1 for those of the passage; None: the model has no types.
        """
        if rows := self._rows.now(distinct=False):
            row = send(rows.row(tokens, type_T), self.device)
            first_ND = packing.fixed_hidden(self.model.base_model, row, first_only=True)
            return self._head(first_ND)[row.place_S, 0].float()
        tokens, type_T = tokens.to(self.device), None if type_T is None else type_T.to(self.device)
        logit_S1, order = (self._padded if self.attention == "padded" else self._packed)(tokens, type_T)
        return logit_S1[torch.tensor(order).argsort().to(logit_S1.device, non_blocking=True), 0].float()

    def _packed(self, tokens: Tokens, type_T: Tensor | None) -> tuple[Tensor, list[int]]:
        """Logits (S, 1) and the position in `tokens` of each: the head on the first tokens of one row."""
        first_SD, _, order = packing.packed_hidden(
            self.model.base_model, tokens, first_only=True, token_type_id_T=type_T
        )
        return self._head(first_SD), order

    def _head(self, first_SD: Tensor) -> Tensor:
        """Logits (S, 1) from the vectors of first tokens."""
        first_S1D = first_SD[:, None]  # the heads of transformers look for the first token themselves
        pooler = self.model.base_model.pooler  # BERT's; RoBERTa's head has its own
        logit_S1: Tensor = self.model.classifier(first_S1D if pooler is None else pooler(first_S1D))
        return logit_S1

    def _padded(self, tokens: Tokens, type_T: Tensor | None) -> tuple[Tensor, list[int]]:
        """As `_packed`, by the stock model on padded rectangles."""
        parts, order = [], []
        types = None if type_T is None else type_T.split(tokens.lengths)
        for bucket, id_sL, mask_sL in pad_buckets(tokens, self.tokenizer.pad_token_id):
            more = {}
            if types is not None:
                more["token_type_ids"] = nn.utils.rnn.pad_sequence([types[i] for i in bucket], batch_first=True)
            parts.append(self.model(input_ids=id_sL, attention_mask=mask_sL, **more).logits)
            order += bucket
        return torch.cat(parts), order


def load_reranker(
    name: str | Path,
    *,
    max_length: int = 512,
    trust_remote_code: bool = False,
    attention: Attention = "auto",
    dtype: torch.dtype = torch.float32,
) -> Reranker:
    """Load a cross-encoder from the hub or a folder.

    Args:
        name: hub name or folder, such as BAAI/bge-reranker-v2-m3.
        max_length: longest pair in tokens.
        trust_remote_code: run model code that comes with the checkpoint.
        attention: how a batch is computed, see packing.py. Models other than BERT and (XLM-)RoBERTa are padded.
        dtype: of the weights, whatever the checkpoint was saved in.

    Returns:
        The cross-encoder, on the CPU, in eval mode.

    Raises:
        UserError: not a model, not reachable, or no cross-encoder: it has no head, or not one label; `max_length` too
            small for any text.
    """
    model, tokenizer, info = open_pretrained(
        AutoModelForSequenceClassification,
        name,
        flag=FLAG,
        what="cross-encoder",
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        ignore_mismatched_sizes=True,
    )
    # What a checkpoint lacks, or has in another shape, transformers draws at random.
    lacks, num_labels = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}, model.config.num_labels
    if lacks or num_labels != 1:
        reason = f"the checkpoint lacks {', '.join(sorted(lacks)[:3])}" if lacks else f"it has {num_labels} labels"
        raise UserError(
            f"{FLAG} {name}: is no cross-encoder with one score ({reason}); name one, such as "
            "BAAI/bge-reranker-v2-m3, or give an ordinary encoder to --teacher_encoder"
        )
    if attention != "padded":
        known = isinstance(model, PACKABLE)
        attention = packed_or_padded(name, model.base_model, attention) if known else "padded"
    return Reranker(model, tokenizer, max_length, attention).eval()
