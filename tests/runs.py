"""Training runs for the tests: one set of flags, run in this process, in a child that may be killed, or in two.

Children come from a server that has imported everything already, so each costs a fork and not the imports. A child
writes both its streams into one file.
"""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor

import train

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = ["train", "transformers.models.bert.modeling_bert", "transformers.models.bert.tokenization_bert", "runs"]
VOLATILE = ("queries_per_second", "tokens_per_second", "memory_mb")
Row = dict[str, Any]


def write_rows(file: Path, num_rows: int, seed: int = 0) -> Path:
    """Training data: 1 or 2 positives, 0 to 3 negatives, teacher scores; a question shares characters with its answer."""
    rng = random.Random(seed)
    words = ["信用卡", "贷款", "密码", "快递", "退款", "酒店", "签证", "机票", "会员", "物流", "账户", "订单"]
    with open(file, "w", encoding="utf-8") as lines:
        for i in range(num_rows):
            word = words[i % len(words)]
            pos = [f"{word}{i}号在线办理" + "，请带证件" * rng.randrange(3) for _ in range(1 + (i % 4 == 0))]
            neg = [f"{rng.choice(words)}{rng.randrange(100)}号需要{k + 1}天" for k in range(rng.randrange(4))]
            row = {
                "query": f"{word}{i}号怎么办" + "呢" * rng.randrange(3),
                "pos": pos,
                "neg": neg,
                "pos_scores": [round(rng.uniform(1, 3), 3) for _ in pos],
                "neg_scores": [round(rng.uniform(-1, 2), 3) for _ in neg],
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return file


def flags(model: Path, data: Path, output_dir: Path, **settings: Any) -> list[str]:
    """Words of a command line: small batches, every step logged, no checkpoints, unless told otherwise."""
    settings = {
        "model_name_or_path": model, "train_data": data, "output_dir": output_dir, "per_device_train_batch_size": 4,
        "train_group_size": 3, "num_train_epochs": 1, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 0,
    } | settings  # fmt: skip
    words = []
    for name, value in settings.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


def reset() -> None:
    """Forget what an earlier run in this process left behind."""
    for state in (AcceleratorState, GradientState):
        state._reset_state(*([True] if state is AcceleratorState else []))


def run(model: Path, data: Path, output_dir: Path, **settings: Any) -> int:
    """train.py in this process; its exit code."""
    reset()
    return train.main(flags(model, data, output_dir, **settings))


def read_lines(file: Path) -> list[Row]:
    """Every line of a JSON-lines file; none may be half-written."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read_steps(folder: Path) -> list[Row]:
    """metrics.jsonl without what no two runs share."""
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in read_lines(folder / "metrics.jsonl")]


def losses(folder: Path) -> list[float]:
    """The logged training losses."""
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


def manifest(folder: Path) -> Row:
    """manifest.json."""
    return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))


def weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder, those of its Dense modules with the module's name before theirs."""
    dense = {file.parent.name: load_file(file) for file in folder.glob("*_Dense/model.safetensors")}
    behind = {f"{name}.{key}": tensor for name, tensors in dense.items() for key, tensor in tensors.items()}
    return load_file(folder / "model.safetensors") | behind


def equal_weights(one: Path, other: Path) -> bool:
    """Bitwise."""
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def training_state(checkpoint: Path) -> Row:
    """training_state.pt."""
    return dict(torch.load(checkpoint / "training_state.pt", weights_only=True))


def equal(one: Any, other: Any) -> bool:
    """Equal through dicts and lists, tensors bitwise."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def copy_run(source: Path, target: Path, *without: str) -> Path:
    """A copy of a run folder in which these checkpoints, and the final model, do not exist yet."""
    shutil.copytree(source, target)
    for name in without:
        shutil.rmtree(target / name)
    (target / "model.safetensors").unlink(missing_ok=True)
    return target


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------------------- children


def _child(argv: Sequence[str], log: Path, environment: dict[str, str], patch: Callable[[], None] | None) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for the workers of the data, as in a run of its own
    if patch is not None:
        patch()
    sys.exit(train.main(argv))


def start(
    argv: Sequence[str], log: Path, environment: dict[str, str] | None = None, patch: Callable[[], None] | None = None
) -> Any:
    """train.py in a child process; `patch` is a function of a test module, called there before the start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])  # the test modules, too
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    child = context.Process(target=_child, args=(list(argv), log, environment or {}, patch))
    child.start()
    return child


def start_two(argv: Sequence[str], log: Path, patch: Callable[[], None] | None = None) -> list[Any]:
    """train.py in two processes."""
    return start_many(2, argv, log, patch)


def start_many(
    num_processes: int, argv: Sequence[str], log: Path, patch: Callable[[], None] | None = None
) -> list[Any]:
    """train.py in processes that find each other as under a launcher; each has its own log, <log>.<rank>."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    number = str(num_processes)
    shared = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(argv, log.with_suffix(f".{rank}"), shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, patch)
        for rank in range(num_processes)
    ]


def finish(children: Sequence[Any], seconds: float = 100) -> list[int]:
    """Wait for children; their exit codes. None may be left when it returns."""
    end = time.monotonic() + seconds
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
    late = [child for child in children if child.is_alive()]
    for child in late:
        child.kill()
        child.join()
    assert not late, f"{len(late)} of {len(children)} processes did not end within {seconds} s"
    return [child.exitcode for child in children]
