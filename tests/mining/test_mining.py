"""The stage from the command line: what it writes, prints and refuses."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny_model import make_tiny_bert
from tiny_reranker import make_tiny_reranker

import mine
from bge_core.encoder.encode import encode
from bge_core.encoder.load import load_encoder
from bge_core.encoder.settings import EncoderSettings, write_settings
from bge_core.files.records import distinct_texts
from bge_core.files.text import text_id
from bge_core.mining.filters import CandidateFilter
from bge_core.reports.page import Page
from bge_core.runtime.config import MineConfig
from bge_core.search import exact as search_exact

Row = dict[str, Any]


ROWS: list[Row] = [
    {"query": "怎么转账", "pos": ["登录账户后转账"], "来源": {"页": 3}, "neg": ["退货服务"], "type": "qa"},
    {"query": "密码忘了", "pos": ["请点找回密码", "给客服电话"], "id": 7},
    {"neg": ["感冒吃什么药"], "query": "发烧怎么办", "pos": ["多喝水，看医生"], "prompt": "问：", "extra": None},
    {"query": "今天天气", "pos": ["有雨，温度低"], "pos_scores": [0.5], "neg": ["酒店"], "neg_scores": [0.25]},
    {"query": " 怎么转账", "pos": ["在手机上转账"]},
    {"query": "签证怎么办理", "pos": ["先提交申请"], "prompt": None},
    {"query": "旅游买什么", "pos": ["机票和酒店"], "neg": []},
    {"query": "酒店", "pos": ["请查询订单"], "prompt": ""},
]  # fmt: skip
POOL = distinct_texts(ROWS, "pos", "neg")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_bert(tmp_path_factory.mktemp("model"))
    stated = EncoderSettings("mean", normalize=True, query_prompt="为这个句子：", passage_prompt="文：")
    write_settings(folder, stated, embedding_size=32)
    return folder


@pytest.fixture(scope="module")
def score_of(model: Path) -> dict[tuple[int, str], float]:
    """The encoder's score of each row and each text of the pool."""
    encoder = load_encoder(model)
    asked = [("为这个句子：" if row.get("prompt") is None else row["prompt"]) + row["query"] for row in ROWS]
    scores = encode(encoder, asked) @ encode(encoder, ["文：" + text for text in POOL]).T
    return {(i, text): float(scores[i, place]) for i in range(len(ROWS)) for place, text in enumerate(POOL)}


@pytest.fixture(autouse=True)
def state_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    level, num_threads = logging.getLogger().level, torch.get_num_threads()
    search_exact.warn_once.cache_clear()
    monkeypatch.setattr(Page, "plot", lambda page, draw, caption: page)  # most of a small run's time
    yield
    logging.getLogger().setLevel(level)
    torch.set_num_threads(num_threads)


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "train.jsonl", ROWS)


def write_lines(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(model: Path, train_file: Path, *flags: str) -> tuple[int, Path]:
    output = train_file.with_name("mined.jsonl")
    words = ["--model_name_or_path", str(model), "--input_file", str(train_file), "--output_file", str(output)]
    return mine.main([*words, "--range_for_sampling", "1-6", "--negative_number", "3", *flags]), output


def manifest_of(output: Path) -> Row:
    return json.loads(Path(f"{output}.manifest.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def assert_nothing_written(folder: Path, *expected: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)


def test_rows_keep_their_columns_and_order(
    model: Path, train_file: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    code, output = run(model, train_file)
    assert code == 0
    found = read_lines(output)
    for row, before in zip(found, ROWS, strict=True):
        kept = [name for name in before if name != "neg_scores"]
        assert list(row) == (kept if "neg" in kept else [*kept, "neg"])
        assert {name: row[name] for name in kept if name != "neg"} == {n: before[n] for n in kept if n != "neg"}
        assert len(row["neg"]) == len(set(row["neg"])) == 3
        assert not set(row["neg"]) & {row["query"], *row["pos"]}
    # The same question twice: what answers it in one row is no negative in the other.
    assert not {"在手机上转账", "登录账户后转账"} & {*found[0]["neg"], *found[4]["neg"]}
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "neg_scores of 1 rows are left out: mined negatives have no score"
    ]
    printed = capsys.readouterr().out.splitlines()
    assert (
        printed[0].split() == ["rows", "8"]
        and f"written: {output}, {output}.manifest.json, {output}.report.html" in printed
    )
    assert printed[-1].startswith("next: python train.py ") and f"--train_data {output}" in printed[-1]
    assert_nothing_written(
        output.parent, "train.jsonl", "mined.jsonl", "mined.jsonl.manifest.json", "mined.jsonl.report.html"
    )  # fmt: skip


def test_the_negatives_are_the_hits_of_the_range(
    model: Path, train_file: Path, score_of: dict[tuple[int, str], float]
) -> None:
    """With so few hits that nothing is sampled: compared with a ranking of our own, text by text."""
    code, output = run(model, train_file, "--range_for_sampling", "2-5", "--negative_number", "3")
    assert code == 0
    for i, row in enumerate(read_lines(output)):
        same = [other for other in ROWS if text_id(other["query"]) == text_id(row["query"])]
        known = {row["query"], *(text for other in same for text in other["pos"])}
        assert len(same) == (2 if i in (0, 4) else 1)
        ranking = sorted(POOL, key=lambda text: -score_of[i, text])
        hits = [text for text in ranking[2:5] if text not in known]
        assert row["neg"][: len(hits)] == hits
    counts = manifest_of(output)["counts"]
    assert counts["rows_with_own_prompt"] == 2 and counts["pool"] == len(POOL) and counts["rows_sampled"] == 0


def test_the_manifest_says_what_was_used(model: Path, train_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    code, output = run(model, train_file, "--use_gpu_for_searching", "--fp16")
    assert code == 0
    manifest = manifest_of(output)
    assert manifest["stage"] == "mine" and manifest["seed"] == 42
    assert manifest["encoder"] == {
        "model": str(model), "pooling": "mean", "normalize": True, "query_instruction": "为这个句子：",
        "passage_instruction": "文：",
    }  # fmt: skip
    assert manifest["config"]["range_for_sampling"] == "1-6" and manifest["config"]["use_gpu_for_searching"] is True
    assert [entry["rows"] for entry in manifest["inputs"]] == [8]
    assert manifest["counts"]["negatives_mean"] == 3
    if not search_exact.gpu_available():
        assert manifest["search_device"] == "cpu" and manifest["precision"] == "no"
        warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        for once in ("sees no GPU", "fp16 needs a GPU"):
            assert sum(once in text for text in warnings) == 1


def test_instructions_and_pooling_can_be_chosen(
    model: Path, train_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(model, train_file)[1].read_bytes()
    code, output = run(
        model, train_file, "--query_instruction_for_retrieval", "", "--passage_instruction_for_retrieval", "段 落",
        "--pooling_method", "cls",
    )  # fmt: skip
    assert code == 0 and output.read_bytes() != first
    encoder = manifest_of(output)["encoder"]
    assert (encoder["query_instruction"], encoder["passage_instruction"], encoder["pooling"]) == ("", "段 落", "cls")
    command = capsys.readouterr().out.splitlines()[-1]
    assert "--query_instruction_for_retrieval '' --passage_instruction_for_retrieval '段 落'" in command
    assert "--sentence_pooling_method cls" in command


def test_keep_neg_puts_own_negatives_first(model: Path, tmp_path: Path) -> None:
    rows: list[Row] = [
        {"query": "密码忘了", "pos": ["请点找回密码"], "neg": ["酒店", "请点找回密码", "酒 店", "酒店", "密码忘了"]},
        *ROWS[1:],
    ]
    code, output = run(model, write_lines(tmp_path / "train.jsonl", rows), "--keep_neg")
    assert code == 0
    for row, before in zip(read_lines(output), rows, strict=True):
        own = distinct_texts([before], "neg")
        if before is rows[0]:
            own = ["酒店", "酒 店"]
        assert row["neg"][: len(own)] == own and len(row["neg"]) == len(own) + 3
        assert len(set(map(text_id, row["neg"]))) == len(row["neg"])
        assert "neg_scores" not in row and not set(row["neg"]) & {row["query"], *row["pos"]}
    counts = manifest_of(output)["counts"]
    assert (counts["own_negatives_kept"], counts["own_negatives_dropped"]) == (4, 3)


def test_candidate_pool(model: Path, train_file: Path, tmp_path: Path) -> None:
    texts = ["登录账户后转账", "请查询订单", "请查询 订单", "Ａ", "A", "单", "面包", "米"]
    pool = write_lines(tmp_path / "pool.jsonl", [{"text": text, "other": 1} for text in texts])
    code, output = run(model, train_file, "--candidate_pool", str(pool))
    assert code == 0
    assert {text for row in read_lines(output) for text in row["neg"]} <= set(texts) - {"A"}
    manifest = manifest_of(output)
    assert [entry["rows"] for entry in manifest["inputs"]] == [8, 8] and manifest["counts"]["pool"] == 7


def test_a_pool_too_small_fills_up_then_gives_fewer(
    model: Path, train_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = write_lines(tmp_path / "pool.jsonl", [{"text": text} for text in ("登录账户后转账", "面包", "酒店")])
    code, output = run(model, train_file, "--candidate_pool", str(pool), "--range_for_sampling", "2-200")
    assert code == 0
    found = read_lines(output)
    assert set(found[0]["neg"]) == {"面包", "酒店"} == set(found[4]["neg"])
    assert set(found[7]["neg"]) == {"面包", "登录账户后转账"} and len(found[1]["neg"]) == 3
    counts = manifest_of(output)["counts"]
    assert counts["rows_short"] == 3 and counts["rows_filled_at_random"] == 8 and counts["negatives_min"] == 2
    assert caplog.messages[-1].startswith("3 rows have fewer than 3 mined negatives; for 3 the pool of 3 is too small")

    write_lines(pool, [{"text": "登录账户后转账"}])
    write_lines(train_file, ROWS[:1])
    code, output = run(model, train_file, "--candidate_pool", str(pool))
    assert code == 0 and read_lines(output)[0]["neg"] == []
    assert manifest_of(output)["counts"]["rows_without_negatives"] == 1


def test_an_earlier_output_is_replaced_whole(
    model: Path, train_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in train_file.parent.iterdir()}

    assert run(model, train_file)[0] == 0
    before = files()
    assert run(model, train_file)[0] == 0 and files() == before

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        assert run(model, train_file, "--seed", "7")[0] == 2
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert files() == before
    assert run(model, train_file, "--seed", "7")[0] == 0
    assert {name for name, content in files().items() if before[name] != content} == {
        "mined.jsonl", "mined.jsonl.manifest.json", "mined.jsonl.report.html",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "q", "pos": "one"}', "field 'pos' is \"one\"; it must be a list"),
        ('{"query": "q", "pos": []}', "field 'pos' is an empty list"),
        ('{"pos": ["p"]}', "field 'query' is missing"),
        ('{"query": "q", ', "not JSON"),
        ('{"query": "q", "pos": ["p"], "neg": ["n"], "neg_scores": []}', "list of 1 numbers"),
    ],
)
def test_bad_input_names_file_and_line(
    model: Path, train_file: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    with open(train_file, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    code, output = run(model, train_file)
    error = capsys.readouterr().err
    assert code == 2 and f"{train_file}:9: " in error and message in error
    assert_nothing_written(output.parent, "train.jsonl")


def test_empty_and_missing_files(
    model: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = write_lines(tmp_path / "empty.jsonl", [])
    for flags, message in (
        (["--candidate_pool", str(empty)], f"{empty}: holds no row"),
        (["--candidate_pool", str(tmp_path / "none.jsonl")], "none.jsonl: no such file"),
        (["--input_file", str(empty)], f"{empty}: holds no row"),
        (["--model_name_or_path", str(tmp_path)], "not a model folder"),
        (["--model_name_or_path", str(tmp_path / "none")], "none: no such folder"),
    ):
        assert run(model, train_file, *flags)[0] == 2
        assert message in capsys.readouterr().err
    assert_nothing_written(tmp_path, "train.jsonl", "empty.jsonl")


def test_outputs_that_are_refused(
    model: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    link = tmp_path / "link.jsonl"
    link.symlink_to(train_file)
    pool = write_lines(tmp_path / "pool.jsonl", [{"text": "面包"}])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for target, message in (
        (train_file, "would replace --input_file"),
        (link, "would replace --input_file"),
        (pool, "would replace --candidate_pool"),
        (folder, "is not a file"),
        (Path("/dev/null"), "is not a file"),
        (train_file / "below.jsonl", "cannot be written"),
    ):
        assert run(model, train_file, "--candidate_pool", str(pool), "--output_file", str(target))[0] == 2
        assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert folder.is_dir()


def test_two_processes_give_the_bytes_of_one(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    characters = "".join(row["query"] + row["pos"][0] for row in ROWS)
    texts = ["".join(rng.choice(list(characters), size=rng.integers(2, 40))) for _ in range(150)]
    rows = [{"query": texts[i], "pos": [texts[i + 50]], "neg": [texts[i + 100]]} for i in range(50)]
    train_file = write_lines(tmp_path / "train.jsonl", rows)
    outputs = [tmp_path / "mined.jsonl", tmp_path / "two.jsonl"]
    flags = ["--range_for_sampling", "2-30", "--negative_number", "7", "--batch_size", "8", "--use_gpu_for_searching"]
    torch.set_num_threads(1)
    assert run(model, train_file, *flags)[0] == 0
    job = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "mine.py",
            "--model_name_or_path", str(model), "--input_file", str(train_file), "--output_file", str(outputs[1]),
            *flags,
        ],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, timeout=120,
        capture_output=True, text=True,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("next: python train.py") == 1 and job.stderr.count("faiss sees no GPU") == 1
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert all(len(row["neg"]) == 7 for row in read_lines(outputs[0]))
    manifests = [manifest_of(output) for output in outputs]
    for manifest in manifests:
        del manifest["config"]["output_file"]
    assert manifests[0] == manifests[1]


# --- guards, filters, teachers and caches in the stage ---------------------------------------------------------------

NEAR: list[Row] = [
    {"query": "信用卡年费多少钱", "pos": ["信用卡年费为300元，刷卡六次可以免除。"], "answer": "三百大洋"},
    {"query": "信用卡的年费多少钱？", "pos": ["办卡首年不收费用，以后每年要交。"]},
    {"query": "怎么退货", "pos": ["七天之内可以退货"]},
]
NEAR_POOL = [
    "信用卡年费为300元，刷卡六次可以免除。", "信用卡年费为300元，刷卡六次可免除", "信用卡年费为500元，刷卡六次可以免除。",
    "办卡首年不收费用，以后每年要交。", "年费要交三百大洋", "面包和米", "七天之内可以退货", "酒店在山上",
]  # fmt: skip


@pytest.fixture
def near_files(tmp_path: Path) -> tuple[Path, Path]:
    """Questions with planted answers in the pool."""
    pool = write_lines(tmp_path / "pool.jsonl", [{"text": text} for text in NEAR_POOL])
    return write_lines(tmp_path / "train.jsonl", NEAR), pool


ALL = ["--range_for_sampling", "0-100", "--negative_number", "100"]
NO_GUARDS = [
    word for name in ("identical", "near_duplicates", "same_questions", "answers")
    for word in (f"--guard_{name}", "False")
]  # fmt: skip


def test_guards_stand_in_a_plain_call_and_each_can_be_switched_off(model: Path, near_files: tuple[Path, Path]) -> None:
    train_file, pool = near_files
    code, output = run(model, train_file, "--candidate_pool", str(pool), *ALL)
    assert code == 0
    # another number is a negative; the same words, the other row's positive and the stated answer are none
    assert set(read_lines(output)[0]["neg"]) == {NEAR_POOL[i] for i in (2, 5, 6, 7)}
    counts = manifest_of(output)["counts"]
    assert counts["near_duplicate_dropped"] >= 1 and counts["same_question_dropped"] >= 2
    assert counts["answer_dropped"] >= 1
    for flag, spared in (
        ("guard_near_duplicates", {1}), ("guard_same_questions", {3}), ("guard_answers", {4}),
    ):  # fmt: skip
        run(model, train_file, "--candidate_pool", str(pool), *ALL, f"--{flag}", "False")
        assert set(read_lines(output)[0]["neg"]) == {NEAR_POOL[i] for i in {2, 5, 6, 7} | spared}, flag


def test_a_frame_around_all_answers_costs_no_negatives(model: Path, tmp_path: Path) -> None:
    said = [
        "可以代办",
        "周末晚上九点闭馆",
        "请把饮料放进门口的储物柜",
        "黑白每张三角",
        "每本书可以续借两次",
        "少儿区在二楼东侧",
    ]
    rows = [{"query": f"{text[:3]}吗", "pos": [f"您好：{text}。谢谢！（某馆服务台 8800123）"]} for text in said]
    train_file = write_lines(tmp_path / "train.jsonl", rows)
    code, output = run(model, train_file, "--range_for_sampling", "0-8", "--negative_number", "3")
    counts = manifest_of(output)["counts"]
    assert code == 0 and all(len(row["neg"]) == 3 for row in read_lines(output))
    assert not counts["rows_short"] and "near_duplicate_dropped" not in counts


@pytest.mark.parametrize(
    ("name", "value", "good"),
    [
        ("max_score", 0.5, lambda score, lowest: score <= 0.5),
        ("min_score", 0.8, lambda score, lowest: score >= 0.8),
        ("absolute_margin", 0.05, lambda score, lowest: score <= lowest - 0.05),
        ("relative_margin", 0.1, lambda score, lowest: score <= lowest - 0.1 * abs(lowest)),
    ],
)
def test_score_filters(
    model: Path,
    train_file: Path,
    score_of: dict[tuple[int, str], float],
    name: str,
    value: float,
    good: Callable[[float, float], bool],
) -> None:
    code, output = run(model, train_file, *ALL, *NO_GUARDS)
    everything = {(i, text) for i, row in enumerate(read_lines(output)) for text in row["neg"]}
    code, output = run(model, train_file, *ALL, *NO_GUARDS, f"--{name}", str(value))
    assert code == 0
    kept = {(i, text) for i, row in enumerate(read_lines(output)) for text in row["neg"]}
    lowest = [min(score_of[i, text] for text in row["pos"]) for i, row in enumerate(ROWS)]
    assert kept == {(i, text) for i, text in everything if good(score_of[i, text], lowest[i])} < everything
    assert manifest_of(output)["counts"][f"{name}_dropped"] >= len(everything) - len(kept)


def test_a_reranker_scores_and_filters(model: Path, near_files: tuple[Path, Path], tmp_path: Path) -> None:
    from bge_core.encoder.reranker import load_reranker

    train_file, pool = near_files
    teacher = make_tiny_reranker(tmp_path / "reranker")
    flags = ["--candidate_pool", str(pool), *ALL, "--reranker_name_or_path", str(teacher)]
    code, output = run(model, train_file, *flags)
    assert code == 0
    reranker = load_reranker(str(teacher))
    found = read_lines(output)
    for row in found:
        for side in ("pos", "neg"):
            want = reranker.score([(row["query"], text) for text in row[side]])
            assert np.allclose(row[f"{side}_scores"], want, rtol=1e-4, atol=1e-5)
    everything = {(i, t, s) for i, row in enumerate(found) for t, s in zip(row["neg"], row["neg_scores"], strict=True)}
    lowest = [min(row["pos_scores"]) for row in found]
    margin = float(np.median([lowest[i] - score for i, _, score in everything]))
    code, output = run(model, train_file, *flags, "--teacher_margin", str(max(margin, 0.0)))
    kept = {(i, text) for i, row in enumerate(read_lines(output)) for text in row["neg"]}
    assert kept == {(i, text) for i, text, score in everything if score <= lowest[i] - max(margin, 0.0)}
    assert kept and len(kept) < len(everything)


def test_a_second_encoder_as_teacher(model: Path, train_file: Path, tmp_path: Path) -> None:
    other = make_tiny_bert(tmp_path / "teacher", seed=7)
    write_settings(other, EncoderSettings(pooling="cls", normalize=True), 32)
    encoder, margin = load_encoder(other), ["--teacher_margin", "0.01"]  # of cosines, whatever is written
    kept = []
    for flags, temperature in (([], 0.02), (["--teacher_temperature", "1"], 1.0)):
        code, output = run(model, train_file, "--teacher_encoder", str(other), *margin, *flags)
        assert code == 0 and manifest_of(output)["teacher_temperature"] == temperature
        for row in read_lines(output):
            query = encode(encoder, [row["query"]])[0]
            for side in ("pos", "neg"):
                cosines = encode(encoder, row[side]) @ query
                assert np.allclose(row[f"{side}_scores"], cosines / temperature, atol=1e-5 / temperature)
        kept.append([row["neg"] for row in read_lines(output)])
    assert kept[0] == kept[1]


def test_a_second_run_from_the_cache_encodes_nothing(
    model: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run(model, train_file)[1].read_bytes()
    flags = ["--embedding_cache_dir", str(tmp_path / "cache"), "--cache_shard_size", "5"]
    code, output = run(model, train_file, *flags)
    assert code == 0 and output.read_bytes() == plain
    first = manifest_of(output)["cache"]
    assert first["reused"] == 0 and first["encoded"] == len(POOL) + 8
    code, output = run(model, train_file, *flags, "--seed", "1", "--negative_number", "2")
    assert manifest_of(output)["cache"] == {"encoded": 0, "reused": len(POOL) + 8}
    write_lines(train_file, [*ROWS, {"query": "全新的问题", "pos": ["全新的答案"]}])
    code, output = run(model, train_file, *flags)
    assert manifest_of(output)["cache"] == {"encoded": 2, "reused": len(POOL) + 8}
    assert f"cache {tmp_path / 'cache'}: " in capsys.readouterr().out


@pytest.mark.parametrize("retriever", ["bm25", "hybrid"])
def test_other_retrievers(model: Path, train_file: Path, retriever: str) -> None:
    code, output = run(model, train_file, "--retriever", retriever)
    assert code == 0 and manifest_of(output)["search"]["retriever"] == retriever
    for row in read_lines(output):
        assert len(row["neg"]) == 3 and not set(row["neg"]) & {row["query"], *row["pos"]}


def test_an_approximate_index(
    model: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "pool.faiss"
    flags = ["--index_factory", "HNSW8", "--index_path", str(index)]
    code, output = run(model, train_file, *flags)
    assert code == 0 and index.exists()
    assert manifest_of(output)["search"]["recall"] > 0.9
    exact = run(model, train_file)[1].read_bytes()
    capsys.readouterr()
    other = make_tiny_bert(tmp_path / "other", seed=5)
    assert run(other, train_file, *flags)[0] == 2
    assert str(index) in capsys.readouterr().err
    assert output.read_bytes() == exact


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--range_for_sampling", "200-2"], "write two rising ranks"),
        (["--negative_number", "0"], "use a number above 0"),
        (["--min_score", "0.5", "--max_score", "0.4"], "is not below --max_score"),
        (["--teacher_margin", "1"], "needs --reranker_name_or_path or --teacher_encoder"),
        (["--reranker_name_or_path", "x", "--teacher_encoder", "y"], "choose one"),
        (["--near_duplicate_threshold", "1.5"], "up to 1"),
        (["--absolute_margin", "-1"], "use 0 or a number above it"),
        (["--clean_cache"], "needs --embedding_cache_dir"),
        (["--check_against", "x"], "needs --check"),
        (["--index_factory", "Nonsense,"], "--index_factory"),
    ],
)
def test_flags_that_are_refused(
    model: Path, train_file: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert run(model, train_file, *flags)[0] == 2
    assert message in capsys.readouterr().err
    assert_nothing_written(train_file.parent, "train.jsonl")


def test_a_bi_encoder_is_no_reranker(model: Path, train_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, train_file, "--reranker_name_or_path", str(model))[0] == 2
    assert "--reranker_name_or_path" in capsys.readouterr().err


def test_all_candidates_filtered_out(model: Path, train_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    code, output = run(model, train_file, "--max_score", "-0.99")
    assert code == 0 and all(row["neg"] == [] for row in read_lines(output))
    message = "8 rows have fewer than 3 mined negatives; for 8 guards or filters took out too many (max_score "
    assert any(found.startswith(message) for found in caplog.messages)


def test_inspect_shows_rows_with_scores(model: Path, train_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, train_file, "--inspect", "2")[0] == 0
    shown = capsys.readouterr().out.splitlines()
    lines = [line.split() for line in shown if line.strip().startswith(("query", "pos", "neg "))]
    assert sum(line[0] == "query" and "instruction" not in line for line in lines) == 2
    negatives = [float(line[1]) for line in lines if line[0] == "neg"]
    assert len(negatives) == 6 and negatives[:3] == sorted(negatives[:3], reverse=True)


def test_check_looks_at_a_file_and_mines_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"query": "密码忘了", "pos": ["点找回密码"], "neg": ["点 找回密码", "酒店"]},
        {"query": "密码忘了", "pos": ["点找回密码"], "neg": ["酒店"]},
    ]
    file = write_lines(tmp_path / "train.jsonl", rows)
    against = write_lines(tmp_path / "test.jsonl", [{"query": "密码忘了", "pos": ["点找回密码"]}])
    before = file.read_bytes()
    report = tmp_path / "check.html"
    assert mine.main(["--check", str(file), "--check_against", str(against), "--report", str(report)]) == 0
    shown = capsys.readouterr().out
    assert "2 rows" in shown and "1 of 1 test rows ask a query of the training data" in shown
    assert "say in nearly the same words what a positive" in shown
    assert file.read_bytes() == before and report.exists()


def test_what_to_mind_is_printed_and_the_closest_negatives_shown(
    model: Path, train_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = run(model, train_file, "--range_for_sampling", "0-50")
    assert code == 0 and "mind: The range reaches 50 hits deep" in capsys.readouterr().out
    page = Path(f"{output}.report.html").read_text(encoding="utf-8")
    assert "Negatives that read most like a positive" in page


def test_what_was_taken_out_is_shown_once() -> None:
    """Also where it comes again as something to fill up with."""
    config = MineConfig(model_name_or_path="m", input_file=["i"], output_file="o", max_score=0.5)
    embedded: Any = SimpleNamespace(scores=lambda number, candidates: np.full(len(candidates), 0.9))
    filters = CandidateFilter([{"query": "q", "pos": ["p"]}], ["a", "b", "c"], embedded, config, [1.0])
    assert filters.reasons(0, [0, 1]) == filters.reasons(0, [1, 2]) == ["max_score"] * 2
    assert [found["candidate"] for found in filters.removed["max_score"]] == ["a", "b", "c"]
