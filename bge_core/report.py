"""What people look at: tables, plots, the model card, a batch decoded."""

import functools
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bge_core import UserError, records
from bge_core.batch import tokenize
from bge_core.config import TrainConfig
from bge_core.model import Encoder
from bge_core.records import atomic_path
from bge_core.runlog import memory_mb, read_metrics

if TYPE_CHECKING:  # `datasets` takes half a second to import, which merging and evaluating need not wait for
    from bge_core.data import TrainingData


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    """A table for a terminal: first column left, others right unless `left`; a Chinese character is two wide."""
    cells = [list(header), *map(list, rows)]
    widths = [max(_width(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        placed = [
            cell + gap if left or i == 0 else gap + cell for i, (cell, gap) in enumerate(zip(row, padded, strict=True))
        ]
        lines.append("  ".join(placed).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def comparison_tables(metrics: Mapping[str, Mapping[str, float]], comparisons: Sequence[Mapping[str, Any]]) -> str:
    """One line a model with every metric, the best ones marked *, then how each differs from the first, and how surely.

    Args:
        metrics: {model: {metric: mean}}.
        comparisons: of `significance.compare_to_baseline`.
    """
    names, columns = list(metrics), list(next(iter(metrics.values())))
    best = {column: max(of[column] for of in metrics.values()) for column in columns}
    rows = [
        [name, *(f"{of[column]:.4f}{'*' if of[column] == best[column] else ' '}" for column in columns)]
        for name, of in metrics.items()
    ]
    lines = [
        [f"{line['model']} - {names[0]}", line["metric"], f"{line['difference']:+.4f}",
         f"[{line['low']:+.4f}, {line['high']:+.4f}]", f"{line['p_adjusted']:.3g}",
         str(line["wins"]), str(line["losses"]), str(line["ties"])]
        for line in comparisons
    ]  # fmt: skip
    header = ["difference", "metric", "", "95 % interval", "p (Holm)", "better", "worse", "equal"]
    return text_table(["model", *columns], rows) + "\n\n" + text_table(header, lines)


def plot_curves(metrics_file: Path, picture: Path) -> None:
    """Loss, accuracy, gradient norm and learning rate over the steps, and the evaluations if any, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(metrics_file)
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "loss" not in line]
    panels = [
        ("loss", "loss"),
        ("accuracy", "in-batch accuracy"),
        ("grad_norm", "gradient norm"),
        ("lr", "learning rate"),
    ]
    panels = [(key, title) for key, title in panels if any(key in line for line in training)]
    evaluated = [key for key in ("MRR@10", "Recall@10") if any(key in line for line in evaluations)]
    num_panels = len(panels) + bool(evaluated)
    if not training:
        return
    figure = Figure(figsize=(4 * num_panels, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, num_panels, squeeze=False)[0]
    for axis, (key, title) in zip(axes, panels, strict=False):
        points = [(line["step"], line[key]) for line in training if line.get(key) is not None]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
        axis.set_title(title)
        if key == "loss" and "log_candidates" in training[0]:
            guess = training[0]["log_candidates"]
            axis.axhline(guess, color="gray", linestyle=":", label=f"random guess {guess:.2f}")
            axis.legend()
    for key in evaluated:
        points = [(line["step"], line[key]) for line in evaluations if key in line]
        axes[-1].plot(*zip(*points, strict=True), marker="o", label=key)
        axes[-1].set_title("evaluation")
        axes[-1].legend()
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def write_model_card(
    folder: Path, *, title: str, facts: Mapping[str, Any], scores: Mapping[str, float] | None, prompt: str
) -> None:
    """README.md of a model folder: what it is, how it came to be, how it scored, how to load it.

    Args:
        folder: the model's.
        title: of the card.
        facts: name -> value, for the table.
        scores: metric -> value, or None.
        prompt: the query instruction that the model expects.
    """
    base = str(facts.get("base model", ""))
    front = [
        "---",
        "library_name: sentence-transformers",
        "pipeline_tag: sentence-similarity",
        "tags: [bge, sentence-transformers, feature-extraction]",
    ]
    if base and base.count("/") == 1 and not base.startswith((".", "/")):
        front.append(f"base_model: {base}")
    lines = [*front, "---", "", f"# {title}", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
    if scores:
        lines += [
            "",
            "| metric | value |",
            "| --- | --- |",
            *(f"| {name} | {value:.4f} |" for name, value in scores.items()),
        ]
    lines += [
        "", "## Use", "", "```python", "from sentence_transformers import SentenceTransformer", "",
        f'model = SentenceTransformer("{folder.name}")',
        'queries = model.encode(["你的问题"], prompt_name="query")',
        'passages = model.encode(["候选文本"], prompt_name="passage")',
        "print(queries @ passages.T)", "```", "",
        f"Query instruction: {prompt!r}." if prompt else "Queries need no instruction.",
    ]  # fmt: skip
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_model_card(path: Path) -> str:
    """Its text, "" without one; UserError where it is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError:
        raise UserError(f"--update_model_card: {path} is not UTF-8; save it as UTF-8") from None


def add_to_model_card(folder: Path, name: str, results: Sequence[Any]) -> None:
    """Put scores and thresholds into a model folder's README.md, in place of those of an earlier evaluation.

    Args:
        folder: the model's.
        name: of the model in the results.
        results: `evaluation.EvaluationResult` of each test set.
    """
    begin, end = "<!-- evaluation -->", "<!-- /evaluation -->"
    lines = [begin, "", "## Evaluation", ""]
    for result in results:
        first = next(iter(result.rankings))
        lines += [
            f"{result.task.name}: {len(result.task.queries):,} questions, {len(result.task.corpus):,} passages.",
            "",
        ]
        lines += ["| metric | value | 95 % interval |", "| --- | ---: | ---: |"]
        for metric, value in result.metrics[name].items():
            low, high = result.intervals[name][metric]
            lines.append(f"| {metric} | {value:.4f} | {low:.4f} to {high:.4f} |")
        before = {(line["target"], line["value"]): line["threshold"] for line in result.thresholds[first]}
        if result.thresholds[name]:
            lines += ["", f"| threshold for | score | 95 % interval | positives kept | {first} |",
                      "| --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
        for line in result.thresholds[name]:
            target = f"{line['target'].replace('_', ' ')} {line['value']:.0%}"
            was = before.get((line["target"], line["value"]))
            cells = ["not reached", "", ""]
            if line["threshold"] is not None:
                ends = line["low"], line["high"]
                spread = "" if None in ends else "{:.3f} to {:.3f}".format(*ends)
                cells = [f"{line['threshold']:.3f}", spread, f"{line['recall']:.1%}"]
            lines.append("| " + " | ".join([target, *cells, "" if was is None else f"{was:.3f}"]) + " |")
        lines.append("")
    path = folder / "README.md"
    text = read_model_card(path) or f"# {name}\n"
    before_it, _, rest = text.partition(begin)
    rest = (rest.partition(end)[2] if end in rest else rest).lstrip("\n")
    with atomic_path(path) as temporary:
        temporary.write_text(before_it.rstrip("\n") + "\n\n" + "\n".join([*lines, end, ""]) + rest, encoding="utf-8")


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"`{name}={item}`" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


def run_facts(
    config: TrainConfig,
    data: "TrainingData",
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


def preflight(config: TrainConfig, data: "TrainingData", encoder: Encoder, facts: Mapping[str, Any]) -> list[str]:
    """The lines before step 1: the facts, the share of texts cut, and a warning for what cannot learn."""
    lines = [
        f"{name + ':':<24}{value!r}" if isinstance(value, str) else f"{name + ':':<24}{value}"
        for name, value in facts.items()
    ]
    sample = data.rows[: min(len(data.rows), 500)]
    few = sum(len(negatives) < config.train_group_size - 1 for negatives in sample["neg"])
    for kind, texts, prompt, limit, flag in (
        ("queries", sample["query"], encoder.settings.query_prompt, data.query_max_len, "query_max_len"),
        ("passages", [t for pos, neg in zip(sample["pos"], sample["neg"], strict=True) for t in (pos[0], *neg[:1])],
         encoder.settings.passage_prompt, data.passage_max_len, "passage_max_len"),
    ):  # fmt: skip
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
        mined = (records.read_json(f"{file}.manifest.json") or {}).get("encoder") or {}
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


def describe_batch(data: "TrainingData", config: TrainConfig) -> str:
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


def summarize(window: dict[str, float], seconds: float) -> dict[str, float]:
    """Means over the steps since the last log, and what the run did per second."""
    steps = window["steps"]
    rates = {f"{name}_per_second": round(window[name] / seconds, 2) for name in ("queries", "tokens")}
    means = {name: value / steps for name, value in window.items() if name not in ("queries", "tokens", "steps")}
    return means | rates | {"memory_mb": round(memory_mb(), 1)}


def not_finite(output_dir: Path, step: int, rank: int, data: "TrainingData", micro_batches: Sequence[Any]) -> UserError:
    """Write the rows of a batch whose loss or gradient is NaN or infinite; say what to try."""
    file = output_dir / f"not_finite-step{step}-rank{rank}.jsonl"
    records.write_jsonl(file, ({"row": row} | data.rows[row] for batch in micro_batches for row in batch.rows))
    return UserError(
        f"step {step}: the loss or its gradient is NaN or infinite; nothing was updated. "
        f"The rows of this batch are in {file}.\n"
        "Try a smaller --learning_rate, --warmup_ratio 0.1, --bf16 instead of --fp16, and look at those rows; "
        "--resume_from_checkpoint latest goes on from the last checkpoint."
    )
