"""A rank that hangs or is stopped: the others end within the timeout, with a message that names it."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from accelerate import Accelerator

import train
from bge_core.runtime.watchdog import describe_hang, find_hung


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 60)


def patch_step_3(what: Any) -> None:
    """In a child: rank 1 does `what` before its third step."""
    forward_backward, steps = train.forward_backward, []

    def patched(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 3 and os.environ["RANK"] == "1":
            what()
        return forward_backward(*arguments)

    train.forward_backward = patched


def sleep_forever() -> None:
    while True:
        time.sleep(1)


def hang_in_step_3() -> None:
    patch_step_3(sleep_forever)


def freeze_in_step_3() -> None:
    patch_step_3(lambda: os.kill(os.getpid(), signal.SIGSTOP))


@pytest.mark.parametrize("cross_device", [False, True])
def test_a_rank_that_hangs_is_named(cross_device: bool, tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    words = runs.flags(tiny_bert, data, tmp_path / "run", ddp_timeout=3, negatives_cross_device=cross_device)
    codes = runs.finish(runs.start_two(words, tmp_path / "log", hang_in_step_3), 60)
    said = (tmp_path / "log.0").read_text(encoding="utf-8")
    assert codes == [1, 1], said
    assert "no progress for 3 seconds (--ddp_timeout), waiting for rank 1\n" in said
    assert "rank 1 stands at " + __file__ in said and "in sleep_forever" in said
    assert "rank 0 waits at " in said
    assert len(runs.losses(tmp_path / "run")) == 2


def test_a_rank_that_is_stopped_is_named(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    words = runs.flags(tiny_bert, data, tmp_path / "run", ddp_timeout=3)
    children = runs.start_two(words, tmp_path / "log", freeze_in_step_3)
    try:
        codes = runs.finish(children[:1], 60)
    finally:
        children[1].kill()
        children[1].join()
    said = (tmp_path / "log.0").read_text(encoding="utf-8")
    assert codes == [1], said
    assert "waiting for rank 1\nrank 1 does not answer: its process is stopped, or its machine lost\n" in said
    assert "rank 0 waits at " in said and "Traceback" not in said


def fail() -> None:
    raise ZeroDivisionError("a fault")


def fail_in_step_3() -> None:
    patch_step_3(fail)


def fail_in_the_log() -> None:
    """In a child: rank 0, which alone writes, fails after its second step."""
    train.append_metrics = lambda path, values: fail() if values["step"] == 2 else None


@pytest.mark.parametrize("patch, failing", [(fail_in_step_3, 1), (fail_in_the_log, 0)])
def test_an_error_of_one_rank_ends_them_all_with_it(
    patch: Any, failing: int, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    words = runs.flags(tiny_bert, data, tmp_path / "run")
    assert runs.finish(runs.start_two(words, tmp_path / "log", patch), 30) == [1, 1]
    said = [(tmp_path / f"log.{rank}").read_text(encoding="utf-8") for rank in (0, 1)]
    assert said[failing].rstrip().endswith("ZeroDivisionError: a fault") and "ended the run" not in said[failing]
    other = said[1 - failing]
    assert f"rank {failing} ended the run: Traceback" in other and other.rstrip().endswith("ZeroDivisionError: a fault")
    assert other.count("Traceback") == 1


def end_in_flight() -> None:
    """In a child: the run ends while gloo's thread has tensors to free, for which it needs Python's lock."""
    end_training = Accelerator.end_training

    def patched(self: Accelerator) -> None:
        for _ in range(20):
            torch.distributed.all_reduce(torch.zeros(1), async_op=True)
        end_training(self)

    Accelerator.end_training = patched


def test_ranks_end_while_gloo_still_works(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """Seen in one run of twenty, after the last barrier: the model that is done with ended the process group."""
    words = runs.flags(tiny_bert, data, tmp_path / "run")
    assert runs.finish(runs.start_two(words, tmp_path / "log", end_in_flight), 60) == [0, 0]


@pytest.mark.parametrize(
    "answers, hung",
    [
        ({0: (5, "train.py:1 in train"), 1: (5, "torch/distributed/x.py:1 in wait")}, [0]),
        ({0: (5, "train.py:1 in train"), 1: (4, "torch/distributed/x.py:1 in wait")}, [1]),
        ({0: (5, "torch/autograd/graph.py:1 in f"), 1: (5, "torch/distributed/x.py:1 in wait")}, [0, 1]),
        ({0: (5, "torch/distributed/x.py:1 in wait"), 2: (4, "train.py:1 in train")}, [1]),
        ({1: (5, "torch/distributed/x.py:1 in wait")}, [0]),
    ],
    ids=["who computes", "who has fewer beats", "nobody stands out", "who does not answer", "rank 0"],
)
def test_who_holds_up_the_others(answers: dict[int, tuple[int, str]], hung: list[int]) -> None:
    known = {rank: {"beats": beats, "frames": [frame]} for rank, (beats, frame) in answers.items()}
    world_size = max(*known, *hung) + 1
    assert find_hung(known, world_size) == hung
    assert f"waiting for rank {', '.join(map(str, hung))}\n" in describe_hang(known, world_size, 3.0)
