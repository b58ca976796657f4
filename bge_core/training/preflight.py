"""What a run is, told before step 1, and what a step was, told while it runs."""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bge_core import UserError
from bge_core.encoder.model import Encoder
from bge_core.encoder.tokens import tokenize
from bge_core.files import atomic
from bge_core.runtime.config import TrainConfig
from bge_core.training.data import TrainingData


def run_facts(
    config: TrainConfig,
    data: TrainingData,
    encoder: Encoder,
    precision: str,
    accumulation: int,
    world_size: int,
    num_warmup: int,
) -> dict[str, Any]:
    """What the run really is, for the preflight, the manifest and the model card."""
    cross_device = config.negatives_cross_device and world_size > 1
    rows_together = config.per_device_train_batch_size * (world_size if cross_device else 1)
    candidates = rows_together * config.train_group_size if config.use_inbatch_neg else config.train_group_size
    return {
        "rows": len(data.rows),
        "steps": data.num_steps,
        "steps per epoch": data.plan.steps_per_epoch,
        "warm-up steps": num_warmup,
        "processes": world_size,
        "queries per update": data.plan.batch_size * accumulation,
        "candidates per query": candidates,
        "random guess ln(N)": round(math.log(candidates), 3),
        "cross-device negatives": cross_device,
        "precision": {"no": "float32"}.get(precision, precision),
        "pooling": encoder.settings.pooling,
        "normalize": encoder.settings.normalize,
        "query instruction": encoder.settings.query_prompt,
        "passage instruction": encoder.settings.passage_prompt,
    }


def preflight(config: TrainConfig, data: TrainingData, encoder: Encoder, facts: Mapping[str, Any]) -> list[str]:
    """The lines before step 1: the facts, the share of texts cut, and a warning for what cannot learn."""
    lines = [
        f"{name + ':':<24}{value!r}" if isinstance(value, str) else f"{name + ':':<24}{value}"
        for name, value in facts.items()
    ]
    sample = data.rows[: min(len(data.rows), 500)]
    few = sum(len(negatives) < config.train_group_size - 1 for negatives in sample["neg"])
    for kind, texts, prompt, limit, flag in (
        ("queries", sample["query"], encoder.settings.query_prompt, data.query_max_len, "query_max_len"),
        (
            "passages",
            [t for pos, neg in zip(sample["pos"], sample["neg"], strict=True) for t in (pos[0], *neg[:1])],
            encoder.settings.passage_prompt,
            data.passage_max_len,
            "passage_max_len",
        ),
    ):
        lengths = [len(ids) for ids in tokenize(data.tokenizer, [(prompt or "") + text for text in texts], limit + 1)]
        cut = sum(length > limit for length in lengths) / len(lengths)
        lines.append(f"{kind + ' cut:':<24}{cut:.1%} of a sample of {len(lengths)} are longer than --{flag} {limit}")
    warnings = []
    if facts["candidates per query"] == 1:
        warnings.append(
            "every query has its positive as only candidate, so the loss is 0: raise --train_group_size or the batch"
        )
    if few and config.train_group_size > 1:
        share = few / len(sample["neg"])
        warnings.append(
            f"{share:.0%} of a sample of rows have fewer than {config.train_group_size - 1} negatives; they train "
            "with those they have (mine.py finds more)"
        )
    if not 1e-7 <= config.learning_rate <= 3e-4:
        warnings.append(
            f"--learning_rate {config.learning_rate:g} is far from what fine-tunes an encoder (1e-6 to 1e-4)"
        )
    if config.normalize_embeddings and config.temperature > 0.5:
        warnings.append(
            f"--temperature {config.temperature:g} with cosines leaves almost no gradient; 0.01 to 0.1 is usual"
        )
    if not config.normalize_embeddings and config.temperature < 0.5:
        warnings.append(
            f"--temperature {config.temperature:g} divides inner products that are not normalized; use "
            "--temperature 1.0 (FlagEmbedding 1.2 set it silently)"
        )
    if config.negatives_cross_device and not facts["cross-device negatives"]:
        warnings.append("--negatives_cross_device has no effect with one process")
    for file in data.files:
        mined = (atomic.read_json(f"{file}.manifest.json") or {}).get("encoder") or {}
        for what in ("query_instruction", "passage_instruction"):
            ours = facts[what.replace("_", " ")]
            if what in mined and mined[what] != ours:
                warnings.append(f"{file} was mined with {what} {mined[what]!r}, this run trains with {ours!r}")
        if mined.get("pooling") not in (None, facts["pooling"]):
            warnings.append(
                f"{file} was mined with {mined['pooling']} pooling, this run trains with {facts['pooling']}"
            )
    return lines + [f"WARNING: {warning}" for warning in warnings]


def one_line(values: Mapping[str, Any]) -> str:
    """The few figures of a logged step that a person follows."""
    return (
        f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  {values['queries_per_second']:.1f} queries/s  "
        f"{values['tokens_per_second']:.0f} tokens/s  {values['memory_mb']:.0f} MB"
    )


def describe_batch(data: TrainingData, config: TrainConfig) -> str:
    """The first micro-batch of this process, decoded: what the model reads, what is cut, what is masked and why."""
    examples, rank_counts = next(data.examples(0))
    decode = functools.partial(data.tokenizer.decode, skip_special_tokens=False)
    num_rows = sum(queries for queries, _ in rank_counts)
    lines = [f"first micro-batch: {len(examples)} of {num_rows} queries are this process's"]

    def shown(kind: str, text: str, limit: int) -> str:
        (ids,) = tokenize(data.tokenizer, [text], limit)
        (whole,) = tokenize(data.tokenizer, [text], 1_000_000)
        cut = f", CUT from {len(whole)}" if len(whole) > len(ids) else ""
        return f"{kind:<9}[{len(ids)} tokens{cut}] {decode(ids)}"

    for example in examples:
        lines += ["", f"row {example.row}", "  " + shown("query", example.query, data.query_max_len)]
        for i, passage in enumerate(example.passages):
            lines.append("  " + shown("negative" if i else "positive", passage, data.passage_max_len))
        for other in examples:
            if other is example or not config.use_inbatch_neg or not config.exclude_positives:
                continue
            for passage, passage_id in zip(other.passages, other.passage_ids, strict=True):
                if passage_id in example.known_ids:
                    why = (
                        "is this query" if passage_id == example.known_ids[-1] else "is a known positive of this query"
                    )
                    lines.append(f"  masked   passage of row {other.row} {why}: {passage}")
    return "\n".join(lines)


def not_finite(output_dir: Path, step: int, rank: int, data: TrainingData, micro_batches: Sequence[Any]) -> UserError:
    """Write the rows of a batch whose loss or gradient is NaN or infinite; say what to try."""
    file = output_dir / f"not_finite-step{step}-rank{rank}.jsonl"
    atomic.write_jsonl(file, ({"row": row} | data.rows[row] for batch in micro_batches for row in batch.rows))
    return UserError(
        f"step {step}: the loss or its gradient is NaN or infinite; nothing was updated. "
        f"The rows of this batch are in {file}.\n"
        "Try a smaller --learning_rate, --warmup_ratio 0.1, --bf16 instead of --fp16, and look at those rows; "
        "--resume_from_checkpoint latest goes on from the last checkpoint."
    )
