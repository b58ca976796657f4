"""Test sets in each form, by hand; TREC runs against pytrec_eval (trec_eval's own code); what is refused, and how."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
import pytrec_eval
from pyarrow import parquet

from bge_core import UserError
from bge_core.evaluation import tasks
from bge_core.evaluation.tasks import (
    RetrievalTask,
    describe_task,
    evaluation_command,
    load_task,
    load_tasks,
    make_unique,
)
from bge_core.evaluation.trec import read_qrels, read_run, run_as_ranking, run_name

Row = dict[str, Any]
HEADER = "query-id\tcorpus-id\tscore\n"


def write(file: Path, content: str | list[Row]) -> Path:
    """A file of text, or of JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    file.write_text(content, encoding="utf-8")
    return file


CORPUS = [
    {"_id": "d1", "title": "", "text": "丹"},
    {"_id": "d2", "title": "题", "text": "二 "},
    {"_id": "d3", "text": " 三"},
    {"_id": "d4", "title": None, "text": "丹 "},  # the text of d1
    {"_id": "d5", "title": "只有题", "text": ""},
]
QUERIES = [{"_id": "q1", "text": "甲"}, {"_id": "q2", "text": "乙"}, {"_id": "q3", "text": "甲"}]


def beir(folder: Path, *qrels: str, corpus: list[Row] | None = None, queries: list[Row] | None = None) -> Path:
    """A BEIR folder with test.tsv of these lines, their columns set apart by spaces here."""
    write(folder / "corpus.jsonl", CORPUS if corpus is None else corpus)
    write(folder / "queries.jsonl", QUERIES if queries is None else queries)
    write(folder / "qrels" / "test.tsv", HEADER + "".join("\t".join(line.split()) + "\n" for line in qrels))
    return folder


# ---------------------------------------------------------------------------------------------------------------- rows

ROWS: list[Row] = [
    {"query": "甲", "pos": ["丹", "二"], "neg": ["三"]},
    {"query": "乙", "pos": ["三", " 三 "], "id": "b", "source": "书", "answer": "三"},
    {"query": "甲", "pos": ["丹"], "dataset": "网", "answer": ["丹", "砂"], "other": 1},
]
FACTS = [{}, {"source": "书", "answer": "三"}, {"source": "网", "answer": ["丹", "砂"]}]


def test_rows_search_their_own_texts(tmp_path: Path) -> None:
    file = write(tmp_path / "faq.v2.jsonl", ROWS)
    assert load_task(file) == RetrievalTask(
        name="faq.v2", query_ids=["0", "b"], queries=["甲", "乙"], corpus_ids=["0", "1", "2"],
        corpus=["丹", "二", "三"], relevant=[{0: 1, 1: 1}, {2: 1}], missing=[[], []], missing_texts=[],
        query_facts=FACTS[:2],
    )  # fmt: skip


def test_parquet_and_the_hub_give_what_json_lines_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = {"neg": None, "source": None, "dataset": None}  # a table has each column in each row
    rows = [{"id": str(i)} | none | row | {"answer": ["丹"] * i} for i, row in enumerate(ROWS)]
    want = load_task(write(tmp_path / "a.jsonl", rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **more: asked.append((names, more)) or iter(rows))
    monkeypatch.chdir(tmp_path)
    hub = load_task("org/faq-v1.5:zh:test")
    assert load_task(tmp_path / "a.parquet") == want == replace(hub, name="a")
    assert hub.name == "faq-v1.5-zh-test"
    assert asked == [(("org/faq-v1.5", "zh"), {"split": "test", "streaming": False})]  # kept for when there is no net


def test_rows_in_a_corpus(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    passages = [{"text": "丹"}, {"id": "x", "text": "二", "title": "题"}, {"text": " 丹 "}, {"text": "", "title": "四"}]
    corpus = write(tmp_path / "c" / "corpus.jsonl", passages)
    rows = [
        {"query": "甲", "pos": [" 丹", "题 二"]},
        {"query": "", "pos": ["无", "丹", " 无", "也无"]},
        {"query": "丙", "pos": ["无"]},
    ]
    val = write(tmp_path / "v.jsonl", rows)
    task = load_task(val, corpus)
    assert (task.corpus_ids, task.corpus) == (["0", "x", "3"], ["丹", "题 二", "四"])
    assert task.relevant == [{0: 1, 1: 1}, {0: 1}, {}] and task.missing == [[], [1, 1], [1]]
    assert task.missing_texts == ["无", "也无"]
    assert f"{corpus}: 1 repeated texts were left out" in caplog.text
    assert f"{corpus} lacks 2 positives of {val}, which count as misses; first:\n  无\n  也无" in caplog.text
    assert f"{val}: 1 questions are empty" in caplog.text
    assert load_task(val, tmp_path / "c") == task  # a folder's corpus.jsonl


def test_no_more_than_three_missing_positives_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = write(tmp_path / "c.jsonl", [{"text": "丹"}])
    load_task(write(tmp_path / "v.jsonl", [{"query": "甲", "pos": ["丹", *(f"缺{i}" for i in range(5))]}]), corpus)
    assert "lacks 5 positives" in caplog.text and "缺2" in caplog.text and "缺3" not in caplog.text


def test_rows_that_ask_the_same_are_one_question(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without ids of their own; under another prompt something else is asked."""
    rows = [
        {"query": "甲", "pos": ["丹"]}, {"query": "乙", "pos": ["三"]}, {"query": " 甲 ", "pos": ["二", "丹"], "neg": ["四"]},
        {"query": "甲", "pos": ["三"], "prompt": "指："}, {"query": "甲", "pos": ["四"], "id": "x"},
    ]  # fmt: skip
    with caplog.at_level("INFO"):
        task = load_task(write(tmp_path / "v.jsonl", rows))
    assert (task.query_ids, task.queries) == (["0", "1", "3", "x"], ["甲", "乙", "甲", "甲"])
    assert task.corpus == ["丹", "三", "二", "四"] and task.relevant == [{0: 1, 2: 1}, {1: 1}, {1: 1}, {3: 1}]
    assert task.query_prompts == [None, None, "指：", None]
    assert "v.jsonl: 1 rows ask again what another row asks; they are one question" in caplog.text
    assert "v.jsonl: 1 questions are asked again under another id; they stay apart" in caplog.text
    assert "v: 1 questions have a prompt, which replaces the query instruction" in caplog.text


def test_a_question_that_the_corpus_holds_is_no_hit(tmp_path: Path) -> None:
    passages = [
        {"text": "甲"},
        {"text": "丹"},
        {"text": "乙", "title": "题"},
        {"text": "丙"},
        {"text": "", "title": "丁"},
    ]
    rows = [{"query": query, "pos": ["丹"]} for query in (" 甲", "乙", "题 乙", "戊", "")]
    rows.append({"query": "丙", "pos": ["丙", "丹"]})  # judged right
    corpus = write(tmp_path / "c.jsonl", passages)
    assert load_task(write(tmp_path / "v.jsonl", rows), corpus).own_rows == [0, 2, 2, -1, -1, -1]
    lines = ("q1 d1 1", "q2 d1 1", "q3 d3 1")
    queries = [{"_id": f"q{i}", "text": text} for i, text in enumerate("二三三", start=1)]
    assert load_task(beir(tmp_path / "b", *lines, queries=queries)).own_rows == [1, 2, -1]


def test_a_positive_is_found_without_the_title(tmp_path: Path) -> None:
    passages = [
        {"text": "二", "title": "甲"},
        {"text": "二", "title": "乙"},
        {"text": "丹", "title": "丙"},
        {"text": "丹"},
    ]
    corpus = write(tmp_path / "c.jsonl", passages)
    task = load_task(
        write(tmp_path / "v.jsonl", [{"query": "问", "pos": ["二"]}, {"query": "答", "pos": ["丹"]}]), corpus
    )
    assert task.relevant == [{0: 1, 1: 1}, {3: 1}] and task.missing == [[], []]  # of a text alone the text alone


def test_a_corpus_without_any_positive_is_refused(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c.jsonl", [{"text": "丹砂"}])
    val = write(tmp_path / "v.jsonl", [{"query": "甲", "pos": ["丹", "二"]}])
    with pytest.raises(
        UserError, match=r"c.jsonl: holds none of the 2 positives of .*v.jsonl, as '丹': name the corpus that"
    ):
        load_task(val, corpus)
    with pytest.raises(UserError, match=r"corpus.jsonl: holds none of the 1 positives of .*test.tsv, as 'd9'"):
        load_task(beir(tmp_path / "b", "q1 d9 1", "q1 d1 0"))


# ---------------------------------------------------------------------------------------------------------------- BEIR


def test_a_beir_folder_by_hand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = beir(
        tmp_path / "sci", "q3 d4 3", "q3 d1 1", "q3 d2 0", "q3 d3 -1", "q1 d9 2", "q1 d5 1", "q1 d8 0", "q1 d7 1", "q0 d1 1",
        queries=[QUERIES[2] | {"source": "书", "metadata": {}}, *QUERIES[:2]],
    )  # fmt: skip
    task = load_task(folder)
    assert task == RetrievalTask(
        name="sci", query_ids=["q3", "q1"], queries=["甲", "甲"],  # q2 is not judged
        corpus_ids=["d1", "d2", "d3", "d5", "d4"], corpus=["丹", "题 二", "三", "只有题", "丹"],
        relevant=[{4: 3, 0: 1, 1: 0, 2: 0}, {3: 1}], missing=[[], [2, 1]], missing_texts=["d9", "d7"],
        query_facts=[{"source": "书"}, {}],
    )  # fmt: skip
    qrels, corpus = folder / "qrels" / "test.tsv", folder / "corpus.jsonl"
    assert f"{corpus} lacks 2 positives of {qrels}, which count as misses; first:\n  d9\n  d7" in caplog.text
    assert f"{qrels} judges 1 questions that {folder / 'queries.jsonl'} lacks; they are left out, as q0" in caplog.text
    assert f"{corpus}: 1 repeated texts" in caplog.text


def test_a_question_that_the_corpus_holds_under_its_own_id_is_no_hit(tmp_path: Path) -> None:
    corpus = [
        {"_id": "a", "title": "题", "text": "甲说"}, {"_id": "b", "text": "别的"}, {"_id": "c", "text": "丙说"},
        {"_id": "d", "text": "丁"},
    ]  # fmt: skip
    queries = [{"_id": name, "text": text} for name, text in (("a", "甲说"), ("b", "乙说"), ("c", "丙说"), ("x", "丁"))]
    lines = ["a d 1", "a a 0", "b d 1", "c c 1", "x d 1"]  # b: equal ids by chance; c: judged right; x: another id
    task = load_task(beir(tmp_path, *lines, corpus=corpus, queries=queries))
    assert task.own_rows == [0, -1, -1, -1] and task.depth(2) == 3 and task.depth(9) == 5
    rows = np.array([[0, 3, 1], [0, 3, 1], [2, 3, 1], [3, 1, 0]])
    scores, kept = task.drop_own(rows / 2, rows)
    assert kept.tolist() == [[3, 1], [0, 3], [2, 3], [3, 1]] and (scores == kept / 2).all()
    assert load_task(beir(tmp_path / "none", *lines[2:], corpus=corpus, queries=queries)).own_rows == []
    part = [
        {"_id": "a", "text": "甲"},
        {"_id": "b", "text": " "},
        {"_id": "d", "text": "丁 "},
    ]  # in it; empty; the same
    assert load_task(beir(tmp_path / "part", "a d 1", "b d 1", "d a 1", corpus=corpus, queries=part)).own_rows == [
        -1,
        -1,
        3,
    ]


@pytest.mark.parametrize("lines", [("q1 d1 0", "q1 d4 3"), ("q1 d4 3", "q1 d1 0"), ("q1 d4 3", "q2 d1 1")])
def test_of_equal_texts_the_one_judged_right_is_found(tmp_path: Path, lines: tuple[str, str]) -> None:
    task = load_task(beir(tmp_path, *lines))
    assert task.relevant[0] == {0: 3} and task.corpus_ids[0] == "d1" and task.judged_ids[0] == {0: "d4"}


def test_questions_without_a_positive_are_not_judged(tmp_path: Path) -> None:
    task = load_task(beir(tmp_path, "q1 d1 1", "q2 d1 0", "q3 d9 1"))
    assert task.relevant == [{0: 1}, {0: 0}, {}] and task.missing == [[], [], [1]]


def test_a_beir_folder_and_equal_rows_are_one_task(tmp_path: Path) -> None:
    folder = beir(
        tmp_path / "set",
        "q1 d1 1",
        "q1 d2 1",
        "q3 d4 1",
        "q2 d3 1",
        queries=[row | {"source": "书"} for row in QUERIES],
    )
    of = {"q1": ["丹", "题 二"], "q2": ["三"], "q3": ["丹"]}
    rows = [{"id": row["_id"], "query": row["text"], "pos": of[row["_id"]], "source": "书"} for row in QUERIES]
    passages = [{"id": "d1", "text": "丹"}, {"id": "d2", "title": "题", "text": "二"}, {"id": "d3", "text": "三"}]
    passages += [{"id": "d4", "text": "丹"}, {"id": "d5", "text": "只有题"}]
    want = load_task(write(tmp_path / "set.jsonl", rows), write(tmp_path / "c.jsonl", passages))
    assert load_task(folder) == replace(want, judged_ids=[{}, {}, {0: "d4"}])
    assert load_task(tmp_path / "set.jsonl", folder) == want  # rows in BEIR's corpus: by their text
    assert load_task(folder, tmp_path / "c.jsonl") == load_task(folder)


def test_ids_may_be_numbers_and_texts_empty(tmp_path: Path) -> None:
    folder = beir(
        tmp_path, "1 7 1", corpus=[{"_id": 7, "text": "丹"}, {"_id": 8, "text": ""}], queries=[{"_id": 1, "text": "甲"}]
    )
    task = load_task(folder)
    assert (task.query_ids, task.corpus_ids, task.relevant) == (["1"], ["7", "8"], [{0: 1}])


def test_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = beir(tmp_path / "sci", "q1 d1 1")
    dev = write(folder / "qrels" / "dev.tsv", HEADER + "q2\td2\t1\n")
    assert (load_task(folder).name, load_task(folder).query_ids) == ("sci", ["q1"])
    assert (load_task(dev).name, load_task(dev).query_ids) == ("sci-dev", ["q2"])
    (folder / "qrels" / "test.tsv").unlink()
    assert load_task(folder).query_ids == ["q2"]  # the only one
    monkeypatch.chdir(folder)
    assert load_task(".").name == "sci"
    monkeypatch.chdir(folder / "qrels")
    assert load_task("../qrels/dev.tsv").name == "sci-dev"
    write(folder / "qrels" / "train.tsv", HEADER + "q2\td2\t1\n")
    with pytest.raises(UserError, match=r"qrels: holds no test.tsv, but dev.tsv, train.tsv; name one, as .*dev.tsv"):
        load_task(folder)


# --------------------------------------------------------------------------------------------------------- several sets


def test_several_sets_and_their_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = write(tmp_path / "1" / "faq.jsonl", ROWS), write(tmp_path / "2" / "faq.jsonl", ROWS[:1])
    folder = beir(tmp_path / "faq", "q1 d1 1")
    small, large = (
        write(tmp_path / f"{n}.jsonl", [{"id": f"d{i}", "text": f"文{i}" if i else "丹"} for i in range(n)])
        for n in (2, 9)
    )
    sets = [one, two, folder]
    assert [task.name for task in load_tasks(sets)] == ["faq", "faq-2", "faq-3"]
    assert [len(task.corpus) for task in load_tasks(sets)] == [3, 3, 4]
    assert [len(task.corpus) for task in load_tasks(sets, [small, large, small])] == [2, 9, 2]
    read = []
    original = tasks.read_corpus
    monkeypatch.setattr(tasks, "read_corpus", lambda *args: read.append(args) or original(*args))
    shared = load_tasks(sets, [large])
    assert [len(task.corpus) for task in shared] == [9, 9, 9] and len(read) == 1
    assert shared[0].corpus is shared[2].corpus
    assert load_tasks([]) == []
    with pytest.raises(UserError, match="2 corpora for 3 test sets: name one for all, one for each \\(a folder"):
        load_tasks(sets, [small, large])


def test_one_set_in_several_files(tmp_path: Path) -> None:
    """Or in a folder of them. Ids that are not given go on through the files."""
    files = [
        write(tmp_path / "c/a.jsonl", [{"text": "丹"}, {"text": "二"}]),
        write(tmp_path / "c/b.jsonl", [{"text": "三"}, {"text": "丹"}, {"text": "四", "id": "x"}]),
    ]
    val = write(tmp_path / "v.jsonl", ROWS)
    task = load_task(val, files)
    assert (task.corpus_ids, task.corpus) == (["0", "1", "2", "x"], ["丹", "二", "三", "四"])
    assert load_task(val, tmp_path / "c") == load_tasks([val], [tmp_path / "c"])[0] == task
    assert [entry["path"] for entry in describe_task(task, val, files)] == [str(val), *map(str, files)]
    assert [len(entry.get("files", [])) for entry in describe_task(task, val, tmp_path / "c")] == [0, 2]
    write(files[0], [{"text": "丹", "id": "x"}])
    with pytest.raises(UserError, match=r"b.jsonl:3: the id 'x' is that of .*a.jsonl:1, too; make ids unique"):
        load_task(val, files)


def test_later_equal_names_get_numbers_that_are_free() -> None:
    assert make_unique(["m", "m-2", "m", "m", "n"]) == ["m", "m-2", "m-3", "m-4", "n"]


def test_a_manifest_names_all_files(tmp_path: Path) -> None:
    folder, rows = beir(tmp_path / "sci", "q1 d1 1", "q1 d2 0", "q1 d9 1"), write(tmp_path / "v.jsonl", ROWS)
    corpus = write(tmp_path / "c.jsonl", [{"id": "d1", "text": "丹"}])
    of_folder = [(folder / "queries.jsonl", 1), (folder / "qrels" / "test.tsv", 3)]
    for val, given, want in (
        (rows, None, [(rows, 2)]),
        (rows, corpus, [(rows, 2), (corpus, 1)]),
        (rows, folder, [(rows, 2), (folder / "corpus.jsonl", 4)]),
        (folder, None, [*of_folder, (folder / "corpus.jsonl", 4)]),
        (folder / "qrels" / "test.tsv", None, [*of_folder, (folder / "corpus.jsonl", 4)]),
    ):
        entries = describe_task(load_task(val, given), val, given)
        assert [(entry["path"], entry["rows"]) for entry in entries] == [(str(file), num) for file, num in want]
        assert all(len(entry["sha256"]) == 64 for entry in entries)


def test_the_next_command_names_the_files_that_were_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def command(*runs: Row) -> str:
        return evaluation_command(["base", "my run"], *runs).removeprefix("python evaluate.py --encoder base 'my run' ")

    rest = "--add_instruction --output_dir outputs/report"
    mined = {"train_data": ["data/mined.jsonl", "org/name"], "val_data": None}
    assert command(mined) == f"--val_data TEST.jsonl {rest}  # name your test set for TEST.jsonl"
    write(tmp_path / "data/test.jsonl", ROWS)
    assert command(mined) == f"--val_data data/test.jsonl {rest}"
    write(tmp_path / "data/corpus.jsonl", CORPUS)
    assert command({}, mined) == f"--val_data data/test.jsonl --corpus data/corpus.jsonl {rest}"
    write(tmp_path / "v.jsonl", ROWS)
    assert command({"val_data": "gone.jsonl"}, mined | {"val_data": "v.jsonl"}) == f"--val_data v.jsonl {rest}"
    trained = {"val_data": "v.jsonl", "val_corpus": "data"}
    write(tmp_path / "outputs/report/x", "")
    assert command(trained) == f"--val_data v.jsonl --corpus data {rest}-2"
    assert command({"val_data": "org/v:test", "corpus": None}) == f"--val_data org/v:test {rest}-2"


# -------------------------------------------------------------------------------------------------------------- refusals

NO_FOLDER = "f: lacks queries.jsonl or qrels/*.tsv of a BEIR folder; if you mean a file, name it"
BAD_SETS: list[tuple[Callable[[Path], Path], list[str]]] = [
    # rows
    (lambda at: write(at / "v.jsonl", []), ["v.jsonl: holds no row"]),
    (lambda at: at / "none.jsonl", ["none.jsonl: no such file"]),
    (lambda at: write(at / "v.jsonl", '{"query": "甲", "pos": ["丹"]}\n{"query": '), ["v.jsonl:2: not JSON", "one object a line"]),
    (lambda at: write(at / "v.jsonl", [ROWS[0], {"query": "甲", "pos": "丹"}]), ["v.jsonl:2: field 'pos'", 'as ["丹"]']),
    (lambda at: write(at / "v.jsonl", [{"id": "b"} | ROWS[0], ROWS[1]]), ["v.jsonl:2: the id 'b' is that of line 1, too; make ids unique, or leave them out"]),
    (lambda at: write(at / "v.jsonl", [{"id": "1"} | ROWS[0], ROWS[0]]), ["v.jsonl:2: the id '1' is that of line 1, too"]),
    (lambda at: write(at / "v.tsv", HEADER), ["v.tsv: is a table"]),
    # folders
    (lambda at: write(at / "f" / "test.jsonl", ROWS).parent, [NO_FOLDER]),
    (lambda at: write(at / "f" / "queries.jsonl", QUERIES).parent, [NO_FOLDER]),
    (lambda at: beir(at / "f", "q1 d1 1", corpus=[]), ["corpus.jsonl: holds no row"]),
    (lambda at: beir(at / "f", "q1 d1 1", queries=[]), ["queries.jsonl: holds no row"]),
    (lambda at: beir(at / "f", "q1 d1 1") / "qrels" / "dev.tsv", ["dev.tsv: cannot be read: No such file or directory"]),
    (lambda at: beir(at / "f", "q1 d1 1", corpus=[*CORPUS, CORPUS[0]]), ["corpus.jsonl:6: the id 'd1' is that of line 1, too; make ids unique"]),
    (lambda at: beir(at / "f", "q1 d1 1", queries=[*QUERIES, QUERIES[1]]), ["queries.jsonl:4: the id 'q2' is that of line 2, too; make ids unique"]),
    (lambda at: beir(at / "f", "q1 d1 1", corpus=[CORPUS[0], {"id": "d2", "text": "二"}]), ["corpus.jsonl:2: field '_id' is missing; add it"]),
    (lambda at: beir(at / "f", "q1 d1 1", corpus=[CORPUS[0], {"_id": "", "text": "二"}]), ["corpus.jsonl:2: field '_id' is empty"]),
    (lambda at: beir(at / "f", "q1 d1 1", corpus=[{"_id": "d1", "text": None}]), ["corpus.jsonl:1: field 'text' is null; it must be a string"]),
    (lambda at: beir(at / "f", "q1 d1 1", corpus=[{"_id": "d1", "text": "丹", "title": 3}]), ["corpus.jsonl:1: field 'title' is 3; it must be a string"]),
    (lambda at: beir(at / "f", "q1 d1 1", queries=[{"_id": "q1"}]), ["queries.jsonl:1: field 'text' is missing; add it"]),
    (lambda at: write(beir(at / "f", "q1 d1 1") / "corpus.jsonl", '{"_id": "d1", "text": "丹"}\n{"_id"').parent, ["corpus.jsonl:2: not JSON"]),
    # qrels
    (lambda at: beir(at / "f"), ["test.tsv: holds no line; write 3 columns"]),
    (lambda at: beir(at / "f", "q1 d1 0", "q2 d1 -1"), ["test.tsv: no question has a positive, that is a score above 0"]),
    (lambda at: beir(at / "f", "q8 d1 1", "q9 d1 1"), ["test.tsv: judges 2 questions (column query-id), none of", "queries.jsonl: qrels of another test set"]),
    (lambda at: beir(at / "f", "q1 7 1", "q2 8 0"), ["test.tsv: none of its 2 documents (column corpus-id) is in", "corpus.jsonl: these are qrels of another corpus"]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD_SETS)))
def test_bad_test_sets(tmp_path: Path, number: int) -> None:
    make, words = BAD_SETS[number]
    with pytest.raises(UserError) as caught:
        load_task(make(tmp_path))
    assert all(word in str(caught.value) for word in words), caught.value


def test_bad_corpora(tmp_path: Path) -> None:
    val, folder = write(tmp_path / "v.jsonl", ROWS), beir(tmp_path / "set", "q1 d1 1")
    for content, words in (
        ([], "c.jsonl: holds no row"),
        ([{"text": "丹"}, {"text": 3}], "c.jsonl:2: field 'text' is 3"),
        ([{"text": "丹"}, {"text": ""}], "c.jsonl:2: field 'text' is empty"),
        (
            [{"id": 1, "text": "丹"}, {"id": "1", "text": "二"}],
            "c.jsonl:2: the id '1' is that of line 1, too; make ids unique, or leave them out",
        ),
    ):
        for path in (val, folder):
            with pytest.raises(UserError, match=words):
                load_task(path, write(tmp_path / "c.jsonl", content))
    with pytest.raises(UserError, match=r"test.tsv: none of its 1 documents \(column corpus-id\) is in .*c.jsonl"):
        load_task(folder, write(tmp_path / "c.jsonl", [{"text": "丹"}]))


# ------------------------------------------------------------------------------------------------------------------ TREC


@pytest.mark.parametrize(
    "content",
    [
        "q1 0 d1 2\nq2 0 d1 0\nq1 0 d2 -1\n",
        "q1\t0\td1\t2\n\nq2 Q0 d1 0\r\nq1  0 d2 -1",
        "\ufeff" + HEADER + "q1\td1\t2\nq2\td1\t0\r\n\nq1\td2\t-1",
        "query-id corpus-id score\nq1 d1 2\nq1 d1 2\nq2 d1 0\nq1 d2 -1\n",  # the same twice is no harm
    ],
)
def test_qrels(tmp_path: Path, content: str) -> None:
    assert read_qrels(write(tmp_path / "q", content)) == {"q1": {"d1": 2, "d2": -1}, "q2": {"d1": 0}}


def test_ids_between_tabs_may_hold_spaces(tmp_path: Path) -> None:
    assert read_qrels(write(tmp_path / "q", HEADER + "q 1\td 1\t1\n")) == {"q 1": {"d 1": 1}}


BAD_QRELS = [
    ("q1\td1\t1\n", ["q:1: has 3 columns", "'q1\\td1\\t1'", "write 4: question 0 document grade; or begin with the header query-id, corpus-id, score"]),
    (HEADER + "q1\td1\n", ["q:2: has 2 columns ('q1\\td1'); write 3"]),
    (HEADER + "q1\t\t1\n", ["q:2: has 3 columns", "none of them empty"]),
    ("q1 d1\n", ["q:1: has 2 columns"]),
    (HEADER + "q1\td1\t1.0\n", ["q:2: the score is '1.0'; it must be an integer"]),
    ("q1 0 d1 1\nq1 0 d2 yes\n", ["q:2: the score is 'yes'; it must be an integer"]),
    ("q1 0 d1 1\nq1 0 d1 2\n", ["q:2: the score is 2, but 1 on an earlier line; keep one of them"]),
    ("q1 0 d1 1\n" + "q1 0 d1\n" * 12, ["12 bad lines", "q:2: has 3 columns", "q:11:", "... and 2 more"]),
    ("", ["q: holds no line; write 4 columns"]),
    (HEADER + "\n", ["q: holds no line; write 3 columns"]),
]  # fmt: skip
BAD_RUNS = [
    ("q1 Q0 d1 1 0.5\n", ["q:1: has 5 columns ('q1 Q0 d1 1 0.5'); write 6: question Q0 document rank score tag"]),
    ("q1 Q0 d1 1 0.5 my model\n", ["q:1: has 7 columns"]),
    ("q1 Q0 d1 1 0.5 m\nq1 Q0 d2 2 high m\n", ["q:2: the score is 'high'; it must be a finite number"]),
    ("q1 Q0 d1 1 nan m\n", ["q:1: the score is 'nan'"]),
    ("q1 Q0 d1 1 0.5 m\nq2 Q0 d1 1 0.5 m\nq1 Q0 d1 2 0.4 m\n", ["1 bad line", "q:3: question 'q1' has document 'd1' on an earlier line, too; keep one"]),
    ("\n", ["q: holds no line; write 6 columns"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("read", "content", "words"), [(read_qrels, *bad) for bad in BAD_QRELS] + [(read_run, *bad) for bad in BAD_RUNS]
)
def test_bad_trec_files(tmp_path: Path, read: Callable[[Path], Any], content: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read(write(tmp_path / "q", content))
    assert all(word in str(caught.value) for word in words), caught.value


def test_trec_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "gb").write_bytes("q1 0 d1 1\nq1 0 文 1\n".encode("gb18030"))
    for read in (read_qrels, read_run, run_name):
        for path, words in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
            with pytest.raises(UserError, match=f"{path}: cannot be read: {words}.*; name a file"):
                read(path)
        with pytest.raises(UserError, match="gb: not UTF-8"):
            read(tmp_path / "gb")
    with pytest.raises(UserError, match="empty: holds no line"):
        run_name(write(tmp_path / "empty", "\n"))


def test_a_run_is_in_the_order_of_its_scores(tmp_path: Path) -> None:
    lines = [
        "q2 Q0 d1 1 1e-2 m",
        "q1 Q0 d1 1 0.5 m",
        "q1 Q0 d10 2 0.5 m",
        "q1 Q0 d2 3 0.5000000001 m",
        "q1 Q0 d3 9 2 m",
    ]
    run = read_run(write(tmp_path / "r", "\n".join(lines)))
    assert list(run) == ["q2", "q1"] and run_name(tmp_path / "r") == "m"
    assert run["q1"] == [("d3", 2.0), ("d2", 0.5), ("d10", 0.5), ("d1", 0.5)]  # as texts, "d2" is behind "d10"


def test_a_run_as_ranking_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    run = {"q9": [("d9", 1.0)], "q2": [("b", 2.0), ("a", 1.0)], "q1": [("a", 2.0), ("c", 1.0)]}
    qrels = {"q1": {"b": 2, "c": 1, "x": 3, "a": -1, "y": 0}, "q0": {"a": 1}, "q2": {"b": 0}}
    ids, ranked, relevant, missing = run_as_ranking(run, qrels)
    assert ids == ["q1", "q0", "q2"]
    assert [rows.tolist() for rows in ranked] == [[0, 1], [], [2, 0]] and all(rows.dtype == np.int64 for rows in ranked)
    assert relevant == [{2: 2, 1: 1, 0: 0}, {0: 1}, {2: 0}] and missing == [[3], [], []]
    assert "do not judge 1 questions of the run; they are left out; first: q9" in caplog.text
    assert "lacks 1 judged questions, which score 0" in caplog.text
    with pytest.raises(UserError, match="the qrels judge none of the run's 1 questions"):
        run_as_ranking({"q9": run["q9"]}, qrels)
    with pytest.raises(UserError, match="the qrels: no question has a positive"):
        run_as_ranking(run, {"q1": {"a": 0}})


def scores(rows: np.ndarray, grades: dict[int, int], missing: list[int]) -> dict[str, float]:
    """Reciprocal rank, recall and graded nDCG by their definitions."""
    gains = [max(grades.get(row, 0), 0) for row in rows.tolist()]
    right = [rank for rank, gain in enumerate(gains, start=1) if gain]
    positives = sorted([grade for grade in grades.values() if grade > 0] + missing, reverse=True)
    dcg, ideal = (sum(gain / math.log2(i + 2) for i, gain in enumerate(of[:10])) for of in (gains, positives))
    total = len(positives) or 1
    return {
        "recip_rank": 1 / right[0] if right else 0,
        "recall_5": sum(rank <= 5 for rank in right) / total,
        "ndcg_cut_10": dcg / (ideal or 1),
        "map": sum((i + 1) / rank for i, rank in enumerate(right)) / total,
    }


@pytest.mark.parametrize("seed", range(20))
def test_trec_eval_finds_the_same(tmp_path: Path, seed: int) -> None:
    """Runs full of ties, in any order of lines; some ties are none in double precision."""
    rng = np.random.default_rng(seed)
    lines, judged = [], []
    for q in range(8):
        for d in rng.permutation(30)[: rng.integers(1, 30)]:
            score = rng.integers(0, 4) / 4 + rng.integers(0, 3) * 1e-10
            lines.append(f"q{q} Q0 d{d}文 {rng.integers(0, 9)} {float(score)!r} tag")
        for d in rng.permutation(40)[: rng.integers(1, 12)]:
            judged.append(f"q{q + 2} 0 d{d}文 {rng.integers(-1, 4)}")
    run_file = write(tmp_path / "run", "\n".join(line for line in rng.permutation(lines)))
    qrels_file = write(tmp_path / "qrels", "\n".join(judged))
    ids, *parts = run_as_ranking(read_run(run_file), read_qrels(qrels_file))
    with open(run_file, encoding="utf-8") as run, open(qrels_file, encoding="utf-8") as qrels:
        evaluator = pytrec_eval.RelevanceEvaluator(
            pytrec_eval.parse_qrel(qrels), {"recip_rank", "recall.5", "ndcg_cut.10", "map"}
        )
        truth = evaluator.evaluate(pytrec_eval.parse_run(run))
    assert len(ids) == 8 and len(truth) == 6
    for question, *of in zip(ids, *parts, strict=True):
        want = truth.get(question, dict.fromkeys(("recip_rank", "recall_5", "ndcg_cut_10", "map"), 0.0))
        assert scores(*of) == pytest.approx(want, abs=1e-12), question
