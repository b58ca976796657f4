"""What is said before step 1 of data and settings that cannot teach: warnings and errors."""

from pathlib import Path
from typing import Any

import pytest
from test_data import make_data, write

from bge_core.training import preflight

FACTS: dict[str, Any] = {"candidates per query": 8, "cross-device negatives": False}


def test_a_source_that_fills_no_batch_is_named(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [{"query": f"问{i}", "pos": ["答"], "neg": ["错", "错二"]} for i in range(8)]
    files = [str(write(tmp_path / f"{name}.jsonl", *rows[:count])) for name, count in (("small", 3), ("large", 8))]
    alone = {"same_dataset_within_batch": True, "dataloader_drop_last": True}
    for options, count in (
        (alone, 1),
        (alone | {"dataloader_drop_last": False}, 0),
        ({"dataloader_drop_last": True}, 0),
    ):
        warnings = list(preflight.warnings_of_settings(make_data(files, tiny_bert, **options), FACTS))
        assert sum("small.jsonl fills no batch (3 rows an epoch, 4 a batch)" in line for line in warnings) == count
        assert not any("large.jsonl" in line for line in warnings)


@pytest.mark.parametrize(
    ("scores", "uniformity"),
    [
        ([0.72, 0.65, 0.61, 0.60], 0.99918),  # cosines; entropies by scipy.stats.entropy, over ln 4
        ([36.0, 32.5, 30.5, 30.0], 0.12557),  # the same over 0.02
        ([1.0, 1.0, 1.0, 1.0], 1.0),
        ([5.0], 0.0),  # no negative, nothing to tell apart
    ],
)
def test_teachers_that_are_nearly_uniform_are_named(
    scores: list[float], uniformity: float, tiny_bert: Path, tmp_path: Path
) -> None:
    neg = [f"错{i}" for i in range(len(scores) - 1)]
    row = {"query": "问", "pos": ["答"], "neg": neg, "pos_scores": scores[:1], "neg_scores": scores[1:]}
    data = make_data(write(tmp_path / "rows.jsonl", row), tiny_bert, knowledge_distillation=True, train_group_size=4)
    assert preflight.teachers_uniformity(data) == pytest.approx(uniformity, abs=1e-5)
    warnings = [line for line in preflight.warnings_of_settings(data, FACTS) if "--teacher_temperature" in line]
    assert len(warnings) == (uniformity > 0.95)
