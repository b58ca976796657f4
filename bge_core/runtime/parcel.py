"""A value of many tensors as one block of bytes, so that it gets to a GPU in one copy.

    value = Batch(Tokens(ids, [3, 2]), own, None, ...)         block    [ ids ....| own ..|          ]
                                                               rest     Batch(Tokens(#0, [3, 2]), #1, None, ...)

Every copy to a GPU costs the same few microseconds, however small it is, and one from memory that is not pinned makes
the process wait. A data worker packs, the loader pins, the loop sends.
"""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes: of the widest numbers that kernels load at once


@dataclass(frozen=True)
class Parcel:
    """What `pack` makes of a value.

    Args:
        block: uint8, the tensors' numbers one after the other.
        layouts: (first byte, dtype, shape, stride in numbers) of each.
        rest: the value pickled, in which tensors are numbers.
    """

    block: Tensor
    layouts: list[tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]]
    rest: bytes

    def pin_memory(self) -> "Parcel":
        """The same in memory from which a GPU copies by itself; a DataLoader with `pin_memory` calls it."""
        return replace(self, block=self.block.pin_memory())

    def to(self, device: torch.device) -> Any:
        """The value on a device, its tensors views of one block; out of pinned memory nobody waits for the copy."""
        block = self.block.to(device, non_blocking=True)
        typed = {dtype: block.view(dtype) for dtype in {dtype for _, dtype, _, _ in self.layouts}}
        views = [
            typed[dtype].as_strided(shape, stride, first // dtype.itemsize)
            for first, dtype, shape, stride in self.layouts
        ]
        return _Unpickler(io.BytesIO(self.rest), views).load()


def pack(value: Any) -> Parcel:
    """Join the tensors within a value: of dataclasses, lists, dicts, whatever can be pickled; copied, without gradient.

    Args:
        value: its tensors are dense, on the CPU.

    Returns:
        A parcel for which `pack(value).to(device)` equals `value`.
    """
    rest = io.BytesIO()
    pickler = _Pickler(rest)
    pickler.dump(value)
    layouts, size = [], 0
    for tensor in pickler.tensors:
        layouts.append((size, tensor.dtype, tuple(tensor.shape), tensor.stride()))
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    block = torch.empty(size, dtype=torch.uint8)
    for (first, *_), tensor in zip(layouts, pickler.tensors, strict=True):
        block[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return Parcel(block, layouts, rest.getvalue())


def send(value: Any, device: torch.device) -> Any:
    """A value that lies on the CPU, on a device: to a GPU in one copy that nobody waits for."""
    return value if device.type == "cpu" else pack(value).pin_memory().to(device)


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the CPU; what is returned waits for it, and for nothing asked of a GPU later."""
    if not tensor.is_cuda:
        return tensor.cpu
    copied, arrived = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()

    def wait() -> Tensor:
        arrived.synchronize()
        return copied

    return wait


class _Pickler(pickle.Pickler):
    """Keeps the tensors for itself and writes their numbers."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, part: Any) -> int | None:
        if not isinstance(part, Tensor):
            return None
        self.tensors.append(part.detach().contiguous())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Has these tensors for their numbers."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]
