"""Texts -> vectors in input order: block by block, sorted by length, packed to a budget of tokens, dealt to the ranks.

Batches are a pure function of the texts: which process computes one, and how many processes there are, does not change
a single bit of a vector. One block of texts is held at a time, tokenized while the model works on the one before, so
memory does not grow with the number of texts; the vectors may go straight into a memory-mapped file.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bge_core import UserError
from bge_core.encoder.tokens import Tokens, tokenize
from bge_core.runtime.distributed import is_sharded, sum_over_ranks, world
from bge_core.runtime.watchdog import heartbeat

BLOCK = 16_384  # texts that are tokenized and sorted together
MAX_TOKENS = {"cpu": 2048}  # of a batch; elsewhere 8192. What a CPU computes with more falls out of its cache


def encode(
    encoder: Any,
    texts: Sequence[str],
    *,
    prompt: str = "",
    max_length: int = 512,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    precision: str = "no",
    description: str = "encode",
    output: np.ndarray | None = None,
) -> np.ndarray:
    """Vectors of all texts, on every rank.

    Args:
        encoder: a model.Encoder on the device to use; its mode (train or eval) is restored.
        texts: n strings; an empty one is fine.
        prompt: put before each text.
        max_length: longest text in tokens, cut to what the backbone takes.
        batch_size: at most so many texts in a batch; None: any number.
        max_tokens: at most so many tokens in a batch (one text may be longer); None: 8192, on a CPU 2048.
        precision: "fp16" or "bf16" autocast, or "no".
        description: of the progress bar.
        output: (n, D) float32 or float16 to write into, a memory map for example; None: a new float32 array.

    Returns:
        (n, D), in input order, of length 1 where the encoder normalizes: `output`, if it was given.

    Raises:
        UserError: a vector is not finite; the text is named.
    """
    shape = (len(texts), encoder.embedding_size)
    result = np.empty(shape, dtype=np.float32) if output is None else output
    if result.shape != shape:
        raise UserError(f"output has the shape {result.shape}; {len(texts)} vectors of this model need {shape}")
    max_length = min(max_length, encoder.max_positions)
    max_tokens = max_tokens or MAX_TOKENS.get(encoder.device.type, 8192)
    blocks = [slice(start, start + BLOCK) for start in range(0, len(texts), BLOCK)]

    def token_lists(block: slice) -> list[list[int]]:
        return tokenize(encoder.tokenizer, [prompt + text for text in texts[block]], max_length)

    num_broken, first_broken, was_training = 0, 0, encoder.training
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    autocast = torch.autocast(encoder.device.type, half) if half else nullcontext()
    # disable=None: no bar where stderr is not a terminal
    quiet = True if world()[0] or len(texts) <= 1000 else None
    bar = tqdm(total=len(texts), desc=description, unit="text", disable=quiet)
    # no_grad where in shards: they must not come back from an evaluation as tensors that no gradient may use
    without_graph = torch.no_grad() if is_sharded(encoder) else torch.inference_mode()
    encoder.eval()
    with ThreadPoolExecutor(1) as pool, without_graph, autocast, bar:
        ahead = [pool.submit(token_lists, block) for block in blocks[:1]]
        for i, block in enumerate(blocks):
            tokens = ahead.pop().result()
            ahead += [pool.submit(token_lists, after) for after in blocks[i + 1 : i + 2]]
            vectors = _encode_block(encoder, tokens, batch_size, max_tokens, bar)
            broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
            if len(broken) and not num_broken:
                first_broken = block.start + int(broken[0])
            num_broken += len(broken)
            result[block] = vectors
    encoder.train(was_training)
    if num_broken:
        raise UserError(
            f"the model gives NaN for {num_broken} of {len(texts)} texts, first {texts[first_broken][:60]!r}: "
            "is it broken?"
        )
    return result


def _encode_block(
    encoder: Any, texts: list[list[int]], batch_size: int | None, max_tokens: int, bar: tqdm
) -> np.ndarray:
    """Vectors of some texts, on every rank."""
    rank, world_size = world()
    batches = list(plan_batches([len(text) for text in texts], batch_size, max_tokens))
    vector_SD = torch.zeros((len(texts), encoder.embedding_size), dtype=torch.float32)
    computing: list[tuple[list[int], Tensor]] = []  # a batch is fetched after the next is begun: a GPU never waits
    for first in range(0, len(batches), world_size):  # a turn: every rank runs the model once, if only on nothing
        heartbeat()
        turn = batches[first : first + world_size]
        batch = turn[rank] if rank < len(turn) else []
        if batch or is_sharded(encoder):
            computing.append((batch, encoder(Tokens.from_lists([texts[i] for i in batch]).to(encoder.device))))
        for rows, vectors in computing[:-1]:
            vector_SD[rows] = vectors.to("cpu", torch.float32)
        computing = computing[-1:]
        bar.update(sum(map(len, turn)))
    for rows, vectors in computing:
        vector_SD[rows] = vectors.to("cpu", torch.float32)
    if world_size > 1:  # rows of other ranks are zero here; NCCL sums on the device only
        vector_SD = sum_over_ranks(vector_SD.to(encoder.device)).cpu()
    return vector_SD.numpy()


def plan_batches(lengths: Sequence[int], batch_size: int | None, max_tokens: int) -> Iterator[list[int]]:
    """Positions of the texts of each batch, longest texts first (so that memory fails early, if it does)."""
    batch: list[int] = []
    num_tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == batch_size or num_tokens + lengths[i] > max_tokens):
            yield batch
            batch, num_tokens = [], 0
        batch.append(i)
        num_tokens += lengths[i]
    if batch:
        yield batch
