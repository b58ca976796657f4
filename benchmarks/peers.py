"""Side by side with FlagEmbedding 1.4.2 and sentence-transformers 6.2: training speed, activation memory, encoding.

    python benchmarks/peers.py --peers-python outputs/peers/bin/python --data path/to/cmrc [--what train2] [--pairs 5]

Every measurement is a process of its own; a peer's and ours take turns, on the same rows, weights, threads and
precision (float32), and the median ratio of the pairs is given with the smallest and the largest.

    train2, train8  batch 32, group size 2 and 8, query 64 and passage 128 tokens, the checkpoint's dropout, AdamW, mean
                    pooling as the encoder was made with; --steps updates after one that warms up. Rows: CMRC's training
                    questions, each with random sentences of the corpus as negatives.
    encode          --texts sentences of the CMRC corpus, at most 128 tokens

The peers as their documentation has it, with what was fastest for them here: FlagEmbedding's runner; the trainer of
sentence-transformers with MultipleNegativesRankingLoss; both pad to the longest text of a batch (packing needs
flash-attn, which needs a GPU). Both encode sorted by length at batch size 32, their fastest here.

Activation memory is the peak of the process less what it held before the first step and less gradients and AdamW's two
moments (12 bytes a parameter), the same for all three. Writes benchmarks/results/peers.jsonl (a line for each ratio).
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BATCH_SIZE, QUERY_LENGTH, PASSAGE_LENGTH, LEARNING_RATE = 32, 64, 128, 2e-5
NAMES = {"ours": "bge-core", "flagembedding": "FlagEmbedding", "sentence_transformers": "sentence-transformers"}
Result = dict[str, Any]


class Clock:
    """Ends of steps, and what the process held before the first."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.held_mb = 0.0

    def begin(self) -> None:
        """Model and data are there."""
        self.held_mb = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def step(self) -> None:
        """A step has ended."""
        self.ends.append(time.perf_counter())

    def result(self, num_parameters: int) -> Result:
        """Queries per second after the first step, and the memory of activations."""
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
    from bge_core import watchdog

    clock, encoders = Clock(), []
    step_begins, step_ends, build = watchdog.step_begins, watchdog.step_ends, train.build_encoder

    def build_encoder(*args: Any) -> Any:
        encoders.append(build(*args))
        return encoders[-1]

    def begins() -> None:
        if not clock.ends:
            clock.begin()
        step_begins()

    def ends() -> None:
        clock.step()
        step_ends()

    train.build_encoder, watchdog.step_begins, watchdog.step_ends = build_encoder, begins, ends  # type: ignore[assignment]
    code = train.main([
        "--model_name_or_path", job["model"], "--train_data", job["rows"], "--output_dir", f"{folder}/run",
        "--max_steps", str(job["steps"] + 1), "--per_device_train_batch_size", str(BATCH_SIZE), "--train_group_size",
        str(job["group"]), "--query_max_len", str(QUERY_LENGTH), "--passage_max_len", str(PASSAGE_LENGTH),
        "--learning_rate", str(LEARNING_RATE), "--save_steps", "0", "--sentence_pooling_method", "mean",
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
            output_dir=f"{folder}/run", max_steps=job["steps"] + 1, per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE, temperature=0.02, sentence_pooling_method="mean", normalize_embeddings=True,
            save_strategy="no", report_to="none", use_cpu=True,
        ),
    )  # fmt: skip
    clock = Clock()
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
    from sentence_transformers.losses import MultipleNegativesRankingLoss  # type: ignore[import-not-found]

    with open(job["rows"], encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    columns = {"anchor": [row["query"] for row in rows], "positive": [row["pos"][0] for row in rows]}
    for i in range(job["group"] - 1):
        columns[f"negative_{i}"] = [row["neg"][i] for row in rows]
    model = SentenceTransformer(job["model"], device="cpu")
    model.max_seq_length = PASSAGE_LENGTH
    clock = Clock()
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=f"{folder}/run", max_steps=job["steps"] + 1, per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE, save_strategy="no", report_to="none", use_cpu=True,
        ),
        train_dataset=Dataset.from_dict(columns),
        loss=MultipleNegativesRankingLoss(model, scale=50.0),
        callbacks=[callback_of(clock)],
    )  # fmt: skip
    trainer.train()
    return clock.result(sum(p.numel() for p in model.parameters()))


def encode(job: Result, folder: str) -> Result:
    """Sentences per second of the side's own encode call; a first call of 64 texts warms up."""
    texts = json.loads(Path(job["rows"]).read_text(encoding="utf-8"))
    if job["side"] == "ours":
        from bge_core.model import load_encoder

        encoder = load_encoder(job["model"], pooling="mean")

        def run(some: list[str]) -> Any:
            return encoder.encode(some, max_length=PASSAGE_LENGTH)
    elif job["side"] == "flagembedding":
        from FlagEmbedding import FlagModel

        model = FlagModel(job["model"], use_fp16=False, devices="cpu", pooling_method="mean")

        def run(some: list[str]) -> Any:
            return model.encode_corpus(some, batch_size=32, max_length=PASSAGE_LENGTH)
    else:
        from sentence_transformers import SentenceTransformer

        their = SentenceTransformer(job["model"], device="cpu")
        their.max_seq_length = PASSAGE_LENGTH

        def run(some: list[str]) -> Any:
            return their.encode(some, batch_size=32, show_progress_bar=False, normalize_embeddings=True)

    run(texts[:64])
    started = time.perf_counter()
    vectors = run(texts)
    seconds = time.perf_counter() - started
    return {"texts_per_second": len(texts) / seconds, "check": [round(float(x), 4) for x in vectors[0][:4]]}


TRAIN = {"ours": train_ours, "flagembedding": train_flagembedding, "sentence_transformers": train_sentence_transformers}


def measure(python: str, job: Result, threads: int) -> Result:
    """Run a job in a fresh process of the environment."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true",
        "PYTHONPATH": str(ROOT) if job["side"] == "ours" else "", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    words = [python, str(Path(__file__).resolve()), "--child", json.dumps(job)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job}\n{done.stderr[-4000:]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    print(job["side"], job["kind"], job.get("group", ""), result, file=sys.stderr, flush=True)
    return result


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


def read_texts(source: Path) -> list[str]:
    """The sentences of the corpus."""
    with open(source / "corpus.jsonl", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def main() -> None:
    """All pairs, or with --child one job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", help="python of the environment of benchmarks/requirements.txt")
    parser.add_argument("--data", type=Path, help="CMRC 2018: train.jsonl, corpus.jsonl")
    parser.add_argument("--encoder", default="outputs/encoder")
    parser.add_argument("--what", nargs="+", default=["train2", "train8", "encode"])
    parser.add_argument("--against", nargs="+", default=["flagembedding", "sentence_transformers"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        job = json.loads(args.child)
        with tempfile.TemporaryDirectory() as folder:
            result = encode(job, folder) if job["kind"] == "encode" else TRAIN[job["side"]](job, folder)
        print(json.dumps(result))
        return
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "threads": args.threads, "date": str(date.today()),
        "command": " ".join(["python", "benchmarks/peers.py", *sys.argv[1:]]),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, open(ROOT / "benchmarks/results/peers.jsonl", "a") as out:
        write_rows(args.data, Path(f"{folder}/train.jsonl"))
        texts = random.Random(0).sample(read_texts(args.data), args.texts)
        Path(f"{folder}/texts.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
        for what in args.what:
            job: Result = {"kind": what, "model": str(Path(args.encoder).resolve()), "rows": f"{folder}/texts.json"}
            if what != "encode":
                job |= {"rows": f"{folder}/train.jsonl", "group": int(what[5:]), "steps": args.steps}
            for peer in args.against:
                pairs = []
                for number in range(args.pairs):
                    sides = ["ours", peer] if number % 2 == 0 else [peer, "ours"]
                    pythons = {"ours": sys.executable, peer: args.peers_python}
                    pairs.append({side: measure(pythons[side], job | {"side": side}, args.threads) for side in sides})
                speed = "texts_per_second" if what == "encode" else "queries_per_second"
                ratios = [pair["ours"][speed] / pair[peer][speed] for pair in pairs]
                line = {"what": what, "peer": NAMES[peer], "speed_ratio": spread(ratios), "pairs": pairs} | facts
                if what != "encode":
                    memory = [pair["ours"]["activation_mb"] / pair[peer]["activation_mb"] for pair in pairs]
                    line["activation_memory_ratio"] = spread(memory)
                out.write(json.dumps(line) + "\n")
                out.flush()
                print({key: value for key, value in line.items() if key != "pairs"})


if __name__ == "__main__":
    main()
