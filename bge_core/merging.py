"""Merged checkpoints, read and written tensor by tensor: weighted averages, and the other ways of merge_methods.py.

    theta = sum_m w_m theta_m,   sum_m w_m = 1,   in float32

Averaging a fine-tuned model with its base keeps much of what fine-tuning forgets. A few tensors are in memory at a
time, whatever the number of models. Source: Xiao et al. 2023, "LM-Cocktail", and its package LM_Cocktail 0.0.4.

Shapes: B examples, N passages of all examples, b and n those of one batch, D embedding size.
"""

import functools
import json
import logging
import math
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import cached_file

from bge_core import UserError, records
from bge_core.config import MergeMethod, MergeType
from bge_core.encode import encode
from bge_core.loss import info_nce
from bge_core.merge_methods import DENSITY, Merged, check_arguments, linear, slerp, task_arithmetic, ties
from bge_core.model import EncoderSettings, load_encoder, read_settings, save_tokenizer, write_settings
from bge_core.records import Row

logger = logging.getLogger(__name__)

_QUIET: Any = {f"_raise_exceptions_for_{x}": False for x in ("missing_entries", "gated_repo", "connection_errors")}
OUTPUTS = ("model.safetensors", "manifest.json", "the files of configuration and tokenizer")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_INTEGERS = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_TYPE_NAMES = {**_FLOATS, torch.bool: "BOOL", **_INTEGERS}
PIECE = 2**15  # entries that are averaged at a time: they stay in the cache, and torch takes no second thread for them
Averages = Iterator[tuple[str, Tensor]]
Combine = Callable[[Sequence[Tensor], Sequence[float]], Merged]


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its transformers model without weights, its tokenizer, what its sentence-transformers files say.

    `tensors` holds a function for each tensor, by the backbone's names, that maps it from its file.
    """

    name: str
    backbone: Any
    tokenizer: Any
    settings: EncoderSettings
    files: list[Path]
    tensors: dict[str, Callable[[], Tensor]]


def mix_models(
    model_names_or_paths: Sequence[str], model_type: str, weights: Sequence[float], output_path: str | None = None,
    *, overwrite: bool = False, **hub: Any,
) -> Any:  # fmt: skip
    """LM_Cocktail's function of this name: average models with given weights.

    Args:
        model_names_or_paths, weights, overwrite, hub: of `merge_folders`.
        model_type: "encoder".
        output_path: where to save the result, too; None: nowhere.

    Returns:
        The merged transformers model, float32, in eval mode.

    Raises:
        UserError: another model_type, or as `merge_folders`.
    """
    _refuse_model_type(model_type)
    if output_path is not None:
        merge_folders(model_names_or_paths, weights, output_path, overwrite=overwrite, **hub)
        return load_encoder(output_path, attention="padded", **hub).backbone
    checkpoints = open_checkpoints(model_names_or_paths, weights, **hub)
    backbone = load_encoder(model_names_or_paths[0], attention="padded", **hub).backbone
    names = merged_names(checkpoints)
    if not any(name.startswith("pooler.") for name in names):
        backbone.pooler = None
    state = backbone.state_dict()
    filled = dict.fromkeys(state, 0)
    for name, piece in average(checkpoints, weights, [name for name in names if name in state]):
        state[name].view(-1)[filled[name] :][: len(piece)] = piece
        filled[name] += len(piece)
    return backbone


def mix_models_with_data(
    model_names_or_paths: Sequence[str], model_type: str, example_ata: Sequence[Row] | None = None,
    temperature: float = 5.0, batch_size: int = 2, max_input_length: int = 2048, neg_number: int = 7,
    output_path: str | None = None,
    *, example_data: Sequence[Row] | None = None, seed: int = 42, overwrite: bool = False, **hub: Any,
) -> Any:  # fmt: skip
    """LM_Cocktail's function of this name: average models with weights from their losses on a few examples.

    Args:
        model_names_or_paths, model_type, output_path, overwrite, hub: of `mix_models`.
        example_ata: the examples; LM_Cocktail spells it so, `example_data` is the same.
        temperature: of `weights_from_losses`.
        batch_size, max_input_length, neg_number, seed: of `example_losses`.

    Returns:
        The merged transformers model, float32, in eval mode.

    Raises:
        UserError: no examples or two sets of them, or as the functions named.
    """
    _refuse_model_type(model_type)
    if (example_ata is None) == (example_data is None):
        raise UserError("example_data: give the examples, once (example_ata is another name of it)")
    if output_path is not None:
        refuse_output(output_path, model_names_or_paths, overwrite)
    losses = example_losses(
        model_names_or_paths, example_data or example_ata or [], batch_size=batch_size,
        max_input_length=max_input_length, neg_number=neg_number, seed=seed, **hub,
    )  # fmt: skip
    weights = weights_from_losses(losses, temperature)
    return mix_models(model_names_or_paths, model_type, weights, output_path, overwrite=overwrite, **hub)


def _refuse_model_type(model_type: str) -> None:
    if model_type != "encoder":
        raise UserError(f"model_type {model_type!r}: this project trains and merges encoders only; use 'encoder'")


def weights_from_losses(losses: Sequence[float], temperature: float = 5.0) -> list[float]:
    """w_m = exp(-L_m / temperature) / sum_k exp(-L_k / temperature), in float32.

    UserError where the temperature is not above 0.
    Source: Xiao et al. 2023, eq. 3-4; LM_Cocktail 0.0.4, utils.py, compute_weights.
    """
    if not temperature > 0:
        raise UserError(f"temperature {temperature}: use a number above 0")
    weights: list[float] = torch.softmax(-torch.tensor(losses, dtype=torch.float32) / temperature, dim=-1).tolist()
    return weights


def example_losses(
    models: Sequence[str], examples: Sequence[Row],
    *, batch_size: int = 2, max_input_length: int = 2048, neg_number: int = 7, seed: int = 42, **hub: Any,
) -> list[float]:  # fmt: skip
    """Each model's InfoNCE on examples: cosines / 0.05, mean over the rows of a batch, then over batches.

    A row's candidates are the first `pos` and the drawn `neg` of every row of its batch. Vectors are pooled as the
    merged model will pool (LM_Cocktail always takes CLS); no instruction is added.

    Args:
        models: hub names or folders that can be merged.
        examples: rows with `query`, `pos` and, optionally, `neg`.
        batch_size: rows of a batch.
        max_input_length: longest text in tokens, cut to what the model takes.
        neg_number: negatives of a row, drawn with `seed` and the same for every model; all of them where it has fewer.

    Returns:
        One loss a model.

    Raises:
        UserError: no example, a bad one, a setting out of range, models that cannot be merged.

    Source: Xiao et al. 2023, section 3; LM_Cocktail 0.0.4, utils.py, embedder_loss.
    """
    if batch_size < 1 or max_input_length < 1 or neg_number < 0:
        found = f"batch_size {batch_size}, max_input_length {max_input_length}, neg_number {neg_number}"
        raise UserError(f"{found}: the first two must be above 0, the last at least 0")
    for number, row in enumerate(examples):
        if problem := records.check_training_row(row):
            raise UserError(f"example_data[{number}]: {problem}")
    if not examples:
        raise UserError("example_data: holds no row")
    pooling = merged_settings(open_checkpoints(models, **hub)).pooling
    rng = random.Random(seed)
    negatives = [rng.sample(row.get("neg") or [], min(neg_number, len(row.get("neg") or []))) for row in examples]
    groups = [[row["pos"][0], *drawn] for row, drawn in zip(examples, negatives, strict=True)]
    texts = [row["query"] for row in examples] + [text for group in groups for text in group]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    losses = []
    for name in models:
        encoder = load_encoder(name, pooling=pooling, normalize=True, **hub).to(device)
        vectors = torch.from_numpy(encode(encoder, texts, max_length=max_input_length))
        query_BD, passage_ND = vectors[: len(examples)], vectors[len(examples) :]
        losses.append(mean_loss(query_BD, passage_ND, [len(group) for group in groups], batch_size))
        logger.info("%s: loss %.4f on %d examples", name, losses[-1], len(examples))
    return losses


def mean_loss(query_BD: Tensor, passage_ND: Tensor, group_sizes: Sequence[int], batch_size: int) -> float:
    """InfoNCE of unit vectors; the `group_sizes` passages of each query lie together, its positive first."""
    losses = []
    groups = iter(passage_ND.split(list(group_sizes)))
    for query_bD in query_BD.split(batch_size):
        batch = [next(groups) for _ in query_bD]
        positive_b = torch.tensor([0, *map(len, batch[:-1])]).cumsum(0)
        score_bn = query_bD @ torch.cat(batch).T / 0.05
        losses.append(info_nce(score_bn, torch.ones_like(score_bn, dtype=torch.bool), positive_b).mean())
    return float(torch.stack(losses).mean())


def merge_folders(
    models: Sequence[str], weights: Sequence[float], output_path: str | Path,
    *, method: MergeMethod = "linear", base_model: str | None = None, density: float | None = None,
    dtype: MergeType = "float32", overwrite: bool = False, config: Row | None = None, inputs: Sequence[Row] = (),
    facts: Row | None = None, **hub: Any,
) -> Row:  # fmt: skip
    """Write the weighted average of models, or what another method makes of them, as a folder, whole or not at all.

    Configuration, tokenizer, pooling and prompts are the first model's (a setting that it does not state, the next
    one's that does). Integer tensors are copied from the first; one that differs elsewhere is an error (LM_Cocktail
    takes the last model's). A pooler that not every model has is left out: no embedding uses it.

    Args:
        models: hub names or folders; at least one.
        weights: one a model, used as they are, summing to 1 within 1e-3 (of task_arithmetic: any finite numbers); below
            0 is allowed (not of ties).
        output_path: where the result goes.
        method: "linear", "slerp" (of two models), "task_arithmetic" or "ties", see merge_methods.py.
        base_model: of the last two: what the models were fine-tuned from.
        density: of ties; None: 0.2.
        dtype: of the result, computed in float32; "keep": the first model's.
        overwrite: replace a model there; files of other names stay.
        config, inputs, facts: settings, further input files and further entries for the manifest.
        hub: cache_dir, token, trust_remote_code.

    Returns:
        The manifest.

    Raises:
        UserError: weights or arguments that do not fit, models that differ (they and what differs are named), an output
            folder that holds something, a disk that is full.
    """
    check_arguments(method, len(models), base_model, density)
    refuse_output(output_path, [*models, *filter(None, [base_model])], overwrite)
    checkpoints = open_checkpoints(models, weights, method=method, base_model=base_model, **hub)
    settings, names, first = merged_settings(checkpoints), merged_names(checkpoints), checkpoints[0]
    density = DENSITY if density is None else density
    combine, result_type = _combine(method, density), _result_type(dtype, first)
    facts = {
        "models": [str(model) for model in models], "weights": [float(w) for w in weights],
        "pooling": settings.pooling, "method": method, "dtype": str(result_type).removeprefix("torch."),
        **({"base_model": base_model} if base_model else {}), **({"density": density} if method == "ties" else {}),
        **(facts or {}),
    }  # fmt: skip
    try:
        with _model_folder(Path(output_path)) as temporary, ThreadPoolExecutor() as hashing:
            hashes = {file: hashing.submit(records.sha256, file) for c in checkpoints for file in c.files}
            temporary.mkdir()
            like = {name: torch.empty_like(first.tensors[name](), device="meta") for name in names}
            like = {name: t.to(result_type) if t.is_floating_point() else t for name, t in like.items()}
            merged = average(checkpoints, weights, names, combine, result_type)
            _write_safetensors(temporary / "model.safetensors", like, merged)
            _save_config_and_tokenizer(temporary, first, result_type)
            write_settings(temporary, settings, first.backbone.config.hidden_size)
            files = [
                {"path": str(file), "sha256": hashes[file].result(), "model": c.name}
                for c in checkpoints
                for file in c.files
            ]
            manifest = records.make_manifest("merge", config or facts, [*files, *inputs], **facts)
            records.write_json(temporary / "manifest.json", manifest)
    except OSError as error:
        raise UserError(f"{output_path}: the merged model could not be written: {error}") from None
    return manifest


def refuse_output(output_path: str | Path, models: Sequence[str], overwrite: bool) -> None:
    """Before any work: may the merged model go there? UserError if not; asking leaves nothing behind."""
    folder = Path(output_path)
    if any(Path(name).exists() and Path(name).resolve() == folder.resolve() for name in models):
        raise UserError(f"{folder}: is one of the models to merge; name another folder")
    absent = not folder.exists()
    records.refuse_foreign_folder(folder, overwrite, OUTPUTS)
    if absent:
        folder.rmdir()


def open_checkpoints(
    models: Sequence[str], weights: Sequence[float] | None = None,
    *, method: MergeMethod = "linear", base_model: str | None = None, **hub: Any,
) -> list[Checkpoint]:  # fmt: skip
    """Open all models, then the base; UserError where they, or the weights (None: not known yet), do not fit."""
    if weights is not None:
        _refuse_weights(models, weights, method)
    checkpoints = [open_checkpoint(str(name), **hub) for name in [*models, *filter(None, [base_model])]]
    for one, other in combinations(checkpoints, 2):
        _refuse_difference(one, other)
    return checkpoints


def _refuse_weights(models: Sequence[str], weights: Sequence[float], method: MergeMethod) -> None:
    what = f"weights {_joined(weights)} for the models {_joined(models)}"
    if len(weights) != len(models):
        raise UserError(f"{what}: give one a model ({len(models)})")
    total = math.fsum(weights) if all(map(math.isfinite, weights)) else math.nan
    if method == "task_arithmetic" and math.isnan(total):
        raise UserError(f"{what}: use finite numbers")
    if method != "task_arithmetic" and not abs(total - 1) <= 1e-3:
        raise UserError(f"{what}: they sum to {total:g}; make it 1")
    if method == "ties" and min(weights) < 0:
        raise UserError(f"{what}: --method ties takes none below 0")
    if method == "task_arithmetic" and math.isclose(total, 1):
        logger.warning("%s sum to 1: the base cancels out, and the result is that of --method linear", what)


def open_checkpoint(name: str, **hub: Any) -> Checkpoint:
    """Open a hub model or a folder without reading its weights.

    They are read later, tensor by tensor, from safetensors files with the backbone's names (or those of a model with a
    head: a prefix more). Any other checkpoint (pytorch_model.bin, names of old versions) transformers loads whole.

    Raises:
        UserError: not a model, not reachable, damaged, weights missing, a LoRA adapter.
    """
    access = {key: hub.get(key) for key in ("cache_dir", "token")}
    _refuse_adapter(name, **access)
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
    return Checkpoint(name, backbone, tokenizer, read_settings(name, **access), files, tensors)


def _refuse_adapter(name: str, **access: Any) -> None:
    found: str | None = None
    with suppress(OSError, ValueError):  # what is no model at all is told of later
        found = cached_file(name, "adapter_config.json", **access, **_QUIET)
    if found is None:
        return
    base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path") or "BASE"
    raise UserError(
        f"{name}: is a LoRA adapter (adapter_config.json), no whole model; merge it into its base first, in Python:\n"
        "  from peft import PeftModel\n"
        "  from transformers import AutoModel, AutoTokenizer\n"
        f"  adapted = PeftModel.from_pretrained(AutoModel.from_pretrained({base!r}), {name!r})\n"
        "  adapted.merge_and_unload().save_pretrained('whole_model')\n"
        f"  AutoTokenizer.from_pretrained({base!r}).save_pretrained('whole_model')\n"
        "and name the folder whole_model in its place"
    )


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
        raise UserError(f"{name}: lacks {_joined(absent)}, which {Path(present).name} lists; fetch it again")
    return [Path(path) for path in found.values() if path]


def _refuse_difference(one: Checkpoint, other: Checkpoint) -> None:
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


def _joined(values: Iterable[Any]) -> str:
    shown = [str(value) for value in values]
    return ", ".join(shown[:5]) + ", ..." * (len(shown) > 5)


def merged_settings(checkpoints: Sequence[Checkpoint]) -> EncoderSettings:
    """Each setting as the first model that states it has it (else cls, normalized); a contradiction is warned of."""
    stated: dict[str, Any] = {}
    for name in (field.name for field in fields(EncoderSettings)):
        for checkpoint in checkpoints:
            value = getattr(checkpoint.settings, name)
            if value is not None and stated.setdefault(name, value) != value:
                logger.warning("%s: has %s %r; the result has %r", checkpoint.name, name, value, stated[name])
    return replace(EncoderSettings(pooling="cls", normalize=True), **stated)


def merged_names(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """The tensors of the merged model: the first model's, without its pooler unless every model has one."""
    names = set(checkpoints[0].tensors)
    poolers = {name for name in names if name.startswith("pooler.")}
    if lacking := [c.name for c in checkpoints if poolers - c.tensors.keys()]:
        logger.info("%s: no pooler, which no embedding uses; the result has none either", _joined(lacking))
        names -= poolers
    return sorted(names)


def average(
    checkpoints: Sequence[Checkpoint], weights: Sequence[float], names: Iterable[str],
    combine: Combine = linear, dtype: torch.dtype = torch.float32,
) -> Averages:  # fmt: skip
    """Yield sum_m w_m theta_m, or what `combine` gives, flattened, in pieces, each with its name; integers are copied.

    A tensor of more than PIECE entries comes in several pieces: its whole size is never held.

    Args:
        checkpoints: the models, and behind them the base where `combine` wants one.
        weights: one a model.
        names: the tensors, in the order in which they come.
        combine: a way of merge_methods.py, which computes in float32.
        dtype: to which the result is rounded.

    Raises:
        UserError: an integer tensor that differs between models, or a result that is not finite.
    """
    models = _joined(c.name for c in checkpoints)
    remedy = " in float16; try --dtype bfloat16" if dtype == torch.float16 else "; is one of them broken?"
    for name in names:
        readers = [c.tensors[name] for c in checkpoints if name in c.tensors]
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
        with records.atomic_path(folder) as temporary:
            yield temporary
        return
    staged = folder / ".merged"
    try:
        with records.atomic_path(staged) as temporary:
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


def _combine(method: str, density: float) -> Combine:
    """The function of merge_methods.py; a soup is no way to merge, but a choice of models."""
    ways: dict[str, Combine] = {
        "linear": linear, "slerp": slerp, "task_arithmetic": task_arithmetic,
        "ties": functools.partial(ties, density=density),
    }  # fmt: skip
    if method not in ways:
        raise UserError(f"method {method!r}: use one of {_joined(ways)}")
    return ways[method]


def _result_type(name: MergeType, first: Checkpoint) -> torch.dtype:
    """A type by its name; `keep`: what the first model's configuration says, else its tensors."""
    if name != "keep":
        return getattr(torch, name)  # type: ignore[no-any-return]
    stored = [read().dtype for read in first.tensors.values() if read().is_floating_point()]
    dtype: torch.dtype = first.backbone.config.dtype or functools.reduce(torch.promote_types, stored)
    if dtype not in _FLOATS:
        raise UserError(f"--dtype keep: {first.name} is {dtype}; name the type, as --dtype float32")
    return dtype


def _save_config_and_tokenizer(folder: Path, first: Checkpoint, dtype: torch.dtype) -> None:
    config = first.backbone.config
    config.architectures, config.dtype = [type(first.backbone).__name__], dtype
    config.save_pretrained(folder)
    save_tokenizer(first.tokenizer, folder)
