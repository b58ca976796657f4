"""The file formats between the stages: read with file and line in every error, written whole or not at all.

Every file is JSON lines, UTF-8, one object a line. Reading checks a whole file, counts all bad lines, shows the first
ten and only then raises. Writing goes to a temporary name beside the target, which is renamed when it is complete.
"""

import hashlib
import json
import os
import platform
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bge_core import UserError, __version__

Row = dict[str, Any]
Check = Callable[[Row], str | None]
MAX_SHOWN = 10


def normalize_text(text: str) -> str:
    """NFKC and single spaces: the form in which two texts are "the same" everywhere in this project."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def text_id(text: str) -> int:
    """63-bit hash of the normalized text (blake2b); equal texts have equal ids in every process and every run."""
    digest = hashlib.blake2b(normalize_text(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class BadLines:
    """Counts what is wrong with the input and keeps the first ten, so that a user mends a file in one go."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0

    def add(self, path: str | Path, place: object, problem: object) -> None:
        """`place`: a line or row counted from 1, or what else leads there."""
        self.count += 1
        if self.count <= MAX_SHOWN:
            self.shown.append(f"  {path}:{place}: {problem}")

    def refuse(self) -> None:
        """Raise UserError if there was any."""
        if self.count > MAX_SHOWN:
            self.shown.append(f"  ... and {self.count - MAX_SHOWN} more")
        if self.count:
            raise UserError(
                "\n".join([f"{self.count} bad line{'s' * (self.count > 1)}: nothing was written", *self.shown])
            )


def read_jsonl(path: str | Path, check: Check) -> Iterator[tuple[int, Row]]:
    """Yield (line number from 1, object) of a JSON-lines file; blank lines are skipped.

    Args:
        path: the file.
        check: says what is wrong with an object and what to do, or None.

    Raises:
        UserError: no such file, or (after the last line) how many lines are bad, with the first ten of them.
    """
    bad = BadLines()
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        row, problem = _parse(line)
        if problem is None:
            problem = check(row)
        if problem is None:
            yield number, row
        else:
            bad.add(path, number, problem)
    bad.refuse()


def _lines(path: str | Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file):
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a file") from None


def _parse(line: bytes) -> tuple[Row, str | None]:
    try:
        return parse_object(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8 (byte {error.start}); convert the file, for example with iconv -f GB18030 -t UTF-8"


def parse_object(line: str) -> tuple[Row, str | None]:
    """The JSON object of one line, and what is wrong with the line, or None."""
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        return {}, f"not JSON ({error.msg}, column {error.colno}); write one object a line"
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets within each other
        return {}, f"not readable as JSON ({error}); write one object a line"
    if not isinstance(row, dict):
        return {}, f"is a JSON {type(row).__name__}; write one object a line"
    return row, None


def _found(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _has_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _check_text(row: Row, name: str, *, required: bool) -> str | None:
    if name not in row or (row[name] is None and not required):
        return f"field '{name}' is missing; add it" if required else None
    value = row[name]
    if not isinstance(value, str):
        return f"field '{name}' is {_found(value)}; it must be a string"
    if required and not value.strip():
        return f"field '{name}' is empty; remove the line or fill it"
    if _has_surrogate(value):
        return f"field '{name}' holds a lone surrogate (half a character); remove it"
    return None


def _check_texts(row: Row, name: str, *, required: bool) -> str | None:
    if name not in row or row[name] is None:
        return f"""field '{name}' is missing; add a list, as "{name}": ["text"]""" if required else None
    values = row[name]
    if not isinstance(values, list):
        return f"field '{name}' is {_found(values)}; it must be a list of strings, as [{_found(values)}]"
    if required and not values:
        return f"field '{name}' is an empty list; a row needs at least one"
    for i, value in enumerate(values):
        if not isinstance(value, str):
            return f"field '{name}[{i}]' is {_found(value)}; it must be a string"
        if not value.strip():
            return f"field '{name}[{i}]' is empty; remove it"
        if _has_surrogate(value):
            return f"field '{name}[{i}]' holds a lone surrogate (half a character); remove it"
    return None


def _check_scores(row: Row, texts: str, *, required: bool) -> str | None:
    name = f"{texts}_scores"
    scores, count = row.get(name), len(row.get(texts) or [])
    if scores is None:
        return (
            f"field '{name}' is missing; --knowledge_distillation needs it on every row" if required and count else None
        )
    if not isinstance(scores, list) or len(scores) != count:
        return f"field '{name}' is {_found(scores)}; it must be a list of {count} numbers, one for each '{texts}'"
    for i, score in enumerate(scores):
        if (
            isinstance(score, bool)
            or not isinstance(score, (int, float))
            or score != score
            or abs(score) == float("inf")
        ):
            return f"field '{name}[{i}]' is {_found(score)}; it must be a finite number"
    return None


def check_training_row(row: Row, *, with_scores: bool = False) -> str | None:
    """What is wrong with a row of training data, or None. `with_scores`: teacher scores are needed."""
    return (
        _check_text(row, "query", required=True)
        or _check_texts(row, "pos", required=True)
        or _check_texts(row, "neg", required=False)
        or _check_scores(row, "pos", required=with_scores)
        or _check_scores(row, "neg", required=with_scores)
        or _check_text(row, "prompt", required=False)
        or _check_text(row, "type", required=False)
    )


def check_corpus_row(row: Row) -> str | None:
    """What is wrong with a row of a corpus, or None."""
    return _check_text(row, "text", required=True) or _check_text(row, "title", required=False)


def check_evaluation_row(row: Row) -> str | None:
    """What is wrong with a row of evaluation data, or None. An empty question is scored like any other."""
    return (
        (None if row.get("query") == "" else _check_text(row, "query", required=True))
        or _check_texts(row, "pos", required=True)
        or _check_texts(row, "neg", required=False)
    )


def check_beir_row(row: Row) -> str | None:
    """What is wrong with a line of a BEIR folder's corpus.jsonl or queries.jsonl, or None. The text may be empty."""
    name, text = row.get("_id"), row.get("text")
    return (
        _check_text(row | {"_id": str(name)} if isinstance(name, int) else row, "_id", required=True)
        or (None if isinstance(text, str) and not text.strip() else _check_text(row, "text", required=True))
        or _check_text(row, "title", required=False)
    )


def read_rows(path: str | Path, check: Check) -> list[Row]:
    """All objects of a JSON-lines file, checked; UserError if it holds none."""
    rows = [row for _, row in read_jsonl(path, check)]
    if not rows:
        raise UserError(f"{path}: holds no row")
    return rows


def read_corpus(path: str | Path) -> tuple[list[str], list[str]]:
    """The ids (default: the line's number from 0) and texts ("title text" where a title is given) of a corpus."""
    ids, texts = [], []
    for number, row in read_jsonl(path, check_corpus_row):
        ids.append(str(row["id"]) if row.get("id") is not None else str(number - 1))
        texts.append(f"{row['title']} {row['text']}" if row.get("title") else row["text"])
    if not texts:
        raise UserError(f"{path}: holds no row")
    return ids, texts


def distinct_texts(rows: Iterable[Row], *names: str) -> list[str]:
    """The texts of the list fields `names`, in order, each normalized text once (the first spelling stays)."""
    seen: dict[int, str] = {}
    for row in rows:
        for name in names:
            for text in row.get(name) or []:
                seen.setdefault(text_id(text), text)
    return list(seen.values())


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """A temporary name beside `target` (file or folder) that becomes `target` when the block ends well.

    A file is flushed to disk before the rename. On an error, or where the target cannot be written, nothing is left.
    A folder replaces an earlier folder of that name, a file never does. A symbolic link stays one: what it points to is
    replaced.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        for file in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            _flush(file)
        if target.is_dir() and not temporary.is_dir():
            raise UserError(f"{target}: is a folder; name a file")
        if target.is_dir():
            aside = target.with_name(f".{target.name}.old-{os.getpid()}")
            os.replace(target, aside)
            try:
                os.replace(temporary, target)
            except OSError:
                os.replace(aside, target)
                raise
            shutil.rmtree(aside)
        else:
            os.replace(temporary, target)
        _flush(target.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> int:
    """Write the rows, whole or not at all; returns their number."""
    count = 0
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for row in rows:
            try:
                line = json.dumps(row, ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError:  # half a character in a column that we only pass through
                line = json.dumps(row).encode("utf-8")
            file.write(line + b"\n")
            count += 1
    return count


def write_json(path: str | Path, value: Any) -> None:
    """Write one JSON value, indented, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """One JSON value, None where the file is missing; UserError where it is broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_input(path: str | Path, num_rows: int) -> Row:
    """A manifest's entry of one input file."""
    return {"path": str(path), "sha256": sha256(path), "rows": num_rows}


def make_manifest(stage: str, config: Row, inputs: list[Row], **more: Any) -> Row:
    """The manifest of an output: stage, version, resolved settings, inputs, library versions, and what a stage adds."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "datasets", "safetensors", "faiss-cpu", "faiss-gpu", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "stage": stage, "version": __version__, "config": config, "seed": config.get("seed"), "inputs": inputs,
        "libraries": versions, **more,
    }  # fmt: skip


def refuse_foreign_folder(folder: str | Path, overwrite: bool, own_files: Iterable[str]) -> None:
    """Before a stage starts: may it write its files into `folder`?

    Raises:
        UserError: the folder is a file, cannot be written, or holds something and `overwrite` is False (the message
            names what is there). With `overwrite`, `own_files` will be replaced and everything else stays.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")
    held = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.exists() else []
    if held and not overwrite:
        shown = ", ".join(held[:5]) + (", ..." if len(held) > 5 else "")
        own = ", ".join(sorted(own_files))
        raise UserError(
            f"{folder}: is not empty (it holds {shown}); name another folder, or add --overwrite_output_dir "
            f"to replace {own}"
        )
    refuse_unwritable(folder)


def refuse_unwritable(folder: str | Path) -> None:
    """Make the folder and try to write in it now, rather than after the work. UserError where that fails."""
    probe = Path(folder) / f".probe-{os.getpid()}"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
