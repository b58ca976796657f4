"""Test sets: questions, a corpus and which of its texts are right.

data.jsonl, data.parquet, org/name:test   rows of query and pos; a positive is found by its text, as in FlagEmbedding
folder                                    a BEIR folder: corpus.jsonl, queries.jsonl, qrels/*.tsv; found by its id
folder/qrels/dev.tsv                      the same, with this split

Q: questions. N: rows of the corpus. K: documents of a ranking. A grade says how right a text is: 1 and more is a
positive, 0 is judged and not relevant.
"""

import functools
import itertools
import logging
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bge_core import UserError
from bge_core.evaluation.trec import read_qrels, refuse_without_positives
from bge_core.files import records
from bge_core.files.records import Check, Row
from bge_core.files.sources import describe_source, is_hub_name, read_source
from bge_core.files.text import text_id

logger = logging.getLogger(__name__)

Key = int | str  # what a judgement names: a text, by the hash of its normalized form, or the document of that id
Judged = dict[Key, tuple[int, str]]  # of a question: key -> grade, and how a message shows it


@dataclass(frozen=True)
class RetrievalTask:
    """A test set: Q questions, a corpus of N texts, and the grades of those that were judged.

    Args:
        name: the file's stem or the folder's name; of a split that was named, both, as scifact-dev.
        query_ids, queries: (Q,) equal questions stay separate.
        corpus_ids, corpus: (N,) each normalized text once (the first of equal ones).
        relevant: (Q,) for each question {corpus row: grade}.
        missing: (Q,) for each question the grades of the positives that the corpus lacks.
        missing_texts: these positives, each once; of a BEIR folder their ids.
        query_facts: (Q,) what a row says beside: "source" (a text; the column may be called dataset) and "answer" (a
            text or a list of them), as far as it is there.
        own_rows: (Q,) the row of the corpus that is the question itself, which is no hit; -1: there is none. Empty:
            no question has one.
    """

    name: str
    query_ids: list[str]
    queries: list[str]
    corpus_ids: list[str]
    corpus: list[str]
    relevant: list[dict[int, int]]
    missing: list[list[int]]
    missing_texts: list[str]
    query_facts: list[dict[str, Any]]
    own_rows: list[int] = field(default_factory=list)

    def depth(self, k: int) -> int:
        """How many hits to search, so that k remain after `drop_own`; one above the corpus may be asked for."""
        return min(k, len(self.corpus)) + bool(self.own_rows)

    def drop_own(self, scores: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(Q, K) -> (Q, K - 1) without `own_rows`, or else the last hit; as they are where there are no such rows."""
        if not self.own_rows:
            return scores, rows
        order = np.argsort(rows == np.array(self.own_rows)[:, None], axis=1, kind="stable")[:, :-1]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


@dataclass(frozen=True)
class _Corpus:
    """`row_of` knows each text's hash and each id, those of the repeated texts included; `bodies` have no titles."""

    name: str
    ids: list[str]
    texts: list[str]
    bodies: list[str]
    row_of: dict[Key, int]


ReadCorpus = Callable[[str, bool], _Corpus]


def load_task(val_data: str | Path, corpus: str | Path | None = None) -> RetrievalTask:
    """Read one test set; see `load_tasks`."""
    return load_tasks([val_data], None if corpus is None else [corpus])[0]


def load_tasks(val_data: Sequence[str | Path], corpus: Sequence[str | Path] | None = None) -> list[RetrievalTask]:
    """Read test sets.

    Of a BEIR folder the questions that have a line in the qrels are the test set; title and text are joined by a space.
    Its split is test.tsv, or the only file there is. A grade below 0 counts as 0. Where equal texts were judged, the
    one that is kept gets the largest grade. As in BEIR, a document of a question's own id is no hit (ArguAna, Quora);
    here it must also have the question's text and not be judged right, for ids may be equal by chance. Warned of and
    counted: empty questions, repeated texts, positives that the corpus lacks (misses), judged questions that there are
    not.

    Args:
        val_data: a file of rows, a dataset of the hub or a BEIR folder each.
        corpus: files of text and optional id and title, or BEIR folders: one for all, or one for each set. None: each
            set's own, corpus.jsonl of a BEIR folder, otherwise the distinct `pos` and `neg` texts.

    Returns:
        A task for each, in order. Equal names get -2, -3 and so on. Sets with the same corpus share its lists.

    Raises:
        UserError: a file is missing, empty or has bad lines, an id stands twice, no question has a positive, the qrels
            are those of another test set or corpus, or the number of corpora does not fit.

    Source: BEIR's folders, beir/datasets/data_loader.py (GenericDataLoader) of https://github.com/beir-cellar/beir.
    """
    paths, corpora = [str(path) for path in val_data], [str(path) for path in corpus or [""]]
    corpora *= len(paths) if len(corpora) == 1 else 1
    if len(corpora) != len(paths):
        raise UserError(f"{len(corpora)} corpora for {len(paths)} test sets: name one for all, one for each, or none")
    read_corpus = functools.cache(_read_corpus)  # what several sets search is read once
    names = make_unique(map(_name, paths))
    return [_load(*one, read_corpus) for one in zip(names, paths, corpora, strict=True)]


def make_unique(names: Iterable[str]) -> list[str]:
    """The names in order; of equal ones the later get a number: m, m-2, m-3."""
    unique: list[str] = []
    for name in names:
        numbered = (f"{name}-{i}" for i in itertools.count(2))
        unique.append(next(one for one in itertools.chain([name], numbered) if one not in unique))
    return unique


def describe_task(task: RetrievalTask, val_data: str | Path, corpus: str | Path | None = None) -> list[Row]:
    """A manifest's entries of what `task` was read from; the arguments are those of `load_task`."""
    files = [(str(val_data), len(task.queries))]
    if beir := _beir_files(str(val_data)):
        num_judged = sum(map(len, task.relevant)) + sum(map(len, task.missing))
        files = [(str(beir[0] / "queries.jsonl"), len(task.queries)), (str(beir[1]), num_judged)]
    if found := corpus or (beir and beir[0]):
        files.append((_corpus_file(str(found)), len(task.corpus)))
    return [describe_source(file, num_rows) for file, num_rows in files]


def evaluation_command(models: Sequence[str], *runs: Mapping[str, Any]) -> str:
    """The command that compares models on the test set of the first of some runs that had one.

    Args:
        models: folders and hub names, the first compared with the others.
        runs: their settings. One without a test set may have left prepare.py's beside its training data. Where none is
            there, TEST.jsonl stands for it.
    """
    used = [(of["val_data"], of.get("val_corpus") or of.get("corpus") or "") for of in runs if of.get("val_data")]
    trained_on = [Path(data) for of in runs for data in of.get("train_data") or ()]
    folders = [data if data.is_dir() else data.parent for data in trained_on]
    used += [(str(folder / "test.jsonl"), str(folder / "corpus.jsonl")) for folder in folders]
    here = ((val, corpus) for val, corpus in used if os.path.exists(val) or is_hub_name(val))
    val_data, corpus = next(here, ("TEST.jsonl", ""))
    words = ["--encoder", *models, "--val_data", val_data]
    words += ["--corpus", corpus] if os.path.exists(corpus) or is_hub_name(corpus) else []
    reports = itertools.chain(["outputs/report"], (f"outputs/report-{i}" for i in itertools.count(2)))
    words += ["--add_instruction", "--output_dir", next(name for name in reports if not os.path.exists(name))]
    unknown = "  # name your test set for TEST.jsonl" if val_data == "TEST.jsonl" else ""
    return f"python evaluate.py {shlex.join(words)}{unknown}"


def _beir_files(path: str) -> tuple[Path, Path] | None:
    """The folder and the qrels of a BEIR set; None: it is none."""
    place = Path(path)
    if place.suffix == ".tsv" and place.parent.name == "qrels":
        return place.parent.parent, place
    if not place.is_dir():
        return None
    found = sorted((place / "qrels").glob("*.tsv"))
    test = [file for file in found if file.name == "test.tsv"] or found
    if not test or not (place / "queries.jsonl").is_file():
        raise UserError(f"{place}: lacks queries.jsonl or qrels/*.tsv of a BEIR folder; if you mean a file, name it")
    if len(test) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{place / 'qrels'}: holds no test.tsv, but {names}; name one, as {found[0]}")
    return place, test[0]


def _name(path: str) -> str:
    if is_hub_name(path):
        return path.split("/")[1].replace(":", "-")
    if not (beir := _beir_files(path)):
        return Path(path).stem
    folder = os.path.basename(os.path.abspath(beir[0]))
    return folder if Path(path).is_dir() else f"{folder}-{beir[1].stem}"


def _load(name: str, path: str, corpus: str, read_corpus: ReadCorpus) -> RetrievalTask:
    beir = _beir_files(path)
    pairs, judged, passages = _read_beir(*beir, corpus, read_corpus) if beir else _read_rows(path, corpus, read_corpus)
    path = str(beir[1]) if beir else path
    queries = [row["text" if beir else "query"] for _, row in pairs]
    if num_empty := sum(not query.strip() for query in queries):
        logger.warning("%s: %d questions are empty; they are scored like the others", path, num_empty)
    relevant, missing, lacking = _resolve(judged, passages.row_of)
    if lacking:
        first = "".join(f"\n  {text[:60]}" for text in lacking[:3])
        text = "%s lacks %d positives of %s, which count as misses; first:%s"
        logger.warning(text, passages.name, len(lacking), path, first)
    ids, facts = [one for one, _ in pairs], [_facts(row) for _, row in pairs]
    task = RetrievalTask(name, ids, queries, passages.ids, passages.texts, relevant, missing, lacking, facts)
    return replace(task, own_rows=_own_rows(task, passages)) if beir else task


def _read_rows(path: str, corpus: str, read_corpus: ReadCorpus) -> tuple[list[tuple[str, Row]], list[Judged], _Corpus]:
    """The (id, row) of each question, what is right for it, the corpus: rows of query and pos."""
    pairs = list(_read(path, records.check_evaluation_row, "id"))
    judged: list[Judged] = [{text_id(text): (1, text) for text in row["pos"]} for _, row in pairs]
    if corpus:
        return pairs, judged, read_corpus(corpus, False)
    texts = records.distinct_texts((row for _, row in pairs), "pos", "neg")
    return pairs, judged, _make_corpus(path, [str(i) for i in range(len(texts))], texts, texts)


def _read_beir(
    folder: Path, file: Path, corpus: str, read_corpus: ReadCorpus
) -> tuple[list[tuple[str, Row]], list[Judged], _Corpus]:
    """The same of a BEIR folder and its qrels; the questions are those that the qrels judge."""
    queries, qrels = folder / "queries.jsonl", read_qrels(file)
    pairs = [pair for pair in _read(str(queries), records.check_beir_row, "_id") if pair[0] in qrels]
    if not pairs:
        num = len(qrels)
        raise UserError(
            f"{file}: judges {num} questions (column query-id), none of {queries}: qrels of another test set"
        )
    if unknown := qrels.keys() - {name for name, _ in pairs}:
        text = "%s judges %d questions that %s lacks; they are left out, as %s"
        logger.warning(text, file, len(unknown), queries, min(unknown))
    refuse_without_positives(str(file), (qrels[name] for name, _ in pairs))
    judged: list[Judged] = [{key: (grade, key) for key, grade in qrels[name].items()} for name, _ in pairs]
    passages = read_corpus(corpus or str(folder), not corpus)
    documents = {key for grades in judged for key in grades}
    if documents.isdisjoint(passages.row_of):
        raise UserError(
            f"{file}: none of its {len(documents)} documents (column corpus-id) is in {passages.name}: these are"
            " qrels of another corpus; name the corpus that they judge"
        )
    return pairs, judged, passages


def _own_rows(task: RetrievalTask, corpus: _Corpus) -> list[int]:
    """See `RetrievalTask.own_rows`."""
    rows = [corpus.row_of.get(one, -1) for one in task.query_ids]
    for i, (row, query) in enumerate(zip(rows, task.queries, strict=True)):
        same = text_id(query) in map(text_id, (corpus.texts[row], corpus.bodies[row]))
        if not same or not query.strip() or task.relevant[i].get(row, 0) > 0:
            rows[i] = -1
    if num_own := sum(row >= 0 for row in rows):
        logger.info("%s: %d questions are in the corpus under their own id; that is no hit", task.name, num_own)
    return rows if num_own else []


def _resolve(
    judged: Sequence[Judged], row_of: Mapping[Key, int]
) -> tuple[list[dict[int, int]], list[list[int]], list[str]]:
    """For each question {row: grade} and the grades of the positives without a row; these positives, each once."""
    relevant: list[dict[int, int]] = [{} for _ in judged]
    missing: list[list[int]] = [[] for _ in judged]
    lacking: dict[Key, str] = {}
    for grades, found, not_found in zip(judged, relevant, missing, strict=True):
        for key, (grade, shown) in grades.items():
            if key in row_of:
                found[row_of[key]] = max(found.get(row_of[key], 0), grade)
            elif grade > 0:
                not_found.append(grade)
                lacking[key] = shown
    return relevant, missing, list(lacking.values())


def _facts(row: Row) -> Row:
    source = next((row[name] for name in ("source", "dataset") if isinstance(row.get(name), str)), None)
    answer = row.get("answer")
    if not isinstance(answer, str) and not (isinstance(answer, list) and all(isinstance(one, str) for one in answer)):
        answer = None
    return {name: value for name, value in (("source", source), ("answer", answer)) if value}


def _read(path: str, check: Check, *fields: str) -> Iterator[tuple[str, Row]]:
    """Yield (id, row): the first of `fields` that the row has, otherwise the line's number from 0.

    Raises:
        UserError: see `read_source`; after the last row: an id stands on several lines.
    """
    line_of: dict[str, int] = {}
    bad = records.BadLines()
    for (_, number), row in read_source(path, check, streaming=False):
        field = next((field for field in fields if row.get(field) is not None), None)
        name = str(row[field]) if field else str(number - 1)
        if not name.strip():
            bad.add(path, number, f"{field} is empty; give it a value, or leave it out")
        elif line_of.setdefault(name, number) == number:
            yield name, row
        else:
            remedy = "make ids unique" if field == "_id" else "make ids unique, or leave them out"
            bad.add(path, number, f"the id {name!r} is that of line {line_of[name]}, too; {remedy}")
    bad.refuse()


def _corpus_file(path: str) -> str:
    return str(Path(path) / "corpus.jsonl") if Path(path).is_dir() else path


def _read_corpus(path: str, is_beir: bool) -> _Corpus:
    def check(row: Row) -> str | None:
        return records.check_beir_row(row) if is_beir or "_id" in row else records.check_corpus_row(row)

    ids, texts, bodies = [], [], []
    for name, row in _read(_corpus_file(path), check, "_id", "id"):
        text = records.passage_text(row)
        ids.append(name)
        texts.append(text.strip() if "_id" in row else text)
        bodies.append(row["text"] or "")
    return _make_corpus(_corpus_file(path), ids, texts, bodies)


def _make_corpus(name: str, ids: list[str], texts: list[str], bodies: list[str]) -> _Corpus:
    row_of: dict[Key, int] = {}
    kept: list[int] = []
    for i, text in enumerate(texts):
        row_of[ids[i]] = row = row_of.setdefault(text_id(text), len(kept))
        if row == len(kept):
            kept.append(i)
    if len(kept) < len(texts):
        logger.warning("%s: %d repeated texts were left out of the corpus", name, len(texts) - len(kept))
    ids, texts, bodies = ([of[i] for i in kept] for of in (ids, texts, bodies))
    return _Corpus(name, ids, texts, bodies, row_of)
