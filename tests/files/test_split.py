"""Pairs, their split and triplets: by hand and on random data."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_core import UserError
from bge_core.files.pairs import Pairs, from_triplets, to_triplets
from bge_core.files.split import choose_train

small_pairs = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=2, max_size=30)
seeds = st.integers(0, 5)


def collect(numbers: list[tuple[int, int]]) -> Pairs:
    pairs = Pairs()
    for question, answer in numbers:
        pairs.add(f"问{question}", [f"答{answer}"], [])
    return pairs


def slow_groups(pairs: Pairs) -> list[set[int]]:
    """The questions that shared answers connect, by taking in whatever meets."""
    groups: list[tuple[set[int], set[int]]] = []
    for question, answers in enumerate(pairs.positives):
        met = [group for group in groups if group[1] & set(answers)]
        groups = [group for group in groups if group not in met]
        groups.append(({question}.union(*(q for q, _ in met)), set(answers).union(*(a for _, a in met))))
    return [questions for questions, _ in groups]


@given(small_pairs, seeds, st.data())
@settings(max_examples=200, deadline=None)
def test_group_split(numbers: list[tuple[int, int]], seed: int, data: st.DataObject) -> None:
    pairs = collect(numbers)
    total = len(pairs.positives)
    groups = slow_groups(pairs)
    room = data.draw(st.integers(1, max(1, total - 1)))
    if total == 1 or min(map(len, groups)) > room:
        with pytest.raises(UserError, match="--split_by question|needs two"):
            choose_train(pairs, room, "group", seed)
        return
    is_train = choose_train(pairs, room, "group", seed)
    train = {q for q in range(total) if is_train[q]}
    assert 0 < len(train) <= room
    assert all(group <= train or not group & train for group in groups), "a group on both sides"
    assert all(len(group) > room - len(train) for group in groups if not group & train), "one that is left would fit"


@given(small_pairs, seeds, st.sampled_from(["group", "question"]), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_split_depends_on_the_pairs_and_not_on_their_order(
    numbers: list[tuple[int, int]], seed: int, split_by: str, shuffler: random.Random
) -> None:
    sides: list[Any] = []
    for order in (numbers, shuffler.sample(numbers, len(numbers))):
        pairs = collect(order)
        try:
            is_train = choose_train(pairs, None, split_by, seed)
        except UserError as error:
            sides.append(str(error))
        else:
            sides.append({text: is_train[q] for q, text in enumerate(pairs.questions.spellings)})
    assert sides[0] == sides[1]


def test_question_split_fills_exactly_and_seeds_differ() -> None:
    pairs = collect([(i, i % 3) for i in range(100)])
    splits = {tuple(choose_train(pairs, 61, "question", seed)) for seed in range(5)}
    assert {sum(split) for split in splits} == {61}
    assert len(splits) == 5
    assert sum(choose_train(pairs, None, "question", 0)) == 90


def test_every_size_of_group_gives_its_share() -> None:
    # 200 single questions, 100 pairs, 40 groups of five: 600 questions; a tenth is tested
    numbers = [(i, i) for i in range(200)]
    numbers += [(1000 + 2 * i + j, 1000 + i) for i in range(100) for j in range(2)]
    numbers += [(5000 + 5 * i + j, 5000 + i) for i in range(40) for j in range(5)]
    is_train = choose_train(collect(numbers), None, "group", 3)
    assert sum(is_train) == 540
    tested = [sum(not is_train[q] for q in part) for part in (range(200), range(200, 400), range(400, 600))]
    assert all(abs(count - 20) <= 5 for count in tested), tested


def test_single_questions_fill_the_rows_beside_a_large_group() -> None:
    pairs = collect([*((i, 0) for i in range(70)), *((100 + i, 100 + i) for i in range(30))])
    assert {sum(choose_train(pairs, room, "group", seed)) for room in (71, 85) for seed in range(30)} == {71, 85}


def test_one_group_larger_than_a_tenth_is_named(caplog: pytest.LogCaptureFixture) -> None:
    pairs = collect([*((i, 0) for i in range(4)), *((10 + i, 10 + i) for i in range(16))])
    choose_train(pairs, None, "group", 0)
    assert "4 of the 20 questions form one group" in caplog.text
    assert "'问0'" in caplog.text and "(4 times) is '答0'" in caplog.text
    caplog.clear()
    choose_train(pairs, None, "question", 0)
    choose_train(collect([(i, i) for i in range(5)]), None, "group", 0)
    assert not caplog.text, "single questions are no groups"


def test_train_num(caplog: pytest.LogCaptureFixture) -> None:
    pairs = collect([(i, i) for i in range(10)])
    assert sum(choose_train(pairs, 8, "group", 0)) == 8 and not caplog.text
    assert [sum(choose_train(pairs, number, "group", 0)) for number in (10, 10000)] == [9, 9]  # all: nine tenths
    assert "--train_num 10000: there are 10 questions; nine tenths of them train" in caplog.text


# --- triplets -------------------------------------------------------------------------------------------------------


def test_triplets_by_hand() -> None:
    rows = [{"query": "q", "pos": ["p1", "p2"], "neg": ["n1", "n2"]}, {"query": "r", "pos": ["p3"], "neg": []}]
    triplets = list(to_triplets(rows))
    assert triplets == [
        {"anchor": "q", "positive": "p1", "negative": "n1"}, {"anchor": "q", "positive": "p1", "negative": "n2"},
        {"anchor": "q", "positive": "p2", "negative": "n1"}, {"anchor": "q", "positive": "p2", "negative": "n2"},
        {"anchor": "r", "positive": "p3"},
    ]  # fmt: skip
    assert list(from_triplets(triplets)) == [rows[0], {"query": "r", "pos": ["p3"]}]
    wide = [{"anchor": "q", "positive": "p", "negative_1": "n1", "negative_2": "p"}]
    assert list(from_triplets(wide)) == [{"query": "q", "pos": ["p"], "neg": ["n1"]}]
    for bad, message in (({"anchor": "q"}, "triplet 2: no field"), ({"anchor": "q", "positive": 3}, "'positive' is 3")):
        with pytest.raises(UserError, match=message):
            list(from_triplets([wide[0], bad]))


words = st.lists(st.integers(0, 30), min_size=1, max_size=4, unique=True)


@given(st.dictionaries(st.integers(0, 9), st.tuples(words, words), max_size=6))
@settings(max_examples=50, deadline=None)
def test_triplets_round_trip(contents: dict[int, tuple[list[int], list[int]]]) -> None:
    rows = []
    for question, (positives, negatives) in contents.items():
        row: dict[str, Any] = {"query": f"问{question}", "pos": [f"文{i}" for i in positives]}
        if others := [f"文{i}" for i in negatives if i not in positives]:
            row["neg"] = others
        rows.append(row)
    triplets = list(to_triplets(rows))
    assert list(from_triplets(triplets)) == rows
    mixed = from_triplets(triplets[::2] + triplets[1::2])
    assert {row["query"]: (set(row["pos"]), set(row.get("neg", []))) for row in mixed} == {
        row["query"]: (set(row["pos"]), set(row.get("neg", []))) for row in rows
    }
