"""Tables and plots."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from bge_core.reports.model_card import add_to_model_card, write_model_card
from bge_core.reports.plots import plot_curves
from bge_core.reports.tables import comparison_tables, text_table


def test_columns_of_a_table_align() -> None:
    table = text_table(["model", "MRR@10"], [["base", "0.5"], ["a longer name", "0.25"]])
    assert table.split("\n") == [
        "model          MRR@10",
        "-------------  ------",
        "base              0.5",
        "a longer name    0.25",
    ]


def test_a_chinese_character_is_two_wide() -> None:
    table = text_table(["模型", "问题"], [["微调后", "银行卡怎么办"], ["base", "a，b"]], left=True)
    assert table.split("\n") == [
        "模型    问题",  # 4 and 4 wide
        "------  ------------",
        "微调后  银行卡怎么办",  # 6 and 12 wide
        "base    a，b",
    ]
    right = text_table(["a", "分"], [["模型", "1"]]).split("\n")
    assert right == ["a     分", "----  --", "模型   1"]


def test_models_are_compared_with_the_first() -> None:
    means = {"base": {"MRR@1": 0.5, "nDCG@10": 0.6}, "tuned": {"MRR@1": 0.75, "nDCG@10": 0.55}}
    line = {"model": "tuned", "baseline": "base", "metric": "MRR@1", "difference": 0.25, "low": 0.1, "high": 0.4,
            "p_value": 0.01, "p_adjusted": 0.02, "wins": 3, "losses": 1, "ties": 6}  # fmt: skip
    upper, lower = comparison_tables(means, [line]).split("\n\n")
    assert [of.split() for of in upper.split("\n")] == [
        ["model", "MRR@1", "nDCG@10"],
        ["-----", "-------", "-------"],
        ["base", "0.5000", "0.6000*"],
        ["tuned", "0.7500*", "0.5500"],
    ]
    assert lower.split("\n")[2].split() == [
        "tuned", "-", "base", "MRR@1", "+0.2500", "[+0.1000,", "+0.4000]", "0.02", "3", "1", "6",
    ]  # fmt: skip


def test_the_model_card_takes_scores_and_loses_the_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Model\n\n## Use\n\ncode\n", encoding="utf-8")
    line = {"target": "precision", "value": 0.9, "threshold": 0.61, "low": 0.5, "high": None, "reached": 0.91,
            "recall": 0.75}  # fmt: skip
    for value in (0.5, 0.625):
        result = SimpleNamespace(
            task=SimpleNamespace(name="test", queries=["q"] * 3, corpus=["c"] * 4), rankings={"base": None, "m": None},
            metrics={"m": {"MRR@10": value}}, intervals={"m": {"MRR@10": (0.4, 0.7)}},
            thresholds={"base": [line | {"threshold": None}], "m": [line]},
        )  # fmt: skip
        add_to_model_card(tmp_path, "m", [result])
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# Model\n\n## Use\n\ncode\n\n<!-- evaluation -->") and text.count("## Evaluation") == 1
    assert "| MRR@10 | 0.6250 | 0.4000 to 0.7000 |" in text and "0.5000" not in text
    assert "| precision 90% | 0.610 |  | 75.0% |  |" in text


def test_curves_of_every_kind_of_run(tmp_path: Path) -> None:
    """With and without evaluations and in-batch accuracy; one step; a skipped step; no step, no picture."""
    step = {"loss": 1.0, "lr": 1e-5, "grad_norm": 2.0}
    for name, lines in (
        ("plain", [{"step": i, **step} for i in range(1, 40)]),
        (
            "all",
            [{"step": 1, **step, "accuracy": 0.5, "log_candidates": 2.0}, {"step": 1, "MRR@10": 0.3, "Recall@10": 1}],
        ),
        ("skipped", [{"step": 1, **step, "grad_norm": float("inf")}, {"step": 2, **step, "grad_norm": None}]),
    ):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        plot_curves(file, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "empty.jsonl").touch()
    plot_curves(tmp_path / "empty.jsonl", tmp_path / "empty.png")
    plot_curves(tmp_path / "none.jsonl", tmp_path / "none.png")
    assert len(list(tmp_path.glob("*.png"))) == 3


@pytest.mark.parametrize("base, named", [("BAAI/bge-small-zh-v1.5", True), ("/models/bge", False), ("./bge", False)])
def test_the_card_names_a_hub_model_as_its_base(tmp_path: Path, base: str, named: bool) -> None:
    write_model_card(tmp_path, title="t", facts={"base model": base, "settings": {"a": 1}}, scores=None, prompt="")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (f"base_model: {base}" in card) == named
    assert f"| base model | {base} |" in card and "| settings | `a=1` |" in card
    assert "metric" not in card and "Queries need no instruction." in card
