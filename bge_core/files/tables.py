"""Raw files (JSON, CSV, Excel, Parquet) as rows of question, answers and known negatives.

A reader yields (place, row), or (place, what is wrong there); the place is a line or row from 1, sheet!row of a
workbook, object n of a JSON list.
"""

import codecs
import csv
import json
import logging
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, TextIO

from bge_core import UserError
from bge_core.files.cells import RawPair, parse_row, strip_html
from bge_core.files.columns import (
    NOTHING_SAID,
    Columns,
    UnknownColumns,
    Wanted,
    find_columns,
    names_columns,
    refuse_header,
)
from bge_core.files.nested import Note, rows_of, unnest
from bge_core.files.records import BadLines, Row, parse_object
from bge_core.files.understood import Understood

logger = logging.getLogger(__name__)

OTHER_WORKBOOKS = (".xls", ".ods", ".et", ".xlsb", ".numbers")
OLD_WORKBOOK = b"\xd0\xcf\x11\xe0"  # how .xls begins, and a workbook with a password
Place = int | str
Rows = Iterator[tuple[Place, Row | str]]
Tables = Iterator[tuple[str, Rows]]  # the name of a sheet, and its rows


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
    others = [path for path in files if path.suffix.lower() not in READERS]
    remedy = "; save it as .xlsx" * any(path.suffix.lower() in OTHER_WORKBOOKS for path in others)
    names = ", ".join(path.name for path in others[:5]) + ", ..." * (len(others) > 5)
    if not inputs:
        has = f": {names}{remedy}" * bool(others)
        raise UserError(f"--input_dir {source}: holds no file of a known kind ({' '.join(READERS)}){has}")
    for folder in {path.parent for path in inputs if path.name == "queries.jsonl"}:
        if (folder / "corpus.jsonl") in inputs:
            raise UserError(
                f"{folder}: is a BEIR folder, a test set: evaluate.py --val_data {folder} reads it as it is"
            )
    if others:
        logger.warning("not read, of another kind: %s%s", names, remedy)
    return inputs


def read_file(path: Path, wanted: Wanted, bad: BadLines, understood: Understood) -> Iterator[RawPair]:
    """Yield every good row of a file; what is wrong with the others: `bad`; how it was read: `understood`.

    Raises:
        UserError: the file is not what its name says, or has no recognisable columns.
    """
    kind = path.suffix.lower()
    problem, recognised = None, False
    try:
        for sheet, rows in READERS[kind](path, wanted, understood.note):
            try:
                for pair in _read_table(path, rows, wanted, bad, understood):
                    recognised = True
                    yield pair
            except UnknownColumns as error:
                problem = error
                if sheet:
                    understood.note(f"sheet '{sheet}' is not read: {error}")
        if problem and not recognised:
            raise problem
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as {kind} ({error}); save it again as UTF-8") from None


def _read_table(
    path: Path, rows: Iterator[tuple[Place, Row | str]], wanted: Wanted, bad: BadLines, understood: Understood
) -> Iterator[RawPair]:
    """The good rows of one table; the first thousand decide what its columns are."""
    head = list(islice(rows, 1000))
    values: dict[str, list[Any]] = {}
    for _, row in head:
        for name, value in row.items() if isinstance(row, dict) else ():
            values.setdefault(name, []).append(value)
    layouts: dict[tuple[str, ...], Columns] = {}
    for place, row in chain(head, rows):
        try:
            if isinstance(row, str):
                raise UserError(row)
            names = tuple(row)
            if names not in layouts:  # of JSON lines each has its own names
                cells = {name: values.get(name, [row[name]]) for name in names}
                layouts[names] = find_columns(names, cells, wanted)
                understood.add_columns(layouts[names], cells)
            columns = layouts[names]
            if wanted.strip_html:
                row = {name: strip_html(value) for name, value in row.items()}
            pair = parse_row(row, columns, path.suffix.lower() in (".jsonl", ".json"), wanted)
        except UserError as error:
            if isinstance(row, dict) and not layouts:
                raise
            bad.add(path, place, error)
        else:
            understood.count(pair)
            yield pair


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


def _read_jsonl(path: Path, wanted: Wanted, note: Note) -> Tables:
    yield "", _json_lines(path, note)


def _json_lines(path: Path, note: Note) -> Rows:
    with _open_text(path, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield from ((number, row) for row in unnest(parse_object(line), note))


def _read_json(path: Path, wanted: Wanted, note: Note) -> Tables:
    """[{...}, ...], {"data": [{...}, ...]}, or JSON lines under another name."""
    with _open_text(path, newline="\n") as file:
        try:
            rows = rows_of(json.load(file))
        except (ValueError, RecursionError) as error:
            file.seek(0)
            if file.read(100).lstrip().startswith("["):
                raise UserError(f"not JSON ({error}); write [{{...}}, {{...}}], or one object a line") from None
            yield from _read_jsonl(path, wanted, note)
            return
    yield "", _json_objects(rows, note)


def _json_objects(rows: list[Any], note: Note) -> Rows:
    for i, value in enumerate(rows):
        for row in unnest(value, note):
            yield f"object {i + 1}", row if isinstance(row, dict) else f"is a JSON {type(row).__name__}; write objects"
        rows[i] = None  # frees a million of them on the way


def _with_header(lines: Iterable[tuple[Place, list[Any] | str]], wanted: Wanted, note: Note) -> Rows:
    """Cells -> rows. The first line with names of question and answer is the header; what stands above is no row."""
    lines = _filled(lines)
    head = list(islice(lines, 20))
    first = next((cells for _, cells in head if isinstance(cells, list)), None)
    if first is None:
        yield from ((place, str(problem)) for place, problem in head)
        return
    at = _find_header(head, wanted)
    if at >= 0:
        header = ["" if name is None else str(name) for name in head[at][1]]
        find_columns(header, dict.fromkeys(header, ()), wanted)  # two columns of one name would be one in the row
    elif wanted.by_position:
        at = _find_header(head, NOTHING_SAID)
        header = [str(i + 1) for i in range(max(len(cells) for _, cells in head))]
        note("its header line was passed over" if at >= 0 else "has no header line; its first row was read")
    else:
        refuse_header(first, wanted)
    if at > 0:
        note(f"{at} line{'s' * (at > 1)} above the header passed over, as '{first[0]}'"[:80])
    for place, cells in chain(head[at + 1 :], lines):
        if isinstance(cells, str):
            yield place, cells
        elif len(cells) > len(header):
            yield place, f"has {len(cells)} cells for {len(header)} columns; quote the text with the separator"
        elif cells != header:  # it may come again, as where files were put together
            yield place, dict(zip_longest(header, cells))


def _find_header(head: Sequence[tuple[Place, list[Any] | str]], wanted: Wanted) -> int:
    """Which of the first lines names the columns, -1 if none. A title above it fills fewer cells."""
    most = 0
    for i, (_, cells) in enumerate(head):
        filled = sum(cell not in (None, "") for cell in cells)
        if filled > most and names_columns(cells, wanted):
            return i
        most = max(most, filled)
    return -1


def _filled(lines: Iterable[tuple[Place, list[Any] | str]]) -> Iterator[tuple[Place, list[Any] | str]]:
    """The lines that hold something, without empty cells at their end."""
    for place, cells in lines:
        while isinstance(cells, list) and cells and (cells[-1] is None or not str(cells[-1]).strip()):
            cells.pop()
        if cells:
            yield place, cells


def _read_csv(path: Path, wanted: Wanted, note: Note) -> Tables:
    yield "", _with_header(_csv_lines(path, note), wanted, note)


def _csv_lines(path: Path, note: Note) -> Iterator[tuple[Place, list[Any] | str]]:
    with _open_text(path, newline="") as file:
        first = next((line for line in islice(file, 20) if any(map(line.count, "\t,;"))), "")
        delimiter = "\t" if "\t" in first else max(",;", key=first.count)
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        while True:
            place = reader.line_num + 1
            try:
                yield place, next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, f"its quotes do not match ({error}); write a quote inside a quoted text twice"


def _read_xlsx(path: Path, wanted: Wanted, note: Note) -> Tables:
    """All sheets. What is merged downwards fills its rows."""
    import openpyxl

    try:
        book = openpyxl.load_workbook(path, data_only=True)
    except (zipfile.BadZipFile, KeyError) as error:
        with open(path, "rb") as file:
            is_old = file.read(4) == OLD_WORKBOOK
        what = "an old workbook under another name, or one with a password" if is_old else f"not a workbook ({error})"
        raise UserError(f"{what}; save it as .xlsx, without a password") from None
    for sheet in book.worksheets:
        for area in list(sheet.merged_cells.ranges):
            value = sheet.cell(area.min_row, area.min_col).value
            sheet.unmerge_cells(str(area))
            for number in range(area.min_row + 1, area.max_row + 1):
                sheet.cell(number, area.min_col, value)
        cells = enumerate(map(list, sheet.iter_rows(values_only=True)), start=1)
        yield sheet.title, _with_header(((f"{sheet.title}!{number}", row) for number, row in cells), wanted, note)


def _read_parquet(path: Path, wanted: Wanted, note: Note) -> Tables:
    yield "", _parquet_rows(path)


def _parquet_rows(path: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            vectors = [
                field.name for field in file.schema_arrow if "float" in str(getattr(field.type, "value_type", ""))
            ]
            columns = [name for name in file.schema_arrow.names if name not in vectors]
            batches = file.iter_batches(10_000, columns=columns)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"cannot be read as .parquet ({error}); save it again") from None


READERS: dict[str, Callable[[Path, Wanted, Note], Tables]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".xlsx": _read_xlsx,
    ".parquet": _read_parquet,
}
