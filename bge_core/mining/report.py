"""What mining did, as a page: what to mind first, then scores, ranks, guards, lengths and rows to read."""

import heapq
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bge_core.encoder.model import Encoder
from bge_core.encoder.tokens import tokenize
from bge_core.files.records import Row
from bge_core.mining.file_checks import Finding, check_rows
from bge_core.mining.mine import (
    Mined,
    mined_rows,  # cross
)
from bge_core.reports.page import Page
from bge_core.runtime.cli import as_dict
from bge_core.runtime.config import MineConfig

GUARDS = {  # and filters: what a candidate did that was taken out
    "identical": "has the letters and digits of a positive",
    "near_duplicate": "says what a positive says in nearly the same words",
    "same_question": "is a positive of the same question, or of nearly the same one",
    "answer": "holds the row's answer",
    "max_score": "scores above --max_score",
    "min_score": "scores below --min_score",
    "absolute_margin": "scores too close to the positive, or above it (--absolute_margin)",
    "relative_margin": "scores too close to the positive, or above it (--relative_margin)",
    "teacher": "scores too high by the teacher (--teacher_margin)",
}
BINS = 40


def mining_warnings(facts: Mapping[str, Any]) -> list[Finding]:
    """What in a run of mining should make one look twice, the worst first.

    A share at or above the first limit is a warning, at or above the second it is bad:

        positives not within `depth` of their ranking                5 %   20 %
        negatives that score above the row's lowest positive         5 %   20 %
        rows with fewer negatives than asked for                     1 %   50 %
        negatives drawn at random, not found by the search           5 %   50 %
        candidates that one guard took out                          20 %   50 %
        passages longer than the limit                               5 %   50 %
        pairs in which the negative scores higher, of all rows      15 %   35 %     (1 - AUC)

    Args:
        facts: see `write_mining_report`.
    """
    counts, neg_total, depth = facts.get("counts", {}), facts.get("neg_total", 0), facts.get("depth", 0)
    ranks, (pos, neg) = np.asarray(facts.get("positive_ranks", ())), _scores(facts)
    num_pairs = pos.size * neg.size
    judged: list[tuple[str, float, float, tuple[float, float], str, str]] = [
        (
            "positives_not_found",
            int((ranks < 0).sum()),
            ranks.size,
            (0.05, 0.2),
            f"of the rows have no positive among the {depth:,} best candidates",
            "Check instruction and pooling, and whether the candidates hold the positives"
            f" ({counts.get('positives_not_in_pool', 0):,} positives are not among them).",
        ),
        (
            "negatives_above_positive",
            facts.get("neg_above", 0),
            neg_total,
            (0.05, 0.2),
            "of the negatives score above the lowest positive of their row",
            "Read some below: if they are answers, set --relative_margin 0.05, or use --reranker_name_or_path.",
        ),
        (
            "rows_short",
            counts.get("rows_short", 0),
            counts.get("rows", 0),
            (0.01, 0.5),
            "of the rows have fewer negatives than asked for",
            "Give more texts to choose from (--candidate_pool), or ask for fewer (--negative_number).",
        ),
        (
            "negatives_at_random",
            counts.get("negatives_at_random", 0),
            neg_total,
            (0.05, 0.5),
            "of the negatives were drawn at random, as too few were left in the range, and are easy",
            "Widen --range_for_sampling, or loosen the guard that took out most.",
        ),
        (
            "overlap",
            (1 - auc(pos, neg)) * num_pairs if num_pairs else 0,
            num_pairs,
            (0.15, 0.35),
            "of the pairs of a positive and a negative, of any two rows, have the negative score higher",
            "One limit for all rows will not tell answers from others: use a margin, not --max_score, and read rows.",
        ),
    ]
    judged += [
        (
            f"guard_{name}",
            removed["count"],
            num_candidates(facts),
            (0.2, 0.5),
            f"of the candidates were taken out: the text {GUARDS.get(name, name)}",
            "Read its examples below: if most would be good negatives, loosen it.",
        )
        for name, removed in facts.get("removed", {}).items()
    ]
    for name, limit in facts.get("limits", {}).items():
        lengths = np.asarray(facts.get("lengths", {}).get(name, ()))
        flag = "query_max_len" if name == "query" else "passage_max_len"
        judged.append(
            (
                f"{name}_cut",
                int((lengths > limit).sum()),
                lengths.size,
                (0.05, 0.5),
                f"of the texts measured as {name} are longer than the {limit:,} that are read",
                f"Raise --{flag}, here and in training, or split the texts.",
            )
        )
    found = []
    if counts.get("pool") and 2 * depth > counts["pool"] and counts.get("rows"):
        message = f"The range reaches {depth:,} hits deep, and there are {counts['pool']:,} candidates: any text comes."
        remedy = "Take the first hits, as --range_for_sampling 0-30 or less, or give more candidates."
        found.append(Finding("range_covers_pool", "warning", depth, counts["pool"], message, remedy))
    for name, count, total, (look, mend), what, remedy in judged:
        share, count = count / total if total else 0.0, round(count)
        if share >= look:
            message = f"{share:.1%} {what} ({count:,} of {total:,})."
            found.append(Finding(name, "bad" if share >= mend else "warning", count, int(total), message, remedy))
    return sorted(found, key=lambda finding: finding.severity != "bad")


def write_mining_report(path: str | Path, facts: Mapping[str, Any]) -> list[Finding]:
    """Write the page, whole or not at all; what `facts` lacks is left out.

    Args:
        path: of the HTML file.
        facts: title; settings, counts, index: name -> value; findings: of `check_rows`;
            pos_scores, neg_scores: 1-D float arrays, of what `score_name` says (default: cosine);
            neg_above, neg_total: negatives above the lowest positive of their row, and all;
            positive_ranks: 1-D int array, place of each row's best positive from 0, -1: not within `depth`;
            candidates: how many the guards saw (default: rows * depth, or * pool where that is smaller);
            removed: guard -> {"count", "examples": [{query, positive, candidate, score, reason}]};
            lengths: "query", "positive", "negative" -> 1-D int array, in `length_unit` (default: tokens);
            limits: likewise -> int; inspect: [{query, pos: [[text, score or None]], neg: likewise}];
            closest: [{query, positive, negative, alike, score}].

    Returns:
        What to mind: `mining_warnings` and `findings`, the worst first.
    """
    findings = [*mining_warnings(facts), *facts.get("findings", ())]
    findings.sort(key=lambda finding: ("bad", "warning", "note").index(finding.severity))
    counts, ranks = facts.get("counts", {}), np.asarray(facts.get("positive_ranks", ()))
    pos, neg = _scores(facts)
    page = Page(facts.get("title", "Mined negatives"))
    tiles: list[tuple[str, Any, str]] = [("rows", counts["rows"], "")] if "rows" in counts else []
    if "negatives_mean" in counts:
        spread = f"{counts.get('negatives_min', 0)} to {counts.get('negatives_max', 0)}"
        tiles.append(("negatives per row", f"{counts['negatives_mean']:.1f}", spread))
    if ranks.size:
        tiles.append(("positive first", f"{np.mean(ranks == 0):.1%}", "of the rows"))
        tiles.append(
            ("positive found", f"{np.mean(ranks >= 0):.1%}", f"of the rows, in {facts.get('depth', 0):,} hits")
        )
    if facts.get("neg_total"):
        above = facts.get("neg_above", 0) / facts["neg_total"]
        tiles.append(("negatives above", f"{above:.1%}", "score above a positive of their row"))
    if pos.size and neg.size:
        tiles.append(("AUC", auc(pos, neg), "positives against negatives, all rows"))
    if tiles:
        page.tiles(tiles)
    page.section("What to mind").warnings([(f.severity, f.message, f.remedy, f.examples) for f in findings])
    if pos.size or neg.size or ranks.size:
        page.section("Scores and ranks")
    if pos.size and neg.size:
        name = facts.get("score_name", "cosine")
        page.plot(lambda axes: _draw_scores(axes, pos, neg, name), "Scores of positives and of chosen negatives.")
    if ranks.size:
        page.plot(lambda axes: _draw_ranks(axes, ranks), "Where a row's best positive stands in its ranking.")
    if facts.get("removed"):
        _add_guards(page, facts)
    lengths = {name: np.asarray(found) for name, found in facts.get("lengths", {}).items() if len(found)}
    if lengths:
        rows = []
        for name, found in lengths.items():
            limit = facts.get("limits", {}).get(name)
            cut = "–" if limit is None else f"{np.mean(found > limit):.1%}"
            median, most = np.percentile(found, [50, 95], method="lower").tolist()
            rows.append([name, found.size, round(found.mean()), median, most, int(found.max()), limit, cut])
        page.section("Lengths", f"In {facts.get('length_unit', 'tokens')}, of the texts that were measured.")
        page.table(["", "texts", "mean", "median", "95 %", "longest", "limit", "cut"], rows)
    if facts.get("closest"):
        page.section(
            "Negatives that read most like a positive",
            "Share of letters in the same order, from 0 to 1. "
            "One that says the same in other words is a hidden positive; a teacher would tell.",
        )
        page.examples(facts["closest"], ["query", "positive", "negative", "alike", "score"], search=False)
    if facts.get("inspect"):
        page.section(
            "Rows to read",
            "Those whose negatives score highest against their positives come first. Negatives "
            "by score; those above the row's lowest positive are marked.",
        )
        page.cards([_card(row) for row in facts["inspect"]])
    details = [name for name in ("counts", "index", "settings") if facts.get(name)]
    if details:
        page.section("Details")
    for name in details:
        page.details(name.capitalize(), facts[name])
    page.write(path)
    return findings


def auc(pos: np.ndarray, neg: np.ndarray) -> float:
    """P(a positive scores above a negative) + P(they tie) / 2, over all pairs."""
    ordered = np.sort(neg)
    below = np.searchsorted(ordered, pos, "left") + np.searchsorted(ordered, pos, "right")
    return float(below.sum() / 2 / (pos.size * neg.size))


def num_candidates(facts: Mapping[str, Any]) -> int:
    """How many candidates the guards judged, at most, unless the facts say it."""
    counts = facts.get("counts", {})
    depth = min(facts.get("depth", 0), counts.get("pool", np.inf))
    return int(facts.get("candidates", counts.get("rows", 0) * depth))


def _scores(facts: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    arrays = (np.asarray(facts.get(f"{kind}_scores", ()), dtype=np.float64) for kind in ("pos", "neg"))
    pos, neg = (array[np.isfinite(array)] for array in arrays)
    return pos, neg


def _draw_scores(axes: Any, pos: np.ndarray, neg: np.ndarray, name: str) -> None:
    edges = np.histogram_bin_edges(np.concatenate([pos, neg]), BINS)
    for scores, label, color in ((neg, "negatives", "C1"), (pos, "positives", "C0")):
        style = {"bins": edges, "weights": np.full(scores.size, 1 / scores.size), "color": color}
        axes.hist(scores, histtype="stepfilled", alpha=0.25, **style)
        axes.hist(scores, histtype="step", label=f"{label} ({scores.size:,})", linewidth=1.5, **style)
    axes.set(xlabel=name, ylabel="share")
    axes.legend(loc="upper left")


def _draw_ranks(axes: Any, ranks: np.ndarray) -> None:
    found = ranks[ranks >= 0]
    starts = [2**i - 1 for i in range(int(found.max(initial=0) + 1).bit_length())]  # ranks 1, 2-3, 4-7, ...
    shares = np.histogram(found, [*starts, 2 * starts[-1] + 1])[0] / ranks.size
    labels = ["1", *(f"{start + 1}-{2 * start + 1}" for start in starts[1:]), "not found"]
    axes.bar(range(len(starts)), shares, color="C0", width=0.75)
    axes.bar([len(starts)], [np.mean(ranks < 0)], color="C1", width=0.75)
    axes.set_xticks(range(len(labels)), labels, rotation=35, ha="right")
    axes.set(xlabel="rank", ylabel="share of rows")


def _add_guards(page: Page, facts: Mapping[str, Any]) -> None:
    removed, total = facts["removed"], num_candidates(facts)
    rows = [
        [name, GUARDS.get(name, ""), of["count"], f"{of['count'] / total:.2%}" if total else "–"]
        for name, of in removed.items()
    ]
    page.section("What the guards took out", "Texts that may be answers, or that score outside the limits.")
    page.table(["guard", "the text", "taken out", "of all candidates"], rows)
    for name, of in removed.items():
        if of["examples"]:
            columns = [key for key in ("query", "positive", "candidate", "score", "reason") if key in of["examples"][0]]
            summary = f"{name}: {len(of['examples'])} examples"
            page.details(summary, Page("").examples(of["examples"], columns))


def _card(row: Mapping[str, Any]) -> tuple[str, list[tuple[str, str, Any, str]]]:
    scored: Sequence[float] = [score for _, score in row["pos"] if score is not None]
    lowest = min(scored, default=np.inf)
    by_score = sorted(row["neg"], key=lambda found: -np.inf if found[1] is None else -found[1])
    lines = [("good", "positive", score, text) for text, score in row["pos"]]
    for text, score in by_score:
        above = score is not None and score > lowest
        lines.append(("odd", "above", score, text) if above else ("", "negative", score, text))
    return row["query"], lines


REPORT_TEXTS = 500  # texts whose lengths the report shows
ROWS_AT_ONCE = 10_000  # whose pairs of texts are compared together: memory does not grow with the rows


def report_facts(config: MineConfig, encoder: Encoder, rows: Sequence[Row], mined: Mined) -> dict[str, Any]:
    """What the report shows, see `write_mining_report`."""
    step = max(1, len(rows) // REPORT_TEXTS)
    some = range(0, len(rows), step)
    texts = {
        "query": [rows[i]["query"] for i in some],
        "positive": [rows[i]["pos"][0] for i in some],
        "negative": [mined.neg[i][0] for i in some if mined.neg[i]],
    }
    lengths = {
        name: np.array([len(t) for t in tokenize(encoder.tokenizer, found, 1 << 20)]) for name, found in texts.items()
    }
    margin = [max(found, default=-2.0) - min(own) for own, found in zip(mined.pos_score, mined.neg_score, strict=True)]
    by_margin = sorted(range(len(rows)), key=margin.__getitem__, reverse=True)
    out = list(mined_rows(rows, mined))
    findings = check_rows(out)
    return {
        "title": f"Mined negatives: {Path(str(config.output_file)).name}",
        "settings": as_dict(config)
        | {"query_instruction": mined.query_instruction, "passage_instruction": mined.passage_instruction},
        "counts": mined.counts,
        "pos_scores": np.array([score for found in mined.pos_score for score in found]),
        "neg_scores": np.array([score for found in mined.neg_score for score in found]),
        "score_name": "cosine",
        "neg_above": mined.counts["negatives_above_positive"],
        "neg_total": sum(map(len, mined.neg)),
        "positive_ranks": mined.positive_rank,
        "depth": config.sampling_range[1],
        "removed": {
            name: {"count": mined.counts.get(f"{name}_dropped", len(examples)), "examples": examples}
            for name, examples in mined.removed.items()
        },
        "lengths": lengths,
        "length_unit": "tokens",
        "limits": dict.fromkeys(lengths, config.passage_max_len) | {"query": config.query_max_len},
        "inspect": [
            {
                "query": row["query"],
                "pos": list(zip(row["pos"], mined.pos_score[i], strict=True)),
                "neg": list(zip(mined.neg[i], mined.neg_score[i], strict=True)),
            }
            for i in by_margin[: max(20, config.inspect)]
            for row in [rows[i]]
        ],
        "closest": closest_in_words(rows, mined),
        "index": mined.search,
        "findings": findings,
    }


def closest_in_words(rows: Sequence[Row], mined: Mined, most: int = 20) -> list[Row]:
    """The negatives that share most letters with a positive of their row: hidden positives would stand among them."""
    from rapidfuzz import fuzz, process

    best: list[tuple[float, int, int, int]] = []  # likeness, row, positive, negative
    for first in range(0, len(rows), ROWS_AT_ONCE):
        some = range(first, min(first + ROWS_AT_ONCE, len(rows)))
        places = [(i, p, n) for i in some for p, _ in enumerate(rows[i]["pos"]) for n, _ in enumerate(mined.neg[i])]
        positives, negatives = [rows[i]["pos"][p] for i, p, _ in places], [mined.neg[i][n] for i, _, n in places]
        alike = (process.cpdist(positives, negatives, scorer=fuzz.ratio) / 100).tolist()
        found = ((like, *place) for like, place in zip(alike, places, strict=True))
        best = heapq.nlargest(most, [*best, *found], key=lambda one: one[0])
    return [
        {
            "query": rows[i]["query"],
            "positive": rows[i]["pos"][p],
            "negative": mined.neg[i][n],
            "alike": round(like, 2),
            "score": mined.neg_score[i][n],
        }
        for like, i, p, n in best
    ]
