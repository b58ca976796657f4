"""A packed row whose shapes do not follow the texts: what one CUDA graph, or one compiled layer, can take again.

The shapes of a row are those of its bucket (T tokens, N texts, the longest of them), all rounded up. What is added are
texts of their own, of padding tokens, so that every place of the row belongs to a text and no number of it is
undefined; nothing reads their vectors, so that no gradient comes from them:

    texts [7 1 3] in a bucket of 16 tokens and 4 texts:  cu_seqlens [0 7 8 11 16], the last text is padding

Shapes: T tokens and N texts of the bucket; S texts that were asked for, of which equal ones may share a place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from bge_core.encoder.tokens import Tokens


@dataclass(frozen=True)
class FixedRow:
    """S texts in a row of a bucket.

    Args:
        input_id_T: int64.
        position_T: int64, within its text, counted from the model's first position; all padding has the first.
        cu_seqlens: (N + 1,) int32, where each text begins, and T.
        skipped_N: int64, so many first tokens of each text take no part in the pooling; None: all do.
        token_type_id_T: int64 for texts that are pairs, or None.
        place_S: int64, which of the row's texts each one is.
        longest: a bound of the texts' lengths.
        kernel: of attention, see varlen.py.
    """

    input_id_T: Tensor
    position_T: Tensor
    cu_seqlens: Tensor
    skipped_N: Tensor | None
    token_type_id_T: Tensor | None
    place_S: Tensor
    longest: int
    kernel: str

    def __len__(self) -> int:
        return len(self.place_S)

    @property
    def bucket(self) -> tuple[int, int, int, bool, bool]:
        """(T, N, longest, has skipped tokens, has token types): rows of one bucket differ in values alone."""
        sizes = len(self.input_id_T), len(self.cu_seqlens) - 1, self.longest
        return *sizes, self.skipped_N is not None, self.token_type_id_T is not None


Chunk = Tokens | FixedRow  # texts that go through the model together


@dataclass(frozen=True)
class FixedRows:
    """How a model's texts become rows.

    Args:
        kernel: of attention.
        first_position: the number of a text's first position.
        pad_id: the padding token.
        distinct: what occurs twice is computed once, but for pairs: equal tokens may have other types.
    """

    kernel: str
    first_position: int
    pad_id: int
    distinct: bool

    def row(self, tokens: Tokens, type_T: Tensor | None = None, max_tokens: int | None = None) -> FixedRow:
        """The row of these texts, of a batch cut to `max_tokens`; all on the CPU."""
        place_S: Sequence[int] = range(len(tokens))
        if self.distinct and type_T is None:
            tokens, place_S = tokens.distinct()
        num_tokens, num_texts, longest = bucket_of(tokens.lengths, max_tokens)
        rest, more = num_tokens - sum(tokens.lengths), num_texts - len(tokens)
        lengths = [*tokens.lengths, *(rest // more + (i < rest % more) for i in range(more))]
        skipped, positions = tokens.prompt_lengths, [torch.arange(n) for n in tokens.lengths]
        return FixedRow(
            input_id_T=torch.cat([tokens.input_id_T, tokens.input_id_T.new_full((rest,), self.pad_id)]),
            # a text of padding may be longer than the model's table of positions
            position_T=torch.cat([*positions, torch.zeros(rest, dtype=torch.int64)]) + self.first_position,
            cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            skipped_N=None if skipped is None else torch.tensor([*skipped, *[0] * more]),
            token_type_id_T=None if type_T is None else torch.cat([type_T, type_T.new_zeros(rest)]),
            place_S=torch.tensor(place_S, dtype=torch.int64),
            longest=longest,
            kernel=self.kernel,
        )


def bucket_of(lengths: Sequence[int], max_tokens: int | None = None) -> tuple[int, int, int]:
    """The bucket of texts of these lengths: the padding has one token a text at least and `longest` at most.

    Few buckets are needed, and little is wasted: T goes by sixteenths of a power of two (256 at least), N by halves (16
    at least), the longest by powers of four (512 at least): what a kernel asks of shorter texts is next to nothing.

    Args:
        lengths: of the texts.
        max_tokens: that a batch is cut to; what is left over of one, of any length, goes by halves of a power of two.
    """
    longest = 512
    while longest < max(lengths, default=0):
        longest *= 4
    parts = 2 if max_tokens and sum(lengths) < 0.75 * max_tokens else 16
    num_texts = _round_up(max(1, len(lengths)), 16, 2)
    while True:
        more = num_texts - len(lengths)
        num_tokens = _round_up(sum(lengths) + more, 256, parts)
        if (rest := num_tokens - sum(lengths)) <= more * longest:
            return num_tokens, num_texts, longest
        num_texts = _round_up(len(lengths) + -(-rest // longest), 16, 2)


def _round_up(number: int, least: int, parts: int) -> int:
    """To a multiple of `least` or, if that is more, of so many parts of the power of two below."""
    step = max(least, (1 << number.bit_length() - 1) // parts)
    return -(-number // step) * step
