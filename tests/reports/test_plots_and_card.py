"""Tables and plots."""

import json
from pathlib import Path

import pytest

from bge_core.reports.model_card import add_to_model_card, write_model_card
from bge_core.reports.plots import plot_curves
from bge_core.reports.tables import text_table


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


def test_the_model_card_takes_a_section_in_place_of_an_earlier_one(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("# Model\n\n## Use\n\ncode\n", encoding="utf-8")
    add_to_model_card(tmp_path, "0.5\n")
    card.write_text(card.read_text(encoding="utf-8") + "mine\n", encoding="utf-8")
    add_to_model_card(tmp_path, "0.625\n")
    assert card.read_text(encoding="utf-8") == (
        "# Model\n\n## Use\n\ncode\n\n<!-- evaluation -->\n\n0.625\n\n<!-- /evaluation -->\nmine\n"
    )


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
