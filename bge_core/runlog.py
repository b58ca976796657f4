"""What a run says: metrics.jsonl (each step once, also after a resume), the tracker, memory."""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch


def append_metrics(path: Path, values: dict[str, Any]) -> None:
    """Add one line to metrics.jsonl."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def memory_mb() -> float:
    """Most memory so far in MB: allocated on the GPU if there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
