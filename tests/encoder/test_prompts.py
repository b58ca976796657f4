"""Prompts under any name: chosen by a flag, never guessed; the standard names work untold."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bge_core import UserError
from bge_core.encoder.load import load_encoder
from bge_core.encoder.prompts import choose_prompts
from bge_core.encoder.settings import EncoderSettings
from bge_core.evaluation.evaluator import evaluate
from bge_core.evaluation.score import prompts
from bge_core.runtime.config import EvaluateConfig, MineConfig, TrainConfig
from bge_core.training.build import resolve

E5 = EncoderSettings(query_prompt="query: ", passage_prompt="passage: ")
QWEN3 = EncoderSettings(query_prompt="Instruct: Given a query\nQuery:", passage_prompt="")
STELLA = EncoderSettings(other_prompts={"s2p_query": "检索：", "s2s_query": "相似："}, default_prompt_name="s2p_query")
NOMIC = EncoderSettings(other_prompts={"search_query": "search_query: ", "search_document": "search_document: "})
NONE = EncoderSettings()
BGE = "为这个句子生成表示以用于检索相关文章："
REFUSED = "m: states the prompts s2p_query, s2s_query .by default s2p_query., and none as query: choose with --query_pr"


def of_stage(stage: str, stored: EncoderSettings, **flags: Any) -> tuple[str, str]:
    """What each stage puts before queries and passages of the model `m`."""
    if stage == "train":
        config = TrainConfig(model_name_or_path="m", train_data=["f"], output_dir="o", **flags)
        resolved = resolve(config, stored, 32, ["MRR@10"])
        return resolved.query_instruction_for_retrieval, resolved.passage_instruction_for_retrieval
    if stage == "mine":
        found = choose_prompts(
            "m", stored, MineConfig(model_name_or_path="m", input_file="f", output_file="o", **flags)
        )
        return found[0] or "", found[1] or ""
    config = EvaluateConfig(val_data=["v"], encoder=["m"], add_instruction=stage == "--add_instruction", **flags)
    return prompts(config, "m", stored, SimpleNamespace(queries=["怎么退货"]))  # type: ignore[arg-type]


STAGES = ["train", "mine", "--add_instruction"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("stored", "flags", "want"),
    [
        (E5, {}, ("query: ", "passage: ")),
        (QWEN3, {}, ("Instruct: Given a query\nQuery:", "")),
        (QWEN3, {"query_instruction_for_retrieval": ""}, ("", "")),
        (STELLA, {"query_prompt_name": "s2s_query"}, ("相似：", "")),
        (STELLA, {"query_instruction_for_retrieval": "问："}, ("问：", "")),
        (NOMIC, {"query_prompt_name": "search_query", "passage_prompt_name": "search_document"},
         ("search_query: ", "search_document: ")),
        (E5, {"query_prompt_name": "passage"}, ("passage: ", "passage: ")),
    ],
)  # fmt: skip
def test_what_stands_before_texts(stage: str, stored: Any, flags: dict[str, Any], want: Any) -> None:
    assert of_stage(stage, stored, **flags) == want


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("stored", "flags", "message"),
    [
        (STELLA, {}, REFUSED),
        (NOMIC, {"passage_prompt_name": "search_document"}, "m: states the prompts search_query, search_document, and"),
        (
            NOMIC,
            {"query_prompt_name": "query"},
            "'query': m has no prompt of that name; it states search_query, search_d",
        ),
        (NONE, {"query_prompt_name": "query"}, "m has no prompt of that name; it states none"),
        (E5, {"query_prompt_name": "query", "query_instruction_for_retrieval": ""}, "choose one"),
    ],
)
def test_nothing_is_guessed(stage: str, stored: Any, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        of_stage(stage, stored, **flags)


def test_without_a_stored_prompt_each_stage_has_its_default() -> None:
    assert [of_stage(stage, NONE) for stage in [*STAGES, "evaluate"]] == [("", ""), ("", ""), (BGE, ""), ("", "")]
    assert of_stage("evaluate", STELLA) == ("", "")
    assert of_stage("evaluate", STELLA, query_prompt_name="s2p_query") == ("检索：", "")


def test_a_forgotten_passage_prompt_is_said(caplog: pytest.LogCaptureFixture) -> None:
    of_stage("mine", NOMIC, query_prompt_name="search_query")
    assert "--passage_prompt_name chooses one of search_query, search_document" in caplog.text


def test_where_no_flag_chooses_the_folder_has_to_say(tiny_bert: Path, tmp_path: Path) -> None:
    """A teacher, a sweep, the evaluation called from Python."""
    with pytest.raises(UserError, match="and none as query: store one as query in m/config_sentence_transformers.json"):
        choose_prompts("m", STELLA)
    encoder = load_encoder(tiny_bert)
    encoder.settings = replace(encoder.settings, other_prompts=STELLA.other_prompts)
    file = tmp_path / "test.jsonl"
    file.write_text('{"query": "a", "pos": ["b"]}\n{"query": "c", "pos": ["d"]}\n')
    with pytest.raises(UserError, match="model: states the prompts s2p_query, s2s_query, and none as query"):
        evaluate(encoder, str(file))
    assert evaluate(encoder, str(file), query_prompt="").metrics["model"]
