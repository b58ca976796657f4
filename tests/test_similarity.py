"""The score that a folder states, cosine or inner product, is the score in every stage: numpy's and sentence-transformers'."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from tiny_model import make_tiny_bert

import evaluate
import merge
import mine
from bge_core.encoder.load import load_encoder
from bge_core.encoder.settings import EncoderSettings, read_settings, write_settings
from bge_core.files import atomic

Stated = tuple[str | None, bool]
ABSENT = "absent"
# What config_sentence_transformers.json says (None: null, ABSENT: no such file), and whether a Normalize module stands.
STATED: list[Stated] = [
    ("cosine", False), ("dot", False), (None, False), (ABSENT, False), ("cosine", True), ("dot", True), (None, True),
]  # fmt: skip
each = pytest.mark.parametrize("stated", STATED, ids=lambda stated: f"{stated[0]}-{'unit' if stated[1] else 'free'}")
# MRR@10 of sentence-transformers 6.2, InformationRetrievalEvaluator(main_score_function=None), on these folders.
MRR = {"cosine": 0.125, "dot": 0.15014880952380952}
TOPICS = ("信用卡", "贷款", "密码", "快递", "退款", "酒店", "签证", "机票")
PASSAGES = [
    f"{topic}{verb}" + "，请带证件到柜台" * (i % 4)
    for i, topic in enumerate(TOPICS)
    for verb in ("办理", "查询", "取消")
]
QUESTIONS = [f"怎么{verb}{topic}" for topic in TOPICS for verb in ("办理", "查询", "取消")]


def scored_by(stated: Stated) -> str:
    return "dot" if stated == ("dot", False) else "cosine"


def make(folder: Path, stated: Stated, seed: int = 0) -> str:
    similarity, normalize = stated
    make_tiny_bert(folder, seed=seed)
    write_settings(folder, EncoderSettings("mean", normalize), 32)
    file = folder / "config_sentence_transformers.json"
    if similarity == ABSENT:
        file.unlink()
    else:
        said = json.loads(file.read_text(encoding="utf-8")) | {"similarity_fn_name": similarity}
        file.write_text(json.dumps(said), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"query": query, "pos": [text], "neg": []} for query, text in zip(QUESTIONS, PASSAGES, strict=True)]
    atomic.write_jsonl(folder / "rows.jsonl", rows)
    atomic.write_jsonl(folder / "corpus.jsonl", [{"text": text} for text in PASSAGES])
    return folder


def numpy_scores(model: str, similarity: str) -> np.ndarray:
    """(Q, N), in float64, of the vectors as the folder gives them."""
    encoder = load_encoder(model)
    query_QD, passage_ND = (encoder.encode(texts).astype(np.float64) for texts in (QUESTIONS, PASSAGES))
    if similarity == "cosine":
        query_QD, passage_ND = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (query_QD, passage_ND))
    return query_QD @ passage_ND.T


def run_evaluate(models: list[str], data: Path, out: Path, *more: str) -> dict[str, Any]:
    words = ["--val_data", str(data / "rows.jsonl"), "--corpus", str(data / "corpus.jsonl"), "--resamples", "50"]
    assert evaluate.main(["--encoder", *models, *words, "--metrics", "MRR@10", "--output_dir", str(out), *more]) == 0
    return atomic.read_json(out / "metrics.json") or {}


@each
def test_evaluate(stated: Stated, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Metric, ranking, scores, thresholds and what smaller vectors cost."""
    model, similarity = make(tmp_path / "m", stated), scored_by(stated)
    flags = ["--dims", "32", "16", "--dtypes", "float32", "--index_factories", "Flat"]
    found = run_evaluate([model], data, tmp_path / "out", *flags)
    assert found["m"]["MRR@10"] == pytest.approx(MRR[similarity], abs=1e-9)
    score_QN = numpy_scores(model, similarity)
    best = [line.split() for line in (tmp_path / "out/run.m.trec").read_text().splitlines() if line.split()[3] == "1"]
    assert [int(line[2]) for line in best] == score_QN.argmax(axis=1).tolist()
    np.testing.assert_allclose([float(line[4]) for line in best], score_QN.max(axis=1), rtol=1e-5)
    whole, half, index = (line["MRR@10"] for line in atomic.read_json(tmp_path / "out/costs.json")["m"])
    assert whole == index == found["m"]["MRR@10"] != half
    used = atomic.read_json(tmp_path / "out/manifest.json")["encoders"]["m"]
    assert used["similarity"] == similarity and (", dot scores, " in capsys.readouterr().out) == (similarity == "dot")


@each
def test_mine(stated: Stated, data: Path, tmp_path: Path) -> None:
    """The top 5, the scores that filters compare, and a teacher's."""
    model, similarity = make(tmp_path / "m", stated), scored_by(stated)
    score_QN = numpy_scores(model, similarity)
    limit = float(np.median(score_QN))
    words = ["--model_name_or_path", model, "--input_file", str(data / "rows.jsonl"), "--candidate_pool",
             str(data / "corpus.jsonl"), "--output_file", str(tmp_path / "mined.jsonl"), "--negative_number", "5"]  # fmt: skip
    words += ["--teacher_encoder", model, "--teacher_temperature", "1", "--max_score", str(limit)]
    words += ["--range_for_sampling", f"0-{len(PASSAGES)}", "--sampling", "top"]
    assert (
        mine.main([*words, *(f"--guard_{name}=False" for name in ("identical", "near_duplicates", "same_questions"))])
        == 0
    )
    for i, row in enumerate(runs.read_lines(tmp_path / "mined.jsonl")):
        allowed = [n for n in np.argsort(-score_QN[i]).tolist() if n != i and score_QN[i, n] <= limit]
        assert row["neg"] == [PASSAGES[n] for n in allowed[:5]]
        np.testing.assert_allclose(row["pos_scores"] + row["neg_scores"], score_QN[i, [i, *allowed[:5]]], rtol=1e-5)


@pytest.mark.parametrize(
    ("stated", "normalize", "similarity", "said"),
    [
        (("cosine", False), True, "cosine", ""),
        (("dot", True), True, "dot", ""),
        (("dot", False), True, "dot", "states dot scores; here they are cosine"),
        (("cosine", False), False, "dot", "states cosine scores; here they are dot"),
    ],
)
def test_train(
    stated: Stated, normalize: bool, similarity: str, said: str, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    """What changes is said; the evaluation while training, the saved folder and evaluate.py score alike."""
    model, out = make(tmp_path / "m", stated), tmp_path / "run"
    flags = {"normalize_embeddings": normalize, "max_steps": 1, "learning_rate": 1e-9, "temperature": 1.0,
             "val_data": data / "rows.jsonl", "val_corpus": data / "corpus.jsonl"}  # fmt: skip
    assert runs.run(Path(model), data / "rows.jsonl", out, **flags) == 0
    assert [line for line in caplog.messages if " scores; " in line] == [f"{model} {said}"] * bool(said)
    settings = read_settings(out)
    assert (settings.similarity, settings.normalize) == (similarity, normalize)
    found = run_evaluate([str(out)], data, tmp_path / "eval")["run"]["MRR@10"]
    assert found == runs.read_lines(out / "metrics.jsonl")[-1]["MRR@10"] == pytest.approx(MRR[settings.scored_by])


@pytest.mark.parametrize("stated", [("cosine", False), ("dot", False), (None, False), ("dot", True)])
def test_merge_and_sweep(stated: Stated, data: Path, tmp_path: Path) -> None:
    """The merged folder states what the models state, and weight 0 is exactly the first model's figure."""
    models = [make(tmp_path / f"m{seed}", stated, seed) for seed in (0, 1)]
    words = ["--models", *models, "--sweep", "0:1:1", "--val_data", str(data / "rows.jsonl"), "--corpus",
             str(data / "corpus.jsonl"), "--output_path", str(tmp_path / "out")]  # fmt: skip
    assert merge.main(words) == 0
    of = run_evaluate(models, data, tmp_path / "eval")
    figures = [line["domain"] for line in (atomic.read_json(tmp_path / "out/sweep.json") or {})["weights"]]
    assert figures == [of["m0"]["MRR@10"], of["m1"]["MRR@10"]] and figures[0] == pytest.approx(MRR[scored_by(stated)])
    merged, first = read_settings(tmp_path / "out"), read_settings(models[0])
    assert (merged.similarity, merged.normalize) == (first.similarity, first.normalize)


def test_each_model_is_scored_as_it_states_and_a_word_says_where_that_differs(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From one cache, too, which keeps their vectors apart."""
    models = [make(tmp_path / name, (name, False)) for name in ("cosine", "dot")]
    cache = ["--embedding_cache_dir", str(tmp_path / "cache")]
    assert {name: of["MRR@10"] for name, of in run_evaluate(models, data, tmp_path / "out", *cache).items()} == MRR
    said = "scored as each model states, which differs: cosine by cosine, dot by dot"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "which differs: cosine by cosine, dot by dot" in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    run_evaluate([models[0], models[0]], data, tmp_path / "alike")
    assert "which differs" not in capsys.readouterr().out + (tmp_path / "alike/report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("similarity", ["euclidean", "manhattan"])
def test_other_similarities_are_refused_in_every_stage(
    similarity: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, rows, out = make(tmp_path / "m", (similarity, False)), str(data / "rows.jsonl"), str(tmp_path / "out")
    good = make(tmp_path / "good", ("cosine", True))
    mining = ["--model_name_or_path", model, "--input_file", rows, "--output_file", f"{out}.jsonl"]
    for stage in (
        lambda: evaluate.main(["--encoder", good, model, "--val_data", rows, "--output_dir", out]),
        lambda: mine.main(mining),
        lambda: runs.run(Path(model), Path(rows), Path(out)),
        lambda: merge.main(["--models", model, model, "--output_path", out]),
    ):
        assert stage() == 2
        shown, error = capsys.readouterr()
        assert (
            shown == ""
            and f"{model}: states the similarity '{similarity}'" in error
            and '"similarity_fn_name": "cosine"' in error
        )
        assert not Path(out).exists() or not list(Path(out).iterdir())
