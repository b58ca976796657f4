"""The micro-batches of each step, tokenized ahead by worker processes, and what becomes of a step when one is lost.

A signal to stop often goes to a whole process group (torchrun, timeout, a Ctrl-C) or to all processes of a name. The
workers must outlive it, since the run needs them for its last step: they heed the process that they work for alone. A
worker that is lost all the same (SIGKILL when memory runs out) breaks no step: the batch is read here, and `lost` says
it, so that the run can save.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bge_core import UserError
from bge_core.runtime.parcel import pack
from bge_core.training.batch import Batch
from bge_core.training.data import TrainingData
from bge_core.training.stop import STOP_SIGNALS


class ReadAhead:
    """Batches from `num_workers` processes (0: from this one); `lost`: one of them ended unasked.

    Args:
        data: item i is step i of this rank.
        num_workers: processes.
        device: where the batches shall lie, each step's in one block (`Parcel`); None: they stay here as they are.
    """

    def __init__(self, data: TrainingData, num_workers: int, device: torch.device | None = None) -> None:
        self.data, self.num_workers, self.device, self.lost = data, num_workers, device, False

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        """The micro-batches of the steps first..last-1, counted from 0."""
        loader = torch.utils.data.DataLoader(
            self.data,
            batch_size=None,
            sampler=range(first, last),
            num_workers=self.num_workers,
            collate_fn=pack if self.device else None,
            pin_memory=self.device is not None and self.device.type == "cuda",
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # its own: drawing the workers' seed from the global one would shift dropout
        )
        with _as_workers_are_born():
            batches = iter(loader)
        for step in range(first, last):
            batch: Any = None
            if not self.lost:
                try:
                    batch = next(batches)
                except RuntimeError as error:
                    # an error within a worker is said otherwise; who pins fails in the middle of receiving a batch
                    if not any(known in str(error) for known in ("DataLoader worker (pid", "Pin memory thread exited")):
                        raise
                    self.lost = True
            if batch is None:
                batch = pack(self.data[step]) if self.device else self.data[step]
            yield batch.to(self.device) if self.device else batch


def lost_worker(num_workers: int, step: int) -> UserError:
    """What to do when a worker was lost and the run has saved after `step`."""
    return UserError(
        f"--dataloader_num_workers {num_workers}: a DataLoader worker, which reads ahead, was ended from outside, most "
        "often for want of memory: use fewer --dataloader_num_workers. The run saved after step "
        f"{step}; --resume_from_checkpoint latest goes on from there"
    )


@contextmanager
def _as_workers_are_born() -> Iterator[None]:
    """Within it no signal to stop is taken: a forked process begins with them blocked.

    torch's handler of SIGCHLD goes, too: it raises wherever the loop is, in the middle of an update for example. Who
    waits for the next batch is told of a lost worker without it.
    """
    before = signal.getsignal(signal.SIGCHLD)
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


def _start_worker(number: int) -> None:
    """In a worker: let the tokenizer work in one thread, and the signals be.

    A tokenizer's threads are not in a forked process, and where TOKENIZERS_PARALLELISM is "true" it would wait for them
    forever.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    employer = multiprocessing.parent_process()
    if employer and hasattr(signal, "sigwaitinfo"):  # macOS has none; its workers end by the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=_heed, args=(employer.pid,), daemon=True).start()


def _heed(employer: int | None) -> None:
    """End this process by a signal of its employer (who sends SIGTERM to end it), and by no one else's."""
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != employer:
        pass
    os._exit(0)
