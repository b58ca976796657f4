"""The random state of this process, from which dropout comes: taken, put back, or made for a rank that has none."""

from typing import Any

import numpy as np
import torch


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
