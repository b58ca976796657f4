"""Model folders to merge: opened without reading their weights, and compared."""

import functools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import cached_file

from bge_core import UserError
from bge_core.encoder.load import load_encoder, refuse_adapter
from bge_core.encoder.settings import EncoderSettings, read_settings
from bge_core.files import atomic
from bge_core.files.records import Row
from bge_core.merging.methods import joined

logger = logging.getLogger(__name__)
_QUIET: Any = {f"_raise_exceptions_for_{x}": False for x in ("missing_entries", "gated_repo", "connection_errors")}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk: its transformers model without weights, its tokenizer, what its sentence-transformers files say.

    `tensors` holds a function for each tensor, by the backbone's names, that maps it from its file.
    """

    name: str
    backbone: Any
    tokenizer: Any
    settings: EncoderSettings
    files: list[Path]
    tensors: dict[str, Callable[[], Tensor]]

    @functools.cached_property
    def inputs(self) -> list[Row]:
        """The files of its weights as entries of a manifest, hashed once."""
        return [{"path": str(file), "sha256": atomic.sha256(file), "model": self.name} for file in self.files]


def open_model_folders(names: Sequence[str], **hub: Any) -> list[ModelFolder]:
    """Open all models; UserError where they cannot be merged: both and what differs are named."""
    folders = [open_model_folder(str(name), **hub) for name in names]
    for one, other in combinations(folders, 2):
        _refuse_difference(one, other)
    return folders


def open_model_folder(name: str, **hub: Any) -> ModelFolder:
    """Open a hub model or a folder without reading its weights.

    They are read later, tensor by tensor, from safetensors files with the backbone's names (or those of a model with a
    head: a prefix more). Any other model (pytorch_model.bin, names of old versions) transformers loads whole.

    Raises:
        UserError: not a model, not reachable, damaged, weights missing, a LoRA adapter.
    """
    access = {key: hub.get(key) for key in ("cache_dir", "token")}
    refuse_adapter(name, **access)
    try:
        config = AutoConfig.from_pretrained(name, **hub)
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
        with torch.device("meta"):
            backbone = AutoModel.from_config(config, trust_remote_code=hub.get("trust_remote_code"))
    except (OSError, ValueError, KeyError):
        load_encoder(name, attention="padded", **hub)  # says what is wrong, as in every other stage
        raise
    names = set(backbone.state_dict())
    files = _weight_files(name, **access)
    tensors: dict[str, Callable[[], Tensor]] = {}
    for file in files if all(file.suffix == ".safetensors" for file in files) else []:
        try:
            stored = safe_open(file, "pt")
            keys = list(stored.keys())
        except SafetensorError as error:
            raise UserError(f"{name}: {file} is not a whole safetensors file ({error}); fetch it again") from None
        for key in keys:
            own = key if key in names else key.removeprefix(f"{backbone.base_model_prefix}.")
            read = functools.partial(_read_tensor, stored, key)
            if own in names or not read().is_floating_point():  # position ids, which older versions stored
                tensors[own] = read
    if any(key not in tensors and not key.startswith("pooler.") for key in names):
        state = load_encoder(name, attention="padded", **hub).backbone.state_dict()
        tensors = {key: functools.partial(state.__getitem__, key) for key in state}
    return ModelFolder(name, backbone, tokenizer, read_settings(name, **access), files, tensors)


def _read_tensor(stored: Any, key: str) -> Tensor:
    """Memory-mapped: nothing is copied."""
    tensor: Tensor = stored.get_tensor(key)
    return tensor


def _weight_files(name: str, **hub: Any) -> list[Path]:
    """The files that transformers would take: one, or the shards that an index lists; none where it finds none."""
    find: Callable[[str], str | None] = functools.partial(cached_file, name, **hub, **_QUIET)
    present = next(filter(None, map(find, _WEIGHTS)), None)
    if present is None or not present.endswith(".json"):
        return [Path(present)] if present else []
    index = json.loads(Path(present).read_text(encoding="utf-8"))
    found = {shard: find(shard) for shard in sorted(set(index["weight_map"].values()))}
    if absent := [shard for shard, path in found.items() if path is None]:
        raise UserError(f"{name}: lacks {joined(absent)}, which {Path(present).name} lists; fetch it again")
    return [Path(path) for path in found.values() if path]


def _refuse_difference(one: ModelFolder, other: ModelFolder) -> None:
    def same(what: str, ours: object, theirs: object) -> None:
        if ours != theirs:
            raise UserError(f"{one.name} and {other.name} cannot be merged: {what} is {ours} and {theirs}")

    ours, theirs = one.backbone.config, other.backbone.config
    for field in ("model_type", "num_attention_heads"):  # another number of heads has the same shapes
        same(field, getattr(ours, field, None), getattr(theirs, field, None))
    keys, other_keys = set(one.backbone.state_dict()), set(other.backbone.state_dict())
    for key in sorted(key for key in keys ^ other_keys if not key.startswith("pooler.")):
        same(f"weight {key}", *("present" if key in held else "absent" for held in (keys, other_keys)))
    for key in sorted(one.tensors.keys() & other.tensors.keys()):
        same(f"the shape of {key}", *(tuple(c.tensors[key]().shape) for c in (one, other)))
    ids, other_ids = one.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    for token in sorted(token for token, _ in ids.items() ^ other_ids.items())[:1]:
        same(f"the tokenizer's id of {token!r}", ids.get(token, "absent"), other_ids.get(token, "absent"))
    if one.settings.pooling and other.settings.pooling:
        same("pooling", one.settings.pooling, other.settings.pooling)


def merged_settings(folders: Sequence[ModelFolder]) -> EncoderSettings:
    """Each setting as the first model that states it has it (else cls, normalized); a contradiction is warned of."""
    stated: dict[str, Any] = {}
    for name in (field.name for field in fields(EncoderSettings)):
        for folder in folders:
            value = getattr(folder.settings, name)
            if value is not None and stated.setdefault(name, value) != value:
                logger.warning("%s: has %s %r; the result has %r", folder.name, name, value, stated[name])
    return replace(EncoderSettings(pooling="cls", normalize=True), **stated)


def merged_names(folders: Sequence[ModelFolder]) -> list[str]:
    """The tensors of the merged model: the first model's, without its pooler unless every model has one."""
    names = set(folders[0].tensors)
    poolers = {name for name in names if name.startswith("pooler.")}
    if lacking := [of.name for of in folders if poolers - of.tensors.keys()]:
        logger.info("%s: no pooler, which no embedding uses; the result has none either", joined(lacking))
        names -= poolers
    return sorted(names)
