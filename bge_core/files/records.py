"""The formats between the stages: JSON lines, UTF-8, one object a line, read with file and line in every error.

Reading checks a whole file, counts all bad lines, shows the first ten and only then raises. What others write is read
as well: a JSON array, UTF-16, files that gzip packed.
"""

import codecs
import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from bge_core import UserError
from bge_core.files.text import text_id

Row = dict[str, Any]
Check = Callable[[Row], str | None]
MAX_SHOWN = 10
_OTHER_KINDS = {  # by their first bytes
    b"PK\x03\x04": "a ZIP archive: unpack it; or a workbook: name it .xlsx and give it to prepare.py",
    b"\xd0\xcf\x11\xe0": "an old workbook or document: save it as .xlsx and give that to prepare.py",
    b"PAR1": "a Parquet file: end its name with .parquet",
    b"BZh": "packed by bzip2: unpack it",
    b"\xfd7zXZ\0": "packed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd: unpack it",
}


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
    return checked(path, parse_lines(path), check)


def checked(
    name: str | Path, rows: Iterable[tuple[int, Row | str]], check: Check, max_bad: float = math.inf
) -> Iterator[tuple[int, Row]]:
    """Yield the (number, row) that are good, then refuse the others; at the `max_bad`-th of them the reading ends.

    Args:
        name: of the file, for the message.
        rows: a text in place of a row says why there is none.
        check: says what is wrong with a row and what to do, or None.
        max_bad: how many bad rows are worth reading on.

    Raises:
        UserError: some were bad.
    """
    bad = BadLines()
    for number, row in rows:
        problem = row if isinstance(row, str) else check(row)
        if problem is None and not isinstance(row, str):
            yield number, row
            continue
        bad.add(name, number, problem)
        if bad.count == max_bad:
            break
    bad.refuse()


def open_bytes(path: str | Path) -> BinaryIO:
    """A file's bytes, unpacked where gzip packed them. UserError: no such file, or one of a kind without lines."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a file") from None
    for magic, kind in _OTHER_KINDS.items():
        if start.startswith(magic):
            raise UserError(f"{path}: is {kind}")
    return cast(BinaryIO, gzip.open(path)) if start.startswith(b"\x1f\x8b") else open(path, "rb")


def parse_lines(path: str | Path) -> Iterator[tuple[int, Row | str]]:
    """Yield (line number from 1, object or what is wrong with the line) of a JSON-lines file without its blank lines.

    Of a JSON array, or of one object over many lines, the number is that of the object. UTF-8, UTF-16 and UTF-32.

    Raises:
        UserError: no such file, one of another kind, or one that is damaged.
    """
    try:
        with open_bytes(path) as file:
            lines: Iterator[tuple[int, bytes]] = enumerate(_utf8_lines(file), start=1)
            first = next(((number, line) for number, line in lines if line.strip()), (1, b""))
            if first[1].lstrip().startswith(b"[") or first[1].strip() == b"{":
                held = [first, *lines]
                if rows := _document(b"".join(line for _, line in held), first[0]):
                    yield from rows
                    return
                lines = iter(held[1:])
            for number, line in chain([first], lines):
                try:
                    if line.strip():
                        yield number, parse_object(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    remedy = "convert the file, for example with iconv -f GB18030 -t UTF-8"
                    yield number, f"not UTF-8 (byte {error.start}); {remedy}"
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cannot be unpacked ({error}); copy it again") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: cannot be read as {error.encoding} ({error.reason}); save it again as UTF-8"
        ) from None


def _utf8_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file in UTF-8, without a BOM, whatever Unicode encoding it has; bytes of others as they are."""
    encoding = json.detect_encoding(file.peek(4)[:4])  # type: ignore[attr-defined]
    if encoding.startswith("utf-8"):
        yield file.readline().removeprefix(codecs.BOM_UTF8)
        yield from file
    else:
        yield from (line.encode() for line in io.TextIOWrapper(file, encoding, newline="\n"))


def _document(text: bytes, first_line: int) -> list[tuple[int, Row | str]]:
    """The numbered objects of a JSON array, of {"data": [...]}, or the one object; none: these are lines."""
    try:
        value = json.loads(text.decode("utf-8"))
    except json.JSONDecodeError as error:
        place = first_line - 1 + error.lineno
        problem = f"not JSON ({error.msg}, column {error.colno}); write [{{...}}, {{...}}], or one object a line"
        return [] if error.msg == "Extra data" else [(place, problem)]
    except (ValueError, RecursionError):
        return []
    value = value.get("data", value) if isinstance(value, dict) else value
    rows = value if isinstance(value, list) else [value]
    others = "is a JSON {}; write one object a line"
    return [(i, row if isinstance(row, dict) else others.format(type(row).__name__)) for i, row in enumerate(rows, 1)]


def parse_object(line: str) -> Row | str:
    """The JSON object of one line, or what is wrong with the line."""
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg}, column {error.colno}); write one object a line"
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets within each other
        return f"not readable as JSON ({error}); write one object a line"
    return row if isinstance(row, dict) else f"is a JSON {type(row).__name__}; write one object a line"


def _found(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _missing(row: Row, name: str, remedy: str) -> str:
    return f"field '{name}' is missing; {remedy} (its fields: {', '.join(row)[:200]})"


def _check_text(value: object, name: str, if_empty: str | None) -> str | None:
    """`if_empty`: the remedy where the text is empty; None: it may be."""
    if not isinstance(value, str):
        return f"field '{name}' is {_found(value)}; it must be a string"
    if if_empty and not value.strip():
        return f"field '{name}' is empty; {if_empty}"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return f"field '{name}' holds a lone surrogate (half a character); remove it"
    return None


def _check_field(row: Row, name: str, *, required: bool, may_be_empty: bool = False) -> str | None:
    if required and name not in row:
        return _missing(row, name, "add it")
    if not required and row.get(name) is None:
        return None
    return _check_text(row[name], name, "remove the line or fill it" if required and not may_be_empty else None)


def _check_list(row: Row, name: str, *, required: bool) -> str | None:
    values = row.get(name)
    if values is None:
        return _missing(row, name, f'add a list, as "{name}": ["text"]') if required else None
    if not isinstance(values, list):
        return f"field '{name}' is {_found(values)}; it must be a list of strings, as [{_found(values)}]"
    if required and not values:
        return f"field '{name}' is an empty list; a row needs at least one"
    for i, value in enumerate(values):
        if problem := _check_text(value, f"{name}[{i}]", "remove it"):
            return problem
    return None


def _check_scores(row: Row, texts: str, *, required: bool) -> str | None:
    name = f"{texts}_scores"
    scores, count = row.get(name), len(row.get(texts) or [])
    if scores is None:
        missing = required and count
        return f"field '{name}' is missing; --knowledge_distillation needs it on every row" if missing else None
    if not isinstance(scores, list) or len(scores) != count:
        return f"field '{name}' is {_found(scores)}; it must be a list of {count} numbers, one for each '{texts}'"
    for i, score in enumerate(scores):
        if type(score) not in (int, float) or not -math.inf < score < math.inf:
            return f"field '{name}[{i}]' is {_found(score)}; it must be a finite number"
    return None


def check_training_row(row: Row, *, with_scores: bool = False) -> str | None:
    """What is wrong with a row of training data, or None. `with_scores`: teacher scores are needed."""
    return (
        _check_field(row, "query", required=True)
        or _check_list(row, "pos", required=True)
        or _check_list(row, "neg", required=False)
        or _check_scores(row, "pos", required=with_scores)
        or _check_scores(row, "neg", required=with_scores)
        or _check_field(row, "prompt", required=False)
        or _check_field(row, "type", required=False)
    )


def check_corpus_row(row: Row) -> str | None:
    """What is wrong with a row of a corpus, or None. Beside a title the text may be empty."""
    title = row.get("title")
    has_title = isinstance(title, str) and bool(title.strip())
    no_text = row if not has_title or row.get("text", "") is not None else row | {"text": ""}
    return _check_field(no_text, "text", required=True, may_be_empty=has_title) or _check_field(
        row, "title", required=False
    )


def check_evaluation_row(row: Row) -> str | None:
    """What is wrong with a row of evaluation data, or None. An empty question is scored like any other."""
    return (
        (None if row.get("query") == "" else _check_field(row, "query", required=True))
        or _check_list(row, "pos", required=True)
        or _check_list(row, "neg", required=False)
        or _check_field(row, "prompt", required=False)
    )


def check_beir_row(row: Row) -> str | None:
    """What is wrong with a line of a BEIR folder's corpus.jsonl or queries.jsonl, or None. The text may be empty."""
    with_text_id = row | {"_id": str(row["_id"])} if isinstance(row.get("_id"), int) else row
    return (
        _check_field(with_text_id, "_id", required=True)
        or _check_field(row, "text", required=True, may_be_empty=True)
        or _check_field(row, "title", required=False)
    )


def read_rows(path: str | Path, check: Check) -> list[Row]:
    """All objects of a JSON-lines file, checked; UserError if it holds none."""
    rows = [row for _, row in read_jsonl(path, check)]
    if not rows:
        raise UserError(f"{path}: holds no row")
    return rows


def passage_text(row: Row) -> str:
    """What is encoded of a corpus row: its text, after its title where it has one, or the title alone."""
    return " ".join(part for part in (row.get("title"), row["text"]) if part)


def distinct_texts(rows: Iterable[Row], *names: str) -> list[str]:
    """The texts of the list fields `names`, in order, each normalized text once (the first spelling stays)."""
    seen: dict[int, str] = {}
    for row in rows:
        for name in names:
            for text in row.get(name) or []:
                seen.setdefault(text_id(text), text)
    return list(seen.values())
