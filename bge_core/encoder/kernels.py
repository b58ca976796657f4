"""The kernels of the operator `varlen`: which one is taken, and whether it computes what it should.

A kernel is taken once it has given here, on this device and in this precision, what "sdpa" gives in float32; with
dropout of attention weights, once it is known what it drops and the rest is right.
"""

import functools
import importlib.util
import logging
from dataclasses import replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from bge_core.encoder.rectangles import Packed, Rule, int32, relative_error, sdpa
from bge_core.encoder.varlen import varlen
from bge_core.runtime.flags import Attention

logger = logging.getLogger(__name__)
BOUND = 0.02  # of the largest entry, value or gradient: some four roundings of bfloat16


def first_line(problem: Exception) -> str:
    """What an exception says, in one line."""
    return (str(problem).strip() or type(problem).__name__).split("\n")[0]


def usable_kernels(attention: Attention, device_type: str, dtype: torch.dtype) -> list[str]:
    """The kernels that may run here, the one wished for first; none where "sdpa" is wished for."""
    if device_type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or attention in ("sdpa", "padded"):
        return []
    package = ["flash_attn"] if importlib.util.find_spec("flash_attn") else []
    return [*package, "torch"] if attention == "flash" else ["torch", *package]


@functools.cache
def choose_kernel(
    attention: Attention, device: torch.device, dtype: torch.dtype, heads: tuple[int, int], size: int, rule: Rule
) -> str | None:
    """The first usable kernel that computes what it should, value and gradient; None: there is none. Once a case.

    Args:
        attention: what is wished for.
        device, dtype: of queries, keys and values.
        heads: of queries, and of keys and values.
        size: of a head.
        rule: what a layer says of its attention.
    """
    kernels = usable_kernels(attention, device.type, dtype)
    if attention == "flash" and kernels == ["torch"]:
        logger.warning("--attention flash: the package flash-attn is not installed; torch's own is tried")
    for kernel in kernels:
        try:
            error = kernel_error(kernel, device, dtype, heads, size, replace(rule, dropout=0.0))
            if rule.dropout and error < BOUND:
                error = dropout_error(kernel, device, dtype, heads, size, rule)
        except Exception as problem:  # whatever a kernel of another build or GPU may raise
            logger.warning("attention kernel %s does not run here: %s", kernel, first_line(problem))
            continue
        if error < BOUND:
            logger.info("attention: %s", kernel)
            return kernel
        logger.warning("attention kernel %s differs by %.2g of the largest value; not used", kernel, error)
    without = (
        kernels and rule.dropout and choose_kernel(attention, device, dtype, heads, size, replace(rule, dropout=0.0))
    )
    if without:
        logger.info(
            "attention: sdpa, slower than %s, which does not drop attention weights (%g) as it should; "
            "--attention_dropout 0 would give it",
            without,
            rule.dropout,
        )
    return None


@torch.inference_mode(False)  # what is made in that mode has no gradient, and the answer is kept for training
def kernel_error(
    kernel: str, device: torch.device, dtype: torch.dtype, heads: tuple[int, int], size: int, rule: Rule
) -> float:
    """The largest difference of output or gradient to "sdpa" in float32, relative to the largest entry.

    Where the last layer may work on first tokens alone (packing.py), the query of each text's first one is tried, too.
    """
    window = rule.window if rule.window is not None and rule.window < 1024 else 0
    lengths = sorted([1, 3, 3, 130, 2 * window + 5])
    packed = Packed(lengths, int32([0, *accumulate(lengths)], device))
    drawn, weight = _draw(sum(lengths), device, dtype, heads, size)
    first_S = packed.cu_seqlens[:-1].to(torch.int64)
    every_T = torch.arange(sum(lengths), device=device)
    errors, like_bert = [], not rule.causal and rule.window is None and heads[0] == heads[1]
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for row in [every_T, first_S] if like_bert else [every_T]:
            got, want = ([x.clone().to(kind).requires_grad_() for x in drawn] for kind in (dtype, torch.float32))
            out = _run(kernel, got[0][row], got[1], got[2], packed.cu_seqlens, max(lengths), rule)
            query, key, value = (x.transpose(0, 1) for x in (want[0][row], want[1], want[2]))
            true = sdpa(query, key, value, packed, rule)
            errors.append(_error(out, got, true, want, weight[row]))
    return max(errors)


@torch.inference_mode(False)
def dropout_error(
    kernel: str, device: torch.device, dtype: torch.dtype, heads: tuple[int, int], size: int, rule: Rule
) -> float:
    """As `kernel_error`, with dropout; infinite where another share is dropped than `rule` says.

    What is dropped is seen where the values are unit vectors, as then the outputs are the weights. From the same random
    state the kernel has to drop the same again, and to give value and gradient of the formula with these left out.
    """
    lengths = [3, size // 2, size - 1]  # each token of a text needs a unit vector of its own
    drawn, weight = _draw(sum(lengths), device, dtype, heads, size)
    starts = int32([0, *accumulate(lengths)], device)
    place_T = torch.cat([torch.arange(n) for n in lengths]).to(device)
    text_T = torch.repeat_interleave(torch.tensor(lengths)).to(device)
    unit_THd = F.one_hot(place_T, size).to(dtype)[:, None].repeat(1, heads[1], 1)
    distance_TT = place_T[:, None] - place_T
    seen_TT = (text_T[:, None] == text_T) & (distance_TT >= (0 if rule.causal else -size))
    seen_TT &= distance_TT.abs() <= (size if rule.window is None else rule.window)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(1)
            return _run(kernel, query, key, value, starts, max(lengths), rule)

    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        kept_HTT = run(drawn[0], drawn[1], unit_THd)[..., place_T].ne(0).transpose(0, 1)
        share = 1 - float(kept_HTT[:, seen_TT].float().mean())
        got, want = ([x.clone().to(kind).requires_grad_() for x in drawn] for kind in (dtype, torch.float32))
        query, key, value = want[0], *(x.repeat_interleave(heads[0] // heads[1], 1) for x in want[1:])
        score_HTT = (torch.einsum("ihd,jhd->hij", query, key) * rule.scale).masked_fill(~seen_TT, -torch.inf)
        true = torch.einsum("hij,jhd->ihd", score_HTT.softmax(-1) * kept_HTT / (1 - rule.dropout), value)
        error = _error(run(got[0], got[1], got[2]), got, true, want, weight)
    return error if abs(share - rule.dropout) < 0.02 + 0.1 * rule.dropout else float("inf")


def _draw(
    num_tokens: int, device: torch.device, dtype: torch.dtype, heads: tuple[int, int], size: int
) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values (T, H, d), rounded to `dtype`, and weights of the outputs."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_tokens, h, size) for h in (heads[0], heads[1], heads[1], heads[0])]
    *drawn, weight = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    return [x.to(dtype) for x in drawn], weight


def _run(kernel: str, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, rule: Rule) -> Tensor:
    """The operator, as a layer calls it; of fewer queries than keys each belongs to one text."""
    one_each = len(query) != len(key)
    starts_of_queries = torch.arange(len(starts), dtype=torch.int32, device=starts.device) if one_each else starts
    texts = (starts_of_queries, starts, 1 if one_each else longest, longest)
    out: Tensor = varlen(query[None], key[None], value[None], *texts, *rule.numbers, kernel)[0]
    return out[0]


def _error(out: Tensor, inputs: list[Tensor], true: Tensor, true_inputs: list[Tensor], weight: Tensor) -> float:
    results = [
        [x.detach(), *torch.autograd.grad((x.float() * weight).sum(), of)]
        for x, of in ((out, inputs), (true, true_inputs))
    ]
    return max(relative_error(got, want) for got, want in zip(*results, strict=True))
