"""What docs/ says is true: both languages alike; flags, files and links exist; commands are accepted; figures are those
that were measured; the cost model is what the code does."""

import json
import re
from pathlib import Path
from typing import Any

import communication
import pytest
import same_model
import scaling
import test_readme as readme
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

ENGLISH = sorted(f"docs/{file.name}" for file in (readme.ROOT / "docs").glob("*.md") if ".zh-CN" not in file.name)
PAGES = [page for english in ENGLISH for page in (english, readme.chinese(english))]
RESULTS: dict[str, Any] = json.loads(scaling.RESULTS.read_text(encoding="utf-8"))
FIGURE = re.compile(r"\d[\d.]* \([\d.]+-[\d.]+\)|[+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]")
NOT_KEPT = {"0.699 (0.691-0.705)", "0.765 (0.758-0.769)", "0.895 (0.891-0.899)"}  # best.yaml: ablation_final.md has MRR
MODELS = {name: shape for name, shape in communication.MODELS.items() if name != "bge-large-en"}
TOKENS = (4 * (64 + 2 * 512), 32 * (64 + 3 * 128), 32 * (64 + 3 * 512), 8192)


def anchors(page: Path) -> set[str]:
    """Where links into a page may lead: its headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("english", ENGLISH)
def test_both_languages_have_the_same_structure_commands_and_code(english: str) -> None:
    chinese = readme.chinese(english)
    assert len(readme.skeleton(english)) > 20
    assert readme.skeleton(english) == readme.skeleton(chinese)
    assert readme.code(english) == readme.code(chinese)
    pages = readme.text(english), readme.text(chinese)
    assert readme.commands(pages[0]) == readme.commands(pages[1])
    assert set(readme.FLAG.findall(pages[0])) == set(readme.FLAG.findall(pages[1]))
    assert Path(chinese).name in pages[0] and Path(english).name in pages[1]


@pytest.mark.parametrize("page", PAGES)
def test_files_links_commands_and_flags_exist(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    readme.test_files_and_links_exist(page)
    for link, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#([^)\s]+)\)", readme.text(page)):
        assert anchor in anchors(readme.ROOT / "docs" / (link or Path(page).name)), f"{link}#{anchor}"
    if page not in (readme.GUIDE, readme.chinese(readme.GUIDE)):  # it names refused flags, too; its commands are run
        readme.test_every_command_is_accepted_and_every_flag_exists(page, monkeypatch)


@readme.both("docs/results.md")
def test_figures_are_those_of_the_results(page: str) -> None:
    files = [file for file in (readme.ROOT / "benchmarks/results").iterdir() if file.suffix in (".md", ".jsonl")]
    measured = "".join(file.read_text(encoding="utf-8") for file in files)
    tables = re.findall(r"<!-- figures -->(.*?)<!-- /figures -->", readme.text(page), re.DOTALL)
    figures = FIGURE.findall("".join(tables))
    assert len(figures) > 40 and {figure for figure in figures if figure not in measured} == NOT_KEPT


@readme.both("docs/tuning.md")
def test_predicted_memory_is_that_of_its_formula(page: str) -> None:
    rows = re.findall(r"^\| (bge-[a-z0-9-]+).*?((?:\| [\d.]+ GB )+)\|$", readme.text(page), re.MULTILINE)
    assert [name for name, _ in rows] == list(MODELS)
    for name, cells in rows:
        fixed, token = 16 * MODELS[name].parameters / 2**30, 41 * MODELS[name].layers * MODELS[name].hidden / 2**30
        expected = [f"{fixed:.1f}", f"{1000 * token:.2f}", *(f"{fixed + count * token:.1f}" for count in TOKENS)]
        assert cells.replace("| ", "").split(" GB ")[:-1] == expected


@pytest.mark.parametrize("language", scaling.DOCS)
def test_the_tables_and_bounds_of_scaling_are_those_of_its_scripts(language: str) -> None:
    page = scaling.DOCS[language].read_text(encoding="utf-8")
    for tables in (scaling.ROWS, communication.ROWS):
        assert scaling.with_tables(page, language, tables, RESULTS) == page
    section = page.split("same_model.png", 1)[1].split("```", 1)[0]
    assert f"{same_model.LOSS_BOUND:.1%}" in section and str(same_model.EMBEDDING_BOUND) in section


def test_counted_work_is_that_of_the_formulas(two_ranks: list[dict[str, Any]]) -> None:
    """In the kept results, which say W = 1, 2 and 4, and here and now on two processes."""
    rows = scaling.count_rows(RESULTS)
    assert len(rows) == 2 * len(scaling.PROCESSES)
    assert all(row[4] == row[5] and row[7] == row[8] for row in rows)
    work = scaling.Work(2, 6, scaling.GROUP, scaling.QUERY_TOKENS, scaling.PASSAGE_TOKENS)
    forward, backward = scaling.gather_bytes(scaling.SMALL, work)
    operations = scaling.loss_operations(scaling.SMALL, work)
    expected = {"operations": operations, "all_gather": forward, "reduce_scatter": backward}
    assert [rank["work"] for rank in two_ranks] == [expected, expected]


def test_compute_and_parameters_are_those_of_the_model() -> None:
    encoder = scaling.make_encoder()
    encoder.backbone.set_attn_implementation("eager")  # the products one by one, so that each is counted
    batch = scaling.make_batch(2, 1)
    with FlopCounterMode(display=False) as counter:
        encoder(batch.tokens).sum().backward()
    work = scaling.Work(1, 2, scaling.GROUP, scaling.QUERY_TOKENS, scaling.PASSAGE_TOKENS)
    assert counter.get_total_flops() == scaling.encoder_operations(scaling.SMALL, work)
    shape = communication.LARGE
    sizes = {"num_hidden_layers": shape.layers, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate}
    config = BertConfig(vocab_size=shape.vocabulary, num_attention_heads=16, **sizes)
    with torch.device("meta"):
        large = BertModel(config, add_pooling_layer=False)
    assert sum(parameter.numel() for parameter in large.parameters()) == shape.parameters


def test_communication_is_that_of_a_pocket_calculator() -> None:
    """Two rows of its tables, from the published rates; what DDP hides, and what it cannot."""
    rows = {row[0]: row[1:] for row in communication.term_rows(RESULTS)}
    # 2 x 31/32 x 4 x 324,472,832 bytes at 5 GB/s; 31 x (4 x (32 + 2 x 256) x 1,024 + 8 x 256) bytes of vectors and ids;
    # 6 x 32 x 8,192 x 1,024 operations at 40.2 TFLOP/s and 113 bytes for each of 32 x 8,192 pairs at 3.36 TB/s
    assert rows["4 x 8, 100 Gb/s TCP"][:3:2] == ["2.51 GB", "508"] and rows["4 x 8, 100 Gb/s TCP"][1] == "503"
    assert rows["4 x 8, 100 Gb/s TCP"][3:] == ["69.1 MB", "14", "8,192", "0.049", "1.05 MB", "0.1"]
    # 2 x 7/8 x 4 x 324,472,832 bytes; between the published 723.34 (1 GiB) and 734.97 (2 GiB) of 845.67: 726.5 of 845.67
    assert (
        rows["8, NVLink"][:2] == ["2.27 GB", f"{2.2713e9 / (473e9 * 726.5 / 845.67) * 1e3:.1f}"] == ["2.27 GB", "5.6"]
    )
    slow = communication.Network(2, 1e9, 1e9, 0.0, communication.FLAT)  # 1 byte a nanosecond: 2 x 1/2 of the message
    shape = communication.MODELS["bge-small-zh"]  # 23,691,264 parameters, (21,128 + 512 + 2) x 512 of them embeddings
    whole, last = 4 * 23_691_264e-9, 4 * 11_080_704e-9
    for window, visible in ((0.0, whole), (0.03, whole - 0.03), (1.0, last)):
        assert communication.ddp_reduction(shape, slow, window) == pytest.approx(visible)
    assert communication.flat_reduction(shape, slow) == pytest.approx(whole)
