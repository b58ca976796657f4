"""The snippets of docs/after-training.md, "Serve it", run as they stand where their library is installed: its vectors are ours.

None of these libraries but sentence-transformers belongs to the environment of the tests; with the others installed
(benchmarks/interoperability.py says which) `pytest tests/test_elsewhere.py` runs them all.
"""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_readme as readme
import torch
from tiny_model import make_tiny_bert

from bge_core.encoder.load import load_encoder

PAGES = ("docs/after-training.md", "docs/after-training.zh-CN.md")
PROMPT = "为这个句子生成表示以用于检索相关文章："
TEXTS = ["信用卡", "境外取现怎么收费？"]
Vectors = tuple[Any, Any]  # of TEXTS as questions and as passages


def of_sentence_transformers(names: dict[str, Any]) -> Vectors:
    model = names["model"]
    np.testing.assert_allclose(names["scores"], model.encode([PROMPT + "问题"]) @ model.encode(["段落"]).T, atol=1e-5)
    return model.encode_query(TEXTS), model.encode_document(TEXTS)


SNIPPETS: dict[str, Callable[[dict[str, Any]], Vectors]] = {  # by the module that it imports first
    "sentence_transformers": of_sentence_transformers,
    "FlagEmbedding": lambda names: (names["model"].encode_queries(TEXTS), names["model"].encode_corpus(TEXTS)),
    "langchain_huggingface": lambda names: (
        [names["embeddings"].embed_query(text) for text in TEXTS], names["embeddings"].embed_documents(TEXTS),
    ),
    "llama_index": lambda names: (
        [names["embeddings"].get_query_embedding(text) for text in TEXTS],
        names["embeddings"].get_text_embedding_batch(TEXTS),
    ),
    "examples": lambda names: (names["embed"](TEXTS, prompt=PROMPT), names["embed"](TEXTS)),
}  # fmt: skip
BOUND = {"FlagEmbedding": 2e-3}  # which works in float16 unless told otherwise, also on this CPU; the others: 1e-5
NEEDS = {"llama_index": "llama_index.embeddings.huggingface", "examples": "onnxruntime"}


def snippets(page: str) -> dict[str, str]:
    """Its Python blocks, by the module that each imports first."""
    found = readme.blocks(readme.between(page, "elsewhere"), "python")
    return {re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)[0]: code for code in found}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where outputs/model is: a tiny model with the prompts that the snippets name."""
    encoder = load_encoder(make_tiny_bert(tmp_path / "bert"), pooling="cls")
    encoder.settings = replace(encoder.settings, query_prompt=PROMPT, passage_prompt="")
    (tmp_path / "outputs").mkdir()
    encoder.save(tmp_path / "outputs/model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(readme.ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


@pytest.mark.parametrize("module", SNIPPETS)
def test_the_vectors_are_ours(module: str, folder: Path) -> None:
    pytest.importorskip(NEEDS.get(module, module))
    if module == "examples":
        pytest.importorskip("onnxscript")
        from examples.export_onnx import export

        export("outputs/model", "outputs/onnx")
    (code,) = {snippets(page)[module] for page in PAGES}  # the same in both languages
    names: dict[str, Any] = {}
    exec(compile(code, module, "exec"), names)
    encoder, atol = load_encoder("outputs/model"), BOUND.get(module, 1e-5)
    for theirs, prompt in zip(SNIPPETS[module](names), (PROMPT, ""), strict=True):
        with torch.no_grad():
            np.testing.assert_allclose(np.asarray(theirs), encoder.encode(TEXTS, prompt=prompt), rtol=0, atol=atol)


def test_mteb_gets_its_tasks_and_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mteb = pytest.importorskip("mteb")
    called: list[Any] = []
    monkeypatch.setattr(mteb, "evaluate", lambda *arguments: called.extend(arguments))
    exec(compile(snippets(PAGES[0])["mteb"], "mteb", "exec"), {})
    model, tasks = called
    assert model.prompts["query"] == PROMPT and len(list(tasks)) == 3


def test_every_snippet_is_run() -> None:
    for page in PAGES:
        assert snippets(page).keys() - {"mteb"} == SNIPPETS.keys(), page
    assert os.path.exists(readme.ROOT / "benchmarks/results/interoperability.md")
