"""What a stage reads, beyond one JSON-lines file: Parquet files, folders, datasets of the Hugging Face hub.

data.jsonl, data.parquet      a file; also .json, and .jsonl.gz
folder                        those below it, sorted; none that is hidden, and nothing that a stage left there
org/name[[:config]:split]     a dataset of the hub; without a split: train
sources.yaml                  several of them, each with its instruction and weight; for training rows:

    - path: faq.jsonl         relative to this file's folder, if it is there
      prompt: "..."           query instruction of its rows; a row's own prompt wins
      weight: 2.0             how often its rows come in an epoch; default 1
"""

import difflib
import hashlib
import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bge_core import UserError
from bge_core.files import atomic, records
from bge_core.files.records import Check, Row

logger = logging.getLogger(__name__)

Place = tuple[str, int]  # file or dataset, and the line or row in it, counted from 1

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
YAML_SUFFIXES = (".yaml", ".yml")
_REFUSED = {
    **dict.fromkeys((".csv", ".tsv", ".xlsx", ".xls"), "is a table; make JSON lines of it with prepare.py"),
    **dict.fromkeys(YAML_SUFFIXES, "a list of sources names data files and folders, and training rows only"),
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[^:/]+){0,2}", re.ASCII)


@dataclass(frozen=True)
class Source:
    """One source of training rows.

    Args:
        path: a file, a folder or a dataset of the hub.
        prompt: query instruction of its rows that have none; None: the run's.
        weight: how often its rows come in an epoch. 2.5: twice, and a random half of them a third time.
    """

    path: str
    prompt: str | None = None
    weight: float = 1.0


_KEYS = {
    "path": (lambda value: isinstance(value, str) and value.strip(), "a file, a folder or a dataset of the hub"),
    "prompt": (lambda value: value is None or isinstance(value, str), "text, in quotes"),
    "weight": (lambda value: type(value) in (int, float) and 0 < value < math.inf, "a number above 0, as 2.0"),
}


def is_hub_name(path: str | Path) -> bool:
    """Whether this names a dataset of the hub: it has the form of one, and nothing like it is here."""
    is_file = str(path).lower().endswith((*SUFFIXES, *_REFUSED))
    return _HUB_NAME.fullmatch(str(path)) is not None and not is_file and not Path(path).parent.exists()


def files_below(folder: Path, output: Path | None = None) -> Iterator[Path]:
    """The files below a folder, through links, none that is hidden (or Excel's lock), and nothing that a stage left.

    Args:
        folder: where to look.
        output: a folder below it that is not looked at.

    Raises:
        UserError: below it lies what prepare.py wrote, and so its test questions.
    """
    seen = {os.path.realpath(output)} if output else set()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        manifest = atomic.read_json(Path(place, "manifest.json")) if "manifest.json" in names else None
        stage = manifest.get("stage") if isinstance(manifest, dict) else None
        if stage == "prepare":
            raise UserError(f"{place}: holds the test questions, too; name one file, as {Path(place, 'train.jsonl')}")
        if stage in ("train", "checkpoint", "merge", "evaluate"):
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        yield from (Path(place, name) for name in names if not name.startswith((".", "~$")))


def warn_of_copies(files: Iterable[Path]) -> None:
    """Say which files have the same content: their rows come twice."""
    of_size, of_content = defaultdict(list), defaultdict(list)
    for file in files:
        of_size[file.stat().st_size].append(file)
    for file in (file for alike in of_size.values() if len(alike) > 1 for file in alike):
        of_content[atomic.sha256(file)].append(str(file))
    for alike in of_content.values():
        if len(alike) > 1:
            logger.warning("%s have the same content: their rows are read %d times", ", ".join(alike), len(alike))


def list_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files named, and those of `SUFFIXES` below the folders named, each once, sorted by path.

    Raises:
        UserError: nothing there, or a table or list of sources, which is no data file.
    """
    found: set[Path] = set()
    for path in map(Path, paths):
        if path.is_dir():
            inside = {file for file in files_below(path) if file.name.lower().endswith(SUFFIXES) and file.is_file()}
            inside = {file for file in inside if not file.name.endswith("manifest.json")}
            if not inside:
                raise UserError(f"{path}: the folder holds no .jsonl file, nor .json or .parquet")
            found |= inside
        elif (suffix := Path(path.name.lower().removesuffix(".gz")).suffix) in _REFUSED:
            raise UserError(f"{path}: {_REFUSED[suffix]}")
        elif not path.is_file():
            raise UserError(f"{path}: no such file or folder")
        else:
            found.add(path)
    return sorted(found)


def read_source(path: str | Path, check: Check, *, streaming: bool = True) -> Iterator[tuple[Place, Row]]:
    """Yield (place, row) of a file, a folder or a dataset of the hub.

    Args:
        path: its name.
        check: says what is wrong with a row and what to do, or None.
        streaming: read a dataset of the hub as it comes; False: download it first, and find it there when offline.

    Raises:
        UserError: nothing there; a file's bad rows (after its last one: their number and the first ten); the first bad
            row of a dataset of the hub, or that it cannot be had; no row at all.
    """
    num_rows = 0
    files = [] if is_hub_name(path) else list_files([path])
    warn_of_copies(files)
    for name in map(str, files) if files else [str(path)]:
        if is_hub_name(path):
            rows = records.checked(name, _hub_rows(name, streaming), check, max_bad=1)
        elif name.lower().endswith(".parquet"):
            rows = records.checked(name, _parquet_rows(name), check)
        else:
            rows = records.read_jsonl(name, check)
        for number, row in rows:
            num_rows += 1
            yield (name, number), row
    if not num_rows:
        raise UserError(f"{path}: holds no row")


@contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the network, of the hub, of what is in the file: too many kinds to name
        raise UserError(f"{what}: {error}") from error


def _parquet_rows(file: str) -> Iterator[tuple[int, Row]]:
    from pyarrow import parquet

    with _as_user_error(f"{file}: not readable as Parquet"), parquet.ParquetFile(file) as table:
        batches = table.iter_batches(batch_size=1024)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


def _hub_rows(name: str, streaming: bool) -> Iterator[tuple[int, Row]]:
    import datasets

    path, *more = name.split(":")
    split = more.pop() if more else "train"
    remedy = "no such file, nor does the hub give it (offline? name files, or set HF_ENDPOINT to a mirror)"
    with _as_user_error(f"{name}: {remedy}"):
        yield from enumerate(datasets.load_dataset(path, *more, split=split, streaming=streaming), start=1)


def read_training_source(source: Source, *, with_scores: bool = False, streaming: bool = True) -> Iterator[Row]:
    """Yield a source's training rows, with its prompt where a row has none.

    Raises:
        UserError: see `read_source`.
    """
    check = partial(records.check_training_row, with_scores=with_scores)
    for _, row in read_source(source.path, check, streaming=streaming):
        without = source.prompt is not None and row.get("prompt") is None
        yield row | {"prompt": source.prompt} if without else row


def read_training_rows(paths: Sequence[str | Path]) -> list[Row]:
    """All training rows of several sources, sorted by path; weights do not count here.

    Raises:
        UserError: see `load_sources` and `read_source`.
    """
    return [row for source in load_sources(paths) for row in read_training_source(source)]


def read_corpus(path: str | Path) -> list[str]:
    """The texts of a corpus, each after its title where it has one.

    Raises:
        UserError: see `read_source`.
    """
    return [records.passage_text(row) for _, row in read_source(path, records.check_corpus_row)]


def describe_source(path: str | Path, num_rows: int) -> Row:
    """A manifest's entry of a source: "sha256", or the "revision" of a dataset of the hub.

    A folder and a sources.yaml have a list "files", and the hash is of these files' hashes, prompts and weights.
    """
    return {"path": str(path)} | _content(str(path)) | {"rows": num_rows}


def _content(path: str) -> dict[str, Any]:
    if is_hub_name(path):
        return {"revision": _revision(path.split(":")[0])}
    if not Path(path).is_dir() and not path.endswith(YAML_SUFFIXES):
        return {"sha256": atomic.sha256(path)}
    files = [asdict(source) | _content(source.path) for source in _list_sources([path])]
    contents = [[value for name, value in file.items() if name not in ("path", "files")] for file in files]
    return {"sha256": hashlib.sha256(repr(contents).encode()).hexdigest(), "files": files}


def _revision(name: str) -> str | None:
    """The commit that the hub has now, or None where it does not say."""
    import huggingface_hub

    with suppress(Exception):  # out of reach: the rows come from an earlier download
        return huggingface_hub.HfApi().dataset_info(name, timeout=10).sha
    return None


def load_sources(paths: Sequence[str | Path]) -> list[Source]:
    """The sources that these names stand for, sorted; one that is named twice in the same way counts once.

    A file of a folder is a source of its own; what a sources.yaml lists, folder or not, is one each. Files of the same
    content are warned of.

    Raises:
        UserError: nothing there; a sources.yaml with an unknown key, a wrong type, a weight that is not above 0 or a
            missing file (file and number of the entry are named).
    """
    found = _list_sources(paths)
    warn_of_copies(file for file in dict.fromkeys(Path(source.path) for source in found) if file.is_file())
    return found


def _list_sources(paths: Sequence[str | Path]) -> list[Source]:
    found: set[Source] = set()
    for path in paths:
        if str(path).endswith(YAML_SUFFIXES):
            found.update(_read_yaml(Path(path)))
        else:
            found.update(Source(str(name)) for name in ([path] if is_hub_name(path) else list_files([path])))
    return sorted(found, key=lambda source: (Path(source.path), source.prompt or "", source.weight))


def _read_yaml(file: Path) -> Iterator[Source]:
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: not readable as YAML: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{file}: must be a list of sources; begin each with '- path: ' and a file")
    for number, entry in enumerate(entries, start=1):
        try:
            yield _source(file.parent, entry)
        except UserError as error:
            raise UserError(f"{file}, entry {number}: {error}") from None


def _source(folder: Path, entry: Any) -> Source:
    if not isinstance(entry, dict) or "path" not in entry:
        raise UserError("has no 'path'; begin it with '- path: ' and a file")
    for key, value in entry.items():
        if key not in _KEYS:
            (nearest,) = difflib.get_close_matches(str(key), _KEYS, n=1, cutoff=0)
            raise UserError(f"unknown key {key!r}; did you mean {nearest!r}? There are {', '.join(_KEYS)}")
        fits, what = _KEYS[key]
        if not fits(value):
            raise UserError(f"{key} is {value!r}; it must be {what}")
    named = os.path.expanduser(entry["path"])
    path = str(folder / named) if (folder / named).exists() else named
    if not is_hub_name(path):
        list_files([path])  # is it there?
    return Source(path, entry.get("prompt"), float(entry.get("weight", 1)))
