"""What other libraries make of a model folder as it is, against ours: vectors, and the figures of their evaluations.

    PYTHONPATH=. outputs/peers/bin/python benchmarks/interoperability.py outputs/encoder --data path/to/cmrc

The first --questions test questions of CMRC, and their positives with other sentences up to --passages as corpus; more
folders, as outputs/demo/trained, make more tables. LangChain, LlamaIndex and FlagEmbedding are called as
docs/after-training.md has it. A library that is not installed is listed as such, not as passed. Into the peers'
environment, besides its requirements:

    pip install mteb langchain-huggingface llama-index-embeddings-huggingface onnx onnxscript onnxruntime

Writes benchmarks/results/interoperability.md; exit code 1 where a difference is above its bound.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import ROOT, installed, read_lines, read_texts

from bge_core.encoder import load_encoder
from bge_core.evaluation.evaluator import EvaluationResult, evaluate
from bge_core.evaluation.tasks import RetrievalTask

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


class Ours:
    """Our model, its vectors of the first 32 questions and passages, and its evaluation."""

    def __init__(self, folder: str, task: RetrievalTask) -> None:
        self.folder, self.encoder, self.task = folder, load_encoder(folder), task
        self.prompts = self.encoder.settings.query_prompt or "", self.encoder.settings.passage_prompt or ""
        self.questions, self.passages = task.queries[:32], task.corpus[:32]
        lengths = {"query_max_len": LENGTH, "passage_max_len": LENGTH}
        result: EvaluationResult = evaluate({"model": self.encoder}, task, metrics=[*METRICS], **lengths, resamples=10)
        self.metrics = result.metrics["model"]

    def vectors(self, max_length: int = LENGTH) -> list[np.ndarray]:
        """Of the questions and of the passages, with the prompts that the folder states."""
        texts = zip((self.questions, self.passages), self.prompts, strict=True)
        return [self.encoder.encode(some, max_length=max_length, prompt=prompt) for some, prompt in texts]

    def difference(self, *theirs: Any, max_length: int = LENGTH) -> float:
        """The largest of any number of their vectors of questions and passages."""
        return max(map(largest, self.vectors(max_length), theirs))


def largest(ours: Any, theirs: Any) -> float:
    """The largest difference of any number."""
    return float(np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)).max())


def read_task(data: Path, num_questions: int, num_passages: int) -> RetrievalTask:
    """A piece of CMRC."""
    rows = read_lines(data / "test.jsonl")[:num_questions]
    texts = list(dict.fromkeys([*(text for row in rows for text in row["pos"]), *read_texts(data)]))[:num_passages]
    place = {text: i for i, text in enumerate(texts)}
    query_ids, corpus_ids = [f"q{i}" for i in range(len(rows))], [f"d{i}" for i in range(len(texts))]
    relevant = [{place[text]: 1 for text in row["pos"]} for row in rows]
    queries, nothing = [row["query"] for row in rows], [[] for _ in rows]
    return RetrievalTask("cmrc", query_ids, queries, corpus_ids, texts, relevant, nothing, [], [{} for _ in rows])


# ----------------------------------------------------------------------------------------------------------- libraries


def transformers(ours: Ours) -> Found:
    """AutoModel and a hand-written pooling, all texts padded together."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(ours.folder), AutoModel.from_pretrained(ours.folder).eval()

    def encode(texts: list[str], prompt: str) -> np.ndarray:
        given = [prompt + text for text in texts]
        inputs = tokenizer(given, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            hidden_BTD, mask_BT1 = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        lengths_B1 = mask_BT1.sum(1)
        pooled = {
            "cls": hidden_BTD[:, 0],
            "mean": (hidden_BTD * mask_BT1).sum(1) / lengths_B1,
            "last_token": hidden_BTD[torch.arange(len(texts)), lengths_B1[:, 0] - 1],
        }[ours.encoder.settings.pooling]
        return (torch.nn.functional.normalize(pooled, dim=-1) if ours.encoder.settings.normalize else pooled).numpy()

    vectors = encode(ours.questions, ours.prompts[0]), encode(ours.passages, ours.prompts[1])
    return [("AutoModel and pooling by hand", ours.difference(*vectors), 1e-5)]


def sentence_transformers(ours: Ours) -> Found:
    """Vectors with prompts by name, similarity, and InformationRetrievalEvaluator."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.evaluation import InformationRetrievalEvaluator  # type: ignore[import-not-found]

    theirs, task = SentenceTransformer(ours.folder, device="cpu"), ours.task
    theirs.max_seq_length = LENGTH
    named = [theirs.encode(ours.questions, prompt_name="query"), theirs.encode(ours.passages, prompt_name="passage")]
    asked = [theirs.encode_query(ours.questions), theirs.encode_document(ours.passages)]
    own = ours.vectors()
    depths = {"mrr_at_k": [10], "ndcg_at_k": [10], "map_at_k": [100]}
    depths |= {"accuracy_at_k": [1, 10, 100], "precision_recall_at_k": [1, 10, 100]}
    prompts = {"query_prompt_name": "query", "corpus_prompt_name": "passage"}
    evaluator = InformationRetrievalEvaluator(
        dict(zip(task.query_ids, task.queries, strict=True)),
        dict(zip(task.corpus_ids, task.corpus, strict=True)),
        {q: {task.corpus_ids[row] for row in of} for q, of in zip(task.query_ids, task.relevant, strict=True)},
        **(depths | prompts | {"show_progress_bar": False}),
    )
    scores = evaluator(theirs)
    pairs = [(ours.metrics[name], scores[f"cosine_{key}"]) for name, key in METRICS.items()]
    return [
        ("encode with prompt names", ours.difference(*named), 1e-5),
        ("encode_query, encode_document", ours.difference(*asked), 1e-5),
        ("similarity", largest(own[0] @ own[1].T, theirs.similarity(*named)), 1e-5),
        (f"InformationRetrievalEvaluator, {len(pairs)} figures", largest(*zip(*pairs, strict=True)), 1e-6),
    ]


def flag_embedding(ours: Ours) -> Found:
    """FlagModel reads neither pooling nor prompts of a folder: both are given."""
    from FlagEmbedding import FlagModel  # type: ignore[import-not-found]

    stated = ours.encoder.settings
    if stated.pooling not in ("cls", "mean"):
        raise NotComparable("FlagModel pools by cls and mean only")
    settings = {"pooling_method": stated.pooling, "normalize_embeddings": stated.normalize}
    settings |= {"query_instruction_for_retrieval": ours.prompts[0]}
    settings |= {"passage_instruction_for_retrieval": ours.prompts[1]}
    theirs = FlagModel(ours.folder, use_fp16=False, devices="cpu", **settings)
    questions = theirs.encode_queries(ours.questions, max_length=LENGTH)
    passages = theirs.encode_corpus(ours.passages, max_length=LENGTH)
    return [("encode_queries, encode_corpus", ours.difference(questions, passages), 1e-5)]


def mteb(ours: Ours) -> Found:
    """A retrieval task of this data, that downloads nothing."""
    import mteb as library  # type: ignore[import-not-found]
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval  # type: ignore[import-not-found]
    from sentence_transformers import SentenceTransformer

    task = ours.task
    stated = {"name": "LocalRetrieval", "description": "A piece of CMRC.", "type": "Retrieval", "category": "t2t"}
    stated |= {"modalities": ["text"], "dataset": {"path": "local", "revision": "1"}, "eval_splits": ["test"]}
    stated |= {"eval_langs": ["cmn-Hans"], "main_score": "ndcg_at_10"}
    unknown = ("reference", "date", "domains", "task_subtypes", "license", "annotations_creators", "dialect")
    stated |= dict.fromkeys((*unknown, "sample_creation", "bibtex_citation"))

    class Local(AbsTaskRetrieval):  # type: ignore[misc]
        metadata = library.TaskMetadata(**stated)

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            corpus = {"id": task.corpus_ids, "text": task.corpus, "title": [""] * len(task.corpus)}
            queries = {"id": task.query_ids, "text": task.queries}
            pairs = zip(task.query_ids, task.relevant, strict=True)
            qrels = {q: {task.corpus_ids[row]: grade for row, grade in of.items()} for q, of in pairs}
            split = {"corpus": Dataset.from_dict(corpus), "queries": Dataset.from_dict(queries)}
            self.dataset = {"default": {"test": split | {"relevant_docs": qrels, "top_ranked": None}}}
            self.data_loaded = True

    theirs = SentenceTransformer(ours.folder, device="cpu")
    theirs.max_seq_length = LENGTH
    result = library.evaluate(theirs, Local(), cache=None, show_progress_bar=False)
    scores = result.task_results[0].scores["test"][0]
    names = {"nDCG@10": "ndcg_at_10", "MRR@10": "mrr_at_10", "Recall@100": "recall_at_100"}
    difference = max(abs(ours.metrics[name] - scores[key]) for name, key in names.items())
    return [(f"a local retrieval task (it rounds to 5 decimals): {', '.join(names)}", difference, 1e-4)]


def langchain(ours: Ours) -> Found:
    """HuggingFaceEmbeddings, as docs/after-training.md has it."""
    from langchain_huggingface import HuggingFaceEmbeddings  # type: ignore[import-not-found]

    prompts = {"encode_kwargs": {"prompt_name": "document"}, "query_encode_kwargs": {"prompt_name": "query"}}
    theirs = HuggingFaceEmbeddings(model_name=ours.folder, **prompts)
    vectors = [theirs.embed_query(text) for text in ours.questions], theirs.embed_documents(ours.passages)
    return [("embed_query, embed_documents", ours.difference(*vectors, max_length=512), 1e-5)]


def llama_index(ours: Ours) -> Found:
    """HuggingFaceEmbedding, as docs/after-training.md has it."""
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding  # type: ignore[import-not-found]

    prompts = {"query_instruction": ours.prompts[0], "text_instruction": ours.prompts[1]}
    theirs = HuggingFaceEmbedding(model_name=ours.folder, device="cpu", **prompts)
    questions = [theirs.get_query_embedding(text) for text in ours.questions]
    difference = ours.difference(questions, theirs.get_text_embedding_batch(ours.passages), max_length=512)
    return [("get_query_embedding, get_text_embedding_batch", difference, 1e-5)]


def onnx(ours: Ours) -> Found:
    """The folder as examples/export_onnx.py writes it, run by onnxruntime; one text alone is a size to trip over."""
    from export_onnx import Vectors, export

    with tempfile.TemporaryDirectory() as folder:
        export(ours.folder, folder)
        theirs = Vectors(folder, LENGTH)
        vectors = theirs(ours.questions, ours.prompts[0]), theirs(ours.passages, ours.prompts[1])
        one = theirs(ours.questions[:1], ours.prompts[0])
    difference = max(ours.difference(*vectors), largest(ours.vectors()[0][:1], one))
    return [("examples/export_onnx.py: questions, passages", difference, 1e-5)]


# the packages that a comparison needs; the first one's version is shown
LIBRARIES: dict[Callable[[Ours], Found], list[str]] = {
    transformers: ["transformers"],
    sentence_transformers: ["sentence-transformers"],
    flag_embedding: ["FlagEmbedding"],
    mteb: ["mteb"],
    langchain: ["langchain-huggingface"],
    llama_index: ["llama-index-embeddings-huggingface"],
    onnx: ["onnxruntime", "onnx", "onnxscript"],
}


def rows_of(ours: Ours) -> list[list[str]]:
    """What each library gives."""
    rows = []
    for compare, packages in LIBRARIES.items():
        lacking = [package for package in packages if installed(package) is None]
        if lacking:
            rows.append([packages[0], "-", f"not installed: {', '.join(lacking)}", "-", "-", "-"])
            continue
        named = [packages[0], str(installed(packages[0]))]
        try:
            for what, difference, bound in compare(ours):
                verdict = "ok" if difference <= bound else "NO"
                rows.append([*named, what, f"{difference:.1e}", f"{bound:.0e}", verdict])
        except NotComparable as reason:
            rows.append([*named, f"not compared: {reason}", "-", "-", "-"])
    return rows


def main() -> None:
    parser: argparse.ArgumentParser = harness.parser(__doc__, "data", "results")
    parser.add_argument("models", nargs="+", help="model folders")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--passages", type=int, default=1000)
    args = parser.parse_args()
    task = read_task(args.data, args.questions, args.passages)
    tables, failed = [], False
    for model in args.models:
        ours = Ours(model, task)
        rows = rows_of(ours)
        failed |= any(row[-1] == "NO" for row in rows)
        tables.append(
            harness.table(["library", "version", "compared", "largest difference", "bound", ""], rows, left=3)
        )
        tables.append(
            f"{len(task.queries)} questions, {len(task.corpus):,} passages; {ours.encoder.settings.pooling} pooling, "
            f"prompts `{ours.prompts[0]}` and `{ours.prompts[1]}`; torch {installed('torch')}, "
            f"transformers {installed('transformers')}; {date.today()}"
        )
    harness.save("interoperability", None, "\n\n".join(tables), args.results)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
