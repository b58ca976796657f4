"""The prepare stage on files small enough to count by hand: its three files, its manifest, what it leaves alone."""

import json
from pathlib import Path
from typing import Any

import pytest

import prepare
from bge_core.files import atomic
from bge_core.files.pairs import from_triplets
from bge_core.files.records import check_corpus_row, check_evaluation_row, check_training_row, read_rows
from bge_core.files.split import OUTPUTS

# Question i has answer i, so each pair is a group of its own.
TEN = [{"question": f"问题{i}怎么办？", "answer": f"这是第{i}个答案。"} for i in range(10)]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8", newline="")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in", {"a.jsonl": jsonl(TEN)})


def read_output(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str], dict[str, int]]:
    """Training rows, test rows, corpus texts, counts; each file checked by the rules of the stages that read it."""
    train = read_rows(folder / "train.jsonl", check_training_row)
    test = read_rows(folder / "test.jsonl", check_evaluation_row)
    corpus = read_rows(folder / "corpus.jsonl", check_corpus_row)
    assert [row["id"] for row in corpus] == [str(i) for i in range(len(corpus))]
    counts = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["counts"]
    return train, test, [row["text"] for row in corpus], counts


def run(source: Path, output: Path, *flags: str) -> int:
    return prepare.main(["--input_dir", str(source), "--output_dir", str(output), *flags])


def refused(source: Path, output: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The message of a run that must fail with exit code 2 and leave no file."""
    before = sorted(output.rglob("*"))
    capsys.readouterr()
    assert run(source, output, *flags) == 2
    assert sorted(output.rglob("*")) == before
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err[captured.err.index("error: ") :]


# --- what is written ------------------------------------------------------------------------------------------------


def test_counts_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
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
    output = tmp_path / "a folder"
    assert run(write(tmp_path / "in", files), output, "--train_num", "2") == 0
    train, test, corpus, counts = read_output(output)
    assert counts == {
        "files": 2, "rows": 8, "rows_lost": 3, "pairs": 11, "pairs_empty": 4, "pairs_repeated": 2, "questions": 3,
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
    out = capsys.readouterr().out
    shown = dict(line.rsplit(maxsplit=1) for line in out.splitlines()[:13])
    assert {name.replace(" ", "_"): int(value) for name, value in shown.items()} == counts
    assert "next: python mine.py --model_name_or_path" in out and f"--input_file '{output}/train.jsonl'" in out


def test_manifest(source: Path, tmp_path: Path) -> None:
    write(source, {"b/c.csv": "q,a\nx,y\n"})
    assert run(source, tmp_path / "out", "--seed", "7") == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))
    assert (manifest["stage"], manifest["seed"], manifest["config"]["split_by"]) == ("prepare", 7, "group")
    described = [{name: entry[name] for name in ("path", "sha256", "rows")} for entry in manifest["inputs"]]
    assert described == [
        {"path": str(source / name), "sha256": atomic.sha256(source / name), "rows": rows}
        for name, rows in (("a.jsonl", 10), ("b/c.csv", 1))
    ]


def test_known_negatives_are_kept_unless_they_are_answers(tmp_path: Path) -> None:
    rows: list[Any] = [{"query": f"q{i}", "pos": [f"a{i}"]} for i in range(9)]
    rows[0]["neg"] = ["n1", "n 2", "n1", ""]
    rows[1]["neg"] = ["a1", "a2", "n3"]  # its own positive; another question's
    rows.append({"query": "q1", "pos": ["n3"], "neg": []})  # n3 turns out to be a positive of q1
    rows.append({"anchor": "q2", "positive": "a2", "negative": "n4"})  # names may differ from line to line
    source = write(tmp_path / "in", {"a.jsonl": jsonl(rows)})
    seen = set()
    for seed, split_by in ((seed, split_by) for seed in "0123" for split_by in ("group", "question")):
        output = tmp_path / f"out-{seed}-{split_by}"
        assert run(source, output, "--train_num", "5", "--seed", seed, "--split_by", split_by) == 0
        train, test, corpus, counts = read_output(output)
        assert corpus == ["a0", "n1", "n 2", "a1", "a2", "n3", *(f"a{i}" for i in range(3, 9)), "n4"]
        assert counts["questions_with_known_negatives"] == 3
        assert all(row.keys() == {"query", "pos"} for row in test)
        held_out = split_by == "group" and any("a2" in row["pos"] for row in test)
        known = {"q0": ["n1", "n 2"], "q1": None if held_out else ["a2"], "q2": ["n4"]}
        found = {row["query"]: row.get("neg") for row in train}
        assert found == {query: known.get(query) for query in found}
        seen.add(held_out if "q1" in found else None)
    assert seen >= {True, False}, "both cases were met"


def test_triplet_files_are_input(tmp_path: Path) -> None:
    triplets = [
        {"anchor": row["question"], "positive": row["answer"], "negative": f"{row['answer']}不对"} for row in TEN
    ]
    assert run(write(tmp_path / "in", {"a.jsonl": jsonl(triplets)}), tmp_path / "out") == 0
    train, test, corpus, _ = read_output(tmp_path / "out")
    assert [row for row in from_triplets(triplets) if row in train] == train
    assert len(train) == 9 and len(test) == 1 and "neg" not in test[0]
    assert len(set(corpus)) == 20


def test_split_does_not_depend_on_the_listing_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in", {f"{i % 3}/f{i}.jsonl": jsonl(TEN[i : i + 2]) for i in range(9)})
    assert run(source, tmp_path / "out") == 0
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(rglob(self, pattern))))
    assert run(source, tmp_path / "out2") == 0
    for name in ("train.jsonl", "test.jsonl", "corpus.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "q,a\nx,y\n", "one question"),
        ("a.csv", "q,a\nx,y\np,y\n", "--split_by question"),
        ("a.csv", "q,a\n", "0 pairs"),
        ("a.csv", "", "0 pairs"),
        ("a.jsonl", jsonl(TEN) + "[]\n", "a.jsonl:11: is a JSON list"),
    ],
)
def test_what_gives_no_split_is_refused(
    name: str, content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(write(tmp_path / "in", {name: content}), tmp_path / "out", capsys)


def test_folders_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", {"train.jsonl": jsonl(TEN)})
    assert "no such file or folder" in refused(tmp_path / "missing", tmp_path / "out", capsys)
    for flags in ([], ["--overwrite_output_dir"]):
        assert "would overwrite the input" in refused(source, source, capsys, *flags)
        assert "would overwrite the input" in refused(source / "train.jsonl", source, capsys, *flags)
    assert (source / "train.jsonl").read_text(encoding="utf-8") == jsonl(TEN)
    foreign = write(tmp_path / "foreign", {"thesis.doc": "x"})
    assert "thesis.doc" in refused(source, foreign, capsys)
    assert "is a file" in refused(source, foreign / "thesis.doc", capsys)


def test_output_inside_input_is_never_read(source: Path) -> None:
    write(source, {"link/../b.csv": "q,a\nx,y\n"})
    outputs = []
    for flags in ([], ["--overwrite_output_dir"]):
        assert run(source, source / "prepared", *flags) == 0
        outputs.append(read_output(source / "prepared"))
    assert outputs[0] == outputs[1]


def test_overwriting_keeps_other_files(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "out") == 0
    write(tmp_path / "out", {"train_minedHN.jsonl": "mine"})
    assert "--overwrite_output_dir" in refused(source, tmp_path / "out", capsys)
    assert run(source, tmp_path / "out", "--overwrite_output_dir", "--train_num", "5") == 0
    assert (tmp_path / "out/train_minedHN.jsonl").read_text() == "mine"
    assert len(read_output(tmp_path / "out")[0]) == 5


@pytest.mark.parametrize("failing", ["train.jsonl", "corpus.jsonl", "manifest.json"])
def test_a_full_disk_leaves_the_earlier_output(
    failing: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_the_manifest_appears_last(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two renames, the folder holds no manifest, so nothing vouches for a mixture of two runs."""
    output = tmp_path / "out"
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
