"""What other libraries make of a model folder as it is, against ours: vectors, and the figures of their evaluations.

    PYTHONPATH=. outputs/peers/bin/python benchmarks/interoperability.py outputs/encoder --data path/to/cmrc

The first --questions test questions of CMRC, and their positives with other sentences up to --passages as corpus. A
library that is not installed is listed as such. Writes benchmarks/results/interoperability.md.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bge_core.evaluation import EvaluationResult, evaluate
from bge_core.model import Encoder, load_encoder
from bge_core.tasks import RetrievalTask

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 128
METRICS = ["MRR@10", "nDCG@10", "Recall@1", "Recall@10", "Recall@100", "Precision@10", "Success@10", "MAP@100"]
Found = list[tuple[str, float, float]]  # what was compared, largest difference, bound


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


def sentence_transformers(model: str, task: RetrievalTask, ours: EvaluationResult, encoder: Encoder) -> Found:
    """Vectors with prompts by name, similarity, and InformationRetrievalEvaluator."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.evaluation import (  # type: ignore[import-not-found]
        InformationRetrievalEvaluator,
    )

    theirs = SentenceTransformer(model, device="cpu")
    theirs.max_seq_length = LENGTH
    some = task.queries[:32], task.corpus[:32]
    vectors = theirs.encode(some[0], prompt_name="query"), theirs.encode(some[1], prompt_name="passage")
    own = (
        encoder.encode(some[0], max_length=LENGTH, prompt=encoder.settings.query_prompt or ""),
        encoder.encode(some[1], max_length=LENGTH, prompt=encoder.settings.passage_prompt or ""),
    )
    found: Found = [
        ("encode, both prompts", max(map(largest, own, vectors)), 1e-5),
        ("similarity", largest(own[0] @ own[1].T, theirs.similarity(*vectors)), 1e-5),
    ]
    evaluator = InformationRetrievalEvaluator(
        dict(zip(task.query_ids, task.queries, strict=True)), dict(zip(task.corpus_ids, task.corpus, strict=True)),
        {q: {task.corpus_ids[row] for row in of} for q, of in zip(task.query_ids, task.relevant, strict=True)},
        mrr_at_k=[10], ndcg_at_k=[10], accuracy_at_k=[10], precision_recall_at_k=[1, 10, 100], map_at_k=[100],
        show_progress_bar=False, query_prompt_name="query", corpus_prompt_name="passage",
    )  # fmt: skip
    scores = evaluator(theirs)
    names = {"MRR@10": "mrr@10", "nDCG@10": "ndcg@10", "Recall@1": "recall@1", "Recall@10": "recall@10",
             "Recall@100": "recall@100", "Precision@10": "precision@10", "Success@10": "accuracy@10",
             "MAP@100": "map@100"}  # fmt: skip
    means = ours.metrics["model"]
    pairs = [(means[name], scores[f"cosine_{key}"]) for name, key in names.items()]
    return [*found, (f"InformationRetrievalEvaluator, {len(pairs)} figures", largest(*zip(*pairs, strict=True)), 1e-6)]


def flag_embedding(model: str, task: RetrievalTask, ours: EvaluationResult, encoder: Encoder) -> Found:
    """FlagModel reads neither pooling nor prompts of a folder: both are given."""
    from FlagEmbedding import FlagModel  # type: ignore[import-not-found]

    prompt = encoder.settings.query_prompt or ""
    theirs = FlagModel(
        model, use_fp16=False, devices="cpu", pooling_method=encoder.settings.pooling,
        query_instruction_for_retrieval=prompt, query_instruction_format="{}{}",
    )  # fmt: skip
    some = task.queries[:32], [(encoder.settings.passage_prompt or "") + text for text in task.corpus[:32]]
    return [
        (
            "encode_queries, encode_corpus",
            max(
                largest(encoder.encode(some[0], max_length=LENGTH, prompt=prompt),
                        theirs.encode_queries(some[0], max_length=LENGTH)),
                largest(encoder.encode(some[1], max_length=LENGTH), theirs.encode_corpus(some[1], max_length=LENGTH)),
            ),
            1e-5,
        )
    ]  # fmt: skip


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
    return [("a local retrieval task: nDCG@10, MRR@10, Recall@100", largest(*zip(*pairs, strict=True)), 1e-4)]


def langchain(model: str, task: RetrievalTask, ours: EvaluationResult, encoder: Encoder) -> Found:
    """HuggingFaceEmbeddings, as docs/evaluating.md has it."""
    from langchain_huggingface import HuggingFaceEmbeddings  # type: ignore[import-not-found]

    theirs = HuggingFaceEmbeddings(model_name=model, query_encode_kwargs={"prompt_name": "query"})
    own = encoder.encode(task.queries[:1], max_length=512, prompt=encoder.settings.query_prompt or "")[0]
    return [("embed_query", largest(own, theirs.embed_query(task.queries[0])), 1e-5)]


def llama_index(model: str, task: RetrievalTask, ours: EvaluationResult, encoder: Encoder) -> Found:
    """HuggingFaceEmbedding, as docs/evaluating.md has it."""
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding  # type: ignore[import-not-found]

    prompt = encoder.settings.query_prompt or ""
    theirs = HuggingFaceEmbedding(model_name=model, query_instruction=prompt, device="cpu")
    own = encoder.encode(task.queries[:1], max_length=512, prompt=prompt)[0]
    return [("get_query_embedding", largest(own, theirs.get_query_embedding(task.queries[0])), 1e-5)]


LIBRARIES: dict[str, tuple[str, Callable[..., Found]]] = {
    "sentence-transformers": ("sentence_transformers", sentence_transformers),
    "FlagEmbedding": ("FlagEmbedding", flag_embedding),
    "mteb": ("mteb", mteb),
    "langchain-huggingface": ("langchain_huggingface", langchain),
    "llama-index-embeddings-huggingface": ("llama_index", llama_index),
}


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
        {"model": encoder}, task, metrics=METRICS, query_max_length=LENGTH, passage_max_length=LENGTH, resamples=10
    )
    lines = [
        "| library | version | compared | largest difference | bound | |",
        "| --- | --- | --- | ---: | ---: | --- |",
    ]
    failed = False
    for name, (module, compare) in LIBRARIES.items():
        if importlib.util.find_spec(module) is None:
            lines.append(f"| {name} | - | not installed | - | - | - |")
            continue
        for what, difference, bound in compare(args.model, task, ours, encoder):
            fine = difference <= bound
            failed |= not fine
            lines.append(
                f"| {name} | {version(name)} | {what} | {difference:.1e} | {bound:.0e} | {'ok' if fine else 'NO'} |"
            )
    lines += ["", f"{len(task.queries)} questions, {len(task.corpus):,} passages; {date.today()}"]
    (ROOT / "benchmarks/results/interoperability.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
