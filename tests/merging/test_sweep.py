"""The sweep over merge weights: which ones, which is chosen, and that an interrupted one goes on."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_model import make_tiny_bert

import merge
from bge_core import UserError
from bge_core.encoder.load import load_encoder
from bge_core.files import atomic
from bge_core.merging import choose, compare, model_folders
from bge_core.merging.sweep import Sweep, parse_sweep, sweep
from bge_core.search import cache

Scores = dict[float, dict[str, list[float]]]


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("0:1:0.1", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ("-0.5:1.5:0.5", [-0.5, 0.0, 0.5, 1.0, 1.5]),
        ("0:1:0.3", [0.0, 0.3, 0.6, 0.9]),
        ("1:0:-0.5", [1.0, 0.5, 0.0]),
    ],
)
def test_the_weights_of_a_sweep(text: str, weights: list[float]) -> None:
    assert parse_sweep(text) == weights


@pytest.mark.parametrize(
    "text", ["", "0:1", "0:1:0", "a:b:c", "0:1:-0.1", "0:1:0.001", "0:1:inf", "nan:1:0.1", "0:0:1"]
)
def test_no_sweep(text: str) -> None:
    with pytest.raises(UserError, match="--sweep"):
        parse_sweep(text)


def run(scores: Scores, tmp_path: Path, key: str = "k", **options: Any) -> tuple[Sweep, list[float]]:
    """The result, and the weights that were merged and measured."""
    merged: list[float] = []

    def write(weight: float, folder: str) -> None:
        merged.append(weight)
        Path(folder).mkdir()
        Path(folder, "weight").write_text(str(weight))

    def score(folder: str) -> dict[str, np.ndarray]:
        found = scores[float(Path(folder, "weight").read_text())]
        return {name: np.array(values) for name, values in found.items()}

    weights = [weight for weight in scores if weight or options.get("base")]
    options.pop("base", None)
    result = sweep(weights, write, score, tmp_path / "s.json", key=key, metric="MRR@10", resamples=500, **options)
    assert not list(tmp_path.glob(".*")), "a model was left behind"
    return result, merged


GOOD, BAD = [0.5, 1.0, 0.5, 1.0] * 10, [0.2, 0.7, 0.2, 0.7] * 10  # every question of BAD is worse by 0.3


def test_the_best_domain_score_without_a_significant_general_loss(tmp_path: Path) -> None:
    flip = [0.5, 1.0, 0.6, 0.9] * 10  # differs from GOOD by +0.1 and -0.1: no loss that could be shown
    scores: Scores = {
        0.0: {"domain": [0.3] * 40, "general": GOOD}, 0.5: {"domain": [0.6] * 40, "general": flip},
        1.0: {"domain": [0.9] * 40, "general": BAD},
    }  # fmt: skip
    result, merged = run(scores, tmp_path)
    assert result.chosen == 0.5 and merged == [0.0, 0.5, 1.0]  # the base is measured unasked
    assert result.points[1.0]["domain"].difference == pytest.approx(0.6) and result.points[1.0]["general"].high < 0
    assert result.points[0.5]["general"].low < 0 < result.points[0.5]["general"].high
    assert [line.endswith("chosen") for line in result.table().splitlines()[2:]] == [False, True, False]


def test_a_weighted_mean_chooses_otherwise(tmp_path: Path) -> None:
    scores: Scores = {
        0.0: {"domain": [0.3] * 40, "general": GOOD}, 1.0: {"domain": [0.9] * 40, "general": BAD},
    }  # fmt: skip
    assert run(scores, tmp_path, general_weight=0.5)[0].chosen == 1.0  # 0.675 against 0.525
    assert run(scores, tmp_path, general_weight=0.9)[0].chosen == 0.0  # 0.495 against 0.705


def test_without_general_questions_and_of_equal_ones_the_smallest(tmp_path: Path) -> None:
    scores: Scores = {0.0: {"domain": [0.5]}, 0.5: {"domain": [0.8]}, 1.0: {"domain": [0.8]}}
    result, _ = run(scores, tmp_path)
    assert result.chosen == 0.5 and result.rule == "best domain score"


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    scores: Scores = {0.0: {"domain": [0.5, 0.1]}, 0.5: {"domain": [0.8, 0.2]}}
    first, merged = run(scores, tmp_path)
    assert merged == [0.0, 0.5]
    more = scores | {1.0: {"domain": [0.9, 0.9]}}
    second, merged = run(more, tmp_path)
    assert merged == [1.0] and second.points.items() > first.points.items() and second.chosen == 1.0
    _, merged = run(more, tmp_path, key="other data")
    assert merged == [0.0, 0.5, 1.0]


def test_an_interrupted_sweep_keeps_what_it_has(tmp_path: Path) -> None:
    scores: Scores = {0.0: {"domain": [0.5]}, 0.5: {"domain": [0.8]}}
    with pytest.raises(AttributeError):
        run(scores | {1.0: None}, tmp_path)  # type: ignore[dict-item]
    assert not list(tmp_path.glob(".*"))
    assert run(scores | {1.0: {"domain": [0.1]}}, tmp_path)[1] == [1.0]


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    return [str(make_tiny_bert(tmp_path / f"m{seed}", seed=seed)) for seed in (0, 1)]


def questions(path: Path, words: str) -> str:
    rows = [{"query": f"{word}是什么", "pos": [f"{word}是一种东西"]} for word in words]
    atomic.write_jsonl(path, rows)
    return str(path)


def test_the_command(models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    domain, general = questions(tmp_path / "d.jsonl", "天地玄黄"), questions(tmp_path / "g.jsonl", "宇宙洪荒")
    out = tmp_path / "out"
    words = ["--models", *models, "--sweep", "0:1:0.5", "--val_data", domain, "--general_data", general,
             "--output_path", str(out), "--max_input_length", "16"]  # fmt: skip
    assert merge.main(words) == 0
    shown = capsys.readouterr().out
    found = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    assert [line["weight"] for line in found["weights"]] == [0.0, 0.5, 1.0] and "chosen" in shown
    share = found["chosen"]
    states = [load_file(Path(model, "model.safetensors")) for model in models]
    for name, value in load_file(out / "model.safetensors").items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (1 - share) * states[0][name] + share * states[1][name])
    assert (out / "sweep.png").stat().st_size > 5000 and (out / "sweep_scores.json").exists()
    assert not (tmp_path / "out.sweep_scores.json").exists() and not list(tmp_path.glob(".*"))
    assert atomic.read_json(out / "manifest.json")["sweep"]["chosen"] == share


def test_a_corpus_that_two_sets_share_is_encoded_once(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []

    def encode(encoder: object, texts: list[str], **options: object) -> np.ndarray:
        encoded.extend(texts)
        return encode_all(encoder, texts, **options)  # type: ignore[no-any-return]

    encode_all = cache.encode_for_search  # type: ignore[attr-defined]
    monkeypatch.setattr(cache, "encode_for_search", encode)
    corpus = tmp_path / "corpus.jsonl"
    atomic.write_jsonl(corpus, [{"text": f"{word}是一种东西"} for word in "天地玄黄宇宙洪荒"])
    words = ["--models", *models, "--sweep", "0:1:1", "--output_path", str(tmp_path / "out"), "--general_data",
             questions(tmp_path / "g.jsonl", "宇宙洪荒"), "--general_corpus", str(corpus), "--val_data",
             questions(tmp_path / "d.jsonl", "天地玄黄"), "--corpus", str(corpus)]  # fmt: skip
    assert merge.main(words) == 0
    assert Counter(encoded) == {**dict.fromkeys([f"{word}是一种东西" for word in "天地玄黄宇宙洪荒"], 2),
                                **dict.fromkeys([f"{word}是什么" for word in "天地玄黄宇宙洪荒"], 2)}  # fmt: skip


REFUSED = {
    "three models": (["--models", "a", "b", "c", "--sweep", "0:1:0.5", "--val_data", "v"], "takes two models"),
    "weights": (["--sweep", "0:1:0.5", "--val_data", "v", "--weights", "1", "0"], "drop it"),
    "no data": (["--sweep", "0:1:0.5"], "needs --val_data"),
    "a method": (["--sweep", "0:1:0.5", "--val_data", "v", "--method", "slerp"], "goes with --method linear"),
    "corpus alone": (["--sweep", "0:1:0.5", "--val_data", "v", "--general_corpus", "c"], "needs --general_data"),
    "general alone": (["--general_data", "g"], "goes with --sweep alone"),
    "share": (["--sweep", "0:1:0.5", "--val_data", "v", "--general_data", "g", "--general_weight", "2"], "0 to 1"),
    "steps": (["--sweep", "0:1:0", "--val_data", "v"], "start:stop:step"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, message = REFUSED[case]
    models = [] if "--models" in words else ["--models", "a", "b"]
    assert merge.main([*models, *words, "--output_path", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    (tmp_path / ".s.json.model").mkdir()
    (tmp_path / ".s.json.model/config.json").write_text("{}")
    assert run({0.0: {"domain": [0.5]}, 1.0: {"domain": [0.8]}}, tmp_path)[1] == [0.0, 1.0]


def test_scores_are_measured_again_where_they_may_differ(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []
    score = choose.score_model

    def score_model(config: object, name: str, *rest: object, **loading: object) -> list[np.ndarray]:
        assert loading["trust_remote_code"] is False
        measured.append(name)
        return score(config, name, *rest, **loading)  # type: ignore[arg-type]

    monkeypatch.setattr(choose, "score_model", score_model)
    words = ["--models", *models, "--sweep", "0:1:1", "--output_path", str(tmp_path / "out"), "--val_data",
             questions(tmp_path / "d.jsonl", "天地玄黄"), "--overwrite_output_dir"]  # fmt: skip

    def count(*more: str) -> int:
        measured.clear()
        assert merge.main([*words, *more]) == 0
        return len(measured)

    assert count() == 2 and count() == 0 and count("--metric", "MRR@10") == 0
    for model in models:
        encoder = load_encoder(model, pooling="mean")
        encoder.settings = replace(encoder.settings, query_prompt="问：")
        encoder.save(model)
    assert count() == 2 and count() == 0
    rows = [{"query": f"{word}是什么", "pos": [f"{word}是一种东西", "缺"]} for word in "天地玄黄"]
    atomic.write_jsonl(tmp_path / "d.jsonl", rows)
    corpus = tmp_path / "c.jsonl"
    atomic.write_jsonl(corpus, [{"text": f"{word}是一种东西"} for word in "天地玄黄"])
    assert count("--corpus", str(corpus)) == 2
    plain = ["--models", *models, "--weights", "0.3", "0.7", "--output_path", str(tmp_path / "out")]
    assert merge.main([*plain, "--overwrite_output_dir"]) == 0
    assert not list((tmp_path / "out").glob("sweep*"))  # which speak of another model
    monkeypatch.setenv("WORLD_SIZE", "2")
    capsys.readouterr()
    assert merge.main(words) == 2 and "start it with python" in capsys.readouterr().err


@pytest.mark.parametrize("way", [["--sweep", "0:1:0.25"], ["--method", "greedy_soup"]])
def test_each_model_is_opened_and_hashed_once(
    way: list[str], models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[tuple[str, str]] = Counter()

    def counted(what: str, function: Any) -> Any:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            seen[what, str(path)] += 1
            return function(path, *args, **kwargs)

        return call

    monkeypatch.setattr(compare, "open_model_folder", counted("open", model_folders.open_model_folder))
    monkeypatch.setattr(atomic, "sha256", counted("hash", atomic.sha256))
    data = questions(tmp_path / "d.jsonl", "天地玄黄")
    assert merge.main(["--models", *models, *way, "--val_data", data, "--output_path", str(tmp_path / "out")]) == 0
    weights = [str(Path(model, "model.safetensors")) for model in models]
    assert [seen["open", model] for model in models] == [1, 1] == [seen["hash", file] for file in weights]
