"""Texts as token ids in one row.

    input_id_T    [ 101 2769 102 | 101 791 1921 102 | 101 102 ]        lengths  [3, 4, 2]

Padded rectangles are made for models that need them, and nowhere else.

Shapes: T tokens of all texts, S texts, s texts of a bucket, L the longest of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """S texts in one row: `input_id_T` (int64) and their `lengths` (sum T); texts are never empty.

    Equal texts have equal `numbers`, so that nobody needs to fetch them from a GPU to compare; None: not known. The
    first `prompt_lengths` tokens of each text take no part in the pooling; None: all do.
    """

    input_id_T: Tensor
    lengths: list[int]
    numbers: list[int] | None = None
    prompt_lengths: list[int] | None = None

    @classmethod
    def from_lists(cls, texts: Sequence[Sequence[int]], prompt_lengths: Sequence[int] | None = None) -> "Tokens":
        """Join token lists; a prompt as long as its text leaves the last token."""
        flat = [token for text in texts for token in text]
        lengths = [len(text) for text in texts]
        told = prompt_lengths or [0] * len(texts)
        skipped = [min(skip, length - 1) for skip, length in zip(told, lengths, strict=True)]
        numbers: dict[tuple[int, ...], int] = {}
        keys = [(skip, *text) for skip, text in zip(skipped, texts, strict=True)]
        return cls(
            torch.tensor(flat, dtype=torch.int64),
            lengths,
            [numbers.setdefault(key, len(numbers)) for key in keys],
            None if prompt_lengths is None else skipped,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device) -> "Tokens":
        """The same texts on another device."""
        return replace(self, input_id_T=self.input_id_T.to(device, non_blocking=True))

    def texts(self) -> list[Tensor]:
        """One vector of token ids a text."""
        return list(self.input_id_T.split(self.lengths))

    def distinct(self) -> tuple["Tokens", list[int]]:
        """Each different text once, in order of its first place; and for each of the S texts its place among them."""
        first: dict[int, int] = {}
        numbers = self.numbers or list(range(len(self)))
        for i, number in enumerate(numbers):
            first.setdefault(number, i)
        if len(first) == len(self):
            return self, list(range(len(self)))
        texts, places = self.texts(), {number: place for place, number in enumerate(first)}
        chosen = list(first.values())
        skipped = self.prompt_lengths and [self.prompt_lengths[i] for i in chosen]
        tokens = Tokens(
            torch.cat([texts[i] for i in chosen]), [self.lengths[i] for i in chosen], prompt_lengths=skipped
        )
        return tokens, [places[number] for number in numbers]

    def split(self, max_texts: int | None = None, max_tokens: int | None = None) -> list["Tokens"]:
        """Consecutive chunks of at most so many texts and tokens (a text longer than that is a chunk); at least one."""
        sizes = [0]
        num_tokens = 0
        for length in self.lengths:
            if sizes[-1] and (sizes[-1] == max_texts or num_tokens + length > (max_tokens or math.inf)):
                sizes.append(0)
                num_tokens = 0
            sizes[-1] += 1
            num_tokens += length
        ends = list(accumulate(sizes))
        slices = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        ids, skip = self.input_id_T.split([sum(self.lengths[part]) for part in slices]), self.prompt_lengths
        return [
            Tokens(own, self.lengths[part], self.numbers and self.numbers[part], skip and skip[part])
            for own, part in zip(ids, slices, strict=True)
        ]


def prompt_length(tokenizer: Any, prompt: str, max_length: int) -> int:
    """How many tokens a prompt is at the beginning of a text, with the special one before it, as tokenized alone."""
    if not prompt:
        return 0
    (ids,) = tokenize(tokenizer, [prompt], max_length)
    return len(ids) - (ids[-1] in tokenizer.all_special_ids)


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of each text with its special tokens, cut to `max_length`, not padded; the padding token for none."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length, verbose=False)["input_ids"]
    return [of_text or [tokenizer.pad_token_id] for of_text in ids]


def bucket_texts(lengths: Sequence[int], max_waste: float = 0.125) -> list[list[int]]:
    """Positions of texts of about equal length, shortest first: padded, at most `max_waste` of a bucket is padding."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    buckets, start = [], 0
    while start < len(order):
        stop, num_tokens = start, 0
        while stop < len(order):
            longest = lengths[order[stop]]
            if num_tokens + longest < (1 - max_waste) * longest * (stop + 1 - start):
                break
            num_tokens += longest
            stop += 1
        buckets.append(order[start:stop])
        start = stop
    return buckets


def pad_buckets(tokens: Tokens, pad_id: int, max_waste: float = 0.125) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Cut a batch into padded rectangles of which at most `max_waste` is padding.

    Args:
        tokens: S texts.
        pad_id: token that fills.
        max_waste: largest share of padding in a rectangle.

    Yields:
        (positions of the texts in `tokens`, input ids (s, L), attention mask (s, L)); every text in one rectangle.
    """
    texts = tokens.texts()
    for bucket in bucket_texts(tokens.lengths, max_waste):
        length_s = torch.tensor([tokens.lengths[i] for i in bucket], device=tokens.input_id_T.device)
        id_sL = torch.nn.utils.rnn.pad_sequence([texts[i] for i in bucket], batch_first=True, padding_value=pad_id)
        mask_sL = torch.arange(id_sL.shape[1], device=id_sL.device)[None, :] < length_s[:, None]
        yield bucket, id_sL, mask_sL.to(torch.int64)
