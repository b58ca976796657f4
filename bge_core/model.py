"""The encoder: a stock transformers backbone, pooling and normalization; loaded from and saved for everybody.

    text -> tokens -> backbone -> pooling (cls, mean or last_token) -> normalization -> vector

A saved folder opens in transformers, in sentence-transformers (which would silently use mean pooling without the files
that state otherwise) and in FlagEmbedding, and gives the same vectors.

Shapes: T tokens of all texts, S texts, L longest text of a padded rectangle, D embedding size.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import cached_file

from bge_core import UserError, packing
from bge_core.batch import Tokens, pad_buckets
from bge_core.config import Attention
from bge_core.dropout import replace_dropout
from bge_core.encode import encode
from bge_core.kernels import relative_error

logger = logging.getLogger(__name__)

Pooling = Literal["cls", "mean", "last_token"]
POOLINGS: tuple[Pooling, ...] = ("cls", "mean", "last_token")
# The names of sentence-transformers 2 to 5 (a flag each) and 6 (one value) for the same three poolings.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last_token",
}
PACKING_BOUND = 1e-4  # of the largest entry, value or gradient, in float32
_POOLING_NAMES = {"cls": "cls", "mean": "mean", "lasttoken": "last_token"}


@dataclass(frozen=True)
class EncoderSettings:
    """What a checkpoint says beyond its weights.

    Args:
        pooling: how token vectors become one; None: not stated.
        normalize: vectors have length 1; None: not stated.
        max_length: longest text in tokens that the vectors were trained for; None: not stated.
        query_prompt, passage_prompt: put before each text; None: not stated.
    """

    pooling: Pooling | None = None
    normalize: bool | None = None
    max_length: int | None = None
    query_prompt: str | None = None
    passage_prompt: str | None = None


class Encoder(nn.Module):
    """Backbone, pooling and normalization.

    Args:
        backbone: a transformers encoder whose output has `last_hidden_state`.
        tokenizer: its fast tokenizer.
        settings: pooling and normalize must be stated.
        attention: the kernel to pack with (packing.py), or "padded".
    """

    def __init__(
        self, backbone: Any, tokenizer: Any, settings: EncoderSettings, attention: Attention = "padded"
    ) -> None:
        super().__init__()
        if settings.pooling not in POOLINGS:
            raise UserError(f"pooling {settings.pooling!r}: use one of {', '.join(POOLINGS)}")
        replace_dropout(backbone)
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.settings = settings
        self.attention = attention
        if attention != "padded":
            packing.enable(backbone)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.backbone.parameters()).device

    @property
    def embedding_size(self) -> int:
        """D."""
        return int(self.backbone.config.hidden_size)

    @property
    def max_positions(self) -> int:
        """Longest text in tokens that the backbone takes."""
        limit = getattr(self.backbone.config, "max_position_embeddings", None) or 1 << 30
        return int(limit - first_position(self.backbone))

    def freeze(self, *, position_embeddings: bool = False) -> None:
        """Switch off the gradient of what gets none (BERT's pooler) and, on request, of the position embeddings."""
        for name, parameter in self.backbone.named_parameters():
            if name.startswith("pooler.") or (position_embeddings and "position_embeddings" in name):
                parameter.requires_grad_(False)

    def forward(self, tokens: Tokens) -> Tensor:
        """Vectors of S texts; what occurs twice is computed once, unless dropout makes the two differ.

        Args:
            tokens: on this encoder's device. S may be 0: a rank without rows still takes part in the backward.

        Returns:
            (S, D), float32 or wider, of length 1 where `settings.normalize`.
        """
        if not len(tokens):
            return self(Tokens(tokens.input_id_T.new_full((1,), self.tokenizer.pad_token_id), [1]))[:0]
        place_S = list(range(len(tokens)))
        if not (self.training and has_dropout(self.backbone)):
            tokens, place_S = tokens.distinct()
        token_vectors = self._padded if self.attention == "padded" else self._packed
        hidden_TD, lengths, order = token_vectors(tokens)
        vector_SD = pool(hidden_TD, lengths, self.settings.pooling)
        vector_SD = vector_SD[torch.tensor(order).argsort()[place_S].to(vector_SD.device, non_blocking=True)]
        return F.normalize(vector_SD, dim=-1) if self.settings.normalize else vector_SD

    def _packed(self, tokens: Tokens) -> tuple[Tensor, list[int], list[int]]:
        return packing.packed_hidden(
            self.backbone, tokens, first_position=first_position(self.backbone), attention=self.attention,
            first_only=self.settings.pooling == "cls",
        )  # fmt: skip

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
            weights: a copy of the backbone's state dict, to be saved in the place of its own.
        """
        folder = Path(folder)
        try:
            self.backbone.save_pretrained(folder, state_dict=weights)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(f"{folder}: the weights could not be written: {str(error).split('error: ')[-1]}") from None
        for file in folder.glob("*.safetensors"):  # the library makes them readable by their owner alone
            file.chmod((folder / "config.json").stat().st_mode)
        save_tokenizer(self.tokenizer, folder)
        write_settings(folder, self.settings, self.embedding_size)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files; OSError on a full disk, for which the tokenizers library has a bare Exception."""
    tokenizer.backend_tokenizer.no_truncation()  # else the length of the last call would be saved with it
    tokenizer.backend_tokenizer.no_padding()
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from None


def first_position(backbone: Any) -> int:
    """The number of a text's first position: RoBERTa and its kin keep the first ones for padding."""
    return int(backbone.config.pad_token_id + 1) if "roberta" in backbone.config.model_type else 0


def pool(hidden_TD: Tensor, lengths: Sequence[int], pooling: Pooling | None) -> Tensor:
    """One vector a text from the token vectors of S texts in one row, in float32 or wider; (S, D).

    cls: the first token. mean: sum of the tokens / their number. last_token: the last one.
    """
    hidden_TD = hidden_TD.to(torch.promote_types(hidden_TD.dtype, torch.float32))
    length_S = torch.tensor(lengths)
    if pooling == "mean":
        text_T = torch.arange(len(lengths)).repeat_interleave(length_S).to(hidden_TD.device, non_blocking=True)
        sum_SD = hidden_TD.new_zeros((len(lengths), hidden_TD.shape[1])).index_add(0, text_T, hidden_TD)
        return sum_SD / length_S[:, None].to(hidden_TD.device, non_blocking=True)
    chosen_S = length_S.cumsum(0) - (length_S if pooling == "cls" else 1)
    return hidden_TD[chosen_S.to(hidden_TD.device, non_blocking=True)]


def load_encoder(
    name: str | Path,
    *,
    pooling: Pooling | None = None,
    normalize: bool | None = None,
    tokenizer_name: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    attention: Attention = "auto",
    attention_dropout: float | None = None,
) -> Encoder:
    """Load a hub model or a folder.

    Args:
        name: hub name or folder.
        pooling: None: what the checkpoint's sentence-transformers files say, else cls. A contradiction is warned of.
        normalize: None: what those files say, else True.
        dtype: of the weights; float32 master weights unless told otherwise, whatever the checkpoint was saved in.
        attention: how a batch is computed, see packing.py. A model that packed texts change is padded, with a warning.
        attention_dropout: of the attention weights in training; None: what the checkpoint says.

    Returns:
        The encoder, on the CPU, in eval mode.

    Raises:
        UserError: not a model, not reachable, weights missing.
    """
    hub: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "trust_remote_code": trust_remote_code}
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{name}: is not a model folder (it has no config.json)")
    if not folder.exists() and (str(name).startswith((".", "/", "~")) or str(name).count("/") > 1):
        raise UserError(f"{name}: no such folder")
    if not folder.exists() and folder.parent.is_dir() and str(folder.parent) != ".":
        logger.warning("%s: there is no such folder in %s; taken as a name of the hub", name, folder.parent)
    try:
        config = AutoConfig.from_pretrained(name, **hub)
        if attention_dropout is not None:
            set_attention_dropout(config, attention_dropout)
        backbone, info = AutoModel.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True, **hub)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name or name, use_fast=True, **hub)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is not None and not folder.is_dir():
            raise
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name}: could not be loaded as a model: {first_line}\n"
            "Give a folder, or a hub name; where the hub is out of reach, set HF_ENDPOINT to a mirror."
        ) from None
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise UserError(f"{tokenizer_name or name}: needs a fast tokenizer (tokenizer.json) with a padding token")
    _refuse_missing_weights(name, backbone, info)
    stored = read_settings(name, cache_dir=cache_dir, token=token)
    if pooling and stored.pooling and pooling != stored.pooling:
        logger.warning("%s was trained with %s pooling; you chose %s", name, stored.pooling, pooling)
    settings = replace(
        stored,
        pooling=pooling or stored.pooling or "cls",
        normalize=normalize if normalize is not None else stored.normalize if stored.normalize is not None else True,
    )
    if attention != "padded":
        attention = packed_or_padded(name, backbone, attention)
    return Encoder(backbone, tokenizer, settings, attention).eval()


def has_dropout(backbone: Any) -> bool:
    """Whether the model draws random numbers in training: by its modules, or by what its config says of any dropout."""
    rates = [value for name, value in vars(backbone.config).items() if "drop" in name]
    rates += [module.p for module in backbone.modules() if isinstance(module, nn.Dropout)]
    return any(rates)


def set_attention_dropout(config: Any, dropout: float) -> None:
    """Set the dropout of attention weights, whatever the model calls it. UserError where it has none."""
    found = [name for name in ("attention_probs_dropout_prob", "attention_dropout") if hasattr(config, name)]
    if not found:
        raise UserError(f"--attention_dropout: a {config.model_type} model has none")
    for name in found:
        setattr(config, name, dropout)


def compile_layers(backbone: Any) -> None:
    """Let torch.compile fuse what stands between a layer's matrix products, for any number of tokens.

    Each layer is compiled by itself, around `packed_attention`. The last one is not: it may work on first tokens alone.
    """
    _, _, layers = _layers(backbone) or (None, None, nn.ModuleList())
    for layer in layers[:-1]:
        layer.compile(dynamic=True)


def packed_or_padded(name: str | Path, backbone: Any, attention: Attention) -> Attention:
    """`attention` if the model computes the same on a packed row as on single texts, else "padded", with a warning."""
    start = first_position(backbone)
    limit = getattr(backbone.config, "max_position_embeddings", None) or 8192
    error = packing_error(backbone, int(limit - start), first_position=start)
    if error < (PACKING_BOUND if next(backbone.parameters()).dtype.itemsize >= 4 else 0.03):
        return attention
    logger.warning(
        "%s: on texts in one row a %s computes otherwise than on single ones (by %.2g of the largest value): "
        "batches are padded", name, type(backbone).__name__, error,
    )  # fmt: skip
    return "padded"


def packing_error(backbone: Any, max_length: int, *, first_position: int = 0) -> float:
    """How far a model run on one row is from the same model run on each text alone, as transformers does it.

    In eval mode, on texts of 1 token, 3 tokens, more than every window of the config, and the longest, in two orders,
    and for the first tokens alone; token vectors and gradients of the first layer. The first layers of each kind of
    attention stand for all.

    Returns:
        The largest difference relative to the largest entry; infinity where the model does not run like that.
    """
    windows = [w for w in _config_values(backbone.config, ("sliding_window", "local_attention")) if w]
    longest = min(max_length, 8192)
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
                vectors, num_vectors, order = packing.packed_hidden(
                    backbone, tokens, first_position=first_position, first_only=first_only
                )
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


def _layers(backbone: Any) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """The list of the model's layers, and where it hangs; None where there is none."""
    lists = [(owner, name, layers) for owner in backbone.modules() for name, layers in owner.named_children()
             if isinstance(layers, nn.ModuleList)]  # fmt: skip
    return max(lists, key=lambda found: sum(p.numel() for p in found[2].parameters()), default=None)


@contextmanager
def _first_layers(backbone: Any) -> Iterator[nn.Module]:
    """For a while the model has only as many layers as show each kind of attention; the first of them is given."""
    found = _layers(backbone)
    if found is None:  # nothing to leave out
        yield backbone
        return
    owner, name, layers = found
    kinds = list(getattr(backbone.config, "layer_types", None) or ["full_attention"])
    setattr(owner, name, layers[: 1 + max(kinds.index(kind) for kind in set(kinds))])
    try:
        yield layers[0]
    finally:
        setattr(owner, name, layers)


def _refuse_missing_weights(name: str | Path, backbone: Any, info: dict[str, Any]) -> None:
    missing = set(info["missing_keys"])
    pooler = {key for key in missing if key.startswith("pooler.")}
    if missing - pooler:
        raise UserError(
            f"{name}: the checkpoint lacks weights of {type(backbone).__name__}: {', '.join(sorted(missing)[:5])}"
        )
    if pooler:  # a random pooler, which nothing uses, must not get into what we save
        backbone.pooler = None


def _read_file(name: str | Path, file: str, **hub: Any) -> Any:
    """A JSON file of a model, None where it has none."""
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")}
    found = cached_file(str(name), file, **hub, **quiet)
    if found is None:
        return None
    try:
        return json.loads(Path(found).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{name}/{file}: not JSON: {error}") from None


def read_settings(name: str | Path, **hub: Any) -> EncoderSettings:
    """What a checkpoint's sentence-transformers files state; nothing stated without them."""
    modules = _read_file(name, "modules.json", **hub)
    if not modules:
        return EncoderSettings()
    if not isinstance(modules, list) or not all(isinstance(m, dict) and "type" in m and "path" in m for m in modules):
        raise UserError(f"{name}/modules.json: is not the list of modules that sentence-transformers writes")
    pooling: Any = None
    for module in modules:
        if module["type"].endswith("Pooling"):
            config = _read_file(name, f"{module['path']}/config.json", **hub) or {}
            chosen = [ours for flag, ours in _POOLING_FLAGS.items() if config.get(flag)]
            pooling = _POOLING_NAMES.get(config.get("pooling_mode", ""), chosen[0] if len(chosen) == 1 else None)
            if pooling is None:
                logger.warning("%s states a pooling that this project lacks (%s); using cls", name, config)
        elif not module["type"].endswith(("Transformer", "Normalize")):
            logger.warning("%s has a module %s, which this project leaves out", name, module["type"])
    sentence_config = _read_file(name, "sentence_bert_config.json", **hub) or {}
    length = sentence_config.get("max_seq_length")
    if length is None:  # sentence-transformers 6 keeps it with the tokenizer, which has 10^30 for "none"
        length = (_read_file(name, "tokenizer_config.json", **hub) or {}).get("model_max_length")
    prompts = (_read_file(name, "config_sentence_transformers.json", **hub) or {}).get("prompts") or {}
    return EncoderSettings(
        pooling=pooling,
        normalize=any(module["type"].endswith("Normalize") for module in modules),
        max_length=int(length) if length and length < 1_000_000 else None,
        query_prompt=prompts.get("query"),
        passage_prompt=prompts.get("passage")
        or prompts.get("document")
        or prompts.get("passage", prompts.get("document")),
    )


def write_settings(folder: Path, settings: EncoderSettings, embedding_size: int) -> None:
    """The files that tell sentence-transformers (2 to 6) pooling, normalization, prompts and length."""

    def write(file: str, value: Any) -> None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    modules = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * bool(
        settings.normalize
    )
    write(
        "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
    )
    flags = {flag: settings.pooling == ours for flag, ours in _POOLING_FLAGS.items()}
    others = ("max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
    write(
        "1_Pooling/config.json",
        {"word_embedding_dimension": embedding_size, **flags, **{f"pooling_mode_{name}": False for name in others}},
    )
    if settings.normalize:
        (folder / "2_Normalize").mkdir(exist_ok=True)
    length = {"max_seq_length": settings.max_length} if settings.max_length else {}
    write("sentence_bert_config.json", {**length, "do_lower_case": False})
    passage_prompt = settings.passage_prompt or ""
    write(
        "config_sentence_transformers.json",
        {
            "prompts": {"query": settings.query_prompt or "", "passage": passage_prompt, "document": passage_prompt},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if settings.normalize else "dot",
        },
    )
