"""What is said before step 1 of data and settings that cannot teach: warnings and errors."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from test_data import make_config, make_data, write

from bge_core import UserError
from bge_core.encoder.settings import EncoderSettings
from bge_core.reports.model_card import write_model_card
from bge_core.training import preflight
from bge_core.training.build import resolve

FACTS: dict[str, Any] = {"candidates per query": 8, "cross-device negatives": False, "warm-up steps": 0, "steps": 10}
LONG = "请根据下面的问题检索相关的段落："  # 16 characters, each a token here


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


def with_prompts(file: Path, *prompts: str | None) -> Path:
    return write(file, *({"query": f"问{i}", "pos": ["答"], "prompt": prompt} for i, prompt in enumerate(prompts)))


@pytest.mark.parametrize(
    ("settings", "prompts", "message"),
    [
        ({"query_instruction_for_retrieval": LONG, "query_max_len": 19}, [None], None),  # one token of the text is left
        ({"query_instruction_for_retrieval": LONG, "query_max_len": 18}, [None], "--query_max_len 18: .* take 18"),
        ({"query_instruction_for_retrieval": LONG, "query_max_len": 18}, [None, "短"], None),
        ({"query_max_len": 10}, [LONG, LONG + "二"], "--query_max_len 10: .* take 19, so nothing is left of any query"),
        ({"passage_max_len": 1}, [None], "--passage_max_len 1: .* take 2, so nothing is left of any passage"),
        ({"passage_max_len": 2}, [None], "--passage_max_len 2"),
        ({"passage_max_len": 3}, [None], None),
    ],
)
def test_texts_of_which_nothing_is_left_are_refused(
    settings: dict[str, Any], prompts: list[str | None], message: str | None, tiny_bert: Path, tmp_path: Path
) -> None:
    data = make_data(with_prompts(tmp_path / "rows.jsonl", *prompts), tiny_bert, **settings)
    with pytest.raises(UserError, match=message) if message else nullcontext():
        preflight.refuse_empty_texts(data)


def test_prompts_of_rows_are_counted_cut_and_listed(tiny_bert: Path, tmp_path: Path) -> None:
    file = with_prompts(tmp_path / "rows.jsonl", LONG, None, "短：", *(f"第{i}类：" for i in range(9)), "", LONG)
    data = make_data(file, tiny_bert, query_max_len=10, train_group_size=1)
    (warning,) = [line for line in preflight.warnings_of_settings(data, FACTS) if "prompt" in line]
    assert warning.startswith("2 rows have a prompt that fills --query_max_len 10")
    assert preflight.shares_cut(data)["queries cut"].startswith("14.3% of a sample of 14")
    facts = preflight.run_facts(data, EncoderSettings(pooling="cls", normalize=True), "no", 0, False)
    assert facts["prompts of rows"][:2] == [repr(LONG), "'短：'"] and facts["prompts of rows"][5:] == ["and 6 more"]
    write_model_card(tmp_path, title="模型", facts=facts, scores=None, prompt="")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (
        f"Rows of the training data had prompts of their own: {LONG!r}, '短：'" in card and "Such queries need" in card
    )


def test_a_warm_up_that_never_ends_is_named(tiny_bert: Path, training_file: Path) -> None:
    data = make_data(training_file, tiny_bert)
    for num_warmup, count in ((9, 0), (10, 1)):
        warnings = preflight.warnings_of_settings(data, FACTS | {"warm-up steps": num_warmup})
        assert sum("never gets to --learning_rate" in line for line in warnings) == count


def test_matryoshka_without_the_full_size_is_named(caplog: pytest.LogCaptureFixture) -> None:
    for dims, count in (([8, 16], 1), ([8, 32], 0)):
        caplog.clear()
        resolve(make_config([], use_mrl=True, mrl_dims=dims), EncoderSettings(), 32, ["MRR@10"])
        assert caplog.text.count("leaves out the full size") == count


@pytest.mark.parametrize("side", ["query", "passage"])
def test_a_format_with_a_tail_is_refused(side: str) -> None:
    with pytest.raises(UserError, match=f"--{side}_instruction_format .*no prompt of a saved model can hold"):
        make_config([], **{f"{side}_instruction_format": "{}: {}?"})
