"""What a run of mining did, and what in it one should look at twice."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from bge_core.encoder.model import Encoder
from bge_core.encoder.tokens import tokenize
from bge_core.files.records import Row
from bge_core.mining.file_checks import Finding, check_rows
from bge_core.mining.mine import Mined, mined_rows
from bge_core.mining.near_duplicates import Likeness
from bge_core.runtime.cli import as_dict
from bge_core.runtime.config import MineConfig

MAX_LENGTHS = 500  # texts of a kind whose lengths are measured
MIN_SHOWN = 20  # rows to read, at least
EXCLUDED_BECAUSE = {  # of a guard or filter: what the candidate did that was taken out
    "identical": "has the letters and digits of a positive",
    "near_duplicate": "says what a positive says in nearly the same words",
    "same_question": "is a positive of the same question, or of nearly the same one",
    "answer": "holds the row's answer",
    "max_score": "scores above --max_score",
    "min_score": "scores below --min_score",
    "absolute_margin": "scores too close to the positive, or above it (--absolute_margin)",
    "relative_margin": "scores too close to the positive, or above it (--relative_margin)",
}


@dataclass(frozen=True)
class MiningReport:
    """The facts that the page shows.

    Args:
        title: of the page.
        settings: every flag, and the instructions that were used.
        counts: as in the manifest.
        search: how was searched.
        pos_scores, neg_scores: the encoder's cosines of all positives and chosen negatives.
        positive_ranks: place of each row's best positive from 0, -1: not within `depth`.
        depth: of the ranking.
        removed: for each guard and filter some of what it took out.
        lengths: "query", "positive", "negative" -> tokens of some texts.
        limits: likewise, the longest that is read.
        inspect: rows to read: query, pos [(text, score)], neg likewise.
        closest: negatives that read most like a positive: query, positive, negative, alike, score.
        findings: of the file that was written, see `check_rows`.
    """

    title: str
    settings: dict[str, Any]
    counts: dict[str, int | float]
    search: dict[str, Any]
    pos_scores: np.ndarray
    neg_scores: np.ndarray
    positive_ranks: np.ndarray
    depth: int
    removed: dict[str, list[Row]]
    lengths: dict[str, np.ndarray]
    limits: dict[str, int]
    inspect: list[Row]
    closest: list[Row]
    findings: list[Finding]

    @property
    def num_candidates(self) -> int:
        """How many candidates the guards saw, at most."""
        return int(self.counts["rows"] * min(self.depth, self.counts["pool"]))

    def num_removed(self, name: str) -> int:
        """How many hits of the range a guard or filter took out."""
        return int(self.counts.get(f"{name}_dropped", 0))


def report_facts(config: MineConfig, encoder: Encoder, rows: Sequence[Row], mined: Mined) -> MiningReport:
    """What the report shows of this run."""
    some = range(0, len(rows), max(1, len(rows) // MAX_LENGTHS))
    texts = {
        "query": [rows[i]["query"] for i in some],
        "positive": [rows[i]["pos"][0] for i in some],
        "negative": [mined.neg[i][0] for i in some if mined.neg[i]],
    }
    margin = [max(found, default=-2.0) - min(own) for own, found in zip(mined.pos_score, mined.neg_score, strict=True)]
    by_margin = sorted(range(len(rows)), key=margin.__getitem__, reverse=True)
    passages = dict.fromkeys(text for row, neg in zip(rows, mined.neg, strict=True) for text in (*row["pos"], *neg))
    likeness = Likeness(list(passages))
    instructions = {"query_instruction": mined.query_instruction, "passage_instruction": mined.passage_instruction}
    return MiningReport(
        title=f"Mined negatives: {Path(str(config.output_file)).name}",
        settings=as_dict(config) | instructions,
        counts=mined.counts,
        search=mined.search,
        pos_scores=np.array([score for found in mined.pos_score for score in found], dtype=np.float64),
        neg_scores=np.array([score for found in mined.neg_score for score in found], dtype=np.float64),
        positive_ranks=mined.positive_rank,
        depth=config.sampling_range[1],
        removed=mined.removed,
        lengths={name: num_tokens(encoder.tokenizer, found) for name, found in texts.items()},
        limits=dict.fromkeys(texts, config.passage_max_len) | {"query": config.query_max_len},
        inspect=[
            {
                "query": rows[i]["query"],
                "pos": list(zip(rows[i]["pos"], mined.pos_score[i], strict=True)),
                "neg": list(zip(mined.neg[i], mined.neg_score[i], strict=True)),
            }
            for i in by_margin[: max(MIN_SHOWN, config.inspect)]
        ],
        closest=closest_in_words(rows, mined, likeness),
        findings=check_rows(list(mined_rows(rows, mined)), likeness=likeness),
    )


def closest_in_words(rows: Sequence[Row], mined: Mined, likeness: Likeness, most: int = 20) -> list[Row]:
    """The negatives that share most with a positive of their row: hidden positives would stand among them."""
    stacks = map(likeness.stack, mined.neg)
    pairs = (
        (like, i, p, n)
        for i, (row, stack) in enumerate(zip(rows, stacks, strict=True))
        for p, text in enumerate(row["pos"])
        for n, like in enumerate(likeness.containment(text, stack).tolist())
    )
    return [
        {
            "query": rows[i]["query"],
            "positive": rows[i]["pos"][p],
            "negative": mined.neg[i][n],
            "alike": round(like, 2),
            "score": mined.neg_score[i][n],
        }
        for like, i, p, n in heapq.nlargest(most, pairs, key=itemgetter(0))
    ]


def why_short(counts: Mapping[str, int | float], negative_number: int) -> str:
    """Why some rows have fewer negatives than were asked for: the pool is small, or what it has was taken out."""
    short, small = counts["rows_short"], counts["rows_short_of_pool"]
    text = f"{short:,} rows have fewer than {negative_number} mined negatives"
    if small:
        text += f"; for {small:,} the pool of {counts['pool']:,} is too small, a larger one goes to --candidate_pool"
    if short > small:
        took = [f"{name} {num:,}" for name in (*EXCLUDED_BECAUSE, "teacher") if (num := counts.get(f"{name}_dropped"))]
        text += f"; for {short - small:,} guards or filters took out too many"
        text += f" ({', '.join(took)})" if took else ""
    return text


def mining_warnings(report: MiningReport) -> list[Finding]:
    """What in a run of mining should make one look twice, the worst first.

    A share at or above the first limit is a warning, at or above the second it is bad:

        positives not within `depth` of their ranking                5%   20%
        negatives that score above the row's lowest positive         5%   20%
        rows with fewer negatives than asked for                     1%   50%
        negatives drawn at random, not found by the search           5%   50%
        candidates that one guard took out                          20%   50%
        texts longer than the limit                                  5%   50%
        pairs in which the negative scores higher, of all rows      15%   35%     (1 - AUC)
    """
    counts, num_neg = report.counts, report.neg_scores.size
    num_pairs = report.pos_scores.size * num_neg
    shares: list[tuple[str, float, float, tuple[float, float], str, str]] = [
        ("positives_not_found", int((report.positive_ranks < 0).sum()), report.positive_ranks.size, (0.05, 0.2),
         f"of the rows have no positive among the {report.depth:,} best candidates",
         "Check instruction and pooling, and whether the candidates hold the positives"
         f" ({counts.get('positives_not_in_pool', 0):,} positives are not among them)."),
        ("negatives_above_positive", counts.get("negatives_above_positive", 0), num_neg, (0.05, 0.2),
         "of the negatives score above the lowest positive of their row",
         "Read some below: if they are answers, set --relative_margin 0.05, or use --reranker_name_or_path."),
        ("rows_short", counts.get("rows_short", 0), counts["rows"], (0.01, 0.5),
         "of the rows have fewer negatives than asked for",
         "Give more texts to choose from (--candidate_pool), or ask for fewer (--negative_number)."
         if counts.get("rows_short_of_pool") else "Loosen the guard or filter that took out most."),
        ("negatives_at_random", counts.get("negatives_at_random", 0), num_neg, (0.05, 0.5),
         "of the negatives were drawn at random, as too few were left in the range, and are easy",
         "Widen --range_for_sampling, or loosen the guard that took out most."),
        ("overlap", (1 - auc(report.pos_scores, report.neg_scores)) * num_pairs if num_pairs else 0, num_pairs,
         (0.15, 0.35),
         "of the pairs of a positive and a negative, of any two rows, have the negative score higher",
         "One limit for all rows will not tell answers from others: use a margin, not --max_score, and read rows."),
    ]  # fmt: skip
    for name in report.removed:
        what = f"of the candidates were taken out: the text {EXCLUDED_BECAUSE[name]}"
        remedy = "Read its examples below: if most would be good negatives, loosen it."
        shares.append((f"guard_{name}", report.num_removed(name), report.num_candidates, (0.2, 0.5), what, remedy))
    for name, lengths in report.lengths.items():
        what = f"of the texts measured as {name} are longer than the {report.limits[name]:,} that are read"
        flag = "query_max_len" if name == "query" else "passage_max_len"
        remedy = f"Raise --{flag}, here and in training, or split the texts."
        shares.append(
            (f"{name}_cut", int((lengths > report.limits[name]).sum()), lengths.size, (0.05, 0.5), what, remedy)
        )
    found = []
    if 2 * report.depth > (pool := int(counts["pool"])):
        message = f"The range reaches {report.depth:,} hits deep, and there are {pool:,} candidates: any text comes."
        remedy = "Take the first hits, as --range_for_sampling 0-30 or less, or give more candidates."
        found.append(Finding("range_covers_pool", "warning", report.depth, pool, message, remedy))
    for name, count, total, (look, mend), what, remedy in shares:
        share, count = count / total if total else 0.0, round(count)
        if share >= look:
            message = f"{share:.1%} {what} ({count:,} of {total:,})."
            found.append(Finding(name, "bad" if share >= mend else "warning", count, int(total), message, remedy))
    return sorted(found, key=lambda finding: finding.severity != "bad")


def auc(pos: np.ndarray, neg: np.ndarray) -> float:
    """P(a positive scores above a negative) + P(they tie) / 2, over all pairs."""
    ordered = np.sort(neg)
    below = np.searchsorted(ordered, pos, "left") + np.searchsorted(ordered, pos, "right")
    return float(below.sum() / 2 / (pos.size * neg.size))


def num_tokens(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """(n,) tokens of each text, with the special ones, however long it is."""
    return np.array([len(ids) for ids in tokenize(tokenizer, list(texts), 1 << 20)], dtype=np.int64)
