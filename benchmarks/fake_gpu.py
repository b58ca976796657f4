"""A CUDA device without one: counts what code dispatches to a GPU. Works with a torch that was built for CPUs.

    with FakeGpu() as gpu:
        model = make_model().to_empty(device="cuda")     # made on "meta"
        with gpu.phase("forward"):
            loss = model(batch.to("cuda"))
        loss.backward()                                  # its operations get the phase "backward" by themselves
    gpu.log                                              # an Operation for each; count(gpu.log) sums them up

Tensors on the CPU are real. Those on "cuda" have a shape and no numbers (torch's FakeTensors), and whatever is read
from them is 0: a finite loss, a kernel without error. What needs numbers to know a shape (nonzero, a boolean index)
raises: on a GPU it would wait. `_replaced` names all that is replaced because a build for CPUs lacks it.

Import this module before torch: the device (fake_gpu.cpp, compiled once with g++ into the temporary folder) must be
there when torch first asks for one. So each count is a process of its own.
"""

# ruff: noqa: E402  torch comes after its device

import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock


def _device_library() -> str:
    """fake_gpu.cpp as a library for this version of torch."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None and "torch" not in sys.modules, "import fake_gpu before torch"
    torch_dir, source = Path(spec.origin).parent, Path(__file__).with_suffix(".cpp")
    stamp = f"{(torch_dir / 'version.py').stat().st_mtime_ns:x}-{source.stat().st_mtime_ns:x}"
    library = Path(tempfile.gettempdir()) / f"fake-gpu-{os.getuid()}-{stamp}.so"
    if not library.exists():
        include, new = torch_dir / "include", library.with_suffix(f".{os.getpid()}")
        options = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{include}", f"-I{include}/torch/csrc/api/include"]
        linked = [f"-L{torch_dir}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_dir}/lib"]
        subprocess.run(["g++", *options, str(source), "-o", str(new), *linked], check=True)
        new.rename(library)
    return str(library)


os.environ["TORCH_AUTOGRAD_SHUTDOWN_WAIT_LIMIT"] = "0"  # autograd's idle thread for the device would crash the exit
ctypes.CDLL(_device_library(), mode=ctypes.RTLD_GLOBAL)

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CAPTURED = "captured"  # the phase of what a CUDA graph will hold
WAITS = ("aten::_local_scalar_dense", "aten::equal")  # their result is a Python number
COPIES = ("aten::_to_copy", "aten::copy_", "aten::_foreach_copy_")
# Neither a view nor a kernel: memory, or the same tensor under another name.
NO_KERNEL = {
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias")
    + ("lift_fresh", "_unsafe_view", "_reshape_alias", "record_stream")
}


@dataclass(frozen=True)
class Operation:
    """What the host asks of the GPU, once.

    Args:
        phase: in which it was asked.
        name: of the operator, as "aten::mm", or of the call, as "Event.synchronize".
        kernels: it starts so many: 0 for a view or a mere allocation, all that are held for a graph's replay.
        casts: so many of them do nothing but change the number format.
        copy: "to device" or "to host"; "": between them nothing is moved.
        how: of a copy. "pinned": the host goes on at once. "pageable": asynchronous by its flag, but the host first
            copies to where the GPU can read. "blocking": the host waits until it is done.
        waits: the host stands still until the GPU has done all that was asked before.
        num_bytes: moved by a copy.
    """

    phase: str
    name: str
    kernels: int = 0
    casts: int = 0
    copy: str = ""
    how: str = ""
    waits: bool = False
    num_bytes: int = 0


def count(log: Iterable[Operation]) -> dict[str, dict[str, int]]:
    """By phase, in order of appearance: operations, kernels, casts, copies as "pinned to device", waits."""
    phases: dict[str, Counter[str]] = {}
    for operation in log:
        counts = phases.setdefault(operation.phase, Counter(operations=0, kernels=0, casts=0, waits=0))
        counts["operations"] += 1
        counts["kernels"] += operation.kernels
        counts["casts"] += operation.casts
        counts["waits"] += operation.waits
        if operation.copy:
            counts[f"{operation.how} {operation.copy}"] += 1
    return {phase: dict(counts) for phase, counts in phases.items()}


class FakeGpu(TorchDispatchMode):
    """Within it "cuda" is a device, and `log` gets an Operation for everything it is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Operation] = []
        self._phase, self._fake = "", FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> "FakeGpu":
        self._stack = ExitStack()
        for owner, name, value in _replaced(self):
            self._stack.enter_context(mock.patch.object(owner, name, value))
        self._stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor([...], device="cuda") is a copy that is seen
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is asked within it, and not by a backward, has this phase."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def wait(self, name: str) -> None:
        """Note that the host waits for the GPU."""
        self.log.append(Operation(self._phase, name, waits=True))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator of CPU tensors; of others find the result's shape, and note it."""
        kwargs, name = dict(kwargs or {}), func._schema.name
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(x, FakeTensor) for x in inputs) and not _is_cuda(kwargs.get("device")):
            return func(*args, **kwargs)
        if name.startswith("prim::"):  # a question of Python, about a tensor's device or layout
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func._can_decompose():  # elsewhere autograd has taken it apart
            with self._within():
                return func.decompose(*args, **kwargs)
        if name in WAITS:
            self.log.append(Operation(self.now(), name, waits=True))
            return True if name == "aten::equal" else torch.zeros((), dtype=inputs[0].dtype).item()
        if name == "aten::copy_" and inputs[0].device.type == "cpu":
            result = inputs[0].zero_()
        else:
            with self._fake:
                result = func(*self._faked(args), **self._faked(kwargs))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.log.append(self._operation(func, inputs, outputs, _flag(func, args, kwargs, "non_blocking")))
        return tree_map_only(FakeTensor, _real_on_cpu, result)

    @contextmanager
    def _within(self) -> Iterator[None]:
        TorchDispatchMode.__enter__(self)
        try:
            yield
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    def _faked(self, tree: Any) -> Any:
        """With tensors without numbers in the places of those on the CPU."""
        return tree_map_only(Tensor, lambda x: x if isinstance(x, FakeTensor) else self._fake.from_tensor(x), tree)

    def now(self) -> str:
        """The phase; an operation of autograd's engine is the backward's, whoever called it."""
        in_backward = self._phase != CAPTURED and torch._C._current_graph_task_id() != -1
        return "backward" if in_backward else self._phase

    def _operation(self, func: Any, inputs: list[Tensor], outputs: list[Tensor], non_blocking: bool) -> Operation:
        name = func._schema.name
        kernels = int(name not in NO_KERNEL and not _is_view(func))
        # A number on the CPU is an argument of the kernel; any other CPU tensor is copied, and waited for.
        far = [x for x in [*inputs, *outputs] if x.device.type == "cpu" and (x.dim() or name in COPIES)]
        if not far:
            is_cast = name == "aten::_to_copy" and inputs[0].dtype != outputs[0].dtype
            return Operation(self.now(), name, kernels, int(is_cast))
        to_host = name in COPIES and outputs[0].device.type == "cpu"
        # torch pins what it makes itself for an asynchronous copy to the host.
        pinned = all(isinstance(x, FakeTensor) or x.is_pinned() for x in far)
        how = ("pinned" if pinned else "pageable") if non_blocking and name in COPIES else "blocking"
        copied = {"copy": "to host" if to_host else "to device", "how": how, "waits": how == "blocking"}
        return Operation(self.now(), name, kernels, **copied, num_bytes=sum(x.nbytes for x in far))


def _replaced(gpu: FakeGpu) -> list[tuple[Any, str, Any]]:
    """(owner, name, value) of what asks for a CUDA build, or is chosen by the type of a tensor."""
    cuda = {
        "is_available": lambda: True,  # or torch.autocast("cuda") would be switched off
        "is_bf16_supported": lambda *_: True,
        "_lazy_init": _nothing,  # torch calls it at the first tensor.to("cuda")
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": _nothing,
        "synchronize": lambda *_: gpu.wait("synchronize"),
        "Event": lambda *_, **__: _Queue(gpu, "Event"),
        "Stream": lambda *_, **__: _Queue(gpu, "Stream"),
        "current_stream": lambda *_: _Queue(gpu, "Stream"),
        "stream": lambda *_: nullcontext(),
        "graph_pool_handle": _nothing,
        "CUDAGraph": lambda: _Graph(gpu),
        "graph": lambda graph, **__: graph.capture(),
    }
    foreach_types = [*_foreach_utils._foreach_supported_types, FakeTensor]
    return [
        *((torch.cuda, name, value) for name, value in cuda.items()),
        # FakeTensor's own reads entry by entry.
        (FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist()),
        # Gradients of other types than Tensor are clipped one by one.
        (_foreach_utils, "_foreach_supported_types", foreach_types),
        # A build for CPUs has no kernel to choose, and takes the operator apart.
        (F, "scaled_dot_product_attention", _scaled_dot_product_attention),
    ]


class _Queue:
    """An event or a stream: all is done, but to wait for it is noted."""

    def __init__(self, gpu: FakeGpu, name: str) -> None:
        self.gpu, self.name = gpu, name
        self.record = self.wait = self.wait_stream = self.wait_event = _nothing

    def query(self) -> bool:
        """Whether it is done."""
        return True

    def synchronize(self) -> None:
        """Wait."""
        self.gpu.wait(f"{self.name}.synchronize")


class _Graph:
    """A CUDA graph: what it holds is noted once, in the phase CAPTURED; its replay is one operation."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.kernels, self.casts = gpu, 0, 0

    @contextmanager
    def capture(self) -> Iterator[None]:
        """What is asked within it is held."""
        start = len(self.gpu.log)
        with self.gpu.phase(CAPTURED):
            yield
        held = self.gpu.log[start:]
        self.kernels, self.casts = sum(x.kernels for x in held), sum(x.casts for x in held)

    def replay(self) -> None:
        """All of it at once."""
        self.gpu.log.append(Operation(self.gpu.now(), "CUDAGraph.replay", self.kernels, self.casts))


def _nothing(*_: Any, **__: Any) -> None:
    pass


_cpu_attention = F.scaled_dot_product_attention


def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that a GPU takes: flash attention, the memory-efficient one for a mask or for float32."""
    if query.device.type == "cpu":
        return _cpu_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if attn_mask is None and query.dtype.itemsize == 2:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _is_view(func: Any) -> bool:
    return any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)


def _flag(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> bool:
    """A boolean argument, wherever it was given."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    return bool((named | kwargs).get(name))


def _real_on_cpu(tensor: FakeTensor) -> Tensor:
    """Zeros for a result on the CPU; what is on the GPU stays as it is."""
    return tensor if tensor.device.type == "cuda" else torch.zeros(tensor.shape, dtype=tensor.dtype)
