"""A value of many tensors as one block of bytes, and back."""

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pytest
import torch
from batches import make_rows, rank_batch
from torch import Tensor
from torch.utils.data import DataLoader

from bge_core.runtime.parcel import Parcel, pack


@dataclass(frozen=True)
class Nested:
    """Whatever may be in a batch, and more."""

    tensors: tuple[Tensor, ...]
    by_name: dict[str, Any]
    none: None = None
    text: str = "查询"


NUMBERS = torch.arange(24, dtype=torch.int64)
VALUES: dict[str, Any] = {
    "a step": [rank_batch(make_rows(seed, (3, 1, 2)), teacher=seed > 0) for seed in (0, 1)],
    "a step without rows": [rank_batch((), [(), make_rows(0, (1,))], teacher=True)],
    "dtypes": [NUMBERS.to(dtype) for dtype in (torch.bool, torch.uint8, torch.int16, torch.int32, torch.bfloat16)],
    "nested": Nested((NUMBERS[:5] / 7, NUMBERS[3:4].double()), {"a": [1, (NUMBERS[:3],)], "b": {"c": NUMBERS.half()}}),
    "shapes": [NUMBERS.view(2, 3, 4), NUMBERS.view(4, 6).T, NUMBERS[::5], torch.tensor(7), torch.empty(0, 3), NUMBERS[:0]],
    "no tensor": {"lengths": [1, 2, 3]},
}  # fmt: skip


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in it, in order."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def assert_same(got: Any, want: Any) -> None:
    """Through all levels: the same types, and tensors of the same dtype, shape and bits."""
    assert type(got) is type(want)
    if isinstance(want, Tensor):
        assert (got.dtype, got.shape) == (want.dtype, want.shape) and torch.equal(got, want)
    elif isinstance(want, dict):
        assert_same([*got.items()], [*want.items()])
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)
    elif is_dataclass(want):
        assert_same(vars(got), vars(want))
    else:
        assert got == want


@pytest.mark.parametrize("name", VALUES)
def test_what_arrives_is_what_was_packed(name: str) -> None:
    """In one storage, at places that any kernel takes, and nothing of the original is held."""
    want = VALUES[name]
    parcel = pack(want)
    got = parcel.to(torch.device("cpu"))
    assert_same(got, want)
    starts = [tensor.data_ptr() - parcel.block.data_ptr() for tensor in tensors_in(got) if tensor.numel()]
    assert all(start % 16 == 0 for start in starts) and len(set(starts)) == len(starts)
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors_in(got)} <= {parcel.block.data_ptr()}
    # a step's layouts are known before its bytes: all that goes to a device is the block
    away = parcel.to(torch.device("meta"))
    assert [(t.device.type, t.dtype, t.shape) for t in tensors_in(away)] == [
        ("meta", t.dtype, t.shape) for t in tensors_in(want)
    ]


class Steps(torch.utils.data.Dataset):
    """Three steps of two micro-batches."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, step: int) -> Any:
        return [rank_batch(make_rows(2 * step + k, (2, 3, 1)), teacher=True) for k in (0, 1)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_parcels_come_from_data_workers(num_workers: int) -> None:
    """As values, and as one tensor each to be shared between the processes."""
    loader = DataLoader(Steps(), batch_size=None, num_workers=num_workers, collate_fn=pack)
    parcels = list(loader)
    assert [type(parcel) for parcel in parcels] == [Parcel] * 3
    for step, parcel in enumerate(parcels):
        assert tensors_in(parcel) == [parcel.block]
        assert_same(parcel.to(torch.device("cpu")), Steps()[step])


def test_a_loader_that_pins_pins_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one copy within the host; layouts and the rest stay as they are."""
    pinned: list[Tensor] = []

    def pin(block: Tensor) -> Tensor:
        pinned.append(block)
        return block.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    parcel = pack(Steps()[1])
    again = torch.utils.data._utils.pin_memory.pin_memory(parcel)
    assert len(pinned) == 1 and pinned[0] is parcel.block
    assert_same(again.to(torch.device("cpu")), Steps()[1])
