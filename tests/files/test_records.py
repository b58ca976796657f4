"""The file formats: every kind of bad line is named with its remedy, and no output is ever half there."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bge_core import UserError
from bge_core.files import atomic, records
from bge_core.files.atomic import (
    atomic_path,
    describe_input,
    make_manifest,
    read_json,
    refuse_foreign_folder,
    refuse_unwritable,
    write_json,
    write_jsonl,
)
from bge_core.files.records import (
    check_corpus_row,
    check_evaluation_row,
    check_training_row,
    distinct_texts,
    read_jsonl,
    read_rows,
)
from bge_core.files.text import normalize_text, text_id

GOOD = b'{"query": "q", "pos": ["a"]}\n'


def check_with_scores(row: records.Row) -> str | None:
    return check_training_row(row, with_scores=True)


def message_of(path: Path, check: Callable[[records.Row], str | None]) -> str:
    with pytest.raises(UserError) as caught:
        list(read_jsonl(path, check))
    return str(caught.value)


# --- what two texts have in common ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("ＡＢＣ１２３", "ABC123"),  # full width and half width
        ("怎么办？（急）", "怎么办?(急)"),
        ("ｶﾀｶﾅ", "カタカナ"),
        ("怎么\u3000办", "怎么 办"),  # ideographic space
        (" 怎么\t\n 办\u00a0", "怎么 办"),
        ("ﬁ①", "fi1"),
    ],
)
def test_texts_that_are_the_same(first: str, second: str) -> None:
    assert normalize_text(first) == normalize_text(second) == second
    assert text_id(first) == text_id(second)


def test_texts_that_differ() -> None:
    texts = ["怎么办", "怎么 办", "怎么办。", "A", "a", "", "国", "國"]
    assert len({text_id(text) for text in texts}) == len(texts)


def test_text_id_is_the_same_everywhere_and_fits_int64() -> None:
    assert text_id("年费是多少") == 3508542199132850661
    assert all(0 <= text_id(str(i)) < 2**63 for i in range(1000))


@given(st.text())
def test_normalize_text_is_idempotent(text: str) -> None:
    once = normalize_text(text)
    assert normalize_text(once) == once
    assert text_id(once) == text_id(text)


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


# --- reading --------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    ("row", "check", "part"),
    [
        ({"id": 1}, check_corpus_row, "field 'text' is missing"),
        ({"text": ""}, check_corpus_row, "field 'text' is empty"),
        ({"text": ["a"]}, check_corpus_row, """field 'text' is ["a"]"""),
        ({"text": "a", "title": 3}, check_corpus_row, "field 'title' is 3"),
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


def test_read_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"名": [1, 2]})
    assert read_json(tmp_path / "a.json") == {"名": [1, 2]}
    assert "名" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "missing.json") is None
    (tmp_path / "a.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.json: not JSON"):
        read_json(tmp_path / "a.json")


# --- writing --------------------------------------------------------------------------------------------------------


def test_atomic_file_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new/folder/a.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("one", encoding="utf-8")
        assert not target.exists() and temporary.parent == target.parent
    assert target.read_text(encoding="utf-8") == "one"
    with atomic_path(target) as temporary:
        temporary.write_text("two", encoding="utf-8")
        assert target.read_text(encoding="utf-8") == "one"
    assert target.read_text(encoding="utf-8") == "two"
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


def test_atomic_folder_replaces_an_earlier_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("one", "two"):
        with atomic_path(target) as temporary:
            (temporary / "sub").mkdir(parents=True)
            (temporary / "sub" / content).touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["model", "model/sub", "model/sub/two"]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("existing", [False, True])
def test_atomic_path_leaves_nothing_on_an_error(folder: bool, existing: bool, tmp_path: Path) -> None:
    target = tmp_path / "target"
    held = target / "file" if folder else target
    if existing:
        held.parent.mkdir(exist_ok=True)
        held.write_text("old", encoding="utf-8")
    before = {str(path) for path in tmp_path.rglob("*")}
    with pytest.raises(KeyboardInterrupt):
        with atomic_path(target) as temporary:
            if folder:
                temporary.mkdir()
            (temporary / "file" if folder else temporary).write_text("half", encoding="utf-8")
            raise KeyboardInterrupt
    assert {str(path) for path in tmp_path.rglob("*")} == before
    assert not existing or held.read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_full_disk_leaves_the_earlier_file(
    folder: bool, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    held = target / "file" if folder else target
    held.parent.mkdir(exist_ok=True)
    held.write_text("old", encoding="utf-8")
    real_replace = os.replace

    def fail(*args: Any) -> None:
        if call == "replace" and ".tmp-" not in str(args[0]):  # moving the earlier folder aside, and back
            return real_replace(*args)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        with atomic_path(target) as temporary:
            if folder:
                temporary.mkdir()
            (temporary / "file" if folder else temporary).write_text("new", encoding="utf-8")
    assert held.read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_failing_row_leaves_no_file(tmp_path: Path) -> None:
    def rows() -> Any:
        yield {"query": "q"}
        raise UserError("bad row")

    with pytest.raises(UserError, match="bad row"):
        write_jsonl(tmp_path / "a.jsonl", rows())
    assert list(tmp_path.iterdir()) == []


def test_a_file_never_replaces_a_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/precious.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="data: is a folder; name a file"):
        write_jsonl(tmp_path / "data", [{"query": "q"}])
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["data", "data/precious.txt"]


def test_symbolic_links_stay(tmp_path: Path) -> None:
    (tmp_path / "disk/model").mkdir(parents=True)
    (tmp_path / "disk/model/old").touch()
    (tmp_path / "model").symlink_to("disk/model")
    (tmp_path / "a.jsonl").symlink_to("disk/a.jsonl")
    with atomic_path(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    write_jsonl(tmp_path / "a.jsonl", [{"query": "q"}])
    assert (tmp_path / "model").is_symlink() and (tmp_path / "a.jsonl").is_symlink()
    assert sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "disk").rglob("*")) == [
        "disk/a.jsonl", "disk/model", "disk/model/new",
    ]  # fmt: skip


def test_write_jsonl_is_read_back(tmp_path: Path) -> None:
    rows = [{"query": "问\u2028题\x85\n", "pos": ["答"]}, {"query": "q", "pos": ["a"], "neg": []}]
    assert write_jsonl(tmp_path / "a.jsonl", iter(rows)) == 2
    assert read_rows(tmp_path / "a.jsonl", check_training_row) == rows
    assert "答" in (tmp_path / "a.jsonl").read_text(encoding="utf-8")


def test_manifest(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc")
    entry = describe_input(path, 3)
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert entry == {"path": str(path), "sha256": digest, "rows": 3}
    manifest = make_manifest("mine", {"seed": 5, "fp16": False}, [entry], report={"filled": 2})
    assert manifest["seed"] == 5 and manifest["report"] == {"filled": 2} and manifest["libraries"]["torch"]
    assert json.loads(json.dumps(manifest)) == manifest


# --- folders --------------------------------------------------------------------------------------------------------


def test_refuse_foreign_folder(tmp_path: Path) -> None:
    refuse_foreign_folder(tmp_path / "new/folder", False, ["a"])
    assert (tmp_path / "new/folder").is_dir() and not list((tmp_path / "new/folder").iterdir())
    (tmp_path / "new/folder/.hidden").touch()
    refuse_foreign_folder(tmp_path / "new/folder", False, ["a"])
    for name in "gfedcba":
        (tmp_path / "new/folder" / name).touch()
    with pytest.raises(UserError, match=r"holds a, b, c, d, e, \.\.\..*--overwrite_output_dir to replace x, y"):
        refuse_foreign_folder(tmp_path / "new/folder", False, ["y", "x"])
    refuse_foreign_folder(tmp_path / "new/folder", True, ["a"])
    assert len(list((tmp_path / "new/folder").iterdir())) == 8
    with pytest.raises(UserError, match="is a file; name a folder"):
        refuse_foreign_folder(tmp_path / "new/folder/a", True, ["a"])


def test_refuse_unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        refuse_unwritable(tmp_path / "file/folder")

    def touch(self: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        refuse_unwritable(tmp_path)
