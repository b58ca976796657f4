"""An evaluation as text: tables for a terminal, a Markdown table, the section of a model card."""

from collections.abc import Mapping, Sequence

from bge_core.evaluation.costs import Cost
from bge_core.evaluation.evaluator import EvaluationResult
from bge_core.evaluation.significance import Comparison
from bge_core.reports.tables import text_table

SCORED_DIFFERENTLY = "scored as each model states, which differs"


def comparison_tables(metrics: Mapping[str, Mapping[str, float]], comparisons: Sequence[Comparison]) -> str:
    """One line a model with every metric, the best ones marked *, then how each differs from the first, and how surely.

    Args:
        metrics: {model: {metric: mean}}.
        comparisons: of the other models with the first.
    """
    columns = list(next(iter(metrics.values())))
    best = {column: max(of[column] for of in metrics.values()) for column in columns}
    rows = [
        [name, *(f"{of[column]:.4f}{'*' if of[column] == best[column] else ' '}" for column in columns)]
        for name, of in metrics.items()
    ]
    lines = [
        [
            f"{line.model} - {line.baseline}",
            line.metric,
            f"{line.difference:+.4f}",
            f"[{line.low:+.4f}, {line.high:+.4f}]",
            f"{line.p_adjusted:.3g}",
            *map(str, (line.wins, line.losses, line.ties)),
        ]
        for line in comparisons
    ]
    header = ["difference", "metric", "", "95 % interval", "p (Holm)", "better", "worse", "equal"]
    return text_table(["model", *columns], rows) + "\n\n" + text_table(header, lines)


def scored_by(result: EvaluationResult) -> str:
    """Which model was scored by what, where not all were scored alike."""
    return ", ".join(f"{name} by {similarity}" for name, similarity in result.similarities.items())


def cost_table(costs: Sequence[Cost]) -> str:
    """What smaller vectors cost."""
    rows = [cost.row() for cost in costs]
    forms = {"dimension": "d", "type": "", "bytes_per_passage": ",.1f", "queries_per_second": ",.0f"}
    return text_table(
        [name.replace("_", " ") for name in rows[0]],
        [[f"{value:{forms.get(name, '.4f')}}" for name, value in row.items()] for row in rows],
    )


def markdown_report(result: EvaluationResult) -> str:
    """Each model's metrics with their intervals, and the differences: report.md."""
    metrics = list(next(iter(result.metrics.values())))
    lines = ["| model | " + " | ".join(metrics) + " |", "| --- |" + " ---: |" * len(metrics)]
    for name, means in result.metrics.items():
        cells = [f"{value:.4f} {interval(result, name, metric)}" for metric, value in means.items()]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    if result.comparisons:
        lines.append("")
    for line in result.comparisons:
        lines.append(
            f"- {line.model} - {line.baseline}, {line.metric}: {line.difference:+.4f} "
            f"[{line.low:+.4f}, {line.high:+.4f}], p {line.p_adjusted:.3g}"
        )
    if result.similarities:
        lines += ["", f"{SCORED_DIFFERENTLY}: {scored_by(result)}."]
    return "\n".join(lines) + "\n"


def interval(result: EvaluationResult, name: str, metric: str) -> str:
    """The 95 % interval of a model's mean."""
    return "[{:.3f}, {:.3f}]".format(*result.intervals[name][metric])


def model_card_section(name: str, results: Sequence[EvaluationResult]) -> str:
    """What a model card says of a model: its scores and thresholds on each test set; beside them the first model's."""
    lines = ["## Evaluation", ""]
    for result in results:
        first = next(iter(result.rankings))
        lines += [
            f"{result.task.name}: {len(result.task.queries):,} questions, {len(result.task.corpus):,} passages.",
            "",
            "| metric | value | 95 % interval |",
            "| --- | ---: | ---: |",
        ]
        for metric, value in result.metrics[name].items():
            low, high = result.intervals[name][metric]
            lines.append(f"| {metric} | {value:.4f} | {low:.4f} to {high:.4f} |")
        if result.thresholds[name]:
            lines += [
                "",
                f"| threshold for | score | 95 % interval | positives kept | {first} |",
                "| --- | ---: | ---: | ---: | ---: |",
            ]
        before = {(of.target, of.value): of.threshold for of in result.thresholds[first]}
        for of in result.thresholds[name]:
            was = before.get((of.target, of.value))
            cells = ["not reached", "", ""]
            if of.threshold is not None:
                spread = "" if None in (of.low, of.high) else f"{of.low:.3f} to {of.high:.3f}"
                cells = [f"{of.threshold:.3f}", spread, f"{of.recall:.1%}"]
            target = f"{of.target.replace('_', ' ')} {of.value:.0%}"
            lines.append("| " + " | ".join([target, *cells, "" if was is None else f"{was:.3f}"]) + " |")
        lines.append("")
    return "\n".join(lines)
