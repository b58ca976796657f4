"""Load an encoder from the hub or a folder."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer

from bge_core import UserError
from bge_core.encoder.model import Encoder
from bge_core.encoder.selfcheck import packed_or_padded
from bge_core.encoder.settings import read_settings
from bge_core.runtime.flags import Attention, Pooling

logger = logging.getLogger(__name__)


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
        normalize: None: what those files say, else True. Chosen, it decides the similarity, too: cosine or dot.
        dtype: of the weights; float32 master weights unless told otherwise, whatever the checkpoint was saved in.
        attention: how a batch is computed, see packing.py. A model that packed texts change is padded, with a warning.
        attention_dropout: of the attention weights in training; None: what the checkpoint says.

    Returns:
        The encoder, on the CPU, in eval mode.

    Raises:
        UserError: not a model, not reachable, weights missing.
    """
    hub: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "trust_remote_code": trust_remote_code}
    backbone, tokenizer, info = open_pretrained(
        AutoModel, name, tokenizer_name=tokenizer_name, attention_dropout=attention_dropout, dtype=dtype, **hub
    )
    _refuse_missing_weights(name, backbone, info)
    stored = read_settings(name, cache_dir=cache_dir, token=token)
    if pooling and stored.pooling and pooling != stored.pooling:
        logger.warning("%s was trained with %s pooling; you chose %s", name, stored.pooling, pooling)
    settings = replace(stored, pooling=pooling or stored.pooling or "cls")
    if normalize is not None:
        settings = replace(settings, normalize=normalize, similarity="cosine" if normalize else "dot")
    elif stored.normalize is None:
        settings = replace(settings, normalize=True)
    if attention != "padded":
        attention = packed_or_padded(name, backbone, attention)
    return Encoder(backbone, tokenizer, settings, attention).eval()


def open_pretrained(
    kind: Any,
    name: str | Path,
    *,
    flag: str = "",
    what: str = "model",
    tokenizer_name: str | None = None,
    attention_dropout: float | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Any, Any, dict[str, Any]]:
    """Model, fast tokenizer and what transformers says of the weights.

    Args:
        kind: the class of transformers that loads it, as AutoModel.
        name: hub name or folder.
        flag, what: for messages: how the user named it, and what it should be.
        options: of `from_pretrained`, of the model; those of the hub are for the tokenizer, too.

    Raises:
        UserError: not such a model, not reachable, no fast tokenizer.
    """
    folder, label = Path(name), f"{flag} {name}".strip()
    hub = {key: value for key, value in options.items() if key in ("cache_dir", "token", "trust_remote_code")}
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{label}: is not a model folder (it has no config.json)")
    if not folder.exists() and (str(name).startswith((".", "/", "~")) or str(name).count("/") > 1):
        raise UserError(f"{label}: no such folder")
    if not folder.exists() and folder.parent.is_dir() and str(folder.parent) != ".":
        logger.warning("%s: there is no such folder in %s; taken as a name of the hub", name, folder.parent)
    try:
        config = AutoConfig.from_pretrained(name, **hub)
        if attention_dropout is not None:
            set_attention_dropout(config, attention_dropout)
        model, info = kind.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name or name, use_fast=True, **hub)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is not None and not folder.is_dir():
            raise
        raise UserError(
            f"{label}: could not be loaded as a {what}: {str(error).strip().splitlines()[0]}\n"
            "Give a folder, or a hub name; where the hub is out of reach, set HF_ENDPOINT to a mirror."
        ) from None
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        label = tokenizer_name or label
        raise UserError(f"{label}: needs a fast tokenizer (tokenizer.json) with a padding token")
    return model, tokenizer, info


def set_attention_dropout(config: Any, dropout: float) -> None:
    """Set the dropout of attention weights, whatever the model calls it. UserError where it has none."""
    found = [name for name in ("attention_probs_dropout_prob", "attention_dropout") if hasattr(config, name)]
    if not found:
        raise UserError(f"--attention_dropout: a {config.model_type} model has none")
    for name in found:
        setattr(config, name, dropout)


def _refuse_missing_weights(name: str | Path, backbone: Any, info: dict[str, Any]) -> None:
    missing = set(info["missing_keys"])
    pooler = {key for key in missing if key.startswith("pooler.")}
    if missing - pooler:
        raise UserError(
            f"{name}: the checkpoint lacks weights of {type(backbone).__name__}: {', '.join(sorted(missing)[:5])}"
        )
    if pooler:  # a random pooler, which nothing uses, must not get into what we save
        backbone.pooler = None
