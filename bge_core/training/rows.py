"""Training rows as one table on disk, read, checked and hashed once; ranks and workers share its pages.

    texts    query, pos, neg, pos_scores, neg_scores, prompt
    keys     prompt; query_id, pos_ids, neg_ids: the `text_id` of each text; lengths: characters of query, pos, neg

The keys are all that a rank needs of rows that other ranks train on.

Shapes: N rows, U queries that stand on several rows, K positives of these.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy as np

from bge_core import UserError
from bge_core.files import atomic, text
from bge_core.files.sources import YAML_SUFFIXES, Source, describe_source, read_training_source
from bge_core.runtime.config import TrainConfig

_STRINGS, _NUMBERS = (datasets.List(datasets.Value(dtype)) for dtype in ("string", "float64"))
_TEXTS = {
    "query": datasets.Value("string"),
    "pos": _STRINGS,
    "neg": _STRINGS,
    "pos_scores": _NUMBERS,
    "neg_scores": _NUMBERS,
    "prompt": datasets.Value("string"),
}
_IDS = datasets.List(datasets.Value("int64"))
_KEYS = {
    "query_id": datasets.Value("int64"),
    "pos_ids": _IDS,
    "neg_ids": _IDS,
    "lengths": datasets.List(datasets.Value("int32")),
}


def read_rows(sources: Sequence[Source], config: TrainConfig) -> tuple[list[datasets.Dataset], list[dict[str, Any]]]:
    """The rows of each source, at most `max_example_num_per_dataset` drawn with the seed, and the manifest's inputs.

    Raises:
        UserError: a file is missing or has bad lines.
    """
    parts, inputs = [], []
    for i, source in enumerate(sources):
        entry = describe_source(source.path, 0)
        entry = {"path": source.path, "sha256": entry.get("revision")} | entry
        rows = _load(replace(source, weight=1.0), entry["sha256"], config.knowledge_distillation)
        inputs.append(entry | {"rows": len(rows)})
        if len(rows) > config.max_example_num_per_dataset:
            order = np.random.default_rng((config.seed, i)).permutation(len(rows))
            rows = rows.select(np.sort(order[: config.max_example_num_per_dataset]))
        parts.append(rows)
    # A list of sources decides, by its prompts and weights, about the order of the data as its files do.
    inputs += [describe_source(path, 0) for path in config.train_data if path.endswith(YAML_SUFFIXES)]
    return parts, inputs


def _load(source: Source, content: str, with_scores: bool) -> datasets.Dataset:
    """`content`, and how texts are hashed, make the cache of `datasets` follow both."""
    arguments = {
        "source": source,
        "content": content,
        "with_scores": with_scores,
        "hashes": atomic.sha256(text.__file__),
    }
    try:
        return datasets.Dataset.from_generator(
            _with_keys, features=datasets.Features(_TEXTS | _KEYS), gen_kwargs=arguments
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _with_keys(source: Source, content: str, with_scores: bool, hashes: str) -> Iterator[dict[str, Any]]:
    for row in read_training_source(source, with_scores=with_scores, streaming=False):
        texts = {name: row.get(name) for name in _TEXTS} | {"neg": row.get("neg") or []}
        yield texts | keys_of(texts)


def keys_of(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a row's texts for those that do not read them."""
    return {
        "query_id": text.text_id(row["query"]),
        "pos_ids": [text.text_id(passage) for passage in row["pos"]],
        "neg_ids": [text.text_id(passage) for passage in row["neg"]],
        "lengths": [len(passage) for passage in (row["query"], *row["pos"], *row["neg"])],
    }


def texts_of(rows: datasets.Dataset) -> datasets.Dataset:
    """The columns that a file has."""
    return rows.select_columns(list(_TEXTS))


def keys_alone(rows: datasets.Dataset) -> datasets.Dataset:
    """The columns without texts."""
    return rows.select_columns(["prompt", *_KEYS])


def records(rows: datasets.Dataset, numbers: np.ndarray | list[int]) -> list[dict[str, Any]]:
    """Some rows, one dict each."""
    columns = rows[numbers]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def count_prompts(keys: datasets.Dataset) -> dict[str | None, int]:
    """Each prompt that rows have of their own -> on how many; None: those without."""
    found = keys.select_columns(["prompt"]).with_format("arrow")[:]["prompt"].value_counts().to_pylist()
    return {entry["values"]: entry["counts"] for entry in found}


class KnownPositives:
    """The positives of every query that stands on several rows, of any source: what answers it in one of them is no
    negative of it in another. Memory: 16 bytes for each of these queries, 8 for each of their positives.

    Args:
        keys: of all rows.
    """

    def __init__(self, keys: datasets.Dataset) -> None:
        query_N: np.ndarray = keys.select_columns(["query_id"]).with_format("numpy")[:]["query_id"]
        order_N = np.argsort(query_N, kind="stable")
        same_as_next = np.diff(query_N[order_N]) == 0
        rows = order_N[np.append(same_as_next, False) | np.insert(same_as_next, 0, False)]
        query_of_row = query_N[rows]
        self.query_U, first_U = np.unique(query_of_row, return_index=True)
        ids, counts = [np.empty(0, np.int64)], [np.zeros(1, np.int64)]
        for part in (
            keys.select(rows).select_columns(["pos_ids"]).with_format("arrow").iter(10_000) if len(rows) else ()
        ):
            lists = part["pos_ids"].combine_chunks()
            ids.append(lists.flatten().to_numpy())
            counts.append(lists.value_lengths().to_numpy())
        starts = np.cumsum(np.concatenate(counts))
        self.id_K, self.start_U1 = np.concatenate(ids), starts[np.append(first_U, len(rows))]

    def of(self, query_ids: Sequence[int]) -> list[list[int]]:
        """For each query the ids of its positives; none for one that stands on a single row, which has them itself."""
        if not len(self.query_U):
            return [[]] * len(query_ids)
        place_B = np.minimum(np.searchsorted(self.query_U, query_ids), len(self.query_U) - 1)
        end_B = np.where(self.query_U[place_B] == query_ids, self.start_U1[place_B + 1], self.start_U1[place_B])
        return [self.id_K[start:end].tolist() for start, end in zip(self.start_U1[place_B], end_B, strict=True)]
