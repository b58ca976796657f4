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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bge_core import UserError
from bge_core.evaluation.corpus import (
    Corpus,
    Judged,
    corpus_file,
    keep_judged_apart,
    make_corpus,
    own_row,
    read_corpus,
    read_with_ids,
    resolve,
)  # fmt: skip
from bge_core.evaluation.trec import read_qrels, refuse_without_positives
from bge_core.files import records
from bge_core.files.records import Row
from bge_core.files.sources import describe_source, is_hub_name
from bge_core.files.text import text_id

logger = logging.getLogger(__name__)

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class RetrievalTask:
    """A test set: Q questions, a corpus of N texts, and the grades of those that were judged.

    Args:
        name: the file's stem or the folder's name; of a split that was named, both, as scifact-dev.
        query_ids, queries: (Q,) equal questions of rows without ids are one, others stay apart.
        corpus_ids, corpus: (N,) each normalized text once (the first of equal ones).
        relevant: (Q,) for each question {corpus row: grade}.
        missing: (Q,) for each question the grades of the positives that the corpus lacks.
        missing_texts: these positives, each once; of a BEIR folder their ids.
        query_facts: (Q,) what a row says beside: "source" (a text; the column may be called dataset) and "answer" (a
            text or a list of them), as far as it is there.
        own_rows: (Q,) the row of the corpus that is the question itself, which is no hit; -1: there is none. Empty:
            no question has one.
        query_prompts: (Q,) what stands before a question in place of the query instruction; None: that. Empty: no
            question has a prompt of its own.
        judged_ids: (Q,) for each question {row: id} of positives that the corpus holds as another document of the same
            text. Empty: it holds none so.
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
    query_prompts: list[str | None] = field(default_factory=list)
    judged_ids: list[dict[int, str]] = field(default_factory=list)

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
class _Question:
    """A question and what is right for it; `facts` and `prompt` as in `RetrievalTask`."""

    id: str
    text: str
    judged: Judged
    facts: Row = field(default_factory=dict)
    prompt: str | None = None


ReadCorpus = Callable[[tuple[str, ...], bool], Corpus]


def load_task(val_data: str | Path, corpus: Paths | None = None) -> RetrievalTask:
    """Read one test set; see `load_tasks`."""
    return load_tasks([val_data], _as_list(corpus))[0]


def load_tasks(val_data: Sequence[str | Path], corpus: Sequence[str | Path] | None = None) -> list[RetrievalTask]:
    """Read test sets.

    Rows that ask the same without ids of their own (and under the same prompt) are one question with all their
    positives. Of a BEIR folder the questions that have a line in the qrels are the test set; title and text are joined
    by a space. Its split is test.tsv, or the only file there is. A grade below 0 counts as 0. A text that stands under
    several ids is one document, which has the largest of their grades, and of a question that has several of them as
    its positives as many. A text of the corpus that is the question itself, and not judged right, is no hit. Warned of
    and counted: empty questions, repeated texts, positives that the corpus lacks (misses), judged questions that there
    are not.

    Args:
        val_data: a file of rows, a dataset of the hub or a BEIR folder each.
        corpus: files of text and optional id and title, folders of them, or BEIR folders. Of one test set all of them
            together; of several sets one for all, or one for each. None: each set's own, corpus.jsonl of a BEIR folder,
            otherwise the distinct `pos` and `neg` texts.

    Returns:
        A task for each, in order. Equal names get -2, -3 and so on. Sets with the same corpus share its lists.

    Raises:
        UserError: a file is missing, empty or has bad lines, an id stands twice, no question has a positive, or none in
            the corpus, the qrels are those of another test set or corpus, or the number of corpora does not fit.

    Source: BEIR's folders, beir/datasets/data_loader.py (GenericDataLoader) of https://github.com/beir-cellar/beir.
    """
    paths = [str(path) for path in val_data]
    read = functools.cache(read_corpus)  # what several sets search is read once
    names, corpora = make_unique(map(_name, paths)), corpora_of(paths, corpus)
    return [_load(*one, read) for one in zip(names, paths, corpora, strict=True)]


def corpora_of(val_data: Sequence[str], corpus: Sequence[str | Path] | None) -> list[tuple[str, ...]]:
    """The names of each test set's corpus, none: its own; see `load_tasks`. UserError: their number does not fit."""
    given = [str(path) for path in corpus or ()]
    if len(val_data) == 1 or not given:
        return [tuple(given)] * len(val_data)
    if len(given) not in (1, len(val_data)):
        remedy = "name one for all, one for each (a folder may hold several files), or none"
        raise UserError(f"{len(given)} corpora for {len(val_data)} test sets: {remedy}")
    return [(path,) for path in (given if len(given) > 1 else given * len(val_data))]


def _as_list(paths: Paths | None) -> list[str | Path]:
    return [paths] if isinstance(paths, (str, Path)) else list(paths or ())


def make_unique(names: Iterable[str]) -> list[str]:
    """The names in order; of equal ones the later get a number: m, m-2, m-3."""
    unique: list[str] = []
    for name in names:
        numbered = (f"{name}-{i}" for i in itertools.count(2))
        unique.append(next(one for one in itertools.chain([name], numbered) if one not in unique))
    return unique


def describe_task(task: RetrievalTask, val_data: str | Path, corpus: Paths | None = None) -> list[Row]:
    """A manifest's entries of what `task` was read from; the arguments are those of `load_task`."""
    files = [(str(val_data), len(task.queries))]
    if beir := _beir_files(str(val_data)):
        num_judged = sum(map(len, task.relevant)) + sum(map(len, task.missing))
        files = [(str(beir[0] / "queries.jsonl"), len(task.queries)), (str(beir[1]), num_judged)]
    found = _as_list(corpus) or (_as_list(beir[0]) if beir else [])
    files += [(corpus_file(str(path)), len(task.corpus)) for path in found]
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


def _load(name: str, path: str, corpus: tuple[str, ...], read: ReadCorpus) -> RetrievalTask:
    beir = _beir_files(path)
    questions, passages = _read_beir(*beir, corpus, read) if beir else _read_rows(path, corpus, read)
    path = str(beir[1]) if beir else path
    if num_empty := sum(not question.text.strip() for question in questions):
        logger.warning("%s: %d questions are empty; they are scored like the others", path, num_empty)
    relevant, missing, lacking, judged_ids = resolve([question.judged for question in questions], passages)
    if not any(grade > 0 for grades in relevant for grade in grades.values()):
        remedy = "name the corpus that holds them"
        remedy += "" if beir else "; a positive is the text of a passage, with or without its title"
        raise UserError(
            f"{passages.name}: holds none of the {len(lacking)} positives of {path}, as {lacking[0][:60]!r}: {remedy}"
        )
    if lacking:
        first = "".join(f"\n  {text[:60]}" for text in lacking[:3])
        text = "%s lacks %d positives of %s, which count as misses; first:%s"
        logger.warning(text, passages.name, len(lacking), path, first)
    own_rows = [own_row(passages, of.text, of.id, rows) for of, rows in zip(questions, relevant, strict=True)]
    if num_own := sum(row >= 0 for row in own_rows):
        logger.info("%s: %d questions are themselves in the corpus; that is no hit", name, num_own)
    prompts = [question.prompt for question in questions]
    if num_prompts := sum(prompt is not None for prompt in prompts):
        logger.info("%s: %d questions have a prompt, which replaces the query instruction", name, num_prompts)
    return RetrievalTask(
        name,
        [question.id for question in questions],
        [question.text for question in questions],
        passages.ids,
        passages.texts,
        relevant,
        missing,
        lacking,
        [question.facts for question in questions],
        own_rows if num_own else [],
        prompts if num_prompts else [],
        judged_ids if any(judged_ids) else [],
    )


def _read_rows(path: str, corpus: tuple[str, ...], read: ReadCorpus) -> tuple[list[_Question], Corpus]:
    """The questions and the corpus of rows of query and pos."""
    rows = list(read_with_ids([path], records.check_evaluation_row, "id"))
    found: dict[Any, _Question] = {}
    for name, row in rows:
        prompt, asked = row.get("prompt"), text_id(row["query"])
        question = _Question(name, row["query"], {}, _facts(row), prompt)
        question = found.setdefault((asked, prompt) if row.get("id") is None else name, question)
        question.judged.update({text_id(text): (1, text) for text in row["pos"]})
    if len(found) < len(rows):
        text = "%s: %d rows ask again what another row asks; they are one question with all its positives"
        logger.info(text, path, len(rows) - len(found))
    if num_apart := len(found) - len({(text_id(of.text), of.prompt) for of in found.values()}):
        text = "%s: %d questions are asked again under another id; they stay apart, each with its own positives"
        logger.warning(text, path, num_apart)
    if corpus:
        return list(found.values()), read(corpus, False)
    texts = records.distinct_texts((row for _, row in rows), "pos", "neg")
    return list(found.values()), make_corpus(path, [str(i) for i in range(len(texts))], texts, texts)


def _read_beir(folder: Path, file: Path, corpus: tuple[str, ...], read: ReadCorpus) -> tuple[list[_Question], Corpus]:
    """The same of a BEIR folder and its qrels; the questions are those that the qrels judge."""
    queries, qrels = folder / "queries.jsonl", read_qrels(file)
    asked = [pair for pair in read_with_ids([str(queries)], records.check_beir_row, "_id") if pair[0] in qrels]
    if not asked:
        num = len(qrels)
        raise UserError(
            f"{file}: judges {num} questions (column query-id), none of {queries}: qrels of another test set"
        )
    if unknown := qrels.keys() - {name for name, _ in asked}:
        text = "%s judges %d questions that %s lacks; they are left out, as %s"
        logger.warning(text, file, len(unknown), queries, min(unknown))
    refuse_without_positives(str(file), (qrels[name] for name, _ in asked))
    questions = [
        _Question(name, row["text"], {key: (grade, key) for key, grade in qrels[name].items()}, _facts(row))
        for name, row in asked
    ]
    passages = read(corpus or (str(folder),), not corpus)
    documents = {key for question in questions for key in question.judged}
    if documents.isdisjoint(passages.row_of):
        raise UserError(
            f"{file}: none of its {len(documents)} documents (column corpus-id) is in {passages.name}: these are"
            " qrels of another corpus; name the corpus that they judge"
        )
    return questions, keep_judged_apart(passages, (question.judged for question in questions))


def _facts(row: Row) -> Row:
    source = next((row[name] for name in ("source", "dataset") if isinstance(row.get(name), str)), None)
    answer = row.get("answer")
    if not isinstance(answer, str) and not (isinstance(answer, list) and all(isinstance(one, str) for one in answer)):
        answer = None
    return {name: value for name, value in (("source", source), ("answer", answer)) if value}
