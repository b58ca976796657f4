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
    mine_again      the same job a second time, the embeddings in a folder (ours; sentence-transformers' cache_folder).
                    FlagEmbedding's miner keeps none, so it is as cold as before
    mine_bf16       as `mine`, ours with --bf16; on a CPU FlagEmbedding always works in float32
    mine_large      500,000 passages of 16 to 40 characters and a model of one layer (384 dimensions, random weights),
                    ours with its cache: the memory of what is not the encoder. --pairs 1: five minutes a side
    evaluate        three models (the encoder under three names) on the test questions at k = 100; the whole process
    merge           two models of bge-large's shape (1.3 GB each, random weights), 0.5 and 0.5; the whole process

The peers as their documentation has it, with what was fastest for them here: FlagEmbedding's runner; the trainer of
sentence-transformers with MultipleNegativesRankingLoss, each column encoded by itself (`column_merging_disabled`: 1.3
to 1.5 times as fast here as its default of one rectangle for queries and passages); both pad to the longest text of a
batch or column (packing needs flash-attn, which needs a GPU; neither groups by length in training). Both encode sorted
by length at batch size 32, their fastest here. The miner left FlagEmbedding's package after 1.2: --miner is 1.2.11's
source, run with 1.4.2's model. sentence-transformers' mine_hard_negatives runs with use_faiss, which is faster here,
and sampling_strategy="random". For mine and evaluate the corpus is the positives and random sentences, --passages in
all. Before the pairs of `mine` each miner gives once all that the range holds (198, our guards off): how many of a
peer's negatives ours has, too.

Activation memory is the peak of the process less what it held before the first step and less gradients and AdamW's two
moments (12 bytes a parameter), the same for all three. Private memory is the peak of a process's anonymous pages.
Appends to benchmarks/results/peers.jsonl (a line for each ratio); peers.md and peers.png show the last of each.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
from harness import LENGTHS, NO_INSTRUCTION, PASSAGE_LENGTH, QUERY_LENGTH, Row, read_lines, read_texts, write_lines

BATCH_SIZE, LEARNING_RATE = 32, 2e-5
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
GUARDS = ("identical", "near_duplicates", "same_questions", "answers")
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SMALL = {"hidden_size": 384, "num_hidden_layers": 1, "num_attention_heads": 6, "intermediate_size": 384}

# ----------------------------------------------------------------------------------------------------------- training


class Clock:
    """Ends of any trainer's steps, and what the process held before the first; by torch's own hooks."""

    def __init__(self, warm_up: int) -> None:
        from torch.nn.modules.module import register_module_forward_pre_hook
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.warm_up, self.ends, self.held_mb, self.num_parameters = warm_up, list[float](), 0.0, 0
        self.handle = register_module_forward_pre_hook(self.forward_begins)
        register_optimizer_step_post_hook(self.step_ends)

    def forward_begins(self, module: Any, inputs: Any) -> None:
        """Model and data are there with the first forward pass that trains."""
        if module.training:
            self.handle.remove()
            self.held_mb = harness.held_mb("VmRSS")
            if not self.warm_up:
                self.ends.append(time.perf_counter())

    def step_ends(self, optimizer: Any, *_: Any) -> None:
        """The weights have been updated."""
        self.ends.append(time.perf_counter())
        self.num_parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])

    def result(self) -> Row:
        """Queries per second after the warm-up, and the memory of activations."""
        peak_mb, states_mb = harness.held_mb("VmHWM"), 12 * self.num_parameters / 2**20
        seconds = (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)
        activation_mb = peak_mb - self.held_mb - states_mb
        return {"queries_per_second": BATCH_SIZE / seconds, "peak_mb": peak_mb, "activation_mb": activation_mb}


def train_ours(job: Row) -> Row:
    """train.py, its own loop."""
    import train

    clock = Clock(job["warm_up"])
    files = {"model_name_or_path": job["model"], "train_data": job["rows"], "output_dir": f"{job['folder']}/run"}
    sizes = {"per_device_train_batch_size": BATCH_SIZE, "train_group_size": job["group"]} | LENGTHS
    steps = {"max_steps": job["steps"] + job["warm_up"], "learning_rate": LEARNING_RATE, "save_steps": 0}
    words = harness.flags(**files, **sizes, **steps, **NO_INSTRUCTION, sentence_pooling_method="mean")
    assert train.main(words) == 0
    return clock.result()


def train_flagembedding(job: Row) -> Row:
    """The runner of `python -m FlagEmbedding.finetune.embedder.encoder_only.base`."""
    import FlagEmbedding.finetune.embedder.encoder_only.base as base  # type: ignore[import-not-found]

    data = {"train_data": [job["rows"]], "train_group_size": job["group"], "cache_path": f"{job['folder']}/cache"}
    loss = {"temperature": 0.02, "sentence_pooling_method": "mean", "normalize_embeddings": True}
    runner = base.EncoderOnlyEmbedderRunner(
        model_args=base.EncoderOnlyEmbedderModelArguments(model_name_or_path=job["model"]),
        data_args=base.EncoderOnlyEmbedderDataArguments(**data, **LENGTHS),
        training_args=base.EncoderOnlyEmbedderTrainingArguments(**loss, **trainer_settings(job)),
    )
    clock = Clock(job["warm_up"])
    runner.trainer.train()
    return clock.result()


def trainer_settings(job: Row) -> Row:
    """What both peers' trainers, which are transformers', are told."""
    return {
        "output_dir": f"{job['folder']}/run",
        "max_steps": job["steps"] + job["warm_up"],
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }


def train_sentence_transformers(job: Row) -> Row:
    """SentenceTransformerTrainer, in-batch and own negatives."""
    import sentence_transformers as theirs  # type: ignore[import-not-found]
    from datasets import Dataset
    from sentence_transformers.base.losses import column_merging_disabled  # type: ignore[import-not-found]
    from sentence_transformers.losses import MultipleNegativesRankingLoss  # type: ignore[import-not-found]

    rows = read_lines(job["rows"])
    columns = {"anchor": [row["query"] for row in rows], "positive": [row["pos"][0] for row in rows]}
    columns |= {f"negative_{i}": [row["neg"][i] for row in rows] for i in range(job["group"] - 1)}
    model = their_model(job["model"])
    trainer = theirs.SentenceTransformerTrainer(
        model=model,
        args=theirs.SentenceTransformerTrainingArguments(**trainer_settings(job)),
        train_dataset=Dataset.from_dict(columns),
        loss=MultipleNegativesRankingLoss(model, scale=50.0),
    )
    clock = Clock(job["warm_up"])
    with column_merging_disabled():
        trainer.train()
    return clock.result()


def their_model(name: str) -> Any:
    """sentence-transformers' model with our lengths."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(name, device="cpu")
    model.max_seq_length = PASSAGE_LENGTH
    return model


# ------------------------------------------------------------------------------------------------------------ encoding


def encode_ours(job: Row) -> Row:
    """Encoder.encode."""
    from bge_core.encoder import load_encoder

    encoder = load_encoder(job["model"], pooling=job["pooling"])
    return time_encoding(job, encoder.encode, max_length=PASSAGE_LENGTH)


def encode_flagembedding(job: Row) -> Row:
    """FlagModel.encode_corpus."""
    from FlagEmbedding import FlagModel

    model = FlagModel(job["model"], use_fp16=False, devices="cpu", pooling_method=job["pooling"])
    return time_encoding(job, model.encode_corpus, batch_size=32, max_length=PASSAGE_LENGTH)


def encode_sentence_transformers(job: Row) -> Row:
    """SentenceTransformer.encode."""
    from sentence_transformers.sentence_transformer.modules import Pooling  # type: ignore[import-not-found]

    model = their_model(job["model"])
    model[1] = Pooling(model.get_embedding_dimension(), pooling_mode=job["pooling"])
    return time_encoding(job, model.encode, batch_size=32, show_progress_bar=False, normalize_embeddings=True)


def time_encoding(job: Row, encode: Callable[..., Any], **settings: Any) -> Row:
    """Texts per second of one call; a first one of 64 texts warms up."""
    texts = [row["text"] for row in read_lines(job["rows"])]
    encode(texts[:64], **settings)
    vectors: list[Any] = []
    seconds = harness.timed(lambda: vectors.extend(encode(texts, **settings)))
    return {"texts_per_second": len(texts) / seconds, "check": [round(float(x), 4) for x in vectors[0][:4]]}


# -------------------------------------------------------------------------------------------- mine, evaluate and merge


def mine_ours(job: Row, threads: int) -> harness.Run:
    """mine.py."""
    files = {"model_name_or_path": job["model"], "input_file": job["questions"], "candidate_pool": job["corpus"]}
    files |= {"output_file": f"{job['folder']}/mined.jsonl", "embedding_cache_dir": job.get("cache")}
    settings = {"range_for_sampling": "2-200", "negative_number": job["negatives"]} | job["flags"]
    return harness.stage("mine", threads, **files, **settings, **LENGTHS, **NO_INSTRUCTION)


def mine_flagembedding(job: Row) -> Row:
    """hn_mine.py of 1.2.11, with 1.4.2's model."""
    from FlagEmbedding import FlagModel

    lengths = {"query_max_length": QUERY_LENGTH, "passage_max_length": PASSAGE_LENGTH}
    model = FlagModel(job["model"], use_fp16=False, devices="cpu", pooling_method="mean", **lengths)
    encode = model.encode
    model.encode = lambda texts, batch_size=None, max_length=PASSAGE_LENGTH, **more: encode(
        texts, batch_size=32, max_length=max_length, **more
    )
    output, miner = f"{job['folder']}/mined.jsonl", harness.load_miner(job["miner"])
    miner.find_knn_neg(model, job["questions"], job["corpus"], output, [2, 200], job["negatives"], False)
    return {}


def mine_sentence_transformers(job: Row) -> Row:
    """mine_hard_negatives, written as training rows."""
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives  # type: ignore[import-not-found]

    rows = read_lines(job["questions"])
    pairs = {"anchor": [row["query"] for row in rows], "positive": [row["pos"][0] for row in rows]}
    corpus = [row["text"] for row in read_lines(job["corpus"])]
    settings = {"range_min": 2, "range_max": 200, "num_negatives": job["negatives"], "cache_folder": job.get("cache")}
    settings |= {"sampling_strategy": "random" if job["negatives"] < 198 else "top", "output_format": "n-tuple"}
    settings |= {"batch_size": 32, "use_faiss": True, "verbose": False}
    mined = mine_hard_negatives(Dataset.from_dict(pairs), their_model(job["model"]), corpus=corpus, **settings)
    names = [name for name in mined.column_names if name.startswith("negative")]
    found = ({"query": row["anchor"], "neg": [row[name] for name in names]} for row in mined)
    write_lines(f"{job['folder']}/mined.jsonl", found)
    return {}


def evaluate_ours(job: Row, threads: int) -> harness.Run:
    """evaluate.py."""
    lengths = {"max_query_length": QUERY_LENGTH, "max_passage_length": PASSAGE_LENGTH}
    files = {"encoder": job["models"], "val_data": job["questions"], "corpus": job["corpus"]}
    return harness.stage("evaluate", threads, **files, k=100, **lengths)


def evaluate_sentence_transformers(job: Row) -> Row:
    """InformationRetrievalEvaluator, a model after the other."""
    from sentence_transformers.evaluation import InformationRetrievalEvaluator  # type: ignore[import-not-found]

    rows = read_lines(job["questions"])
    corpus = {str(i): row["text"] for i, row in enumerate(read_lines(job["corpus"]))}
    places = {text: i for i, text in corpus.items()}
    queries = {str(i): row["query"] for i, row in enumerate(rows)}
    relevant = {str(i): {places[text] for text in row["pos"]} for i, row in enumerate(rows)}
    depths = {"mrr_at_k": [10, 100], "ndcg_at_k": [10, 100], "map_at_k": [100]}
    depths |= {"accuracy_at_k": [1, 10, 100], "precision_recall_at_k": [1, 10, 100]}
    settings = {"batch_size": 32, "show_progress_bar": False} | depths
    evaluator = InformationRetrievalEvaluator(queries, corpus, relevant, **settings)
    for name in job["models"]:
        print(name, evaluator(their_model(name)), file=sys.stderr)
    return {}


def merge_ours(job: Row, threads: int) -> harness.Run:
    """merge.py."""
    mixed = {"models": job["models"], "weights": [0.5, 0.5], "output_path": f"{job['folder']}/merged"}
    return harness.stage("merge", threads, **mixed)


def merge_lm_cocktail(job: Row) -> Row:
    """mix_models, which writes the folder."""
    from LM_Cocktail import mix_models  # type: ignore[import-not-found]

    mix_models(job["models"], "encoder", [0.5, 0.5], output_path=f"{job['folder']}/merged")
    return {}


FLAG, SENTENCE, COCKTAIL = "FlagEmbedding", "sentence-transformers", "LM_Cocktail"
PEERS: dict[str, dict[str, Callable[[Row], Row]]] = {
    "train": {"ours": train_ours, FLAG: train_flagembedding, SENTENCE: train_sentence_transformers},
    "encode": {"ours": encode_ours, FLAG: encode_flagembedding, SENTENCE: encode_sentence_transformers},
    "mine": {FLAG: mine_flagembedding, SENTENCE: mine_sentence_transformers},
    "evaluate": {SENTENCE: evaluate_sentence_transformers},
    "merge": {COCKTAIL: merge_lm_cocktail},
}
STAGES = {"mine": mine_ours, "evaluate": evaluate_ours, "merge": merge_ours}
ONLY_AGAINST_FLAGEMBEDDING = ("mine_bf16", "mine_large")

# ------------------------------------------------------------------------------------------------- what both sides read


def write_task(folder: Path, rows: list[Row], texts: list[str]) -> Row:
    """Questions and corpus as files."""
    return {
        "questions": write_lines(folder / "questions.jsonl", rows),
        "corpus": write_lines(folder / "corpus.jsonl", ({"text": text} for text in texts)),
        "num_passages": len(texts),
    }


def write_cmrc_task(data: Path, folder: Path, questions: str, passages: int) -> Row:
    """The questions, and a corpus of their positives and random sentences."""
    rows = read_lines(data / questions)
    texts = list(dict.fromkeys(text for row in rows for text in row["pos"]))
    others = sorted(set(read_texts(data)) - set(texts))
    texts += random.Random(0).sample(others, min(len(others), max(0, passages - len(texts))))
    return write_task(folder, rows, texts)


def write_many(data: Path, folder: Path, passages: int) -> Row:
    """Pieces of the corpus's characters as a corpus, and the first 200 of them as questions."""
    rng, text = random.Random(0), "".join(read_texts(data))
    starts = rng.sample(range(len(text) - 40), min(passages, len(text) - 40))
    texts = [text[start : start + rng.randint(16, 40)] for start in starts]
    while len(texts) < passages:
        texts.append(texts[rng.randrange(len(starts))][:12] + texts[rng.randrange(len(starts))][:20])
    return write_task(folder, [{"query": text[:12], "pos": [text]} for text in texts[:200]], texts)


def write_random_model(encoder: str, folder: Path, shape: dict[str, int], seed: int = 0) -> str:
    """A BERT with random weights and the encoder's tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def prepare_job(what: str, args: argparse.Namespace, folder: Path) -> Row:
    """Write what both sides read."""
    model = str(Path(args.encoder).resolve())
    if what.startswith("train"):
        rows = harness.write_training_rows(args.data, folder / "train.jsonl", 7)
        return {"model": model, "rows": rows, "group": int(what[5:]), "steps": args.steps, "warm_up": args.warm_up}
    if what.startswith("encode"):
        texts = random.Random(0).sample(read_texts(args.data), args.texts)
        rows = write_lines(folder / "texts.jsonl", ({"text": text} for text in texts))
        return {"model": model, "rows": rows, "pooling": "cls" if what == "encode_cls" else "mean"}
    if what == "merge":
        return {"models": [write_random_model(model, folder / f"large-{seed}", LARGE, seed) for seed in (0, 1)]}
    if what == "evaluate":
        names = [folder / name for name in ("one", "two", "three")]
        for name in names:
            name.symlink_to(model)
        return write_cmrc_task(args.data, folder, "test.jsonl", args.passages) | {"models": list(map(str, names))}
    mining = {"model": model, "miner": str(Path(args.miner).resolve()), "negatives": 15}
    mining["flags"] = {"bf16": True} if what == "mine_bf16" else {}
    if what == "mine_large":
        mining["model"] = write_random_model(model, folder / "small", SMALL)
        return mining | write_many(args.data, folder, 500_000)
    return mining | write_cmrc_task(args.data, folder, "train.jsonl", args.passages)


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(kind: str, side: str, job: Row, args: argparse.Namespace) -> Row:
    """One side's job in a process of its own; what it writes is gone afterwards, unless the job names a folder."""
    with tempfile.TemporaryDirectory() as folder:
        job = {"folder": folder} | job
        if side == "ours" and kind in STAGES:
            done = STAGES[kind](job, args.threads)
            return {"seconds": done.seconds, "private_mb": done.private_mb}
        python = sys.executable if side == "ours" else args.peers_python
        return harness.fresh(PEERS[kind][side], args.threads, python, job=job)


def share_of_candidates(peer: str, job: Row, args: argparse.Namespace, folder: str) -> str:
    """How many of the peer's negatives ours has, too, where both give all that the range holds."""
    found = []
    for side in ("ours", peer):
        output = Path(folder) / f"all-{side}"
        output.mkdir()
        everything = {"folder": str(output), "negatives": 198, "flags": {f"guard_{name}": False for name in GUARDS}}
        measure("mine", side, job | everything, args)
        found.append([set(row["neg"]) for row in read_lines(output / "mined.jsonl")])
    ours, theirs = found
    common = sum(len(a & b) for a, b in zip(ours, theirs, strict=True))
    return f"{common:,} of {sum(map(len, theirs)):,}, ours {sum(map(len, ours)):,}"


def compare(what: str, peer: str, job: Row, args: argparse.Namespace, folder: str) -> Row:
    """All pairs of a kind against one peer, as a line of peers.jsonl."""
    kind, jobs, line = re.split(r"\d|_", what)[0], {"ours": job, peer: job}, {"what": what, "peer": peer}
    if what == "mine":
        line["same_candidates"] = share_of_candidates(peer, job, args, folder)
    if what in ("mine_again", "mine_large"):
        jobs = {side: job | {"cache": f"{folder}/cache-{side}"} for side in jobs}
    if what == "mine_again":
        for side in {"ours", peer} - {FLAG}:  # which keeps nothing
            measure(kind, side, jobs[side], args)
    ours, theirs = (lambda _, side=side: measure(kind, side, jobs[side], args) for side in ("ours", peer))
    both = harness.in_turn(ours, theirs, args.pairs)
    speed = next((key for key in ("queries_per_second", "texts_per_second") if key in both[0][0]), None)
    ratios = [a[speed] / b[speed] if speed else b["seconds"] / a["seconds"] for a, b in both]
    line["speed_ratio"] = harness.spread(ratios)
    memory = {"train": "activation", "encode": None}.get(kind, "private")
    if memory:
        line[f"{memory}_memory_ratio"] = harness.spread(a[f"{memory}_mb"] / b[f"{memory}_mb"] for a, b in both)
    if "num_passages" in job:
        line["passages"] = job["num_passages"]
    return line | {"pairs": [{"ours": a, peer: b} for a, b in both]}


def summarize(file: Path) -> None:
    """The last ratios of each kind and peer: a table, and a bar with its range for each speed."""
    from matplotlib.figure import Figure

    last = {(line["what"], line["peer"]): line for line in read_lines(file)}
    lines = [last[key] for key in sorted(last, key=lambda key: [*WHAT].index(key[0]))]
    rows = []
    for line in lines:
        memory = next((f"{line[key]} {key.split('_')[0]}" for key in line if key.endswith("_memory_ratio")), "-")
        label = WHAT[line["what"]] + (f", {line['passages']:,} passages" if "passages" in line else "")
        rows.append([label, line["peer"], line["speed_ratio"], memory, line["machine"], line["date"]])
    heads = ["what", "against", "times as fast", "memory, ours / theirs", "machine", "date"]
    harness.save("peers", None, harness.table(heads, rows, left=6), file.parent)
    middles, lows, highs = zip(*(map(float, re.findall(r"[\d.]+", line["speed_ratio"])) for line in lines), strict=True)
    errors = [[m - x for m, x in zip(middles, lows, strict=True)], [x - m for m, x in zip(middles, highs, strict=True)]]
    figure = Figure(figsize=(8, 0.5 * len(lines) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = [f"{line['what']}\n{line['peer']}" for line in lines]
    bars = axes.barh(names, middles, xerr=errors, color="#4c78a8", capsize=3)
    axes.bar_label(bars, [f"{middle:.2f}" for middle in middles], label_type="center", color="white")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("times as fast as the peer (median of the pairs, smallest and largest)")
    axes.invert_yaxis()
    figure.savefig(file.with_suffix(".png"), dpi=120)


def main() -> None:
    parser = harness.parser(__doc__, "data", "peers-python", "encoder", "miner", "threads", "results")
    parser.add_argument("--what", nargs="+", default=[*WHAT], choices=WHAT)
    parser.add_argument("--against", nargs="+", default=[FLAG, SENTENCE, COCKTAIL])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1, choices=[0, 1], help="steps before those that count")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--passages", type=int, default=13_728, help="of the corpus of mine and evaluate")
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of both sides
    facts = harness.facts(threads=args.threads)
    for what in args.what:
        peers = [FLAG] if what in ONLY_AGAINST_FLAGEMBEDDING else [*PEERS[re.split(r"\d|_", what)[0]]]
        with tempfile.TemporaryDirectory() as folder:
            job = prepare_job(what, args, Path(folder))
            for peer in (peer for peer in peers if peer in args.against):
                line = compare(what, peer, job, args, folder) | facts
                with open(args.results / "peers.jsonl", "a", encoding="utf-8") as out:
                    out.write(json.dumps(line) + "\n")
    summarize(args.results / "peers.jsonl")


if __name__ == "__main__":
    main()
