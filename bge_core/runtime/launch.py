"""How the processes of a run start: precision, sharding, process group, checked against what the launcher promised."""

import atexit
import ctypes
import importlib.util
import logging
import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from bge_core import UserError
from bge_core.runtime.config import TrainConfig
from bge_core.runtime.watchdog import launcher_store

logger = logging.getLogger(__name__)


def resolve_precision(fp16: bool, bf16: bool, *, cuda: bool) -> str:
    """The mixed precision that will be used: "fp16", "bf16" or "no".

    Order: the flag, else Accelerate's environment, else none. `accelerate launch` always exports "no", which therefore
    counts as not set. fp16 without a GPU becomes "no" with a warning.

    Raises:
        UserError: the flag and Accelerate's environment name different half precisions.
    """
    flag = "fp16" if fp16 else "bf16" if bf16 else "no"
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if flag != "no" and launcher not in ("no", flag):
        raise UserError(f"--{flag}, but accelerate launch was told --mixed_precision {launcher}: choose one")
    precision = flag if flag != "no" else launcher
    if precision not in ("no", "fp16", "bf16"):
        raise UserError(f"--mixed_precision {precision}: is not supported; use fp16, bf16 or no")
    if precision == "fp16" and not cuda:
        logger.warning("fp16 needs a GPU; this run uses float32 (--bf16 works on CPUs, too)")
        return "no"
    return precision


def resolve_sharding(fsdp: bool, ema_decay: float | None = None) -> bool:
    """Whether the weights lie in shards (FSDP2): by the flag, or by `accelerate launch` with an FSDP configuration.

    To be asked before `start`. One process has nothing to shard: off, with a warning.

    Raises:
        UserError: the launcher was told FSDP version 1; or shards and a moving average of the weights were asked for.
    """
    launcher = _is_true("ACCELERATE_USE_FSDP")
    if ema_decay is not None and (fsdp or launcher):
        raise UserError(
            f"--ema_decay {ema_decay}: cannot go with FSDP, whose weights lie in shards: drop it, or use DDP (no "
            "--fsdp, no FSDP in the launch file)"
        )
    if launcher and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "accelerate launch was told fsdp_version 1, which was never run here: write `fsdp_version: 2`, as in "
            "configs/accelerate/fsdp2.yaml"
        )
    if launcher and _is_true("FSDP_OFFLOAD_PARAMS"):
        logger.warning("fsdp_offload_params is not supported: shards stay on the GPU")
    if (fsdp or launcher) and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        logger.warning("FSDP needs several processes; this run has one, and its weights stay whole")
        return False
    return fsdp or launcher


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def tracker_options(config: TrainConfig) -> dict[str, Any]:
    """Accelerator's arguments for the tracker. UserError where its package is missing."""
    if config.report_to == "none":
        return {}
    if importlib.util.find_spec(config.report_to) is None:
        raise UserError(f'--report_to {config.report_to}: is not installed; pip install -e ".[{config.report_to}]"')
    return {"log_with": config.report_to, "project_dir": config.output_dir}


def start(fp16: bool = False, bf16: bool = False, timeout: float = 86_400.0, **kwargs: Any) -> Accelerator:
    """Accelerate's device, precision and process group, checked against what the launcher promised.

    Args:
        fp16, bf16: the user's flags.
        timeout: seconds after which a collective that some rank does not join is an error. A day: of equal shares of
            a long search one may take half an hour more than another.
        kwargs: for Accelerator.

    Raises:
        UserError: the launcher started W processes, but they did not find each other (each would train alone); or it
            was told to use DeepSpeed.
    """
    if _is_true("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "accelerate launch was told to use DeepSpeed, which was never run here: use DDP "
            "(configs/accelerate/one_node_8gpu.yaml) or FSDP2 (configs/accelerate/fsdp2.yaml)"
        )
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # its plugin would change the loss scaling and the saving
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    mps = world_size == 1 and torch.backends.mps.is_available()
    precision = resolve_precision(fp16, bf16, cuda=cuda)
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
    if world_size > 1 and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and not dist.is_initialized():
        # After a restart the launcher's store still holds the addresses of the dead: waiting for them would not end.
        store, rank = launcher_store("group"), int(os.environ["RANK"])
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=group.timeout)
    if not cuda and sys.platform == "linux":
        _keep_freed_memory()
    accelerator = Accelerator(cpu=not (cuda or mps), mixed_precision=precision, kwargs_handlers=[group], **kwargs)
    atexit.register(_leave, dist.group.WORLD)
    if accelerator.num_processes != world_size:
        raise UserError(
            f"the launcher started {world_size} processes, but {accelerator.num_processes} joined; start with\n"
            f"  torchrun --nproc_per_node {world_size} train.py ...    or\n"
            f"  accelerate launch --config_file configs/accelerate/<one of the files> train.py ..."
        )
    return accelerator


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one.

    Blocks above 32 MB else go back to the system, which clears every page anew when they are asked for again: a fifth
    of the time of a batch of 128. What the process holds stays at its peak, in one arena: with one for each thread, as
    is the default, what one frees is of no use to another, and encoding holds 150 MB more.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
        libc.mallopt(m_arena_max, 1)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_threshold, 2**30)


def _leave(group: dist.ProcessGroup | None) -> None:
    """A process that ends with gloo's threads running can abort; also when an error ends it.

    Holding the group until then keeps DDP from ending it: DDP joins gloo's thread with Python's lock in its hand, for
    which that thread waits, to free the last collective's tensor (torch 2.13, one run in forty).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
