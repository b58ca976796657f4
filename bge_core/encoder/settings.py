"""What a model folder states beyond its weights: pooling, normalization, length, prompts; read and written."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from bge_core import UserError
from bge_core.runtime.flags import Pooling

logger = logging.getLogger(__name__)

# Each pooling in sentence-transformers' files: the flag of versions 2 to 5, the value of version 6.
_POOLING_NAMES: dict[Pooling, tuple[str, str]] = {
    "cls": ("pooling_mode_cls_token", "cls"),
    "mean": ("pooling_mode_mean_tokens", "mean"),
    "last_token": ("pooling_mode_lasttoken", "lasttoken"),
}


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
            names = [ours for ours, (_, value) in _POOLING_NAMES.items() if config.get("pooling_mode") == value]
            names = names or [ours for ours, (flag, _) in _POOLING_NAMES.items() if config.get(flag)]
            pooling = names[0] if len(names) == 1 else None
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
    flags = {flag: settings.pooling == ours for ours, (flag, _) in _POOLING_NAMES.items()}
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
