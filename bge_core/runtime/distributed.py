"""The process group: gather with gradient, the wrapped model. Written once, right for any number of processes.

Why the gather needs a gradient. With queries assigned to W ranks and every passage a candidate of every query,

    L = 1/M sum_r sum_{i on r} l_i(q_i, p_1..p_N)

the gradient of a passage is the sum over ALL ranks' rows, while its owner alone can carry it back into the encoder.
So the backward of the gather sums each passage's gradients over the ranks and hands them to the owner. Each rank
computes its own rows only; DDP and FSDP average over ranks, hence the factor W in the step.

FSDP2 is `fully_shard`, called here on every device: Accelerate supplies device, precision and process group alone (on a
CPU it would ignore its own FSDP plugin and give DDP).
"""

import functools
import inspect
import itertools
import math
import os
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from bge_core import UserError
from bge_core.runtime.watchdog import heartbeat, launcher_store

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, world size); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wrap(model: nn.Module, shard: bool = False) -> nn.Module:
    """The model whose backward averages gradients over the ranks; itself for one process.

    Args:
        model: on its device.
        shard: FSDP2, in place: every parameter becomes a DTensor, of which a rank keeps 1/W; a layer is put together
            when it runs. Otherwise DDP.
    """
    if world()[1] == 1:
        return model
    if shard:
        # Parameters stay float32 and the step's autocast rounds, as under DDP: the same numbers and the same master
        # weights. (A policy of bfloat16 parameters would also round the norms' weights and the sum over ranks.)
        # The root, too, is taken apart after a forward: after one without backward (an evaluation) it would stay whole.
        mesh = init_device_mesh(next(model.parameters()).device.type, (world()[1],))
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        for layer in max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=()):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        return model
    # Inputs are placed by us (no device_ids) and buffers never change. The flag was renamed in torch 2.12.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"gradient_as_bucket_view": True, sync_buffers: False}
    return DistributedDataParallel(model, **options)


class FlatGradients(nn.Module):
    """A module whose gradients lie in one vector and are averaged over the ranks by one reduction, without hooks.

    As `DistributedDataParallel`, for passes that are no autograd graphs of their own: every rank's gradient is divided
    by the number of ranks, then they are summed. It overlaps with nothing, and reduces once however many passes there
    were.

    Args:
        module: on its device; every rank has the same weights.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in self.trained]
        self.flat = self.trained[0].new_zeros(sum(sizes))
        self.views = [part.view_as(p) for part, p in zip(self.flat.split(sizes), self.trained, strict=True)]

    @torch.no_grad()
    def begin_step(self) -> bool:
        """Where the gradients are gone since the last step, put zeros there; whether they were."""
        if self.trained[0].grad is not None:
            return False
        self.flat.zero_()
        for parameter, view in zip(self.trained, self.views, strict=True):
            parameter.grad = view
        return True

    def average(self) -> None:
        """Give every rank the mean of the gradients."""
        if world()[1] > 1:
            dist.all_reduce(self.flat.div_(world()[1]))


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether forward and backward put layers together, so that every rank has to run each equally often."""
    return isinstance(model, FSDPModule)


@contextmanager
def sync_only_if(condition: bool, model: nn.Module) -> Iterator[None]:
    """Within it, backward averages gradients over the ranks only if `condition`; otherwise they pile up locally."""
    heartbeat()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(condition)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not condition else nullcontext():
        yield
    if isinstance(model, FlatGradients) and condition:
        model.average()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradient down to a norm of `max_norm` (0: never); its norm before, of all shards, on the device."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def whole_copy(tree: Any) -> Any:
    """A copy on the CPU of every tensor in nested dicts and lists, shards put together; on the other ranks than 0 None.

    Every rank calls it, with the same structure.
    """
    if isinstance(tree, dict):
        return {key: whole_copy(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(whole_copy, tree))
    if not isinstance(tree, Tensor):
        return tree
    whole = tree.full_tensor() if isinstance(tree, DTensor) else tree
    return whole.detach().to("cpu", copy=True) if world()[0] == 0 else None


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state of whole tensors; every rank has it and keeps its shards, where the parameters are shards."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def like(parameter: nn.Parameter, value: Any) -> Any:
        if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
            return distribute_tensor(value, parameter.device_mesh, parameter.placements)
        return value

    of_parameters = {
        i: {name: like(parameters[i], value) for name, value in values.items()} for i, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": of_parameters})


def gather_counts(*counts: int, device: torch.device) -> list[list[int]]:
    """Every rank's values of `counts`: one list over the ranks for each of them."""
    heartbeat()
    local = torch.tensor(counts, device=device)
    gathered = [torch.empty_like(local) for _ in range(world()[1])]
    dist.all_gather(gathered, local)
    return torch.stack(gathered, dim=1).tolist()  # type: ignore[no-any-return]


def _pad_rows(rows: Tensor, size: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros((size - len(rows), *rows.shape[1:]))])


class _GatherRows(torch.autograd.Function):
    """Concatenate every rank's rows; backward: sum over ranks, own rows out."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        ctx.rank, world_size = world()
        heartbeat()
        padded = _pad_rows(local, max(counts))
        gathered = [torch.empty_like(padded) for _ in range(world_size)]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        heartbeat()
        (gradient,) = gradients
        parts = [_pad_rows(part, max(ctx.counts)) for part in gradient.split(ctx.counts)]
        summed = torch.empty_like(parts[0])
        dist.reduce_scatter(summed, parts)
        return summed[: ctx.counts[ctx.rank]], None


def gather_rows(local: Tensor, counts: list[int]) -> Tensor:
    """Every rank's rows, in rank order, with gradient.

    Args:
        local: (counts[rank], ...) this rank's rows; any dtype (integers carry no gradient).
        counts: rows of each rank; they may differ, and some may be 0.

    Returns:
        (sum(counts), ...). backward: dL/dlocal = sum over ranks of dL_r/d(its rows), not divided by anything.
    """
    if sum(counts) == 0:
        return local
    return _GatherRows.apply(local, counts)  # type: ignore[no-any-return, no-untyped-call]


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in place; itself for one process."""
    heartbeat()
    if world()[1] > 1:
        dist.all_reduce(values)
    return values


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    heartbeat()
    return list(gather_object([value])) if world()[1] > 1 else [value]


def shared_array(shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array that is in memory once a machine, whatever its processes; for one process an ordinary one.

    It lies in a file of the temporary folder (TMPDIR) that loses its name at once: it goes with the last process. What
    one process writes, the others of its machine read.

    Raises:
        UserError: on every rank, if one of them finds no room for it.
    """
    if world()[1] == 1:
        return np.empty(shape, dtype=np.float32)
    path = problem = None
    machine = (socket.gethostname(), os.environ.get("GROUP_RANK"))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        descriptor, path = tempfile.mkstemp(prefix="bge_core-")
        try:
            os.posix_fallocate(descriptor, 0, max(1, math.prod(shape) * 4))
        except OSError as error:
            problem = f"no room for vectors in {tempfile.gettempdir()} ({error}): set TMPDIR to a folder with more"
        os.close(descriptor)
    try:
        told = gather_objects((machine, path, problem))
        for _, _, other in told:
            if other:
                raise UserError(other)
        paths = {place: its_path for place, its_path, _ in told if its_path}
        array = (
            np.memmap(paths[machine], dtype=np.float32, mode="r+", shape=shape) if math.prod(shape) else np.empty(shape)
        )
        gather_objects(None)  # all have opened it
    finally:
        if path:
            os.unlink(path)
    return array


_turns = itertools.count()
_LONGEST_TURN = timedelta(days=20)
_main_store = functools.cache(lambda: launcher_store("main"))


def _wait_for_main(rank: int) -> None:
    """Return once rank 0 is here as often as this rank: over the launcher's store, as a collective has a timeout."""
    turn = str(next(_turns))
    with suppress(RuntimeError):  # the launcher is gone, and its store: the collective that follows must do
        if rank == 0:
            _main_store().set(turn, "")
        else:
            _main_store().wait([turn], _LONGEST_TURN)


def on_main(function: Callable[[], T]) -> T:
    """Run `function` on rank 0 alone and give every rank its value, or its error, so that all go on or all stop.

    The others wait as long as it takes: no collective is begun before it has ended.

    Raises:
        UserError: `function` raised it, or an OSError.
        Exception: what `function` raised; on the other ranks a RuntimeError with its traceback.
    """
    heartbeat()
    rank, world_size = world()
    value: Any = None
    fault: Exception | None = None
    if rank == 0:
        try:
            value = function()
        except (UserError, OSError) as error:
            fault = UserError(str(error))
        except Exception as error:
            fault = error
    if world_size > 1:
        _wait_for_main(rank)
        is_known = fault is None or isinstance(fault, UserError)
        sent = fault if is_known else RuntimeError(f"rank 0 failed:\n{''.join(traceback.format_exception(fault))}")
        value, received = broadcast_object_list([value, sent])
        fault = received if rank else fault
    if fault is not None:
        raise fault
    return value  # type: ignore[no-any-return]
