"""What mining did, as a page: what to mind first, then scores, ranks, guards, lengths and rows to read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bge_core.files.records import Row
from bge_core.mining.facts import EXCLUDED_BECAUSE, MiningReport, auc, mining_warnings
from bge_core.mining.file_checks import Finding
from bge_core.reports.page import Page
from bge_core.reports.plots import draw_histograms

BINS = 40


def write_mining_report(path: str | Path, report: MiningReport) -> list[Finding]:
    """Write the page, whole or not at all.

    Returns:
        What to mind: `mining_warnings` and the file's findings, the worst first.
    """
    findings = [*mining_warnings(report), *report.findings]
    findings.sort(key=lambda finding: ("bad", "warning", "note").index(finding.severity))
    page = Page(report.title).tiles(_tiles(report))
    _add_findings(page, findings)
    page.section("Scores and ranks")
    if report.neg_scores.size:
        page.plot(lambda axes: _draw_scores(axes, report), "Scores of positives and of chosen negatives.")
    page.plot(lambda axes: _draw_ranks(axes, report.positive_ranks), "Where a row's best positive stands.")
    if report.removed:
        _add_removed(page, report)
    _add_lengths(page, report)
    if report.closest:
        page.section(
            "Negatives that read most like a positive",
            "Share of letters in the same order, from 0 to 1. "
            "One that says the same in other words is a hidden positive; a teacher would tell.",
        )
        page.examples(report.closest, ["query", "positive", "negative", "alike", "score"], search=False)
    page.section(
        "Rows to read",
        "Those whose negatives score highest against their positives come first. Negatives "
        "by score; those above the row's lowest positive are marked.",
    )
    page.cards([_card(row) for row in report.inspect])
    page.section("Details")
    for name in ("counts", "search", "settings"):
        page.details(name.capitalize(), getattr(report, name))
    page.write(path)
    return findings


def write_check_report(path: str | Path, title: str, findings: Sequence[Finding]) -> None:
    """Write a page of what `check_rows` found, whole or not at all."""
    page = Page(title)
    _add_findings(page, findings)
    page.write(path)


def _add_findings(page: Page, findings: Sequence[Finding]) -> None:
    lines = [(finding.severity, finding.message, finding.remedy, finding.examples) for finding in findings]
    page.section("What to mind").warnings(lines)


def _tiles(report: MiningReport) -> list[tuple[str, Any, str]]:
    counts, ranks = report.counts, report.positive_ranks
    spread = f"{counts['negatives_min']} to {counts['negatives_max']}"
    tiles = [
        ("rows", counts["rows"], ""),
        ("negatives per row", f"{counts['negatives_mean']:.1f}", spread),
        ("positive first", f"{np.mean(ranks == 0):.1%}", "of the rows"),
        ("positive found", f"{np.mean(ranks >= 0):.1%}", f"of the rows, in {report.depth:,} hits"),
    ]
    if report.neg_scores.size:
        above = counts["negatives_above_positive"] / report.neg_scores.size
        tiles.append(("negatives above", f"{above:.1%}", "score above a positive of their row"))
        tiles.append(
            ("AUC", f"{auc(report.pos_scores, report.neg_scores):.3f}", "positives against negatives, all rows")
        )
    return tiles


def _draw_scores(axes: Any, report: MiningReport) -> None:
    edges = np.histogram_bin_edges(np.concatenate([report.pos_scores, report.neg_scores]), BINS)
    named = {"negatives": report.neg_scores, "positives": report.pos_scores}
    labelled = {f"{name} ({scores.size:,})": scores for name, scores in named.items()}
    draw_histograms(axes, labelled, edges, "score", "share", shares=True)


def _draw_ranks(axes: Any, ranks: np.ndarray) -> None:
    found = ranks[ranks >= 0]
    starts = [2**i - 1 for i in range(int(found.max(initial=0) + 1).bit_length())]  # ranks 1, 2-3, 4-7, ...
    shares = np.histogram(found, [*starts, 2 * starts[-1] + 1])[0] / ranks.size
    labels = ["1", *(f"{start + 1}-{2 * start + 1}" for start in starts[1:]), "not found"]
    axes.bar(range(len(starts)), shares, color="C0", width=0.75)
    axes.bar([len(starts)], [np.mean(ranks < 0)], color="C1", width=0.75)
    axes.set_xticks(range(len(labels)), labels, rotation=35, ha="right")
    axes.set(xlabel="rank", ylabel="share of rows")


def _add_removed(page: Page, report: MiningReport) -> None:
    rows = [
        [
            name,
            EXCLUDED_BECAUSE[name],
            report.num_removed(name),
            f"{report.num_removed(name) / report.num_candidates:.2%}",
        ]
        for name in report.removed
    ]
    page.section("What the guards took out", "Texts that may be answers, or that score outside the limits.")
    page.table(["guard", "the text", "taken out", "of all candidates"], rows)
    for name, examples in report.removed.items():
        shown = Page("").examples(examples, ["query", "positive", "candidate", "score"])
        page.details(f"{name}: {len(examples)} examples", shown)


def _add_lengths(page: Page, report: MiningReport) -> None:
    rows = []
    for name, lengths in report.lengths.items():
        if lengths.size:
            median, most = np.percentile(lengths, [50, 95], method="lower").tolist()
            limit, longest = report.limits[name], int(lengths.max())
            cut = f"{np.mean(lengths > limit):.1%}"
            rows.append([name, lengths.size, round(lengths.mean()), median, most, longest, limit, cut])
    page.section("Lengths", "In tokens, of the texts that were measured.")
    page.table(["", "texts", "mean", "median", "95%", "longest", "limit", "cut"], rows)


def _card(row: Row) -> tuple[str, list[tuple[str, str, Any, str]]]:
    lowest = min(score for _, score in row["pos"])
    lines = [("good", "positive", score, text) for text, score in row["pos"]]
    for text, score in sorted(row["neg"], key=lambda found: -found[1]):
        lines.append(("odd", "above", score, text) if score > lowest else ("", "negative", score, text))
    return row["query"], lines
