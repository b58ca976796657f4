"""Questions and answers as pairs: which belong together, and which side of the split they go to."""

import hashlib
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import chain

from bge_core import UserError
from bge_core.files.records import Row
from bge_core.files.tables import _parse_row, find_columns  # cross
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

    def training_row(self, question: int, spared: Container[int] = ()) -> Row:
        """{query, pos, neg}: `neg` are the known negatives that are neither in `pos` nor `spared`; absent if none."""
        known, positives = self.negatives.get(question, ()), set(self.positives[question])
        negatives = [n for n in dict.fromkeys(known) if n not in positives and n not in spared]
        return self.row(question) | ({"neg": [self.answers.spellings[n] for n in negatives]} if negatives else {})


def to_triplets(rows: Iterable[Row]) -> Iterator[Row]:
    """Training rows -> sentence-transformers' columns: a triplet for each positive and negative of a row.

    For example `Dataset.from_list(list(to_triplets(read_rows("train_minedHN.jsonl", check_training_row))))`.

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
            pairs.add(*_parse_row(triplet, find_columns(tuple(triplet)), from_json=True))
        except UserError as error:
            raise UserError(f"triplet {number}: {error}") from None
    yield from map(pairs.training_row, range(len(pairs.positives)))


def _connect(pairs: Pairs) -> list[int]:
    """For each question the number of one that stands for all that shared answers connect with it (union-find)."""
    parent = list(range(len(pairs.positives)))

    def root(question: int) -> int:
        while parent[question] != question:
            parent[question] = question = parent[parent[question]]
        return question

    first_with: dict[int, int] = {}
    for question, answers in enumerate(pairs.positives):
        for answer in answers:
            parent[root(question)] = root(first_with.setdefault(answer, question))
    return [root(question) for question in range(len(parent))]


def _fill(num_groups: Counter[int], room: int, seed: int) -> dict[int, int]:
    """How many groups of each size to take so that their rows fill `room` as closely as any choice can.

    Among such choices each size gives about the same share of its groups, rounded by chance.

    Args:
        num_groups: size -> how many groups have it.
        room: the largest sum allowed, in rows.
        seed: of the rounding.
    """
    sizes = sorted(num_groups)
    reachable = [1]  # bit r of reachable[i]: the i smallest sizes can give r rows
    for size in sizes:
        sums, count, step = reachable[-1], num_groups[size], 1
        while count:
            step = min(step, count)
            sums |= (sums << size * step) & ((2 << room) - 1)
            count, step = count - step, 2 * step
        reachable.append(sums)
    left, unseen = reachable.pop().bit_length() - 1, sum(size * count for size, count in num_groups.items())
    chance, taken = random.Random(seed), {}
    for size, sums in zip(reversed(sizes), reversed(reachable), strict=True):
        wish = num_groups[size] * left / unseen + chance.random() - 0.5
        distance = [abs(count - wish) for count in range(min(num_groups[size], left // size) + 1)]
        nearest_first = sorted(range(len(distance)), key=distance.__getitem__)
        taken[size] = next(count for count in nearest_first if sums >> (left - count * size) & 1)
        left, unseen = left - taken[size] * size, unseen - num_groups[size] * size
    return taken


def choose_train(pairs: Pairs, train_num: int | None, split_by: str, seed: int) -> list[bool]:
    """Which questions are training rows; depends on the texts and the seed, not on their order.

    Args:
        pairs: what was read.
        train_num: at most this many rows; None, or where that is all: nine tenths.
        split_by: "group": questions that share an answer, also through others, stay together; "question": each alone.
        seed: another seed, another split.

    Raises:
        UserError: one of the two sides would be empty.
    """
    total = len(pairs.positives)
    if total < 2:
        raise UserError("the input holds one question; a split into training and test rows needs two")
    room = total * 9 // 10 if train_num is None else train_num
    if room >= total:
        logger.warning(
            "--train_num %d: there are %d questions; nine tenths of them train, the others test", room, total
        )
        room = total * 9 // 10
    groups = _connect(pairs) if split_by == "group" else list(range(total))
    sizes = Counter(groups)
    for group, size in sizes.most_common():
        if size <= max(1, total / 10):
            break
        members = [question for question in range(total) if groups[question] == group]
        answer, times = Counter(chain.from_iterable(pairs.positives[q] for q in members)).most_common(1)[0]
        logger.warning(
            "%d of the %d questions form one group, since they share answers, and stay together: as '%s'; the most "
            "frequent of the answers (%d times) is '%s'. --split_by question would divide the group",
            size,
            total,
            pairs.questions.spellings[members[0]],
            times,
            pairs.answers.spellings[answer],
        )
    if min(sizes.values()) > room:
        raise UserError(
            f"no group of questions that share answers fits into {room} training rows, the smallest has "
            f"{min(sizes.values())} of all {total}; use --split_by question"
        )
    rank: dict[int, bytes] = {}
    for group, text in zip(groups, pairs.questions.numbers, strict=True):
        key = hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest()
        rank[group] = min(rank.get(group, key), key)
    taken, chosen = _fill(Counter(sizes.values()), room, seed), set()
    for group in sorted(rank, key=rank.__getitem__):
        if taken[sizes[group]]:
            taken[sizes[group]] -= 1
            chosen.add(group)
    return [group in chosen for group in groups]
