"""What other libraries make of a model folder as it is, against ours: vectors, and the figures of their evaluations.

    PYTHONPATH=. outputs/peers/bin/python benchmarks/interoperability.py outputs/encoder --data path/to/cmrc

The first --questions test questions of CMRC, and their positives with other sentences up to --passages as corpus.
LangChain, LlamaIndex and FlagEmbedding are called as docs/evaluating.md has it. A library that is not installed is
listed as such, not as passed. Into the peers' environment, besides its requirements:

    pip install mteb langchain-huggingface llama-index-embeddings-huggingface onnx onnxscript onnxruntime

Writes benchmarks/results/interoperability.md.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from bge_core.encoder.load import load_encoder
from bge_core.encoder.model import Encoder
from bge_core.evaluation.evaluator import EvaluationResult, evaluate
from bge_core.evaluation.tasks import RetrievalTask

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
LENGTH = 128
# ours, and sentence-transformers' name for it
METRICS = {"MRR@10": "mrr@10", "nDCG@10": "ndcg@10", "MAP@100": "map@100"} | {
    f"{ours}@{k}": f"{theirs}@{k}"
    for ours, theirs in (("Recall", "recall"), ("Precision", "precision"), ("Success", "accuracy"))
    for k in (1, 10, 100)
}
Found = list[tuple[str, float, float]]  # what was compared, largest difference, bound


class NotComparable(Exception):
    """A library cannot do what the folder asks for."""


def read_task(data: Path, num_questions: int, num_passages: int) -> RetrievalTask:
    """A piece of CMRC."""

    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines()]

    rows = lines("test.jsonl")[:num_questions]
    texts = list(
        dict.fromkeys([text for row in rows for text in row["pos"]] + [r["text"] for r in lines("corpus.jsonl")])
    )
    texts = texts[:num_passages]
    place = {text: i for i, text in enumerate(texts)}
    ids = [f"q{i}" for i in range(len(rows))]
    relevant = [{place[text]: 1 for text in row["pos"]} for row in rows]
    return RetrievalTask(
        "cmrc", ids, [row["query"] for row in rows], [f"d{i}" for i in range(len(texts))], texts, relevant,
        [[] for _ in rows], [], [{} for _ in rows],
    )  # fmt: skip


def largest(ours: Any, theirs: Any) -> float:
    """The largest difference of any number."""
    return float(np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)).max())


def own_vectors(encoder: Encoder, task: RetrievalTask, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Our vectors of the first 32 questions and passages, with the prompts that the folder states."""
    prompts = encoder.settings.query_prompt or "", encoder.settings.passage_prompt or ""
    texts = task.queries[:32], task.corpus[:32]
    of_queries, of_passages = (
        encoder.encode(some, max_length=max_length, prompt=prompt) for some, prompt in zip(texts, prompts, strict=True)
    )
    return of_queries, of_passages


def sentence_transformers(model: str, task: RetrievalTask, ours: EvaluationResult, encoder: Encoder) -> Found:
    """Vectors with prompts by name, similarity, and InformationRetrievalEvaluator."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.evaluation import (  # type: ignore[import-not-found]
        InformationRetrievalEvaluator,
    )

    theirs = SentenceTransformer(model, device="cpu")
    theirs.max_seq_length = LENGTH
    some = task.queries[:32], task.corpus[:32]
    own = own_vectors(encoder, task, LENGTH)
    named = theirs.encode(some[0], prompt_name="query"), theirs.encode(some[1], prompt_name="passage")
    asked = theirs.encode_query(some[0]), theirs.encode_document(some[1])
    found: Found = [
        ("encode with prompt names", max(map(largest, own, named)), 1e-5),
        ("encode_query, encode_document", max(map(largest, own, asked)), 1e-5),
        ("similarity", largest(own[0] @ own[1].T, theirs.similarity(*named)), 1e-5),
    ]
    evaluator = InformationRetrievalEvaluator(
        dict(zip(task.query_ids, task.queries, strict=True)), dict(zip(task.corpus_ids, task.corpus, strict=True)),
        {q: {task.corpus_ids[row] for row in of} for q, of in zip(task.query_ids, task.relevant, strict=True)},
        mrr_at_k=[10], ndcg_at_k=[10], accuracy_at_k=[1, 10, 100], precision_recall_at_k=[1, 10, 100], map_at_k=[100],
        show_progress_bar=False, query_prompt_name="query", corpus_prompt_name="passage",
    )  # fmt: skip
    scores = evaluator(theirs)
    means = ours.metrics["model"]
    pairs = [(means[name], scores[f"cosine_{key}"]) for name, key in METRICS.items()]
    return [*found, (f"InformationRetrievalEvaluator, {len(pairs)} figures", largest(*zip(*pairs, strict=True)), 1e-6)]


def flag_embedding(model: str, task: RetrievalTask, ours: EvaluationResult, encoder: Encoder) -> Found:
    """FlagModel reads neither pooling nor prompts of a folder: both are given."""
    from FlagEmbedding import FlagModel  # type: ignore[import-not-found]

    if encoder.settings.pooling not in ("cls", "mean"):
        raise NotComparable("FlagModel pools by cls and mean only")
    theirs = FlagModel(
        model, use_fp16=False, devices="cpu", pooling_method=encoder.settings.pooling,
        normalize_embeddings=encoder.settings.normalize,
        query_instruction_for_retrieval=encoder.settings.query_prompt or "",
        passage_instruction_for_retrieval=encoder.settings.passage_prompt or "",
    )  # fmt: skip
    vectors = (
        theirs.encode_queries(task.queries[:32], max_length=LENGTH),
        theirs.encode_corpus(task.corpus[:32], max_length=LENGTH),
    )
    return [("encode_queries, encode_corpus", max(map(largest, own_vectors(encoder, task, LENGTH), vectors)), 1e-5)]


def mteb(model: str, task: RetrievalTask, ours: EvaluationResult, encoder: Encoder) -> Found:
    """A retrieval task of this data, that downloads nothing."""
    import mteb as library  # type: ignore[import-not-found]
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval  # type: ignore[import-not-found]
    from sentence_transformers import SentenceTransformer

    class Local(AbsTaskRetrieval):  # type: ignore[misc]
        metadata = library.TaskMetadata(
            name="LocalRetrieval", description="A piece of CMRC.", reference=None, type="Retrieval", category="t2t",
            modalities=["text"], dataset={"path": "local", "revision": "1"}, eval_splits=["test"],
            eval_langs=["cmn-Hans"], main_score="ndcg_at_10", date=None, domains=None, task_subtypes=None, license=None,
            annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation=None,
        )  # fmt: skip

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            corpus = {"id": task.corpus_ids, "text": task.corpus, "title": [""] * len(task.corpus)}
            queries = {"id": task.query_ids, "text": task.queries}
            qrels = {
                q: {task.corpus_ids[row]: grade for row, grade in of.items()}
                for q, of in zip(task.query_ids, task.relevant, strict=True)
            }
            split = {"corpus": Dataset.from_dict(corpus), "queries": Dataset.from_dict(queries),
                     "relevant_docs": qrels, "top_ranked": None}  # fmt: skip
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    theirs = SentenceTransformer(model, device="cpu")
    theirs.max_seq_length = LENGTH
    result = library.evaluate(theirs, Local(), cache=None, show_progress_bar=False)
    scores = result.task_results[0].scores["test"][0]
    means = ours.metrics["model"]
    pairs = [(means["nDCG@10"], scores["ndcg_at_10"]), (means["MRR@10"], scores["mrr_at_10"]),
             (means["Recall@100"], scores["recall_at_100"])]  # fmt: skip
    return [
        (
            "a local retrieval task (it rounds to 5 decimals): nDCG@10, MRR@10, Recall@100",
            largest(*zip(*pairs, strict=True)),
            1e-4,
        )
    ]


def langchain(model: str, task: RetrievalTask, ours: EvaluationResult, encoder: Encoder) -> Found:
    """HuggingFaceEmbeddings, as docs/evaluating.md has it."""
    from langchain_huggingface import HuggingFaceEmbeddings  # type: ignore[import-not-found]

    theirs = HuggingFaceEmbeddings(
        model_name=model,
        encode_kwargs={"prompt_name": "document"},
        query_encode_kwargs={"prompt_name": "query"},
    )
    vectors = [theirs.embed_query(text) for text in task.queries[:32]], theirs.embed_documents(task.corpus[:32])
    return [("embed_query, embed_documents", max(map(largest, own_vectors(encoder, task, 512), vectors)), 1e-5)]


def llama_index(model: str, task: RetrievalTask, ours: EvaluationResult, encoder: Encoder) -> Found:
    """HuggingFaceEmbedding, as docs/evaluating.md has it."""
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding  # type: ignore[import-not-found]

    theirs = HuggingFaceEmbedding(
        model_name=model,
        query_instruction=encoder.settings.query_prompt or "",
        text_instruction=encoder.settings.passage_prompt or "",
        device="cpu",
    )
    vectors = (
        [theirs.get_query_embedding(text) for text in task.queries[:32]],
        theirs.get_text_embedding_batch(task.corpus[:32]),
    )
    difference = max(map(largest, own_vectors(encoder, task, 512), vectors))
    return [("get_query_embedding, get_text_embedding_batch", difference, 1e-5)]


def onnx(model: str, task: RetrievalTask, ours: EvaluationResult, encoder: Encoder) -> Found:
    """The folder as examples/export_onnx.py writes it, run by onnxruntime."""
    from export_onnx import Vectors, export

    with tempfile.TemporaryDirectory() as folder:
        settings = export(model, folder)
        theirs = Vectors(folder, LENGTH)
        vectors = (
            theirs(task.queries[:32], settings.query_prompt or ""),
            theirs(task.corpus[:32], settings.passage_prompt or ""),
        )
        one = theirs(task.queries[:1], settings.query_prompt or "")  # a size that exporters like to fix
    own = own_vectors(encoder, task, LENGTH)
    difference = max(*map(largest, own, vectors), largest(own[0][:1], one))
    return [("examples/export_onnx.py: questions, passages", difference, 1e-5)]


# the packages that a comparison needs; the first one's version is shown
LIBRARIES: dict[Callable[..., Found], list[str]] = {
    sentence_transformers: ["sentence-transformers"],
    flag_embedding: ["FlagEmbedding"],
    mteb: ["mteb"],
    langchain: ["langchain-huggingface"],
    llama_index: ["llama-index-embeddings-huggingface"],
    onnx: ["onnxruntime", "onnx", "onnxscript"],
}


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    """Compare with each library that is installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--passages", type=int, default=1000)
    args = parser.parse_args()
    task = read_task(args.data, args.questions, args.passages)
    encoder = load_encoder(args.model)
    ours = evaluate(
        {"model": encoder},
        task,
        metrics=list(METRICS),
        query_max_length=LENGTH,
        passage_max_length=LENGTH,
        resamples=10,
    )
    lines = [
        "| library | version | compared | largest difference | bound | |",
        "| --- | --- | --- | ---: | ---: | --- |",
    ]
    failed = False
    for compare, packages in LIBRARIES.items():
        lacking = [package for package in packages if installed(package) is None]
        if lacking:
            lines.append(f"| {packages[0]} | - | not installed: {', '.join(lacking)} | - | - | - |")
            continue
        try:
            found = compare(args.model, task, ours, encoder)
        except NotComparable as reason:
            lines.append(f"| {packages[0]} | {installed(packages[0])} | not compared: {reason} | - | - | - |")
            continue
        for what, difference, bound in found:
            fine = difference <= bound
            failed |= not fine
            lines.append(
                f"| {packages[0]} | {installed(packages[0])} | {what} | {difference:.1e} | {bound:.0e} "
                f"| {'ok' if fine else 'NO'} |"
            )
    stated = encoder.settings
    lines += [
        "",
        f"{len(task.queries)} questions, {len(task.corpus):,} passages; {stated.pooling} pooling, prompts "
        f"`{stated.query_prompt or ''}` and `{stated.passage_prompt or ''}`; torch {version('torch')}, "
        f"transformers {version('transformers')}; {date.today()}",
    ]
    (ROOT / "benchmarks/results/interoperability.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
