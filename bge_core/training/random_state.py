"""The random state of this process, from which dropout comes, and those of the rows, from which their passages come."""

from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence


def random_state() -> dict[str, Any]:
    """The state now, for `restore_random_state`."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_random_state(seed: int, step: int, rank: int) -> None:
    """A state for a rank that the checkpoint of `step` has none for: other dropout than in any step before."""
    torch.manual_seed(int(np.random.default_rng((seed, step, rank)).integers(1 << 63)))


class _Words(ISeedSequence):
    """A seed whose words are known."""

    def __init__(self, words: np.ndarray) -> None:
        self.words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return self.words


def generators(seed: int, epoch: int, draws: np.ndarray) -> list[np.random.Generator]:
    """`numpy.random.default_rng((seed, epoch, draw))` of each draw, all seeded at once in a tenth of the time.

    Source: SeedSequence of numpy (numpy/random/bit_generator.pyx), which is O'Neill's seed_seq_fe (2015).
    """
    if seed >= 2**32 or epoch >= 2**32 or draws.max(initial=0) >= 2**32:  # more than a word each
        return [np.random.default_rng((seed, epoch, draw)) for draw in draws.tolist()]
    entropy = [np.full(len(draws), number, np.uint32) for number in (seed, epoch)]
    entropy += [draws.astype(np.uint32), np.zeros(len(draws), np.uint32)]
    hashed = _Hash(0x43B0D7E5, 0x931E8875)
    pool = [hashed(word_B) for word_B in entropy]
    for source in range(4):
        for target in (i for i in range(4) if i != source):
            mixed_B: np.ndarray = pool[target] * np.uint32(0xCA01F9DD) - hashed(pool[source]) * np.uint32(0x4973F715)
            pool[target] = mixed_B ^ (mixed_B >> np.uint32(16))
    hashed = _Hash(0x8B51F9DD, 0x58F38DED)
    word_B8 = np.stack([hashed(pool[i % 4]) for i in range(8)], axis=1).astype("<u4")
    seeds: list[Any] = [_Words(words) for words in word_B8.view("<u8")]
    return [np.random.Generator(np.random.PCG64(words)) for words in seeds]


class _Hash:
    """x -> (x ^ c) c' folded by its upper half, where c' = c m is the c of the next call; all modulo 2**32."""

    def __init__(self, constant: int, multiplier: int) -> None:
        self.constant, self.multiplier = constant, multiplier

    def __call__(self, word_B: np.ndarray) -> np.ndarray:
        before, self.constant = self.constant, self.constant * self.multiplier % 2**32
        word_B = (word_B ^ np.uint32(before)) * np.uint32(self.constant)
        return word_B ^ (word_B >> np.uint32(16))
