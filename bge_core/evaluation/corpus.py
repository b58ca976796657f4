"""The corpus of a test set: texts with their ids, and where a judgement finds them. N: rows of the corpus."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bge_core.files import records
from bge_core.files.records import Check, Row
from bge_core.files.sources import read_source
from bge_core.files.text import text_id

logger = logging.getLogger(__name__)

Key = int | str  # what a judgement names: a text, by the hash of its normalized form, or the document of that id
Judged = dict[Key, tuple[int, str]]  # of a question: key -> grade, and how a message shows it


@dataclass(frozen=True)
class Corpus:
    """N texts.

    Args:
        name: of its files, for messages.
        ids, texts: (N,) each normalized text once (the first of equal ones), a title before its text.
        row_of: each text's hash and each id, those of the repeated texts included.
        rows_of_body: hash of a text without its title -> its rows, where it has one.
    """

    name: str
    ids: list[str]
    texts: list[str]
    row_of: dict[Key, int]
    rows_of_body: dict[Key, list[int]]

    def rows(self, key: Key) -> list[int]:
        """Where that document or text is; a text also without its title, which several documents may share."""
        return [self.row_of[key]] if key in self.row_of else self.rows_of_body.get(key, [])


def read_corpus(paths: Sequence[str], is_beir: bool) -> Corpus:
    """One corpus of all these files, datasets of the hub and folders; of a folder corpus.jsonl, if it has one.

    Raises:
        UserError: see `read_with_ids`.
    """

    def check(row: Row) -> str | None:
        return records.check_beir_row(row) if is_beir or "_id" in row else records.check_corpus_row(row)

    ids, texts, bodies = [], [], []
    files = [corpus_file(path) for path in paths]
    for name, row in read_with_ids(files, check, "_id", "id"):
        text = records.passage_text(row)
        ids.append(name)
        texts.append(text.strip() if "_id" in row else text)
        bodies.append(row["text"] or "")
    return make_corpus(", ".join(files), ids, texts, bodies)


def corpus_file(path: str) -> str:
    """The corpus.jsonl of a folder that has one; otherwise the path."""
    inside = Path(path) / "corpus.jsonl"
    return str(inside) if inside.is_file() else path


def make_corpus(name: str, ids: list[str], texts: list[str], bodies: list[str]) -> Corpus:
    """The corpus of these texts, the repeated ones left out with a warning; `bodies` are the texts without titles."""
    row_of: dict[Key, int] = {}
    rows_of_body: defaultdict[Key, list[int]] = defaultdict(list)
    kept: list[int] = []
    for i, (text, body) in enumerate(zip(texts, bodies, strict=True)):
        row_of[ids[i]] = row = row_of.setdefault(text_id(text), len(kept))
        if row == len(kept):
            kept.append(i)
            if body.strip() and body.strip() != text.strip():
                rows_of_body[text_id(body)].append(row)
    if len(kept) < len(texts):
        logger.warning("%s: %d repeated texts were left out of the corpus", name, len(texts) - len(kept))
    return Corpus(name, [ids[i] for i in kept], [texts[i] for i in kept], row_of, dict(rows_of_body))


def keep_judged_apart(corpus: Corpus, judged: Iterable[Judged]) -> Corpus:
    """The corpus with those repeated texts again of which a question has two as its positives: two are to be found."""
    again: dict[Key, None] = {}
    for grades in judged:
        alike: defaultdict[int, list[Key]] = defaultdict(list)
        for key, (grade, _) in grades.items():
            if grade > 0 and key in corpus.row_of:
                alike[corpus.row_of[key]].append(key)
        for row, keys in alike.items():
            stays = corpus.ids[row] if corpus.ids[row] in keys else keys[0]
            again |= {key: None for key in keys if key != stays}
    if not again:
        return corpus
    logger.info("%s: %d repeated texts stay, for a question has both as its positives", corpus.name, len(again))
    rows = dict(zip(again, range(len(corpus.ids), len(corpus.ids) + len(again)), strict=True))
    texts = [corpus.texts[corpus.row_of[key]] for key in again]
    return replace(corpus, ids=[*corpus.ids, *map(str, again)], texts=corpus.texts + texts, row_of=corpus.row_of | rows)


def resolve(
    judged: Sequence[Judged], corpus: Corpus
) -> tuple[list[dict[int, int]], list[list[int]], list[str], list[dict[int, str]]]:
    """Find the judged texts.

    Returns:
        For each question {row: grade}, and the grades of the positives without a row; these positives, each once; for
        each question {row: id}, where a document is found in the row of an equal text of another id.
    """
    relevant: list[dict[int, int]] = [{} for _ in judged]
    missing: list[list[int]] = [[] for _ in judged]
    judged_ids: list[dict[int, str]] = [{} for _ in judged]
    lacking: dict[Key, str] = {}
    for grades, found, not_found, names in zip(judged, relevant, missing, judged_ids, strict=True):
        for key, (grade, shown) in grades.items():
            rows = corpus.rows(key)
            for row in rows:
                found[row] = max(found.get(row, 0), grade)
                if isinstance(key, str) and grade > 0 and key != corpus.ids[row]:
                    names[row] = key
            if grade > 0 and not rows:
                not_found.append(grade)
                lacking[key] = shown
    return relevant, missing, list(lacking.values()), judged_ids


def read_with_ids(paths: Sequence[str], check: Check, *fields: str) -> Iterator[tuple[str, Row]]:
    """Yield (id, row): the first of `fields` that the row has, otherwise the line's number from 0, through all files.

    Raises:
        UserError: see `read_source`; after a file's last row: an id stands on several lines.
    """
    place_of: dict[str, tuple[str, int]] = {}
    lines_before, last = 0, ("", 0)
    bad = records.BadLines()
    for path in paths:
        for place, row in read_source(path, check, streaming=False):
            if place[0] != last[0]:
                lines_before += last[1]
            last = place
            field = next((field for field in fields if row.get(field) is not None), None)
            name = str(row[field]) if field else str(lines_before + place[1] - 1)
            first = place_of.setdefault(name, place)
            if not name.strip():
                bad.add(*place, f"{field} is empty; give it a value, or leave it out")
            elif first == place:
                yield name, row
            else:
                remedy = "make ids unique" if field == "_id" else "make ids unique, or leave them out"
                line = f"line {first[1]}" if first[0] == place[0] else f"{first[0]}:{first[1]}"
                bad.add(*place, f"the id {name!r} is that of {line}, too; {remedy}")
    bad.refuse()


def own_row(corpus: Corpus, query: str, query_id: str, relevant: Mapping[int, int]) -> int:
    """The row that is the question itself, of its own id if that one is, unless it is judged right; -1: there is none.

    The question itself is what has its text, with or without a title.
    """
    if not query.strip():
        return -1
    key = text_id(query)
    rows = {*corpus.rows(key), *corpus.rows_of_body.get(key, [])}
    of_id = corpus.row_of.get(query_id, -1)
    row = of_id if of_id in rows else min(rows, default=-1)
    return -1 if relevant.get(row, 0) > 0 else row
