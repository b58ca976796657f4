"""Raw files (JSON, CSV, Excel, Parquet) as rows of question, answers and known negatives.

A reader yields (place, row), or (place, what is wrong there); the place is a line or row from 1, sheet!row of a
workbook, object n of a JSON list.
"""

import json
import logging
import zlib
from collections.abc import Callable, Collection, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from bge_core import UserError
from bge_core.files.cells import RawPair, parse_row, strip_html
from bge_core.files.columns import Columns, UnknownColumns, Wanted, find_columns
from bge_core.files.nested import Note, rows_of, unnest
from bge_core.files.records import BadLines, Row, parse_object
from bge_core.files.sheets import Place, Rows, Tables, open_text, read_csv, read_xlsx
from bge_core.files.sources import files_below
from bge_core.files.understood import Understood

logger = logging.getLogger(__name__)

OTHER_WORKBOOKS = (".xls", ".ods", ".et", ".xlsb", ".numbers")


def find_inputs(source: Path, output_dir: Path, outputs: Collection[str]) -> list[Path]:
    """The files to read: `source` itself, or those of a known kind below it by path, but none below `output_dir`.

    Raises:
        UserError: there is none, one of `outputs` would overwrite it, or it is a test set.
    """
    if not source.exists():
        raise UserError(f"--input_dir {source}: no such file or folder")
    target = output_dir.resolve()
    if source.resolve() in (target, *(target / name for name in outputs)):
        raise UserError(f"--output_dir {output_dir}: would overwrite the input; name another folder")
    files = [source]
    if source.is_dir():
        below = (path for path in files_below(source, target) if path.is_file())
        files = sorted(below, key=lambda path: path.relative_to(source).parts)
    inputs = [path for path in files if _kind(path) in READERS]
    others = [path for path in files if _kind(path) not in READERS]
    names = ", ".join(path.name for path in others[:5]) + ", ..." * (len(others) > 5)
    names += "; save it as .xlsx" * any(_kind(path) in OTHER_WORKBOOKS for path in others)
    names += "; rename a table with tabs to .tsv" * any(_kind(path) == ".txt" for path in others)
    if not inputs:
        known = " ".join(READERS)
        raise UserError(f"--input_dir {source}: holds no file of a known kind ({known}){': ' * bool(others)}{names}")
    for folder in {path.parent for path in inputs if path.name == "queries.jsonl"}:
        if (folder / "corpus.jsonl") in inputs:
            raise UserError(
                f"{folder}: is a BEIR folder, a test set: evaluate.py --val_data {folder} reads it as it is"
            )
    if others:
        logger.warning("not read, of another kind: %s", names)
    return inputs


def _kind(path: Path) -> str:
    """The suffix of a file's name, without what says that gzip packed it."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_file(path: Path, wanted: Wanted, bad: BadLines, understood: Understood) -> Iterator[RawPair]:
    """Yield every good row of a file; what is wrong with the others: `bad`; how it was read: `understood`.

    Raises:
        UserError: the file is not what its name says, or has no recognisable columns.
    """
    kind = _kind(path)
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
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be unpacked ({error}); copy it again") from None
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
            pair = parse_row(row, columns, _kind(path) in (".jsonl", ".json"), wanted)
        except UserError as error:
            if isinstance(row, dict) and not layouts:
                raise
            bad.add(path, place, error)
        else:
            understood.count(pair)
            yield pair


def _read_jsonl(path: Path, wanted: Wanted, note: Note) -> Tables:
    yield "", _json_lines(path, note)


def _json_lines(path: Path, note: Note) -> Rows:
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield from ((number, row) for row in unnest(parse_object(line), note))


def _read_json(path: Path, wanted: Wanted, note: Note) -> Tables:
    """[{...}, ...], {"data": [{...}, ...]}, or JSON lines under another name."""
    with open_text(path, newline="\n") as file:
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
    ".csv": read_csv,
    ".tsv": read_csv,
    ".xlsx": read_xlsx,
    ".parquet": _read_parquet,
}
