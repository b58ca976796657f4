"""Texts -> vectors in input order: sorted by length, dealt to the ranks by whole batches.

Batches are a pure function of the texts: which process computes one, and how many processes there are, does not change
a single bit of a vector.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from bge_core import UserError
from bge_core.distributed import is_sharded, sum_over_ranks, world
from bge_core.model import Encoder
from bge_core.packing import Tokens, bucket_texts, tokenize
from bge_core.watchdog import beat

_TOKENIZE_AT_ONCE = 4096


def encode(
    encoder: Encoder,
    texts: Sequence[str],
    *,
    prompt: str = "",
    max_length: int = 512,
    batch_size: int = 64,
    precision: str = "no",
    description: str = "encode",
) -> np.ndarray:
    """Vectors of all texts, on every rank.

    Args:
        encoder: on the device to use; its mode (train or eval) is restored.
        texts: n strings; an empty one is fine.
        prompt: put before each text.
        max_length: longest text in tokens, cut to what the backbone takes.
        batch_size: texts per batch.
        precision: "fp16" or "bf16" autocast, or "no".
        description: of the progress bar.

    Returns:
        (n, D) float32, in input order, of length 1 where the encoder normalizes.

    Raises:
        UserError: a vector is not finite; the text is named.
    """
    rank, world_size = world()
    max_length = min(max_length, encoder.max_positions)
    tokens: list[list[int]] = []
    for start in range(0, len(texts), _TOKENIZE_AT_ONCE):
        part = [prompt + text for text in texts[start : start + _TOKENIZE_AT_ONCE]]
        tokens += tokenize(encoder.tokenizer, part, max_length)
    order = sorted(range(len(texts)), key=lambda i: -len(tokens[i]))  # longest first: memory fails early
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    device, was_training = encoder.device, encoder.training
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    vector_SD = torch.zeros((len(texts), encoder.embedding_size), dtype=torch.float32)
    encoder.eval()
    turns = [batches[i : i + world_size] for i in range(0, len(batches), world_size)]
    # disable=None: no bar where stderr is not a terminal
    bar = tqdm(
        total=sum(map(len, batches[rank::world_size])),
        desc=description,
        unit="text",
        disable=None if rank == 0 and len(texts) > 1000 else True,
    )
    sharded = is_sharded(encoder)
    # no_grad where in shards: they must not come back from an evaluation as tensors that no gradient may use
    without_graph = torch.no_grad() if sharded else torch.inference_mode()
    with without_graph, torch.autocast(device.type, half) if half else nullcontext(), bar:
        for turn in turns:
            beat()
            batch = turn[rank] if rank < len(turn) else []
            num_runs = max(len(bucket_texts([len(tokens[i]) for i in of_rank])) for of_rank in turn) if sharded else 1
            texts_tokens = replace(Tokens.from_lists([tokens[i] for i in batch]), num_runs=num_runs)
            vectors = encoder(texts_tokens.to(device))
            vector_SD[batch] = vectors.to("cpu", torch.float32)
            bar.update(len(batch))
    encoder.train(was_training)
    if world_size > 1:  # rows of other ranks are zero here; NCCL sums on the device only
        for block in vector_SD.split(65536):
            block.copy_(sum_over_ranks(block.to(device)))
    result = vector_SD.numpy()
    bad = np.flatnonzero(~np.isfinite(result).all(axis=1))
    if len(bad):
        raise UserError(
            f"the model gives NaN for {len(bad)} of {len(texts)} texts, first {texts[bad[0]][:60]!r}: is it broken?"
        )
    return result
