"""The prepare stage on files small enough to count by hand, and its split on random ones."""

import csv
import json
import random
import zipfile
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
from bge_core import UserError
from bge_core.files import atomic
from bge_core.files.atomic import sha256
from bge_core.files.columns import find_columns
from bge_core.files.pairs import Pairs, from_triplets, to_triplets
from bge_core.files.records import check_corpus_row, check_evaluation_row, check_training_row, read_rows
from bge_core.files.split import OUTPUTS, choose_train
from bge_core.files.text import text_id

# Question i has answer i, so each pair is a group of its own.
TEN = [(f"问题{i}怎么办？", f"这是第{i}个答案。") for i in range(10)]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_rows(pairs: list[tuple[str, str]], question: str = "question", answer: str = "answer") -> list[dict[str, str]]:
    return [{question: q, answer: a} for q, a in pairs]


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return folder


def load(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_output(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str], dict[str, int]]:
    """Training rows, test rows, corpus texts, counts; each file checked by the rules of the stages that read it."""
    read_rows(folder / "train.jsonl", check_training_row)
    read_rows(folder / "test.jsonl", check_evaluation_row)
    corpus = read_rows(folder / "corpus.jsonl", check_corpus_row)
    assert [row["id"] for row in corpus] == [str(i) for i in range(len(corpus))]
    counts = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["counts"]
    return load(folder / "train.jsonl"), load(folder / "test.jsonl"), [row["text"] for row in corpus], counts


def run(source: Path, output: Path, *flags: str) -> int:
    return prepare.main(["--input_dir", str(source), "--output_dir", str(output), *flags])


def pairs_of(source: Path, output: Path, *flags: str) -> list[tuple[str, str]]:
    """What the stage found in `source`, in order of the questions."""
    assert run(source, output, *flags) == 0
    train, test, _, _ = read_output(output)
    return sorted((row["query"], answer) for row in train + test for answer in row["pos"])


def refused(source: Path, output: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The message of a run that must fail with exit code 2 and leave no file."""
    before = sorted(output.rglob("*")) if output.exists() else []
    capsys.readouterr()
    assert run(source, output, *flags) == 2
    assert (sorted(output.rglob("*")) if output.exists() else []) == before
    captured = capsys.readouterr()
    assert captured.out == ""
    message = captured.err[captured.err.index("error: ") :]
    assert "Traceback" not in message
    return message


# --- formats, encodings, columns ------------------------------------------------------------------------------------


def write_xlsx(path: Path, rows: list[list[Any]]) -> None:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)


def write_parquet(path: Path, pairs: list[tuple[str, str]]) -> None:
    columns = {"问题": [q for q, _ in pairs], "答案": [a for _, a in pairs], "embedding": [[0.5] * 4] * len(pairs)}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def write_csv(path: Path, pairs: list[tuple[str, str]], delimiter: str) -> None:
    rows = [("序号", "问题", "答案"), *((i, *pair) for i, pair in enumerate(pairs))]
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


WRITERS = {
    "a.jsonl": lambda path, pairs: path.write_text(jsonl(as_rows(pairs)), encoding="utf-8"),
    "list.json": lambda path, pairs: path.write_text(json.dumps(as_rows(pairs), indent=1), encoding="utf-8"),
    "data.json": lambda path, pairs: path.write_text(json.dumps({"version": 1, "data": as_rows(pairs)})),
    "lines.json": lambda path, pairs: path.write_text(jsonl(as_rows(pairs)), encoding="utf-8"),
    "a.csv": lambda path, pairs: write_csv(path, pairs, ","),
    "semicolon.csv": lambda path, pairs: write_csv(path, pairs, ";"),
    "a.tsv": lambda path, pairs: write_csv(path, pairs, "\t"),
    "A.XLSX": lambda path, pairs: write_xlsx(path, [["问题", "答案"], *map(list, pairs)]),
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_pairs(name: str, tmp_path: Path) -> None:
    pairs = [*TEN, ('他说"你好"，然后呢', '第一行, 有逗号; 分号\t和“引号”"的" 答案')]
    source = tmp_path / "in"
    source.mkdir()
    WRITERS[name](source / name, pairs)
    expected = sorted((" ".join(q.split()), " ".join(a.split())) for q, a in pairs)
    assert pairs_of(source, tmp_path / "out") == expected
    assert pairs_of(source / name, tmp_path / "out_of_file") == expected, "a single file is as good as its folder"


def test_csv_cells_may_hold_line_breaks(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.csv": '问题,答案\r\nq1,"第一行\r\n第二行"\r\nq2,b,,\r\n,\r\n\r\n'})
    assert pairs_of(source, tmp_path / "out") == [("q1", "第一行 第二行"), ("q2", "b")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_encodings(name: str, encoding: str, tmp_path: Path) -> None:
    pairs = [*TEN, ("联通", "𠮷野家，€5")]  # 联通 in GBK is famous for being valid UTF-8
    text = {
        "a.csv": "".join(f'"{q}","{a}"\n' for q, a in [("问题", "答案"), *pairs]),
        "a.jsonl": jsonl(as_rows(pairs, "问题", "答案")),
        "a.json": json.dumps(as_rows(pairs, "问题", "答案"), ensure_ascii=False),
    }[name]
    source = write(tmp_path / "in", {name: text.encode(encoding)})
    assert pairs_of(source, tmp_path / "out") == sorted(pairs)


def test_a_few_bad_bytes_do_not_turn_utf8_into_gb18030(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = jsonl(as_rows(TEN)).encode().splitlines(keepends=True)
    lines[3] = '{"question": "坏行", "answer": "答案"}\n'.encode("gb18030")
    message = refused(write(tmp_path / "in", {"a.jsonl": b"".join(lines)}), tmp_path / "out", capsys)
    assert "a.jsonl:4: field 'question' holds at character 1 bytes of another encoding" in message
    assert "iconv -f GB18030 -t UTF-8" in message
    assert "1 bad line" in message


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("query", "pos"), ("query", "pos", ())),
        (("id", " Question ", "ANSWER"), (" Question ", "ANSWER", ())),
        (("答案", "问题"), ("问题", "答案", ())),
        (("提问", "回答"), ("提问", "回答", ())),
        (("标准问（必填）", "*答复：", "分类"), ("标准问（必填）", "*答复：", ())),
        (("Ｑ", "Ａ"), ("Ｑ", "Ａ", ())),
        (("title", "content", "question", "answer"), ("question", "answer", ())),
        (("anchor", "positive", "negative"), ("anchor", "positive", ("negative",))),
        (("anchor", "positive", "negative_1", "negative_2"), ("anchor", "positive", ("negative_1", "negative_2"))),
        (("query", "pos", "neg", "pos_scores", "neg_scores"), ("query", "pos", ("neg",))),
    ],
)
def test_column_names(names: tuple[str, ...], expected: tuple[str, str, tuple[str, ...]]) -> None:
    assert find_columns(names) == expected


def test_flags_name_the_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", {"b.csv": "用户说,答案,机器人说\n" + "".join(f"{q},不对,{a}\n" for q, a in TEN)})
    message = refused(source, tmp_path / "out", capsys)
    for part in ("b.csv", "'用户说', '答案', '机器人说'", "--query_field", "question"):
        assert part in message
    assert pairs_of(source, tmp_path / "out", "--query_field", "用户说", "--answer_field", "机器人说") == TEN
    message = refused(source, tmp_path / "out2", capsys, "--query_field", "用户说", "--answer_field", "回应")
    assert "no field '回应'; found: '用户说', '答案', '机器人说'" in message and "--answer_field" in message


def test_numbers_and_dates_of_tables_are_texts(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    numbers: list[list[Any]] = [
        ["客服电话", 95588],
        ["利率", 3.85],
        ["几个", 123.0],
        [7, 0],
        ["哪天", date(2024, 1, 2)],
        ["真", True],
    ]
    write_xlsx(source / "a.xlsx", [[None, None], ["问题", "答案"], *numbers, [None, "x"], ["y", None]])
    table = pyarrow.table({"q": [1, 2], "a": [2.0, float("nan")]})
    pyarrow.parquet.write_table(table, source / "b.parquet")
    assert pairs_of(source, tmp_path / "out") == sorted(
        [("客服电话", "95588"), ("利率", "3.85"), ("几个", "123"), ("7", "0"), ("哪天", "2024-01-02 00:00:00"),
         ("真", "True"), ("1", "2")]
    )  # fmt: skip
    counts = read_output(tmp_path / "out")[3]
    assert (counts["rows"], counts["pairs_empty"]) == (10, 3)


def test_sheets_without_the_columns_are_skipped_if_another_has_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    book = openpyxl.Workbook()
    book.active.title = "说明"
    book.active.append(["本表由客服部维护"])
    for title, pairs in (("一", TEN[:5]), ("二", TEN[5:])):
        sheet = book.create_sheet(title)
        for row in [("问题", "答案"), *pairs]:
            sheet.append(row)
    book.create_sheet("空")
    book.save(source / "a.xlsx")
    assert pairs_of(source, tmp_path / "out") == TEN
    assert "sheet '说明' is skipped" in caplog.text
    for title in ("一", "二"):
        del book[title]
    book.save(source / "a.xlsx")
    message = refused(source, tmp_path / "out2", capsys)
    assert "a.xlsx" in message and "'本表由客服部维护'" in message and "--query_field" in message


def test_a_workbook_that_states_a_wrong_size_is_read_whole(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    write_xlsx(tmp_path / "right.xlsx", [["问题", "答案"], *map(list, TEN)])
    with zipfile.ZipFile(tmp_path / "right.xlsx") as right, zipfile.ZipFile(source / "wrong.xlsx", "w") as wrong:
        for name in right.namelist():
            wrong.writestr(name, right.read(name).replace(b'<dimension ref="A1:B11"', b'<dimension ref="A1:A1"'))
    assert b'"A1:A1"' in zipfile.ZipFile(source / "wrong.xlsx").read("xl/worksheets/sheet1.xml")
    assert pairs_of(source, tmp_path / "out") == TEN


# --- what is read ---------------------------------------------------------------------------------------------------


def test_counts_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files: dict[str, str | bytes] = {
        "b/second.csv": "问题,答案\n怎么 开户？,去柜台\n怎么开卡?,带证件\n,无问题\n无答案,\n",
        "a.jsonl": jsonl(
            [
                {"question": "怎么 开户？", "answer": "带证件去柜台"},
                {"question": "  怎么  开户? ", "answer": "带证件去柜台"},  # repeated: NFKC and spaces do not count
                {"question": "营业时间", "answer": ["九点", "九点到五点", " ", "九点"]},  # one empty, one repeated
                {"question": "多久", "answer": None},  # empty
            ]
        )
        + "\n",
        "ignored.txt": "x",
        ".hidden/a.jsonl": "not read",
        "~$b.xlsx": "a lock of Excel",
    }
    assert run(write(tmp_path / "in", files), tmp_path / "out", "--train_num", "2") == 0
    train, test, corpus, counts = read_output(tmp_path / "out")
    assert counts == {
        "files": 2, "rows": 8, "pairs": 11, "pairs_empty": 4, "pairs_repeated": 2, "questions": 3,
        "questions_with_several_answers": 2, "questions_with_known_negatives": 0, "answers": 5, "corpus_texts": 5,
        "train_rows": 2, "test_rows": 1,
    }  # fmt: skip
    rows = [
        {"query": "怎么 开户？", "pos": ["带证件去柜台", "去柜台"]},
        {"query": "营业时间", "pos": ["九点", "九点到五点"]},
        {"query": "怎么开卡?", "pos": ["带证件"]},
    ]
    assert [row for row in rows if row in train] == train, "input order"
    assert [row for row in rows if row not in train] == test
    assert corpus == ["带证件去柜台", "九点", "九点到五点", "去柜台", "带证件"]
    shown = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:12])
    assert {name.replace(" ", "_"): int(value) for name, value in shown.items()} == counts


def test_manifest(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.jsonl": jsonl(as_rows(TEN)), "b/c.csv": "q,a\nx,y\n"})
    assert run(source, tmp_path / "out", "--seed", "7") == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))
    assert (manifest["stage"], manifest["seed"], manifest["config"]["split_by"]) == ("prepare", 7, "group")
    assert manifest["inputs"] == [
        {"path": str(source / name), "sha256": sha256(source / name), "rows": rows}
        for name, rows in (("a.jsonl", 10), ("b/c.csv", 1))
    ]


def test_next_command_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "a folder"
    assert run(write(tmp_path / "in", {"a.jsonl": jsonl(as_rows(TEN))}), output) == 0
    out = capsys.readouterr().out
    assert "python mine.py --model_name_or_path" in out and f"--input_file '{output}/train.jsonl'" in out


def test_known_negatives_are_kept_unless_they_are_answers(tmp_path: Path) -> None:
    rows: list[Any] = [{"query": f"q{i}", "pos": [f"a{i}"]} for i in range(9)]
    rows[0]["neg"] = ["n1", "n 2", "n1", ""]
    rows[1]["neg"] = ["a1", "a2", "n3"]  # its own positive; another question's
    rows.append({"query": "q1", "pos": ["n3"], "neg": []})  # n3 turns out to be a positive of q1
    rows.append({"anchor": "q2", "positive": "a2", "negative": "n4"})  # names may differ from line to line
    source = write(tmp_path / "in", {"a.jsonl": jsonl(rows)})
    for seed in range(8):
        for split_by in ("group", "question"):
            output = tmp_path / f"out-{seed}-{split_by}"
            assert run(source, output, "--train_num", "5", "--seed", str(seed), "--split_by", split_by) == 0
            train, test, corpus, counts = read_output(output)
            assert corpus == ["a0", "n1", "n 2", "a1", "a2", "n3", *(f"a{i}" for i in range(3, 9)), "n4"]
            assert counts["questions_with_known_negatives"] == 3
            assert all(row.keys() == {"query", "pos"} for row in test)
            held_out = {"a2"} & {answer for row in test for answer in row["pos"]} if split_by == "group" else set()
            known = {"q0": ["n1", "n 2"], "q1": ["a2"] if not held_out else None, "q2": ["n4"]}
            assert {row["query"]: row.get("neg") for row in train} == {
                row["query"]: known.get(row["query"]) for row in train
            }


# --- the split ------------------------------------------------------------------------------------------------------

small_pairs = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=2, max_size=30)
seeds = st.integers(0, 5)


def collect(numbers: list[tuple[int, int]]) -> Pairs:
    pairs = Pairs()
    for question, answer in numbers:
        pairs.add(f"问{question}", [f"答{answer}"], [])
    return pairs


def slow_groups(pairs: Pairs) -> list[set[int]]:
    """Connected components by repeated merging."""
    groups = [({q}, set(answers)) for q, answers in enumerate(pairs.positives)]
    merged = True
    while merged:
        merged = False
        for i in range(len(groups)):
            for j in range(i):
                if groups[i][1] & groups[j][1]:
                    groups[j] = (groups[j][0] | groups[i][0], groups[j][1] | groups[i][1])
                    del groups[i]
                    merged = True
                    break
            if merged:
                break
    return [questions for questions, _ in groups]


@given(small_pairs, seeds, st.data())
@settings(max_examples=300, deadline=None)
def test_group_split(numbers: list[tuple[int, int]], seed: int, data: st.DataObject) -> None:
    pairs = collect(numbers)
    total = len(pairs.positives)
    groups = slow_groups(pairs)
    room = data.draw(st.integers(1, max(1, total - 1)))
    if total == 1 or min(map(len, groups)) > room:
        with pytest.raises(UserError, match="--split_by question|needs two"):
            choose_train(pairs, room, "group", seed)
        return
    is_train = choose_train(pairs, room, "group", seed)
    train = {q for q in range(total) if is_train[q]}
    assert all(group <= train or not group & train for group in groups), "a group on both sides"
    assert all(len(group) > room - len(train) for group in groups if not group & train), "one that is left would fit"
    assert choose_train(pairs, room, "group", seed) == is_train


@given(small_pairs, seeds, st.sampled_from(["group", "question"]), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_split_depends_on_the_pairs_and_not_on_their_order(
    numbers: list[tuple[int, int]], seed: int, split_by: str, shuffler: random.Random
) -> None:
    shuffled = numbers[:]
    shuffler.shuffle(shuffled)
    sides: list[Any] = []
    for order in (numbers, shuffled):
        pairs = collect(order)
        try:
            is_train = choose_train(pairs, None, split_by, seed)
        except UserError as error:
            sides.append(str(error))
        else:
            sides.append({text: is_train[q] for q, text in enumerate(pairs.questions.spellings)})
    assert sides[0] == sides[1]


def test_question_split_fills_exactly_and_seeds_differ() -> None:
    pairs = collect([(i, i % 3) for i in range(100)])
    splits = {tuple(choose_train(pairs, 61, "question", seed)) for seed in range(5)}
    assert {sum(split) for split in splits} == {61}
    assert len(splits) == 5
    assert sum(choose_train(pairs, None, "question", 0)) == 90


def test_every_size_of_group_gives_its_share() -> None:
    # 200 single questions, 100 pairs, 40 groups of five: 600 questions; a tenth is tested
    numbers = [(i, i) for i in range(200)]
    numbers += [(1000 + 2 * i + j, 1000 + i) for i in range(100) for j in range(2)]
    numbers += [(5000 + 5 * i + j, 5000 + i) for i in range(40) for j in range(5)]
    pairs = collect(numbers)
    is_train = choose_train(pairs, None, "group", 3)
    assert sum(is_train) == 540
    per_size = Counter(len(slow) for slow in ({q} for q in range(200)) if not is_train[min(slow)])
    tested = [sum(not is_train[q] for q in part) for part in (range(200), range(200, 400), range(400, 600))]
    assert per_size[1] == tested[0]
    assert all(abs(count - 20) <= 5 for count in tested), tested


def test_one_group_larger_than_a_tenth_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = as_rows([*((f"这个问题{i}", "请联系人工客服") for i in range(4)), *((f"q{i}", f"a{i}") for i in range(16))])
    source = write(tmp_path / "in", {"a.jsonl": jsonl(rows)})
    assert run(source, tmp_path / "out") == 0
    assert "4 of the 20 questions form one group" in caplog.text
    assert "'这个问题0'" in caplog.text and "(4 times) is '请联系人工客服'" in caplog.text
    caplog.clear()
    assert run(source, tmp_path / "out_q", "--split_by", "question") == 0
    assert "form one group" not in caplog.text
    assert run(write(tmp_path / "in2", {"a.jsonl": jsonl(as_rows(TEN[:5]))}), tmp_path / "out2") == 0
    assert "form one group" not in caplog.text, "single questions are no groups"


def test_split_does_not_depend_on_the_listing_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: dict[str, str | bytes] = {f"{i % 3}/f{i}.jsonl": jsonl(as_rows(TEN[i : i + 2])) for i in range(9)}
    source = write(tmp_path / "in", files)
    assert run(source, tmp_path / "out") == 0
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(rglob(self, pattern))))
    assert run(source, tmp_path / "out2") == 0
    for name in ("train.jsonl", "test.jsonl", "corpus.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()


def test_train_num(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path / "in", {"a.jsonl": jsonl(as_rows(TEN))})
    for number, sizes in (("8", [8, 2]), ("10", [9, 1]), ("10000", [9, 1])):  # all of them: nine tenths
        assert run(source, tmp_path / number, "--train_num", number) == 0
        assert [len(rows) for rows in read_output(tmp_path / number)[:2]] == sizes
    assert "--train_num 10000: there are 10 questions; nine tenths of them train" in caplog.text
    assert "--train_num 8:" not in caplog.text


@pytest.mark.parametrize(
    ("pairs", "expected"), [([("q", "a")], "one question"), ([("q", "a"), ("p", "a")], "--split_by question")]
)
def test_what_cannot_be_split_is_refused(
    pairs: list[tuple[str, str]], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(write(tmp_path / "in", {"a.jsonl": jsonl(as_rows(pairs))}), tmp_path / "out", capsys)
    assert expected in message


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
    "bad negative": ('{"query": "q", "pos": ["a"], "neg": [1]}', ["field 'neg[0]' is 1", "must be a string"]),
    "NUL": (r'{"query": "a\u0000", "pos": ["a"]}', ["field 'query'", "character 2", "NUL", "remove it"]),
    "lone surrogate": (r'{"query": "q", "pos": ["\ud83d"]}', ["field 'pos[0]'", "surrogate", "remove it"]),
    "endless number": ('{"query": "q", "pos": ' + "1" * 5000 + "}", ["not readable as JSON", "one object a line"]),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line_of_jsonl(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, parts = BAD_LINES[kind]
    source = write(tmp_path / "in", {"a.jsonl": f"{GOOD}\n{line}\n{GOOD}"})
    message = refused(source, tmp_path / "out", capsys)
    for part in (f"{source / 'a.jsonl'}:3: ", "1 bad line", "nothing was written", *parts):
        assert part in message, part


def test_all_bad_lines_are_counted_and_ten_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files: dict[str, str | bytes] = {f"{name}.jsonl": GOOD + '{"query": "q", "pos": 1}\n' * 8 for name in "ab"}
    message = refused(write(tmp_path / "in", files), tmp_path / "out", capsys)
    assert "16 bad line" in message and message.count("must be a string") == 10 and "and 6 more" in message


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.csv", "问题,答案\nq,先存,后取\n", ["a.csv:2: has 3 cells for 2 columns"]),
        ("a.csv", '问题,答案\nq,a\nq2,"没有结束\nq3,b\n', ["a.csv:3: its quotes do not match", "twice"]),
        ("a.csv", "怎么办,这么办\nq,a\n", ["a.csv: no field", "'怎么办', '这么办'", "--query_field"]),
        ("a.csv", "问题,答案,答案\nq,a,b\n", ["a.csv: has 2 columns named '答案'"]),
        ("a.csv", "问题,答案\nq,a\0b\n", ["a.csv", "field '答案'", "NUL"]),
        ("a.csv", "问题,答案\n", ["0 pairs"]),
        ("a.csv", "", ["0 pairs"]),
        ("a.jsonl", '{"foo": "q", "bar": "a"}\n' * 99, ["a.jsonl: no field", "'foo', 'bar'", "--query_field"]),
        ("a.json", '[{"q": "x", "a": "y"}, {"q": "x"', ["a.json: not JSON", "line 1"]),
        ("a.json", '{"data": {"q": "x"}}', ["a.json: "]),
        ("a.json", '[{"q": "x", "a": "y"}, {"q": "x", "a": 3}]', ["a.json:object 2: field 'a' is 3"]),
        ("a.json", '[1, 2]', ["a.json:object 1: is a JSON int; write objects"]),
        ("a.csv", b"\xff\xfe\x41", ["a.csv: cannot be read as .csv", "UTF-8"]),
        ("a.xlsx", "no workbook", ["a.xlsx: not a workbook", "save it again"]),
        ("a.parquet", "no parquet at all", ["a.parquet: cannot be read as .parquet"]),
        ("a.txt", "x", ["no file of a known kind", ".jsonl"]),
    ],
)  # fmt: skip
def test_bad_file(
    name: str, content: str | bytes, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(write(tmp_path / "in", {name: content}), tmp_path / "out", capsys)
    for part in parts:
        assert part in message, part


# --- folders --------------------------------------------------------------------------------------------------------


def test_folders_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", {"train.jsonl": jsonl(as_rows(TEN))})
    assert "no such file or folder" in refused(tmp_path / "missing", tmp_path / "out", capsys)
    for flags in ([], ["--overwrite_output_dir"]):
        assert "would overwrite the input" in refused(source, source, capsys, *flags)
        assert "would overwrite the input" in refused(source / "train.jsonl", source, capsys, *flags)
    assert load(source / "train.jsonl") == as_rows(TEN)
    foreign = write(tmp_path / "foreign", {"thesis.doc": "x"})
    assert "thesis.doc" in refused(source, foreign, capsys)
    assert "is a file" in refused(source, foreign / "thesis.doc", capsys)


def test_output_inside_input_is_never_read(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.jsonl": jsonl(as_rows(TEN)), "link/../b.csv": "q,a\nx,y\n"})
    outputs = []
    for flags in ([], ["--overwrite_output_dir"]):
        assert run(source, source / "prepared", *flags) == 0
        outputs.append(read_output(source / "prepared"))
    assert outputs[0] == outputs[1]


def test_overwriting_keeps_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", {"a.jsonl": jsonl(as_rows(TEN))})
    assert run(source, tmp_path / "out") == 0
    write(tmp_path / "out", {"train_minedHN.jsonl": "mine"})
    assert "--overwrite_output_dir" in refused(source, tmp_path / "out", capsys)
    assert run(source, tmp_path / "out", "--overwrite_output_dir", "--train_num", "5") == 0
    assert (tmp_path / "out/train_minedHN.jsonl").read_text() == "mine"
    assert len(load(tmp_path / "out/train.jsonl")) == 5


@pytest.mark.parametrize("failing", ["train.jsonl", "corpus.jsonl", "manifest.json"])
def test_a_full_disk_leaves_the_earlier_output(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in", {"a.jsonl": jsonl(as_rows(TEN))})
    output = tmp_path / "out"
    assert run(source, output) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    name = "write_json" if failing == "manifest.json" else "write_jsonl"
    real = getattr(atomic, name)

    def write_until_full(path: Path, value: Any) -> Any:
        if failing in str(path):
            raise OSError(28, "No space left on device")
        return real(path, value)

    monkeypatch.setattr(atomic, name, write_until_full)
    assert "No space left" in refused(source, output, capsys, "--overwrite_output_dir", "--train_num", "5")
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert "No space left" in refused(source, tmp_path / "fresh", capsys)
    assert list((tmp_path / "fresh").iterdir()) == []


def test_the_manifest_appears_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two renames, the folder holds no manifest, so nothing vouches for a mixture of two runs."""
    source, output = write(tmp_path / "in", {"a.jsonl": jsonl(as_rows(TEN))}), tmp_path / "out"
    assert run(source, output) == 0
    replaced = []
    real = atomic.os.replace

    def replace(old: Path, new: Path) -> None:
        if Path(new).name in OUTPUTS:
            replaced.append(Path(new).name)
            assert not (output / "manifest.json").exists()
        real(old, new)

    monkeypatch.setattr(atomic.os, "replace", replace)
    assert run(source, output, "--overwrite_output_dir") == 0
    assert replaced == list(OUTPUTS)


# --- triplets -------------------------------------------------------------------------------------------------------


def test_triplets_by_hand() -> None:
    rows = [{"query": "q", "pos": ["p1", "p2"], "neg": ["n1", "n2"]}, {"query": "r", "pos": ["p3"], "neg": []}]
    triplets = list(to_triplets(rows))
    assert triplets == [
        {"anchor": "q", "positive": "p1", "negative": "n1"}, {"anchor": "q", "positive": "p1", "negative": "n2"},
        {"anchor": "q", "positive": "p2", "negative": "n1"}, {"anchor": "q", "positive": "p2", "negative": "n2"},
        {"anchor": "r", "positive": "p3"},
    ]  # fmt: skip
    assert list(from_triplets(triplets)) == [rows[0], {"query": "r", "pos": ["p3"]}]
    wide = [{"anchor": "q", "positive": "p", "negative_1": "n1", "negative_2": "p"}]
    assert list(from_triplets(wide)) == [{"query": "q", "pos": ["p"], "neg": ["n1"]}]
    for bad, message in (({"anchor": "q"}, "triplet 2: no field"), ({"anchor": "q", "positive": 3}, "'positive' is 3")):
        with pytest.raises(UserError, match=message):
            list(from_triplets([wide[0], bad]))


words = st.lists(st.integers(0, 30), min_size=1, max_size=4, unique=True)


@given(st.dictionaries(st.integers(0, 9), st.tuples(words, words), max_size=6))
@settings(deadline=None)
def test_triplets_round_trip(contents: dict[int, tuple[list[int], list[int]]]) -> None:
    rows = []
    for question, (positives, negatives) in contents.items():
        row: dict[str, Any] = {"query": f"问{question}", "pos": [f"文{i}" for i in positives]}
        if others := [f"文{i}" for i in negatives if i not in positives]:
            row["neg"] = others
        rows.append(row)
    triplets = list(to_triplets(rows))
    assert list(from_triplets(triplets)) == rows
    mixed = triplets[::2] + triplets[1::2]
    unordered = {row["query"]: (set(row["pos"]), set(row.get("neg", []))) for row in from_triplets(mixed)}
    assert unordered == {row["query"]: (set(row["pos"]), set(row.get("neg", []))) for row in rows}


def test_triplet_files_are_input(tmp_path: Path) -> None:
    triplets = [{"anchor": q, "positive": a, "negative": f"{a}不对"} for q, a in TEN]
    assert run(write(tmp_path / "in", {"a.jsonl": jsonl(triplets)}), tmp_path / "out") == 0
    train, test, corpus, _ = read_output(tmp_path / "out")
    assert [row for row in from_triplets(triplets) if row in train] == train
    assert len(train) == 9 and len(test) == 1 and "neg" not in test[0]
    assert len({text_id(text) for text in corpus}) == 20
