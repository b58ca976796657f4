"""LM_Cocktail's two functions: its signatures, our merging."""

import logging
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bge_core import UserError
from bge_core.encoder.encode import encode
from bge_core.encoder.load import load_encoder
from bge_core.files import records
from bge_core.files.records import Row
from bge_core.loss import info_nce
from bge_core.merging.compare import merged_names, open_model_folders
from bge_core.merging.folders import average, merge_folders, refuse_output
from bge_core.merging.methods import check_weights

logger = logging.getLogger(__name__)


def mix_models(
    model_names_or_paths: Sequence[str],
    model_type: str,
    weights: Sequence[float],
    output_path: str | None = None,
    *,
    overwrite: bool = False,
    **hub: Any,
) -> Any:
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
    check_weights(model_names_or_paths, weights, "linear")
    folders = open_model_folders(model_names_or_paths, **hub)
    backbone = load_encoder(model_names_or_paths[0], attention="padded", **hub).backbone
    names = merged_names(folders)
    if not any(name.startswith("pooler.") for name in names):
        backbone.pooler = None
    state = backbone.state_dict()
    filled = dict.fromkeys(state, 0)
    for name, piece in average(folders, weights, [name for name in names if name in state]):
        state[name].view(-1)[filled[name] :][: len(piece)] = piece
        filled[name] += len(piece)
    return backbone


def mix_models_with_data(
    model_names_or_paths: Sequence[str],
    model_type: str,
    example_ata: Sequence[Row] | None = None,
    temperature: float = 5.0,
    batch_size: int = 2,
    max_input_length: int = 2048,
    neg_number: int = 7,
    output_path: str | None = None,
    *,
    example_data: Sequence[Row] | None = None,
    seed: int = 42,
    overwrite: bool = False,
    **hub: Any,
) -> Any:
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
        model_names_or_paths,
        example_data or example_ata or [],
        batch_size=batch_size,
        max_input_length=max_input_length,
        neg_number=neg_number,
        seed=seed,
        **hub,
    )
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
    models: Sequence[str],
    examples: Sequence[Row],
    *,
    batch_size: int = 2,
    max_input_length: int = 2048,
    neg_number: int = 7,
    seed: int = 42,
    **hub: Any,
) -> list[float]:
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
    stated = [of.settings.pooling for of in open_model_folders(models, **hub) if of.settings.is_stated]
    pooling = stated[0] if stated else "cls"
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
