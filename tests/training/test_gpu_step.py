"""What a training step asks of a GPU, counted without one (benchmarks/fake_gpu.py): each count in a fresh process."""

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the device without a GPU is compiled by g++")

KNOWN = """
import fake_gpu, json, torch
x = torch.ones(4, 4)
with fake_gpu.FakeGpu() as gpu:
    pinned = torch.empty(4, 4, pin_memory=True)
    with gpu.phase("copies"):
        a = x.to("cuda")                                      # blocking
        x.to("cuda", non_blocking=True)                       # pageable
        pinned[1:].to("cuda", non_blocking=True)              # pinned
        x.pin_memory().to("cuda", non_blocking=True)          # pinned
        pinned.to("cuda")                                     # blocking
        a[torch.tensor([1, 2])]                               # blocking: an index on the CPU
        a * torch.tensor(2.0)                                 # none: an argument of the kernel
        torch.tensor([1.0], device="cuda")                    # blocking
    with gpu.phase("reads"):
        assert a.sum().item() == 0.0 and a.sum(0).tolist() == [0.0] * 4 and not a.isnan().any()
        a.cpu(), pinned.copy_(a, non_blocking=True), torch.cuda.Event().synchronize()
    w = torch.ones(4, 4, device="cuda", requires_grad=True)
    with gpu.phase("forward"), torch.autocast("cuda", torch.bfloat16):
        y = a @ w                                             # two casts, one product
        with torch.autocast("cuda", enabled=False):
            loss = y.float().view(-1).sum()                   # a cast, a view, a sum
    loss.backward()
    assert w.grad.device.type == "cuda" and (x == 1).all()
print(json.dumps(fake_gpu.count(gpu.log)))
"""


def counts(*words: str) -> dict[str, Any]:
    """What a python with the benchmarks on its path prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT / "benchmarks", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_the_counter_counts_what_is_known() -> None:
    """Value and gradient of one product, copies and waits of each kind: counted by hand."""
    got = counts("-c", KNOWN)
    copies, reads, forward, backward = (got[phase] for phase in ("copies", "reads", "forward", "backward"))
    to_device = {how: copies[f"{how} to device"] for how in ("blocking", "pageable", "pinned")}
    assert to_device == {"blocking": 4, "pageable": 1, "pinned": 2} and copies["waits"] == 4
    assert (reads["waits"], reads["blocking to host"], reads["pinned to host"]) == (5, 2, 1)
    assert (forward["operations"], forward["kernels"], forward["casts"], forward["waits"]) == (6, 5, 3, 0)
    assert backward["casts"] == 2 and backward["waits"] == 0  # the gradients of y and of w
