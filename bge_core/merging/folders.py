"""Models merged tensor by tensor and written as a folder: weighted averages, and the other ways of methods.py.

    theta = sum_m w_m theta_m,   sum_m w_m = 1,   in float32

Averaging a fine-tuned model with its base keeps much of what fine-tuning forgets. A few tensors are in memory at a
time, whatever the number of models. Source: Xiao et al. 2023, "LM-Cocktail", and its package LM_Cocktail 0.0.4.
"""

import functools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bge_core import UserError
from bge_core.encoder.code import save_code
from bge_core.encoder.dense import save_dense
from bge_core.encoder.packing import max_length
from bge_core.encoder.settings import EncoderSettings, save_tokenizer, write_settings
from bge_core.files import atomic
from bge_core.files.records import Row
from bge_core.merging.compare import merged_names, merged_settings, open_model_folders
from bge_core.merging.methods import (
    DENSITY,
    Merged,
    check_arguments,
    check_weights,
    joined,
    linear,
    needs_base,
    slerp,
    task_arithmetic,
    ties,
)
from bge_core.merging.model_folders import DENSE, ModelFolder
from bge_core.runtime.config import MergeMethod, MergeType

logger = logging.getLogger(__name__)

OUTPUTS = ("model.safetensors", "manifest.json", "the files of configuration and tokenizer")

_INTEGERS = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_TYPE_NAMES = {**_FLOATS, torch.bool: "BOOL", **_INTEGERS}
PIECE = 2**15  # entries that are averaged at a time: they stay in the cache, and torch takes no second thread for them
Averages = Iterator[tuple[str, Tensor]]
Combine = Callable[[Sequence[Tensor], Sequence[float]], Merged]


def merge_folders(
    models: Sequence[str],
    weights: Sequence[float],
    output_path: str | Path,
    *,
    method: MergeMethod = "linear",
    base_model: str | None = None,
    density: float | None = None,
    dtype: MergeType = "float32",
    prompts_from: str | None = None,
    overwrite: bool = False,
    **hub: Any,
) -> Row:
    """Write the weighted average of models, or what another method makes of them, as a folder, whole or not at all.

    Configuration, tokenizer, modules and similarity are the first model's (what it does not state, the next one's that
    does); prompts are those that any model states. Integer tensors are copied from the first; one that differs
    elsewhere is an error (LM_Cocktail takes the last model's). A pooler that not every model has is left out: no
    embedding uses it.

    Args:
        models: hub names or folders; at least one.
        weights: one a model, used as they are, summing to 1 within 1e-3 (of task_arithmetic: any finite numbers); below
            0 is allowed (not of ties).
        output_path: where the result goes.
        method: "linear", "slerp" (of two models), "task_arithmetic" or "ties", see methods.py.
        base_model: of the last two: what the models were fine-tuned from.
        density: of ties; None: 0.2.
        dtype: of the result, computed in float32; "keep": the first model's.
        prompts_from: the model whose prompts count where two are different; None: that is an error.
        overwrite: replace a model there; files of other names stay.
        hub: cache_dir, token, trust_remote_code.

    Returns:
        The manifest.

    Raises:
        UserError: weights or arguments that do not fit, models that differ (they and what differs are named), an output
            folder that holds something, a disk that is full.
    """
    check_arguments(method, len(models), base_model, density)
    check_weights(models, weights, method)
    everything = [*models, *filter(None, [base_model])]
    refuse_output(output_path, everything, overwrite)
    folders = open_model_folders(everything, **hub)
    settings = merged_settings(folders, prompts_from)
    return write_merged(folders, weights, output_path, settings, method=method, density=density, dtype=dtype)


def write_merged(
    folders: Sequence[ModelFolder],
    weights: Sequence[float],
    output_path: str | Path,
    settings: EncoderSettings,
    *,
    method: MergeMethod = "linear",
    density: float | None = None,
    dtype: MergeType = "float32",
    config: Row | None = None,
    inputs: Sequence[Row] = (),
    facts: Row | None = None,
) -> Row:
    """As `merge_folders`, of models that are open, with checked arguments, into a folder that may be overwritten.

    Args:
        folders: the models, and behind them the base where the method wants one.
        settings: what the result states.
        weights, output_path, method, density, dtype: of `merge_folders`.
        config, inputs, facts: settings, further input files and further entries for the manifest.
    """
    if method == "task_arithmetic" and math.isclose(math.fsum(weights), 1):
        told = "weights %s sum to 1: the base cancels out, and the result is that of --method linear"
        logger.warning(told, joined(weights))
    names, first = merged_names(folders), folders[0]
    density = DENSITY if density is None else density
    combine, result_type = _combine(method, density), _result_type(dtype, first)
    facts = {
        "models": [of.name for of in folders[: len(weights)]],
        "weights": [float(w) for w in weights],
        "pooling": settings.pooling,
        "method": method,
        "dtype": str(result_type).removeprefix("torch."),
        **({"base_model": folders[-1].name} if needs_base(method) else {}),
        **({"density": density} if method == "ties" else {}),
        **(facts or {}),
    }
    try:
        with _model_folder(Path(output_path)) as temporary, ThreadPoolExecutor() as hashing:
            described = hashing.map(lambda of: of.inputs, folders)
            temporary.mkdir()
            like = {name: torch.empty_like(first.tensors[name](), device="meta") for name in names}
            like = {name: t.to(result_type) if t.is_floating_point() else t for name, t in like.items()}
            dense = {name: like.pop(name) for name in names if name.startswith(DENSE)}
            merged = functools.partial(average, folders, weights, combine=combine, dtype=result_type)
            _write_safetensors(temporary / "model.safetensors", like, merged(like))
            save_dense(temporary, settings.dense, _whole(dense, merged(dense)))
            _save_what_is_stated(temporary, first, settings, result_type)
            files = [line for lines in described for line in lines]
            manifest = atomic.make_manifest("merge", config or facts, [*files, *inputs], **facts)
            atomic.write_json(temporary / "manifest.json", manifest)
    except OSError as error:
        raise UserError(f"{output_path}: the merged model could not be written: {error}") from None
    return manifest


def refuse_output(output_path: str | Path, models: Sequence[str], overwrite: bool) -> None:
    """Before any work: may the merged model go there? UserError if not; asking leaves nothing behind."""
    folder = Path(output_path)
    if any(Path(name).exists() and Path(name).resolve() == folder.resolve() for name in models):
        raise UserError(f"{folder}: is one of the models to merge; name another folder")
    absent = not folder.exists()
    atomic.refuse_foreign_folder(folder, overwrite, OUTPUTS)
    if absent:
        folder.rmdir()


def average(
    folders: Sequence[ModelFolder],
    weights: Sequence[float],
    names: Iterable[str],
    combine: Combine = linear,
    dtype: torch.dtype = torch.float32,
) -> Averages:
    """Yield sum_m w_m theta_m, or what `combine` gives, flattened, in pieces, each with its name; integers are copied.

    A tensor of more than PIECE entries comes in several pieces: its whole size is never held.

    Args:
        folders: the models, and behind them the base where `combine` wants one.
        weights: one a model.
        names: the tensors, in the order in which they come.
        combine: a way of methods.py, which computes in float32.
        dtype: to which the result is rounded.

    Raises:
        UserError: an integer tensor that differs between models, or a result that is not finite.
    """
    models = joined(of.name for of in folders)
    remedy = " in float16; try --dtype bfloat16" if dtype == torch.float16 else "; is one of them broken?"
    for name in names:
        readers = [of.tensors[name] for of in folders if name in of.tensors]
        first = readers[0]()
        if not first.is_floating_point():
            if not all(torch.equal(first, read()) for read in readers[1:]):
                raise UserError(f"{models} cannot be merged: {name} holds integers, and they differ")
            yield name, first.reshape(-1)
            continue
        merged = combine([read().reshape(-1) for read in readers], weights)
        for start in range(0, first.numel(), PIECE):
            total = merged(slice(start, start + PIECE)).to(dtype)
            if not (total.sum().isfinite() or total.isfinite().all()):  # the sum is faster, but may overflow
                raise UserError(f"{models} cannot be merged: {name} would be NaN or infinite{remedy}")
            yield name, total


@contextmanager
def _model_folder(folder: Path) -> Iterator[Path]:
    """A path for a folder that takes `folder`'s place with one rename.

    A folder that holds something, or is a mount point, stays: it gets the new files one by one, the manifest last.
    """
    if not folder.is_dir() or not (os.path.ismount(folder) or any(folder.iterdir())):
        with atomic.atomic_path(folder) as temporary:
            yield temporary
        return
    staged = folder / ".merged"
    try:
        with atomic.atomic_path(staged) as temporary:
            yield temporary
        (folder / "manifest.json").unlink(missing_ok=True)  # an earlier one must not vouch for a mixture
        keep_last = shutil.ignore_patterns("manifest.json")
        shutil.copytree(staged, folder, ignore=keep_last, copy_function=os.replace, dirs_exist_ok=True)
        os.replace(staged / "manifest.json", folder / "manifest.json")
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _write_safetensors(path: Path, like: dict[str, Tensor], pieces: Averages) -> None:
    """A safetensors file from pieces of tensors in the order of `like` (the library wants all tensors at once).

    The format: 8 bytes with the header's length, the header (JSON: type, shape and place of each tensor), the data.
    """
    header: Row = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in like.items():
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, piece in pieces:
            file.write(piece.view(torch.uint8).numpy().data)  # numpy has no bfloat16


def _whole(like: dict[str, Tensor], pieces: Averages) -> dict[str, Tensor]:
    """The small tensors of Dense modules, whole."""
    found: dict[str, list[Tensor]] = {name: [] for name in like}
    for name, piece in pieces:
        found[name].append(piece)
    return {name.removeprefix(DENSE): torch.cat(of).view(like[name].shape) for name, of in found.items()}


def _combine(method: str, density: float) -> Combine:
    """The function of methods.py; a soup is no way to merge, but a choice of models."""
    ways: dict[str, Combine] = {
        "linear": linear,
        "slerp": slerp,
        "task_arithmetic": task_arithmetic,
        "ties": functools.partial(ties, density=density),
    }
    if method not in ways:
        raise UserError(f"method {method!r}: use one of {joined(ways)}")
    return ways[method]


def _result_type(name: MergeType, first: ModelFolder) -> torch.dtype:
    """A type by its name; `keep`: what the first model's configuration says, else its tensors."""
    if name != "keep":
        return getattr(torch, name)  # type: ignore[no-any-return]
    stored = [read().dtype for read in first.tensors.values() if read().is_floating_point()]
    dtype: torch.dtype = first.backbone.config.dtype or functools.reduce(torch.promote_types, stored)
    if dtype not in _FLOATS:
        raise UserError(f"--dtype keep: {first.name} is {dtype}; name the type, as --dtype float32")
    return dtype


def _save_what_is_stated(folder: Path, first: ModelFolder, settings: EncoderSettings, dtype: torch.dtype) -> None:
    """Configuration, model code, tokenizer and sentence-transformers' files."""
    config = first.backbone.config
    config.architectures, config.dtype = [type(first.backbone).__name__], dtype
    config.save_pretrained(folder)
    save_code(folder, first.backbone)
    save_tokenizer(first.tokenizer, folder)
    write_settings(folder, settings, config.hidden_size, min(max_length(first.backbone), 8192))
