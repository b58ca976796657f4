"""The ways to merge against slow float64 arithmetic and by hand; the greedy soup; merge.py with each of them."""

import json
import math
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from safetensors.torch import load_file
from test_merging import contents, other_vocabulary, pickle, pool_by_mean, remake, store, weights_of
from tiny_model import make_tiny_bert
from torch import Tensor
from transformers import AutoModel

import merge
from bge_core import UserError
from bge_core.encoder.load import load_encoder
from bge_core.encoder.settings import EncoderSettings, write_settings
from bge_core.evaluation.evaluator import evaluate_encoder, load_task
from bge_core.files import atomic
from bge_core.merging import choose, folders, methods
from bge_core.merging.folders import merge_folders
from bge_core.merging.methods import Trial, greedy_soup, linear, slerp, task_arithmetic, ties

SIZE = {"hidden_size": 16, "num_layers": 2}


def whole(merged: Callable[[slice], Tensor], size: int, step: int = 5) -> Tensor:
    """All entries, asked for piece by piece."""
    return torch.cat([merged(slice(start, start + step)) for start in range(0, size, step)])


def by(
    way: Callable[..., Any], tensors: Sequence[Sequence[float]], weights: list[float], **options: Any
) -> list[float]:
    return whole(way([torch.tensor(values) for values in tensors], weights, **options), len(tensors[0])).tolist()


def random_tensors(count: int, size: int = 203, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """One that the others have in common, and what each adds to it."""
    generator = torch.Generator().manual_seed(count * 1000 + size)
    common = torch.randn(size, generator=generator)
    return [(common + 0.3 * torch.randn(size, generator=generator)).to(dtype) for _ in range(count)]


# ------------------------------------------------------------------------------------------- slow references, float64


def slow_linear(flats: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros(len(flats[0]), dtype=torch.float64)
    for flat, weight in zip(flats, weights, strict=True):
        total += weight * flat.double()
    return total


def slow_slerp(flats: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Shoemake's formula on the unit vectors' angle, wherever it is defined."""
    a, b = (flat.double() for flat in flats)
    angle = ((a / a.norm()) @ (b / b.norm())).clamp(-1, 1).acos()
    return (torch.sin(weights[0] * angle) * a + torch.sin(weights[1] * angle) * b) / torch.sin(angle)


def slow_task_arithmetic(flats: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    *tuned, base = (flat.double() for flat in flats)
    return base + slow_linear([flat - base for flat in tuned], weights)


def slow_ties(flats: Sequence[Tensor], weights: Sequence[float], density: float = 0.2) -> Tensor:
    """Entry by entry, in Python's numbers."""
    *tuned, base = (flat.double().tolist() for flat in flats)
    trimmed = []
    for values in tuned:
        task = [value - start for value, start in zip(values, base, strict=True)]
        kept = sorted(map(abs, task), reverse=True)[: max(1, round(density * len(task)))]
        trimmed.append([value if abs(value) >= kept[-1] else 0.0 for value in task])
    result = []
    for place, start in enumerate(base):
        entries = [(weight, task[place]) for weight, task in zip(weights, trimmed, strict=True)]
        total = sum(weight * value for weight, value in entries)
        agreeing = [(weight, value) for weight, value in entries if value * total > 0]
        share = sum(weight for weight, _ in agreeing)
        result.append(start + (sum(weight * value for weight, value in agreeing) / share if share else 0.0))
    return torch.tensor(result, dtype=torch.float64)


CASES: dict[str, tuple[Any, Any, int, list[float], dict[str, float]]] = {  # way, reference, tensors, weights, options
    "linear": (linear, slow_linear, 4, [0.1, 0.2, 0.3, 0.4], {}),
    "linear extrapolates": (linear, slow_linear, 2, [1.7, -0.7], {}),
    "slerp": (slerp, slow_slerp, 2, [0.3, 0.7], {}),
    "slerp extrapolates": (slerp, slow_slerp, 2, [-0.4, 1.4], {}),
    "task_arithmetic": (task_arithmetic, slow_task_arithmetic, 4, [0.4, 0.4, 0.4], {}),
    "task_arithmetic unlearns": (task_arithmetic, slow_task_arithmetic, 3, [0.9, -0.5], {}),
    "ties": (ties, slow_ties, 4, [0.2, 0.3, 0.5], {}),
    "ties keeps half": (ties, slow_ties, 6, [0.2] * 5, {"density": 0.5}),
    "ties keeps all": (ties, slow_ties, 3, [0.45, 0.55], {"density": 1.0}),
    "ties keeps one entry": (ties, slow_ties, 4, [0.2, 0.3, 0.5], {"density": 1e-9}),
    "ties leaves one model out": (ties, slow_ties, 4, [0.5, 0.0, 0.5], {"density": 0.4}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_a_way_is_its_float64_reference(case: str, dtype: torch.dtype) -> None:
    way, reference, count, weights, options = CASES[case]
    flats = random_tensors(count, dtype=dtype)
    before = [flat.clone() for flat in flats]
    found = whole(way(flats, weights, **options), len(flats[0]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), reference(flats, weights, **options), rtol=5e-7, atol=5e-7)
    assert all(torch.equal(flat, copy) for flat, copy in zip(flats, before, strict=True))  # they are files


# --------------------------------------------------------------------------------------------------------- by hand


def test_linear_by_hand() -> None:
    assert by(linear, [[1.0, 2.0], [3.0, -2.0], [8.0, 0.0]], [0.25, 0.5, 0.25]) == [3.75, -0.5]


def test_slerp_by_hand() -> None:
    """A third of a right angle; tensors of other lengths keep them at both ends; blocks do not matter."""
    assert by(slerp, [[1.0, 0.0], [0.0, 1.0]], [2 / 3, 1 / 3]) == pytest.approx([math.cos(math.pi / 6), 0.5])
    assert by(slerp, [[4.0, 0.0], [0.0, 1.0]], [0.5, 0.5]) == pytest.approx([4 * math.sqrt(0.5), math.sqrt(0.5)])


def test_slerp_keeps_the_length_that_linear_loses() -> None:
    a, b = (flat / flat.norm() for flat in random_tensors(2))
    assert whole(slerp([a, b], [0.5, 0.5]), len(a)).norm().item() == pytest.approx(1, abs=1e-6)
    assert whole(linear([a, b], [0.5, 0.5]), len(a)).norm().item() < 0.99


@pytest.mark.parametrize(
    "a, b",
    [([1.0, 2.0], [3.0, 6.0]), ([1.0, 2.0], [-1.0, -2.0]), ([1.0, 2.0], [0.0, 0.0]), ([0.0, 0.0], [0.0, 0.0])],
    ids=["parallel", "opposite", "one is zero", "both are"],
)
def test_slerp_is_linear_where_there_is_no_great_circle(a: list[float], b: list[float]) -> None:
    assert by(slerp, [a, b], [0.25, 0.75]) == by(linear, [a, b], [0.25, 0.75])


@pytest.mark.parametrize("angle", [1e-5, 1e-3, 1.41e-3, 1.42e-3, 2e-3, 0.1])
def test_slerp_has_no_step_where_it_becomes_linear(angle: float) -> None:
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    found = whole(slerp([a, b], [0.4, 0.6]), 2)
    assert found.tolist() == pytest.approx([math.cos(0.6 * angle), math.sin(0.6 * angle)], abs=3e-7)


def test_the_angle_of_a_long_tensor_is_taken_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    flats = random_tensors(2)
    expected = whole(slerp(flats, [0.3, 0.7]), 203)
    monkeypatch.setattr(methods, "BLOCK", 7)
    torch.testing.assert_close(whole(slerp(flats, [0.3, 0.7]), 203), expected, rtol=1e-6, atol=1e-7)


def test_task_arithmetic_by_hand() -> None:
    tuned, base = [[2.0, 1.0], [1.0, 3.0]], [1.0, 1.0]
    assert by(task_arithmetic, [*tuned, base], [1.0, 1.0]) == [2.0, 3.0]
    assert by(task_arithmetic, [*tuned, base], [0.5, 2.0]) == [1.5, 5.0]
    assert by(task_arithmetic, [*tuned, base], [-1.0, 0.0]) == [0.0, 1.0]


def test_ties_by_hand() -> None:
    """Two of four entries stay; 4 and 6 stand alone, -3 and -2 agree, the last place is trimmed in both."""
    base = [1.0, 1.0, 1.0, 1.0]
    tuned = [[5.0, -2.0, 2.0, 1.5], [0.0, -1.0, 7.0, 1.5]]
    assert by(ties, [*tuned, base], [0.5, 0.5], density=0.5) == [5.0, -1.5, 7.0, 1.0]
    assert by(ties, [*tuned, base], [0.25, 0.75], density=0.5) == [5.0, 1 - 2.25, 7.0, 1.0]
    assert by(ties, [*tuned, base], [0.5, 0.5], density=0.25) == [5.0, 1.0, 7.0, 1.0]


def test_the_heavier_side_is_elected_and_the_other_left_out() -> None:
    base, tuned = [0.0], [[4.0], [-6.0]]
    assert by(ties, [*tuned, base], [0.5, 0.5], density=1.0) == [-6.0]  # 2 - 3 < 0
    assert by(ties, [*tuned, base], [0.75, 0.25], density=1.0) == [4.0]  # 3 - 1.5 > 0
    assert by(ties, [[4.0], [-4.0], [7.0]], [0.5, 0.5], density=1.0) == [0.0]  # differences -3 and -11 agree
    assert by(ties, [[1.0], [-1.0], [0.0]], [0.5, 0.5], density=1.0) == [0.0]  # a draw: the base's value


def test_entries_as_large_as_the_smallest_one_kept_are_kept() -> None:
    assert by(ties, [[1.0, -1.0, 1.0, 0.5], [0.0] * 4], [1.0], density=0.25) == [1.0, -1.0, 1.0, 0.0]


WAYS = {"linear": linear, "slerp": slerp, "task_arithmetic": task_arithmetic, "ties": ties}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", [0, 1])
def test_weight_one_is_that_model_and_the_other_is_not_read(way: str, place: int) -> None:
    """Bit for bit, but for what ties adds and takes away again."""
    models = random_tensors(3)
    base = [models[2]] if way in ("task_arithmetic", "ties") else []
    models[1 - place] = torch.full_like(models[0], math.inf)
    weights = [0.0, 0.0]
    weights[place] = 1.0
    options = {"density": 1.0} if way == "ties" else {}
    found = whole(WAYS[way]([*models[:2], *base], weights, **options), 203)  # type: ignore[operator]
    if way == "ties":
        torch.testing.assert_close(found, models[place], rtol=0, atol=3e-7)
    else:
        assert torch.equal(found, models[place])


@pytest.mark.parametrize("way", WAYS)
def test_two_equal_models_stay_what_they_are(way: str) -> None:
    one, base = random_tensors(2)
    bases = [base] if way in ("task_arithmetic", "ties") else []
    options = {"density": 1.0} if way == "ties" else {}
    found = whole(WAYS[way]([one, one, *bases], [0.5, 0.5], **options), 203)  # type: ignore[operator]
    torch.testing.assert_close(found, one, rtol=0, atol=3e-7 if way == "ties" else 0)


@pytest.mark.parametrize("way", ["task_arithmetic", "ties"])
def test_models_that_learned_nothing_are_their_base(way: str) -> None:
    (base,) = random_tensors(1)
    assert torch.equal(whole(WAYS[way]([base, base, base], [0.5, 0.5]), 203), base)
    assert torch.equal(whole(task_arithmetic([*random_tensors(2), base], [0.0, 0.0]), 203), base)


def test_one_whole_task_vector_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    task_vector = methods._task_vector

    def counted(flat: Tensor, base: Tensor) -> Tensor:
        nonlocal most
        task = task_vector(flat, base)
        if len(task) == 203:
            alive.append(weakref.ref(task))
            most = max(most, sum(reference() is not None for reference in alive))
        return task

    monkeypatch.setattr(methods, "_task_vector", counted)
    whole(ties(random_tensors(8), [1 / 7] * 7), 203)
    assert (len(alive), most) == (7, 1)


# ------------------------------------------------------------------------------------------------------ whole models


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four models: float32, float16, float32, and the float32 base."""
    root = tmp_path_factory.mktemp("models")
    dtypes = (torch.float32, torch.float16, torch.float32, torch.float32)
    return [make_tiny_bert(root / f"m{seed}", seed=seed, dtype=dtype, **SIZE) for seed, dtype in enumerate(dtypes)]


@pytest.fixture
def models(made: list[Path], tmp_path: Path) -> list[Path]:
    """Copies that a test may change."""
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in made]


def run(models: Sequence[Path], out: Path, *more: str) -> int:
    return merge.main(["--models", *map(str, models), "--output_path", str(out), *more])


FOLDER_CASES: dict[str, tuple[Any, int, list[float], list[str]]] = {  # reference, models, weights, flags
    "linear": (slow_linear, 3, [0.2, 0.3, 0.5], []),
    "slerp": (slow_slerp, 2, [0.35, 0.65], []),
    "task_arithmetic": (slow_task_arithmetic, 3, [0.4, 0.5, 0.6], ["--base_model"]),
    "ties": (slow_ties, 3, [0.2, 0.3, 0.5], ["--base_model"]),
}


@pytest.mark.parametrize("method", FOLDER_CASES)
def test_each_tensor_of_a_model_is_merged_by_itself(
    method: str, made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the reference says, the same bits in pieces of any size, and the manifest says how."""
    reference, count, weights, flags = FOLDER_CASES[method]
    words = ["--method", method, "--weights", *map(str, weights)]
    words += [word for flag in flags for word in (flag, str(made[3]))]
    assert run(made[:count], tmp_path / "out", *words) == 0
    states = [weights_of(folder) for folder in [*made[:count], *([made[3]] if flags else [])]]
    found = weights_of(tmp_path / "out")
    assert found.keys() == states[0].keys()
    for name, value in found.items():
        expected = reference([state[name].reshape(-1) for state in states], weights).view(value.shape)
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    manifest = atomic.read_json(tmp_path / "out" / "manifest.json")
    assert manifest["method"] == method and manifest["dtype"] == "float32" and manifest["weights"] == weights
    assert manifest["models"] == [str(folder) for folder in made[:count]]
    assert manifest.get("base_model") == (str(made[3]) if flags else None)
    assert manifest.get("density") == (0.2 if method == "ties" else None)
    assert [entry["model"] for entry in manifest["inputs"]] == [
        str(f) for f in [*made[:count], *made[3:][: len(flags)]]
    ]
    monkeypatch.setattr(folders, "PIECE", 7)
    assert run(made[:count], tmp_path / "pieces", *words) == 0
    stored = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "pieces")]
    assert stored[0] == stored[1]


def test_density_changes_what_stays(made: list[Path], tmp_path: Path) -> None:
    words = ["--method", "ties", "--base_model", str(made[3])]
    for density in ("0.2", "0.9"):
        assert run(made[:3], tmp_path / density, *words, "--density", density) == 0
    assert run(made[:3], tmp_path / "default", *words) == 0
    base = weights_of(made[3])
    kept = {}
    for name in ("0.2", "0.9", "default"):
        state = weights_of(tmp_path / name)
        kept[name] = sum(int((state[key] != base[key]).sum()) for key in state)
    total = sum(value.numel() for value in base.values())
    assert kept["default"] == kept["0.2"] and 0.2 * total < kept["0.2"] < 0.6 * total < 0.9 * total < kept["0.9"]
    assert atomic.read_json(tmp_path / "0.9" / "manifest.json")["density"] == 0.9


def test_weights_of_task_arithmetic_that_cancel_the_base_are_warned_of(
    made: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Equal weights, the default, sum to 1: then it is the plain average, whatever the base."""
    words = ["--method", "task_arithmetic", "--base_model", str(made[3])]
    assert run(made[:2], tmp_path / "out", *words) == 0
    assert "sum to 1: the base cancels out" in caplog.text
    assert run(made[:2], tmp_path / "linear") == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "linear/model.safetensors").read_bytes()
    caplog.clear()
    assert run(made[:2], tmp_path / "more", *words, "--weights", "0.4", "0.4") == 0
    assert "cancels" not in caplog.text


# ---------------------------------------------------------------------------------------------------- type of the result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_result_has_the_type_that_was_asked_for(dtype: torch.dtype, made: list[Path], tmp_path: Path) -> None:
    """Computed in float32, then rounded, whatever the inputs' types."""
    name = str(dtype).removeprefix("torch.")
    assert run(made[:2], tmp_path / "exact", "--weights", "0.3", "0.7") == 0
    assert run(made[:2], tmp_path / "out", "--weights", "0.3", "0.7", "--dtype", name) == 0
    exact, found = weights_of(tmp_path / "exact"), weights_of(tmp_path / "out")
    assert all(torch.equal(found[key], value.to(dtype)) for key, value in exact.items())
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == name
    assert AutoModel.from_pretrained(tmp_path / "out").dtype == dtype
    assert load_encoder(tmp_path / "out").backbone.dtype == torch.float32
    assert atomic.read_json(tmp_path / "out/manifest.json")["dtype"] == name


@pytest.mark.parametrize("stored_as", ["safetensors", "pickle"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_keep_is_the_first_models_type(
    models: list[Path], tmp_path: Path, order: tuple[int, int], stored_as: str
) -> None:
    chosen = [models[i] for i in order]
    if stored_as == "pickle":
        pickle(chosen[0])
    assert run(chosen, tmp_path / "out", "--dtype", "keep") == 0
    expected = (torch.float32, torch.float16)[order[0]]
    assert {value.dtype for value in weights_of(tmp_path / "out").values()} == {expected}


def test_integers_keep_their_type_in_a_half_model(models: list[Path], tmp_path: Path) -> None:
    positions = torch.arange(512)[None]
    store(models[0], {**weights_of(models[0]), "embeddings.position_ids": positions, "flag": torch.tensor([True])})
    assert run(models[:2], tmp_path / "out", "--dtype", "bfloat16") == 0
    found = weights_of(tmp_path / "out")
    assert torch.equal(found["embeddings.position_ids"], positions) and found["flag"].tolist() == [True]


def test_what_float16_cannot_hold_is_refused(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = weights_of(models[0])
    state["embeddings.LayerNorm.bias"][0] = 2e5
    store(models[0], state)
    assert run([models[0], models[2]], tmp_path / "out", "--dtype", "float16") == 2
    assert "embeddings.LayerNorm.bias would be NaN or infinite in float16; try --dtype bf" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run([models[0], models[2]], tmp_path / "out", "--dtype", "bfloat16") == 0


def test_keep_of_a_type_that_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    double = make_tiny_bert(tmp_path / "double", dtype=torch.float64, **SIZE)
    assert run([double, double], tmp_path / "out", "--dtype", "keep") == 2
    assert f"--dtype keep: {double} is torch.float64; name the type" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- refusals

BASE = ["--base_model", "{3}"]
REFUSED: dict[str, tuple[int, list[str], str]] = {  # models, flags, message
    "slerp of three": (3, ["--method", "slerp"], "--method slerp: is between two models, and these are 3: name two"),
    "slerp of one": (1, ["--method", "slerp"], "--method slerp: is between two models, and these are 1: name two"),
    "no base": (2, ["--method", "task_arithmetic"], "--method task_arithmetic: needs --base_model"),
    "no base of ties": (2, ["--method", "ties"], "--method ties: needs --base_model"),
    "base of linear": (2, BASE, "--base_model {3}: means nothing to --method linear: drop it"),
    "base of slerp": (2, [*BASE, "--method", "slerp"], "--base_model {3}: means nothing to --method slerp: drop it"),
    "density 0": (2, [*BASE, "--method", "ties", "--density", "0"], "--density 0.0: use a share above 0, up to 1"),
    "density 1.5": (2, [*BASE, "--method", "ties", "--density", "1.5"], "--density 1.5: use a share above 0, up to 1"),
    "density NaN": (2, [*BASE, "--method", "ties", "--density", "nan"], "--density nan: use a share above 0, up to 1"),
    "density of linear": (2, ["--density", "0.5"], "--density 0.5: means nothing to --method linear: drop it"),
    "ties below 0": (
        2, [*BASE, "--method", "ties", "--weights", "1.5", "-0.5"], "for the models {0}, {1}: --method ties takes none below",
    ),
    "ties of sum 2": (2, [*BASE, "--method", "ties", "--weights", "1", "1"], "they sum to 2; make it 1"),
    "slerp of sum 2": (2, ["--method", "slerp", "--weights", "1", "1"], "they sum to 2; make it 1"),
    "weights": (2, [*BASE, "--method", "task_arithmetic", "--weights", "1"], "give one a model (2)"),
    "infinite": (2, [*BASE, "--method", "task_arithmetic", "--weights", "1", "inf"], "{1}: use finite numbers"),
    "unknown method": (2, ["--method", "dare"], "--method: invalid choice: 'dare'"),
    "unknown type": (2, ["--dtype", "float8"], "--dtype: invalid choice: 'float8'"),
    "soup without data": (2, ["--method", "greedy_soup"], "--method 'greedy_soup': needs --val_data"),
    "soup with weights": (
        2, ["--method", "greedy_soup", "--val_data", "v", "--weights", "0.5", "0.5"],
        "--weights [0.5, 0.5]: --sweep and --method greedy_soup find the weights: drop it",
    ),
    "soup with examples": (
        2, ["--method", "greedy_soup", "--val_data", "v", "--example_data", "e"],
        "--example_data 'e': --sweep and --method greedy_soup find the weights: drop it",
    ),
    "soup with a base": (
        2, [*BASE, "--method", "greedy_soup", "--val_data", "v"], "--base_model {3}: means nothing to --method greedy",
    ),
    "data of no soup": (2, ["--val_data", "v"], "--val_data 'v': goes with --sweep or --method greedy_soup alone: drop it"),
    "corpus of no soup": (2, ["--corpus", "c"], "--corpus 'c': goes with --sweep or --method greedy_soup alone: drop it"),
    "metric of no soup": (2, ["--metric", "MRR@1"], "--metric 'MRR@1': goes with --sweep or --method greedy_soup alone: drop it"),
    "unknown metric": (
        2, ["--method", "greedy_soup", "--val_data", "v", "--metric", "MAP"], "unknown metric 'MAP'; did you mean 'MAP@10'?",
    ),
    "no such data": (2, ["--method", "greedy_soup", "--val_data", "/no/such.jsonl"], "/no/such.jsonl: no such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(
    case: str, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count, words, message = REFUSED[case]
    before = contents(tmp_path)
    words = [word.format(*models) for word in words]
    assert run(models[:count], tmp_path / "out", *words) == 2
    output = capsys.readouterr()
    assert message.format(*models) in output.err
    assert output.err.count("error: ") == 1 and "Traceback" not in output.err and not output.out
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


def lora(folder: Path) -> None:
    """As peft saves an adapter: no config.json, no tokenizer."""
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "BAAI/bge"})
    )
    (folder / "adapter_model.safetensors").write_bytes(b"")


def lora_beside(folder: Path) -> None:
    """As sentence-transformers saves one, beside a configuration and tokenizer."""
    (folder / "adapter_config.json").write_text("{}")


STRANGERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "lora": (
        lora, "is a LoRA adapter (adapter_config.json), no whole model; merge it into its base first, in Python:   from peft "
        "import PeftModel   from transformers import AutoModel, AutoTokenizer   adapted = PeftModel.from_pretrained("
        "AutoModel.from_pretrained('BAAI/bge'), '{stranger}')   adapted.merge_and_unload().save_pretrained(",
    ),
    "lora beside": (lora_beside, "{stranger}: is a LoRA adapter"),
    "tokenizer": (other_vocabulary, "{0} and {stranger} cannot be merged: the tokenizer's id of '一' is"),
    "architecture": (remake(num_layers=3), "{0} and {stranger} cannot be merged: num_hidden_layers is 2 and 3"),
    "pooling": (pool_by_mean, "{0} and {stranger} cannot be merged: pooling is cls and mean"),
}  # fmt: skip


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties", "greedy_soup"])
@pytest.mark.parametrize("kind", STRANGERS)
def test_a_model_that_does_not_fit_is_refused_by_every_method(
    kind: str, method: str, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also as the base."""
    change, message = STRANGERS[kind]
    write_settings(models[0], EncoderSettings("cls", True), 16)
    change(models[2])
    before = contents(tmp_path)
    words = ["--method", method]
    chosen = [models[0], models[2]]
    if method in ("task_arithmetic", "ties"):
        chosen, words = models[:1], [*words, "--base_model", str(models[2])]
    if method == "greedy_soup":
        words += ["--val_data", str(runs.write_rows(tmp_path / "val.jsonl", 4))]
        before = contents(tmp_path)
    assert run(chosen, tmp_path / "out", *words) == 2
    output = capsys.readouterr()
    assert message.format(*models, stranger=models[2]) in output.err.replace("\n", " ")
    assert output.err.count("error: ") == 1 and "Traceback" not in output.err and not output.out
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


def test_the_base_is_never_overwritten(models: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(models[3])
    words = ["--method", "ties", "--base_model", str(models[3]), "--overwrite_output_dir"]
    assert run(models[:2], models[3], *words) == 2
    assert "is one of the models to merge" in capsys.readouterr().err and contents(models[3]) == before
    with pytest.raises(UserError, match="is one of the models to merge"):
        names, base = [str(folder) for folder in models[:2]], str(models[3])
        merge_folders(names, [0.5, 0.5], base, method="ties", base_model=base, overwrite=True)
    assert contents(models[3]) == before


@pytest.mark.parametrize("method", ["greedy_soup", "dare"])
def test_the_library_refuses_what_is_no_way_to_merge(method: Any, made: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"method '{method}': use one of linear, slerp, task_arithmetic, ties"):
        merge_folders([str(f) for f in made[:2]], [0.5, 0.5], tmp_path / "out", method=method)
    with pytest.raises(UserError, match="--method ties: needs --base_model"):
        merge_folders([str(f) for f in made[:2]], [0.5, 0.5], tmp_path / "out", method="ties")


# ---------------------------------------------------------------------------------------------------------- greedy soup


def scored(values: dict[str, float]) -> Callable[[Sequence[str]], float]:
    """A score by the names that are averaged; each is asked for once."""
    left = dict(values)
    return lambda names: left.pop("".join(names))


def test_a_greedy_soup_by_hand() -> None:
    """The best is b; a lowers it, d equals it, c raises it."""
    score = scored({"a": 0.7, "b": 0.9, "c": 0.5, "d": 0.6, "ba": 0.89, "bd": 0.9, "bdc": 0.95})
    chosen, trials = greedy_soup(["a", "b", "c", "d"], score)
    assert chosen == [1, 3, 2]
    assert trials == [
        Trial((1,), 0.9, True), Trial((0,), 0.7, False), Trial((3,), 0.6, False), Trial((2,), 0.5, False),
        Trial((1, 0), 0.89, False), Trial((1, 3), 0.9, True), Trial((1, 3, 2), 0.95, True),
    ]  # fmt: skip


def test_equal_scores_keep_the_order_that_was_given() -> None:
    score = scored({"a": 0.5, "b": 0.5, "c": 0.5, "ab": 0.5, "abc": 0.5})
    assert greedy_soup(["a", "b", "c"], score)[0] == [0, 1, 2]


def test_a_soup_may_be_the_best_model_alone() -> None:
    score = scored({"a": 0.1, "b": 0.5, "c": 0.3, "bc": 0.49, "ba": 0.4})
    chosen, trials = greedy_soup(["a", "b", "c"], score)
    assert chosen == [1] and [trial.kept for trial in trials] == [True, False, False, False, False]
    assert greedy_soup(["a"], scored({"a": 0.0})) == ([0], [Trial((0,), 0.0, True)])


def test_what_was_added_before_is_what_the_next_must_not_lower() -> None:
    """bc beats b; bca beats b but not bc."""
    score = scored({"a": 0.1, "b": 0.5, "c": 0.3, "bc": 0.6, "bca": 0.55})
    assert greedy_soup(["a", "b", "c"], score)[0] == [1, 2]


@pytest.fixture(scope="module")
def val_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_rows(tmp_path_factory.mktemp("val") / "val.jsonl", 24)


def test_the_command_scores_writes_and_tells(
    made: list[Path], val_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every score in the manifest is that of the model or average; the result is the average of the chosen ones."""
    words = ["--method", "greedy_soup", "--val_data", str(val_data), "--metric", "nDCG@10"]
    assert run(made[:3], tmp_path / "out", *words) == 0
    shown = capsys.readouterr().out
    manifest = atomic.read_json(tmp_path / "out/manifest.json")
    assert manifest["method"] == "greedy_soup" and manifest["metric"] == "nDCG@10"
    assert manifest["inputs"][-1] == {"path": str(val_data), "sha256": atomic.sha256(val_data), "rows": 24}
    task = load_task(val_data)
    assert [len(trial["models"]) == 1 for trial in manifest["tried"]] == [True] * 3 + [False] * 2
    for i, trial in enumerate(manifest["tried"]):
        merge_folders(trial["models"], [1 / len(trial["models"])] * len(trial["models"]), tmp_path / str(i))
        encoder = load_encoder(tmp_path / str(i))
        score = evaluate_encoder(encoder, task, query_max_len=512, passage_max_len=512).means["nDCG@10"]
        assert trial["score"] == pytest.approx(score, abs=1e-6)
        assert f"{score:.4f}" in shown
    kept = max((t for t in manifest["tried"] if t["kept"]), key=lambda trial: len(trial["models"]))
    assert manifest["models"] == kept["models"]
    states = [weights_of(Path(name)) for name in kept["models"]]
    for name, value in weights_of(tmp_path / "out").items():
        expected = sum(state[name].double() for state in states) / len(states)  # type: ignore[operator]
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    assert not list(tmp_path.glob(".*"))


def scripted(monkeypatch: pytest.MonkeyPatch, scores: Sequence[float], average: list[dict[str, Tensor]]) -> None:
    """Scores one after the other; the averages that were scored are kept."""
    values = iter(scores)

    def score_model(_: Any, name: str, *__: Any, **___: Any) -> list[np.ndarray]:
        if Path(name).name == "average":
            average.append(load_file(Path(name, "model.safetensors")))
        return [np.array([next(values)])]

    monkeypatch.setattr(choose, "score_model", score_model)


def test_the_table_and_the_chosen_models(
    made: list[Path], val_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    averages: list[dict[str, Tensor]] = []
    scripted(monkeypatch, [0.5, 0.7, 0.6, 0.65, 0.75], averages)  # 2 + 3 falls, 2 + 1 rises
    out = tmp_path / "new" / "out"
    words = ["--method", "greedy_soup", "--val_data", str(val_data), "--dtype", "float16"]
    assert run(made[:3], out, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "number  model",
        f"------  {'-' * len(str(made[0]))}",
        *(f"{i + 1}       {made[i]}" for i in range(3)),
    ]
    assert [line.split() for line in lines[6:13]] == [
        ["average", "of", "MRR@10", "kept"], ["----------", "------", "----"], ["2", "0.7000", "yes"], ["3", "0.6000"],
        ["1", "0.5000"], ["2", "+", "3", "0.6500"], ["2", "+", "1", "0.7500", "yes"],
    ]  # fmt: skip
    assert lines[14:17] == [f"0.5000  {made[1]}", f"0.5000  {made[0]}", f"model: {out}"]
    found = weights_of(out)
    assert all(torch.equal(found[key], value.half()) for key, value in averages[1].items())  # scored in float32
    assert not list(out.parent.glob(".*"))
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"`{made[1]}=0.5000`, `{made[0]}=0.5000`" in card and "| method | greedy_soup |" in card


def test_an_evaluation_that_fails_leaves_nothing(
    made: list[Path], val_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [0.5, 0.7], [])  # StopIteration at the first average
    with pytest.raises(StopIteration):
        run(made[:2], tmp_path / "out", "--method", "greedy_soup", "--val_data", str(val_data))
    assert contents(tmp_path) == {} and not (tmp_path / "out").exists()


def test_stored_prompts_and_pooling_are_used(
    models: list[Path], val_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that states no pooling is pooled as the average will be."""
    write_settings(models[0], EncoderSettings("mean", True, 64, "问：", "答："), 16)
    seen: list[tuple[Any, ...]] = []

    def spy(encoder: Any, task: Any, **options: Any) -> Any:
        prompts = options["query_prompt"], options["passage_prompt"]
        seen.append((encoder.settings.pooling, *prompts, options["query_max_len"], options["passage_max_len"]))
        return evaluate_encoder(encoder, task, **options)

    monkeypatch.setattr(choose, "evaluate_encoder", spy)
    words = ["--method", "greedy_soup", "--val_data", str(val_data), "--max_input_length", "40"]
    assert run(models[:2], tmp_path / "out", *words) == 0
    assert seen == [("mean", "问：", "答：", 40, 40), ("mean", "", "", 40, 40), ("mean", "问：", "答：", 40, 40)]
