"""The file formats: every kind of bad line is named with its remedy."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bge_core import UserError
from bge_core.files import records
from bge_core.files.records import (
    check_corpus_row,
    check_evaluation_row,
    check_training_row,
    distinct_texts,
    read_jsonl,
    read_rows,
)

GOOD = b'{"query": "q", "pos": ["a"]}\n'


def check_with_scores(row: records.Row) -> str | None:
    return check_training_row(row, with_scores=True)


def message_of(path: Path, check: Callable[[records.Row], str | None]) -> str:
    with pytest.raises(UserError) as caught:
        list(read_jsonl(path, check))
    return str(caught.value)


def test_distinct_texts_keep_order_and_first_spelling() -> None:
    rows: list[records.Row] = [
        {"pos": ["ｂ", "a"], "neg": ["c"]},
        {"pos": ["A"], "neg": None},
        {"pos": ["b", "d"], "neg": ["a", " c "]},
        {},
    ]
    assert distinct_texts(rows, "pos", "neg") == ["ｂ", "a", "c", "A", "d"]
    assert distinct_texts(rows, "neg", "pos") == ["c", "ｂ", "a", "A", "d"]
    assert distinct_texts(rows, "neg") == ["c", "a"]


BAD_TRAINING_LINES: dict[str, tuple[bytes | dict[str, Any], list[str]]] = {
    "broken JSON": (b'{"query": "q", "pos": ["a"]', ["not JSON", "column 28", "one object a line"]),
    "no object": (b'["q"]', ["is a JSON list", "one object a line"]),
    "invalid UTF-8": ('{"query": "问"}'.encode("gb18030"), ["not UTF-8 (byte 11)", "iconv -f GB18030 -t UTF-8"]),
    "endless number": (b'{"query": ' + b"1" * 5000 + b"}", ["not readable as JSON", "one object a line"]),
    "bottomless list": (b"[" * 200_000, ["not readable as JSON", "one object a line"]),
    "no query": ({"pos": ["a"]}, ["field 'query' is missing", "add it"]),
    "null query": ({"query": None, "pos": ["a"]}, ["field 'query' is null", "must be a string"]),
    "empty query": ({"query": " ", "pos": ["a"]}, ["field 'query' is empty", "remove the line or fill it"]),
    "query a number": ({"query": 3, "pos": ["a"]}, ["field 'query' is 3", "must be a string"]),
    "no pos": ({"query": "q"}, ["field 'pos' is missing", 'as "pos": ["text"]']),
    "pos a string": ({"query": "q", "pos": "答案"}, ["""field 'pos' is "答案";""", """as ["答案"]"""]),
    "empty pos": ({"query": "q", "pos": []}, ["field 'pos' is an empty list", "at least one"]),
    "number in pos": ({"query": "q", "pos": ["a", 5]}, ["field 'pos[1]' is 5", "must be a string"]),
    "empty text in pos": ({"query": "q", "pos": [""]}, ["field 'pos[0]' is empty", "remove it"]),
    "neg a string": ({"query": "q", "pos": ["a"], "neg": "n"}, ["""field 'neg' is "n";""", """as ["n"]"""]),
    "null in neg": ({"query": "q", "pos": ["a"], "neg": [None]}, ["field 'neg[0]' is null", "must be a string"]),
    "surrogate in query": (b'{"query": "a\\ud800", "pos": ["a"]}', ["field 'query'", "lone surrogate", "remove it"]),
    "surrogate in neg": (
        b'{"query": "q", "pos": ["a"], "neg": ["n", "\\udfff"]}', ["field 'neg[1]'", "lone surrogate", "remove it"],
    ),
    "scores of another length": (
        {"query": "q", "pos": ["a", "b"], "pos_scores": [1.0]}, ["field 'pos_scores' is [1.0]", "a list of 2 numbers"],
    ),
    "scores without texts": (
        {"query": "q", "pos": ["a"], "neg_scores": [1]}, ["field 'neg_scores' is [1]", "a list of 0 numbers"],
    ),
    "scores a number": ({"query": "q", "pos": ["a"], "pos_scores": 1}, ["'pos_scores' is 1", "a list of 1 numbers"]),
    "score a string": (
        {"query": "q", "pos": ["a"], "pos_scores": ["1"]}, ["""'pos_scores[0]' is "1";""", "finite number"],
    ),
    "score NaN": (
        {"query": "q", "pos": ["a"], "pos_scores": [float("nan")]}, ["'pos_scores[0]' is NaN", "finite number"],
    ),
    "score true": ({"query": "q", "pos": ["a"], "pos_scores": [True]}, ["'pos_scores[0]' is true", "finite number"]),
    "prompt a list": ({"query": "q", "pos": ["a"], "prompt": ["x"]}, ["""field 'prompt' is ["x"]""", "a string"]),
    "type a number": ({"query": "q", "pos": ["a"], "type": 1}, ["field 'type' is 1", "must be a string"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_TRAINING_LINES)
def test_bad_training_line(kind: str, tmp_path: Path) -> None:
    line, parts = BAD_TRAINING_LINES[kind]
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD + b"\n" + (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" + GOOD)
    message = message_of(path, check_training_row)
    for part in ("1 bad line: nothing was written", f"  {path}:3: ", *parts):
        assert part in message, part
    assert message.count("\n") == 1


def test_scores_are_needed_only_for_distillation(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD + b'{"query": "q", "pos": ["a"], "pos_scores": [1], "neg": ["n"]}\n')
    assert len(read_rows(path, check_training_row)) == 2
    message = message_of(path, check_with_scores)
    assert (
        f"{path}:1: field 'pos_scores' is missing" in message and f"{path}:2: field 'neg_scores' is missing" in message
    )
    path.write_bytes(b'{"query": "q", "pos": ["a"], "pos_scores": [1], "neg": []}\n')
    assert len(read_rows(path, check_with_scores)) == 1


def test_good_training_lines(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"query": "问", "pos": ["答"]},
        {"query": "q", "pos": ["a", "b"], "neg": [], "prompt": None, "type": None, "pos_scores": None},
        {"query": "q", "pos": ["a"], "neg": None, "prompt": "为这个句子生成表示：", "unknown": {"x": [1]}},
        {"query": "q", "pos": ["a"], "neg": ["n"], "pos_scores": [1], "neg_scores": [-0.5], "type": "normal"},
        {"query": "\U0001f600 two halves that fit", "pos": ["a"]},
    ]
    path = tmp_path / "train.jsonl"
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    assert list(read_jsonl(path, check_training_row)) == [(2 * i + 1, row) for i, row in enumerate(rows)]


ROWS: list[dict[str, Any]] = [{"query": "问", "pos": ["答"], "n": i} for i in range(3)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
ARRAY = json.dumps(ROWS, ensure_ascii=False, indent=2)
LAYOUTS = {
    "gzip": gzip.compress(LINES.encode()),
    "gzip of an array": gzip.compress(ARRAY.encode()),
    "UTF-16 with BOM": LINES.encode("utf-16"),
    "UTF-16 big-endian": LINES.encode("utf-16-be"),
    "UTF-16 array": ("\n" + ARRAY).encode("utf-16"),
    "UTF-32": LINES.encode("utf-32"),
    "array": ARRAY.encode(),
    "array in one line": json.dumps(ROWS).encode(),
    "data in an object": json.dumps({"version": 1, "data": ROWS}, indent=1).encode(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_others_write_gives_the_same_rows(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "x.data"
    path.write_bytes(LAYOUTS[layout])
    assert list(read_jsonl(path, check_training_row)) == list(enumerate(ROWS, start=1))


OTHER_KINDS = {
    "workbook": (b"PK\x03\x04...", "x.jsonl: is a ZIP archive: unpack it; or a workbook"),
    "Parquet": (b"PAR1...", "x.jsonl: is a Parquet file: end its name with .parquet"),
    "xz": (b"\xfd7zXZ\0...", "x.jsonl: is packed by xz: unpack it"),
    "half of a gzip": (gzip.compress(LINES.encode())[:40], "x.jsonl: cannot be unpacked"),
    "half of UTF-16": (LINES.encode("utf-16")[:-1], "x.jsonl: cannot be read as utf-16"),
    "GB18030 in gzip": (gzip.compress(LINES.encode("gb18030")), "x.jsonl:1: not UTF-8"),
    "broken array": (ARRAY[:-9].encode(), "1 bad line: nothing was written\n.*x.jsonl:21: not JSON .*column 8"),
    "array of texts": (b'["q", "r"]', "x.jsonl:2: is a JSON str; write one object a line"),
    "lists by lines": (b'["q"]\n["r"]', "x.jsonl:2: is a JSON list; write one object a line"),
    "bad in an array": (json.dumps([*ROWS, {"query": "q"}], indent=2).encode(), "x.jsonl:4: field 'pos' is missing"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_the_kind_of_a_file_is_named(kind: str, tmp_path: Path) -> None:
    content, message = OTHER_KINDS[kind]
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_jsonl(tmp_path / "x.jsonl", check_training_row))


@pytest.mark.parametrize(
    ("row", "check", "part"),
    [
        ({"id": 1}, check_corpus_row, "field 'text' is missing"),
        ({"text": ""}, check_corpus_row, "field 'text' is empty"),
        ({"text": ["a"]}, check_corpus_row, """field 'text' is ["a"]"""),
        ({"text": "a", "title": 3}, check_corpus_row, "field 'title' is 3"),
        ({"text": "", "title": " "}, check_corpus_row, "field 'text' is empty"),
        ({"title": "t"}, check_corpus_row, "field 'text' is missing"),
        ({"query": "q"}, check_evaluation_row, "field 'pos' is missing"),
        ({"query": 1, "pos": ["a"]}, check_evaluation_row, "field 'query' is 1"),
        ({"query": "q", "pos": []}, check_evaluation_row, "field 'pos' is an empty list"),
        ({"query": "q", "pos": ["a"], "neg": "n"}, check_evaluation_row, """field 'neg' is "n";"""),
    ],
)
def test_bad_corpus_and_evaluation_lines(
    row: records.Row, check: Callable[[records.Row], str | None], part: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    assert f"{path}:1: {part}" in message_of(path, check)


def test_an_empty_question_can_be_evaluated() -> None:
    assert check_evaluation_row({"query": "", "pos": ["a"]}) is None


def test_all_bad_lines_are_counted_and_ten_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes((GOOD + b'{"query": "q", "pos": "a"}\n') * 13)
    message = message_of(path, check_training_row)
    assert "13 bad lines: nothing was written" in message
    assert [f"{path}:{number}:" in message for number in range(1, 27)] == [n % 2 == 0 and n <= 20 for n in range(1, 27)]
    assert message.endswith("... and 3 more")


def test_a_long_value_is_shortened(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"query": "q", "pos": {"text": "长" * 5000}}), encoding="utf-8")
    assert len(message_of(path, check_training_row)) < 400 + 2 * len(str(path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing.jsonl: no such file"):
        read_rows(tmp_path / "missing.jsonl", check_training_row)
    with pytest.raises(UserError, match="is a folder; name a file"):
        read_rows(tmp_path, check_training_row)
    (tmp_path / "empty.jsonl").write_text("\n\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no row"):
        read_rows(tmp_path / "empty.jsonl", check_training_row)
