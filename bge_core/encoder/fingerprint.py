"""What names an encoder by what it computes, wherever it lies."""

import json
from typing import Any

import torch
from tokenizers.pre_tokenizers import BertPreTokenizer, PreTokenizer

from bge_core.encoder.code import model_code

# Where a config came from, how its weights were drawn, how it is run, what stands behind an encoder or makes texts.
_NO_INFLUENCE = {
    "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "use_cache", "return_dict",
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "chunk_size_feed_forward", "gradient_checkpointing",
}  # fmt: skip
_NO_INFLUENCE_BEGIN = ("_", "classifier_", "initializer_", "output_")


def fingerprint(encoder: Any) -> str:
    """Hash of what determines a score: weights, config, code, tokenizer, pooling, similarity; not where it came from.

    Device and attention kernel are left out: they change last bits. So is dropout, which encoding switches off.

    Args:
        encoder: a model.Encoder on any device, its weights whole (not FSDP). At most one tensor is copied at a time,
            and none that lies on the CPU.

    Returns:
        32 hexadecimal digits.
    """
    import xxhash

    config = [
        type(encoder.backbone).__name__,
        model_code(encoder.backbone),
        influential(encoder.backbone.config.to_dict()),
    ]
    settings = [encoder.tokenizer.truncation_side, encoder.settings.scoring]
    digest = xxhash.xxh3_128(_json([config, settings, tokenizer_text(encoder.tokenizer.backend_tokenizer)]))
    for name, tensor in [*encoder.backbone.state_dict().items(), *encoder.dense.state_dict().items()]:
        digest.update(_json([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_text(tokenizer: Any) -> str:
    """The tokenizer as JSON, without what its last call left behind in it; that is put back."""
    truncation, padding = tokenizer.truncation, tokenizer.padding
    tokenizer.no_truncation()
    tokenizer.no_padding()
    splitter = tokenizer.pre_tokenizer
    if type(splitter) is PreTokenizer:  # in Python, which has no JSON (RoFormer's)
        tokenizer.pre_tokenizer = BertPreTokenizer()
    text: str = tokenizer.to_str()
    if type(splitter) is PreTokenizer:
        tokenizer.pre_tokenizer = splitter
    if truncation:
        tokenizer.enable_truncation(**truncation)
    if padding:
        tokenizer.enable_padding(**padding)
    return text


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def influential(value: Any) -> Any:
    """A config, and each part of it, without the fields that do not change a vector; no dropout does."""
    if isinstance(value, dict):
        return {str(key): influential(of) for key, of in value.items() if _influences(str(key))}
    return [influential(item) for item in value] if isinstance(value, (list, tuple)) else value


def _influences(name: str) -> bool:
    return name not in _NO_INFLUENCE and not name.startswith(_NO_INFLUENCE_BEGIN) and "drop" not in name
