"""Training data as a pure function of (seed, step): which rows, which passages, which rank.

    rows (memory-mapped) -> BatchPlan: rows of each global micro-batch -> choose passages -> assign to ranks -> tokens

Nothing here depends on the number of workers, on where a run was resumed or, at an equal global batch, on the number of
ranks. One item of `TrainingData` is one optimizer step of one rank.

Shapes, of one rank's micro-batch: B queries, R passages, G most passages of a query, X most known positives of a query.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from bge_core import UserError
from bge_core.encoder.tokens import Tokens, tokenize
from bge_core.files.sources import YAML_SUFFIXES, Source, describe_source, load_sources, read_training_source
from bge_core.files.text import text_id
from bge_core.runtime.config import TrainConfig
from bge_core.training.batch import Batch

_FEATURES = datasets.Features(
    {
        "query": datasets.Value("string"),
        "pos": datasets.List(datasets.Value("string")),
        "neg": datasets.List(datasets.Value("string")),
        "pos_scores": datasets.List(datasets.Value("float64")),
        "neg_scores": datasets.List(datasets.Value("float64")),
        "prompt": datasets.Value("string"),
    }
)


@dataclass(frozen=True)
class Example:
    """A row with its passages chosen: the positive first, then negatives; `teacher` scores in that order, or None."""

    row: int
    query: str
    passages: list[str]
    passage_ids: list[int]
    known_ids: list[int]
    teacher: list[float] | None


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


def choose_example(row: int, record: dict[str, Any], rng: np.random.Generator, config: TrainConfig) -> Example:
    """Choose a row's positive and its negatives without repeats; fewer where it has fewer.

    With `exclude_positives` a negative that is a known positive (as normalized text) or the query is passed over.
    """
    chosen = int(rng.integers(len(record["pos"])))
    passages, teacher = [record["pos"][chosen]], []
    known_ids = list(dict.fromkeys([*map(text_id, record["pos"]), text_id(record["query"])]))
    passage_ids = [text_id(passages[0])]
    used = set(known_ids) if config.exclude_positives else {passage_ids[0]}
    negatives = record["neg"] or []
    picked = []
    for i in rng.permutation(len(negatives)):
        if len(passages) == config.train_group_size:
            break
        negative_id = text_id(negatives[i])
        if negative_id not in used:
            used.add(negative_id)
            picked.append(int(i))
            passages.append(negatives[i])
            passage_ids.append(negative_id)
    if config.knowledge_distillation:
        teacher = [record["pos_scores"][chosen], *(record["neg_scores"][i] for i in picked)]
    query = instructed(record["query"], record["prompt"], config)
    if config.passage_instruction_for_retrieval:
        join = config.passage_instruction_format.format
        passages = [join(config.passage_instruction_for_retrieval, passage) for passage in passages]
    return Example(row, query, passages, passage_ids, known_ids, teacher or None)


def instructed(query: str, prompt: str | None, config: TrainConfig) -> str:
    """The query behind its row's own prompt, else the run's instruction, else nothing."""
    instruction = prompt if prompt is not None else config.query_instruction_for_retrieval
    return config.query_instruction_format.format(instruction, query) if instruction else query


class TrainingData(torch.utils.data.Dataset[list[Batch]]):
    """Item `step` is the list of micro-batches of that optimizer step for one rank.

    Args:
        config: the run's settings, with both instructions resolved.
        tokenizer: the encoder's.
        max_positions: longest text in tokens that the encoder takes.
        rank, world_size: of this process.
        accumulation: micro-batches a step.
        guide: tokenizer and longest text of the guide encoder, if there is one.

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
    ) -> None:
        self.config, self.tokenizer, self.rank, self.world_size, self.guide = config, tokenizer, rank, world_size, guide
        self.query_max_len = min(config.query_max_len, max_positions)
        self.passage_max_len = min(config.passage_max_len, max_positions)
        sources = load_sources(config.train_data)
        self.files = [Path(source.path) for source in sources]
        parts, self.inputs = _read_sources(sources, config)
        self.rows = datasets.concatenate_datasets(parts)
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
            chosen = [
                choose_example(row, record, np.random.default_rng((self.config.seed, epoch, draw)), self.config)
                for draw, row, record in zip(draws.tolist(), rows.tolist(), self._records(rows), strict=True)
            ]
            of_ranks = assign_to_ranks([self._cost(example) for example in chosen], self.world_size)
            counts = [(len(positions), sum(len(chosen[i].passages) for i in positions)) for positions in of_ranks]
            yield [chosen[i] for i in of_ranks[self.rank]], counts

    def _records(self, row_numbers: np.ndarray) -> list[dict[str, Any]]:
        columns = self.rows[row_numbers]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _cost(self, example: Example) -> float:
        """About the number of tokens, from the characters: tokenizing other ranks' rows would cost every rank all."""
        passages = sum(min(len(text) * self.tokens_per_char, self.passage_max_len) for text in example.passages)
        return min(len(example.query) * self.tokens_per_char, self.query_max_len) + passages

    def __getitem__(self, step: int) -> list[Batch]:
        return [self.collate(*micro_batch) for micro_batch in self.examples(step)]

    def collate(self, examples: Sequence[Example], rank_counts: list[tuple[int, int]]) -> Batch:
        """Tokenize and number the columns."""
        queries = [example.query for example in examples]
        passages = [passage for example in examples for passage in example.passages]
        tokens = self._tokenize(self.tokenizer, queries, passages, self.passage_max_len)
        ends = np.cumsum([len(example.passages) for example in examples]).tolist()
        starts = [0, *ends[:-1]]
        teachers = [example.teacher for example in examples if example.teacher]
        return Batch(
            tokens=tokens,
            own_BG=_padded([list(range(start, end)) for start, end in zip(starts, ends, strict=False)], -1),
            passage_id_R=torch.tensor([i for example in examples for i in example.passage_ids], dtype=torch.int64),
            excluded_BX=_padded([example.known_ids for example in examples], -1),
            teacher_BG=_padded(teachers, 0.0) if self.config.knowledge_distillation else None,
            rank_counts=rank_counts,
            rows=[example.row for example in examples],
            guide_tokens=self._tokenize(self.guide[0], queries, passages, self.guide[1]) if self.guide else None,
        )

    def _tokenize(self, tokenizer: Any, queries: list[str], passages: list[str], longest: int) -> Tokens:
        token_lists = tokenize(tokenizer, queries, min(self.query_max_len, longest))
        return Tokens.from_lists(token_lists + tokenize(tokenizer, passages, min(self.passage_max_len, longest)))


def _padded(rows: Sequence[Sequence[float]], fill: float) -> Tensor:
    width = max(map(len, rows), default=0)
    dtype = torch.int64 if isinstance(fill, int) else torch.float64
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype).reshape(len(rows), width)


def _read_rows(source: Source, content: str, with_scores: bool) -> Iterator[dict[str, Any]]:
    """The rows of a source, reduced to known fields. `content` makes the cache of `datasets` follow the content."""
    for row in read_training_source(source, with_scores=with_scores, streaming=False):
        yield {name: row.get(name) for name in _FEATURES} | {"neg": row.get("neg") or []}


def _read_sources(
    sources: Sequence[Source], config: TrainConfig
) -> tuple[list[datasets.Dataset], list[dict[str, Any]]]:
    """The rows of each source, at most `max_example_num_per_dataset` drawn with the seed, and the manifest's inputs."""
    parts, inputs = [], []
    for i, source in enumerate(sources):
        entry = describe_source(source.path, 0)
        entry = {"path": source.path, "sha256": entry.get("revision")} | entry
        rows = _load_rows(replace(source, weight=1.0), entry["sha256"], config.knowledge_distillation)
        inputs.append(entry | {"rows": len(rows)})
        if len(rows) > config.max_example_num_per_dataset:
            order = np.random.default_rng((config.seed, i)).permutation(len(rows))
            rows = rows.select(np.sort(order[: config.max_example_num_per_dataset]))
        parts.append(rows)
    # A list of sources decides, by its prompts and weights, about the order of the data as its files do.
    inputs += [describe_source(path, 0) for path in config.train_data if path.endswith(YAML_SUFFIXES)]
    return parts, inputs


def _load_rows(source: Source, content: str, with_scores: bool) -> datasets.Dataset:
    arguments = {"source": source, "content": content, "with_scores": with_scores}
    try:
        rows = datasets.Dataset.from_generator(_read_rows, features=_FEATURES, gen_kwargs=arguments)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    return rows
