"""Texts -> vectors in input order: block by block, sorted by length, packed to a budget of tokens, assigned to ranks.

Batches are a pure function of the texts: which process computes one, and how many processes there are, does not change
a single bit of a vector. One block of texts is held at a time, tokenized while the model works on the one before, so
memory does not grow with the number of texts; the vectors may go straight into a memory-mapped file.
"""

from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bge_core import UserError
from bge_core.encoder.tokens import Tokens, prompt_length, tokenize
from bge_core.runtime.distributed import is_sharded, shared_array, sum_over_ranks, world
from bge_core.runtime.parcel import fetch
from bge_core.runtime.watchdog import heartbeat

BLOCK = 16_384  # texts that are tokenized and sorted together
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}  # of a precision's name; "no" has none
MAX_TOKENS = {"cpu": 2048}  # of a batch; elsewhere 8192. What a CPU computes with more falls out of its cache

Text = TypeVar("Text")
Item = TypeVar("Item", bound=Sized)


def encode(
    encoder: Any,
    texts: Sequence[str],
    *,
    prompt: str = "",
    max_length: int = 512,
    unit_length: bool = False,
    output: np.ndarray | None = None,
    description: str = "encode",
    **options: Any,
) -> np.ndarray:
    """Vectors of all texts, on every rank.

    Args:
        encoder: a model.Encoder on the device to use; its mode (train or eval) is restored.
        texts: n strings; an empty one is fine.
        prompt: put before each text.
        max_length: longest text in tokens, cut to what the backbone takes.
        unit_length: scale vectors to length 1, whether the encoder does so or not.
        output: (n, D) float32 or float16 to write into, a memory map for example; None: a new float32 array, of which
            the processes of a machine share one if it is large.
        description: of the progress bar.
        options: batch_size, max_tokens and precision of `run_batches`.

    Returns:
        (n, D), in input order: `output`, if it was given.

    Raises:
        UserError: a vector is not finite; the text is named.
    """
    shape = (len(texts), encoder.embedding_size)
    if output is not None:
        result = output
    elif len(texts) > BLOCK:  # every rank writes all of it
        result = shared_array(shape)
    else:
        result = np.empty(shape, dtype=np.float32)
    if result.shape != shape:
        raise UserError(f"output has the shape {result.shape}; {len(texts)} vectors of this model need {shape}")
    max_length = min(max_length, encoder.max_length)
    skip = 0 if encoder.settings.include_prompt else prompt_length(encoder.tokenizer, prompt, max_length)

    # Without special tokens around a text, an empty one is its padding alone. (Qwen3-Embedding's own is its padding.)
    is_bare = not encoder.tokenizer("")["input_ids"]

    def token_lists(block: Sequence[str]) -> list[list[int]]:
        return tokenize(encoder.tokenizer, [prompt + text for text in block], max_length)

    def vectors(batch: list[list[int]]) -> Tensor:
        tokens = Tokens.from_lists(batch, [skip] * len(batch) if skip else None)
        vector_SD: Tensor = encoder(tokens)
        if is_bare and any(nothing := [ids == [encoder.tokenizer.pad_token_id] for ids in batch]):  # 0, as of no tokens
            vector_SD = vector_SD.masked_fill(torch.tensor(nothing, device=vector_SD.device)[:, None], 0.0)
        return torch.nn.functional.normalize(vector_SD, dim=-1) if unit_length else vector_SD

    broken = run_batches(encoder, texts, token_lists, vectors, result, description=description, **options)
    if broken:
        raise UserError(
            f"the model gives NaN for {len(broken)} of {len(texts)} texts, first {texts[broken[0]][:60]!r}: "
            "is it broken?"
        )
    return result


def encode_for_search(encoder: Any, texts: Sequence[str], **options: Any) -> np.ndarray:
    """As `encode`, with inner products that are the model's own scores: of length 1 where they are cosines."""
    settings = encoder.settings
    return encode(encoder, texts, unit_length=settings.scored_by == "cosine" and not settings.normalize, **options)


def run_batches(
    model: Any,
    texts: Sequence[Text],
    tokenize: Callable[[Sequence[Text]], list[Item]],
    forward: Callable[[list[Item]], Tensor],
    output: np.ndarray,
    *,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    precision: str = "no",
    description: str = "",
    unit: str = "text",
) -> list[int]:
    """What a model makes of each text, written into `output` in input order, on every rank.

    Args:
        model: on the device to use; its mode (train or eval) is restored.
        texts: n texts, or pairs of them.
        tokenize: some texts -> what the model reads of each, as long as it has tokens.
        forward: those of a batch -> (b, ...), on the model's device.
        output: (n, ...).
        batch_size: at most so many texts in a batch; None: any number.
        max_tokens: at most so many tokens in a batch (one text may be longer); None: 8192, on a CPU 2048.
        precision: "fp16" or "bf16" autocast, or "no".
        description, unit: of the progress bar.

    Returns:
        Positions of the texts whose values are not all finite.
    """
    device = next(model.parameters()).device
    max_tokens = max_tokens or MAX_TOKENS.get(device.type, 8192)
    blocks = [slice(start, start + BLOCK) for start in range(0, len(texts), BLOCK)]
    half = HALF.get(precision)
    autocast = torch.autocast(device.type, half) if half else nullcontext()
    # disable=None: no bar where stderr is not a terminal
    quiet = True if world()[0] or len(texts) <= 1000 else None
    bar = tqdm(total=len(texts), desc=description, unit=unit, disable=quiet)
    # no_grad where in shards: they must not come back from an evaluation as tensors that no gradient may use
    without_graph = torch.no_grad() if is_sharded(model) else torch.inference_mode()
    broken: list[int] = []
    was_training = model.training
    model.eval()
    with ThreadPoolExecutor(1) as pool, without_graph, autocast, bar:
        ahead = [pool.submit(tokenize, texts[block]) for block in blocks[:1]]
        for i, block in enumerate(blocks):
            items = ahead.pop().result()
            ahead += [pool.submit(tokenize, texts[after]) for after in blocks[i + 1 : i + 2]]
            batches = list(plan_batches([len(item) for item in items], batch_size, max_tokens))
            rows = torch.zeros((len(items), *output.shape[1:]), dtype=torch.float32)
            _run_block(model, items, batches, forward, rows, bar)
            if world()[1] > 1:  # rows of other ranks are zero here; NCCL sums on the device only
                rows = sum_over_ranks(rows.to(device)).cpu()
            is_finite = np.isfinite(values := rows.numpy()).reshape(len(items), -1).all(axis=1)
            broken += [block.start + int(i) for i in np.flatnonzero(~is_finite)]
            output[block] = values
    model.train(was_training)
    return broken


def _run_block(
    model: Any,
    items: list[Item],
    batches: list[list[int]],
    forward: Callable[[list[Item]], Tensor],
    rows: Tensor,
    bar: tqdm,
) -> None:
    """Fill in the rows of this rank's batches."""
    rank, world_size = world()
    computing: list[tuple[list[int], Callable[[], Tensor]]] = []  # awaited once the next is begun: a GPU never waits
    for first in range(0, len(batches), world_size):  # a turn: every rank runs the model once, if only on nothing
        heartbeat()
        turn = batches[first : first + world_size]
        batch = turn[rank] if rank < len(turn) else []
        if batch or is_sharded(model):
            computing.append((batch, fetch(forward([items[i] for i in batch]).to(torch.float32))))
        for places, values in computing[:-1]:
            rows[places] = values()
        computing = computing[-1:]
        bar.update(sum(map(len, turn)))
    for places, values in computing:
        rows[places] = values()


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
