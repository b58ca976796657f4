"""What an evaluation found, as a page, pictures and a Markdown table: is it better, for which questions, how sure."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bge_core.evaluation.evaluator import EvaluationResult, is_positive
from bge_core.files.atomic import atomic_path
from bge_core.reports.page import Page
from bge_core.reports.plots import Draw, draw_histograms, draw_recall, draw_training
from bge_core.runtime.log import read_metrics

logger = logging.getLogger(__name__)
HEADLINE = "MRR@10"
MOST, TOP = 10, 5  # questions that changed most, and what is shown of each ranking
MAX_LOOKUP = 50_000  # questions that can be searched for
MAX_LETTERS = 2_000_000  # of all of them: 6 MB of Chinese
LANGUAGES = ("en", "zh")  # in the order of report.yaml


def write_evaluation_report(
    folder: Path,
    result: EvaluationResult,
    *,
    lang: str = "en",
    costs: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    settings: Mapping[str, Any] | None = None,
    models: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write report.html and report.md into a folder, each whole or not at all.

    Args:
        folder: where to.
        result: of one test set; the first model is what the others are compared with.
        lang: "en" or "zh", of the page's own words.
        costs: for some models what `measure_costs` gave.
        settings: of the run, folded away at the end.
        models: for each model what is known of it ("model": its folder, of which training curves are drawn).
    """
    words = _words(lang)
    task, names = result.task, list(result.rankings)
    metrics = list(result.metrics[names[0]])
    headline = HEADLINE if HEADLINE in metrics else metrics[0]
    lead = words["lead" if len(names) > 1 else "alone"].format(
        len(task.queries), len(task.corpus), names[0], ", ".join(names[1:])
    )
    page = Page(words["title"].format(task.name), lead, lang)
    page.tiles(
        [(name, result.metrics[name][headline], f"{headline}, {_interval(result, name, headline)}") for name in names]
    )
    page.section(words["mind"]).warnings(_warnings(result, headline, words))

    page.section(words["results"], words["interval"])
    header = [words["model"], *metrics]
    means = []
    for name in names:
        means.append([name, *(result.metrics[name][metric] for metric in metrics)])
        means.append(["", *(_interval(result, name, metric) for metric in metrics)])
    page.table(header, means, best=dict.fromkeys(metrics, "max") if len(names) > 1 else None)
    if result.comparisons:
        page.section(words["differences"].format(names[0]), words["how"].format(result.resamples, result.seed))
        page.table(
            [words[key] for key in ("model", "metric", "difference")]
            + ["95 %"]
            + [words[key] for key in ("p", "adjusted", "wins", "losses", "ties")],
            _difference_rows(result),
        )

    plots = _plots(result, models or {}, words)
    page.section(words["curves"]).plot(*plots["recall"])
    page.section(words["scores"])
    for name in names:
        page.plot(*plots[f"scores-{name}"])
    if any(result.thresholds.values()):
        page.section(words["thresholds"], words["threshold_text"])
        page.table(
            [words[key] for key in ("model", "target", "threshold")]
            + ["95 %"]
            + [words[key] for key in ("reached", "found", "moved")],
            _threshold_rows(result, words),
        )
    parts = _parts(result, headline, words)
    if parts:
        page.section(words["parts"], headline)
        page.table(["", "", words["questions"], *names], parts)
    if costs:
        keys = list(next(iter(costs.values()))[0])
        labels = {"bytes_per_passage": "bytes", "queries_per_second": "qps"}
        page.section(words["costs"], words["cost_text"])
        page.table(
            [words["model"], *(words.get(labels.get(key, key), key) for key in keys)],
            [[name, *(line[key] for key in keys)] for name, lines in costs.items() for line in lines],
        )
    if len(names) > 1:
        for key, cards in zip(("better", "worse"), _changed(result, headline, words), strict=True):
            page.section(words[key]).cards(cards, search=False)
    ranks = {name: ranking.first_positive(task) for name, ranking in result.rankings.items()}
    page.section(words["lookup"], words["lookup_text"].format(min(MAX_LOOKUP, len(task.queries)), len(task.queries)))
    asked = task.queries[:MAX_LOOKUP]
    longest = max(20, MAX_LETTERS // len(asked))
    page.lookup(
        ["", *names],
        [[query[:longest], *(int(ranks[name][i]) or "–" for name in names)] for i, query in enumerate(asked)],
    )
    for name in names:
        if f"training-{name}" in plots:
            page.section(words["training"].format(name)).plot(*plots[f"training-{name}"])
    page.section(words["details"])
    for name, facts in (models or {}).items():
        page.details(name, facts)
    if settings:
        page.details(words["settings"], settings)
    page.write(folder / "report.html")

    markdown = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * len(metrics)]
    for name in names:
        cells = [f"{result.metrics[name][metric]:.4f} {_interval(result, name, metric)}" for metric in metrics]
        markdown.append("| " + " | ".join([name, *cells]) + " |")
    for line in result.comparisons:
        markdown += [""] * (line is result.comparisons[0])
        markdown.append(
            f"- {line['model']} - {line['baseline']}, {line['metric']}: {line['difference']:+.4f} "
            f"[{line['low']:+.4f}, {line['high']:+.4f}], p {line['p_adjusted']:.3g}"
        )
    with atomic_path(folder / "report.md") as temporary:
        temporary.write_text("\n".join(markdown) + "\n", encoding="utf-8")


def _words(lang: str) -> dict[str, str]:
    text = resources.files("bge_core.evaluation").joinpath("report.yaml").read_text(encoding="utf-8")
    return {key: of[LANGUAGES.index(lang)] for key, of in yaml.safe_load(text).items()}


def _plots(
    result: EvaluationResult, models: Mapping[str, Mapping[str, Any]], words: Mapping[str, str]
) -> dict[str, tuple[Draw, str]]:
    """{name: (what draws it on axes, caption)}."""
    plots: dict[str, tuple[Draw, str]] = {"recall": (partial(_draw_recall, result), words["recall"])}
    for name in result.rankings:
        plots[f"scores-{name}"] = partial(_draw_scores, result, name, words), words["scored"].format(name)
        curve = Path(str(models.get(name, {}).get("model"))) / "metrics.jsonl"
        if curve.is_file():
            try:
                lines = [line for line in read_metrics(curve) if "step" in line]
            except ValueError:
                lines = []
            if any(line.get("loss") is not None for line in lines):
                draw = partial(draw_training, lines=lines, metric=HEADLINE, step=words["step"], loss=words["loss"])
                plots[f"training-{name}"] = draw, words["loss"]
            else:
                logger.warning("%s: holds no curve that can be read; the report goes without", curve)
    return plots


def _interval(result: EvaluationResult, name: str, metric: str) -> str:
    low, high = result.intervals[name][metric]
    return f"[{low:.3f}, {high:.3f}]"


def _warnings(result: EvaluationResult, headline: str, words: Mapping[str, str]) -> list[tuple[str, str, str]]:
    found = []
    first = next(iter(result.rankings))
    low, high = result.intervals[first][headline]
    if (high - low) / 2 > 0.03:
        found.append(("note", words["few"].format(len(result.task.queries), (high - low) / 2), words["few_do"]))
    if result.task.missing_texts:
        found.append(("warning", words["missing"].format(len(result.task.missing_texts)), words["missing_do"]))
    for line in result.comparisons:
        if line["metric"] == headline and line["low"] <= 0:
            kind, key = ("bad", "worse") if line["high"] < 0 else ("warning", "unsure")
            text = words["worse_than" if key == "worse" else key].format(
                line["model"], line["baseline"], headline, line["difference"], line["low"], line["high"]
            )
            found.append((kind, text, words[f"{key}_do"]))
    return found


def _difference_rows(result: EvaluationResult) -> list[list[Any]]:
    return [
        [
            line["model"],
            line["metric"],
            f"{line['difference']:+.4f}",
            f"[{line['low']:+.4f}, {line['high']:+.4f}]",
            line["p_value"],
            line["p_adjusted"],
            line["wins"],
            line["losses"],
            line["ties"],
        ]
        for line in result.comparisons
    ]


def _threshold_rows(result: EvaluationResult, words: Mapping[str, str]) -> list[list[Any]]:
    rows, first = [], next(iter(result.thresholds))
    before = {(line["target"], line["value"]): line["threshold"] for line in result.thresholds[first]}
    for name, lines in result.thresholds.items():
        for line in lines:
            ends, known = (line["low"], line["high"]), before.get((line["target"], line["value"]))
            moved = None if None in (known, line["threshold"]) or name == first else line["threshold"] - known
            rows.append(
                [
                    name,
                    words[line["target"]].format(line["value"]),
                    line["threshold"],
                    None if None in ends else "[{:.3f}, {:.3f}]".format(*ends),
                    line["reached"],
                    line["recall"],
                    None if moved is None else f"{moved:+.3f}",
                ]
            )
    return rows


def _parts(result: EvaluationResult, headline: str, words: Mapping[str, str]) -> list[list[Any]]:
    """The headline metric by length of question and answer, and by source: kind, part, questions, each model's mean."""
    values = {name: ranking.per_query[headline] for name, ranking in result.rankings.items()}
    rows: list[list[Any]] = []

    def add(kind: str, label: str, chosen: np.ndarray) -> None:
        if chosen.any():
            rows.append([kind, label, int(chosen.sum()), *(float(of[chosen].mean()) for of in values.values())])

    answers = []
    for facts, own in zip(result.task.query_facts, result.task.relevant, strict=True):
        answer = facts.get("answer")
        texts = [answer] if isinstance(answer, str) else list(answer or ())
        texts = texts or [result.task.corpus[row] for row, grade in own.items() if grade > 0][:1]
        answers.append(len(texts[0]) if texts else 0)
    for kind, lengths in (("length", np.array(list(map(len, result.task.queries)))), ("answer", np.array(answers))):
        edges = np.unique(np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1], method="lower"))
        for low, high in zip(edges, [*(edges[1:-1] - 1), edges[-1]], strict=False) if len(edges) > 1 else ():
            add(words[kind], words["chars"].format(low, high), (lengths >= low) & (lengths <= high))
    sources = np.array([str(facts.get("source", "")) for facts in result.task.query_facts])
    for source in sorted(set(sources) - {""}):
        add(words["source"], source, sources == source)
    return rows


def _changed(result: EvaluationResult, headline: str, words: Mapping[str, str]) -> list[list[Any]]:
    """Cards of the questions that the last model answers better than the first, and worse; the largest change first."""
    task, names = result.task, list(result.rankings)
    pair = [names[0], names[-1]]
    change = result.rankings[pair[1]].per_query[headline] - result.rankings[pair[0]].per_query[headline]
    right = {name: is_positive(result.rankings[name].rows[:, :TOP], task) for name in pair}
    ranks = {name: result.rankings[name].first_positive(task) for name in pair}
    found = []
    for sign in (-1, 1):
        order = np.argsort(sign * change, kind="stable")[:MOST]
        cards = []
        for i in order[sign * change[order] < 0]:
            lines: list[tuple[str, str, Any, str]] = []
            for name in pair:
                rank = int(ranks[name][i])
                lines.append(("", name, "", f"{words['rank']} {rank}" if rank else words["not"]))
                ranking = result.rankings[name]
                for place, (row, score) in enumerate(zip(ranking.rows[i, :TOP], ranking.scores[i], strict=False)):
                    if row < 0:
                        continue
                    is_right = bool(right[name][i, place])
                    label = f"{place + 1} {words['positive']}" if is_right else str(place + 1)
                    lines.append(("good" if is_right else "", label, float(score), task.corpus[row][:200]))
            cards.append((task.queries[i], lines))
        found.append(cards)
    return found


def _draw_recall(result: EvaluationResult, axes: Any) -> None:
    """Those that the corpus lacks count as not found."""
    positives = zip(result.task.relevant, result.task.missing, strict=True)
    total = np.array([sum(grade > 0 for grade in own.values()) + len(lost) for own, lost in positives])
    recall = {}
    for name, ranking in result.rankings.items():
        hits = is_positive(ranking.rows, result.task).cumsum(axis=1) / np.maximum(total, 1)[:, None]
        recall[name] = hits.mean(axis=0)
    draw_recall(axes, recall)


def _draw_scores(result: EvaluationResult, name: str, words: Mapping[str, str], axes: Any) -> None:
    """On the same edges for every model."""
    every = [s for r in result.rankings.values() for s in (r.positive_score, r.negative_score)]
    edges = np.histogram_bin_edges(np.concatenate([scores[np.isfinite(scores)] for scores in every]), 40)
    of = result.rankings[name]
    scores = {words["other"]: of.negative_score, words["positive"]: of.positive_score}
    finite = {label: values[np.isfinite(values)] for label, values in scores.items()}
    draw_histograms(axes, finite, edges, "score", words["questions"])
