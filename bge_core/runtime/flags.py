"""What a flag is: its default, help and bound; and the flags that several stages share."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, NamedTuple, get_args

from bge_core import UserError
from bge_core.runtime.refused import nearest

logger = logging.getLogger(__name__)

Attention = Literal["auto", "padded", "sdpa", "varlen", "flash"]
Pooling = Literal["cls", "mean", "last_token", "max", "mean_sqrt_len", "weightedmean"]
Similarity = Literal["cosine", "dot"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


class Bound(NamedTuple):
    """What a number has to be (each of them, in a list), and what to say of one that is not."""

    holds: Callable[[float], bool]
    remedy: str


ABOVE_0 = Bound(lambda x: x > 0, "use a number above 0")
FROM_0 = Bound(lambda x: x >= 0, "use 0 or a number above it")
SHARE = Bound(lambda x: 0 <= x <= 1, "use a share from 0 to 1")
LIKENESS = Bound(lambda x: 0 < x <= 1, "use a number above 0, up to 1")
BELOW_1 = Bound(lambda x: 0 <= x < 1, "use 0 to below 1")
DECAY = Bound(lambda x: 0 < x < 1, "use a number above 0 and below 1, as 0.999")


def flag(default: Any, help: str, bound: Bound | None = None, *, alias: str | None = None) -> Any:
    """A field of a stage: what is not given is `default`; `bound` is checked by Stage."""
    metadata = {"help": help, "bound": bound, "aliases": [f"--{alias}"] if alias else []}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def required(help: str, *, alias: str | None = None) -> Any:
    """A field that must be given."""
    return flag(MISSING, help, alias=alias)


def need(condition: bool, name: str, value: object, remedy: str) -> None:
    """UserError, which names field, value and remedy, unless the condition holds."""
    if not condition:
        raise UserError(f"--{name} {value!r}: {remedy}")


def need_one_of(name: str, value: str, known: Sequence[str]) -> None:
    """UserError, with the nearest name, unless the value is known."""
    remedy = f"use {', '.join(known[:-1])} or {known[-1]}"
    need(value in known, name, value, f"{nearest(value, known)} {remedy}".strip())


@dataclass(kw_only=True)
class Stage:
    """What all stages are checked for."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value, bound = getattr(self, f.name), f.metadata["bound"]
            for one in value if isinstance(value, list) else [value]:
                if bound and one is not None:
                    need(bound.holds(one), f.name, one, bound.remedy)

    def _need_unset(self, names: str, remedy: str) -> None:
        for name in names.split():
            need(not getattr(self, name), name, getattr(self, name), remedy)


@dataclass(kw_only=True)
class ModelStage(Stage):
    """Stages that load and run models."""

    trust_remote_code: bool = flag(False, "Run model code that comes with the checkpoint.")
    fp16: bool = flag(False, "Compute in float16 (GPU).")
    bf16: bool = flag(False, "Compute in bfloat16.")

    def __post_init__(self) -> None:
        super().__post_init__()
        need(not (self.fp16 and self.bf16), "fp16", True, "cannot go with --bf16: choose one")


@dataclass(kw_only=True)
class EncodingStage(ModelStage):
    """Stages that turn queries and passages into vectors."""

    query_instruction_for_retrieval: str | None = flag(
        None, "Put before each query. Default: the model's stored query prompt, if any; '' for none."
    )
    passage_instruction_for_retrieval: str | None = flag(None, "Likewise for passages.")
    query_prompt_name: str | None = flag(
        None, "Put the model's stored prompt of this name before each query, as search_query. Default: query."
    )
    passage_prompt_name: str | None = flag(None, "Likewise for passages. Default: document, passage or corpus.")
    sentence_pooling_method: Pooling | None = flag(
        None, "Default: what the model's sentence-transformers files say, else cls.", alias="pooling_method"
    )
    query_max_len: int = flag(512, "Longest query in tokens.", ABOVE_0)
    passage_max_len: int = flag(512, "Longest passage in tokens.", ABOVE_0)
    attention: Attention = flag(
        "auto", "How attention is computed without padding: auto takes the fastest that works; padded: as stock models."
    )
    cuda_graphs: bool = flag(
        False, "On a GPU, in half precision: a pass of the model is one launch. Not yet measured on a GPU: off."
    )


@dataclass(kw_only=True)
class CorpusStage(EncodingStage):
    """Stages that encode a corpus."""

    max_tokens: int | None = flag(
        None, "At most this many tokens per encoding batch. Default: 8192, on a CPU 2048.", ABOVE_0
    )
    batch_size: int | None = flag(None, "At most this many texts per encoding batch.", ABOVE_0)
    embedding_cache_dir: str | None = flag(
        None,
        "Folder where vectors are kept, by content: a second run on the same texts encodes nothing. Default: none.",
    )
    cache_dir: str | None = flag(None, "The earlier name of --embedding_cache_dir.")
    cache_shard_size: int = flag(4096, "Texts a file of the cache; a killed run loses at most so many.", ABOVE_0)

    def __post_init__(self) -> None:
        super().__post_init__()
        old, new = self.cache_dir, self.embedding_cache_dir  # elsewhere cache_dir is the folder of the hub's downloads
        if old is not None:
            need(new in (None, old), "cache_dir", old, f"is the earlier name of --embedding_cache_dir {new}: drop it")
            logger.warning("--cache_dir: the vectors' folder is called --embedding_cache_dir now")
            self.cache_dir, self.embedding_cache_dir = None, old
