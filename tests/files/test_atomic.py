"""No output is ever half there, each has a manifest, and no other's folder is written to."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from bge_core import UserError
from bge_core.files import atomic
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
from bge_core.files.records import check_training_row, read_rows


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
