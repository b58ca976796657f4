"""What may be wrong with a training file, found from its texts alone, without a model: one `Finding` for each kind.

Two texts are the same if their normalized forms are (`files.text`: NFKC, single spaces), and nearly the same as
`near_duplicates` has it.
"""

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from bge_core.files.records import Row
from bge_core.files.text import normalize_text
from bge_core.mining.near_duplicates import NEAR_QUERY, NEAR_TEXT, Likeness

Severity = Literal["bad", "warning", "note"]
MAX_EXAMPLES = 5
MAX_SAMPLE = 20_000  # texts whose lengths are counted; a tokenizer takes a minute for a million
SHORT, HUB = 5, 10  # characters of a positive; queries that it answers
SPECIAL = 2  # tokens that an encoder puts around a text

# UTF-8 read as Latin-1 or Windows-1252, UTF-8 read as GBK (its quotes, full stops and commas), U+FFFD read as GBK
_AFTER = "\u0080-\u00bf" + bytes(range(0x80, 0xA0)).decode("cp1252", "ignore")
_MOJIBAKE = re.compile(f"(?:[\u00c2-\u00ef][{_AFTER}]+){{2}}|[锛銆鈥].*?[锛銆鈥]|锟斤拷", re.DOTALL)

# name: severity, what is counted, what they do, what to do about it; the worst first
KINDS: dict[str, tuple[Severity, str, str, str]] = {
    "contradictions": ("bad", "rows", "have a negative that this or another row gives as a positive of the same query",
                       "Take it out of neg (mine.py does), or merge the rows of a query."),
    "query_among_negatives": ("bad", "rows", "have their query among the negatives", "Take it out (mine.py does)."),
    "shared_queries": ("bad", "test rows", "ask a query of the training data",
                       "Remove these queries from the training data, or the test measures memory."),
    "empty_texts": ("bad", "different texts", "hold no letter or digit", "Remove them."),
    "replacement_characters": ("bad", "different texts", "hold U+FFFD, which stands for a character that was lost",
                               "Read the source again with the right encoding (often GB18030)."),
    "near_contradictions": ("warning", "negatives", "say in nearly the same words what a positive of their row says",
                            "Look at them, and remove those that are answers (mine.py's guards do)."),
    "scores_missing": ("warning", "rows", "lack the scores of some texts, while others have theirs",
                       "Score all (mine.py --reranker_name_or_path) before --knowledge_distillation."),
    "scores_above": ("warning", "scored negatives", "score above the lowest positive of their row",
                     "Look at them: they are likely answers; mine.py --teacher_margin 0 leaves them out."),
    "scores_constant": ("warning", "scored rows", "have the same score for all texts, which teaches nothing",
                        "Check how the scores were made."),
    "positive_is_query": ("warning", "rows", "have their query as a positive", "Remove it: it teaches nothing."),
    "identical_rows": ("warning", "rows", "repeat an earlier row in full", "Keep one of each."),
    "repeated_queries": ("warning", "rows", "ask the query of an earlier row, with other texts",
                         "Merge them into one row with all positives, lest one answer is trained against the other."),
    "repeated_texts": ("warning", "rows", "hold a text twice among their positives or their negatives",
                       "Keep one of each."),
    "mojibake": ("warning", "different texts", "look as if read with a wrong encoding",
                 "Look at them; if so, read the source again with the right encoding (UTF-8 or GB18030)."),
    "short_positives": ("warning", "positives", f"have fewer than {SHORT} characters",
                        "Give the sentence that holds the answer: a bare word matches every query or none."),
    "near_shared_queries": ("warning", "test rows", "ask nearly a query of the training data",
                            "Look at them; split so that all wordings of a question fall on the same side."),
    "queries_cut": ("warning", "different queries", "have more tokens than are read",
                    "Raise --query_max_len, or shorten them: what is cut is not read."),
    "passages_cut": ("warning", "different passages", "have more tokens than are read",
                     "Raise --passage_max_len, or split them: what is cut is not read."),
    "no_negatives": ("warning", "rows", "have no negatives", "Mine some: python mine.py."),
    "uneven_negatives": ("note", "rows", "have fewer negatives than others",
                         "Harmless: a row trains with those it has; mine.py fills them up to one number."),
    "hubs": ("note", "different positives", f"answer {HUB} different queries or more",
             "Fine for a FAQ; else look whether they are boilerplate."),
    "shared_positives": ("note", "test rows", "have a positive of the training data",
                         "Expected if one passage answers many queries; to test unseen passages, split by passage."),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One kind of fault.

    Args:
        name: a key of KINDS, or what another check calls it.
        severity: "bad": mend it; "warning": look at it; "note": know it.
        count: how many have it.
        total: how many were looked at.
        message: one sentence with the figures.
        remedy: one sentence: what to do.
        examples: at most five, with `row` counted from 1.
    """

    name: str
    severity: Severity
    count: int
    total: int
    message: str
    remedy: str
    examples: list[Row] = field(default_factory=list)


class _Hits:
    """Counts what is found of how many, and keeps the first few."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.total: Counter[str] = Counter()  # by unit
        self.examples: defaultdict[str, list[Row]] = defaultdict(list)
        self.more: dict[str, str] = {}  # the end of the sentence

    def add(self, name: str, **example: Any) -> None:
        self.count[name] += 1
        if len(self.examples[name]) < MAX_EXAMPLES:
            self.examples[name].append({key: _clip(value) for key, value in example.items()})

    def findings(self) -> list[Finding]:
        found = []
        for name, (severity, unit, does, remedy) in KINDS.items():
            if count := self.count[name]:
                total = self.total[unit]
                message = f"{count:,} of {total:,} {unit} {does} ({count / total:.1%}){self.more.get(name, '')}."
                found.append(Finding(name, severity, count, total, message, remedy, self.examples[name]))
        return found


def check_rows(
    rows: Sequence[Row],
    *,
    against: Sequence[Row] | None = None,
    likeness: Likeness | None = None,
    count_tokens: Callable[[list[str]], Sequence[int]] | None = None,
    query_max_len: int | None = None,
    passage_max_len: int | None = None,
) -> list[Finding]:
    """All that is found, the worst first; a kind that does not occur is left out.

    Args:
        rows: checked rows of training data (`records.check_training_row`).
        against: test rows (`query`, `pos`) whose queries must not be among them.
        likeness: of the passages; None: it is made.
        count_tokens: texts -> tokens of each, with the special ones; None: characters stand for tokens.
        query_max_len, passage_max_len: limits of what the encoder reads, in tokens; None: not looked at. A text is
            measured without an instruction, and of more than MAX_SAMPLE texts an evenly spread sample is.
    """
    hits, norm = _Hits(), functools.cache(normalize_text)
    first_row: dict[str, int] = {}  # of each text
    asked: defaultdict[str, set[str]] = defaultdict(set)  # normalized query -> its positives in all rows
    askers: defaultdict[str, set[str]] = defaultdict(set)  # normalized positive -> the queries that it answers
    for number, row in enumerate(rows, 1):
        for text in (row["query"], *row["pos"], *(row.get("neg") or ())):
            first_row.setdefault(text, number)
        asked[norm(row["query"])].update(map(norm, row["pos"]))
        for text in row["pos"]:
            askers[norm(text)].add(norm(row["query"]))
    passages = [text for row in rows for text in (*row["pos"], *(row.get("neg") or ()))]
    _check_each_row(rows, norm, asked, likeness or Likeness(list(dict.fromkeys(passages))), hits)
    _check_scores(rows, hits)
    _check_texts(first_row, askers, hits)
    if against is not None:
        _check_leaks(against, norm, asked, askers, hits)
    for kind, limit, texts in (
        ("queries", query_max_len, [row["query"] for row in rows]),
        ("passages", passage_max_len, passages),
    ):
        if limit is not None:
            _check_lengths(kind, limit, list(dict.fromkeys(texts)), count_tokens, first_row, hits)
    return hits.findings()


def summary_lines(findings: Iterable[Finding]) -> list[str]:
    """For a terminal: each finding, what to do, and two examples."""
    lines = []
    for finding in findings:
        lines += [f"{finding.severity.upper():<9}{finding.message}", f"{'':<9}-> {finding.remedy}"]
        for example in finding.examples[:2]:
            lines.append(f"{'':<12}" + " | ".join(f"{name} {_clip(value, 50)}" for name, value in example.items()))
    return lines or ["Nothing to mend was found."]


def _check_each_row(
    rows: Sequence[Row], norm: Callable[[str], str], asked: dict[str, set[str]], likeness: Likeness, hits: _Hits
) -> None:
    most_negatives = max((len(row.get("neg") or ()) for row in rows), default=0)
    seen_rows: set[tuple[object, ...]] = set()
    seen_queries: set[str] = set()
    for number, row in enumerate(rows, 1):
        query = norm(row["query"])
        positives, negatives = list(map(norm, row["pos"])), list(map(norm, row.get("neg") or ()))
        hits.total.update({"rows": 1, "positives": len(positives), "negatives": len(negatives)})
        place = {"row": number, "query": row["query"]}
        known = set(positives)
        key = (query, row.get("prompt"), tuple(positives), tuple(negatives))
        if key in seen_rows:
            hits.add("identical_rows", **place)
        elif query in seen_queries:
            hits.add("repeated_queries", **place)
        seen_rows.add(key)
        seen_queries.add(query)
        repeated = [
            text for of in (positives, negatives) if len(set(of)) < len(of) for text in of if of.count(text) > 1
        ]
        for name, found in (
            ("repeated_texts", repeated),
            ("contradictions", [text for text in negatives if text in asked[query]]),
            ("query_among_negatives", query in negatives),
            ("positive_is_query", query in known),
            ("no_negatives", not negatives),
            ("uneven_negatives", 0 < len(negatives) < most_negatives),
        ):
            if found:
                hits.add(name, **place, **({"text": found[0]} if isinstance(found, list) else {}))
        for text in positives:
            if len(text) < SHORT:
                hits.add("short_positives", **place, text=text)
        others = [text for text in negatives if text not in known]
        stack, near = likeness.stack(others), dict[int, str]()
        for text in dict.fromkeys(positives):
            for i in np.flatnonzero(likeness.near_duplicates(text, stack, NEAR_TEXT)).tolist():
                if not likeness.lacks_subject(query, text, others[i]):
                    near.setdefault(i, text)
        for i, text in sorted(near.items()):
            hits.add("near_contradictions", **place, positive=text, negative=others[i])


def _check_scores(rows: Sequence[Row], hits: _Hits) -> None:
    """What the teacher's scores say, where any row has some."""
    some = any(row.get("pos_scores") is not None or row.get("neg_scores") is not None for row in rows)
    for number, row in enumerate(rows, 1) if some else ():
        of_pos, of_neg, texts = row.get("pos_scores"), row.get("neg_scores") or [], row.get("neg") or []
        place = {"row": number, "query": row["query"]}
        if of_pos is None or len(of_neg) < len(texts):
            hits.add("scores_missing", **place)
            continue
        hits.total.update({"scored rows": 1, "scored negatives": len(of_neg)})
        if len(of_pos) + len(of_neg) > 1 and len({*of_pos, *of_neg}) == 1:
            hits.add("scores_constant", **place, score=of_pos[0])
        lowest = min(of_pos)
        for text, score in zip(texts, of_neg, strict=True):
            if score > lowest:
                hits.add("scores_above", **place, text=text, score=score, lowest_positive=lowest)


def _check_texts(first_row: dict[str, int], askers: dict[str, set[str]], hits: _Hits) -> None:
    hits.total.update({"different texts": len(first_row), "different positives": len(askers)})
    for positive, queries in askers.items():
        if len(queries) >= HUB:
            hits.add("hubs", text=positive, queries=len(queries), query=min(queries))
    for text, number in first_row.items():
        for name, found in (
            ("empty_texts", not any(map(str.isalnum, text))),
            ("replacement_characters", "\ufffd" in text),
            ("mojibake", _MOJIBAKE.search(text)),
        ):
            if found:
                hits.add(name, row=number, text=text)


def _check_leaks(
    against: Sequence[Row],
    norm: Callable[[str], str],
    asked: dict[str, set[str]],
    askers: dict[str, set[str]],
    hits: _Hits,
) -> None:
    """Test rows whose query, or nearly, or whose positive is in the training data."""
    names, near = list(asked), dict[int, str]()
    others = [i for i, row in enumerate(against) if norm(row["query"]) not in asked]
    likeness = Likeness([*names, *(against[i]["query"] for i in others)])
    stack = likeness.stack(names)
    for i in others:
        found = np.flatnonzero(likeness.same_questions(against[i]["query"], stack, NEAR_QUERY))
        if len(found):
            near[i] = names[found[0]]
    hits.total["test rows"] = len(against)
    for i, row in enumerate(against):
        place = {"row": i + 1, "query": row["query"]}
        if i in near:
            hits.add("near_shared_queries", **place, training_query=near[i])
        elif norm(row["query"]) in asked:
            hits.add("shared_queries", **place)
        if shared := [text for text in row["pos"] if norm(text) in askers]:
            hits.add("shared_positives", **place, text=shared[0])


def _check_lengths(
    kind: str,
    limit: int,
    texts: list[str],
    count_tokens: Callable[[list[str]], Sequence[int]] | None,
    first_row: dict[str, int],
    hits: _Hits,
) -> None:
    step = max(1, -(-len(texts) // MAX_SAMPLE))
    sample = texts[::step]
    lengths = count_tokens(sample) if count_tokens else [len(text) + SPECIAL for text in sample]
    hits.total[f"different {kind}"] = len(sample)
    for text, length in zip(sample, lengths, strict=True):
        if length > limit:
            hits.add(f"{kind}_cut", row=first_row[text], tokens=length, text=text)
    guess = "" if count_tokens else " by an estimate (a character counts as a token)"
    of_sample = ", of a sample" if step > 1 else ""
    hits.more[f"{kind}_cut"] = f"{of_sample}; {limit} are read, the longest has {max(lengths, default=0):,}{guess}"


def _clip(value: Any, width: int = 120) -> Any:
    """A text in one line, cut to `width` characters."""
    if not isinstance(value, str):
        return round(value, 4) if isinstance(value, float) else value
    text = " ".join(value.split())
    return text if len(text) <= width else text[: width - 1] + "…"
