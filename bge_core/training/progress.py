"""What the loop knows of its steps: their figures once they are here, how far it is, the figures since the last log."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bge_core.runtime.log import memory_mb
from bge_core.runtime.parcel import fetch
from bge_core.training.batch import Batch


def reads_late(device: torch.device) -> bool:
    """Whether a step's figures are read once the next step is queued, so that the device always has work."""
    return device.type == "cuda"


class Reading:
    """The figures of a step, on their way from the device: nobody waits for them before `take`.

        queued    step k    figures    step k + 1's forward and backward     its update
        read                                                             k

    Args:
        step: its number.
        batches: this rank's.
        figures: scalars on the device, by name.
    """

    def __init__(self, step: int, batches: Sequence[Batch], figures: Mapping[str, Tensor]) -> None:
        self.step, self.batches, self._names = step, batches, list(figures)
        self._fetched = fetch(torch.stack([*figures.values()]))

    def take(self) -> dict[str, float]:
        """The figures, as soon as the device has them."""
        return dict(zip(self._names, self._fetched().tolist(), strict=True))


@dataclass
class Progress:
    """Written into every checkpoint as `vars(progress)` and read back as `Progress(**state)`.

    Args:
        skipped: updates that loss scaling left out.
        evaluated: the step of the last evaluation; 0: none yet.
        scores: of the last evaluation, by metric.
        stale: evaluations since the best one.
        best_value, best_step, best_scores: of the best evaluation; step 0: none yet.
        window: sums since the last log, see `Meter`.
    """

    skipped: int = 0
    evaluated: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    stale: int = 0
    best_value: float = -math.inf
    best_step: int = 0
    best_scores: dict[str, float] = field(default_factory=dict)
    window: dict[str, float] = field(default_factory=dict)

    def add_scores(self, step: int, scores: dict[str, float], metric: str) -> bool:
        """Take in the evaluation after `step`; whether its `metric` is the best so far."""
        self.scores, self.evaluated = scores, step
        if scores[metric] <= self.best_value:
            self.stale += 1
            return False
        self.best_value, self.best_step, self.best_scores, self.stale = scores[metric], step, scores, 0
        return True


class Meter:
    """Sums since the last log and the seconds of training in which they came about; an evaluation takes none.

    Args:
        window: what the sums are kept in; not empty after a resume in the middle of a window.
    """

    def __init__(self, window: dict[str, float]) -> None:
        self.window = window
        self._restart(window.get("seconds", 0.0))

    def _restart(self, seconds: float = 0.0) -> None:
        self._began = time.perf_counter() - seconds

    def add(self, means: Mapping[str, float]) -> None:
        """Take in a step: its means, and its "queries" and "tokens" of all ranks."""
        for name, value in {**means, "steps": 1}.items():
            self.window[name] = self.window.get(name, 0) + value
        self.window["seconds"] = time.perf_counter() - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within it is no training time."""
        paused = time.perf_counter()
        yield
        self._began += time.perf_counter() - paused

    def read(self) -> dict[str, float]:
        """Means over the steps since the last call, queries and tokens a second, memory in MB."""
        steps, seconds = self.window.pop("steps"), self.window.pop("seconds")
        rates = {f"{name}_per_second": round(self.window.pop(name) / seconds, 2) for name in ("queries", "tokens")}
        means = {name: value / steps for name, value in self.window.items()}
        self.window.clear()
        self._restart()
        return means | rates | {"memory_mb": round(memory_mb(), 1)}
