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
        query_N = keys.select_columns(["query_id"]).with_format("arrow")[:]["query_id"].to_numpy()
        query_of_row, num_rows = np.unique(query_N, return_counts=True)
        self.query_U = query_of_row[num_rows > 1]
        ids, queries = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        columns = keys.select_columns(["query_id", "pos_ids"]).with_format("arrow")
        for part in columns.iter(10_000) if len(self.query_U) else ():
            pos_ids = part["pos_ids"].combine_chunks()
            query_of_id = np.repeat(part["query_id"].to_numpy(), pos_ids.value_lengths().to_numpy())
            _, is_known = self._places(query_of_id)
            ids.append(pos_ids.flatten().to_numpy()[is_known])
            queries.append(query_of_id[is_known])
        query_K = np.concatenate(queries)
        order_K = np.argsort(query_K, kind="stable")
        self.id_K = np.concatenate(ids)[order_K]
        self.start_U1 = np.append(np.searchsorted(query_K[order_K], self.query_U), len(query_K))

    def of(self, query_ids: Sequence[int]) -> list[list[int]]:
        """For each query the ids of its positives; none for one that stands on a single row, which has them itself."""
        if not len(self.query_U):
            return [[]] * len(query_ids)
        place, is_known = self._places(np.asarray(query_ids, np.int64))
        start, end = self.start_U1[place], np.where(is_known, self.start_U1[place + 1], self.start_U1[place])
        return [self.id_K[i:j].tolist() for i, j in zip(start, end, strict=True)]

    def _places(self, query_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each query is among those that are known, if it is."""
        place = np.minimum(np.searchsorted(self.query_U, query_ids), len(self.query_U) - 1)
        return place, self.query_U[place] == query_ids
