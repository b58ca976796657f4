"""What a training step asks of a GPU, counted without one (benchmarks/fake_gpu.py): each count in a fresh process."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from conftest import ROOT
from filelock import FileLock

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


STEPS = """
import fake_gpu, harness, json, tempfile
from operations import AutoTokenizer, count_case, make_model
cases = {
    "one layer": count_case(4, 2, None, 1),
    "two layers": count_case(4, 2, None, 2),
    "GradCache": count_case(4, 2, 6, 1),
    "loss scaling": count_case(4, 2, None, 1, fp16=True, ema_decay=0.9, logging_steps=1),
    "graphs": count_case(4, 2, None, 1, cuda_graphs=True),
    "graphs and GradCache": count_case(16, 2, 12, 1, cuda_graphs=True),
    "accumulation": count_case(4, 2, None, 1, per_device_train_batch_size=2, gradient_accumulation_steps=2),
}
with fake_gpu.FakeGpu() as gpu, tempfile.TemporaryDirectory() as folder:
    encoder = make_model(1, AutoTokenizer.from_pretrained(harness.tiny_bert(folder))).to("cuda")
    for _ in range(2):  # the first looks for a kernel
        gpu.log.clear()
        encoder.encode(["一二三四五六七八九十"[i:] for i in range(10)], precision="bf16", batch_size=4)
    cases["encoding"] = [f"{x.how} {x.copy}" if x.copy else x.name for x in gpu.log if x.copy or x.waits]
print(json.dumps(cases))
"""


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What train.py's second step asks for, by case and phase; copies and waits of encoding, in their order.

    Counted once, whichever of pytest's processes asks first.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    with FileLock(shared / "gpu_steps.lock"):
        file = shared / "gpu_steps.json"
        if not file.exists():
            file.write_text(json.dumps(counts("-c", STEPS)))
    return json.loads(file.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "case", ["one layer", "GradCache", "loss scaling", "accumulation", "graphs", "graphs and GradCache"]
)
def test_a_step_waits_for_nothing_but_the_figures_of_the_one_before(case: str, steps: dict[str, Any]) -> None:
    """One parcel and the counts go to the device, the figures come back, all pinned; the one wait is their read.

    It comes when the step's own forward and backward are queued, and before its update.
    """
    phases = steps[case]
    order = list(phases)
    assert order.index("backward") < order.index("read") < order.index("clip")
    assert {name for name, counted in phases.items() if counted["waits"]} == {"read"}
    assert phases["read"]["waits"] == 1
    copies: Counter[str] = Counter()
    for counted in phases.values():
        copies.update({name: number for name, number in counted.items() if name.endswith(("device", "host"))})
    assert copies == {"pinned to device": 2, "pinned to host": 1}


def test_encoding_asks_for_the_next_batch_before_it_waits_for_one(steps: dict[str, Any]) -> None:
    """Three batches; a copy to the host is begun at once, or it would come behind the next batch's work."""
    batch, wait = ["pinned to device", "pinned to host"], ["Event.synchronize"]
    assert steps["encoding"] == [*batch, *batch, *wait, *batch, *wait, *wait]


@pytest.mark.parametrize(("phase", "most"), [("forward", 1510), ("backward", 2950)])
def test_operations_of_bge_large(phase: str, most: int, steps: dict[str, Any]) -> None:
    """24 layers, of which the last one is special and the others are alike."""
    one, two = (steps[case][phase]["operations"] for case in ("one layer", "two layers"))
    assert 0.9 * most < one + 23 * (two - one) <= most


@pytest.mark.parametrize("case", ["graphs", "graphs and GradCache"])
def test_operations_outside_of_graphs(case: str, steps: dict[str, Any]) -> None:
    """The same for any number of layers; of one layer that is not held there are more. GradCache: four chunks."""
    asked = {name: counted["operations"] for name, counted in steps[case].items() if name != "captured"}
    assert sum(asked.values()) <= 250 < sum(counted["operations"] for counted in steps["one layer"].values())


def test_kernels_of_a_compiled_layer() -> None:
    """With a working copy's weights: matrix products, attention and what Inductor makes of the rest."""
    pytest.importorskip("triton")
    of_layer = counts("compiled_layer.py")["bf16 weights"]
    forward, backward = (sum(of_layer[name].values()) for name in ("forward", "backward"))
    assert 7 < forward <= 12 and 13 < backward <= 40
