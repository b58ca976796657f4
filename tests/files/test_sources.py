"""Sources of rows: files, folders, Parquet, the hub (without a network), and sources.yaml."""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from bge_core import UserError
from bge_core.files import atomic
from bge_core.files.atomic import write_jsonl
from bge_core.files.records import check_training_row
from bge_core.files.sources import (
    Source,
    describe_source,
    is_hub_name,
    list_files,
    load_sources,
    read_corpus,
    read_source,
    read_training_rows,
)

Row = dict[str, Any]


def row(query: str, **more: Any) -> Row:
    return {"query": query, "pos": [f"{query}答"], "neg": []} | more


def write_parquet(file: Path, *rows: Row, row_group_size: int | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file, row_group_size=row_group_size)
    return file


def write(file: Path, *rows: Row) -> Path:
    if file.suffix == ".parquet":
        return write_parquet(file, *rows)
    write_jsonl(file, rows)
    return file


def queries(path: str | Path) -> list[str]:
    return [found["query"] for _, found in read_source(path, check_training_row)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub that holds org/name and knows its revision; what was asked of it."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None = None, *, split: str, streaming: bool) -> Iterator[Row]:
        asked.append((path, name, split, streaming))
        if path != "org/name":
            raise ConnectionError(f"Couldn't reach {path!r} on the Hub")
        return iter([row("甲"), row("乙")] if split != "odd" else [row("甲"), {"question": "丙", "answer": "丁"}, {}])

    def dataset_info(self: Any, name: str, timeout: float) -> Any:
        if name != "org/name":
            raise OSError("offline")
        return type("Info", (), {"sha": "c0ffee"})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return asked


# --- files and folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.data"])
def test_a_file_gives_its_rows_and_their_places(name: str, tmp_path: Path) -> None:
    rows = [row("甲", prompt="指："), row("乙", prompt=None)]
    file = tmp_path / name
    write(tmp_path / name, *rows)
    assert list(read_source(file, check_training_row)) == [((str(file), 1), rows[0]), ((str(file), 2), rows[1])]


def test_a_folder_gives_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.parquet", "sub/c.json", "a.jsonl.manifest.json", "manifest.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, row(name))
    (tmp_path / "notes.txt").write_text("no data")
    (tmp_path / "empty.jsonl").touch()
    assert queries(tmp_path) == ["a.parquet", "b.jsonl", "sub/c.json"]
    places = [place for place, _ in read_source(tmp_path, check_training_row)]
    assert places[1] == (str(tmp_path / "b.jsonl"), 1)


def test_what_a_folder_holds_beside_its_data_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Hidden files and what a run left there are passed over; links and other letters are no obstacle; copies are said."""
    for name in ("a.jsonl", "B.JSONL", "sub/c.Json"):
        write(tmp_path / "data" / name, row(name))
    (tmp_path / "elsewhere").mkdir()
    with gzip.open(tmp_path / "elsewhere/d.jsonl.gz", "wt", encoding="utf-8") as packed:
        packed.write(json.dumps(row("d")))
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "data")
    write(tmp_path / "one.jsonl", row("linked"))
    (tmp_path / "data/z.jsonl").symlink_to(tmp_path / "one.jsonl")
    want = ["B.JSONL", "a.jsonl", "d", "sub/c.Json", "linked"]
    before = describe_source(tmp_path / "data", 5)["sha256"]
    for name in (".ipynb_checkpoints/a.jsonl", "._a.jsonl", "sub/.x/y.jsonl"):
        write(tmp_path / "data" / name, row("hidden"))
    for stage in ("train", "checkpoint", "merge", "evaluate"):
        write(tmp_path / f"data/out/{stage}/metrics.jsonl", row(stage))
        write(tmp_path / f"data/out/{stage}/deeper/config.json", row(stage))
        (tmp_path / f"data/out/{stage}/manifest.json").write_text(json.dumps({"stage": stage}))
    assert queries(tmp_path / "data") == [one["query"] for one in read_training_rows([tmp_path / "data"])] == want
    assert describe_source(tmp_path / "data", 5)["sha256"] == before and not caplog.records
    write(tmp_path / "data/copy.jsonl", row("a.jsonl"))
    load_sources([tmp_path / "data"])
    (line,) = caplog.messages
    assert (
        line
        == f"{tmp_path}/data/a.jsonl, {tmp_path}/data/copy.jsonl have the same content: their rows are read 2 times"
    )
    (tmp_path / "data/out/train/manifest.json").write_text('{"stage": "prepare"}')
    with pytest.raises(UserError, match="out/train: holds the test questions, too"):
        load_sources([tmp_path / "data"])


def test_parquet_is_read_in_pieces_as_json_lines_are(tmp_path: Path) -> None:
    rows = [row(f"问{i}", pos_scores=[i / 7], id=i) for i in range(3000)]
    file = write_parquet(tmp_path / "a.parquet", *rows, row_group_size=700)
    assert read_training_rows([file]) == rows
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_training_rows([tmp_path / "a.jsonl"]) == rows


def test_all_bad_rows_of_a_parquet_file_are_counted_and_ten_shown(tmp_path: Path) -> None:
    rows = [row("好"), *({"query": "问", "pos": []} for _ in range(12))]
    file = write_parquet(tmp_path / "a.parquet", *rows)
    with pytest.raises(UserError) as caught:
        list(read_source(file, check_training_row))
    message = str(caught.value)
    assert "12 bad lines" in message and message.count(f"{file}:") == 10 and "... and 2 more" in message
    assert f"{file}:2: field 'pos' is an empty list" in message


def test_the_fields_of_a_parquet_file_with_other_names_are_shown(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"question": "问", "answer": "答"})
    with pytest.raises(
        UserError, match=r"a.parquet:1: field 'query' is missing; add it \(its fields: question, answer\)"
    ):
        queries(file)


def test_a_broken_parquet_file_is_the_users_error(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", *(row(f"问{i}" * 20) for i in range(500)))
    whole = file.read_bytes()
    for content in (b"", b"no parquet at all", whole[: len(whole) // 2], whole[:100] + b"\xff" * 200 + whole[300:]):
        file.write_bytes(content)
        with pytest.raises(UserError, match="a.parquet: not readable as Parquet"):
            queries(file)


def test_a_bad_line_names_file_and_line(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [row("甲")])
    (tmp_path / "b.jsonl").write_text(json.dumps(row("乙")) + '\n\n{"query": "丙"}\n')
    with pytest.raises(UserError, match=r"1 bad line: .*\n.*b.jsonl:3: field 'pos' is missing"):
        queries(tmp_path)


def make_prepared(folder: Path) -> str:
    write(folder / "train.jsonl", row("甲"))
    (folder / "manifest.json").write_text('{"stage": "prepare"}')
    return str(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.jsonl", "none.jsonl: no such file or folder"),
        (lambda folder: folder, "the folder holds no .jsonl file"),
        (lambda folder: write(folder / "e.jsonl"), "e.jsonl: holds no row"),
        (lambda folder: write_parquet(folder / "e.parquet"), "e.parquet: holds no row"),
        (lambda folder: folder / "table.csv", "table.csv: is a table; make JSON lines of it with prepare.py"),
        (lambda folder: folder / "Table.XLSX", "Table.XLSX: is a table"),
        (lambda folder: folder / "table.tsv.gz", "table.tsv.gz: is a table"),
        (lambda folder: folder / "sources.yaml", "sources.yaml: a list of sources names data files"),
        (make_prepared, "holds the test questions, too; name one file, as .*train.jsonl"),
    ],
)
def test_what_holds_no_rows_is_refused(make: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        queries(make(tmp_path))


def test_each_file_once_however_often_it_is_named(tmp_path: Path) -> None:
    files = [write(tmp_path / name, row("甲")) for name in ("b.jsonl", "a.parquet")]
    assert list_files([files[0], str(tmp_path), tmp_path]) == sorted(files)


# --- corpus -----------------------------------------------------------------------------------------------------------


def test_the_texts_of_a_corpus_follow_their_titles(tmp_path: Path) -> None:
    lines = (
        '{"text": "甲"}\n\n{"text": "乙", "title": "题"}\n{"text": "丙", "id": 7}\n{"text": "", "title": "只有题"}\n'
    )
    (tmp_path / "a.jsonl").write_text(lines)
    passages = [{"text": "丁", "id": None, "title": "题"}, {"text": "戊", "id": "x", "title": ""}]
    write(tmp_path / "b.parquet", *passages, {"text": None, "id": "y", "title": "也是"})
    assert read_corpus(tmp_path) == ["甲", "题 乙", "丙", "只有题", "题 丁", "戊", "也是"]
    with pytest.raises(UserError, match="a.jsonl:1: field 'query' is missing"):
        list(read_source(tmp_path / "a.jsonl", check_training_row))


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("org/name", True), ("org/name:dev", True), ("org/my.data-2:zh:dev", True),
        ("name", False), ("org/name/more", False), ("/org/name", False), ("./org/name", False), ("../name", False),
        ("org/name.jsonl", False), ("org/name.csv", False), ("org/sources.yaml", False), ("a/b:c:d:e", False),
        ("数据/训练", False), ("here/none", False), ("here/there", False),
    ],
)  # fmt: skip
def test_what_is_a_name_of_the_hub(name: str, is_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/there").mkdir(parents=True)
    assert is_hub_name(name) == is_one


def test_config_and_split_go_to_the_hub(hub: list[tuple[Any, ...]]) -> None:
    assert queries("org/name") == queries("org/name:dev") == queries("org/name:zh:dev") == ["甲", "乙"]
    assert next(read_source("org/name", check_training_row, streaming=False))[0] == ("org/name", 1)
    assert hub == [
        ("org/name", None, "train", True), ("org/name", None, "dev", True), ("org/name", "zh", "dev", True),
        ("org/name", None, "train", False),
    ]  # fmt: skip


def test_the_first_bad_row_of_the_hub_ends_the_reading(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(
        UserError, match=r"org/name:odd:2: field 'query' is missing; add it \(its fields: question, answer"
    ) as caught:
        queries("org/name:odd")
    assert "1 bad line" in str(caught.value)


def test_a_hub_out_of_reach_is_one_error_with_a_remedy(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(UserError, match="^org/none: no such file, .*HF_ENDPOINT.*: Couldn't reach 'org/none'"):
        queries("org/none")


def test_the_real_library_offline() -> None:
    """HF_HUB_OFFLINE is set in all tests."""
    for streaming in (True, False):
        with pytest.raises(UserError, match="^org/none:zh:dev: no such file, .*HF_ENDPOINT.*: .*org/none"):
            next(read_source("org/none:zh:dev", check_training_row, streaming=streaming))
    assert describe_source("org/none", 3) == {"path": "org/none", "revision": None, "rows": 3}


# --- sources.yaml -----------------------------------------------------------------------------------------------------


def write_yaml(folder: Path, text: str) -> Path:
    file = folder / "sources.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_sources_with_prompt_and_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        tmp_path / "lists/faq.jsonl",
        row("甲"),
        row("乙", prompt="自己："),
        row("丙", prompt=""),
        row("丁", prompt=None),
    )
    write(tmp_path / "elsewhere.parquet", row("戊", prompt=None))
    monkeypatch.chdir(tmp_path)
    file = write_yaml(
        tmp_path / "lists",
        '- {path: faq.jsonl, prompt: "问题：", weight: 2}\n- path: elsewhere.parquet\n- {path: org/name, weight: 0.5}\n',
    )
    beside = str(tmp_path / "lists/faq.jsonl")
    sources = load_sources([file])
    assert sources == [Source(beside, "问题：", 2.0), Source("elsewhere.parquet"), Source("org/name", None, 0.5)]
    assert isinstance(sources[0].weight, float)
    file.write_text(file.read_text().replace("- {path: org/name, weight: 0.5}\n", ""))
    assert [found.get("prompt") for found in read_training_rows([str(file)])] == [
        "问题：",
        "自己：",
        "",
        "问题：",
        None,
    ]


def test_plain_names_and_lists_together_in_one_order(tmp_path: Path, hub: list[tuple[Any, ...]]) -> None:
    for name in ("b.jsonl", "a.parquet", "folder/c.jsonl", "folder/d.jsonl"):
        write(tmp_path / name, row(name))
    file = write_yaml(tmp_path, "- path: folder\n- {path: b.jsonl, weight: 3}\n- {path: b.jsonl, weight: 3}\n")
    names = [str(file), str(tmp_path / "a.parquet"), "org/name", str(tmp_path / "b.jsonl"), str(tmp_path / "b.jsonl")]
    sources = load_sources(names)
    assert sources == load_sources(names[::-1])
    assert [(Path(source.path).name, source.weight) for source in sources] == [
        ("a.parquet", 1.0), ("b.jsonl", 1.0), ("b.jsonl", 3.0), ("folder", 1.0), ("name", 1.0),
    ]  # fmt: skip
    read = [found["query"] for found in read_training_rows(names)]
    assert read == ["a.parquet", "b.jsonl", "b.jsonl", "folder/c.jsonl", "folder/d.jsonl", "甲", "乙"]
    assert [source.path for source in load_sources([tmp_path / "folder"])] == [
        str(tmp_path / "folder/c.jsonl"), str(tmp_path / "folder/d.jsonl"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "sources.yaml: must be a list of sources"),
        ("path: a.jsonl\n", "sources.yaml: must be a list of sources"),
        ("- [\n", "sources.yaml: not readable as YAML"),
        ("- path: a.jsonl\n- b.jsonl\n", "sources.yaml, entry 2: has no 'path'"),
        ("- {prompt: x}\n", "entry 1: has no 'path'"),
        ("- {path: a.jsonl, wieght: 2}\n", "entry 1: unknown key 'wieght'; did you mean 'weight'"),
        ("- {path: a.jsonl, 3: 2}\n", "entry 1: unknown key 3; did you mean"),
        ("- {path: 3}\n", "entry 1: path is 3; it must be a file"),
        ("- {path: ' '}\n", "entry 1: path is ' '"),
        ("- {path: a.jsonl, prompt: 3}\n", "entry 1: prompt is 3; it must be text"),
        ("- {path: a.jsonl, weight: 0}\n", "entry 1: weight is 0; it must be a number above 0"),
        ("- {path: a.jsonl, weight: -1.5}\n", "entry 1: weight is -1.5"),
        ("- {path: a.jsonl, weight: .nan}\n", "entry 1: weight is nan"),
        ("- {path: a.jsonl, weight: .inf}\n", "entry 1: weight is inf"),
        ("- {path: a.jsonl, weight: true}\n", "entry 1: weight is True"),
        ("- {path: a.jsonl, weight: 1e-1}\n", "entry 1: weight is '1e-1'; it must be a number above 0, as 2.0"),
        ("- {path: a.jsonl, weight: null}\n", "entry 1: weight is None"),
        ("- path: a.jsonl\n- path: none.jsonl\n", "sources.yaml, entry 2: none.jsonl: no such file"),
        ("- path: a.csv\n", "entry 1: .*a.csv: is a table"),
        ("- path: sources.yaml\n", "entry 1: .*sources.yaml: a list of sources names data files"),
    ],
)
def test_a_wrong_entry_is_named(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", row("甲"))
    with pytest.raises(UserError, match=message) as caught:
        load_sources([write_yaml(tmp_path, text)])
    assert str(caught.value).startswith(str(tmp_path / "sources.yaml"))


def test_a_list_names_files_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = write(tmp_path / "home/a.jsonl", row("甲"))
    assert load_sources([write_yaml(tmp_path, "- path: ~/a.jsonl\n")]) == [Source(str(file))]


def test_a_missing_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.yaml: not readable as YAML: .*No such file"):
        load_sources([tmp_path / "none.yaml"])


# --- the manifest -----------------------------------------------------------------------------------------------------


def test_a_file_is_described_as_ever(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet"):
        file = write(tmp_path / name, row("甲"))
        assert describe_source(file, 1) == atomic.describe_input(file, 1)


def test_folders_lists_and_hub_names_are_described_with_their_parts(tmp_path: Path, hub: list[tuple[Any, ...]]) -> None:
    first, second = (write(tmp_path / f"folder/{name}.jsonl", row(name)) for name in "ab")
    folder = describe_source(tmp_path / "folder", 2)
    assert folder["path"] == str(tmp_path / "folder") and folder["rows"] == 2 and len(folder["sha256"]) == 64
    assert [(part["path"], part["sha256"]) for part in folder["files"]] == [
        (str(file), atomic.sha256(file)) for file in (first, second)
    ]
    file = write_yaml(tmp_path, "- {path: folder, weight: 2}\n- path: org/name:zh:dev\n")
    listed = describe_source(file, 5)
    in_folder, in_hub = listed["files"]
    assert in_folder["weight"] == 2.0 and in_folder["sha256"] == folder["sha256"]
    assert (in_hub["path"], in_hub["revision"]) == ("org/name:zh:dev", "c0ffee")

    def changed() -> bool:
        return describe_source(file, 5)["sha256"] != listed["sha256"]

    file.write_text("# a comment\n" + file.read_text())
    assert not changed()
    for now in (
        "- {path: folder, weight: 3}\n",
        "- {path: folder, weight: 2, prompt: x}\n",
        "- {path: folder, weight: 2}\n",
    ):
        file.write_text(now + "- path: org/name:zh:dev\n")
        assert changed() == ("3" in now or "prompt" in now)
    write(second, row("c"))
    assert changed()
