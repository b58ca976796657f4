"""A rank that hangs, or ends by an error, is named by the others, and all of them end.

Every rank counts heartbeats: the begin of each step and of each collective of ours. A rank that makes none within a
step for the timeout asks all ranks, over the launcher's key-value store, how many they made and where they stand.
Who does not answer is stopped or lost; otherwise the rank with the fewest is the one that the others wait for.
The answers come from a thread of their own, so a rank whose main thread sleeps forever answers, too.
"""

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, TCPStore

from bge_core import UserError

logger = logging.getLogger(__name__)
GRACE_SECONDS = 10.0  # that a rank has to answer
_POLL_SECONDS = 0.5

# Where the main thread of a rank that waits for others stands: in a collective, in a backward or for the GPU.
_WAITING = ("torch/distributed/", "torch/nn/parallel/", "torch/autograd/graph.py", "torch/cuda/")


class _Pulse:
    beats = 0
    last = 0.0  # time.monotonic() of the last one
    in_step = False


def heartbeat() -> None:
    """Count: this rank has come one collective, or one step, further."""
    _Pulse.beats += 1
    _Pulse.last = time.monotonic()


def step_begins() -> None:
    """From here to `step_ends` a rank without a heartbeat for the timeout is stalled; evaluations may take longer."""
    _Pulse.in_step = True
    heartbeat()


def step_ends() -> None:
    """See `step_begins`."""
    _Pulse.in_step = False


def launcher_store(name: str) -> PrefixStore:
    """A part of the launcher's key-value store that no other use and no earlier start of the processes wrote into.

    torchrun (2.13) keeps one store through its restarts. Launchers of several nodes count their restarts apart, so
    there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 has to give every start a new store.
    """
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "0"
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
    return PrefixStore(f"bge_core/{name}/{start}", store)


@contextmanager
def watch(rank: int, world_size: int, timeout: float, finish: Callable[[], None]) -> Iterator[None]:
    """Within it a rank that hangs is named, and an error of one rank ends them all, each with that error.

    After `timeout` seconds without a heartbeat within a step all say who hangs and exit with 1. What waits in vain for
    a rank with an error exits with that rank's code, after `finish`. Under a launcher only: its MASTER_ADDR and
    MASTER_PORT are where the ranks ask each other.
    """
    if world_size == 1:
        yield
        return
    stopped, stalled = threading.Event(), threading.Event()
    threading.Thread(target=_look_at_clock, args=(timeout, stalled, stopped), daemon=True).start()
    arguments = (rank, world_size, timeout, stalled, stopped, finish)
    threading.Thread(target=_talk, args=arguments, daemon=True).start()
    try:
        yield
    except Exception as error:
        stopped.set()
        _tell(error, rank, world_size, finish)
        raise
    finally:
        _Pulse.in_step = False
        stopped.set()


def _tell(error: Exception, rank: int, world_size: int, finish: Callable[[], None]) -> None:
    """Tell the others of this rank's error; or end with the error of another, of which this one is a consequence."""
    is_users = isinstance(error, (UserError, OSError))
    text = str(error) if is_users else "".join(traceback.format_exception(error)).rstrip()
    try:
        store = launcher_store("fault")
        if store.check(["fault"]) and not is_users:
            _end_with_fault(store, rank, finish)
        store.set("fault", json.dumps({"rank": rank, "code": 2 if is_users else 1, "text": text}))
        store.set(f"noted{rank}", "")
        store.wait([f"noted{r}" for r in range(world_size)], timedelta(seconds=GRACE_SECONDS))
    except RuntimeError:  # who cannot be told any more has ended
        return


def _end_with_fault(store: PrefixStore, rank: int, finish: Callable[[], None]) -> None:
    fault = json.loads(store.get("fault"))
    store.set(f"noted{rank}", "")
    logger.error("rank %d ended the run: %s", fault["rank"], fault["text"])
    finish()
    os._exit(fault["code"])


def _look_at_clock(timeout: float, stalled: threading.Event, stopped: threading.Event) -> None:
    while not (_Pulse.in_step and time.monotonic() - _Pulse.last > timeout):
        if stopped.wait(_POLL_SECONDS):
            return
    stalled.set()
    time.sleep(3 * GRACE_SECONDS)  # here the other thread ends the process, unless the store itself is stopped
    logger.error(
        "%s\nthe store does not answer: rank 0, or the launcher of its machine, is lost", _headline(timeout, "0")
    )
    os._exit(1)


def _talk(
    rank: int,
    world_size: int,
    timeout: float,
    stalled: threading.Event,
    stopped: threading.Event,
    finish: Callable[[], None],
) -> None:
    try:
        store, faults = launcher_store("hang"), launcher_store("fault")
        while not store.check(["asked"]):
            if faults.check(["fault"]) and not stopped.is_set():
                _end_with_fault(faults, rank, finish)
            if stalled.is_set():
                store.set("asked", "1")
            elif stopped.wait(_POLL_SECONDS):
                return
        store.set(str(rank), json.dumps({"beats": _Pulse.beats, "frames": _innermost_frames()}))
        end = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end and not store.check([str(r) for r in range(world_size)]):
            time.sleep(0.1)
        answers = {r: json.loads(store.get(str(r))) for r in range(world_size) if store.check([str(r)])}
    except (RuntimeError, KeyError):  # the store went with a process that ended: that is an error, but not a hang
        return
    if rank == min(answers):
        logger.error(describe_hang(answers, world_size, timeout))
    try:  # leave together: the store may live in rank 0, and who is left alone would say that a peer closed
        store.set(f"done{rank}", "1")
        store.wait([f"done{r}" for r in answers], timedelta(seconds=GRACE_SECONDS))
    finally:
        os._exit(1)


def _innermost_frames() -> list[str]:
    """Where the main thread stands, innermost first."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    summary = traceback.extract_stack(frame)[-4:]
    return [f"{entry.filename}:{entry.lineno} in {entry.name}" for entry in reversed(summary)]


def _headline(timeout: float, whom: str) -> str:
    return f"no progress for {timeout:g} seconds (--ddp_timeout), waiting for rank {whom}"


def find_hung(answers: dict[int, dict[str, Any]], world_size: int) -> list[int]:
    """The ranks that hold up the others.

    Args:
        answers: rank -> its number of "beats" and its innermost "frames".
        world_size: ranks that were asked.

    Returns:
        Those without an answer; else those with the fewest; where all have equally many, those that stand
        elsewhere than in a collective; where none does, all.
    """
    missing = [rank for rank in range(world_size) if rank not in answers]
    fewest = min(answer["beats"] for answer in answers.values())
    behind = [rank for rank, answer in answers.items() if answer["beats"] == fewest]
    if missing or len(behind) < world_size:
        return missing or behind
    busy = [rank for rank in behind if not any(part in answers[rank]["frames"][0] for part in _WAITING)]
    return busy or behind


def describe_hang(answers: dict[int, dict[str, Any]], world_size: int, timeout: float) -> str:
    """The message: who is waited for and where each of them stands, and where a rank that waits does."""
    hung = find_hung(answers, world_size)
    lines = [_headline(timeout, ", ".join(map(str, hung[:16])) + ", ..." * (len(hung) > 16))]
    for rank in [*hung[:8], *[rank for rank in answers if rank not in hung][:1]]:
        if rank in answers:
            does = "stands at" if rank in hung else "waits at"
            lines.append(f"rank {rank} {does} " + "\n    called from ".join(answers[rank]["frames"]))
        else:
            lines.append(f"rank {rank} does not answer: its process is stopped, or its machine lost")
    return "\n".join(lines)
