"""What docs/ says is true: both languages alike, flags and files exist, the cost model is what the code does."""

import json
from pathlib import Path
from typing import Any

import pytest
import same_model
import scaling
import test_readme as readme
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from bge_core.cli import parse_config
from bge_core.config import TrainConfig

ENGLISH = sorted(f"docs/{file.name}" for file in (readme.ROOT / "docs").glob("*.md") if ".zh-CN" not in file.name)
PAGES = [page for english in ENGLISH for page in (english, english.replace(".md", ".zh-CN.md"))]
RESULTS: dict[str, Any] = json.loads(scaling.RESULTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("english", ENGLISH)
def test_both_languages_have_the_same_structure_and_commands(english: str) -> None:
    chinese = english.replace(".md", ".zh-CN.md")
    assert len(readme.skeleton(english)) > 20
    assert readme.skeleton(english) == readme.skeleton(chinese)
    pages = readme.text(english), readme.text(chinese)
    assert readme.commands(pages[0]) == readme.commands(pages[1]) != []
    assert set(readme.FLAG.findall(pages[0])) == set(readme.FLAG.findall(pages[1]))
    assert Path(chinese).name in pages[0] and Path(english).name in pages[1]


@pytest.mark.parametrize("page", PAGES)
def test_flags_files_and_links_exist(page: str) -> None:
    scripts = {"check", "launcher", "phase", "best", "demo", "data"}
    known = scripts | {flag for stage in readme.STAGES for flag in readme.known_flags(stage)} | readme.OTHERS_FLAGS
    of_benchmarks, of_servers = {"cmrc", "encoder"}, {"model-id", "port", "runner"}
    assert set(readme.FLAG.findall(readme.text(page))) - known - of_benchmarks - of_servers == set()
    readme.test_files_and_links_exist(page)


@pytest.mark.parametrize("page", [page for page in PAGES if "scaling" in page])
def test_every_training_command_is_accepted(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(readme.ROOT)
    lines = [words for words in readme.commands(readme.text(page)) if "--config" in words]
    assert len(lines) >= 5
    for words in lines:
        parse_config(TrainConfig, words[words.index("--config") :])


@pytest.mark.parametrize("language", scaling.DOCS)
def test_the_tables_are_those_of_the_results(language: str) -> None:
    page = scaling.DOCS[language].read_text(encoding="utf-8")
    assert scaling.with_tables(page, language, RESULTS) == page


@pytest.mark.parametrize("page", [page for page in PAGES if "scaling" in page])
def test_the_bounds_of_the_same_model_are_those_of_its_script(page: str) -> None:
    section = readme.text(page).split("same_model.png", 1)[1].split("```", 1)[0].replace(" %", "%")
    assert f"{same_model.LOSS_BOUND:.1%}" in section and str(same_model.EMBEDDING_BOUND) in section


def test_counted_work_is_that_of_the_formulas(two_ranks: list[dict[str, Any]]) -> None:
    """In the kept results, which say W = 1, 2 and 4, and here and now on two processes."""
    rows = scaling.count_rows(RESULTS)
    assert len(rows) == 2 * len(scaling.PROCESSES)
    for row in rows:
        assert row[4] == row[5] and row[7] == row[8], row
    work = scaling.Work(2, 6, scaling.GROUP, scaling.QUERY_TOKENS, scaling.PASSAGE_TOKENS)
    forward, backward = scaling.gather_bytes(scaling.SMALL, work)
    operations = scaling.loss_operations(scaling.SMALL, work)
    for found in (rank["work"] for rank in two_ranks):
        assert found == {"operations": operations, "all_gather": forward, "reduce_scatter": backward}


def test_compute_and_parameters_are_those_of_the_model() -> None:
    encoder = scaling.make_encoder()
    encoder.backbone.set_attn_implementation("eager")  # the products one by one, so that each is counted
    batch = scaling.make_batch(2, 1)
    with FlopCounterMode(display=False) as counter:
        encoder(batch.tokens).sum().backward()
    work = scaling.Work(1, 2, scaling.GROUP, scaling.QUERY_TOKENS, scaling.PASSAGE_TOKENS)
    assert counter.get_total_flops() == scaling.encoder_operations(scaling.SMALL, work)
    shape = scaling.BGE_LARGE_ZH
    config = BertConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate, num_attention_heads=16,
    )  # fmt: skip
    with torch.device("meta"):
        large = BertModel(config, add_pooling_layer=False)
    assert sum(parameter.numel() for parameter in large.parameters()) == shape.parameters
