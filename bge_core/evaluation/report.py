"""What an evaluation found, as a page and a Markdown table: is it better, for which questions, how sure."""

import logging
from collections.abc import Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bge_core.evaluation.evaluator import EvaluationResult, is_positive
from bge_core.evaluation.tables import interval, markdown_report, scored_by
from bge_core.files.atomic import atomic_path
from bge_core.reports.page import Page
from bge_core.reports.plots import draw_histograms, draw_recall, draw_training
from bge_core.runtime.log import read_metrics

logger = logging.getLogger(__name__)
HEADLINE = "MRR@10"
MOST, TOP = 10, 5  # questions that changed most, and what is shown of each ranking
MAX_LOOKUP = 50_000  # questions that can be searched for
MAX_LETTERS = 2_000_000  # of all of them: 6 MB of Chinese
LANGUAGES = ("en", "zh")  # in the order of report.yaml
Words = Mapping[str, str]


def write_evaluation_report(
    folder: Path, result: EvaluationResult, *, lang: str = "en", settings: Mapping[str, Any] | None = None
) -> None:
    """Write report.html and report.md into a folder, each whole or not at all.

    Args:
        folder: where to.
        result: of one test set; the first model is what the others are compared with.
        lang: "en" or "zh", of the page's own words.
        settings: of the run, folded away at the end.
    """
    text = resources.files("bge_core.evaluation").joinpath("report.yaml").read_text(encoding="utf-8")
    words = {key: of[LANGUAGES.index(lang)] for key, of in yaml.safe_load(text).items()}
    task, names = result.task, list(result.rankings)
    metrics = list(result.metrics[names[0]])
    headline = HEADLINE if HEADLINE in metrics else metrics[0]
    lead = words["lead" if len(names) > 1 else "alone"].format(
        len(task.queries), len(task.corpus), names[0], ", ".join(names[1:])
    )
    page = Page(words["title"].format(task.name), lead, lang)
    means = {name: of[headline] for name, of in result.metrics.items()}
    page.tiles([(name, mean, f"{headline}, {interval(result, name, headline)}") for name, mean in means.items()])
    page.section(words["mind"]).warnings(_warnings(result, headline, words))
    _add_results(page, result, words)
    _add_scores(page, result, words)
    if parts := _parts(result, headline, words):
        page.section(words["parts"], headline).table(["", "", words["questions"], *names], parts)
    _add_costs(page, result, words)
    if len(names) > 1:
        for key, cards in zip(("better", "worse"), _changed(result, headline, words), strict=True):
            page.section(words[key]).cards(cards, search=False)
    _add_lookup(page, result, words)
    for name in names:
        _add_training(page, result, name, words)
    page.section(words["details"])
    for name, model in result.models.items():
        page.details(name, vars(model))
    if settings:
        page.details(words["settings"], settings)
    page.write(folder / "report.html")
    with atomic_path(folder / "report.md") as temporary:
        temporary.write_text(markdown_report(result), encoding="utf-8")


def _add_results(page: Page, result: EvaluationResult, words: Words) -> None:
    """The means with their intervals, and the differences to the first model."""
    names, metrics = list(result.rankings), list(next(iter(result.metrics.values())))
    means: list[list[Any]] = []
    for name in names:
        means.append([name, *result.metrics[name].values()])
        means.append(["", *(interval(result, name, metric) for metric in metrics)])
    page.section(words["results"], words["interval"])
    best = dict.fromkeys(metrics, "max") if len(names) > 1 else None
    page.table([words["model"], *metrics], means, best=best)
    if not result.comparisons:
        return
    header = [words[key] for key in ("model", "metric", "difference")] + ["95 %"]
    header += [words[key] for key in ("p", "adjusted", "wins", "losses", "ties")]
    rows = [
        [
            line.model,
            line.metric,
            f"{line.difference:+.4f}",
            f"[{line.low:+.4f}, {line.high:+.4f}]",
            line.p_value,
            line.p_adjusted,
            line.wins,
            line.losses,
            line.ties,
        ]
        for line in result.comparisons
    ]
    page.section(words["differences"].format(names[0]), words["how"].format(result.resamples, result.seed))
    page.table(header, rows)


def _add_scores(page: Page, result: EvaluationResult, words: Words) -> None:
    """Recall at every depth, the scores of positives and negatives, and the thresholds that follow from them."""
    page.section(words["curves"]).plot(partial(draw_recall, recall=_recall(result)), words["recall"])
    page.section(words["scores"])
    every = [scores for of in result.rankings.values() for scores in (of.positive_score, of.negative_score)]
    edges = np.histogram_bin_edges(np.concatenate([scores[np.isfinite(scores)] for scores in every]), 40)
    for name, ranking in result.rankings.items():
        scores = {words["other"]: ranking.negative_score, words["positive"]: ranking.positive_score}
        finite = {label: values[np.isfinite(values)] for label, values in scores.items()}
        draw = partial(draw_histograms, scores=finite, edges=edges, xlabel="score", ylabel=words["questions"])
        page.plot(draw, words["scored"].format(name))
    if not any(result.thresholds.values()):
        return
    header = [words[key] for key in ("model", "target", "threshold")] + ["95 %"]
    header += [words[key] for key in ("reached", "found", "moved")]
    rows: list[list[Any]] = []
    first = next(iter(result.thresholds))
    before = {(of.target, of.value): of.threshold for of in result.thresholds[first]}
    for name, found in result.thresholds.items():
        for of in found:
            known = before.get((of.target, of.value))
            moved = None
            if known is not None and of.threshold is not None and name != first and not result.similarities:
                moved = f"{of.threshold - known:+.3f}"
            spread = None if None in (of.low, of.high) else f"[{of.low:.3f}, {of.high:.3f}]"
            rows.append([name, words[of.target].format(of.value), of.threshold, spread, of.reached, of.recall, moved])
    page.section(words["thresholds"], words["threshold_text"]).table(header, rows)


def _recall(result: EvaluationResult) -> dict[str, np.ndarray]:
    """{model: (k,) recall at every depth}; positives that the corpus lacks are not found."""
    positives = zip(result.task.relevant, result.task.missing, strict=True)
    total_Q = np.array([sum(grade > 0 for grade in own.values()) + len(lost) for own, lost in positives])
    return {
        name: (is_positive(of.rows, result.task).cumsum(axis=1) / np.maximum(total_Q, 1)[:, None]).mean(axis=0)
        for name, of in result.rankings.items()
    }


def _add_costs(page: Page, result: EvaluationResult, words: Words) -> None:
    rows = [(name, cost.row()) for name, costs in result.costs.items() for cost in costs]
    if rows:
        labels = {"bytes_per_passage": "bytes", "queries_per_second": "qps"}
        header = [words["model"], *(words.get(labels.get(key, key), key) for key in rows[0][1])]
        page.section(words["costs"], words["cost_text"])
        page.table(header, [[name, *row.values()] for name, row in rows])


def _add_lookup(page: Page, result: EvaluationResult, words: Words) -> None:
    """Every question with the place of its first positive, to be found by its words."""
    queries = result.task.queries[:MAX_LOOKUP]
    places = [ranking.first_positive(result.task).tolist() for ranking in result.rankings.values()]
    longest = max(20, MAX_LETTERS // len(queries))
    rows = [[query[:longest], *(of[i] or "–" for of in places)] for i, query in enumerate(queries)]
    page.section(words["lookup"], words["lookup_text"].format(len(queries), len(result.task.queries)))
    page.lookup(["", *result.rankings], rows)


def _add_training(page: Page, result: EvaluationResult, name: str, words: Words) -> None:
    """The curve of a model that was trained here."""
    if name not in result.models or not (curve := Path(result.models[name].model, "metrics.jsonl")).is_file():
        return
    try:
        lines = [line for line in read_metrics(curve) if "step" in line]
    except ValueError:
        lines = []
    if any(line.get("loss") is not None for line in lines):
        draw = partial(draw_training, lines=lines, metric=HEADLINE, step=words["step"], loss=words["loss"])
        page.section(words["training"].format(name)).plot(draw, words["loss"])
    else:
        logger.warning("%s: holds no curve that can be read; the report goes without", curve)


def _warnings(result: EvaluationResult, headline: str, words: Words) -> list[tuple[str, str, str]]:
    found = []
    first = next(iter(result.rankings))
    low, high = result.intervals[first][headline]
    if (high - low) / 2 > 0.03:
        found.append(("note", words["few"].format(len(result.task.queries), (high - low) / 2), words["few_do"]))
    if result.similarities:
        text = words["scored_differently"].format(scored_by(result))
        found.append(("note", text, words["scored_differently_do"]))
    if result.task.missing_texts:
        found.append(("warning", words["missing"].format(len(result.task.missing_texts)), words["missing_do"]))
    for line in result.comparisons:
        if line.metric == headline and line.low <= 0:
            kind, key = ("bad", "worse") if line.high < 0 else ("warning", "unsure")
            text = words["worse_than" if key == "worse" else key].format(
                line.model, line.baseline, headline, line.difference, line.low, line.high
            )
            found.append((kind, text, words[f"{key}_do"]))
    return found


def _parts(result: EvaluationResult, headline: str, words: Words) -> list[list[Any]]:
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


def _changed(result: EvaluationResult, headline: str, words: Words) -> list[list[Any]]:
    """Cards of the questions that the last model answers better than the first, and worse; the largest change first."""
    task, names = result.task, list(result.rankings)
    pair = [names[0], names[-1]]
    change = result.rankings[pair[1]].per_query[headline] - result.rankings[pair[0]].per_query[headline]
    right = {name: is_positive(result.rankings[name].rows[:, :TOP], task) for name in pair}
    first = {name: result.rankings[name].first_positive(task) for name in pair}
    found = []
    for sign in (-1, 1):
        order = np.argsort(sign * change, kind="stable")[:MOST]
        cards = []
        for i in order[sign * change[order] < 0]:
            lines: list[tuple[str, str, Any, str]] = []
            for name in pair:
                lines.append(("", name, "", f"{words['rank']} {first[name][i]}" if first[name][i] else words["not"]))
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
