"""Questions and answers as pairs: which texts are the same question, and what belongs to it."""

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from bge_core import UserError
from bge_core.files.cells import parse_row
from bge_core.files.columns import NOTHING_SAID, Wanted, find_columns
from bge_core.files.records import BadLines, Row
from bge_core.files.tables import read_file
from bge_core.files.text import text_id
from bge_core.files.understood import Understood


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
        self._rejected: list[
            tuple[Sequence[str], list[str]]
        ] = []  # questions and what is known to be no answer of them
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

    def reject(self, questions: Sequence[str], answers: Sequence[str]) -> None:
        """Take what is known to be no answer; `settle` makes it a negative of the questions that have an answer."""
        self._rejected.append((questions, [answer for answer in answers if answer]))

    def settle(self) -> list[bool]:
        """Once all rows are taken: of each `reject` whether one of its questions has an answer."""
        used = []
        for questions, answers in self._rejected:
            found = [self.questions.numbers[key] for key in map(text_id, questions) if key in self.questions.numbers]
            for number in found:
                self.negatives[number] += map(self.answers.add, answers)
            used.append(bool(found))
        return used

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


def read_pairs(paths: Sequence[Path], wanted: Wanted = NOTHING_SAID) -> tuple[Pairs, list[Understood]]:
    """All pairs of raw files, and what was understood of each file.

    Args:
        paths: the files, in the order in which their rows count.
        wanted: what the user says of their columns.

    Raises:
        UserError: a file that cannot be read, or bad lines (all files' are counted).
    """
    pairs, bad, files, rejected_of = Pairs(), BadLines(), [], []
    for path in paths:
        understood = Understood(path)
        for row in tqdm(read_file(path, wanted, bad, understood), desc=path.name, unit=" rows", disable=None):
            if row.is_negative and not row.problem:
                pairs.reject(row.questions, row.answers)
                rejected_of.append(understood)
            elif not row.is_negative and not row.left_out:
                for question in row.questions:
                    pairs.add(question, row.answers, row.negatives)
        files.append(understood)
    bad.refuse()
    if wanted.min_label is not None and not any(understood.has_scores for understood in files):
        raise UserError(f"--min_label {wanted.min_label:g}: no file has a column of scores; leave the flag out")
    for understood, has_answer in zip(rejected_of, pairs.settle(), strict=True):
        if not has_answer:
            understood.negatives -= 1
            understood.lost["a negative, and its question has no answer"] += 1
    return pairs, files


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
            columns = find_columns(tuple(triplet), {name: [value] for name, value in triplet.items()})
            row = parse_row(triplet, columns, from_json=True)
            pairs.add(row.questions[0], row.answers, row.negatives)
        except UserError as error:
            raise UserError(f"triplet {number}: {error}") from None
    yield from map(pairs.training_row, range(len(pairs.positives)))
