"""Which questions train and which are kept to test, and both on disk."""

import hashlib
import logging
import math
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

from bge_core import UserError
from bge_core.files import atomic
from bge_core.files.pairs import Pairs
from bge_core.files.records import Row

logger = logging.getLogger(__name__)

OUTPUTS = ("train.jsonl", "test.jsonl", "corpus.jsonl", "manifest.json")


def choose_train(pairs: Pairs, train_num: int | None, split_by: str, seed: int) -> list[bool]:
    """Which questions are training rows; depends on the texts and the seed, not on their order.

    There are `train_num` of them, or fewer by what no group that is left would fit into.

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
    _warn_of_large_groups(pairs, groups, sizes)
    if min(sizes.values()) > room:
        raise UserError(
            f"no group of questions that share answers fits into {room} training rows, the smallest has "
            f"{min(sizes.values())} of all {total}; use --split_by question"
        )
    draw: dict[int, bytes] = {}  # of each group: its place in an order by chance
    for group, text in zip(groups, pairs.questions.numbers, strict=True):
        lot = hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest()
        draw[group] = min(draw.get(group, lot), lot)
    wanted, chosen = _groups_of_each_size(Counter(sizes.values()), room, seed), set()
    for group in sorted(draw, key=draw.__getitem__):
        if wanted[sizes[group]]:
            wanted[sizes[group]] -= 1
            chosen.add(group)
    return [group in chosen for group in groups]


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


def _warn_of_large_groups(pairs: Pairs, groups: Sequence[int], sizes: Counter[int]) -> None:
    for group, size in sizes.most_common():
        if size <= max(1, len(groups) / 10):
            return
        members = [question for question, its_group in enumerate(groups) if its_group == group]
        answer, times = Counter(chain.from_iterable(pairs.positives[q] for q in members)).most_common(1)[0]
        logger.warning(
            f"{size} of the {len(groups)} questions form one group, since they share answers, and stay together: as "
            f"'{pairs.questions.spellings[members[0]]}'; the most frequent of the answers ({times} times) is "
            f"'{pairs.answers.spellings[answer]}'. --split_by question would divide the group"
        )


def _groups_of_each_size(num_groups: Counter[int], room: int, seed: int) -> dict[int, int]:
    """How many groups of each size train, so that no group that is left would still fit.

    From the largest down, each size gives about the same share of its groups, rounded by chance, and as many as the
    smaller ones could not make up for.

    Args:
        num_groups: size -> how many groups have it.
        room: the most rows that may train.
        seed: of the rounding.
    """
    chance, taken = random.Random(seed), {}
    left, unseen = room, sum(size * count for size, count in num_groups.items())
    for size in sorted(num_groups, reverse=True):
        share = round(num_groups[size] * left / unseen + chance.random() - 0.5)
        unseen -= num_groups[size] * size
        fewest = math.ceil((left - unseen) / size)
        taken[size] = min(max(share, fewest, 0), num_groups[size], left // size)
        left -= taken[size] * size
    return taken


def write_split(folder: Path, pairs: Pairs, is_train: Sequence[bool], split_by: str, manifest: Row) -> None:
    """Write `OUTPUTS`, each whole or not at all; the manifest appears last.

    A question's known negatives go with it, but where groups are apart no answer of a test question is among them.
    """
    train = [question for question, chosen in enumerate(is_train) if chosen]
    test = [question for question, chosen in enumerate(is_train) if not chosen]
    held_out = {answer for question in test for answer in pairs.positives[question]} if split_by == "group" else ()
    corpus = ({"id": str(number), "text": text} for number, text in enumerate(pairs.answers.spellings))
    with ExitStack() as stack:  # left in reverse order
        temporary = {name: stack.enter_context(atomic.atomic_path(folder / name)) for name in reversed(OUTPUTS)}
        atomic.write_jsonl(temporary["train.jsonl"], (pairs.training_row(question, held_out) for question in train))
        atomic.write_jsonl(temporary["test.jsonl"], map(pairs.row, test))
        atomic.write_jsonl(temporary["corpus.jsonl"], corpus)
        atomic.write_json(temporary["manifest.json"], manifest)
        (folder / "manifest.json").unlink(missing_ok=True)  # an earlier one must not vouch for a mixture
