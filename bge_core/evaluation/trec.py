"""TREC's files: qrels and runs, read and written."""

import itertools
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from bge_core import UserError
from bge_core.files import records
from bge_core.files.atomic import atomic_path

logger = logging.getLogger(__name__)


Qrels = dict[str, dict[str, int]]

_BEIR_HEADER = ["query-id", "corpus-id", "score"]
_QRELS_COLUMNS = "question 0 document grade; or begin with the header query-id, corpus-id, score, with tabs between"
_RUN_COLUMNS = "question Q0 document rank score tag"


def refuse_without_positives(name: str, judged: Iterable[Mapping[str, int]]) -> None:
    """UserError where no question has a grade above 0; `name` says where they stand."""
    if not any(grade > 0 for grades in judged for grade in grades.values()):
        raise UserError(f"{name}: no question has a positive, that is a score above 0; give qrels that have some")


def read_qrels(path: str | Path) -> Qrels:
    """The grades of a TREC qrels file (`question 0 document grade`), or of BEIR's, which begins with a header.

    Args:
        path: the file. BEIR's header is query-id, corpus-id, score, with tabs between.

    Returns:
        {question: {document: grade}} in the file's order; grades below 0 are kept.

    Raises:
        UserError: no such file, no line in it, or bad lines (the first ten are named): another number of columns, a
            grade that is no integer, or two grades of one document.

    Source: the formats of trec_eval 9, and of BEIR's data_loader.py.
    """
    qrels: Qrels = {}
    bad = records.BadLines()
    first = next(_lines(path), (0, ""))[1]
    layout: tuple[Any, ...] = (4, _QRELS_COLUMNS)
    if first.split() == _BEIR_HEADER:
        layout = (3, "as the header says, none of them empty", "\t" if "\t" in first else None, 1)
    for number, (question, *_, document, text) in _table(path, bad, *layout):
        known = qrels.setdefault(question, {})
        if not text.removeprefix("-").isdecimal():
            bad.add(path, number, f"the score is {text!r}; it must be an integer, 0 for not relevant")
        elif known.setdefault(document, int(text)) != int(text):
            bad.add(path, number, f"the score is {text}, but {known[document]} on an earlier line; keep one of them")
    return qrels


def read_run(path: str | Path) -> dict[str, list[tuple[str, float]]]:
    """The rankings of a TREC run file (`question Q0 document rank score tag`), in trec_eval's order.

    That is: by decreasing score, where scores equal in single precision tie; ties by decreasing document id. The rank
    column counts for nothing.

    Returns:
        {question: [(document, score in single precision)], best first}, the questions in the file's order.

    Raises:
        UserError: no such file, no line in it, or bad lines (the first ten are named): another number of columns, a
            score that is no finite number, or a document that a question has twice.

    Source: trec_eval 9, form_res_rels.c (comp_sim_docno) and get_trec_results.c.
    """
    found: dict[str, dict[str, float]] = {}
    bad = records.BadLines()
    for number, (question, _, document, _, text, _) in _table(path, bad, 6, _RUN_COLUMNS):
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            bad.add(path, number, f"the score is {text!r}; it must be a finite number")
        elif document in found.setdefault(question, {}):
            bad.add(path, number, f"question {question!r} has document {document!r} on an earlier line, too; keep one")
        else:
            found[question][document] = score
    return {question: _ordered(ranking) for question, ranking in found.items()}


def run_name(path: str | Path) -> str:
    """What a run calls itself: the tag, the last column, of its first line. UserError where there is no line."""
    return next(_table(path, records.BadLines(), 6, _RUN_COLUMNS))[1][-1]


def run_as_ranking(
    run: Mapping[str, Sequence[tuple[str, float]]], qrels: Mapping[str, Mapping[str, int]]
) -> tuple[list[str], list[np.ndarray], list[dict[int, int]], list[list[int]]]:
    """A run in the form that `metrics.per_query_metrics` scores: documents become rows of a corpus, all of the run's.

    Every question of the qrels counts (trec_eval -c): one that the run lacks has an empty ranking. What the run has
    without a judgement is left out, with a warning. White space in their ids counts as %20, which `write_run` writes.

    Args:
        run: see `read_run`.
        qrels: see `read_qrels`; a grade below 0 counts as 0.

    Returns:
        query_ids: (Q,) in the order of the qrels.
        ranked: (Q,) of (K,) int64, each question's rows, the best first.
        relevant, missing: (Q,) as in `RetrievalTask`; missing are positives that the run has for no question.

    Raises:
        UserError: no question of the run is judged, or none has a positive.
    """
    qrels = {_as_word(name): {_as_word(one): grade for one, grade in of.items()} for name, of in qrels.items()}
    refuse_without_positives("the qrels", qrels.values())
    unjudged = [question for question in run if question not in qrels]
    if len(unjudged) == len(run):
        raise UserError(f"the qrels judge none of the run's {len(run)} questions; give those of the run's test set")
    if unjudged:
        logger.warning(
            "the qrels do not judge %d questions of the run; they are left out; first: %s",
            len(unjudged),
            ", ".join(unjudged[:3]),
        )
    if num_empty := sum(question not in run for question in qrels):
        logger.warning("the run lacks %d judged questions, which score 0", num_empty)
    found = [[document for document, _ in run.get(question, ())] for question in qrels]
    row_of = {document: row for row, document in enumerate(dict.fromkeys(itertools.chain.from_iterable(found)))}
    return (
        list(qrels),
        [np.array([row_of[document] for document in documents], dtype=np.int64) for documents in found],
        [{row_of[one]: max(grade, 0) for one, grade in of.items() if one in row_of} for of in qrels.values()],
        [[grade for one, grade in of.items() if one not in row_of and grade > 0] for of in qrels.values()],
    )


def _ordered(ranking: Mapping[str, float]) -> list[tuple[str, float]]:
    scores: list[float] = np.array(list(ranking.values()), dtype=np.float32).tolist()
    return [(document, score) for score, document in sorted(zip(scores, ranking, strict=True), reverse=True)]


def _table(
    path: str | Path, bad: records.BadLines, num_columns: int, layout: str, separator: str | None = None, skip: int = 0
) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number from 1, columns) after the first `skip` lines; after the last one refuse what is in `bad`."""
    number = 0
    for number, line in itertools.islice(_lines(path), skip, None):
        columns = line.split(separator)
        if len(columns) == num_columns and all(columns):
            yield number, columns
        else:
            bad.add(path, number, f"has {len(columns)} columns ({line[:60]!r}); write {num_columns}: {layout}")
    bad.refuse()
    if not number:
        raise UserError(f"{path}: holds no line; write {num_columns} columns: {layout}")


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line) of a text file; blank lines are skipped."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; name a file") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: not UTF-8 somewhere after line {number}; convert it, as with iconv -t UTF-8"
        ) from None


def write_run(
    path: str | Path,
    name: str,
    query_ids: Sequence[str],
    corpus_ids: Sequence[str],
    rows: np.ndarray,
    scores: np.ndarray,
    judged_ids: Sequence[Mapping[int, str]] = (),
) -> None:
    """Write a ranking as a TREC run of this name, whole or not at all.

    Args:
        query_ids, corpus_ids: (Q,), (N,). White space in them becomes %20, as in an address of the web.
        rows, scores: (Q, k) of the corpus, best first; -1: the corpus has no more. Ties are written as scores that
            fall, for trec_eval would order them by id.
        judged_ids: (Q,) of each question {row: id} of documents that stand there under the id of an equal text, but are
            judged under their own; empty: there is none.
    """
    own_ids = judged_ids or [{}] * len(query_ids)
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for query_id, found, of, own in zip(query_ids, rows, scores, own_ids, strict=True):
            for place, (row, score) in enumerate(zip(found, decreasing_scores(of), strict=True), start=1):
                if row >= 0:
                    document = own.get(int(row), corpus_ids[row])
                    columns = (query_id, "Q0", document, str(place), f"{score:.9g}", name)
                    file.write(" ".join(map(_as_word, columns)) + "\n")


def _as_word(name: str) -> str:
    return re.sub(r"\s", lambda space: quote(space[0]), name)


def decreasing_scores(scores: np.ndarray) -> np.ndarray:
    """The scores in single precision, each at least a last bit below the one before."""
    lower = scores.astype(np.float32)
    for i in range(1, len(lower)):
        lower[i] = min(lower[i], np.nextafter(lower[i - 1], np.float32(-np.inf)))
    return lower
