"""Can these models be merged, and what does the result state? What changes a vector agrees, but the weights' values."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

from bge_core import UserError
from bge_core.encoder.code import model_code
from bge_core.encoder.fingerprint import influential, tokenizer_text
from bge_core.encoder.settings import EncoderSettings
from bge_core.merging.methods import joined
from bge_core.merging.model_folders import ModelFolder, open_model_folder

logger = logging.getLogger(__name__)
_ABSENT = "absent"
_LONGEST = 100  # characters of a value that a message shows
_NOT_READING = ("version", "decoder", "added_tokens")  # of a tokenizer; the ids of all tokens are compared anyway


class _Part(NamedTuple):
    """Of a model: words before a field's name in a message, the fields, whether one that only one model has counts."""

    words: str
    values: dict[str, Any]
    is_whole: bool


def open_model_folders(names: Sequence[str], **hub: Any) -> list[ModelFolder]:
    """Open all models.

    Raises:
        UserError: two cannot be merged: they, the field in which they differ, and both values are named. Compared are
            all fields of configuration and tokenizer that may change a vector, the model's code, the weights' shapes,
            and what the sentence-transformers files state, but for prompts and the longest text.
    """
    folders = [open_model_folder(str(name), **hub) for name in names]
    described = [_parts(folder) for folder in folders]
    for (one, ours), (other, theirs) in combinations(zip(folders, described, strict=True), 2):
        for part, same in zip(ours, theirs, strict=True):
            keys = part.values.keys() | same.values.keys() if part.is_whole else part.values.keys() & same.values.keys()
            for key in sorted(keys):
                for name, *values in _differences(part.values.get(key, _ABSENT), same.values.get(key, _ABSENT), key):
                    shown = " and ".join(str(value)[:_LONGEST] for value in values)
                    raise UserError(f"{one.name} and {other.name} cannot be merged: {part.words}{name} is {shown}")
    return folders


def _parts(folder: ModelFolder) -> list[_Part]:
    """What a vector depends on, the most telling first."""
    config, settings, tokenizer = folder.backbone.config, folder.settings, folder.tokenizer.backend_tokenizer
    reading = json.loads(tokenizer_text(tokenizer))
    if isinstance(reading["model"]["vocab"], dict):  # else pieces with their scores
        del reading["model"]["vocab"]
    stated = {name: value for name, value in settings.scoring.items() if name != "normalize"}
    stated["do_lower_case"] |= tokenizer.normalizer is not None and tokenizer.normalizer.normalize_str("A") == "a"
    return [
        _Part("", {"model_type": config.model_type}, True),
        _Part("", influential(config.to_dict()), False),  # what one file alone has, the class does not read
        _Part("", {"the model's code": model_code(folder.backbone)}, True),
        _Part("the shape of ", {name: tuple(read().shape) for name, read in folder.tensors.items()}, False),
        _Part("the tokenizer's id of ", {repr(t): i for t, i in folder.tokenizer.get_vocab().items()}, True),
        _Part("the tokenizer's ", {"truncation_side": folder.tokenizer.truncation_side}, True),
        _Part("the tokenizer's ", {n: value for n, value in reading.items() if n not in _NOT_READING}, True),
        _Part("", stated if settings.is_stated else {}, False),
    ]


def _differences(ours: Any, theirs: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Where two values differ, as deep as both have the same structure, and both values there."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            yield from _differences(ours.get(key, _ABSENT), theirs.get(key, _ABSENT), f"{name}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(*pair, f"{name}.{i}")
    elif ours != theirs:
        yield name, ours, theirs


def merged_settings(folders: Sequence[ModelFolder], prompts_from: str | None = None) -> EncoderSettings:
    """What the result states: modules and similarity of the first model that states them, prompts that any states.

    Args:
        folders: that can be merged.
        prompts_from: the model whose prompts count where two are different; None: that is an error.

    Raises:
        UserError: two prompts of one name, or no such model.
    """
    if prompts_from is not None and prompts_from not in [of.name for of in folders]:
        raise UserError(f"--prompts_from {prompts_from}: is none of the models {joined(of.name for of in folders)}")
    stated = [of for of in folders if of.settings.is_stated]
    settings = stated[0].settings if stated else EncoderSettings(pooling="cls", normalize=True)
    lengths = {of.settings.max_length: of.name for of in reversed(stated) if of.settings.max_length}
    if len(lengths) > 1:
        logger.warning("the models state other lengths (%s); the result has the first", joined(reversed(lengths)))
    prompts = _merged_prompts(sorted(stated, key=lambda of: of.name != prompts_from), prompts_from is None)
    names = [of.settings.default_prompt_name for of in stated if of.settings.default_prompt_name]
    return replace(
        settings,
        max_length=next(iter(reversed(lengths)), None),
        query_prompt=prompts.pop("query_prompt", None),
        passage_prompt=prompts.pop("passage_prompt", None),
        other_prompts=prompts,
        default_prompt_name=names[0] if names else None,
    )


def _merged_prompts(folders: Sequence[ModelFolder], refuse: bool) -> dict[str, str]:
    """Of each name the first text that is not empty, which is as good as none."""
    found: dict[str, tuple[str, str]] = {}
    for folder in folders:
        settings = folder.settings
        named = {"query_prompt": settings.query_prompt, "passage_prompt": settings.passage_prompt}
        named |= settings.other_prompts
        for name, text in named.items():
            known, of = found.get(name, ("", folder.name))
            if refuse and text and known not in ("", text):
                what = f"{of} and {folder.name} cannot be merged: the prompt {name.removesuffix('_prompt')!r}"
                remedy = f"--prompts_from {folder.name} takes that model's"
                raise UserError(f"{what} is {known!r} and {text!r}; {remedy}")
            if text is not None and not known:
                found[name] = text, folder.name
    return {name: text for name, (text, _) in found.items()}


def merged_names(folders: Sequence[ModelFolder]) -> list[str]:
    """The tensors of the merged model: the first model's, without its pooler unless every model has one."""
    names = set(folders[0].tensors)
    poolers = {name for name in names if name.startswith("pooler.")}
    if lacking := [of.name for of in folders if poolers - of.tensors.keys()]:
        logger.info("%s: no pooler, which no embedding uses; the result has none either", joined(lacking))
        names -= poolers
    return sorted(names)
