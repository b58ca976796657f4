"""The data order as a pure function: which rows, which passages, which rank; and what a batch holds."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
import reference
import runs
import torch
from conftest import ROOT
from hypothesis import example, given
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import AutoTokenizer

from bge_core import UserError
from bge_core.encoder.load import load_encoder
from bge_core.files import atomic
from bge_core.files.atomic import write_jsonl
from bge_core.files.sources import list_files
from bge_core.files.text import normalize_text, text_id
from bge_core.loss import LossConfig, LossInput, training_loss
from bge_core.runtime.config import TrainConfig
from bge_core.training.batch import Batch
from bge_core.training.data import (
    BatchPlan,
    Example,
    TrainingData,
    assign_to_ranks,
    choose_passages,
    instructed,
    make_example,
)
from bge_core.training.random_state import generators
from bge_core.training.rows import keys_of, records
from bge_core.training.step import loss_input


def make_config(file: Path | list[str], **options: Any) -> TrainConfig:
    files = file if isinstance(file, list) else [str(file)]
    defaults = {"per_device_train_batch_size": 4, "train_group_size": 3, "query_instruction_for_retrieval": ""}
    return TrainConfig(model_name_or_path="", output_dir="", train_data=files, **(defaults | options))


def make_data(
    file: Path | list[str], model: Path, rank: int = 0, world_size: int = 1, accumulation: int = 1, **options: Any
) -> TrainingData:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return TrainingData(make_config(file, **options), tokenizer, 512, rank, world_size, accumulation)


def write(file: Path, *rows: dict[str, Any]) -> Path:
    write_jsonl(file, rows)
    return file


# --- the plan ---------------------------------------------------------------------------------------------------------


def rows_of_steps(plan: BatchPlan, steps: range) -> list[list[list[int]]]:
    """For each step the row numbers of its micro-batches."""
    located = [plan.locate(step) for step in steps]
    return [[batch.tolist() for batch in plan.epoch(epoch)[micro_batches]] for epoch, micro_batches in located]


plans = st.builds(
    BatchPlan,
    file_sizes=st.lists(st.integers(0, 12), min_size=1, max_size=3).map(tuple),
    batch_size=st.integers(1, 7),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 5),
    drop_last=st.booleans(),
    same_file=st.booleans(),
)


@given(plans, st.integers(0, 3))
def test_an_epoch_has_each_row_once(plan: BatchPlan, epoch: int) -> None:
    batches = plan.epoch(epoch)
    rows = [row for batch in batches for row in batch.tolist()]
    sizes = [len(batch) for batch in batches]
    assert len(set(rows)) == len(rows) and set(rows) <= set(range(plan.num_rows))
    assert len(batches) == plan.micro_batches_per_epoch
    assert all(1 <= size <= plan.batch_size for size in sizes)
    pools = plan.file_sizes if plan.same_file else (plan.num_rows,)
    dropped = sum(size % plan.batch_size for size in pools) if plan.drop_last else 0
    assert len(rows) == plan.num_rows - dropped
    if plan.drop_last:
        assert set(sizes) <= {plan.batch_size}
    elif not plan.same_file:
        assert all(size == plan.batch_size for size in sizes[:-1])


@given(plans)
def test_the_plan_is_a_pure_function_of_seed_and_epoch(plan: BatchPlan) -> None:
    again = replace(plan)
    late = again.epoch(3)
    for epoch in (3, 0):
        assert [b.tolist() for b in plan.epoch(epoch)] == [b.tolist() for b in (late if epoch else again.epoch(0))]


@given(plans)
def test_the_steps_of_an_epoch_are_its_micro_batches_in_order(plan: BatchPlan) -> None:
    steps = rows_of_steps(plan, range(plan.steps_per_epoch, 2 * plan.steps_per_epoch)) if plan.steps_per_epoch else []
    assert [batch for step in steps for batch in step] == [batch.tolist() for batch in plan.epoch(1)]
    assert all(len(step) == plan.accumulation for step in steps[:-1])
    assert all(1 <= len(step) <= plan.accumulation for step in steps)


def unweighted_epoch(plan: BatchPlan, number: int) -> list[np.ndarray]:
    """The order as it was before sources had weights: runs made then resume to the same batches."""
    rng = np.random.default_rng((plan.seed, number))
    if not plan.same_file:
        return plan._cut(rng.permutation(plan.num_rows))
    starts = np.cumsum((0, *plan.file_sizes))
    parts = [plan._cut(start + rng.permutation(size)) for start, size in zip(starts, plan.file_sizes, strict=False)]
    batches = [batch for part in parts for batch in part]
    return [batches[i] for i in rng.permutation(len(batches))]


@given(plans, st.integers(0, 3))
def test_weights_of_one_leave_the_order_as_it_was(plan: BatchPlan, epoch: int) -> None:
    want = [batch.tolist() for batch in unweighted_epoch(plan, epoch)]
    for weights in ((), (1.0,) * len(plan.file_sizes)):
        found = replace(plan, weights=weights).epoch(epoch)
        assert [batch.tolist() for batch in found] == want and all(batch.dtype == np.int64 for batch in found)


@given(plans, st.lists(st.sampled_from([0.01, 0.3, 0.5, 1.0, 1.1, 2.0, 2.75, 4.0]), min_size=3, max_size=3), st.data())
def test_an_epoch_takes_each_source_by_its_weight(plan: BatchPlan, weights: list[float], drawn: st.DataObject) -> None:
    plan = replace(plan, weights=tuple(weights[: len(plan.file_sizes)]), drop_last=False)
    epoch = drawn.draw(st.integers(0, 3))
    batches = plan.epoch(epoch)
    assert [b.tolist() for b in batches] == [b.tolist() for b in replace(plan).epoch(epoch)]
    assert len(batches) == plan.micro_batches_per_epoch
    assert all(1 <= len(batch) <= plan.batch_size for batch in batches)
    draws = [draw for batch in batches for draw in batch.tolist()]
    assert len(set(draws)) == len(draws) and all(draw >= 0 for draw in draws)
    start = 0
    for size, weight in zip(plan.file_sizes, plan.weights, strict=True):
        rows = range(start, start + size)
        times = [sum(draw % plan.num_rows == row for draw in draws) for row in rows]
        # floor(w) whole passes, and the fraction of the rows once more; none of a weight so small comes once
        passes = int(weight)
        once_more = max(round((weight - passes) * size), int(size > 0 and passes == 0))
        assert sorted(times) == [passes] * (size - once_more) + [passes + 1] * once_more
        for row, count in zip(rows, times, strict=True):
            assert {draw for draw in draws if draw % plan.num_rows == row} == {
                row + lap * plan.num_rows for lap in range(count)
            }
        start += size
    if plan.same_file:
        ends = np.cumsum(plan.file_sizes)
        assert all(len(set(np.searchsorted(ends, batch % plan.num_rows, side="right"))) == 1 for batch in batches)


def test_the_fraction_is_drawn_anew_in_each_epoch() -> None:
    plan = BatchPlan((40, 5), 8, 1, seed=1, weights=(0.25, 1.0))
    rows = [{draw for batch in plan.epoch(epoch) for draw in batch.tolist() if draw < 40} for epoch in range(60)]
    assert all(len(of_epoch) == 10 for of_epoch in rows)
    assert rows[0] != rows[1] and set.union(*rows) == set(range(40))


def test_seeds_and_epochs_differ() -> None:
    plan = BatchPlan((40,), 8, 1, seed=1)
    orders = [np.concatenate(p.epoch(e)).tolist() for p in (plan, replace(plan, seed=2)) for e in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert sorted(orders[0]) == list(range(40)) != orders[0]


def test_the_last_micro_batch_is_short_or_left_out() -> None:
    plan = BatchPlan((10,), 4, 2, seed=0)
    assert [len(batch) for batch in plan.epoch(0)] == [4, 4, 2]
    assert [len(batch) for batch in replace(plan, drop_last=True).epoch(0)] == [4, 4]
    assert (plan.steps_per_epoch, replace(plan, drop_last=True).steps_per_epoch) == (2, 1)
    assert [plan.locate(step) for step in range(3)] == [(0, slice(0, 2)), (0, slice(2, 4)), (1, slice(0, 2))]
    assert [[len(b) for b in step] for step in rows_of_steps(plan, range(2))] == [[4, 4], [2]]


def test_with_same_file_no_batch_mixes_files_and_batches_of_files_are_shuffled() -> None:
    plan = BatchPlan((20, 20, 3), 4, 1, seed=0, same_file=True)
    files = [{0 if row < 20 else 1 if row < 40 else 2 for row in batch.tolist()} for batch in plan.epoch(0)]
    assert all(len(of_batch) == 1 for of_batch in files) and len(files) == 11
    order = [min(of_batch) for of_batch in files]
    assert order != sorted(order)


# --- assign_to_ranks ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 500), max_size=40), st.integers(1, 8))
def test_every_position_is_given_once_and_about_as_many_to_each_rank(costs: list[int], num_ranks: int) -> None:
    of_ranks = assign_to_ranks(costs, num_ranks)
    assert len(of_ranks) == num_ranks
    assert sorted(position for positions in of_ranks for position in positions) == list(range(len(costs)))
    assert all(positions == sorted(positions) for positions in of_ranks)
    sizes = [len(positions) for positions in of_ranks]
    assert max(sizes) - min(sizes) <= 1
    sums = [sum(costs[i] for i in positions) for positions in of_ranks]
    assert max(sums) - min(sums) <= max(costs, default=0)


def test_ranks_are_gone_through_to_and_fro() -> None:
    assert assign_to_ranks([1, 9, 5, 7], 2) == [[0, 1], [2, 3]]  # 9 and 1 | 7 and 5
    assert assign_to_ranks([3, 3, 3], 2) == [[0], [1, 2]]
    assert assign_to_ranks([5], 3) == [[0], [], []]


# --- examples ---------------------------------------------------------------------------------------------------------

RECORD: dict[str, Any] = {
    "query": "问",
    "pos": ["答一", "答二"],
    "neg": ["错一", "错二", "错三", "错四"],
    "pos_scores": None,
    "neg_scores": None,
    "prompt": None,
}


def choose(record: dict[str, Any] | None = None, seed: int = 0, **options: Any) -> Example:
    config, row = make_config([], **options), RECORD | (record or {})
    row |= keys_of(row)
    known_ids = [*row["pos_ids"], row["query_id"]]
    chosen = choose_passages(row, known_ids, np.random.default_rng(seed), config)
    return make_example(7, row, chosen, known_ids, config)


def test_a_positive_and_distinct_negatives_are_drawn() -> None:
    seen = set()
    for seed in range(60):
        example = choose(seed=seed)
        assert example.row == 7 and example.query == "问" and example.teacher is None
        assert example.passages[0] in RECORD["pos"]
        assert len(set(example.passages[1:])) == 2 and set(example.passages[1:]) <= set(RECORD["neg"])
        assert example.passage_ids == [text_id(passage) for passage in example.passages]
        assert example.known_ids == [text_id("答一"), text_id("答二"), text_id("问")]
        seen |= set(example.passages)
    assert seen == {*RECORD["pos"], *RECORD["neg"]}
    assert choose(seed=3) == choose(seed=3)


@pytest.mark.parametrize(
    "negatives, want",
    [
        ([], []),
        (["错"], ["错"]),
        (["错", "错", " 错", "Ａ", "A"], ["A", "错"]),  # the same text once, however it is spelled
        (["答一", "答二 ", "问", "错"], ["错"]),  # known positives (chosen or not) and the query
    ],
)
def test_fewer_negatives_where_there_are_fewer(negatives: list[str], want: list[str]) -> None:
    for seed in range(5):
        found = choose({"neg": negatives}, seed=seed, train_group_size=8).passages[1:]
        assert sorted(text.replace("Ａ", "A").strip() for text in found) == want


def test_known_positives_may_stay_negatives_but_the_chosen_one_may_not() -> None:
    negatives = ["答一", "答二", "问"]
    for seed in range(10):
        example = choose({"neg": negatives}, seed=seed, train_group_size=8, exclude_positives=False)
        assert sorted(example.passages[1:]) == sorted({*negatives} - {example.passages[0]})


def test_a_group_of_one_has_its_positive_alone() -> None:
    assert len(choose(train_group_size=1).passages) == 1


def test_teacher_scores_follow_their_passages() -> None:
    scores = {"答一": 9.0, "答二": 8.0, "错一": 1.0, "错二": 2.0, "错三": 3.0, "错四": 4.0}
    record = {"pos_scores": [9.0, 8.0], "neg_scores": [1.0, 2.0, 3.0, 4.0]}
    for seed in range(10):
        example = choose(record, seed=seed, knowledge_distillation=True)
        assert example.teacher == [scores[passage] for passage in example.passages]
    alone = choose({"neg": [], "pos_scores": [9.0, 8.0], "neg_scores": []}, knowledge_distillation=True)
    assert alone.teacher in ([9.0], [8.0])


@pytest.mark.parametrize(
    "prompt, instruction, form, want",
    [
        (None, "", "{}{}", "问"),
        (None, "指令：", "{}{}", "指令：问"),
        ("行：", "指令：", "{}{}", "行：问"),
        ("", "指令：", "{}{}", "问"),  # an empty prompt is a prompt
        (None, "指令", "<{}> {}", "<指令> 问"),
        (None, "", "<{}> {}", "问"),  # nothing to join
        (None, None, "{}{}", "问"),
    ],
)
def test_a_rows_prompt_beats_the_instruction(prompt: str | None, instruction: str, form: str, want: str) -> None:
    config = make_config([], query_instruction_for_retrieval=instruction, query_instruction_format=form)
    assert instructed("问", prompt, config) == want
    options = {"query_instruction_for_retrieval": instruction, "query_instruction_format": form}
    example = choose({"prompt": prompt}, **options)
    assert example.query == want
    assert example.known_ids[-1] == text_id("问"), "the id is that of the question, not of the instruction"


def test_passages_get_their_instruction_and_keep_their_ids() -> None:
    options = {"passage_instruction_for_retrieval": "文", "passage_instruction_format": "[{}] {}"}
    plain, with_instruction = choose(), choose(**options)
    assert with_instruction.passages == [f"[文] {passage}" for passage in plain.passages]
    assert with_instruction.passage_ids == plain.passage_ids


# --- batches ----------------------------------------------------------------------------------------------------------


def content(batch: Batch) -> tuple[object, ...]:
    """Everything that a batch holds, comparable."""
    teacher = None if batch.teacher_BG is None else batch.teacher_BG.tolist()
    tensors = (batch.tokens.input_id_T, batch.own_BG, batch.passage_id_R, batch.excluded_BX)
    return (*(t.tolist() for t in tensors), batch.tokens.lengths, teacher, batch.num_global_rows, batch.rows)


def test_collate_numbers_the_columns(training_file: Path, tiny_bert: Path) -> None:
    data = make_data(training_file, tiny_bert, query_max_len=5, passage_max_len=8, knowledge_distillation=True)
    examples = [
        Example(3, "一二三四五六", ["甲", "乙", "甲乙甲乙甲乙甲乙甲乙"], [11, 12, 13], [11, 21], [1.0, 2.0, 3.0]),
        Example(5, "二", ["丙"], [14], [14, 15, 22], [4.0]),
    ]
    batch = data.collate(examples, [(2, 4), (7, 21)])
    assert batch.rows == [3, 5] and batch.num_queries == 2 and batch.num_global_rows == 9
    assert batch.tokens.lengths == [5, 3, 3, 3, 8, 3], "queries first; each cut to its limit, special tokens included"
    cls, sep = data.tokenizer.cls_token_id, data.tokenizer.sep_token_id
    assert all(text[0] == cls and text[-1] == sep for text in batch.tokens.texts())
    assert batch.own_BG.tolist() == [[0, 1, 2], [3, -1, -1]]
    assert batch.passage_id_R.tolist() == [11, 12, 13, 14]
    assert batch.excluded_BX.tolist() == [[11, 21, -1], [14, 15, 22]]
    assert batch.teacher_BG is not None and batch.teacher_BG.tolist() == [[1, 2, 3], [4, 0, 0]]


def test_collate_keeps_wide_ids_whole(training_file: Path, tiny_bert: Path) -> None:
    wide = 2**63 - 2
    batch = make_data(training_file, tiny_bert).collate(
        [Example(0, "问", ["答"], [wide], [wide, wide - 1], None)], [(1, 1)]
    )
    assert batch.passage_id_R.tolist() == [wide] and batch.excluded_BX.tolist() == [[wide, wide - 1]]
    assert batch.passage_id_R.dtype == batch.excluded_BX.dtype == batch.own_BG.dtype == torch.int64


def test_a_rank_without_rows_has_an_empty_batch(training_file: Path, tiny_bert: Path) -> None:
    batch = make_data(training_file, tiny_bert, knowledge_distillation=True).collate([], [(1, 2), (0, 0)])
    assert batch.num_queries == 0 and len(batch.tokens) == 0 and batch.num_global_rows == 1
    assert batch.own_BG.shape == batch.excluded_BX.shape == (0, 0) and batch.passage_id_R.shape == (0,)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_together_have_the_rows_of_one_process(accumulation: int, training_file: Path, tiny_bert: Path) -> None:
    """At an equal global batch: the same rows and passages in each micro-batch, on 1, 2, or 3 ranks."""
    options = {"accumulation": accumulation, "knowledge_distillation": True, "num_train_epochs": 2.0}
    alone = make_data(training_file, tiny_bert, per_device_train_batch_size=12, **options)
    for world_size in (2, 3):
        size = 12 // world_size
        ranks = [
            make_data(training_file, tiny_bert, r, world_size, per_device_train_batch_size=size, **options)
            for r in range(world_size)
        ]
        assert len(ranks[0]) == len(alone) == 4 // accumulation
        for step in range(len(alone)):
            of_ranks = [list(rank.examples(step)) for rank in ranks]
            for k, (examples, (count,)) in enumerate(alone.examples(step)):
                dealt = [example for of_rank in of_ranks for example in of_rank[k][0]]
                assert sorted(dealt, key=lambda e: e.row) == sorted(examples, key=lambda e: e.row)
                assert {len(of_rank[k][0]) for of_rank in of_ranks} == {size}
                counts = [(size, sum(len(e.passages) for e in of_rank[k][0])) for of_rank in of_ranks]
                assert all(of_rank[k][1] == counts for of_rank in of_ranks)
                assert (
                    tuple(map(sum, zip(*counts, strict=True))) == count == (12, sum(len(e.passages) for e in examples))
                )


def test_a_short_last_batch_is_dealt_over_the_ranks(training_file: Path, tiny_bert: Path) -> None:
    ranks = [make_data(training_file, tiny_bert, r, 2, per_device_train_batch_size=11) for r in range(2)]
    sizes = [[[batch.num_queries for batch in step] for step in (rank[0], rank[1])] for rank in ranks]
    assert sizes == [[[11], [1]], [[11], [1]]]
    assert ranks[0][1][0].num_global_rows == 2
    dropping = make_data(training_file, tiny_bert, 0, 2, per_device_train_batch_size=11, dataloader_drop_last=True)
    assert dropping.plan.steps_per_epoch == 1
    with pytest.raises(UserError, match="24 rows, fewer than one global batch of 26"):
        make_data(training_file, tiny_bert, 0, 2, per_device_train_batch_size=13, dataloader_drop_last=True)


def test_a_step_does_not_depend_on_what_was_read_before(training_file: Path, tiny_bert: Path) -> None:
    """So a resumed run sees what an unbroken one sees, also in later epochs."""
    data, fresh = (make_data(training_file, tiny_bert, num_train_epochs=2.0) for _ in range(2))
    in_order = [[content(batch) for batch in data[step]] for step in range(len(data))]
    for step in (7, 2, 11, 0):
        assert [content(batch) for batch in fresh[step]] == in_order[step]
    assert len(data) == 12
    queries = [
        sorted(row for step in steps for batch in data[step] for row in batch.rows)
        for steps in (range(6), range(6, 12))
    ]
    assert queries[0] == queries[1] == list(range(24))


def test_epochs_choose_other_passages(training_file: Path, tiny_bert: Path) -> None:
    data = make_data(training_file, tiny_bert, num_train_epochs=2.0)
    chosen = [
        {e.row: e.passages for s in steps for es, _ in data.examples(s) for e in es}
        for steps in (range(6), range(6, 12))
    ]
    assert chosen[0].keys() == chosen[1].keys() and chosen[0] != chosen[1]


def test_steps_are_counted_as_in_transformers(training_file: Path, tiny_bert: Path) -> None:
    assert len(make_data(training_file, tiny_bert, num_train_epochs=1.5)) == 9
    assert len(make_data(training_file, tiny_bert, num_train_epochs=0.1)) == 1
    assert len(make_data(training_file, tiny_bert, num_train_epochs=1.5, max_steps=4)) == 4
    assert len(make_data(training_file, tiny_bert, accumulation=4)) == 3 * 2


def test_workers_change_nothing(training_file: Path, tiny_bert: Path) -> None:
    data = make_data(training_file, tiny_bert, num_train_epochs=2.0)
    found = []
    for num_workers in (0, 2):
        loader = torch.utils.data.DataLoader(data, batch_size=None, sampler=range(3, 9), num_workers=num_workers)
        found.append([[content(batch) for batch in step] for step in loader])
    assert found[0] == found[1] and len(found[0]) == 6


@pytest.mark.parametrize("parallelism", ["true", None])
def test_a_worker_does_not_wait_for_the_tokenizers_threads(
    parallelism: str | None, training_file: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    """They are started while the data are read, and are not in the process that is forked then."""
    words = runs.flags(tiny_bert, training_file, tmp_path / "out", max_steps=2, dataloader_num_workers=1, save_steps=0)
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    environment |= {"TOKENIZERS_PARALLELISM": parallelism} if parallelism else {}
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *words], env=environment, timeout=100, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"TOKENIZERS_PARALLELISM" not in done.stderr  # no warning of the library's


# --- equal queries ----------------------------------------------------------------------------------------------------


@pytest.fixture
def equal_queries(tmp_path: Path) -> list[str]:
    """Two sources; "还款" stands on three rows, each with other positives, which are negatives of yet other rows."""
    first = [
        {"query": "还款", "pos": ["柜台"], "neg": ["错一", "网银"]},
        {"query": "　还款 ", "pos": ["网银", "手机"], "neg": ["错二", "柜台", "还款"]},
        {"query": "挂失", "pos": ["电话"], "neg": ["自动扣款", "错三"]},
    ]
    second = [
        {"query": "还款", "pos": ["自动扣款"], "neg": ["电话"]},
        {"query": "开卡", "pos": ["身份证"], "neg": ["手机", "还款", "错一"]},
    ]
    return [str(write(tmp_path / f"{name}.jsonl", *rows)) for name, rows in (("a", first), ("b", second))]


@pytest.mark.parametrize("exclude_positives", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_answers_an_equal_query_is_no_negative(
    world_size: int, exclude_positives: bool, equal_queries: list[str], tiny_bert: Path
) -> None:
    """Loss, gradient and `masked_negatives` of all ranks together, against loops over texts."""
    options = {"per_device_train_batch_size": 6 // world_size, "exclude_positives": exclude_positives}
    data = [make_data(equal_queries, tiny_bert, rank, world_size, **options) for rank in range(world_size)]
    of_ranks = [next(of_rank.examples(0)) for of_rank in data]
    examples, texts = [e for of_rank, _ in of_ranks for e in of_rank], data[0].rows[:]
    known = reference.excluded_of(
        [normalize_text(query) for query in texts["query"]],
        [[normalize_text(text) for text in of_row] for of_row in texts["pos"]],
    )
    generator, rows, start = torch.Generator().manual_seed(0), [], 0
    for e in examples:
        own = list(range(start, start := start + len(e.passages)))
        rows.append(reference.Row(own, frozenset(map(text_id, known[e.row])), []))
        own_negatives = {normalize_text(passage) for passage in e.passages[1:]}
        assert not own_negatives & known[e.row] or not exclude_positives
    vectors = [
        torch.nn.functional.normalize(torch.randn(n, 8, generator=generator, dtype=torch.float64), dim=1)
        for n in (len(examples), start)
    ]
    query_MD, candidate_ND = (vector.clone().requires_grad_() for vector in vectors)
    passages = (candidate_ND, [i for e in examples for i in e.passage_ids])
    want = reference.reference_loss(query_MD, passages, rows, exclude_positives=exclude_positives)
    metrics = reference.reference_metrics(query_MD, passages, rows, exclude_positives=exclude_positives)
    gradients = torch.autograd.grad(want, (query_MD, candidate_ND))

    losses, masked, first, config = [], [], 0, LossConfig(exclude_positives=exclude_positives)
    for rank, (own_examples, counts) in enumerate(of_ranks):
        batch, offset = data[rank].collate(own_examples, counts), sum(passages for _, passages in counts[:rank])
        own_BG = torch.where(batch.own_BG >= 0, batch.own_BG + offset, -1)
        query_BD = query_MD[first : (first := first + batch.num_queries)]
        ids_N = torch.tensor(passages[1])
        x = LossInput(query_BD, query_MD, 0, candidate_ND, own_BG[:, 0], own_BG, ids_N, batch.excluded_BX)
        output = training_loss(x, config)
        losses.append(output.loss * batch.num_queries / len(rows))
        masked.append(output.metrics["masked_negatives"] * batch.num_queries / len(rows))
    assert sum(losses).item() == pytest.approx(want.item(), rel=1e-12)
    assert sum(masked).item() == pytest.approx(metrics["masked_negatives"]) and metrics["masked_negatives"] > 1
    for got, gradient in zip(torch.autograd.grad(sum(losses), (query_MD, candidate_ND)), gradients, strict=True):
        assert torch.allclose(got, gradient, rtol=1e-9, atol=1e-12)


def test_positives_of_queries_on_several_rows(tiny_bert: Path, tmp_path: Path) -> None:
    """Whatever the order of the rows, and where every query has a row of its own."""
    rng = random.Random(0)
    rows = [{"query": f"问{rng.randrange(12)}", "pos": [f"答{i}", f"答{i}之二"][: 1 + i % 2]} for i in range(40)]
    data = make_data(write(tmp_path / "a.jsonl", *rows), tiny_bert)
    known = data.known_positives.of([text_id(f"问{i}") for i in range(13)])
    for i, found in enumerate(known):
        of_query = [row["pos"] for row in rows if row["query"] == f"问{i}"]
        assert sorted(found) == sorted(text_id(text) for pos in of_query for text in pos if len(of_query) > 1)
    alone = make_data(write(tmp_path / "b.jsonl", {"query": "甲", "pos": ["答"]}), tiny_bert).known_positives
    assert alone.of([text_id("甲"), text_id("乙")]) == [[], []] and len(alone.id_K) == 0


# --- a rank's own work ------------------------------------------------------------------------------------------------


def test_a_rank_reads_the_texts_of_its_own_rows_and_hashes_nothing(
    training_file: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def remember(rows: datasets.Dataset, numbers: Any) -> Any:
        read.extend(numbers.tolist() if "query" in rows.column_names else [])
        return records(rows, numbers)

    data = make_data(training_file, tiny_bert, 1, 4, per_device_train_batch_size=6)
    monkeypatch.setattr("bge_core.training.data.records", remember)
    monkeypatch.setattr("bge_core.files.text.hashlib", None)
    (batch,) = data[0]
    assert batch.num_queries == 6 and read == batch.rows


@given(st.integers(0, 2**33), st.integers(0, 2**33), st.lists(st.integers(0, 2**33), max_size=4))
@example(42, 0, [0, 1, 2**32 - 1])
def test_generators_are_numpys(seed: int, epoch: int, draws: list[int]) -> None:
    found = [rng.bit_generator.state for rng in generators(seed, epoch, np.array(draws, dtype=np.int64))]
    assert found == [np.random.default_rng((seed, epoch, draw)).bit_generator.state for draw in draws]


# --- files ------------------------------------------------------------------------------------------------------------

ROW = {"query": "问", "pos": ["答"], "neg": ["错"]}


def test_a_folder_is_its_data_files_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.json", "manifest.json", "x.jsonl.manifest.json", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, ROW)
    found = list_files([str(tmp_path / "b.jsonl"), str(tmp_path)])
    assert [file.relative_to(tmp_path).as_posix() for file in found] == ["a.jsonl", "b.jsonl", "sub/c.json"]


def test_the_order_of_the_named_files_changes_nothing(tmp_path: Path, tiny_bert: Path) -> None:
    first = write(tmp_path / "a.jsonl", *(ROW | {"query": f"甲{i}"} for i in range(5)))
    second = write(tmp_path / "b.jsonl", *(ROW | {"query": f"乙{i}"} for i in range(4)))
    one, other = (make_data([str(f) for f in files], tiny_bert) for files in ([first, second], [second, first]))
    assert one.plan.file_sizes == other.plan.file_sizes == (5, 4)
    assert [content(b) for b in one[0]] == [content(b) for b in other[0]]
    assert [entry["rows"] for entry in one.inputs] == [5, 4]


def test_the_cache_follows_the_content(tmp_path: Path, tiny_bert: Path) -> None:
    file = write(tmp_path / "train.jsonl", ROW)
    assert make_data(file, tiny_bert).rows[0]["query"] == "问"
    write(file, ROW | {"query": "新"}, ROW)
    data = make_data(file, tiny_bert)
    assert [row["query"] for row in data.rows] == ["新", "问"]


def test_optional_fields_and_unknown_keys(tmp_path: Path, tiny_bert: Path) -> None:
    rows = [
        {"query": "一", "pos": ["答"], "other": {"nested": [1]}, "type": "normal"},
        {"query": "二", "pos": ["答"], "neg": None, "prompt": None, "pos_scores": None},
        {"query": "三", "pos": ["答"], "neg": [], "prompt": "行：", "pos_scores": [1], "neg_scores": []},
    ]
    data = make_data(write(tmp_path / "train.jsonl", *rows), tiny_bert, query_instruction_for_retrieval="指：")
    examples = sorted((e for es, _ in data.examples(0) for e in es), key=lambda e: e.row)
    assert [(e.query, e.passages) for e in examples] == [("指：一", ["答"]), ("指：二", ["答"]), ("行：三", ["答"])]


def test_at_most_so_many_rows_of_each_file_drawn_with_the_seed(tmp_path: Path, tiny_bert: Path) -> None:
    big = write(tmp_path / "a.jsonl", *(ROW | {"query": f"甲{i}"} for i in range(30)))
    small = write(tmp_path / "b.jsonl", *(ROW | {"query": f"乙{i}"} for i in range(3)))
    files = [str(big), str(small)]
    kept = [
        [row["query"] for row in make_data(files, tiny_bert, max_example_num_per_dataset=5, seed=seed).rows]
        for seed in (1, 1, 2)
    ]
    assert kept[0] == kept[1] != kept[2]
    for queries in kept:
        assert len(queries) == len(set(queries)) == 8 and queries[5:] == ["乙0", "乙1", "乙2"]


def make_sources(folder: Path, text: str, **files: list[dict[str, Any]]) -> Path:
    for name, rows in files.items():
        write(folder / f"{name}.jsonl", *rows)
    (folder / "sources.yaml").write_text(text, encoding="utf-8")
    return folder / "sources.yaml"


def test_parquet_rows_train_as_json_lines_do(training_file: Path, tiny_bert: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in training_file.read_text(encoding="utf-8").splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    one, other = (
        make_data(file, tiny_bert, knowledge_distillation=True) for file in (training_file, tmp_path / "train.parquet")
    )
    assert [[content(b) for b in one[step]] for step in range(6)] == [
        [content(b) for b in other[step]] for step in range(6)
    ]
    (entry,) = other.inputs
    assert entry["rows"] == len(rows) and entry["sha256"] == atomic.sha256(tmp_path / "train.parquet")


def test_a_bad_row_of_a_parquet_file_is_named(tiny_bert: Path, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([ROW, ROW | {"pos": []}]), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="train.parquet:2: field 'pos' is an empty list"):
        make_data(tmp_path / "train.parquet", tiny_bert)


def test_sources_bring_their_prompts(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [ROW | {"query": "一"}, ROW | {"query": "二", "prompt": "行："}, ROW | {"query": "三", "prompt": ""}]
    text = "- {path: a.jsonl, prompt: '源：'}\n- path: b.jsonl\n"
    file = make_sources(tmp_path, text, a=rows, b=[ROW | {"query": "四"}])

    def queries() -> list[str]:
        data = make_data(file, tiny_bert, query_instruction_for_retrieval="指：")
        return [e.query for e in sorted((e for es, _ in data.examples(0) for e in es), key=lambda e: e.row)]

    assert queries() == ["源：一", "行：二", "三", "指：四"]
    file.write_text(text.replace("源", "新"), encoding="utf-8")  # the rows are not taken from a cache of the old prompt
    assert queries() == ["新：一", "行：二", "三", "指：四"]


def test_a_row_that_comes_again_in_an_epoch_chooses_other_passages(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [{"query": f"问{i}", "pos": ["答"], "neg": [f"错{j}" for j in range(30)]} for i in range(6)]
    file = make_sources(
        tmp_path, "- {path: a.jsonl, weight: 2.5}\n- path: b.jsonl\n", a=rows, b=[ROW | {"query": "甲"}] * 4
    )
    data = make_data(file, tiny_bert, train_group_size=9, num_train_epochs=1.0)
    assert data.plan.draws == (15, 4) and len(data) == 5
    examples = [e for step in range(5) for es, _ in data.examples(step) for e in es]
    assert {e.row for e in examples} == set(range(10)) and len(examples) == 19
    for row in range(6):
        chosen = [e.passages for e in examples if e.row == row]
        assert len(chosen) in (2, 3) and len({tuple(passages) for passages in chosen}) == len(chosen)
        assert all(e.query == f"问{row}" for e in examples if e.row == row)


@pytest.mark.parametrize("name", ["labels-no_in_batch_neg/rows.jsonl", "labels_no_in_batch_neg.jsonl"])
def test_rows_of_a_source_named_so_have_their_own_negatives_alone(name: str, tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    labels = write(tmp_path / name, *(ROW | {"query": f"甲{i}"} for i in range(3)))
    other = write(tmp_path / "faq.jsonl", *(ROW | {"query": f"乙{i}"} for i in range(5)))
    ranks = [make_data([str(labels), str(other)], tiny_bert, rank, 2) for rank in range(2)]
    flags = {}
    for data in ranks:
        (batch,) = data[0]
        assert batch.own_only_B is not None
        x = loss_input(torch.zeros(len(batch.tokens), 2), batch, cross_device=False)
        assert x.own_only_B is not None
        flags |= dict(zip(batch.rows, x.own_only_B.tolist(), strict=True))
    first = ranks[0].rows["query"]
    assert {first[row][0]: flag for row, flag in flags.items()} == {"甲": True, "乙": False} and len(flags) == 8
    assert make_data(other, tiny_bert)[0][0].own_only_B is None


def test_batches_of_one_source_and_what_is_described(tiny_bert: Path, tmp_path: Path) -> None:
    for name in "cd":
        (tmp_path / "folder").mkdir(exist_ok=True)
        write(tmp_path / f"folder/{name}.jsonl", *(ROW | {"query": f"{name}{i}"} for i in range(3)))
    text = "- {path: a.jsonl, weight: 2}\n- path: folder\n"
    file = make_sources(tmp_path, text, a=[ROW | {"query": f"a{i}"} for i in range(4)])
    more = write(tmp_path / "b.jsonl", *(ROW | {"query": f"b{i}"} for i in range(5)))
    data = make_data([str(file), str(more)], tiny_bert, same_dataset_within_batch=True, num_train_epochs=1.0)
    assert data.plan.file_sizes == (4, 5, 6) and data.plan.draws == (8, 5, 6)
    assert [(Path(entry["path"]).name, entry["rows"]) for entry in data.inputs] == [
        ("a.jsonl", 4), ("b.jsonl", 5), ("folder", 6), ("sources.yaml", 0),
    ]  # fmt: skip
    assert all(len(entry["sha256"]) == 64 for entry in data.inputs)
    batches = [[e.query[0] for e in es] for step in range(len(data)) for es, _ in data.examples(step)]
    assert len(batches) == 2 + 2 + 2
    assert all(any(set(batch) <= source for source in ({"a"}, {"b"}, {"c", "d"})) for batch in batches)
    before = data.inputs[-1]["sha256"]
    file.write_text(text.replace("2", "2.5"), encoding="utf-8")  # so that a resumed run sees that its order changed
    assert make_data([str(file), str(more)], tiny_bert).inputs[-1]["sha256"] != before


def test_a_bad_line_is_named(tmp_path: Path, tiny_bert: Path) -> None:
    """By the place in its file, though it is read into a cache. What is bad: tests/files/test_records.py."""
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(ROW, ensure_ascii=False) + '\n\n{"query": "问", "pos": "答"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="1 bad line: .*\n.*train.jsonl:3: field 'pos' is \"答\"; it must be a list"):
        make_data(file, tiny_bert)


def test_distillation_needs_scores_on_every_row(tmp_path: Path, tiny_bert: Path) -> None:
    file = write(tmp_path / "train.jsonl", ROW)
    make_data(file, tiny_bert)
    with pytest.raises(UserError, match="train.jsonl:1: field 'pos_scores' is missing; --knowledge_distillation"):
        make_data(file, tiny_bert, knowledge_distillation=True)


def test_instructions_are_left_out_of_the_pooling_where_the_model_says_so(tiny_bert: Path, tmp_path: Path) -> None:
    """Per row: its own prompt, the run's, and none for passages; the vectors are those of encoding."""
    rows = [{"query": "怎么退货", "pos": ["a"], "neg": ["b"], "prompt": "为句子："}, {"query": "loan", "pos": ["c"]}]
    config = make_config(write(tmp_path / "f.jsonl", *rows), query_instruction_for_retrieval="问：")
    encoder = load_encoder(tiny_bert, pooling="mean")
    encoder.settings = replace(encoder.settings, include_prompt=False)
    data = TrainingData(config, encoder.tokenizer, 512, 0, 1, 1, include_prompt=False)
    (batch,) = data[0]
    assert sorted(batch.tokens.prompt_lengths[:2]) == [3, 5] and set(batch.tokens.prompt_lengths[2:]) == {0}
    for vector_D, row in zip(encoder(batch.tokens).detach(), batch.rows, strict=False):
        want = encoder.encode([rows[row]["query"]], prompt=rows[row].get("prompt", "问："))
        torch.testing.assert_close(vector_D, torch.from_numpy(want[0]), rtol=1e-5, atol=1e-6)
