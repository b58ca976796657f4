"""Raw files of every kind, encoding and spelling as rows of question, answers and negatives; what is bad is named."""

import csv
import gzip
import json
import zipfile
from datetime import date
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest

from bge_core import UserError
from bge_core.files.columns import Columns, Wanted, find_columns
from bge_core.files.pairs import read_pairs
from bge_core.files.tables import find_inputs

TEN = [(f"问题{i}怎么办？", f"这是第{i}个答案。") for i in range(10)]


def jsonl(pairs: list[tuple[str, str]], question: str = "question", answer: str = "answer") -> str:
    return "".join(json.dumps({question: q, answer: a}, ensure_ascii=False) + "\n" for q, a in pairs)


def write(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def pairs_of(source: Path, query_field: str | None = None, answer_field: str | None = None) -> list[tuple[str, str]]:
    """What is found in `source`, in order of the questions."""
    pairs, _ = read_pairs(find_inputs(source, source.parent / "out", ()), Wanted(query_field, answer_field))
    rows = map(pairs.row, range(len(pairs.positives)))
    return sorted((row["query"], answer) for row in rows for answer in row["pos"])


def message_of(source: Path, *fields: str | None) -> str:
    with pytest.raises(UserError) as caught:
        pairs_of(source, *fields)
    return str(caught.value)


# --- formats, encodings, columns ------------------------------------------------------------------------------------


def write_xlsx(file: Path, rows: list[Any]) -> None:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(file)


def write_parquet(file: Path, pairs: list[tuple[str, str]]) -> None:
    columns = {"问题": [q for q, _ in pairs], "答案": [a for _, a in pairs], "embedding": [[0.5] * 4] * len(pairs)}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


def write_packed(file: Path, pairs: list[tuple[str, str]]) -> None:
    write_csv(file.with_suffix(""), pairs, ",")
    file.write_bytes(gzip.compress(file.with_suffix("").read_bytes()))
    file.with_suffix("").unlink()


def write_csv(file: Path, pairs: list[tuple[str, str]], delimiter: str) -> None:
    with open(file, "w", encoding="utf-8", newline="") as opened:
        csv.writer(opened, delimiter=delimiter).writerows(
            [("序号", "问题", "答案"), *((i, *pair) for i, pair in enumerate(pairs))]
        )


def as_rows(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"question": q, "answer": a} for q, a in pairs]


WRITERS = {
    "a.jsonl": lambda file, pairs: write(file, jsonl(pairs)),
    "list.json": lambda file, pairs: write(file, json.dumps(as_rows(pairs), indent=1)),
    "data.json": lambda file, pairs: write(file, json.dumps({"version": 1, "data": as_rows(pairs)})),
    "lines.json": lambda file, pairs: write(file, jsonl(pairs)),
    "a.csv": lambda file, pairs: write_csv(file, pairs, ","),
    "semicolon.csv": lambda file, pairs: write_csv(file, pairs, ";"),
    "a.csv.gz": write_packed,
    "a.tsv": lambda file, pairs: write_csv(file, pairs, "\t"),
    "A.XLSX": lambda file, pairs: write_xlsx(file, [["问题", "答案"], *map(list, pairs)]),
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_pairs(name: str, tmp_path: Path) -> None:
    pairs = [*TEN, ('他说"你好"，然后呢', '第一行, 有逗号; 分号\t和“引号”"的" 答案')]
    WRITERS[name](tmp_path / name, pairs)
    expected = sorted((" ".join(q.split()), " ".join(a.split())) for q, a in pairs)
    assert pairs_of(tmp_path) == pairs_of(tmp_path / name) == expected, "a single file is as good as its folder"


def test_csv_cells_may_hold_line_breaks(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", '问题,答案\r\nq1,"第一行\r\n第二行"\r\nq2,b,,\r\n,\r\n\r\n')
    assert pairs_of(file) == [("q1", "第一行 第二行"), ("q2", "b")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
def test_encodings(encoding: str, tmp_path: Path) -> None:
    pairs = [*TEN, ("联通", "𠮷野家，€5")]  # 联通 in GBK is famous for being valid UTF-8
    texts = {
        "a.csv": "".join(f'"{q}","{a}"\n' for q, a in [("问题", "答案"), *pairs]),
        "a.jsonl": jsonl(pairs, "问题", "答案"),
        "a.json": json.dumps(as_rows(pairs), ensure_ascii=False),
    }
    for name, text in texts.items():
        assert pairs_of(write(tmp_path / name, text.encode(encoding))) == sorted(pairs), name


def test_a_few_bad_bytes_do_not_turn_utf8_into_gb18030(tmp_path: Path) -> None:
    lines = jsonl(TEN).encode().splitlines(keepends=True)
    lines[3] = '{"question": "坏行", "answer": "答案"}\n'.encode("gb18030")
    message = message_of(write(tmp_path / "a.jsonl", b"".join(lines)))
    assert "a.jsonl:4: field 'question' holds at character 1 bytes of another encoding" in message
    assert "iconv -f GB18030 -t UTF-8" in message and "1 bad line" in message


@pytest.mark.parametrize(
    ("names", "question", "answer", "negatives"),
    [
        (("query", "pos"), "query", "pos", ()),
        (("id", " Question ", "ANSWER"), " Question ", "ANSWER", ()),
        (("答案", "问题"), "问题", "答案", ()),
        (("標題", "質問", "回答"), "質問", "回答", ()),
        (("标准问（必填）", "*答复：", "分类"), "标准问（必填）", "*答复：", ()),
        (("Ｑ", "Ａ"), "Ｑ", "Ａ", ()),
        (("content", "text", "question", "answer"), "question", "answer", ()),
        (("sentence1", "sentence2", "id"), "sentence1", "sentence2", ()),
        (("input", "output"), "input", "output", ()),
        (("问题", "相似问题"), "问题", "相似问题", ()),
        (
            ("知识标题（100 字以内）请写全", "(选填)分类", "【必填】默认"),
            "知识标题（100 字以内）请写全",
            "【必填】默认",
            (),
        ),
        (("anchor", "positive", "negative"), "anchor", "positive", ("negative",)),
        (("anchor", "positive", "negative_1", "negative_2"), "anchor", "positive", ("negative_1", "negative_2")),
        (("query", "pos", "neg", "pos_scores", "neg_scores"), "query", "pos", ("neg",)),
    ],
)
def test_column_names(names: tuple[str, ...], question: str, answer: str, negatives: tuple[str, ...]) -> None:
    assert find_columns(names, dict.fromkeys(names, ())) == Columns((question,), answer, negatives)


def test_columns_by_name(tmp_path: Path) -> None:
    file = write(tmp_path / "b.csv", "用户说,答案,机器人说\n" + "".join(f"{q},不对,{a}\n" for q, a in TEN))
    message = message_of(file)
    for part in ("b.csv", "'用户说', '答案', '机器人说'", "--query_field", "question"):
        assert part in message
    assert pairs_of(file, "用户说", "机器人说") == TEN
    message = message_of(file, "用户说", "回应")
    assert "no field '回应'; found: '用户说', '答案', '机器人说'" in message and "--answer_field" in message


def test_numbers_and_dates_of_tables_are_texts(tmp_path: Path) -> None:
    cells = [
        ("客服电话", 95588, "95588"), ("利率", 3.85, "3.85"), ("几个", 123.0, "123"), (7, 0, "0"),
        ("哪天", date(2024, 1, 2), "2024-01-02 00:00:00"), ("真", True, "True"),
    ]  # fmt: skip
    rows = [[None, None], ["问题", "答案"], *([q, a] for q, a, _ in cells), [None, "x"], ["y", None]]
    write_xlsx(tmp_path / "a.xlsx", rows)
    pyarrow.parquet.write_table(pyarrow.table({"q": [1, 2], "a": [2.0, float("nan")]}), tmp_path / "b.parquet")
    assert pairs_of(tmp_path) == sorted([*((str(q), text) for q, _, text in cells), ("1", "2")])


def test_sheets_without_the_columns_are_skipped_if_another_has_them(tmp_path: Path) -> None:
    file = tmp_path / "a.xlsx"
    book = openpyxl.Workbook()
    book.active.title = "说明"
    book.active.append(["本表由客服部维护"])
    for title, pairs in (("一", TEN[:5]), ("二", TEN[5:])):
        sheet = book.create_sheet(title)
        for row in [("问题", "答案"), *pairs]:
            sheet.append(row)
    book.create_sheet("空")
    book.save(file)
    assert pairs_of(file) == TEN
    (understood,) = read_pairs([file])[1]
    assert "sheet '说明' is not read: no field 'query'" in understood.notes[0] and len(understood.notes) == 1
    del book["一"], book["二"]
    book.save(file)
    message = message_of(file)
    assert "a.xlsx" in message and "'本表由客服部维护'" in message and "--query_field" in message


def test_a_workbook_that_states_a_wrong_size_is_read_whole(tmp_path: Path) -> None:
    write_xlsx(tmp_path / "right.xlsx", [["问题", "答案"], *map(list, TEN)])
    with zipfile.ZipFile(tmp_path / "right.xlsx") as right, zipfile.ZipFile(tmp_path / "wrong.xlsx", "w") as wrong:
        for name in right.namelist():
            content = right.read(name)
            changed = content.replace(b'<dimension ref="A1:B11"', b'<dimension ref="A1:A1"')
            assert (content != changed) == (name == "xl/worksheets/sheet1.xml")
            wrong.writestr(name, changed)
    assert pairs_of(tmp_path / "wrong.xlsx") == TEN


# --- bad input ------------------------------------------------------------------------------------------------------

GOOD = '{"query": "q", "pos": ["a"]}\n'
BAD_LINES = {
    "broken JSON": ('{"query": "q", "pos": ["a"]', ["not JSON", "column 28", "write one object a line"]),
    "no object": ('["q", "a"]', ["is a JSON list", "write one object a line"]),
    "missing key": ('{"query": "q"}', ["no field", "answer", "found: 'query'", "add it"]),
    "empty pos": ('{"query": "q", "pos": []}', ["field 'pos' is an empty list", "fill it or remove the line"]),
    "number": ('{"query": 7, "pos": ["a"]}', ["field 'query' is 7", "must be a string"]),
    "number in the list": ('{"query": "q", "pos": ["a", 7]}', ["field 'pos[1]' is 7", "must be a string"]),
    "object": ('{"query": "q", "pos": {"text": "a"}}', ["""field 'pos' is {"text": "a"}""", "must be a string"]),
    "list of questions": ('{"query": ["q"], "pos": ["a"]}', ["""field 'query' is ["q"]""", "must be a string"]),
    "bad negative": ('{"query": "q", "pos": ["a"], "neg": ["n", 1]}', ["field 'neg[1]' is 1", "must be a string"]),
    "NUL": (r'{"query": "a\u0000", "pos": ["a"]}', ["field 'query'", "character 2", "NUL", "remove it"]),
    "lone surrogate": (r'{"query": "q", "pos": ["\ud83d"]}', ["field 'pos[0]'", "surrogate", "remove it"]),
    "endless number": ('{"query": "q", "pos": ' + "1" * 5000 + "}", ["not readable as JSON", "one object a line"]),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line_of_jsonl(kind: str, tmp_path: Path) -> None:
    line, parts = BAD_LINES[kind]
    file = write(tmp_path / "a.jsonl", f"{GOOD}\n{line}\n{GOOD}")
    message = message_of(file)
    for part in (f"{file}:3: ", "1 bad line", "nothing was written", *parts):
        assert part in message, part


def test_bad_lines_of_all_files_are_counted_and_ten_are_shown(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", GOOD + '{"query": "q", "pos": 1}\n' * 8)
    message = message_of(tmp_path)
    assert "16 bad line" in message and message.count("must be a string") == 10 and "and 6 more" in message


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.csv", "问题,答案\nq,先存,后取\n", ["a.csv:2: has 3 cells for 2 columns"]),
        ("a.csv", '问题,答案\nq,a\nq2,"没有结束\nq3,b\n', ["a.csv:3: its quotes do not match", "twice"]),
        ("a.csv", "怎么办,这么办\nq,a\n", ["a.csv: no field", "'怎么办', '这么办'", "--query_field"]),
        ("a.csv", "问题,答案,答案\nq,a,b\n", ["a.csv: has 2 columns named '答案'"]),
        ("a.csv", "问题,答案\nq,a\0b\n", ["a.csv", "field '答案'", "NUL"]),
        ("a.jsonl", '{"foo": "q", "bar": "a"}\n' * 99, ["a.jsonl: no field", "'foo', 'bar'", "--query_field"]),
        ("a.json", '[{"q": "x", "a": "y"}, {"q": "x"', ["a.json: not JSON", "line 1"]),
        ("a.json", '{"data": {"q": "x"}}', ["a.json: "]),
        ("a.json", '[{"q": "x", "a": "y"}, {"q": "x", "a": 3}]', ["a.json:object 2: field 'a' is 3"]),
        ("a.json", '[1, "x"]', ["a.json:object 1: is a JSON int; write objects", "object 2: is a JSON str"]),
        ("a.csv", b"\xff\xfe\x41", ["a.csv: cannot be read as .csv", "UTF-8"]),
        ("a.xlsx", "no workbook", ["a.xlsx: not a workbook", "save it as .xlsx"]),
        ("a.csv", "PK\3\4", ["a.csv: is a ZIP archive", "name it .xlsx"]),
        ("a.csv", b"\x1f\x8b\x08\0\0\0\0\0\0\3", ["a.csv: cannot be unpacked", "copy it again"]),
        ("a.parquet", "no parquet at all", ["a.parquet: cannot be read as .parquet"]),
        ("a.txt", "x", ["no file of a known kind", ".jsonl"]),
    ],
)
def test_bad_file(name: str, content: str | bytes, parts: list[str], tmp_path: Path) -> None:
    message = message_of(write(tmp_path / name, content))
    for part in parts:
        assert part in message, part
