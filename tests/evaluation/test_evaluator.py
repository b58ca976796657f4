"""`evaluate` as a library, several test sets, runs made elsewhere, the report: from tiny models and hand-made vectors."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import make_tiny_bert

import evaluate as stage
from bge_core import UserError
from bge_core.encoder.load import load_encoder
from bge_core.evaluation import report, score
from bge_core.evaluation.costs import measure_costs
from bge_core.evaluation.evaluator import BGE_QUERY_INSTRUCTION, EvaluationResult, bge_instruction, evaluate, rank
from bge_core.evaluation.report import write_evaluation_report
from bge_core.evaluation.tasks import RetrievalTask, load_task
from bge_core.files import atomic

WORDS = "天地玄黄宇宙洪荒"
EVIL = "<script>alert('x')</script>\"&"


def write_data(folder: Path, words: str, name: str = "test") -> tuple[str, str]:
    rows = [{"query": f"{word}是什么", "pos": [f"{word}是一种东西"], "source": "甲" if i % 2 else "乙"}
            for i, word in enumerate(words)]  # fmt: skip
    atomic.write_jsonl(folder / f"{name}.jsonl", rows)
    atomic.write_jsonl(folder / f"{name}_corpus.jsonl", ({"text": text} for row in rows for text in row["pos"]))
    return str(folder / f"{name}.jsonl"), str(folder / f"{name}_corpus.jsonl")


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    return [str(make_tiny_bert(tmp_path / f"m{seed}", seed=seed)) for seed in (0, 1)]


def task_of(relevant: list[dict[int, int]], num_rows: int, missing: list[list[int]] | None = None) -> RetrievalTask:
    ids = [str(i) for i in range(max(num_rows, len(relevant)))]
    queries = ids[: len(relevant)]
    return RetrievalTask(
        "t", queries, queries, ids[:num_rows], ids[:num_rows], relevant, missing or [[] for _ in relevant], [],
        [{} for _ in relevant],
    )  # fmt: skip


def test_vectors_from_anywhere_are_scored_as_those_of_a_model(models: list[str], tmp_path: Path) -> None:
    task = load_task(*write_data(tmp_path, WORDS))
    encoder = load_encoder(models[0])
    vectors = encoder.encode(task.queries), encoder.encode(task.corpus)
    result = evaluate({"model": models[0], "vectors": vectors, "other": models[1]}, task, resamples=200)
    assert result.metrics["model"] == result.metrics["vectors"]
    np.testing.assert_array_equal(result.rankings["model"].scores, result.rankings["vectors"].scores)
    assert not np.allclose(result.rankings["model"].scores, result.rankings["other"].scores)
    table = result.table()
    assert set(table["model"]) == {"model", "vectors", "other"}
    line = table[(table["model"] == "other") & (table["metric"] == "MRR@10")].iloc[0]
    want = result.metrics["other"]["MRR@10"] - result.metrics["model"]["MRR@10"]
    assert line["difference"] == pytest.approx(want) and line["low"] <= line["value"] <= line["high"]
    assert {line.model for line in result.comparisons} == {"vectors", "other"}
    alone = evaluate(vectors, task, resamples=200)
    assert alone.comparisons == [] and alone.metrics["model"] == result.metrics["model"]


def test_scores_of_positives_and_negatives_by_hand() -> None:
    corpus = np.array([[1, 0], [0.8, 0.6], [0, 1], [-1, 0]], dtype=np.float32)
    queries = np.array([[1, 0], [0, 1], [1, 0]], dtype=np.float32)
    task = task_of([{0: 1, 1: 2, 2: 0}, {3: 1}, {}], 4, [[], [], [1]])
    found = rank(queries, corpus, task, k=2, metrics=["MRR@2"])
    np.testing.assert_allclose(found.positive_score, [1.0, 0.0, np.nan])  # also of one outside the depth
    np.testing.assert_allclose(found.negative_score, [np.nan, 1.0, 1.0])  # both of the first question's hits are right
    assert found.first_positive(task).tolist() == [1, 0, 0]
    result = EvaluationResult(task, {"m": found}, resamples=100)
    assert [line.target for line in result.thresholds["m"]][:1] == ["precision"]


def test_the_question_itself_is_no_hit() -> None:
    corpus = np.array([[1, 0], [0.8, 0.6], [0, 1], [-1, 0]], dtype=np.float32)
    queries = np.array([[1, 0], [0, 1]], dtype=np.float32)
    task = task_of([{1: 1}, {2: 1}], 4)
    assert rank(queries, corpus, task, metrics=["MRR@1"]).per_query["MRR@1"].tolist() == [0, 1]
    found = rank(queries, corpus, replace(task, own_rows=[0, -1]), k=2, metrics=["MRR@1"])
    assert found.per_query["MRR@1"].tolist() == [1, 1] and found.rows.tolist() == [[1, 2], [2, 1]]
    np.testing.assert_allclose(found.negative_score, [0, 0.6])
    deep = rank(queries, corpus, replace(task, own_rows=[0, -1]), metrics=["Recall@9"])  # more than there is
    assert deep.rows.tolist() == [[1, 2, 3, -1], [2, 1, 0, 3]] and deep.per_query["Recall@9"].tolist() == [1, 1]
    whole = measure_costs(queries, corpus, replace(task, own_rows=[0, -1]), k=2, metrics=["MRR@1"])
    assert whole[0].metrics["MRR@1"] == 1


@pytest.mark.parametrize(
    ("queries", "corpus", "message"),
    [
        (np.ones((2, 4)), np.ones((3, 4)), r"vectors of the questions: \(2, 4\); give one row for each of 1"),
        (np.ones((1, 4)), np.ones((2, 4)), "vectors of the passages"),
        (np.ones((1, 4)), np.ones((3, 8)), "4 dimensions and passages 8"),
        (np.full((1, 4), np.nan), np.ones((3, 4)), "NaN"),
    ],
)
def test_vectors_that_do_not_fit(queries: np.ndarray, corpus: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate({"m": (queries.astype(np.float32), corpus.astype(np.float32))}, task_of([{0: 1}], 3))


def test_the_command_on_several_sets(models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, corpus = write_data(tmp_path, WORDS, "one")
    two, other = write_data(tmp_path, "日月盈昃辰宿列张", "two")
    out, cache = tmp_path / "out", tmp_path / "cache"
    words = ["--encoder", *models, "--val_data", one, two, "--corpus", corpus, other, "--output_dir", str(out),
             "--metrics", "MRR@5", "MAP@10", "--embedding_cache_dir", str(cache), "--resamples", "200", "--lang", "zh"]  # fmt: skip
    assert stage.main(words) == 0
    assert "mean of 2 test sets" in capsys.readouterr().out
    metrics = [atomic.read_json(out / name / "metrics.json") for name in ("one", "two")]
    total = atomic.read_json(out / "metrics.json")
    assert total["m1"]["MAP@10"] == pytest.approx(np.mean([of["m1"]["MAP@10"] for of in metrics]))
    lines = atomic.read_json(out / "one/significance.json")
    assert [(line["model"], line["metric"]) for line in lines] == [("m1", "MRR@5"), ("m1", "MAP@10")]
    assert list(lines[0]) == [
        "model", "baseline", "metric", "difference", "low", "high", "p_value", "p_adjusted", "wins", "losses", "ties",
    ]  # fmt: skip
    html = (out / "two/report.html").read_text(encoding="utf-8")
    assert html.count("<svg ") == 3  # recall, and each model's scores
    assert "m0" in html and "m1" in html and "需要留意的" in html and "甲" in html
    assert "| m1 |" in (out / "two/report.md").read_text(encoding="utf-8")

    assert stage.main([*words, "--overwrite_output_dir"]) == 0  # nothing is encoded again
    assert atomic.read_json(out / "manifest.json")["cache"] == {"encoded": 0, "reused": 2 * 32}


def test_a_run_made_elsewhere_scores_as_it_did_here(models: list[str], tmp_path: Path) -> None:
    one, corpus = write_data(tmp_path, WORDS)
    out, again = tmp_path / "out", tmp_path / "again"
    assert stage.main(["--encoder", *models, "--val_data", one, "--corpus", corpus, "--output_dir", str(out)]) == 0
    qrels = tmp_path / "qrels.txt"
    qrels.write_text("".join(f"{i} 0 {i} 1\n" for i in range(8)), encoding="utf-8")
    runs = [str(out / f"run.{name}.trec") for name in ("m0", "m1")]
    assert stage.main(["--run", *runs, "--val_data", str(qrels), "--output_dir", str(again)]) == 0
    for name in ("metrics.json", "significance.json"):
        assert atomic.read_json(again / name) == atomic.read_json(out / name)


def test_costs_and_the_model_card(models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, corpus = write_data(tmp_path, WORDS)
    words = ["--encoder", *models, "--val_data", one, "--corpus", corpus, "--output_dir", str(tmp_path / "out")]
    assert stage.main([*words, "--dims", "32", "16", "--dtypes", "float32", "binary", "--update_model_card"]) == 0
    costs = atomic.read_json(tmp_path / "out/costs.json")
    assert [(line["dimension"], line["type"]) for line in costs["m1"]] == [
        (32, "float32"), (32, "binary"), (16, "float32"), (16, "binary"),
    ]  # fmt: skip
    for model in models:
        assert "| MRR@10 |" in Path(model, "README.md").read_text(encoding="utf-8")
    assert "bytes per passage" in capsys.readouterr().out


REFUSED = {
    "nothing to score": (["--val_data", "v"], "name models to encode with, or --run files"),
    "both": (["--val_data", "v", "--encoder", "m", "--run", "r"], "name models to encode with, or --run files"),
    "k": (["--val_data", "v", "--encoder", "m", "--k", "0"], "--k 0"),
    "metric": (["--val_data", "v", "--encoder", "m", "--metrics", "MRR@0"], "MRR@0"),
    "unknown metric": (["--val_data", "v", "--encoder", "m", "--metrics", "Accuracy"], "Accuracy"),
    "corpora": (["--val_data", "a", "b", "c", "--encoder", "m", "--corpus", "x", "y"], "one for each of 3"),
    "type": (["--val_data", "v", "--encoder", "m", "--dtypes", "int4"], "--dtypes 'int4'"),
    "corpus of a run": (["--val_data", "v", "--run", "r", "--corpus", "c"], "has no meaning with --run"),
    "language of a run": (["--val_data", "v", "--run", "r", "--lang", "zh"], "which writes no report"),
    "card of the hub": (["--val_data", "v", "--encoder", "org/m", "--update_model_card"], "evaluate a local copy"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, message = REFUSED[case]
    assert stage.main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def synthetic(num_queries: int, depth: int, text: str = "问题") -> EvaluationResult:
    rng = np.random.default_rng(0)
    num_rows = 1000
    task = task_of([{int(row): 1} for row in rng.integers(num_rows, size=num_queries)], num_rows)
    task.queries[:] = [f"{text} {i}" for i in range(num_queries)]
    task.corpus[:] = [f"{text} 段落 {i}" for i in range(num_rows)]
    rankings = {}
    for name in ("base", f"tuned {text}"[:40]):
        vectors = rng.standard_normal((num_queries, 4)).astype(np.float32), rng.standard_normal((num_rows, 4))
        rankings[name] = rank(vectors[0], vectors[1].astype(np.float32), task, k=depth, metrics=["MRR@10"])
    return EvaluationResult(task, rankings, resamples=100)


def lookup_of(html: str) -> list[list[Any]]:
    found = re.search(r'<script type="application/json" id="[^"]*">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    rows: list[list[Any]] = json.loads(found[1])
    return rows


def test_no_text_of_a_report_becomes_markup(tmp_path: Path) -> None:
    write_evaluation_report(tmp_path, synthetic(30, 10, EVIL))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html and len(re.findall(r"<script", html)) == 2  # the page's own and the data
    rows = lookup_of(html)
    assert len(rows) == 30 and all(row[0].startswith(EVIL) for row in rows)


def test_however_many_questions_there_are_the_page_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 3 * report.MAX_LETTERS + 20 * report.MAX_LOOKUP < 10e6  # bytes of Chinese, and of the places
    monkeypatch.setattr(report, "MAX_LOOKUP", 50)
    monkeypatch.setattr(report, "MAX_LETTERS", 2000)
    write_evaluation_report(tmp_path, synthetic(80, 10, "很长的问题" * 20))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [len(row[0]) for row in lookup_of(html)] == [40] * 50 and "one of 50 questions (of 80)" in html


def test_training_curves_are_in_the_page(models: list[str], tmp_path: Path) -> None:
    one, corpus = write_data(tmp_path, WORDS)
    atomic.write_jsonl(
        Path(models[1]) / "metrics.jsonl",
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "MRR@10": 0.5}],
    )
    words = ["--encoder", *models, "--val_data", one, "--corpus", corpus, "--output_dir", str(tmp_path / "out")]
    assert stage.main(words) == 0
    html = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "How m1 was trained" in html and "How m0" not in html and html.count("<svg ") == 4


# ------------------------------------------------------------------------------------------------- what could go wrong


def test_a_metric_is_searched_as_deep_as_its_name_says() -> None:
    rng = np.random.default_rng(0)
    corpus = rng.standard_normal((400, 8)).astype(np.float32)
    task = task_of([dict.fromkeys(range(150), 1)], 400)
    query = corpus[:150].mean(axis=0, keepdims=True)
    whole = rank(query, corpus, task, k=400, metrics=["Recall@300", "RPrecision"]).means
    assert rank(query, corpus, task, k=5, metrics=["Recall@300", "RPrecision"]).means == whole
    assert whole["Recall@300"] > 100 / 150
    (line,) = measure_costs(query, corpus, task, k=5, metrics=["Recall@300"])
    assert line.metrics["Recall@300"] == pytest.approx(whole["Recall@300"], abs=0.02)  # there vectors have length 1


@pytest.mark.parametrize(
    ("name", "want"),
    [("bge-large-en-v1.5", "en"), ("x/bge-base-zh", "zh"), ("bank-encoder", "zh"), ("/data/en-zhang/energy", "zh")],
)
def test_the_language_of_a_name(name: str, want: str) -> None:
    assert bge_instruction(name, ["怎么办"]) == BGE_QUERY_INSTRUCTION[want]


def test_odd_answers_names_and_curves_do_not_stop_the_report(models: list[str], tmp_path: Path) -> None:
    rows = [
        {"query": "天是什么", "pos": ["天"], "answer": [42]},
        {"query": "地是什么", "pos": ["地"], "answer": [None]},
    ]
    atomic.write_jsonl(tmp_path / "t.jsonl", rows)
    odd = Path(models[1]).rename(tmp_path / "_a$\\frac$")
    (odd / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', encoding="utf-8")
    words = ["--encoder", models[0], str(odd), "--val_data", str(tmp_path / "t.jsonl")]
    assert stage.main([*words, "--output_dir", str(tmp_path / "out"), "--resamples", "50"]) == 0
    assert "frac" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_an_overwritten_evaluation_leaves_nothing_of_the_one_before(models: list[str], tmp_path: Path) -> None:
    one, corpus = write_data(tmp_path, WORDS)
    common = ["--val_data", one, "--corpus", corpus, "--output_dir", str(tmp_path / "out"), "--resamples", "50"]
    assert stage.main(["--encoder", *models, *common, "--dtypes", "int8"]) == 0
    (tmp_path / "out/notes.txt").write_text("mine")
    assert stage.main(["--encoder", models[0], *common, "--overwrite_output_dir"]) == 0
    left = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not [path for path in left if "m1" in path or path == "costs.json"] and "notes.txt" in left


def test_what_can_be_refused_is_refused_before_encoding(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "task_vectors", None)
    one, corpus = write_data(tmp_path, WORDS)
    common = ["--encoder", models[0], "--val_data", one, "--corpus", corpus]
    (Path(models[0]) / "README.md").write_bytes("中文".encode("gb18030"))
    for flags, message in (
        (["--dims", "4096"], "have 32 dimensions"), (["--dtypes", "binary", "--dims", "12"], "do not divide by 8"),
        (["--index_factories", "NOPE"], "faiss makes no such index"), (["--seed", "-1"], "use 0 or a number above it"),
        (["--update_model_card"], "is not UTF-8"), (["--batch_size", "0"], "use a number above 0"),
    ):  # fmt: skip
        assert stage.main([*common, *flags]) == 2 and message in capsys.readouterr().err


def test_a_model_card_without_the_end_of_the_block_keeps_its_text(models: list[str], tmp_path: Path) -> None:
    one, corpus = write_data(tmp_path, WORDS)
    card = Path(models[0]) / "README.md"
    card.write_text("# m\n\n<!-- evaluation -->\n\nprecious\n", encoding="utf-8")
    words = ["--encoder", models[0], "--val_data", one, "--corpus", corpus, "--resamples", "50"]
    for _ in range(2):
        assert stage.main([*words, "--update_model_card"]) == 0
        text = card.read_text(encoding="utf-8")
        assert "precious" in text and text.count("<!-- evaluation -->") == 1 and "| MRR@10 |" in text


def test_ids_of_a_run_file(models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": name, "query": "天是什么", "pos": ["天"]} for name in ("x y", "x_y")]
    atomic.write_jsonl(tmp_path / "t.jsonl", rows)
    words = ["--encoder", models[0], "--val_data", str(tmp_path / "t.jsonl"), "--output_dir", str(tmp_path / "out")]
    assert stage.main([*words, "--resamples", "50"]) == 0
    lines = (tmp_path / "out/run.m0.trec").read_text(encoding="utf-8").splitlines()
    assert {line.split()[0] for line in lines} == {"x%20y", "x_y"}
    atomic.write_jsonl(tmp_path / "t.jsonl", [{"id": " ", "query": "天", "pos": ["天"]}])
    assert stage.main(words) == 2
