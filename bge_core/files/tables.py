"""Raw files (JSON, CSV, Excel, Parquet) as rows of question, answers and negatives."""

import codecs
import csv
import functools
import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import openpyxl
import pyarrow
import pyarrow.parquet

from bge_core import UserError
from bge_core.files import records
from bge_core.files.records import BadLines, Row
from bge_core.files.text import normalize_text

logger = logging.getLogger(__name__)


# The first of these names that a file has is taken; anchor and positive are those of sentence-transformers.
QUESTION_NAMES = [
    "query", "question", "q", "anchor", "问题", "提问", "问句", "问", "标准问", "标准问题", "标准问法", "用户问题",
    "用户提问", "用户问", "用户咨询", "咨询问题", "咨询", "问题描述", "问题内容", "问法", "questions", "queries",
    "instruction", "prompt", "title", "标题", "问题标题",
]  # fmt: skip
ANSWER_NAMES = [
    "answer", "pos", "positive", "a", "答案", "回答", "回复", "答复", "答", "解答", "标准答案", "标准回答", "标准回复",
    "客服回答", "客服回复", "参考答案", "最佳答案", "答案内容", "回答内容", "回复内容", "answers", "positives",
    "response", "reply", "passage", "document", "output", "content", "text", "内容", "正文",
]  # fmt: skip
NEGATIVE_NAME = re.compile(r"(hard_?)?neg(ative)?s?(_?\d+)?|负例|难负例|负样本")
NAME_NOISE = re.compile(r"\(.*?\)|\[.*?\]|【.*?】|[*:]")  # as in 问题(必填), *问题, 问题:
BROKEN_TEXT = re.compile("[\0\ud800-\udfff]")


class Columns(NamedTuple):
    """The names of a file's columns, as it spells them."""

    question: str
    answer: str
    negatives: tuple[str, ...]


Find = Callable[[tuple[str, ...]], Columns]
Place = int | str  # a line or row from 1; sheet!row of a workbook; object n of a JSON list


def _plain_name(name: object) -> str:
    return NAME_NOISE.sub("", normalize_text(str(name))).strip().casefold()


@functools.lru_cache(maxsize=256)
def find_columns(names: tuple[str, ...], query_field: str | None = None, answer_field: str | None = None) -> Columns:
    """The columns of question, answer and known negatives. Case, spaces and a "(...)" in a name do not matter.

    Args:
        names: all columns of the file.
        query_field: take this column as the question instead of looking for a common name.
        answer_field: likewise for the answer.

    Raises:
        UserError: one of the two is missing or there twice; says what was found and which flag to use.
    """
    plain = [_plain_name(name) for name in names]

    def find(what: str, flag: str, wanted: Sequence[str]) -> str:
        for name in wanted:
            if plain.count(name) > 1:
                raise UserError(f"has {plain.count(name)} columns named '{name}'; rename all but one of them")
            if name in plain:
                return names[plain.index(name)]
        found = ", ".join(f"'{name}'" for name in names[:20]) or "none"
        other = f" or another name of the {what}" if len(wanted) > 1 else ""
        raise UserError(f"no field '{wanted[0]}'{other}; found: {found}; add it, or say with {flag} which it is")

    question = find("question", "--query_field", [_plain_name(query_field)] if query_field else QUESTION_NAMES)
    answer = find("answer", "--answer_field", [_plain_name(answer_field)] if answer_field else ANSWER_NAMES)
    negatives = [name for name, short in zip(names, plain, strict=True) if NEGATIVE_NAME.fullmatch(short)]
    return Columns(question, answer, tuple(name for name in negatives if name not in (question, answer)))


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


def _texts(value: Any, name: str, from_json: bool) -> list[str]:
    if isinstance(value, list):
        return [_text(item, f"{name}[{i}]", from_json) for i, item in enumerate(value)]
    return [_text(value, name, from_json)]


def _parse_row(row: Row, columns: Columns, from_json: bool) -> tuple[str, list[str], list[str]]:
    question = _text(row[columns.question], columns.question, from_json)
    answers = _texts(row[columns.answer], columns.answer, from_json)
    if not answers:
        raise UserError(f"field '{columns.answer}' is an empty list; fill it or remove the line")
    return question, answers, [text for name in columns.negatives for text in _texts(row[name], name, from_json)]


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


def _read_jsonl(path: Path, find: Find, bad: BadLines) -> Iterator[tuple[Place, Any]]:
    with _open_text(path, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = records.parse_object(line)
                if isinstance(row, str):
                    bad.add(path, number, row)
                else:
                    yield number, row


def _read_json(path: Path, find: Find, bad: BadLines) -> Iterator[tuple[Place, Any]]:
    """[{...}, ...], {"data": [{...}, ...]}, or JSON lines under another name."""
    with _open_text(path, newline="\n") as file:
        try:
            value = json.load(file)
        except (ValueError, RecursionError) as error:
            file.seek(0)
            if file.read(100).lstrip().startswith("["):
                raise UserError(f"not JSON ({error}); write [{{...}}, {{...}}], or one object a line") from None
            yield from _read_jsonl(path, find, bad)
            return
    rows = value.get("data", value) if isinstance(value, dict) else value
    rows = rows if isinstance(rows, list) else [rows]
    for i in range(len(rows)):
        yield f"object {i + 1}", rows[i]
        rows[i] = None  # frees a million of them on the way


def _with_header(
    lines: Iterable[tuple[Place, list[Any]]], path: Path, find: Find, bad: BadLines
) -> Iterator[tuple[Place, Row]]:
    """Cells -> rows; the first line that is not blank names the columns."""
    header: list[str] = []
    for place, cells in lines:
        while cells and (cells[-1] is None or not str(cells[-1]).strip()):
            cells.pop()
        if len(cells) > len(header) > 0:
            bad.add(path, place, f"has {len(cells)} cells for {len(header)} columns; quote the text with the separator")
        elif header and cells:
            yield place, dict(zip_longest(header, cells))
        elif cells:
            header = [str(name) for name in cells]
            find(tuple(header))  # two columns of one name would be one in the row


def _read_csv(path: Path, find: Find, bad: BadLines) -> Iterator[tuple[Place, Row]]:
    def lines() -> Iterator[tuple[int, list[str]]]:
        while True:
            place = reader.line_num + 1
            try:
                yield place, next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                bad.add(path, place, f"its quotes do not match ({error}); write a quote inside a quoted text twice")

    with _open_text(path, newline="") as file:
        first = file.readline()
        delimiter = max("\t,;" if path.suffix.lower() == ".tsv" else ",\t;", key=first.count)
        reader = csv.reader(chain([first], file), delimiter=delimiter, strict=True)
        yield from _with_header(lines(), path, find, bad)


def _read_xlsx(path: Path, find: Find, bad: BadLines) -> Iterator[tuple[Place, Row]]:
    """All sheets; one whose columns are not recognised is skipped if another's are."""
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"not a workbook ({error}); save it again as .xlsx, without a password") from None
    problem, recognised = None, False
    for sheet in book.worksheets:
        sheet.reset_dimensions()  # some programs write wrong ones
        cells = enumerate(map(list, sheet.iter_rows(values_only=True)), start=1)
        rows = _with_header(((f"{sheet.title}!{number}", row) for number, row in cells), path, find, bad)
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


def _read_parquet(path: Path, find: Find, bad: BadLines) -> Iterator[tuple[Place, Row]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        columns = find(tuple(file.schema_arrow.names))
        batches = file.iter_batches(10_000, columns=[columns.question, columns.answer, *columns.negatives])
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


READERS = {
    ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv, ".xlsx": _read_xlsx,
    ".parquet": _read_parquet,
}  # fmt: skip


def read_file(path: Path, find: Find, bad: BadLines) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield (question, answers, known negatives) of every good row of a file; what is wrong with the others: `bad`.

    Raises:
        UserError: the file is not what its name says, or has no recognisable columns.
    """
    kind = path.suffix.lower()
    recognised = False
    try:
        for place, row in READERS[kind](path, find, bad):
            try:
                if not isinstance(row, dict):
                    raise UserError(f"is a JSON {type(row).__name__}; write objects")
                columns = find(tuple(row))
                recognised = True
                parsed = _parse_row(row, columns, from_json=kind in (".jsonl", ".json"))
            except UserError as error:
                if isinstance(row, dict) and not recognised:
                    raise
                bad.add(path, place, error)
            else:
                yield parsed
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (UnicodeDecodeError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path}: cannot be read as {kind} ({error}); save it again, text as UTF-8") from None
