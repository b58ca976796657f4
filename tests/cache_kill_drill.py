"""Processes that fill one cache for test_cache.py: to be killed, to run at the same time, or to be two ranks of a run.

They come from a server that has imported everything already, so each costs a fork and not the imports.
"""

import multiprocessing
import os
import random
import re
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bge_core import UserError
from bge_core.encoder.load import load_encoder
from bge_core.runtime.distributed import world
from bge_core.runtime.launch import start
from bge_core.search.cache import EmbeddingCache

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = ["cache_kill_drill", "transformers.models.bert.modeling_bert", "transformers.models.bert.tokenization_bert"]
SHARD_SIZE = 6
TEXTS = [f"第{i}号" + "账户密码" * (i % 7) for i in range(120)]


def _write_slowly(path: Path, content: bytes) -> int:
    """Path.write_bytes with time for a kill when half is written, as there is in a shard of many MB."""
    with open(path, "wb") as file:
        for part in (content[: len(content) // 2], content[len(content) // 2 :]):
            file.write(part)
            file.flush()
            time.sleep(0.003)
    return len(content)


def _fill(model: str, folder: str, result: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    Path.write_bytes = _write_slowly  # type: ignore[method-assign, assignment]
    if environment:
        start()
    result = f"{result}.{world()[0]}"
    try:
        cache = EmbeddingCache(folder, SHARD_SIZE)
        vectors = np.asarray(cache.vectors(load_encoder(model), TEXTS, prompt="问："))
    except UserError as error:
        Path(f"{result}.error").write_text(str(error), encoding="utf-8")
        sys.exit(2)
    np.savez(result, vectors=vectors, encoded=cache.num_encoded, reused=cache.num_reused)


def fill(model: Path, folder: Path, result: Path, environment: dict[str, str] | None = None) -> Any:
    """A process that encodes TEXTS through the cache `folder`; vectors and counts go to <result>.<rank>.npz."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    process = context.Process(target=_fill, args=(str(model), str(folder), str(result), environment or {}))
    process.start()
    return process


def fill_with_two_ranks(model: Path, folders: Sequence[Path], result: Path) -> list[Any]:
    """Two ranks of one run, each with its own idea of where the cache lies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2))
    return [fill(model, folder, result, shared | rank) for folder, rank in zip(folders, ranks, strict=True)]


def finish(*processes: Any, seconds: float = 100) -> list[int]:
    """Their exit codes; none is left when it returns."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{len(late)} processes did not end within {seconds} s"
    return [process.exitcode for process in processes]


def files(folder: Path) -> dict[str, bytes]:
    """Every whole file below, with its content, without those that a process makes for a moment."""
    paths = [path for path in sorted(folder.rglob("*")) if not re.match(r"\.(.*\.tmp|probe)-", path.name)]
    paths = [path for path in paths if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def num_whole(folder: Path) -> int:
    """How many whole files there are, without reading them."""
    return sum(not path.name.startswith(".") for path in folder.glob("*/*"))


def kill_and_start_again(model: Path, root: Path, num_kills: int, seed: int) -> dict[str, int]:
    """Kill runs at random moments, and start each again until it is done; every file must be that of an unbroken run.

    Returns:
        How many kills, how many of them after the first shard, how many left a file half-written.
    """
    rng = random.Random(seed)
    assert finish(fill(model, root / "unbroken", root / "unbroken")) == [0]
    want, vectors = files(root / "unbroken"), np.load(root / "unbroken.0.npz")["vectors"]
    num_shards = len(want) - 1
    assert num_shards == len(TEXTS) // SHARD_SIZE and len(vectors) == len(TEXTS)
    counts = {"kills": 0, "between": 0, "half_written": 0}
    cache = root / "cache"
    while counts["kills"] < num_kills:
        shutil.rmtree(cache, ignore_errors=True)
        for target in sorted(rng.randrange(num_shards) for _ in range(rng.choice((1, 2, 3)))):
            process = fill(model, cache, root / "killed")
            while num_whole(cache) <= target and process.is_alive():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
            process.kill()
            process.join()
            found = files(cache)
            assert found.items() <= want.items()
            counts["kills"] += process.exitcode == -9
            counts["between"] += 1 < len(found) < len(want)
            counts["half_written"] += any(cache.rglob(".*.tmp-*"))
        num_kept = SHARD_SIZE * sum(name.endswith(".safetensors") for name in files(cache))
        assert finish(fill(model, cache, root / "again")) == [0]
        assert files(cache) == want
        again = np.load(root / "again.0.npz")
        assert again["reused"] == num_kept and again["encoded"] == len(TEXTS) - num_kept
        assert again["vectors"].tobytes() == vectors.tobytes()
    return counts
