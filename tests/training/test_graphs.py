"""Passes held as graphs, on a CPU: whatever a graph would repeat, `Recorder` repeats; value and gradient stay the same."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from batches import TextRow, gradient_error, gradients_of, load, make_rows, rank_batch, true_gradients
from tiny_model import add_dense, fixed_rows_always, make_tiny_bert
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bge_core.encoder import graphs
from bge_core.encoder.fixed import FixedRows
from bge_core.encoder.graphs import Bucket, Buckets, Capture, hold_passes, why_no_graphs
from bge_core.encoder.packing import FixedRowsOf
from bge_core.training import build
from bge_core.training import graphs as training_graphs
from bge_core.training.batch import Batch
from bge_core.training.graphs import GraphedEncoder
from bge_core.training.step import StepSettings, forward_backward

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
BF16: Callable[[], Any] = partial(torch.autocast, "cpu", torch.bfloat16)


class Recorder(TorchDispatchMode):
    """Notes what is dispatched, with the tensors themselves; `repeat` does it again, on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in WAITS, f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def repeat(self) -> None:
        """What a graph's replay does."""
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for own, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(own, Tensor) and own.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        own.detach().copy_(new)


class Recording(Capture):
    """`Capture` on a CPU, by a Recorder."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.is_on, self.count = True, 0

    def warm_up(self, function: graphs.Pass) -> None:
        """Once; there are no streams."""
        function()

    def capture(self, function: graphs.Pass) -> graphs.Pass:
        """The calls, to be repeated."""
        self.count += 1
        with Recorder() as recorder:
            function()
        return recorder.repeat


@pytest.fixture(params=["as they are", "recorded"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Functions run as on a CPU, or what they did is repeated, as on a GPU."""
    if request.param == "recorded":
        monkeypatch.setattr(training_graphs, "Capture", Recording)
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tiny models."""
    folder = tmp_path_factory.mktemp("graphs")
    make_tiny_bert(folder / "model")
    make_tiny_bert(folder / "dropout", dropout=0.1)
    add_dense(make_tiny_bert(folder / "dense"))
    return folder


def batch_of(rows: tuple[TextRow, ...], chunk: int | None) -> Batch:
    batch = rank_batch(rows, [rows], teacher=False)
    return replace(batch, chunks=[FixedRows("", 0, 0, distinct=False).row(part) for part in batch.tokens.split(chunk)])


ROWS = [make_rows(seed, sizes) for seed, sizes in enumerate([(3, 1, 2, 2), (1, 2, 1, 3), (2, 2, 2, 2)])]


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("model", ["model", "dense"])
def test_loss_and_gradient_are_those_of_single_texts(folder: Path, way: str, model: str, chunk: int | None) -> None:
    """Of two accumulated micro-batches, three steps one after the other: the graphs are of the first."""
    encoder = load(folder / model, torch.float64)
    graphed, settings = GraphedEncoder(encoder, None), StepSettings(chunk_size=chunk)
    for rows in (ROWS[:2], ROWS[1:], ROWS[::-2]):
        for parameter in encoder.parameters():
            parameter.grad = None
        shares = forward_backward(graphed, [batch_of(part, chunk) for part in rows], settings)
        loss, gradients = true_gradients(folder / model, rows, "info_nce")
        assert abs(shares["loss"].item() - loss) < 1e-9
        assert gradient_error(gradients_of(encoder), gradients)[0] < 1e-9


def test_graphs_are_made_once_for_a_bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Recording] = []
    monkeypatch.setattr(training_graphs, "Capture", lambda device: made.append(Recording(device)) or made[-1])
    graphed = GraphedEncoder(load(folder / "model", torch.float64), None)
    for rows in ROWS:
        forward_backward(graphed, [batch_of(rows, 3)], StepSettings(chunk_size=3))
    assert made[0].count == 3 * len(graphed.buckets.held) == 3


@pytest.mark.parametrize("chunk", [None, 3])
def test_dropout_is_that_of_the_encoder_itself(folder: Path, way: str, chunk: int | None) -> None:
    """From the same random state the same bits, however often a graph was repeated and whenever it was made."""
    results: list[Any] = []
    for graphed in (False, True):
        encoder = load(folder / "dropout", torch.float64)
        model: Any = GraphedEncoder(encoder, None) if graphed else encoder
        torch.manual_seed(3)
        for rows in ROWS:
            shares = forward_backward(model, [batch_of(rows, chunk)], StepSettings(chunk_size=chunk))
            results.append((shares["loss"], torch.get_rng_state()))
        results.append(gradients_of(encoder))
    plain, held = results[: len(ROWS) + 1], results[len(ROWS) + 1 :]
    for (loss, state), (same_loss, same_state) in zip(plain[:-1], held[:-1], strict=True):
        assert torch.equal(loss, same_loss) and torch.equal(state, same_state)
    assert gradient_error(held[-1], plain[-1])[0] < 1e-14


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("working_copy", [True, False])
def test_half_precision_is_autocast(folder: Path, way: str, working_copy: bool, chunk: int | None) -> None:
    """The working copy is rounded as autocast rounds: the same gradient, after an update of the weights, too."""
    found = []
    for graphed in (False, True):
        encoder = load(folder / "model", torch.float32)
        model: Any = GraphedEncoder(encoder, torch.bfloat16, working_copy=working_copy) if graphed else encoder
        optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
        for rows in ROWS:
            optimizer.zero_grad(set_to_none=True)
            forward_backward(model, [batch_of(rows, chunk)], StepSettings(chunk_size=chunk, autocast=BF16))
            found.append(gradients_of(encoder))
            optimizer.step()
    for plain, held in zip(found[: len(ROWS)], found[len(ROWS) :], strict=True):
        assert gradient_error(held, plain)[0] < 1e-3
    assert gradient_error(found[0], found[1])[0] > 0.1  # else nothing would have been seen


def test_the_working_copy_is_of_linear_layers_alone(folder: Path) -> None:
    encoder = load(folder / "dense", torch.float32)
    before = {name: weight.data_ptr() for name, weight in encoder.named_parameters()}
    work, (rough, weights) = training_graphs._working_copy(encoder, torch.bfloat16)
    dtypes = {name: weight.dtype for name, weight in work.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        name for name in before if "LayerNorm" in name or "embeddings" in name
    }
    assert all(weight.data_ptr() == before[name] for name, weight in encoder.named_parameters())
    assert len(rough) == len(weights) == sum(dtype == torch.bfloat16 for dtype in dtypes.values())
    assert work.tokenizer is encoder.tokenizer


def test_another_model_between_changes_nothing(folder: Path, way: str) -> None:
    """An evaluation in the middle of an accumulated step, a loss that never comes back, a frozen weight."""
    encoder = load(folder / "model", torch.float64)
    encoder.freeze(position_embeddings=True)
    graphed = GraphedEncoder(encoder, None)
    first, second = (batch_of(rows, None) for rows in ROWS[:2])
    assert first.chunks and second.chunks
    graphed(first.chunks[0])  # nobody differentiates it
    with torch.no_grad():
        represented = graphed(second.chunks[0])
    encoder.eval()(second.tokens)
    encoder.train()
    forward_backward(graphed, [first, second], StepSettings())
    assert torch.equal(represented, graphed(second.chunks[0]).detach())
    _, want = true_gradients(folder / "model", ROWS[:2], "info_nce")
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert any("position" in name for name in frozen)
    got = gradients_of(encoder)
    assert gradient_error(got, {name: value for name, value in want.items() if name in got})[0] < 1e-9


@pytest.mark.parametrize("at", [1, 3])
def test_what_cannot_be_captured_runs_without(
    folder: Path, at: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the first capture that fails on, graphs that were made before included."""

    def fails(self: Recording, function: graphs.Pass) -> graphs.Pass:
        self.count += 1
        function()
        if self.count < at:
            return lambda: pytest.fail("repeated") if self.count >= at else function()
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors ...")

    monkeypatch.setattr(training_graphs, "Capture", Recording)
    monkeypatch.setattr(Recording, "capture", fails)
    encoder = load(folder / "dropout", torch.float64)
    graphed = GraphedEncoder(encoder, None)
    torch.manual_seed(3)
    for rows in ROWS[:2]:
        forward_backward(graphed, [batch_of(rows, 3)], StepSettings(chunk_size=3))
    assert all(not bucket.capture.is_on for bucket in graphed.buckets.held.values())
    held = gradients_of(encoder)
    encoder.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    for rows in ROWS[:2]:
        forward_backward(encoder, [batch_of(rows, 3)], StepSettings(chunk_size=3))
    assert gradient_error(held, gradients_of(encoder))[0] < 1e-14
    (line,) = [record.message for record in caplog.records]
    assert line.endswith(
        "none can be captured here, going on without: operation not permitted when stream is capturing"
    )


def test_layers_that_cannot_be_compiled_run_as_they_are(
    folder: Path, way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(backbone: Any, *, fixed: bool) -> None:
        for layer in backbone.encoder.layer[:-1]:
            layer._compiled_call_impl = broken

    def broken(*args: Any, **more: Any) -> Tensor:
        raise RuntimeError("Cannot find a working triton installation.\nMore information")

    monkeypatch.setattr(training_graphs, "compile_layers", no_compiler)
    encoder = load(folder / "model", torch.float64)
    graphed = GraphedEncoder(encoder, None, compiled=True)
    forward_backward(graphed, [batch_of(rows, 3) for rows in ROWS[:2]], StepSettings(chunk_size=3))
    _, want = true_gradients(folder / "model", ROWS[:2], "info_nce")
    assert gradient_error(gradients_of(encoder), want)[0] < 1e-9
    (line,) = [record.message for record in caplog.records]
    assert line.endswith("cannot be compiled, going on without: Cannot find a working triton installation.")


def test_the_least_recently_used_bucket_goes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_BUCKETS", 2)
    rows = {n: FixedRows("", 0, 0, False).row(batch_of(ROWS[0], None).tokens.split(n)[0]) for n in (1, 2, 4)}
    rows = {n: replace(row, longest=128 * n) for n, row in rows.items()}
    buckets = Buckets(lambda row: Bucket(lambda row: row.place_S, row, Capture(torch.device("cpu"))), visits=2)
    assert buckets.of(rows[1]) is None
    first = buckets.of(rows[1])
    assert first is not None and buckets.of(rows[1]) is first
    for n in (2, 2, 1, 4, 4):
        buckets.of(rows[n])
    assert [key[2] for key in buckets.held] == [128, 512]
    assert buckets.of(rows[1]) is first


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
def test_encoding_by_graphs(folder: Path, monkeypatch: pytest.MonkeyPatch, pooling: Any) -> None:
    """The same vectors, in a run and for a caller outside of it; graphs from a bucket's second row on."""
    monkeypatch.setattr(graphs, "Capture", Recording)
    monkeypatch.setattr(graphs, "why_no_graphs", lambda *args: None)
    monkeypatch.setattr(FixedRowsOf, "now", lambda self, distinct: FixedRows("", 0, 0, distinct))
    encoder = load(folder / "model", torch.float64, pooling=pooling).eval()
    texts = ["信用卡怎么还款", "快递", "退款要多久", "密码忘了怎么办"] * 3
    want = encoder.encode(texts, max_tokens=16)
    hold_passes(encoder, "no")
    assert encoder.represent is not None
    assert (encoder.encode(texts, max_tokens=16) == want).all()
    assert (encoder.encode(texts, max_tokens=16) == want).all()
    with torch.no_grad():
        encoder(batch_of(ROWS[0], None).tokens)


def test_why_there_are_no_graphs(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = load(folder / "model", torch.float32)
    assert why_no_graphs(encoder, torch.bfloat16) == "this is no GPU"
    hold_passes(encoder, "bf16")
    assert encoder.represent is None and "--cuda_graphs: not while encoding: this is no GPU" in caplog.text


RUNS: dict[str, dict[str, Any]] = {
    "plain": {"save_steps": 4},
    "chunks": {
        "sub_batch_size": 5,
        "gradient_accumulation_steps": 2,
        "ema_decay": 0.5,
        "save_steps": 2,
        "eval_steps": 2,
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_by_graphs_is_the_run_without(
    name: str, tiny_bert_dropout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """train.py --cuda_graphs: the same weights and metrics, bit for bit, as on the same rows without; and resumed."""
    data, settings = runs.write_rows(tmp_path / "rows.jsonl", 24), RUNS[name]
    settings |= {"val_data": data} if "eval_steps" in settings else {}
    monkeypatch.setattr(FixedRowsOf, "now", fixed_rows_always)
    for module in (build, graphs):
        monkeypatch.setattr(module, "why_no_graphs", lambda *args: None)
        monkeypatch.setattr(training_graphs if module is build else graphs, "Capture", Recording)
    held: list[Any] = []  # evaluations encode by graphs, too
    monkeypatch.setattr(build, "hold_passes", lambda encoder, half: held.append(encoder) or hold_passes(encoder, half))
    folders = {graphed: tmp_path / f"graphs_{graphed}" for graphed in (False, True)}
    for graphed, folder in folders.items():
        assert runs.run(tiny_bert_dropout, data, folder, cuda_graphs=graphed, **settings) == 0
    assert runs.equal_weights(*folders.values())
    assert len(held) == 1 and held[0].represent is not None
    steps, same_steps = map(runs.read_steps, folders.values())
    assert steps == same_steps
    resumed = runs.copy_run(folders[True], tmp_path / "resumed")
    more = {"resume_from_checkpoint": "latest", "cuda_graphs": True}
    assert runs.run(tiny_bert_dropout, data, resumed, **more, **settings) == 0
    assert runs.equal_weights(resumed, folders[True]) and runs.read_steps(resumed) == steps


def test_a_run_without_a_gpu_says_so(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = runs.write_rows(tmp_path / "rows.jsonl", 8)
    assert runs.run(tiny_bert, data, tmp_path / "run", cuda_graphs=True, max_steps=1) == 0
    assert "--cuda_graphs: not in training: this is no GPU" in caplog.text
    monkeypatch.setattr(build, "why_no_graphs", lambda *args: None)
    assert (
        runs.run(tiny_bert, data, tmp_path / "other", cuda_graphs=True, gradient_checkpointing=True, max_steps=1) == 0
    )
    assert "--cuda_graphs: not in training: --gradient_checkpointing" in caplog.text
