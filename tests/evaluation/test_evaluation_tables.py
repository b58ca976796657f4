"""An evaluation as text, from figures made by hand."""

from types import SimpleNamespace
from typing import Any

from bge_core.evaluation.significance import Comparison, Threshold
from bge_core.evaluation.tables import comparison_tables, model_card_section


def test_models_are_compared_with_the_first() -> None:
    means = {"base": {"MRR@1": 0.5, "nDCG@10": 0.6}, "tuned": {"MRR@1": 0.75, "nDCG@10": 0.55}}
    line = Comparison("tuned", "base", "MRR@1", 0.25, 0.1, 0.4, 0.01, 0.02, 3, 1, 6)
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


def test_the_section_of_a_model_card() -> None:
    result: Any = SimpleNamespace(
        task=SimpleNamespace(name="test", queries=["q"] * 3, corpus=["c"] * 4),
        rankings={"base": None, "m": None},
        metrics={"m": {"MRR@10": 0.625}},
        intervals={"m": {"MRR@10": (0.4, 0.7)}},
        thresholds={
            "base": [Threshold("precision", 0.9, None, None, None, None, 0.0)],
            "m": [Threshold("precision", 0.9, 0.61, 0.5, None, 0.91, 0.75)],
        },
    )
    text = model_card_section("m", [result])
    assert text.startswith("## Evaluation\n\ntest: 3 questions, 4 passages.\n")
    assert "| MRR@10 | 0.6250 | 0.4000 to 0.7000 |" in text
    assert "| precision 90% | 0.610 |  | 75.0% |  |" in text
