"""Ours against the figures of FlagEmbedding 1.4.2's own training, from the same weights on the same batches.

How they were made, and the same comparison in both environments at once: benchmarks/parity_flagembedding.py.
"""

import json
import math
from pathlib import Path
from typing import Any

import parity_flagembedding as parity
import pytest
from conftest import ROOT

GOLDEN = json.loads((ROOT / "tests" / "golden" / "flagembedding_losses.json").read_text(encoding="utf-8"))
THEIRS = {case["name"]: case for case in GOLDEN["cases"]}
OPTIONS = parity.Options(**{**GOLDEN["options"], "mrl_dims": tuple(GOLDEN["options"]["mrl_dims"])})
Results = dict[str, Any]

# kl_div with cross-device negatives is another gradient there: its InfoNCE part loses the factor 1/W and its
# distillation part does not. From the same weights the loss is the same; after a step the weights are not.
OTHER_GRADIENT = "kl_div_cross_device/W2"


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("parity") / "train.jsonl"
    parity.write_rows(file, GOLDEN["rows"])
    return str(file)


def direction(gradients: dict[str, list[float]]) -> list[float]:
    """The recorded gradients in one vector."""
    return [value for name in sorted(gradients) for value in gradients[name]]


def check(name: str, ours: Results, dtype: str, rtol: float) -> None:
    """Losses within 1e-4; the gradient of step 1 theirs, times W where they lose that factor."""
    theirs = THEIRS[name][dtype]
    num_losses = 1 if name == OTHER_GRADIENT else len(ours["losses"])
    assert ours["losses"][:num_losses] == pytest.approx(theirs["losses"][:num_losses], rel=1e-4)
    if name == OTHER_GRADIENT:
        return
    factor = THEIRS[name]["world_size"] if THEIRS[name]["mode"].endswith("cross_device") else 1
    assert ours["grad_norm"] == pytest.approx(factor * theirs["grad_norm"], rel=rtol)
    assert ours["gradients"].keys() == theirs["gradients"].keys() == set(parity.NAMED_GRADIENTS)
    got, want = direction(ours["gradients"]), [factor * value for value in direction(theirs["gradients"])]
    assert math.dist(got, want) <= rtol * math.hypot(*want)


@pytest.mark.parametrize("mode", parity.MODES)
def test_one_process_gives_their_losses_and_gradient(mode: str, tiny_bert: Path, train_file: str) -> None:
    ours = parity.train_ours(str(tiny_bert), train_file, parity.MODES[mode], OPTIONS, "float32")
    assert len(ours["losses"]) == 10
    check(f"{mode}/W1", ours, "float32", rtol=1e-4)


@pytest.mark.parametrize(
    "mode, rtol",
    # theirs goes through float32 in distillation (the teacher) and in Matryoshka, whatever the model's type
    [("in_batch", 1e-9), ("no_in_batch", 1e-9), ("kl_div", 2e-7), ("m3_kd_loss", 2e-7), ("mrl", 2e-7)],
)
def test_in_float64_the_first_loss_and_gradient_are_theirs(
    mode: str, rtol: float, tiny_bert: Path, train_file: str
) -> None:
    ours = parity.train_ours(str(tiny_bert), train_file, parity.MODES[mode], OPTIONS, "float64", steps=1)
    check(f"{mode}/W1", ours, "float64", rtol)
    assert ours["losses"][0] == pytest.approx(THEIRS[f"{mode}/W1"]["float64"]["losses"][0], rel=rtol)


@pytest.mark.parametrize("mode", parity.MODES)
def test_two_processes_give_their_losses_and_w_times_their_cross_device_gradient(
    mode: str, two_ranks: list[Results]
) -> None:
    for rank in two_ranks:
        assert not isinstance(rank[f"parity/{mode}"], str), rank[f"parity/{mode}"]
        assert len(rank[f"parity/{mode}"]["losses"]) == 10
        check(f"{mode}/W2", rank[f"parity/{mode}"], "float32", rtol=1e-4)


def test_with_cross_device_negatives_two_processes_train_as_one(two_ranks: list[Results]) -> None:
    """Which theirs, with the gradient cut by W, does only as far as AdamW does not care."""
    for mode in (mode for mode in parity.MODES if mode.endswith("cross_device")):
        ours, alone = two_ranks[0][f"parity/{mode}"], THEIRS[f"{mode}/W1"]["float32"]
        assert ours["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
