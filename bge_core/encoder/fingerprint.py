"""What names an encoder by what it computes, wherever it lies."""

import json
from typing import Any

import torch
import xxhash

# Where a config came from and how it is run. Fields that begin with "_" or name a dropout do not change a vector, too.
_NO_INFLUENCE = {"transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "use_cache"}


def fingerprint(encoder: Any) -> str:
    """Hash of what determines a vector: weights, config, tokenizer, pooling, normalization; not where they came from.

    Device and attention kernel are left out: they change last bits. So is dropout, which encoding switches off.

    Args:
        encoder: a model.Encoder on any device, its weights whole (not FSDP). At most one tensor is copied at a time,
            and none that lies on the CPU.

    Returns:
        32 hexadecimal digits.
    """
    config = [type(encoder.backbone).__name__, _influential(encoder.backbone.config.to_dict())]
    settings = [encoder.tokenizer.truncation_side, encoder.settings.pooling, encoder.settings.normalize]
    digest = xxhash.xxh3_128(_json([config, settings, _tokenizer_text(encoder.tokenizer.backend_tokenizer)]))
    for name, tensor in [*encoder.backbone.state_dict().items(), *encoder.dense.state_dict().items()]:
        digest.update(_json([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tokenizer_text(tokenizer: Any) -> str:
    """The tokenizer as JSON, without what its last call left behind in it; that is put back."""
    truncation, padding = tokenizer.truncation, tokenizer.padding
    tokenizer.no_truncation()
    tokenizer.no_padding()
    text: str = tokenizer.to_str()
    if truncation:
        tokenizer.enable_truncation(**truncation)
    if padding:
        tokenizer.enable_padding(**padding)
    return text


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _influential(value: Any) -> Any:
    """A config, and each part of it, without the fields that do not change a vector."""
    if isinstance(value, dict):
        names = [n for n in value if n not in _NO_INFLUENCE and not str(n).startswith("_") and "drop" not in str(n)]
        return {str(name): _influential(value[name]) for name in names}
    return [_influential(item) for item in value] if isinstance(value, (list, tuple)) else value
