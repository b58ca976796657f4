"""The file formats between the stages: read with file and line in every error, written whole or not at all.

Every file is JSON lines, UTF-8, one object a line. Reading checks a whole file, counts all bad lines, shows the first
ten and only then raises. Writing goes to a temporary name beside the target, which is renamed when it is complete.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bge_core import UserError
from bge_core.files.text import text_id  # cross

Row = dict[str, Any]
Check = Callable[[Row], str | None]
MAX_SHOWN = 10


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
