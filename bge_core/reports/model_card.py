"""README.md of a model folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bge_core import UserError
from bge_core.files.atomic import atomic_path


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
        "",
        "## Use",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("{folder.name}")',
        'queries = model.encode(["你的问题"], prompt_name="query")',
        'passages = model.encode(["候选文本"], prompt_name="passage")',
        "print(queries @ passages.T)",
        "```",
        "",
        f"Query instruction: {prompt!r}." if prompt else "Queries need no instruction.",
    ]
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
            lines += [
                "",
                f"| threshold for | score | 95 % interval | positives kept | {first} |",
                "| --- | ---: | ---: | ---: | ---: |",
            ]
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
