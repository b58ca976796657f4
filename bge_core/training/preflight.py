"""What a run is, told before step 1, and what a step was, told while it runs."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bge_core import UserError
from bge_core.encoder.settings import EncoderSettings
from bge_core.encoder.tokens import tokenize
from bge_core.files import atomic
from bge_core.training.batch import Batch
from bge_core.training.data import Example, TrainingData, instructed, instructed_passage

SAMPLED_ROWS = 500
MAX_PROMPTS = 5  # of the rows' own that are listed
NEARLY_UNIFORM = 0.95  # of 8 passages: as if the teacher held 7.2 of them for equally good


def run_facts(
    data: TrainingData, settings: EncoderSettings, precision: str, num_warmup: int, shard: bool
) -> dict[str, Any]:
    """What the run really is, for the preflight, the manifest and the model card; `settings` are the saved model's."""
    config, world_size = data.config, data.world_size
    cross_device = config.negatives_cross_device and world_size > 1
    rows_together = config.per_device_train_batch_size * (world_size if cross_device else 1)
    in_batch = config.use_inbatch_neg and not data.own_only.all()
    candidates = rows_together * config.train_group_size if in_batch else config.train_group_size
    prompts = [prompt for prompt in data.prompts if prompt]
    more = [f"and {len(prompts) - MAX_PROMPTS} more"] if len(prompts) > MAX_PROMPTS else []
    return {
        "rows": len(data.rows),
        "steps": data.num_steps,
        "steps per epoch": data.plan.steps_per_epoch,
        "warm-up steps": num_warmup,
        "processes": world_size,
        "queries per update": data.plan.batch_size * data.plan.accumulation,
        "candidates per query": candidates,
        "random guess ln(N)": round(math.log(candidates), 3),
        "cross-device negatives": cross_device,
        "precision": {"no": "float32"}.get(precision, precision),
        "pooling": settings.pooling,
        "normalize": settings.normalize,
        "query instruction": settings.query_prompt,
        "passage instruction": settings.passage_prompt,
        **({"prompts of rows": [*map(repr, prompts[:MAX_PROMPTS]), *more]} if prompts else {}),
        "sharding": "FSDP2" if shard else "none",
    }


def describe_run(data: TrainingData, facts: Mapping[str, Any]) -> list[str]:
    """The lines before step 1: the facts, the share of texts cut, and a warning for what cannot learn."""
    shown = {name: repr(value) if isinstance(value, str) else value for name, value in facts.items()}
    lines = [f"{name + ':':<24}{value}" for name, value in (shown | shares_cut(data)).items()]
    return lines + [
        f"WARNING: {warning}" for warning in [*warnings_of_settings(data, facts), *warnings_of_mining(data, facts)]
    ]


def shares_cut(data: TrainingData) -> dict[str, str]:
    """How many texts of a sample are longer than the limit: of queries, and of a positive and a negative of each."""
    sample, config = data.rows[: min(len(data.rows), SAMPLED_ROWS)], data.config
    passages = [text for pos, neg in zip(sample["pos"], sample["neg"], strict=True) for text in (pos[0], *neg[:1])]
    queries = [instructed(*of_row, config) for of_row in zip(sample["query"], sample["prompt"], strict=True)]
    found = {}
    for kind, texts, limit in (
        ("query", queries, data.query_max_len),
        ("passage", [instructed_passage(text, config) for text in passages], data.passage_max_len),
    ):
        token_lists = tokenize(data.tokenizer, texts, limit + 1)
        cut = sum(len(ids) > limit for ids in token_lists) / len(token_lists)
        name = {"query": "queries", "passage": "passages"}[kind]
        found[f"{name} cut"] = f"{cut:.1%} of a sample of {len(texts)} are longer than --{kind}_max_len {limit}"
    return found


def rows_without_text(data: TrainingData, kind: str) -> tuple[int, int]:
    """(rows whose prompt and special tokens fill the length of a query, or a passage; how many tokens those are)."""
    config, limit = data.config, data.query_max_len if kind == "query" else data.passage_max_len
    lost = most = 0
    for prompt, num_rows in data.prompts.items():
        bare = instructed("", prompt, config) if kind == "query" else instructed_passage("", config)
        num_tokens = len(tokenize(data.tokenizer, [bare], 1_000_000)[0])
        if num_tokens >= limit:
            lost, most = lost + num_rows, max(most, num_tokens)
    return lost, most


def refuse_empty_texts(data: TrainingData) -> None:
    """UserError where nothing is left of any query, or of any passage, once all are cut to their length."""
    for kind in ("query", "passage"):
        lost, num_tokens = rows_without_text(data, kind)
        if lost == len(data.rows):
            raise UserError(
                f"--{kind}_max_len {getattr(data, f'{kind}_max_len')}: instruction and special tokens alone take "
                f"{num_tokens}, so nothing is left of any {kind}; use more, or a shorter instruction"
            )


def warnings_of_settings(data: TrainingData, facts: Mapping[str, Any]) -> Iterator[str]:
    """Settings that cannot learn, or hardly."""
    config, negatives = data.config, data.rows[: min(len(data.rows), SAMPLED_ROWS)]["neg"]
    wanted = config.train_group_size - 1
    share = sum(len(of_row) < wanted for of_row in negatives) / len(negatives)
    if facts["candidates per query"] == 1:
        yield "every query has its positive as only candidate, so the loss is 0: raise --train_group_size or the batch"
    if share:
        yield (
            f"{share:.0%} of a sample of rows have fewer than {wanted} negatives; they train with those they have "
            "(mine.py finds more)"
        )
    lost, num_tokens = rows_without_text(data, "query")
    if lost:
        yield (
            f"{lost} rows have a prompt that fills --query_max_len {data.query_max_len}: with the special tokens it "
            f"takes {num_tokens}, so nothing is left of their queries"
        )
    if facts["warm-up steps"] >= facts["steps"]:
        yield (
            f"the warm-up of {facts['warm-up steps']} steps is no shorter than the run of {facts['steps']}, which "
            "never gets to --learning_rate"
        )
    if not 1e-7 <= config.learning_rate <= 3e-4:
        yield f"--learning_rate {config.learning_rate:g} is far from what fine-tunes an encoder (1e-6 to 1e-4)"
    if config.normalize_embeddings and config.temperature > 0.5:
        yield f"--temperature {config.temperature:g} with cosines leaves almost no gradient; 0.01 to 0.1 is usual"
    if not config.normalize_embeddings and config.temperature < 0.5:
        yield (
            f"--temperature {config.temperature:g} divides inner products that are not normalized; use "
            "--temperature 1.0 (FlagEmbedding 1.2 set it silently)"
        )
    if config.negatives_cross_device and not facts["cross-device negatives"]:
        yield "--negatives_cross_device has no effect with one process"
    if config.same_dataset_within_batch and config.dataloader_drop_last:
        for file, draws in zip(data.files, data.plan.draws, strict=True):
            if draws < data.plan.batch_size:
                yield (
                    f"{file} fills no batch ({draws} rows an epoch, {data.plan.batch_size} a batch), so none is used: "
                    "drop --dataloader_drop_last or --same_dataset_within_batch, or raise its weight"
                )
    if config.knowledge_distillation and (likeness := teachers_uniformity(data)) > NEARLY_UNIFORM:
        yield (
            f"the teacher scores are nearly uniform ({likeness:.1%} of the entropy of equal ones): a student learns "
            "to be uniform, too; cosines want to be divided by 0.02, as mine.py does (--teacher_temperature)"
        )


def teachers_uniformity(data: TrainingData) -> float:
    """How near the teachers of a sample of rows are to uniform: mean of H(softmax(scores)) / ln(passages), 1: equal.

    Of each row's first positive and its first negatives, as many as a group has; rows of one passage do not count.
    """
    sample, num_negatives = data.rows[: min(len(data.rows), SAMPLED_ROWS)], data.config.train_group_size - 1
    pairs = zip(sample["pos_scores"], sample["neg_scores"], strict=True)
    groups = [torch.tensor([pos[0], *(neg or [])[:num_negatives]]) for pos, neg in pairs]
    shares = [group.softmax(dim=0) for group in groups if len(group) > 1]
    found = [float(torch.special.entr(share_G).sum()) / math.log(len(share_G)) for share_G in shares]
    return sum(found) / max(1, len(found))


def warnings_of_mining(data: TrainingData, facts: Mapping[str, Any]) -> Iterator[str]:
    """Negatives that were mined with other instructions or another pooling than this run trains with."""
    for file in data.files:
        mined = (atomic.read_json(f"{file}.manifest.json") or {}).get("encoder") or {}
        for what in ("query_instruction", "passage_instruction"):
            ours = facts[what.replace("_", " ")]
            if what in mined and mined[what] != ours:
                yield f"{file} was mined with {what} {mined[what]!r}, this run trains with {ours!r}"
        if mined.get("pooling") not in (None, facts["pooling"]):
            yield f"{file} was mined with {mined['pooling']} pooling, this run trains with {facts['pooling']}"


def one_line(values: Mapping[str, Any]) -> str:
    """The few figures of a logged step that a person follows."""
    return (
        f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  {values['queries_per_second']:.1f} queries/s  "
        f"{values['tokens_per_second']:.0f} tokens/s  {values['memory_mb']:.0f} MB"
    )


def describe_batch(data: TrainingData) -> str:
    """The first micro-batch of this process, decoded: what the model reads, what is cut, what is masked and why."""
    examples, rank_counts = next(data.examples(0))
    decode = functools.partial(data.tokenizer.decode, skip_special_tokens=False)
    num_rows = sum(queries for queries, _ in rank_counts)
    lines = [f"first micro-batch: {len(examples)} of {num_rows} queries are this process's"]

    def shown(kind: str, text: str, limit: int) -> str:
        (ids,) = tokenize(data.tokenizer, [text], limit)
        (whole,) = tokenize(data.tokenizer, [text], 1_000_000)
        cut = f", CUT from {len(whole)}" if len(whole) > len(ids) else ""
        return f"  {kind:<9}[{len(ids)} tokens{cut}] {decode(ids)}"

    for example in examples:
        lines += ["", f"row {example.row}", shown("query", example.query, data.query_max_len)]
        for i, passage in enumerate(example.passages):
            lines.append(shown("negative" if i else "positive", passage, data.passage_max_len))
        if example.own_only:
            lines.append("  its own negatives alone (no_in_batch_neg)")
        elif data.config.use_inbatch_neg and data.config.exclude_positives:
            lines += _masked(example, [other for other in examples if other is not example])
    return "\n".join(lines)


def _masked(example: Example, others: Sequence[Example]) -> Iterator[str]:
    """Passages of other rows that are not a negative of this one."""
    for other in others:
        for passage, passage_id in zip(other.passages, other.passage_ids, strict=True):
            if passage_id in example.known_ids:
                is_query = passage_id == example.known_ids[-1]
                why = "is this query" if is_query else "is a known positive of this query"
                yield f"  masked   passage of row {other.row} {why}: {passage}"


def not_finite(output_dir: Path, step: int, rank: int, data: TrainingData, micro_batches: Sequence[Batch]) -> UserError:
    """Write the rows of a batch whose loss or gradient is NaN or infinite; say what to try."""
    file = output_dir / f"not_finite-step{step}-rank{rank}.jsonl"
    atomic.write_jsonl(file, ({"row": row} | data.rows[row] for batch in micro_batches for row in batch.rows))
    return UserError(
        f"step {step}: the loss or its gradient is NaN or infinite; nothing was updated. "
        f"The rows of this batch are in {file}.\n"
        "Try a smaller --learning_rate, --warmup_ratio 0.1, --bf16 instead of --fp16, and look at those rows; "
        "--resume_from_checkpoint latest goes on from the last checkpoint."
    )
