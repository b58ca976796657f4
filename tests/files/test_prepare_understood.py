"""What a raw file means is decided by its values, and said: labels, columns, headers, sheets, nested layouts, HTML."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pytest

import prepare
from bge_core import UserError
from bge_core.files.cells import strip_html
from bge_core.files.columns import Wanted
from bge_core.files.pairs import read_pairs
from bge_core.files.understood import Understood

Pairs = dict[str, tuple[list[str], list[str]]]  # question -> answers, known negatives


def understand(file: Path, **wanted: Any) -> tuple[Pairs, Understood]:
    pairs, (understood,) = read_pairs([file], Wanted(**wanted))
    rows = map(pairs.training_row, range(len(pairs.positives)))
    return {row["query"]: (row["pos"], row.get("neg", [])) for row in rows}, understood


def write(file: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8", newline="")
    return file


def workbook(file: Path, **sheets: list[list[Any]]) -> openpyxl.Workbook:
    book = openpyxl.Workbook(write_only=False)
    del book["Sheet"]
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(file)
    return book


# --- labels ---------------------------------------------------------------------------------------------------------

PAIR = {"怎么办证": (["带身份证来"], ["明天再说"]), "几点关门": (["九点"], [])}


@pytest.mark.parametrize("name", ["label", "标签", "is_best", "score"])
@pytest.mark.parametrize(("yes", "no"), [("1", "0"), ("是", "否"), ("TRUE", "FALSE"), ("1.0", "0.0")])
def test_a_label_of_yes_and_no_decides(name: str, yes: str, no: str, tmp_path: Path) -> None:
    """Label 0 is a negative of its question if that has an answer, before or after, and otherwise left out."""
    lines = [f"怎么办证,明天再说,{no}", f"怎么办证,带身份证来,{yes}", f"几点关门,九点,{yes}", f"食堂呢,不知道,{no}"]
    found, understood = understand(write(tmp_path / "a.csv", "\n".join([f"question,reply,{name}", *lines])))
    assert found == PAIR
    assert (understood.rows, understood.kept, understood.negatives) == (4, 2, 1)
    assert dict(understood.lost) == {"a negative, and its question has no answer": 1}


def test_labels_of_other_kinds(tmp_path: Path) -> None:
    json_lines = [{"sentence1": "a", "sentence2": "b", "label": label} for label in (True, False)]
    assert understand(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, json_lines))))[0] == {"a": (["b"], [])}
    nli = "premise,hypothesis,label\n猫在睡,猫没醒,entailment\n猫在睡,狗在睡,neutral\n猫在睡,猫醒着,contradiction\n猫在睡,?,-\n"
    found, understood = understand(write(tmp_path / "b.csv", nli))
    assert found == {"猫在睡": (["猫没醒"], ["狗在睡", "猫醒着"])} and dict(understood.lost) == {"'label' is empty": 1}
    category = "问题,答案,标签\nq,a,医保\nq2,a2,社保\n"
    found, understood = understand(write(tmp_path / "c.csv", category))
    assert list(found) == ["q", "q2"] and understood.columns["not taken"] == ["标签"]
    unknown = "问题,答案,相似吗\nq,a,1\nq2,a2,0\n"
    assert "'相似吗' says yes or no" in understand(write(tmp_path / "d.csv", unknown))[1].notes[0]
    unsure = "问题,答案,标签\nq,a,是\nq2,a2,否\nq3,a3,不确定\n"
    with pytest.raises(UserError, match="f.csv:4: field '标签' is '不确定'; it must be yes or no"):
        understand(write(tmp_path / "f.csv", unsure))
    late = "问题,答案,label\n" + "q,a,1\n" * 1500 + "q,a,3\n"
    with pytest.raises(UserError, match=r"e.csv:1502: field 'label' is '3'; it must be yes or no"):
        understand(write(tmp_path / "e.csv", late))


@pytest.mark.parametrize(
    ("numbers", "least"), [(["0", "3.8", "5"], "4"), (["2e-05", "0.9", "1"], "0.8"), ([0, 1, 2], "2")]
)
def test_a_score_is_no_yes_or_no(numbers: list[Any], least: str, tmp_path: Path) -> None:
    rows = "".join(f"q{i},a{i},{number}\n" for i, number in enumerate(numbers))
    file = write(tmp_path / "a.tsv", f"sentence1,sentence2,score\n{rows}")
    with pytest.raises(UserError, match=rf"a.tsv: column 'score' holds numbers from .* add --min_label {least}"):
        understand(file)
    found, understood = understand(file, min_label=float(least))
    kept = [i for i, number in enumerate(numbers) if float(number) >= float(least)]
    assert found == {f"q{i}": ([f"a{i}"], []) for i in kept}
    assert dict(understood.lost) == {f"'score' below {least}": len(numbers) - len(kept)}
    assert len(understand(file, min_label=float(numbers[0]))[0]) == 3


# --- columns --------------------------------------------------------------------------------------------------------

SQUAD = {
    "data": [
        {
            "title": "图书馆",
            "paragraphs": [
                {
                    "context": "图书馆九点关门。",
                    "qas": [
                        {"question": "几点关门", "answers": [{"text": "九点", "answer_start": 3}]},
                        {"question": "谁是馆长", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ]
}
CMRC = [{"context_text": "图书馆九点关门。", "qas": [{"query_text": "几点关门", "answers": ["九点"]}]}]
SHAREGPT = [
    {
        "conversations": [
            {"from": "system", "value": "你是馆员"},
            {"from": "human", "value": "几点关门"},
            {"from": "gpt", "value": "九点。"},
            {"from": "human", "value": "周末呢"},
            {"from": "gpt", "value": "也是。"},
        ]
    }
]
MESSAGES = {"messages": [{"role": "user", "content": "几点关门"}, {"role": "assistant", "content": "九点。"}]}
UNDERSTOOD = {
    "empty question, full title": (
        "a.csv",
        "title,question,reply\n医保卡丢了,,补办\n生育津贴,何时到账,三十天\n",
        {"医保卡丢了": ["补办"], "何时到账": ["三十天"]},
        "",
    ),
    "a question column of ids": (
        "a.csv",
        "question,title,positive,回答,Negative\n11,几点关门,[4],九点,\"[8, 9]\"\n",
        {"几点关门": ["九点"]},
        "",
    ),
    "instruction and input": (
        "a.json",
        [{"instruction": "判断情感", "input": "真开心", "output": "正"}, {"instruction": "首都", "input": "", "output": "北京"}],
        {"判断情感 真开心": ["正"], "首都": ["北京"]},
        "",
    ),
    "similar questions": (
        "a.csv",
        '标准问题,相似问,相似问2,答案\n怎么办证,在哪办||要带什么##几楼,"代办吗;\n收费吗",带身份证\n关门,；,,九点\n',
        {q: ["带身份证"] for q in ("怎么办证", "在哪办", "要带什么", "几楼", "代办吗", "收费吗")} | {"关门": ["九点"]},
        "",
    ),
    "similar questions, a list": (
        "a.json",
        [{"question": "a", "similar_questions": ["b", "c"], "answer": "d"}],
        {"a": ["d"], "b": ["d"], "c": ["d"]},
        "",
    ),
    "switched off": (
        "a.csv",
        "问题,答案,是否停用,是否启用,状态\nq1,a,否,是,正常\nq2,a,是,是,正常\nq3,a,否,否,正常\nq4,a,否,是,已下线\nq5,a,,,审核中\n",
        {"q1": ["a"], "q5": ["a"]},
        "",
    ),
    "a header that comes again": ("a.csv", "问题,答案\nq1,a\n问题,答案\nq2,a\n", {"q1": ["a"], "q2": ["a"]}, ""),
    "titles above the header": (
        "a.csv",
        "某馆常见问题,,\n更新：五月\n\n序号,问题,答案\n1,q1,a\n",
        {"q1": ["a"]},
        "2 lines above the header passed over, as '某馆常见问题'",
    ),
    "a table with tabs whose quotes are texts": (
        "a.tsv",
        '问题\t答案\n"开户"怎么办\t"带证件"来\n"q2"\ta\n',
        {'"开户"怎么办': ['"带证件"来'], '"q2"': ["a"]},
        "its quotes are part of the texts",
    ),
    "SQuAD": ("a.json", SQUAD, {"几点关门": ["图书馆九点关门。"]}, "SQuAD or CMRC layout"),
    "CMRC": ("a.json", CMRC, {"几点关门": ["图书馆九点关门。"]}, "SQuAD or CMRC layout"),
    "ShareGPT": ("a.json", SHAREGPT, {"几点关门": ["九点。"]}, "conversations: the first question"),
    "messages": ("a.jsonl", MESSAGES, {"几点关门": ["九点。"]}, "conversations: the first question"),
    "preferred replies": (
        "a.jsonl",
        {"conversations": SHAREGPT[0]["conversations"][:2], "chosen": "九点。", "rejected": "不知道"},
        {"几点关门": ["九点。"]},
        "conversations: the first question",
    ),
    "a list under another name": ("a.json", {"RECORDS": [{"q": "q1", "a": "b"}]}, {"q1": ["b"]}, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_what_is_understood(case: str, tmp_path: Path) -> None:
    name, content, expected, note = UNDERSTOOD[case]
    found, understood = understand(write(tmp_path / name, content))
    assert found == {question: (answers, []) for question, answers in expected.items()}
    assert [note in one for one in understood.notes] == [True] * bool(note)


@pytest.mark.parametrize("write_as", ["tsv", "xlsx"])
def test_a_file_without_a_header_line(write_as: str, tmp_path: Path) -> None:
    rows = [["几点关门？", "何时关门？", "1"], ["几点关门？", "几点开门？", "0"], ["在哪还书", "哪里还书", "1"]]
    file = tmp_path / f"a.{write_as}"
    if write_as == "xlsx":
        workbook(file, 一=rows)
    else:
        write(file, "".join("\t".join(row) + "\n" for row in rows))
    with pytest.raises(
        UserError, match=r"has no header line; the first row is '几点关门？'.*--query_field 1 --answer_field 2"
    ):
        understand(file)
    found, understood = understand(file, query_field="1", answer_field="2")
    assert found == {"几点关门？": (["何时关门？"], ["几点开门？"]), "在哪还书": (["哪里还书"], [])}, "the label counts"
    assert understood.notes == ["has no header line; its first row was read"]


def test_positions_pass_over_a_header_that_is_there(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "序号,问题,答案\n1,q1,a1\n")
    assert understand(file, query_field="3", answer_field="2")[0] == {"a1": (["q1"], [])}


# --- workbooks ------------------------------------------------------------------------------------------------------


def test_merged_cells_fill_their_rows(tmp_path: Path) -> None:
    rows = [
        ["某馆问答", None, None],
        ["分类", "问题", "答案"],
        ["办证", "q1", "a1"],
        [None, "q2", None],
        [None, None, "a2"],
    ]
    book = workbook(tmp_path / "a.xlsx", 问答=[*rows, ["一、其他", None, None], [None, "q3", "a3"]])
    for area in ("A1:C1", "A3:A5", "B4:B5", "C3:C4", "A6:C6"):
        book["问答"].merge_cells(area)
    book.save(tmp_path / "a.xlsx")
    found, understood = understand(tmp_path / "a.xlsx")
    assert found == {"q1": (["a1"], []), "q2": (["a1", "a2"], []), "q3": (["a3"], [])}
    assert understood.notes == ["1 line above the header passed over, as '某馆问答'"]
    assert dict(understood.lost) == {"no question": 1}, "what is merged sideways is a title"


@pytest.mark.parametrize(
    ("name", "magic"), [("a.xls", b""), ("a.ods", b""), ("a.xlsx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1")]
)
def test_other_workbooks_are_refused(
    name: str, magic: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(magic)
    assert prepare.main(["--input_dir", str(tmp_path / name), "--output_dir", str(tmp_path / "out")]) == 2
    assert "save it as .xlsx" in capsys.readouterr().err


# --- HTML -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("<p>请&nbsp;先<b>登录</b></p><p>再办理</p>", "请 先登录 再办理"),
        ('<a href="x">这里</a><br/>a &lt; b<script>var x = "<p>";</script>', "这里 a < b"),
        ("若 a < b 且 c > d，R&D;", "若 a < b 且 c > d，R&D;"),
    ],
)
def test_strip_html(cell: str, text: str, tmp_path: Path) -> None:
    assert " ".join(strip_html(cell).split()) == text
    file = write(tmp_path / "a.json", [{"q": "q1", "a": cell}, {"q": "q2", "a": [cell]}])
    assert understand(file, strip_html=True)[0] == {"q1": ([text], []), "q2": ([text], [])}
    assert understand(file)[1].html == 2 * ("&nbsp;" in cell or "<br/>" in cell)


# --- what is said ---------------------------------------------------------------------------------------------------


def said(run: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert run() == 0
    return capsys.readouterr().err.splitlines()


def test_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "q1,a1,n1,1,x,是\nq2,<p>a2</p>,,1,x,是\nq1,a3,,0,x,是\nq3,,,1,x,是\nq4,a4,,1,x,否\n"
    file = write(tmp_path / "a.csv", f"问题,答案,负例,label,分类,是否有效\n{rows}")
    output = tmp_path / "out"
    lines = said(lambda: prepare.main(["--input_dir", str(file), "--output_dir", str(output)]), capsys)
    assert lines == [
        f"{file}: 5 rows, 2 kept, 1 as negatives, 2 lost (no answer: 1, '是否有效' is 否: 1)",
        "  question   问题",
        "  answer     答案",
        "  negatives  负例",
        "  label      label (yes: pair, no: negative)",
        "  in use     是否有效",
        "  not taken  分类",
        "  sample     q1 | a1 | n1",
        "  HTML       in 1 row, as '<p>a2</p>'; --strip_html cleans it",
        f"warning: more than a tenth of the rows is lost: {file} 2 of 5 (no answer: 1, '是否有效' is 否: 1)",
    ]
    (entry,) = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["inputs"]
    assert entry["columns"]["not taken"] == ["分类"] and entry["sample"]["question"] == "q1"
    assert (entry["rows"], entry["rows_kept"], entry["rows_negative"]) == (5, 2, 1)
    assert entry["rows_lost"] == {"no answer": 1, "'是否有效' is 否": 1}


def test_many_files_of_one_layout_are_one_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / ".ipynb_checkpoints" / "000.csv", "问题,答案\nhidden,h\n")
    for i in range(100):
        write(tmp_path / f"{i:03}.csv", f"问题,答案\nq{i},a{i}\n" + "p,\n" * (i < 7))
    write(tmp_path / "b.jsonl", {"query": "x", "pos": ["y", "z"]})
    lines = said(lambda: prepare.main(["--input_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]), capsys)
    assert "  answer     pos (2.0 texts a row)" in lines
    assert len(lines) == 9 and lines[0].startswith(f"100 files, as {tmp_path / '000.csv'}: 107 rows, 100 kept, 7 lost")
    assert lines[-1].count("1 of 2 (no answer: 1)") == 5 and lines[-1].endswith("and 2 more files")


def test_a_flag_that_nothing_needs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--min_label 4: no file has a column of scores"):
        understand(write(tmp_path / "a.csv", "问题,答案\nq,a\n"), min_label=4)


def test_a_beir_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "corpus.jsonl", {"_id": "1", "title": "t", "text": "x"})
    write(tmp_path / "queries.jsonl", {"_id": "1", "text": "x"})
    assert prepare.main(["--input_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 2
    assert f"is a BEIR folder, a test set: evaluate.py --val_data {tmp_path}" in capsys.readouterr().err
