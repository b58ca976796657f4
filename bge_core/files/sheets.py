"""Tables of cells, CSV and workbooks, as rows under a header."""

import codecs
import csv
import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, TextIO

from bge_core import UserError
from bge_core.files.columns import NOTHING_SAID, Wanted, find_columns, names_columns, refuse_header
from bge_core.files.nested import Note
from bge_core.files.records import Row, open_bytes

OLD_WORKBOOK = b"\xd0\xcf\x11\xe0"  # how .xls begins, and a workbook with a password
Place = int | str
Rows = Iterator[tuple[Place, Row | str]]
Tables = Iterator[tuple[str, Rows]]  # the name of a sheet, and its rows


def open_text(path: Path, newline: str) -> TextIO:
    """UTF-8 with or without BOM, UTF-16 with BOM, or GB18030 where most lines are that and not UTF-8; also by gzip.

    A byte that does not fit becomes a lone surrogate, which `parse_row` reports.
    """
    with open_bytes(path) as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return io.TextIOWrapper(open_bytes(path), "utf-16", newline=newline)
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
    return io.TextIOWrapper(open_bytes(path), encoding, errors="surrogateescape", newline=newline)


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
        note(f"{at} line{'s' * (at > 1)} above the header passed over, as '{' '.join(str(first[0]).split())[:40]}'")
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


def read_csv(path: Path, wanted: Wanted, note: Note) -> Tables:
    """A table separated by comma, tab or semicolon."""
    yield "", _with_header(_csv_lines(path, note), wanted, note)


def _csv_lines(path: Path, note: Note) -> Iterator[tuple[Place, list[Any] | str]]:
    with open_text(path, newline="") as file:
        first = next((line for line in islice(file, 20) if any(map(line.count, "\t,;"))), "")
        delimiter = "\t" if "\t" in first else max(",;", key=first.count)
        quotes = delimiter != "\t" or _quotes_match(file)
        if not quotes:
            note("its quotes are part of the texts")
        file.seek(0)
        reader = csv.reader(
            file, delimiter=delimiter, strict=True, quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
        )
        while True:
            place = reader.line_num + 1
            try:
                yield place, next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, f"its quotes do not match ({error}); write a quote inside a quoted text twice"


def _quotes_match(file: TextIO) -> bool:
    """Whether a table with tabs quotes its cells as spreadsheets do; most of those made by programs do not quote."""
    file.seek(0)
    try:
        return all(True for _ in csv.reader(file, delimiter="\t", strict=True))
    except csv.Error:
        return False


def read_xlsx(path: Path, wanted: Wanted, note: Note) -> Tables:
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
