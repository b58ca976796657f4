"""Side by side with FlagEmbedding 1.4.2, sentence-transformers 6.2 and LM_Cocktail 0.0.4, stage by stage.

    python benchmarks/peers.py --peers-python outputs/peers/bin/python --data path/to/cmrc [--what train2] [--pairs 5]

Every measurement is a process of its own; a peer's and ours take turns, on the same rows, weights, threads and
precision (float32), and the median ratio of the pairs is given with the smallest and the largest.

    train2, train8  batch 32, group size 2 and 8, query 64 and passage 128 tokens, the checkpoint's dropout, AdamW, mean
                    pooling as the encoder was made with; --steps updates after --warm-up of them (train8: --steps 1
                    --warm-up 0, as a step of the peers takes two minutes). Rows: CMRC's training questions, each with
                    random sentences of the corpus as negatives.
    encode          --texts sentences of the corpus, at most 128 tokens; the call alone
    encode_cls      the same with the first token's vector, as BGE's models are made, instead of the mean
    mine            15 negatives from ranks 2 to 200 for the training questions, guards on; the whole process, cold
    mine_again      the same job a second time, the embeddings in a folder: our --cache_dir and sentence-transformers'
                    cache_folder. FlagEmbedding's miner keeps none, so it is as cold as before
    mine_bf16       as `mine`, ours with --bf16; on a CPU FlagEmbedding always works in float32
    mine_large      500,000 passages of 16 to 40 characters and a model of one layer (384 dimensions, random weights),
                    ours with --cache_dir: the memory of what is not the encoder. --pairs 1: five minutes a side
    evaluate        three models (the encoder under three names) on the test questions at k = 100; the whole process
    merge           two models of bge-large's shape (1.3 GB each, random weights), 0.5 and 0.5; the whole process

The peers as their documentation has it, with what was fastest for them here: FlagEmbedding's runner; the trainer of
sentence-transformers with MultipleNegativesRankingLoss, each column encoded by itself (`column_merging_disabled`: 1.3
to 1.5 times as fast here as its default of one rectangle for queries and passages); both pad to the longest text of a
batch or column (packing needs flash-attn, which needs a GPU; neither groups by length in training). Both encode sorted
by length at batch size 32, their fastest here. The miner left
FlagEmbedding's package after 1.2: --miner is 1.2.11's source, run with 1.4.2's model. sentence-transformers'
mine_hard_negatives runs with use_faiss, which is faster here, and sampling_strategy="random". For mine and evaluate the
corpus is the positives and random sentences, --passages in all. Before the pairs of `mine` each miner gives once all
that the range holds (198, our guards off): how many of a peer's negatives ours has, too.

Activation memory is the peak of the process less what it held before the first step and less gradients and AdamW's two
moments (12 bytes a parameter), the same for all three. Private memory is the peak of a process's anonymous pages.
Appends to benchmarks/results/peers.jsonl (a line for each ratio); peers.md and peers.png show the last of each.
"""

import argparse
import json
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BATCH_SIZE, QUERY_LENGTH, PASSAGE_LENGTH, LEARNING_RATE = 32, 64, 128, 2e-5
NAMES = {
    "ours": "bge-core",
    "flagembedding": "FlagEmbedding",
    "sentence_transformers": "sentence-transformers",
    "lm_cocktail": "LM_Cocktail",
}
GUARDS = ("identical", "near_duplicates", "same_questions", "answers")
NO_INSTRUCTION = ["--query_instruction_for_retrieval", "", "--passage_instruction_for_retrieval", ""]  # as the peers
WHAT = {
    "train2": "training, group size 2, batch 32",
    "train8": "training, group size 8, batch 32",
    "encode": "encoding sentences, mean pooling",
    "encode_cls": "encoding sentences, CLS pooling, as BGE's",
    "mine": "mining, 2-200, 15 negatives, cold",
    "mine_again": "mining the same again, from the cache",
    "mine_bf16": "mining, cold, ours in bf16",
    "mine_large": "mining, a model of one layer",
    "evaluate": "evaluating three models, cold",
    "merge": "merging two models of 1.3 GB",
}
Result = dict[str, Any]


class Clock:
    """Ends of steps, and what the process held before the first."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.ends = warm_up, list[float]()
        self.held_mb = 0.0

    def begin(self) -> None:
        """Model and data are there."""
        if not self.warm_up:
            self.ends.append(time.perf_counter())
        self.held_mb = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def step(self) -> None:
        """A step has ended."""
        self.ends.append(time.perf_counter())

    def result(self, num_parameters: int) -> Result:
        """Queries per second after the warm-up, and the memory of activations."""
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        seconds = (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)
        states_mb = 12 * num_parameters / 2**20
        return {
            "queries_per_second": BATCH_SIZE / seconds, "peak_mb": peak_mb,
            "activation_mb": peak_mb - self.held_mb - states_mb,
        }  # fmt: skip


def callback_of(clock: Clock) -> Any:
    """The clock as a callback of transformers' trainer."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.step()

    return Callback()


def train_ours(job: Result, folder: str) -> Result:
    """train.py, its own loop."""
    import train
    from bge_core.runtime import watchdog

    clock, encoders, begun = Clock(job["warm_up"]), [], []
    step_begins, step_ends, build = watchdog.step_begins, watchdog.step_ends, train.build_encoder

    def build_encoder(*args: Any) -> Any:
        encoders.append(build(*args))
        return encoders[-1]

    def begins() -> None:
        if not begun:
            begun.append(True)
            clock.begin()
        step_begins()

    def ends() -> None:
        clock.step()
        step_ends()

    train.build_encoder, watchdog.step_begins, watchdog.step_ends = build_encoder, begins, ends  # type: ignore[assignment]
    code = train.main([
        "--model_name_or_path", job["model"], "--train_data", job["rows"], "--output_dir", f"{folder}/run",
        "--max_steps", str(job["steps"] + job["warm_up"]), "--per_device_train_batch_size", str(BATCH_SIZE),
        "--train_group_size", str(job["group"]), "--query_max_len", str(QUERY_LENGTH), "--passage_max_len",
        str(PASSAGE_LENGTH), "--learning_rate", str(LEARNING_RATE), "--save_steps", "0", "--sentence_pooling_method",
        "mean", *NO_INSTRUCTION,
    ])  # fmt: skip
    assert code == 0
    return clock.result(sum(p.numel() for p in encoders[0].parameters()))


def train_flagembedding(job: Result, folder: str) -> Result:
    """The runner of `python -m FlagEmbedding.finetune.embedder.encoder_only.base`."""
    from FlagEmbedding.finetune.embedder.encoder_only.base import (  # type: ignore[import-not-found]
        EncoderOnlyEmbedderDataArguments,
        EncoderOnlyEmbedderModelArguments,
        EncoderOnlyEmbedderRunner,
        EncoderOnlyEmbedderTrainingArguments,
    )

    runner = EncoderOnlyEmbedderRunner(
        model_args=EncoderOnlyEmbedderModelArguments(model_name_or_path=job["model"]),
        data_args=EncoderOnlyEmbedderDataArguments(
            train_data=[job["rows"]], train_group_size=job["group"], query_max_len=QUERY_LENGTH,
            passage_max_len=PASSAGE_LENGTH, cache_path=f"{folder}/cache",
        ),
        training_args=EncoderOnlyEmbedderTrainingArguments(
            output_dir=f"{folder}/run", max_steps=job["steps"] + job["warm_up"], per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE, temperature=0.02, sentence_pooling_method="mean", normalize_embeddings=True,
            save_strategy="no", report_to="none", use_cpu=True,
        ),
    )  # fmt: skip
    clock = Clock(job["warm_up"])
    runner.trainer.add_callback(callback_of(clock))
    runner.trainer.train()
    return clock.result(sum(p.numel() for p in runner.model.parameters()))


def train_sentence_transformers(job: Result, folder: str) -> Result:
    """SentenceTransformerTrainer, in-batch and own negatives."""
    from datasets import Dataset
    from sentence_transformers import (  # type: ignore[import-not-found]
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.losses import column_merging_disabled  # type: ignore[import-not-found]
    from sentence_transformers.losses import MultipleNegativesRankingLoss  # type: ignore[import-not-found]

    rows = read_rows(job["rows"])
    columns = {"anchor": [row["query"] for row in rows], "positive": [row["pos"][0] for row in rows]}
    for i in range(job["group"] - 1):
        columns[f"negative_{i}"] = [row["neg"][i] for row in rows]
    model = SentenceTransformer(job["model"], device="cpu")
    model.max_seq_length = PASSAGE_LENGTH
    clock = Clock(job["warm_up"])
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=f"{folder}/run", max_steps=job["steps"] + job["warm_up"], per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE, save_strategy="no", report_to="none", use_cpu=True,
        ),
        train_dataset=Dataset.from_dict(columns),
        loss=MultipleNegativesRankingLoss(model, scale=50.0),
        callbacks=[callback_of(clock)],
    )  # fmt: skip
    with column_merging_disabled():
        trainer.train()
    return clock.result(sum(p.numel() for p in model.parameters()))


def encode(job: Result, folder: str) -> Result:
    """Sentences per second of the side's own encode call; a first call of 64 texts warms up."""
    texts = json.loads(Path(job["rows"]).read_text(encoding="utf-8"))
    if job["side"] == "ours":
        from bge_core.encoder.load import load_encoder

        encoder = load_encoder(job["model"], pooling=job["pooling"])

        def run(some: list[str]) -> Any:
            return encoder.encode(some, max_length=PASSAGE_LENGTH)
    elif job["side"] == "flagembedding":
        from FlagEmbedding import FlagModel

        model = FlagModel(job["model"], use_fp16=False, devices="cpu", pooling_method=job["pooling"])

        def run(some: list[str]) -> Any:
            return model.encode_corpus(some, batch_size=32, max_length=PASSAGE_LENGTH)
    else:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import (  # type: ignore[import-not-found]
            Pooling,
        )

        their = SentenceTransformer(job["model"], device="cpu")
        their[1] = Pooling(their.get_embedding_dimension(), pooling_mode=job["pooling"])
        their.max_seq_length = PASSAGE_LENGTH

        def run(some: list[str]) -> Any:
            return their.encode(some, batch_size=32, show_progress_bar=False, normalize_embeddings=True)

    run(texts[:64])
    started = time.perf_counter()
    vectors = run(texts)
    seconds = time.perf_counter() - started
    return {"texts_per_second": len(texts) / seconds, "check": [round(float(x), 4) for x in vectors[0][:4]]}


def mine_flagembedding(job: Result, folder: str) -> None:
    """hn_mine.py of 1.2.11, with 1.4.2's model."""
    import importlib.util

    from FlagEmbedding import FlagModel

    file = Path(job["miner"]) / "FlagEmbedding/baai_general_embedding/finetune/hn_mine.py"
    spec = importlib.util.spec_from_file_location("their_hn_mine", file)
    assert spec is not None and spec.loader is not None
    miner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(miner)
    model = FlagModel(
        job["model"], use_fp16=False, devices="cpu", pooling_method="mean", query_max_length=QUERY_LENGTH,
        passage_max_length=PASSAGE_LENGTH,
    )  # fmt: skip
    encode_texts = model.encode
    model.encode = lambda texts, batch_size=None, max_length=PASSAGE_LENGTH, **more: encode_texts(
        texts, batch_size=32, max_length=max_length, **more
    )
    output = job.get("output", f"{folder}/mined.jsonl")
    miner.find_knn_neg(model, job["questions"], job["corpus"], output, [2, 200], job["negatives"], False)


def mine_sentence_transformers(job: Result, folder: str) -> None:
    """mine_hard_negatives, written as training rows."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives  # type: ignore[import-not-found]

    rows = read_rows(job["questions"])
    model = SentenceTransformer(job["model"], device="cpu")
    model.max_seq_length = PASSAGE_LENGTH
    pairs = {"anchor": [row["query"] for row in rows], "positive": [row["pos"][0] for row in rows]}
    mined = mine_hard_negatives(
        Dataset.from_dict(pairs), model, corpus=[row["text"] for row in read_rows(job["corpus"])], range_min=2,
        range_max=200, num_negatives=job["negatives"], sampling_strategy="random" if job["negatives"] < 198 else "top",
        output_format="n-tuple", batch_size=32, use_faiss=True, cache_folder=job.get("cache"), verbose=False,
    )  # fmt: skip
    with open(job.get("output", f"{folder}/mined.jsonl"), "w", encoding="utf-8") as file:
        for row in mined:
            neg = [row[name] for name in mined.column_names if name.startswith("negative")]
            file.write(json.dumps({"query": row["anchor"], "neg": neg}, ensure_ascii=False) + "\n")


def evaluate_sentence_transformers(job: Result, folder: str) -> None:
    """InformationRetrievalEvaluator, a model after the other."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.evaluation import (  # type: ignore[import-not-found]
        InformationRetrievalEvaluator,
    )

    rows = read_rows(job["questions"])
    corpus = {str(i): row["text"] for i, row in enumerate(read_rows(job["corpus"]))}
    places = {text: i for i, text in corpus.items()}
    queries = {str(i): row["query"] for i, row in enumerate(rows)}
    relevant = {str(i): {places[text] for text in row["pos"]} for i, row in enumerate(rows)}
    for name in job["models"]:
        model = SentenceTransformer(name, device="cpu")
        model.max_seq_length = PASSAGE_LENGTH
        evaluator = InformationRetrievalEvaluator(
            queries, corpus, relevant, batch_size=32, mrr_at_k=[10, 100], ndcg_at_k=[10, 100],
            accuracy_at_k=[1, 10, 100], precision_recall_at_k=[1, 10, 100], map_at_k=[100], show_progress_bar=False,
        )  # fmt: skip
        print(name, evaluator(model), file=sys.stderr)


def merge_lm_cocktail(job: Result, folder: str) -> None:
    """mix_models, which writes the folder."""
    from LM_Cocktail import mix_models  # type: ignore[import-not-found]

    mix_models(job["models"], "encoder", [0.5, 0.5], output_path=f"{folder}/merged")


TRAIN = {"ours": train_ours, "flagembedding": train_flagembedding, "sentence_transformers": train_sentence_transformers}
TRAINERS = ("flagembedding", "sentence_transformers")
MINERS = {"flagembedding": mine_flagembedding, "sentence_transformers": mine_sentence_transformers}
STAGES = {
    "mine": MINERS,
    "mine_again": MINERS,
    "mine_bf16": {"flagembedding": mine_flagembedding},
    "mine_large": {"flagembedding": mine_flagembedding},
    "evaluate": {"sentence_transformers": evaluate_sentence_transformers},
    "merge": {"lm_cocktail": merge_lm_cocktail},
}


def command_of(python: str, job: Result, folder: str) -> list[str]:
    """What runs a job: this file, or for our side of a stage its script."""
    if job["side"] != "ours" or job["kind"] not in STAGES:
        return [python, str(Path(__file__).resolve()), "--child", json.dumps(job)]
    if job["kind"].startswith("mine"):
        words = [
            "mine.py", "--model_name_or_path", job["model"], "--input_file", job["questions"], "--candidate_pool",
            job["corpus"], "--output_file", job.get("output", f"{folder}/mined.jsonl"), "--range_for_sampling",
            "2-200", "--negative_number", str(job["negatives"]), "--query_max_len", str(QUERY_LENGTH),
            "--passage_max_len", str(PASSAGE_LENGTH), *NO_INSTRUCTION, *job.get("flags", []),
            *(["--cache_dir", job["cache"]] if "cache" in job else []),
        ]  # fmt: skip
    elif job["kind"] == "evaluate":
        words = [
            "evaluate.py", "--encoder", *job["models"], "--val_data", job["questions"], "--corpus", job["corpus"],
            "--k", "100", "--max_query_length", str(QUERY_LENGTH), "--max_passage_length", str(PASSAGE_LENGTH),
        ]  # fmt: skip
    else:
        words = ["merge.py", "--models", *job["models"], "--weights", "0.5", "0.5", "--output_path", f"{folder}/merged"]
    return [python, str(ROOT / words[0]), *words[1:]]


def watch_private(pid: int, peak_mb: list[float]) -> None:
    """Keep the peak of a process's anonymous pages, until it ends."""
    try:
        while True:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()  # counters: reading them holds nobody up
            held = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
            peak_mb[0] = max(peak_mb[0], held / 2**10)
            time.sleep(0.05)
    except (OSError, StopIteration):
        return


def measure(python: str, job: Result, threads: int) -> Result:
    """Run a job in a fresh process of the environment."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true",
        "PYTHONPATH": str(ROOT) if job["side"] == "ours" else "", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        words, peak_mb, started = command_of(python, job, folder), [0.0], time.perf_counter()
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
            watcher = threading.Thread(target=watch_private, args=(process.pid, peak_mb))
            watcher.start()
            out, _ = process.communicate()
            seconds = time.perf_counter() - started
            watcher.join()
            errors.seek(0)
            if process.returncode:
                raise SystemExit(f"{job}\n{errors.read()[-4000:]}")
    stage = {"seconds": round(seconds, 2), "private_mb": round(peak_mb[0], 1)}
    result: Result = stage if job["kind"] in STAGES else json.loads(out.splitlines()[-1])
    print(job["side"], job["kind"], result, file=sys.stderr, flush=True)
    return result


def processor() -> str:
    """Its name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def spread(ratios: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def write_rows(source: Path, target: Path) -> None:
    """CMRC's training rows, each with seven random sentences of the corpus as negatives."""
    rng = random.Random(0)
    texts = read_texts(source)
    with open(source / "train.jsonl", encoding="utf-8") as lines, open(target, "w", encoding="utf-8") as rows:
        for line in lines:
            rows.write(json.dumps(json.loads(line) | {"neg": rng.sample(texts, 7)}, ensure_ascii=False) + "\n")


def read_rows(file: str | Path) -> list[Result]:
    """The lines of a jsonl file."""
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_texts(source: Path) -> list[str]:
    """The sentences of the corpus."""
    return [row["text"] for row in read_rows(source / "corpus.jsonl")]


def write_task(source: Path, folder: Path, questions: str, passages: int) -> Result:
    """The questions, and a corpus of their positives and random sentences."""
    rows = read_rows(source / questions)
    texts = list(dict.fromkeys(text for row in rows for text in row["pos"]))
    others = sorted(set(read_texts(source)) - set(texts))
    texts += random.Random(0).sample(others, min(len(others), max(0, passages - len(texts))))
    for name, lines in (("questions", rows), ("corpus", [{"text": text} for text in texts])):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return {"questions": f"{folder}/questions.jsonl", "corpus": f"{folder}/corpus.jsonl", "num_passages": len(texts)}


def write_large_models(encoder: Path, folder: Path) -> list[str]:
    """Two models of bge-large's shape with random weights."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    names = []
    for seed in range(2):
        torch.manual_seed(seed)
        names.append(f"{folder}/large-{seed}")
        BertModel(BertConfig(vocab_size=21_128, **shape)).save_pretrained(names[-1])
        AutoTokenizer.from_pretrained(encoder).save_pretrained(names[-1])
    return names


def write_small_model(encoder: Path, folder: Path) -> str:
    """A model of one layer with random weights: its vectors cost little, and are as large as others."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 1, "num_attention_heads": 6, "intermediate_size": 384}
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "small")
    tokenizer.save_pretrained(folder / "small")
    return str(folder / "small")


def write_many(source: Path, folder: Path, passages: int) -> Result:
    """Pieces of the corpus's characters as a corpus, and the first 200 of them as questions."""
    rng, text = random.Random(0), "".join(read_texts(source))
    starts = rng.sample(range(len(text) - 40), min(passages, len(text) - 40))
    texts = [text[start : start + rng.randint(16, 40)] for start in starts]
    while len(texts) < passages:
        texts.append(texts[rng.randrange(len(starts))][:12] + texts[rng.randrange(len(starts))][:20])
    rows = [{"query": text[:12], "pos": [text]} for text in texts[:200]]
    for name, lines in (("questions", rows), ("corpus", [{"text": text} for text in texts])):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return {"num_passages": passages}


def prepare_job(what: str, args: argparse.Namespace, folder: Path) -> Result:
    """Write what both sides read."""
    job: Result = {"kind": what, "model": str(Path(args.encoder).resolve())}
    if what in ("train2", "train8"):
        write_rows(args.data, folder / "train.jsonl")
        settings = {"group": int(what[5:]), "steps": args.steps, "warm_up": args.warm_up}
        return job | {"rows": f"{folder}/train.jsonl"} | settings
    if what.startswith("encode"):
        job |= {"kind": "encode", "pooling": "cls" if what == "encode_cls" else "mean"}
        texts = random.Random(0).sample(read_texts(args.data), args.texts)
        (folder / "texts.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
        return job | {"rows": f"{folder}/texts.json"}
    if what == "merge":
        return job | {"models": write_large_models(args.encoder, folder)}
    job |= write_task(args.data, folder, "test.jsonl" if what == "evaluate" else "train.jsonl", args.passages)
    if what == "mine_large":
        job |= {"model": write_small_model(args.encoder, folder)} | write_many(args.data, folder, 500_000)
    if what.startswith("mine"):
        job["flags"] = ["--bf16"] if what == "mine_bf16" else []
        return job | {"miner": str(Path(args.miner).resolve()), "negatives": 15}
    models = [folder / name for name in ("one", "two", "three")]
    for name in models:
        name.symlink_to(job["model"])
    return job | {"models": list(map(str, models))}


def share_of_candidates(jobs: dict[str, Result], pythons: dict[str, str], threads: int) -> str:
    """How many of the peer's negatives ours has, too, where both give all that the range holds."""
    found = []
    for side, job in jobs.items():
        job |= {"output": f"{job['output']}-{side}", "negatives": 198, "side": side}
        measure(pythons[side], job, threads)
        found.append([set(row["neg"]) for row in read_rows(job["output"])])
    ours, theirs = found
    assert len(ours) == len(theirs)
    common = sum(len(a & b) for a, b in zip(ours, theirs, strict=True))
    return f"{common:,} of {sum(map(len, theirs)):,}, ours {sum(map(len, ours)):,}"


def summarize(file: Path) -> None:
    """The last ratios of each kind and peer: a table, and a bar with its range for each speed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    last = {(line["what"], line["peer"]): line for line in map(json.loads, file.read_text().splitlines())}
    lines = {key: last[key] for key in sorted(last, key=lambda key: [*WHAT].index(key[0]))}
    table = [
        "| what | against | times as fast | memory, ours / theirs | machine | date |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (what, peer), line in lines.items():
        memory = [f"{line[key]} {key.split('_')[0]}" for key in line if key.endswith("_memory_ratio")]
        label = WHAT[what] + (f", {line['passages']:,} passages" if "passages" in line else "")
        cells = [label, peer, line["speed_ratio"], *(memory or ["-"]), line["machine"], line["date"]]
        table.append("| " + " | ".join(cells) + " |")
    file.with_suffix(".md").write_text("\n".join([*table, ""]), encoding="utf-8")
    numbers = [list(map(float, re.findall(r"[\d.]+", line["speed_ratio"]))) for line in lines.values()]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(lines) + 1.2), layout="constrained")
    names = [f"{what}\n{peer}" for what, peer in lines]
    errors = [[middle - low for middle, low, _ in numbers], [high - middle for middle, _, high in numbers]]
    bars = axes.barh(names, [middle for middle, _, _ in numbers], xerr=errors, color="#4c78a8", capsize=3)
    axes.bar_label(bars, [f"{middle:.2f}" for middle, _, _ in numbers], label_type="center", color="white")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("times as fast as the peer (median of the pairs, smallest and largest)")
    axes.invert_yaxis()
    figure.savefig(file.with_suffix(".png"), dpi=120)


def main() -> None:
    """All pairs, or with --child one job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", help="python of the environment of benchmarks/requirements.txt")
    parser.add_argument("--data", type=Path, help="CMRC 2018: train.jsonl, corpus.jsonl")
    parser.add_argument("--encoder", default="outputs/encoder")
    parser.add_argument("--what", nargs="+", default=[*WHAT])
    parser.add_argument("--against", nargs="+", default=[*NAMES][1:], choices=[*NAMES][1:])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1, choices=[0, 1], help="steps before those that count")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--passages", type=int, default=13_728, help="of the corpus of mine and evaluate")
    parser.add_argument("--miner", default="outputs/FlagEmbedding-1.2.11", help="unpacked source distribution")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        job = json.loads(args.child)
        with tempfile.TemporaryDirectory() as folder:
            if job["kind"] in STAGES:
                STAGES[job["kind"]][job["side"]](job, folder)
            else:
                result = encode(job, folder) if job["kind"] == "encode" else TRAIN[job["side"]](job, folder)
                print(json.dumps(result))
        return
    facts = {
        "machine": f"{os.cpu_count()} x {processor()}", "threads": args.threads, "date": str(date.today()),
        "command": " ".join(["python", "benchmarks/peers.py", *sys.argv[1:]]),
    }  # fmt: skip
    results = ROOT / "benchmarks/results/peers.jsonl"
    for what in args.what:
        with tempfile.TemporaryDirectory() as folder:
            job = prepare_job(what, args, Path(folder))
            for peer in (peer for peer in STAGES.get(what, TRAINERS) if peer in args.against):
                pythons = {"ours": sys.executable, peer: args.peers_python}
                pairs, more = [], dict[str, str]()
                jobs = {"ours": job, peer: job}
                if what == "mine":
                    unguarded = [word for name in GUARDS for word in (f"--guard_{name}", "False")]
                    all_of = job | {"output": f"{folder}/all", "flags": unguarded}
                    more["same_candidates"] = share_of_candidates(
                        {s: dict(all_of) for s in jobs}, pythons, args.threads
                    )
                if what in ("mine_again", "mine_large"):
                    jobs = {side: job | {"cache": f"{folder}/cache-{side}"} for side in jobs}
                    for side in jobs if what == "mine_again" else ():
                        if side != "flagembedding":  # which keeps nothing
                            measure(pythons[side], jobs[side] | {"side": side}, args.threads)
                for number in range(args.pairs):
                    sides = ["ours", peer] if number % 2 == 0 else [peer, "ours"]
                    pairs.append(
                        {side: measure(pythons[side], jobs[side] | {"side": side}, args.threads) for side in sides}
                    )
                line = {"what": what, "peer": NAMES[peer]} | ratios_of(pairs, peer) | more | {"pairs": pairs} | facts
                if "num_passages" in job:
                    line["passages"] = job["num_passages"]
                with open(results, "a", encoding="utf-8") as out:
                    out.write(json.dumps(line) + "\n")
                print({key: value for key, value in line.items() if key != "pairs"}, flush=True)
    summarize(results)


def ratios_of(pairs: list[Result], peer: str) -> Result:
    """Speed: how many times as fast as the peer; memory: ours over theirs."""
    keys, ratios = pairs[0]["ours"], {}
    for key in ("queries_per_second", "texts_per_second"):
        if key in keys:
            ratios["speed_ratio"] = spread([pair["ours"][key] / pair[peer][key] for pair in pairs])
    if "seconds" in keys:
        ratios["speed_ratio"] = spread([pair[peer]["seconds"] / pair["ours"]["seconds"] for pair in pairs])
    for key in ("activation_mb", "private_mb"):
        if key in keys:
            ratios[key.replace("_mb", "_memory_ratio")] = spread(
                [pair["ours"][key] / pair[peer][key] for pair in pairs]
            )
    return ratios


if __name__ == "__main__":
    main()
