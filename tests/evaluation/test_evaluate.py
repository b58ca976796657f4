"""evaluate.py from its command line: figures by hand and by trec_eval, what it prints, writes and refuses."""

import ast
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytrec_eval
from tiny_model import make_tiny_bert

import evaluate
from bge_core.encoder.load import load_encoder
from bge_core.encoder.settings import EncoderSettings, read_settings, write_settings
from bge_core.evaluation import evaluator, score
from bge_core.evaluation.evaluator import BGE_QUERY_INSTRUCTION, task_vectors
from bge_core.evaluation.tasks import load_task
from bge_core.evaluation.trec import read_qrels, read_run, run_as_ranking
from bge_core.search.cache import EmbeddingCache

Row = dict[str, Any]
NAMES = ["MRR@1", "MRR@10", "MRR@100", "Recall@1", "Recall@10", "Recall@100", "nDCG@10"]


def write_lines(file: Path, rows: list[Row]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def read_lines(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def run(encoders: Path | list[Path], val_data: Path, **settings: Any) -> int:
    """evaluate.py in this process; its exit code."""
    words = [
        "--encoder",
        *map(str, encoders if isinstance(encoders, list) else [encoders]),
        "--val_data",
        str(val_data),
    ]
    for name, value in settings.items():
        words += [f"--{name}", str(value)]
    return evaluate.main(words)


def printed(out: str) -> list[Row]:
    """The dicts on stdout."""
    return [ast.literal_eval(line) for line in out.splitlines() if line.startswith("{")]


# -------------------------------------------------------------------------------------------------------------- by hand

ANGLES = {  # the corpus on a circle, degrees; a question's nearest text is the one with the nearest angle
    "正": 0, "近": 10, "中": 40, "远": 90, "反": 180,
    "问一": 1,  # 正 1, 近 9, 中 39, 远 89, 反 179: ranks 1 to 5 in this order
    "问二": 88,  # 远, 中, 近, 正, 反
}  # fmt: skip


class Texts:
    """An encoder of which only the settings are asked; `vectors` knows the texts."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.embedding_size = EncoderSettings(pooling="cls", normalize=True, **settings), 4

    def to(self, device: Any) -> "Texts":
        return self


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Replaces model and encoding; gives the prompts that were used."""
    prompts: dict[str, str] = {}

    def vectors(encoder: Texts, texts: list[str], *, prompt: str, description: str, **options: Any) -> np.ndarray:
        prompts[description] = prompt
        radians = np.array([math.radians(ANGLES[text]) for text in texts])
        return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)

    monkeypatch.setattr(evaluator, "encode_for_search", vectors)
    monkeypatch.setattr(score, "load_encoder", lambda path, **options: Texts())
    monkeypatch.setattr(score, "settings_of", lambda path: Texts().settings)
    monkeypatch.setattr(score, "fingerprint", lambda encoder: "none")
    return prompts


def test_figures_by_hand(by_hand: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"text": text} for text in ("反", "远", "中", "近", "正")])
    val = write_lines(
        tmp_path / "val.jsonl",
        [
            {"query": "问一", "pos": ["正", "中"]},  # ranks 1 and 3
            {"query": "问二", "pos": ["近"]},  # rank 3
            {"query": "问一", "pos": ["反", "缺"], "id": "apart"},  # rank 5; the other is not in the corpus
        ],
    )
    assert run(tmp_path / "m", val, corpus=corpus) == 0
    (metrics,) = printed(capsys.readouterr().out)
    assert list(metrics) == NAMES
    dcg = {rank: 1 / math.log2(rank + 1) for rank in range(1, 6)}
    want = {
        "MRR@1": (1 + 0 + 0) / 3,
        "MRR@10": (1 + 1 / 3 + 1 / 5) / 3,
        "MRR@100": (1 + 1 / 3 + 1 / 5) / 3,
        "Recall@1": (1 / 2 + 0 + 0) / 3,
        "Recall@10": (1 + 1 + 1 / 2) / 3,  # the missing one counts as a miss
        "Recall@100": (1 + 1 + 1 / 2) / 3,
        "nDCG@10": ((dcg[1] + dcg[3]) / (dcg[1] + dcg[2]) + dcg[3] + dcg[5] / (dcg[1] + dcg[2])) / 3,
    }
    assert metrics == pytest.approx(want, rel=1e-12)
    assert run(tmp_path / "m", val, corpus=corpus, k=2) == 0  # a metric is what its name says
    assert printed(capsys.readouterr().out) == [metrics]


def test_positives_on_several_rows_of_a_question(
    by_hand: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks 1 and 2 of one question are all that there is to find; of two questions they would give .75."""
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"text": text} for text in ("反", "远", "中", "近", "正", "问一")])
    val = write_lines(tmp_path / "val.jsonl", [{"query": "问一", "pos": [text]} for text in ("近", "正")])
    assert run(tmp_path / "m", val, corpus=corpus) == 0  # nor is the question itself in the way
    (metrics,) = printed(capsys.readouterr().out)
    assert metrics == pytest.approx(dict.fromkeys(NAMES, 1.0) | {"Recall@1": 0.5}, rel=1e-12)
    assert run(tmp_path / "m", val, corpus=write_lines(tmp_path / "other.jsonl", [{"text": "中"}])) == 2
    assert "other.jsonl: holds none of the 2 positives of" in capsys.readouterr().err


def test_a_rows_prompt_stands_before_its_question(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [
        {"query": f"问{i}", "pos": ["答"], "prompt": prompt}
        for i, prompt in enumerate([None, "指：", "", "指：", None])
    ]
    task = load_task(write_lines(tmp_path / "val.jsonl", rows))
    encoder, options = load_encoder(tiny_bert), {"query_max_len": 64, "passage_max_len": 64}
    cache = EmbeddingCache(str(tmp_path / "cache"))
    for found in (task_vectors(encoder, task, query_prompt="流：", **options),
                  task_vectors(encoder, task, query_prompt="流：", cache=cache, **options)):  # fmt: skip
        want = encoder.encode(["流：问0", "指：问1", "问2", "指：问3", "流：问4"])
        np.testing.assert_allclose(found[0], want, atol=1e-6)


def test_missing_positives_are_counted_and_named(
    by_hand: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"text": "正"}, {"text": " 正 "}, {"text": "近"}])
    rows = [{"query": "问一", "pos": [" 正", "缺一"]}, {"query": "问二", "pos": ["缺一", "缺二"]}]
    val = write_lines(tmp_path / "val.jsonl", rows)
    assert run(tmp_path / "m", val, corpus=corpus, output_dir=tmp_path / "out") == 0
    assert f"{corpus} lacks 2 positives of {val}" in caplog.text and "缺一" in caplog.text and "缺二" in caplog.text
    assert "1 repeated texts" in caplog.text  # equal as normalized text
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["missing_positives"] == 2
    first, second = read_lines(tmp_path / "out" / "per_query.jsonl")
    assert first["MRR@1"] == 1 and first["Recall@100"] == 0.5 and second["MRR@100"] == second["nDCG@10"] == 0


def test_the_default_corpus_is_pos_and_neg_of_the_data(by_hand: dict[str, str], tmp_path: Path) -> None:
    rows = [{"query": "问一", "pos": ["正"], "neg": ["远", "近"]}, {"query": "问二", "pos": ["近"], "neg": ["正"]}]
    val = write_lines(tmp_path / "val.jsonl", rows)
    assert run(tmp_path / "m", val, output_dir=tmp_path / "out") == 0
    trec = (tmp_path / "out" / "run.m.trec").read_text(encoding="utf-8").splitlines()
    assert [line.split()[:4] for line in trec[:3]] == [
        ["0", "Q0", "0", "1"],
        ["0", "Q0", "2", "2"],
        ["0", "Q0", "1", "3"],
    ]
    assert len(trec) == 6  # k = 100, but three texts
    assert [row["query_id"] for row in read_lines(tmp_path / "out" / "per_query.jsonl")] == ["0", "1"]


STORED = EncoderSettings(query_prompt="存：", passage_prompt="文：")
INSTRUCTIONS: list[tuple[str, EncoderSettings, Row, tuple[str, str]]] = [
    ("m", STORED, {}, ("", "")),
    ("m", STORED, {"add_instruction": True}, ("存：", "文：")),
    ("m", EncoderSettings(query_prompt=""), {"add_instruction": True}, ("", "")),  # stated: none
    ("my-en-model", EncoderSettings(), {"add_instruction": True}, (BGE_QUERY_INSTRUCTION["en"], "")),
    ("bge-large-zh-v1.5", EncoderSettings(), {"add_instruction": True}, (BGE_QUERY_INSTRUCTION["zh"], "")),
    ("m", EncoderSettings(), {"add_instruction": True}, (BGE_QUERY_INSTRUCTION["zh"], "")),  # by the questions
    ("m", STORED, {"add_instruction": True, "query_instruction_for_retrieval": "旗："}, ("旗：", "文：")),
    ("m", STORED, {"add_instruction": True, "passage_instruction_for_retrieval": ""}, ("存：", "")),
    ("m", STORED, {"query_instruction_for_retrieval": "旗："}, ("旗：", "")),
]


@pytest.mark.parametrize("name, stored, settings, want", INSTRUCTIONS)
def test_instructions(
    by_hand: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    name: str, stored: EncoderSettings, settings: Row, want: tuple[str, str],
) -> None:  # fmt: skip
    prompts = {"query_prompt": stored.query_prompt, "passage_prompt": stored.passage_prompt}
    monkeypatch.setattr(score, "load_encoder", lambda path, **options: Texts(**prompts))
    val = write_lines(tmp_path / "val.jsonl", [{"query": "问一", "pos": ["正"]}])
    assert run(Path("models") / name, val, output_dir=tmp_path / "out", **settings) == 0
    assert (by_hand["queries"], by_hand["corpus"]) == want
    assert f"query instruction {want[0]!r}" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    (used,) = manifest["encoders"].values()
    assert (used["query_instruction"], used["passage_instruction"]) == want


# -------------------------------------------------------------------------------------------------------- by trec_eval


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Row]:
    """40 questions over 150 texts; ids of their own, 1 to 12 positives, some of which the corpus lacks."""
    folder = tmp_path_factory.mktemp("retrieval")
    rng = np.random.default_rng(0)
    characters = list("信用卡贷款密码快递退款酒店签证机票会员物流账户订单怎么办理申请取消查询")
    texts = list(dict.fromkeys("".join(rng.choice(characters, size=rng.integers(4, 30))) for _ in range(160)))
    corpus = write_lines(folder / "corpus.jsonl", [{"id": f"d{i}", "text": text} for i, text in enumerate(texts[:150])])
    rows: list[Row] = []
    relevant: Row = {}
    for i in range(40):
        own = rng.choice(len(texts), size=1 + i % 12, replace=False).tolist()
        rows.append({"id": f"q{i}", "query": texts[own[0]][:6] + "吗", "pos": [texts[j] for j in own]})
        relevant[f"q{i}"] = {f"d{j}": 1 for j in own}
    return write_lines(folder / "val.jsonl", rows), corpus, relevant


@pytest.fixture(scope="module")
def evaluated(
    retrieval: tuple[Path, Path, Row], tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Path]]:
    """Two models of the same folder name, evaluated. Read only."""
    val, corpus, _ = retrieval
    folder = tmp_path_factory.mktemp("evaluated")
    models = [folder / "one" / "tuned", folder / "two" / "tuned"]
    shutil.copytree(tiny_bert, models[0])
    make_tiny_bert(models[1], seed=1)
    assert run(models, val, corpus=corpus, output_dir=folder / "out") == 0
    return folder / "out", models


def test_files_of_an_evaluation(evaluated: tuple[Path, list[Path]], retrieval: tuple[Path, Path, Row]) -> None:
    folder, models = evaluated
    val, corpus, _ = retrieval
    assert set(os.listdir(folder)) == {
        "metrics.json", "per_query.jsonl", "run.tuned.trec", "run.tuned-2.trec", "manifest.json",
        "significance.json", "report.html", "report.md",
    }  # fmt: skip
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert list(metrics) == ["tuned", "tuned-2"] and metrics["tuned"] != metrics["tuned-2"]
    rows = read_lines(folder / "per_query.jsonl")
    questions = read_lines(val)
    assert len(rows) == 80
    for name, part in (("tuned", rows[:40]), ("tuned-2", rows[40:])):
        assert list(metrics[name]) == NAMES
        for row, question in zip(part, questions, strict=True):
            assert list(row) == ["model", "query_id", "query", *NAMES]
            assert (row["model"], row["query_id"], row["query"]) == (name, question["id"], question["query"])
        for metric in NAMES:
            assert metrics[name][metric] == pytest.approx(np.mean([row[metric] for row in part]), rel=1e-12)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["stage"] == "evaluate" and [entry["path"] for entry in manifest["inputs"]] == [
        str(val),
        str(corpus),
    ]
    assert {name: used["model"] for name, used in manifest["encoders"].items()} == {
        "tuned": str(models[0]),
        "tuned-2": str(models[1]),
    }
    assert manifest["encoders"]["tuned"]["pooling"] == "cls" and manifest["missing_positives"] > 0


@pytest.mark.parametrize("name", ["tuned", "tuned-2"])
def test_trec_eval_finds_the_same(
    evaluated: tuple[Path, list[Path]], retrieval: tuple[Path, Path, Row], name: str
) -> None:
    folder, _ = evaluated
    with open(folder / f"run.{name}.trec", encoding="utf-8") as file:
        ranking = pytrec_eval.parse_run(file)
    assert all(len(found) == 100 for found in ranking.values()) and len(ranking) == 40
    measures = {"recip_rank", "recall.1,10,100", "ndcg_cut.10"}
    truth = pytrec_eval.RelevanceEvaluator(retrieval[2], measures).evaluate(ranking)
    ours = {"recip_rank": "MRR@100", "recall_1": "Recall@1", "recall_10": "Recall@10", "recall_100": "Recall@100"}
    for row in read_lines(folder / "per_query.jsonl"):
        if row["model"] == name:
            for theirs, metric in (ours | {"ndcg_cut_10": "nDCG@10"}).items():
                assert row[metric] == pytest.approx(truth[row["query_id"]][theirs], abs=1e-9), metric
            assert row["MRR@10"] == (row["MRR@100"] if row["MRR@100"] >= 0.1 else 0)
            assert row["MRR@1"] == (row["MRR@100"] == 1)


@pytest.mark.parametrize("space", ["", " "])
def test_a_run_scored_elsewhere_gives_the_printed_figures(tiny_bert: Path, tmp_path: Path, space: str) -> None:
    """Texts stand under two and three ids, of which some, one or none is judged; an id may hold a space, too."""
    rng = np.random.default_rng(1)
    folder, out = tmp_path / "set", tmp_path / "out"
    (folder / "qrels").mkdir(parents=True)
    texts = ["".join(rng.choice(list("信用卡贷款密码快递退款酒店签证"), size=5)) for _ in range(40)]
    write_lines(folder / "corpus.jsonl", [{"_id": f"d{space}{i}", "text": texts[i % 40]} for i in range(100)])
    write_lines(folder / "queries.jsonl", [{"_id": f"q{space}{i}", "text": texts[i][:4]} for i in range(20)])
    judged = [(i, d, rng.integers(0, 4)) for i in range(20) for d in {*rng.choice(100, size=6), i, i + 40}]
    lines = [f"q{space}{i}\td{space}{d}\t{grade}\n" for i, d, grade in judged]
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines), encoding="utf-8")
    names = ["MRR@100", "Recall@5", "nDCG@10", "MAP@100", "Precision@5"]
    words = ["--val_data", str(folder), "--encoder", str(tiny_bert), "--metrics", *names, "--output_dir", str(out)]
    assert evaluate.main(words) == 0
    (printed_here,) = json.loads((out / "metrics.json").read_text()).values()
    words = ["--run", str(next(out.glob("run.*"))), "--val_data", str(folder / "qrels/test.tsv"), "--metrics", *names]
    assert evaluate.main([*words, "--output_dir", str(tmp_path / "again")]) == 0
    (scored,) = json.loads((tmp_path / "again/metrics.json").read_text()).values()
    assert scored == printed_here
    if not space:
        qrels: dict[str, dict[str, int]] = {}
        for i, d, grade in judged:
            qrels.setdefault(f"q{i}", {})[f"d{d}"] = int(grade)
        with open(next(out.glob("run.*")), encoding="utf-8") as file:
            ranking = pytrec_eval.parse_run(file)
        measures = {"recip_rank", "recall.5", "ndcg_cut.10", "map_cut.100", "P.5"}
        truth = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(ranking)
        for name, theirs in zip(names, ("recip_rank", "recall_5", "ndcg_cut_10", "map_cut_100", "P_5"), strict=True):
            assert printed_here[name] == pytest.approx(np.mean([of[theirs] for of in truth.values()]), abs=1e-9), name


def test_several_models_are_compared(
    evaluated: tuple[Path, list[Path]], retrieval: tuple[Path, Path, Row], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, models = evaluated
    want = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert run(models, retrieval[0], corpus=retrieval[1]) == 0
    out = capsys.readouterr().out
    assert printed(out) == [want["tuned"], want["tuned-2"]]
    header, *lines = out[out.index("model ") :].splitlines()
    assert header.split() == ["model", *NAMES]
    found = {words[3]: float(words[4]) for words in map(str.split, lines) if words[:3] == ["tuned-2", "-", "tuned"]}
    assert found == pytest.approx({name: want["tuned-2"][name] - want["tuned"][name] for name in NAMES}, abs=6e-5)
    assert run(models[:1], retrieval[0], corpus=retrieval[1]) == 0
    assert "model " not in capsys.readouterr().out


def test_trec_files_have_six_columns(by_hand: dict[str, str], tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"id": "text 1", "text": "正"}])
    val = write_lines(tmp_path / "val.jsonl", [{"id": "question 1", "query": "问一", "pos": ["正"]}])
    assert run(tmp_path / "my model", val, corpus=corpus, output_dir=tmp_path / "out") == 0
    (file,) = (tmp_path / "out").glob("run.*.trec")
    assert [len(line.split()) for line in file.read_text(encoding="utf-8").splitlines()] == [6]


def test_trec_files_keep_the_order_of_ties(
    by_hand: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal vectors rank by corpus order; trec_eval sorts by the score, then by falling id."""
    monkeypatch.setitem(ANGLES, "近", ANGLES["远"])
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"id": "a", "text": "远"}, {"id": "b", "text": "近"}])
    val = write_lines(tmp_path / "val.jsonl", [{"id": "q", "query": "问一", "pos": ["远"]}])
    assert run(tmp_path / "m", val, corpus=corpus, output_dir=tmp_path / "out") == 0
    (row,) = read_lines(tmp_path / "out" / "per_query.jsonl")
    with open(tmp_path / "out" / "run.m.trec", encoding="utf-8") as file:
        truth = pytrec_eval.RelevanceEvaluator({"q": {"a": 1}}, {"recip_rank"}).evaluate(pytrec_eval.parse_run(file))
    assert row["MRR@100"] == 1 == truth["q"]["recip_rank"]


def test_repeated_ids_are_refused(by_hand: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    val = write_lines(tmp_path / "val.jsonl", [{"id": "q", "query": "问一", "pos": [text]} for text in ("正", "远")])
    assert run(tmp_path / "m", val) == 2
    assert "'q'" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- names, and refusals


@pytest.mark.parametrize(
    "paths, names",
    [
        (["a/m", "b/n/"], ["m", "n"]),
        (["a/m", "b/m"], ["m", "m-2"]),
        (["a/m", "b/m", "c/m"], ["m", "m-2", "m-3"]),
        (["m-2", "a/m"], ["m-2", "m"]),
        (["run/checkpoint-500", "run/checkpoint-1000"], ["checkpoint-500", "checkpoint-1000"]),
        (["x/bge", "y/bge", "bge-2"], ["bge", "bge-2", "bge-2-2"]),
    ],
)
def test_names_are_the_last_folders_made_unique(paths: list[str], names: list[str]) -> None:
    assert score.unique_names(paths) == names


def test_pooling_is_the_models_own_unless_told(
    tiny_bert: Path, retrieval: tuple[Path, Path, Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "mean"
    shutil.copytree(tiny_bert, model)
    write_settings(model, EncoderSettings(pooling="mean", normalize=True, query_prompt="问："), 32)
    assert read_settings(model).pooling == "mean"
    val, corpus, _ = retrieval
    figures = []
    for settings in ({}, {"pooling_method": "mean"}, {"pooling_method": "cls"}, {"add_instruction": True}):
        assert run(model, val, corpus=corpus, **settings) == 0
        out = capsys.readouterr().out
        assert f"({settings.get('pooling_method', 'mean')} pooling" in out
        figures += printed(out)
    own, mean, cls, instructed = figures
    assert own == mean and own != cls and own != instructed


def test_what_evaluate_refuses(
    tiny_bert: Path, retrieval: tuple[Path, Path, Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = retrieval[0]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("mine")
    bad = write_lines(tmp_path / "bad.jsonl", [{"query": "a", "pos": ["b"]}, {"query": "a", "pos": "b"}])
    bad_corpus = write_lines(tmp_path / "bad_corpus.jsonl", [{"text": "a"}, {"text": 3}])
    empty = write_lines(tmp_path / "empty.jsonl", [])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for model, data, settings, words in (
        (tiny_bert, val, {"output_dir": tmp_path / "full"}, ["is not empty", "thesis.txt", "--overwrite_output_dir"]),
        (tiny_bert, val, {"output_dir": tmp_path / "file"}, ["is a file"]),
        (tiny_bert, val, {"output_dir": tmp_path / "file" / "out"}, ["cannot be written"]),
        (tiny_bert, bad, {}, [f"{bad}:2:", "'pos'", 'as ["b"]']),
        (tiny_bert, val, {"corpus": bad_corpus}, [f"{bad_corpus}:2:", "'text'"]),
        (tiny_bert, empty, {}, ["holds no row"]),
        (tiny_bert, val, {"corpus": empty}, ["holds no row"]),
        (tiny_bert, tmp_path / "none.jsonl", {}, ["none.jsonl: no such file"]),
        (tmp_path, val, {}, ["not a model folder"]),
        (tiny_bert, val, {"k": 0}, ["--k 0"]),
        (tiny_bert, val, {"fp16": True, "bf16": True}, ["choose one"]),
        (tiny_bert, val, {"top_k": 3}, ["unknown flag --top_k"]),
    ):
        assert run(model, data, **settings) == 2
        out, err = capsys.readouterr()
        assert ("\n" + err).count("\nerror: ") == 1 and "Traceback" not in err and all(word in err for word in words), (
            err
        )
        assert out == ""
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_overwriting_replaces_its_own_files_only(
    by_hand: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = write_lines(tmp_path / "val.jsonl", [{"query": "问一", "pos": ["正"]}])
    for flags in ({}, {"overwrite_output_dir": True}):
        assert run(tmp_path / "m", val, output_dir=tmp_path / "out", **flags) == 0
        (tmp_path / "out" / "notes.txt").write_text("mine")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".")]


def test_a_second_evaluation_from_the_cache_encodes_nothing(tiny_bert: Path, tmp_path: Path) -> None:
    data = write_lines(
        tmp_path / "test.jsonl", [{"query": "密码", "pos": ["账户密码"]}, {"query": "天气", "pos": ["下雨"]}]
    )
    folders = [tmp_path / name for name in ("none", "first", "second")]
    for folder in folders:
        more = {} if folder is folders[0] else {"cache_dir": tmp_path / "cache"}
        assert run(tiny_bert, data, output_dir=folder, k=5 if folder is folders[2] else 2, **more) == 0
    scores = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    caches = [json.loads((folder / "manifest.json").read_text()).get("cache") for folder in folders]
    assert scores[0] == scores[1]
    assert caches == [None, {"encoded": 4, "reused": 0}, {"encoded": 0, "reused": 4}]


def test_a_beir_folder_is_a_test_set(
    by_hand: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "circle"
    (folder / "qrels").mkdir(parents=True)
    write_lines(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate("正近中远反")])
    write_lines(folder / "queries.jsonl", [{"_id": f"q{i}", "text": text} for i, text in enumerate(("问二", "问一"))])
    qrels = folder / "qrels" / "test.tsv"
    qrels.write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td0\t0\nq1\td9\t1\n", encoding="utf-8")
    assert run(tmp_path / "m", folder, output_dir=tmp_path / "out") == 0
    (metrics,) = printed(capsys.readouterr().out)
    assert metrics["MRR@10"] == 0.5 and metrics["Recall@10"] == 0.5  # of q1 alone: d1 is second, d9 is nowhere
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    files = [folder / "queries.jsonl", qrels, folder / "corpus.jsonl"]
    assert [(entry["path"], entry["rows"]) for entry in manifest["inputs"]] == list(
        zip(map(str, files), (1, 3, 5), strict=True)
    )
    assert manifest["missing_positives"] == 1

    ids, ranked, relevant, missing = run_as_ranking(read_run(tmp_path / "out" / "run.m.trec"), read_qrels(qrels))
    assert (ids, ranked[0].tolist(), relevant, missing) == (["q1"], [0, 1, 2, 3, 4], [{1: 1, 0: 0}], [[1]])
