"""Model folders to merge, opened without reading their weights."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import cached_file

from bge_core import UserError
from bge_core.encoder.dense import dense_file, load_dense
from bge_core.encoder.load import load_encoder, refuse_other_models, settings_of
from bge_core.encoder.settings import EncoderSettings
from bge_core.files import atomic
from bge_core.files.records import Row
from bge_core.merging.methods import joined

_QUIET: Any = {f"_raise_exceptions_for_{x}": False for x in ("missing_entries", "gated_repo", "connection_errors")}
DENSE = "dense/"  # before the names of Dense modules' tensors: a backbone has none of that kind
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk: its transformers model without weights, its tokenizer, what its sentence-transformers files say.

    `tensors` holds a function for each tensor that maps it from its file: by the backbone's names, and those of Dense
    modules by `DENSE` and the name that they have together.
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


def open_model_folder(name: str, **hub: Any) -> ModelFolder:
    """Open a hub model or a folder without reading its weights.

    They are read later, tensor by tensor, from safetensors files with the backbone's names (or those of a model with a
    head: a prefix more). Any other model (pytorch_model.bin, names of old versions) transformers loads whole.

    Raises:
        UserError: not a model, not reachable, damaged, weights missing, a LoRA adapter.
    """
    access = {key: hub.get(key) for key in ("cache_dir", "token")}
    settings = settings_of(name, **access)
    inside = {"subfolder": settings.transformer_path}
    try:
        config = AutoConfig.from_pretrained(name, **inside, **hub)
        tokenizer = AutoTokenizer.from_pretrained(name, **inside, **hub)
        with torch.device("meta"):
            backbone = AutoModel.from_config(config, trust_remote_code=hub.get("trust_remote_code"))
    except (OSError, ValueError, KeyError):
        load_encoder(name, attention="padded", **hub)  # says what is wrong, as in every other stage
        raise
    refuse_other_models(name, backbone, tokenizer)
    names = set(backbone.state_dict())
    files = _weight_files(name, **inside, **access)
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
    dense = load_dense(name, settings.dense, config.hidden_size, torch.float32, **access).state_dict()
    tensors |= {DENSE + key: functools.partial(dense.__getitem__, key) for key in dense}
    files += [dense_file(name, of.path, **access) for of in settings.dense]
    return ModelFolder(name, backbone, tokenizer, settings, files, tensors)


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
