"""What a run says of itself: metrics.jsonl, and the memory that it takes."""

import ctypes
import json
import os
import resource
import sys
from contextlib import suppress
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


def reset_peak_memory() -> None:
    """Let `memory_mb` begin anew at what is needed now; where only Linux could (no /proc), it goes on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc may hold what was freed
        libc.malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def available_memory_mb() -> float:
    """Most memory in MB that this process may come to hold: what is free now and what it holds already.

    On a GPU its free memory; else the machine's (a cgroup's, if that allows less), shared by all ranks of this machine.
    """
    if torch.cuda.is_available():
        return (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / 2**20
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        held = int(Path("/proc/self/statm").read_text().split()[1]) * page
    except OSError:  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * page / 2**20
    free = next(int(line.split()[1]) * 2**10 for line in lines if line.startswith("MemAvailable"))
    with suppress(OSError, ValueError):  # no cgroup, or one without a limit ("max")
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()) - used)
    return (free / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + held) / 2**20
