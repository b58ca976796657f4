"""Questions and answers as pairs: which texts are the same question, and what belongs to it."""

import functools
import logging
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from bge_core import UserError
from bge_core.files.atomic import describe_input
from bge_core.files.columns import find_columns
from bge_core.files.records import BadLines, Row
from bge_core.files.tables import parse_row, read_file
from bge_core.files.text import text_id

logger = logging.getLogger(__name__)


class Texts:
    """Distinct texts, numbered in the order of their first appearance; the first spelling stays."""

    def __init__(self) -> None:
        self.spellings: list[str] = []
        self.numbers: dict[int, int] = {}  # text_id -> number

    def add(self, text: str) -> int:
        """The number of a text, a new one where it is new."""
        number = self.numbers.setdefault(text_id(text), len(self.spellings))
        if number == len(self.spellings):
            self.spellings.append(text)
        return number


class Pairs:
    """Distinct questions, each with the numbers of its answers and of its known negatives."""

    def __init__(self) -> None:
        self.questions, self.answers = Texts(), Texts()
        self.positives: list[list[int]] = []
        self.negatives: defaultdict[int, list[int]] = defaultdict(list)
        self.num_read = self.num_empty = self.num_repeated = 0
        self._seen: set[int] = set()

    def add(self, question: str, answers: Sequence[str], negatives: Sequence[str]) -> None:
        """Take one row; pairs with an empty side and repeated pairs are counted and left out."""
        kept = [answer for answer in answers if question and answer]
        self.num_read += len(answers)
        self.num_empty += len(answers) - len(kept)
        if not kept:
            return
        number = self.questions.add(question)
        if number == len(self.positives):
            self.positives.append([])
        for answer in map(self.answers.add, kept):
            pair = number << 32 | answer
            if pair in self._seen:
                self.num_repeated += 1
            else:
                self._seen.add(pair)
                self.positives[number].append(answer)
        if any(negatives):
            self.negatives[number] += [self.answers.add(text) for text in negatives if text]

    def row(self, question: int) -> Row:
        """{query, pos} of one question."""
        positives = [self.answers.spellings[answer] for answer in self.positives[question]]
        return {"query": self.questions.spellings[question], "pos": positives}

    def training_row(self, question: int, excluded: Container[int] = ()) -> Row:
        """{query, pos, neg}: `neg` are the known negatives that are neither in `pos` nor `excluded`; absent if none."""
        known, positives = self.negatives.get(question, ()), set(self.positives[question])
        negatives = [n for n in dict.fromkeys(known) if n not in positives and n not in excluded]
        return self.row(question) | ({"neg": [self.answers.spellings[n] for n in negatives]} if negatives else {})

    def counts(self) -> dict[str, int]:
        """What was read, by name."""
        return {
            "pairs": self.num_read,
            "pairs_empty": self.num_empty,
            "pairs_repeated": self.num_repeated,
            "questions": len(self.positives),
            "questions_with_several_answers": sum(len(answers) > 1 for answers in self.positives),
            "questions_with_known_negatives": len(self.negatives),
            "answers": len({answer for answers in self.positives for answer in answers}),
            "corpus_texts": len(self.answers.spellings),
        }


def read_pairs(
    paths: Sequence[Path], query_field: str | None = None, answer_field: str | None = None
) -> tuple[Pairs, list[Row]]:
    """All pairs of raw files, and the manifest's entry of each file.

    Args:
        paths: the files, in the order in which their rows count.
        query_field, answer_field: see `find_columns`.

    Raises:
        UserError: a file that cannot be read, or bad lines (all files' are counted).
    """
    find = functools.partial(find_columns, query_field=query_field, answer_field=answer_field)
    pairs, bad, inputs = Pairs(), BadLines(), []
    for path in paths:
        num_rows = 0
        for row in tqdm(read_file(path, find, bad), desc=path.name, unit=" rows", disable=None):
            pairs.add(*row)
            num_rows += 1
        logger.info("%s: %d rows", path, num_rows)
        inputs.append(describe_input(path, num_rows))
    bad.refuse()
    return pairs, inputs


def to_triplets(rows: Iterable[Row]) -> Iterator[Row]:
    """Training rows -> sentence-transformers' columns: a triplet for each positive and negative of a row.

    For example `Dataset.from_list(list(to_triplets(read_training_rows(["train_minedHN.jsonl"]))))`.

    Args:
        rows: objects with query, pos [str] and neg [str].

    Returns:
        {"anchor", "positive", "negative"}; a row without negatives gives {"anchor", "positive"} for each positive.
    """
    for row in rows:
        for positive in row["pos"]:
            pair = {"anchor": row["query"], "positive": positive}
            yield from [{**pair, "negative": negative} for negative in row.get("neg") or []] or [pair]


def from_triplets(triplets: Iterable[Row]) -> Iterator[Row]:
    """Sentence-transformers' columns -> training rows, one for each distinct anchor, in order of appearance.

    prepare.py does the same with files that have these columns.

    Args:
        triplets: objects with anchor, positive and any of negative, negative_1, negative_2, ...

    Returns:
        {"query", "pos", "neg"}, each text once. A text that is a positive of the anchor anywhere is no negative of it;
        `neg` is absent where there is none. Triplets with an empty anchor or positive are left out.

    Raises:
        UserError: a triplet (counted from 1) lacks a column, or holds something else than texts.
    """
    pairs = Pairs()
    for number, triplet in enumerate(triplets, start=1):
        try:
            pairs.add(*parse_row(triplet, find_columns(tuple(triplet)), from_json=True))
        except UserError as error:
            raise UserError(f"triplet {number}: {error}") from None
    yield from map(pairs.training_row, range(len(pairs.positives)))
