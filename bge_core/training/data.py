"""Training data as a pure function of (seed, step): which rows, which passages, which rank.

    rows (memory-mapped) -> BatchPlan: rows of each global micro-batch -> choose passages -> assign to ranks -> tokens

Nothing here depends on the number of workers, on where a run was resumed or, at an equal global batch, on the number of
ranks. One item of `TrainingData` is one optimizer step of one rank.

Shapes, of one rank's micro-batch: B queries, R passages, G most passages of a query, X most known positives of a query.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from bge_core import UserError
from bge_core.encoder.fixed import FixedRow, FixedRows
from bge_core.encoder.tokens import Tokens, prompt_length, tokenize
from bge_core.files.sources import load_sources
from bge_core.runtime.config import TrainConfig
from bge_core.training.batch import Batch
from bge_core.training.random_state import generators
from bge_core.training.rows import KnownPositives, count_prompts, keys_alone, read_rows, records, texts_of


@dataclass(frozen=True)
class Example:
    """A row with its passages chosen: the positive first, then negatives; `teacher` scores in that order, or None.

    `own_only`: other rows' passages are no negatives of it.
    """

    row: int
    query: str
    passages: list[str]
    passage_ids: list[int]
    known_ids: list[int]
    teacher: list[float] | None
    own_only: bool = False


@dataclass(frozen=True)
class BatchPlan:
    """Which rows form which global micro-batch, as a pure function of seed and step.

    Args:
        file_sizes: rows of each source; row numbers run through the sources in order.
        batch_size: rows of a global micro-batch (processes x per-device batch).
        accumulation: micro-batches a step; the last step of an epoch may have fewer.
        seed: of the order.
        drop_last: leave out a last micro-batch of an epoch that is smaller.
        same_file: all rows of a micro-batch come from one source.
        weights: how often an epoch takes each source's rows; empty: once. A weight of 2.25 takes them twice, and a
            quarter of them, drawn anew in each epoch, a third time.
    """

    file_sizes: tuple[int, ...]
    batch_size: int
    accumulation: int
    seed: int
    drop_last: bool = False
    same_file: bool = False
    weights: tuple[float, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows of all sources."""
        return sum(self.file_sizes)

    @property
    def draws(self) -> tuple[int, ...]:
        """How many rows an epoch takes of each source, weight x size; at least one, if it has any."""
        weights = self.weights or (1.0,) * len(self.file_sizes)
        return tuple(
            max(min(size, 1), round(weight * size)) for size, weight in zip(self.file_sizes, weights, strict=True)
        )

    @property
    def micro_batches_per_epoch(self) -> int:
        """Global micro-batches of one epoch."""
        sizes = self.draws if self.same_file else (sum(self.draws),)
        return sum(size // self.batch_size if self.drop_last else math.ceil(size / self.batch_size) for size in sizes)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return math.ceil(self.micro_batches_per_epoch / self.accumulation)

    def epoch(self, number: int) -> list[np.ndarray]:
        """The micro-batches of one epoch, each a vector of draws.

        A row's first draw is its number; each further draw in the same epoch is `num_rows` more, so that it has another
        random state and chooses other passages.
        """
        rng = np.random.default_rng((self.seed, number))
        pools = [self._pool(i, rng) for i in range(len(self.file_sizes))]
        pools = pools if self.same_file else [np.concatenate(pools)]
        batches = [batch for pool in pools for batch in self._cut(pool[rng.permutation(len(pool))])]
        return [batches[i] for i in rng.permutation(len(batches))] if self.same_file else batches

    def _pool(self, source: int, rng: np.random.Generator) -> np.ndarray:
        """The draws of one source: whole passes, then some of its rows without a repeat."""
        size = self.file_sizes[source]
        passes, rest = divmod(self.draws[source], max(size, 1))
        last = rng.permutation(size)[:rest] if rest else np.arange(0)  # whole passes alone take nothing of the rng
        rows = np.concatenate([*[np.arange(size)] * passes, last])
        laps = np.repeat(np.arange(passes + 1), [*[size] * passes, rest])
        return sum(self.file_sizes[:source]) + rows + laps * self.num_rows

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return batches[:-1] if self.drop_last and batches and len(batches[-1]) < self.batch_size else batches

    def locate(self, step: int) -> tuple[int, slice]:
        """(epoch, its micro-batches) of optimizer step `step`, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch, slice(within * self.accumulation, (within + 1) * self.accumulation)


def assign_to_ranks(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Positions 0..n-1 for each rank, by decreasing cost to and fro: counts differ by at most one, costs little.

    Returns:
        An increasing list of positions for each rank.
    """
    of_ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    for turn, position in enumerate(sorted(range(len(costs)), key=lambda i: -costs[i])):
        lap, place = divmod(turn, num_ranks)
        of_ranks[place if lap % 2 == 0 else num_ranks - 1 - place].append(position)
    return [sorted(positions) for positions in of_ranks]


def choose_passages(
    keys: dict[str, Any], known_ids: Iterable[int], rng: np.random.Generator, config: TrainConfig
) -> dict[int, int]:
    """Choose a row's positive and its negatives without repeats; fewer where it has fewer.

    With `exclude_positives` a negative that is a known positive (as normalized text) or the query is passed over.

    Args:
        keys: of the row, see `rows.py`.
        known_ids: its known positives and the query.
        rng: of this row in this epoch.
        config: the run's settings.

    Returns:
        Place in (query, *pos, *neg) -> id of each passage, the positive first.
    """
    ids, num_positives = [keys["query_id"], *keys["pos_ids"], *keys["neg_ids"]], len(keys["pos_ids"])
    positive = 1 + int(rng.integers(num_positives))
    chosen = {positive: ids[positive]}
    used = set(known_ids) if config.exclude_positives else {ids[positive]}
    for i in rng.permutation(len(keys["neg_ids"])).tolist():
        if len(chosen) == config.train_group_size:
            break
        place = 1 + num_positives + i
        if ids[place] not in used:
            used.add(ids[place])
            chosen[place] = ids[place]
    return chosen


def make_example(
    row: int,
    record: dict[str, Any],
    chosen: dict[int, int],
    known_ids: list[int],
    config: TrainConfig,
    own_only: bool = False,
) -> Example:
    """The texts that were chosen of a row, with their instructions, ids and scores."""
    texts = [record["query"], *record["pos"], *record["neg"]]
    passages, teacher = [instructed_passage(texts[place], config) for place in chosen], None
    if config.knowledge_distillation:
        scores = [*record["pos_scores"], *record["neg_scores"]]
        teacher = [scores[place - 1] for place in chosen]
    query = instructed(record["query"], record["prompt"], config)
    return Example(row, query, passages, list(chosen.values()), known_ids, teacher, own_only)


def instructed(query: str, prompt: str | None, config: TrainConfig) -> str:
    """The query behind its row's own prompt, else the run's instruction, else nothing."""
    instruction = prompt if prompt is not None else config.query_instruction_for_retrieval
    return config.query_instruction_format.format(instruction, query) if instruction else query


def instructed_passage(passage: str, config: TrainConfig) -> str:
    """The passage behind the run's instruction, if it has one."""
    instruction = config.passage_instruction_for_retrieval
    return config.passage_instruction_format.format(instruction, passage) if instruction else passage


def has_own_negatives_only(file: Path) -> bool:
    """Whether other rows' passages are no negatives of a source's rows (they may be the same label in other words).

    Its name, or its folder's, says so as in FlagEmbedding: it ends with no_in_batch_neg.
    """
    return any(name.endswith("no_in_batch_neg") for name in (file.stem, file.parent.name))


class TrainingData(torch.utils.data.Dataset[list[Batch]]):
    """Item `step` is the list of micro-batches of that optimizer step for one rank.

    Args:
        config: the run's settings, with both instructions resolved.
        tokenizer: the encoder's.
        max_positions: longest text in tokens that the encoder takes.
        rank, world_size: of this process.
        accumulation: micro-batches a step.
        guide: tokenizer and longest text of the guide encoder, if there is one.
        include_prompt: the tokens of instructions take part in the pooling.

    Raises:
        UserError: a file is missing or has bad lines; fewer rows than a global batch with drop_last.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Any,
        max_positions: int,
        rank: int,
        world_size: int,
        accumulation: int,
        guide: tuple[Any, int] | None = None,
        include_prompt: bool = True,
    ) -> None:
        self.config, self.tokenizer, self.rank, self.world_size, self.guide = config, tokenizer, rank, world_size, guide
        self.include_prompt = include_prompt
        # How texts become rows of fixed shape for the encoder and the guide, where they take them: Encoder.fixed_rows
        self.fixed_rows: FixedRows | None = None
        self.guide_rows: FixedRows | None = None
        self.query_max_len = min(config.query_max_len, max_positions)
        self.passage_max_len = min(config.passage_max_len, max_positions)
        sources = load_sources(config.train_data)
        self.files = [Path(source.path) for source in sources]
        self.own_only = np.array([has_own_negatives_only(file) for file in self.files])
        parts, self.inputs = read_rows(sources, config)
        self.table = datasets.concatenate_datasets(parts)
        self.rows, self.keys = texts_of(self.table), keys_alone(self.table)
        self.known_positives = KnownPositives(self.keys)
        self.prompts = count_prompts(self.keys)
        self.plan = BatchPlan(
            tuple(len(part) for part in parts),
            world_size * config.per_device_train_batch_size,
            accumulation,
            config.seed,
            config.dataloader_drop_last,
            config.same_dataset_within_batch,
            tuple(source.weight for source in sources),
        )
        if self.plan.micro_batches_per_epoch == 0:
            raise UserError(
                f"--train_data gives an epoch of {sum(self.plan.draws)} rows, fewer than one global batch of "
                f"{self.plan.batch_size}: lower --per_device_train_batch_size or drop --dataloader_drop_last"
            )
        self.num_steps = (
            config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * self.plan.steps_per_epoch)
        )
        sample = self.rows[: min(len(self.rows), 100)]
        texts = [*sample["query"], *(positives[0] for positives in sample["pos"])]
        self.tokens_per_char = sum(map(len, tokenize(tokenizer, texts, max_positions))) / max(1, sum(map(len, texts)))
        self._epoch = lru_cache(maxsize=1)(self.plan.epoch)

    def __len__(self) -> int:
        return self.num_steps

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_epoch"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch = lru_cache(maxsize=1)(self.plan.epoch)

    def examples(self, step: int) -> Iterator[tuple[list[Example], list[tuple[int, int]]]]:
        """This rank's examples of each micro-batch of a step, and (queries, passages) of every rank."""
        epoch, micro_batches = self.plan.locate(step)
        for draws in self._epoch(epoch)[micro_batches]:
            rows = draws % self.plan.num_rows
            keys = records(self.keys, rows)
            elsewhere = self.known_positives.of([of_row["query_id"] for of_row in keys])
            rngs = generators(self.config.seed, epoch, draws)
            chosen = [
                choose_passages(of_row, [*of_row["pos_ids"], *more, of_row["query_id"]], rng, self.config)
                for of_row, more, rng in zip(keys, elsewhere, rngs, strict=True)
            ]
            of_ranks = assign_to_ranks(self._costs(keys, chosen), self.world_size)
            counts = [(len(positions), sum(len(chosen[i]) for i in positions)) for positions in of_ranks]
            here = {passage_id for of_row in chosen for passage_id in of_row.values()}  # of all ranks
            own, examples = of_ranks[self.rank], []
            own_only = self.own_only[np.searchsorted(np.cumsum(self.plan.file_sizes), rows, side="right")].tolist()
            for i, record in zip(own, records(self.table, rows[own]) if own else (), strict=True):
                known = [*record["pos_ids"], *filter(here.__contains__, elsewhere[i]), record["query_id"]]
                known = list(dict.fromkeys(known))
                examples.append(make_example(int(rows[i]), record, chosen[i], known, self.config, own_only[i]))
            yield examples, counts

    def _costs(self, keys: Sequence[dict[str, Any]], chosen: Sequence[Iterable[int]]) -> list[float]:
        """About the number of tokens, from the characters: tokenizing other ranks' rows would cost every rank all."""
        config, ratio, longest = self.config, self.tokens_per_char, self.passage_max_len
        costs, more = [], len(instructed_passage("", config))
        for of_row, places in zip(keys, chosen, strict=True):
            lengths = of_row["lengths"]
            query = len(instructed("", of_row["prompt"], config)) + lengths[0]
            passages = sum([min((lengths[place] + more) * ratio, longest) for place in places])
            costs.append(min(query * ratio, self.query_max_len) + passages)
        return costs

    def __getitem__(self, step: int) -> list[Batch]:
        return [self.collate(*micro_batch) for micro_batch in self.examples(step)]

    def collate(self, examples: Sequence[Example], rank_counts: list[tuple[int, int]]) -> Batch:
        """Tokenize and number the columns."""
        queries = [example.query for example in examples]
        passages = [passage for example in examples for passage in example.passages]
        tokens = self._tokenize(self.tokenizer, queries, passages, self.passage_max_len)
        if not self.include_prompt:
            tokens = Tokens.from_lists([ids.tolist() for ids in tokens.texts()], self._prompt_lengths(examples))
        ends = np.cumsum([len(example.passages) for example in examples]).tolist()
        starts = [0, *ends[:-1]]
        guide_tokens = self._tokenize(self.guide[0], queries, passages, self.guide[1]) if self.guide else None
        teachers = [example.teacher for example in examples if example.teacher]
        return Batch(
            tokens=tokens,
            own_BG=_padded([list(range(start, end)) for start, end in zip(starts, ends, strict=False)], -1),
            passage_id_R=torch.tensor([i for example in examples for i in example.passage_ids], dtype=torch.int64),
            excluded_BX=_padded([example.known_ids for example in examples], -1),
            teacher_BG=_padded(teachers, 0.0) if self.config.knowledge_distillation else None,
            rank_counts=rank_counts,
            rows=[example.row for example in examples],
            guide_tokens=guide_tokens,
            own_only_B=torch.tensor([e.own_only for e in examples], dtype=torch.bool) if self.own_only.any() else None,
            chunks=self._chunks(tokens, self.fixed_rows),
            guide_chunks=self._chunks(guide_tokens, self.guide_rows),
        )

    def _chunks(self, tokens: Tokens | None, rows: FixedRows | None) -> list[FixedRow] | None:
        if tokens is None or rows is None:
            return None
        most = self.config.max_tokens
        return [rows.row(part, max_tokens=most) for part in tokens.split(self.config.sub_batch_size, most)]

    def _tokenize(self, tokenizer: Any, queries: list[str], passages: list[str], longest: int) -> Tokens:
        token_lists = tokenize(tokenizer, queries, min(self.query_max_len, longest))
        return Tokens.from_lists(token_lists + tokenize(tokenizer, passages, min(self.passage_max_len, longest)))

    def _prompt_lengths(self, examples: Sequence[Example]) -> list[int]:
        """Of every query, then of every passage, how many tokens its instruction is."""
        asked = [instructed("", self.rows[example.row]["prompt"], self.config) for example in examples]
        told = self.config.passage_instruction_for_retrieval
        told = self.config.passage_instruction_format.format(told, "") if told else ""
        query_lengths = [prompt_length(self.tokenizer, prompt, self.query_max_len) for prompt in asked]
        passage_length = prompt_length(self.tokenizer, told, self.passage_max_len)
        return query_lengths + [passage_length] * sum(len(example.passages) for example in examples)


def _padded(rows: Sequence[Sequence[float]], fill: float) -> Tensor:
    width = max(map(len, rows), default=0)
    dtype = torch.int64 if isinstance(fill, int) else torch.float64
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype).reshape(len(rows), width)
