"""Raw files (JSON, CSV, Excel, Parquet) as rows of question, answers and known negatives.

A reader yields (place, row), or (place, what is wrong there); the place is a line or row from 1, sheet!row of a
workbook, object n of a JSON list.
"""

import codecs
import csv
import json
import logging
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TextIO

from bge_core import UserError
from bge_core.files.columns import Columns, Find
from bge_core.files.records import BadLines, Row, parse_object

logger = logging.getLogger(__name__)

Place = int | str
BROKEN_TEXT = re.compile("[\0\ud800-\udfff]")


def find_inputs(source: Path, output_dir: Path, outputs: Collection[str]) -> list[Path]:
    """The files to read: `source` itself, or those of a known kind below it by path, but none below `output_dir`.

    Raises:
        UserError: there is none, or one of `outputs` would overwrite it.
    """
    if not source.exists():
        raise UserError(f"--input_dir {source}: no such file or folder")
    target = output_dir.resolve()
    if source.resolve() in (target, *(target / name for name in outputs)):
        raise UserError(f"--output_dir {output_dir}: would overwrite the input; name another folder")
    files = [source]
    if source.is_dir():
        below = sorted(source.rglob("*"), key=lambda path: path.relative_to(source).parts)
        inside = source.resolve() in target.parents  # an earlier output below the input is no input
        files = [path for path in below if path.is_file() and not (inside and target in path.resolve().parents)]
    hidden = (".", "~$")  # ~$: Excel's locks
    files = [path for path in files if not any(part.startswith(hidden) for part in path.relative_to(source).parts)]
    inputs = [path for path in files if path.suffix.lower() in READERS]
    if not inputs:
        raise UserError(f"--input_dir {source}: holds no file of a known kind ({' '.join(READERS)})")
    if others := [path.name for path in files if path.suffix.lower() not in READERS]:
        logger.warning("not read, of another kind: %s%s", ", ".join(others[:5]), ", ..." * (len(others) > 5))
    return inputs


def read_file(path: Path, find: Find, bad: BadLines) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield (question, answers, known negatives) of every good row of a file; what is wrong with the others: `bad`.

    Raises:
        UserError: the file is not what its name says, or has no recognisable columns.
    """
    kind = path.suffix.lower()
    recognised = False
    try:
        for place, row in READERS[kind](path, find):
            try:
                if isinstance(row, str):
                    raise UserError(row)
                columns = find(tuple(row))
                recognised = True
                parsed = parse_row(row, columns, from_json=kind in (".jsonl", ".json"))
            except UserError as error:
                if isinstance(row, dict) and not recognised:
                    raise
                bad.add(path, place, error)
            else:
                yield parsed
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as {kind} ({error}); save it again as UTF-8") from None


def parse_row(row: Row, columns: Columns, from_json: bool) -> tuple[str, list[str], list[str]]:
    """(question, answers, known negatives) of a row, empty ones as "".

    Args:
        row: a text or number a cell, or of answers and negatives a list of them.
        columns: which cells to take.
        from_json: a number where a text should be is a mistake, not a cell that a spreadsheet took for one.

    Raises:
        UserError: a cell that is no text, or one that holds half a character.
    """
    question = _text(row[columns.question], columns.question, from_json)
    answers = _texts(row[columns.answer], columns.answer, from_json)
    if not answers:
        raise UserError(f"field '{columns.answer}' is an empty list; fill it or remove the line")
    return question, answers, [text for name in columns.negatives for text in _texts(row[name], name, from_json)]


def _texts(value: Any, name: str, from_json: bool) -> list[str]:
    if isinstance(value, list):
        return [_text(item, f"{name}[{i}]", from_json) for i, item in enumerate(value)]
    return [_text(value, name, from_json)]


def _text(value: Any, name: str, from_json: bool) -> str:
    """The text of a cell with single spaces, "" where it is empty. UserError says what is wrong with it."""
    if value is None or value != value:  # pandas leaves NaN in an empty cell
        return ""
    if not from_json and not isinstance(value, (str, list, dict, bytes)):
        value = str(int(value) if isinstance(value, float) and value.is_integer() else value)  # workbooks: 123.0 is 123
    if not isinstance(value, str):
        found = json.dumps(value, ensure_ascii=False, default=str)[:60]
        raise UserError(f"field '{name}' is {found}; it must be a string")
    if broken := BROKEN_TEXT.search(value):
        problem = "a NUL character; remove it" if broken[0] == "\0" else "half a surrogate pair; remove it"
        if "\udc80" <= broken[0] <= "\udcff":  # what surrogateescape makes of a byte
            problem = "bytes of another encoding; convert the file, for example with iconv -f GB18030 -t UTF-8"
        raise UserError(f"field '{name}' holds at character {broken.start() + 1} {problem}")
    return " ".join(value.split())


def _open_text(path: Path, newline: str) -> TextIO:
    """UTF-8 with or without BOM, UTF-16 with BOM, or GB18030 where most lines are that and not UTF-8.

    A byte that does not fit becomes a lone surrogate, which `_text` reports.
    """
    with open(path, "rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return open(path, encoding="utf-16", newline=newline)
        file.seek(0)
        balance = 0
        for line in file:
            if not line.isascii():
                try:
                    line.decode("utf-8")
                    balance += 1
                except UnicodeDecodeError:
                    balance -= "\ufffd" not in line.decode("gb18030", "replace")
    encoding = "gb18030" if balance < 0 else "utf-8-sig"
    return open(path, encoding=encoding, errors="surrogateescape", newline=newline)


def _read_jsonl(path: Path, find: Find) -> Iterator[tuple[Place, Row | str]]:
    with _open_text(path, newline="\n") as file:
        yield from ((number, parse_object(line)) for number, line in enumerate(file, start=1) if line.strip())


def _read_json(path: Path, find: Find) -> Iterator[tuple[Place, Row | str]]:
    """[{...}, ...], {"data": [{...}, ...]}, or JSON lines under another name."""
    with _open_text(path, newline="\n") as file:
        try:
            value = json.load(file)
        except (ValueError, RecursionError) as error:
            file.seek(0)
            if file.read(100).lstrip().startswith("["):
                raise UserError(f"not JSON ({error}); write [{{...}}, {{...}}], or one object a line") from None
            yield from _read_jsonl(path, find)
            return
    rows = value.get("data", value) if isinstance(value, dict) else value
    rows = rows if isinstance(rows, list) else [rows]
    for i, row in enumerate(rows):
        yield f"object {i + 1}", row if isinstance(row, dict) else f"is a JSON {type(row).__name__}; write objects"
        rows[i] = None  # frees a million of them on the way


def _with_header(lines: Iterable[tuple[Place, list[Any] | str]], find: Find) -> Iterator[tuple[Place, Row | str]]:
    """Cells -> rows; the first line that is not blank names the columns."""
    header: list[str] = []
    for place, cells in lines:
        if isinstance(cells, str):
            yield place, cells
            continue
        while cells and (cells[-1] is None or not str(cells[-1]).strip()):
            cells.pop()
        if len(cells) > len(header) > 0:
            yield place, f"has {len(cells)} cells for {len(header)} columns; quote the text with the separator"
        elif header and cells:
            yield place, dict(zip_longest(header, cells))
        elif cells:
            header = [str(name) for name in cells]
            find(tuple(header))  # two columns of one name would be one in the row


def _read_csv(path: Path, find: Find) -> Iterator[tuple[Place, Row | str]]:
    def lines() -> Iterator[tuple[Place, list[Any] | str]]:
        while True:
            place = reader.line_num + 1
            try:
                yield place, next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, f"its quotes do not match ({error}); write a quote inside a quoted text twice"

    with _open_text(path, newline="") as file:
        first = file.readline()
        delimiter = max("\t,;" if path.suffix.lower() == ".tsv" else ",\t;", key=first.count)
        reader = csv.reader(chain([first], file), delimiter=delimiter, strict=True)
        yield from _with_header(lines(), find)


def _read_xlsx(path: Path, find: Find) -> Iterator[tuple[Place, Row | str]]:
    """All sheets; one whose columns are not recognised is skipped if another's are."""
    import openpyxl

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"not a workbook ({error}); save it again as .xlsx, without a password") from None
    problem, recognised = None, False
    for sheet in book.worksheets:
        sheet.reset_dimensions()  # some programs write wrong ones
        cells = enumerate(map(list, sheet.iter_rows(values_only=True)), start=1)
        rows = _with_header(((f"{sheet.title}!{number}", row) for number, row in cells), find)
        try:
            first = next(rows, None)
        except UserError as error:
            problem = error
            logger.warning("%s: sheet '%s' is skipped: %s", path, sheet.title, error)
            continue
        if first:
            recognised = True
            yield from chain([first], rows)
    book.close()
    if problem and not recognised:
        raise problem


def _read_parquet(path: Path, find: Find) -> Iterator[tuple[Place, Row | str]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = find(tuple(file.schema_arrow.names))
            batches = file.iter_batches(10_000, columns=[columns.question, columns.answer, *columns.negatives])
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"cannot be read as .parquet ({error}); save it again") from None


READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".xlsx": _read_xlsx,
    ".parquet": _read_parquet,
}
