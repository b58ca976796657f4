"""Merging against float64 arithmetic and LM_Cocktail's figures; its result loads; what it refuses, it leaves alone."""

import inspect
import json
import logging
import math
import os
import random
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from tiny_model import make_tiny_bert
from transformers import AutoModel, AutoTokenizer

import merge
from bge_core import UserError
from bge_core.encoder.dense import save_dense
from bge_core.encoder.encode import encode
from bge_core.encoder.load import load_encoder
from bge_core.encoder.settings import DenseSettings, EncoderSettings, read_settings, write_settings
from bge_core.files import atomic
from bge_core.merging import compare, lm_cocktail, model_folders
from bge_core.merging import folders as merging_folders
from bge_core.merging.compare import open_model_folders
from bge_core.merging.folders import average, merge_folders
from bge_core.merging.lm_cocktail import (
    example_losses,
    mean_loss,
    mix_models,
    mix_models_with_data,
    weights_from_losses,
)

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "lm_cocktail.json").read_text(encoding="utf-8"))
SIZE = {"hidden_size": 16, "num_layers": 2}
TEXTS = ["怎么忘记密码", "额度在账单页查询", "refunds take 3 days", "好"]
EXAMPLES = GOLDEN["tiny_models"]["examples"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models: float32, float16, float32; none states its pooling."""
    root = tmp_path_factory.mktemp("models")
    dtypes = (torch.float32, torch.float16, torch.float32)
    return [make_tiny_bert(root / f"m{seed}", seed=seed, dtype=dtype, **SIZE) for seed, dtype in enumerate(dtypes)]


@pytest.fixture
def models(made: list[Path], tmp_path: Path) -> list[Path]:
    """Copies that a test may change."""
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in made]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def store(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with its hash, hidden ones included."""
    return {str(path.relative_to(folder)): atomic.sha256(path) for path in folder.rglob("*") if path.is_file()}


def float64_average(folders: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    states = [weights_of(folder) for folder in folders]
    return {key: sum(w * state[key].double() for w, state in zip(weights, states, strict=True)) for key in states[0]}  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------- arithmetic


def test_average_equals_float64_of_mixed_precisions(models: list[Path], tmp_path: Path) -> None:
    weights = [0.2, 0.3, 0.5]  # 0.5 would be exact in the second model's float16, too
    merge_folders(models, weights, tmp_path / "out")
    found, expected = weights_of(tmp_path / "out"), float64_average(models, weights)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[key], rtol=3e-7, atol=3e-7)


def test_weights_are_used_as_they_are(models: list[Path], tmp_path: Path) -> None:
    weights = [1.5, -0.4995]  # extrapolation, and a sum of 1.0005: inside the tolerance, not normalized
    merge_folders([models[0], models[2]], weights, tmp_path / "out")
    expected = float64_average([models[0], models[2]], weights)
    for key, value in weights_of(tmp_path / "out").items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [[1.0, 0.0], [0.0, 1.0]])
def test_weight_one_is_that_model_bit_for_bit(models: list[Path], tmp_path: Path, weights: list[float]) -> None:
    chosen, other = models[weights.index(1.0) * 2], models[weights.index(0.0) * 2]
    state = weights_of(chosen)
    state["embeddings.LayerNorm.bias"][:2] = torch.tensor([-0.0, 1e-40])
    store(chosen, state)
    broken = weights_of(other)
    broken["embeddings.LayerNorm.bias"][0] = math.inf  # 0 x inf would be NaN
    store(other, broken)
    merge_folders([models[0], models[2]], weights, tmp_path / "out")
    found = weights_of(tmp_path / "out")
    assert all(found[key].numpy().tobytes() == value.numpy().tobytes() for key, value in state.items())


def test_golden_merge_param() -> None:
    """LM_Cocktail's sums: to the bit in float32, nearly where it rounds to float16. Integers are the first model's."""
    for case in GOLDEN["merge_param"]:
        states = [
            {key: torch.tensor(value["values"], dtype=getattr(torch, value["dtype"])) for key, value in model.items()}
            for model in case["models"]
        ]
        for state in states[1:]:  # theirs takes the last model's integers, ours refuses other ones
            state.update({key: value for key, value in states[0].items() if not value.is_floating_point()})
        backbone: Any = None
        checkpoints = [
            model_folders.ModelFolder(
                str(i), backbone, None, EncoderSettings(), [], {k: (lambda v=v: v) for k, v in s.items()}
            )
            for i, s in enumerate(states)
        ]
        pieces = average(checkpoints, case["weights"], list(states[0]))
        found = {key: piece.view(states[0][key].shape) for key, piece in pieces}
        for key, expected in case["expected"].items():
            if expected["dtype"] == "float32":
                assert found[key].tolist() == expected["values"], key
            elif expected["dtype"] == "float16":
                assert found[key].dtype == torch.float32
                torch.testing.assert_close(found[key], torch.tensor(expected["values"]), rtol=2e-3, atol=1e-3)
            else:
                assert torch.equal(found[key], states[0][key])


def test_few_tensors_are_in_memory(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read_tensor = model_folders._read_tensor

    def counted(file: Path, key: str) -> torch.Tensor:
        nonlocal most
        tensor = read_tensor(file, key)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(model_folders, "_read_tensor", counted)
    monkeypatch.setattr(model_folders, "load_encoder", None)  # nothing is loaded whole
    merge_folders(models, [0.2, 0.5, 0.3], tmp_path / "out")
    assert len(alive) > 3 * len(weights_of(tmp_path / "out"))
    assert most <= 3


@pytest.mark.parametrize("size", [7, 33])
def test_tensors_come_in_pieces(size: int, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small they are: the same file, bit for bit, and the same model in memory."""
    merge_folders(models, [0.2, 0.5, 0.3], tmp_path / "whole")
    monkeypatch.setattr(merging_folders, "PIECE", size)
    merge_folders(models, [0.2, 0.5, 0.3], tmp_path / "pieces")
    stored = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "pieces")]
    assert stored[0] == stored[1]
    mixed = mix_models([str(model) for model in models], "encoder", [0.2, 0.5, 0.3]).state_dict()
    whole = weights_of(tmp_path / "whole")
    assert all(torch.equal(mixed[key], whole[key]) for key in whole)


# ---------------------------------------------------------------------------------------------------- what it reads


def shard(folder: Path) -> None:
    """Replace the weights by shards and an index."""
    model = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    assert (folder / "model.safetensors.index.json").is_file() and not (folder / "model.safetensors").exists()


def pickle(folder: Path) -> None:
    """Replace the weights by a pytorch_model.bin."""
    torch.save(weights_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_head(folder: Path) -> None:
    """As BertForMaskedLM saves it: a prefix, a head, no pooler, the architecture's name."""
    state = {f"bert.{key}": value for key, value in weights_of(folder).items() if not key.startswith("pooler.")}
    store(folder, {**state, "cls.predictions.bias": torch.zeros(7)})
    change_json(folder / "config.json", architectures=["BertForMaskedLM"])


def old_names(folder: Path) -> None:
    """LayerNorm's weights as the first BERT checkpoints call them."""
    renamed = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): value for key, value in weights_of(folder).items()}
    store(folder, {key.replace("LayerNorm.bias", "LayerNorm.beta"): value for key, value in renamed.items()})


@pytest.mark.parametrize("change", [shard, pickle, with_head, old_names])
@pytest.mark.parametrize("place", [0, 2])
def test_other_kinds_of_checkpoint(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], place: int
) -> None:
    expected = float64_average(models, [0.2, 0.5, 0.3])
    change(models[place])
    weight_files = sorted(p.name for p in models[place].iterdir() if p.suffix in (".safetensors", ".bin"))
    if change in (shard, with_head):
        monkeypatch.setattr(model_folders, "load_encoder", None)  # these need not be loaded whole
    manifest = merge_folders(models, [0.2, 0.5, 0.3], tmp_path / "out")
    found = weights_of(tmp_path / "out")
    assert found.keys() == {key for key in expected if change is not with_head or not key.startswith("pooler.")}
    for key, value in found.items():
        torch.testing.assert_close(value.double(), expected[key], rtol=3e-7, atol=3e-7)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertModel"] and config["dtype"] == "float32"
    inputs = [entry for entry in manifest["inputs"] if entry["model"] == str(models[place])]
    assert [Path(entry["path"]).name for entry in inputs] == weight_files
    assert all(entry["sha256"] == atomic.sha256(entry["path"]) for entry in inputs)


def test_a_head_leaves_the_pooler_out_and_says_so(
    models: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_head(models[1])
    with caplog.at_level(logging.INFO):
        merged = mix_models([str(m) for m in models[:2]], "encoder", [0.5, 0.5], str(tmp_path / "out"))
    assert f"{models[1]}: no pooler" in caplog.text
    assert merged.pooler is None
    assert mix_models([str(m) for m in models[:2]], "encoder", [0.5, 0.5]).pooler is None


def test_integers_are_copied_from_the_first_model(models: list[Path], tmp_path: Path) -> None:
    positions = torch.arange(512)[None]
    for folder in models[:2]:  # the third has none, as newer versions save it
        store(folder, {**weights_of(folder), "embeddings.position_ids": positions})
    merge_folders(models, [0.2, 0.5, 0.3], tmp_path / "out")
    found = weights_of(tmp_path / "out")
    assert found["embeddings.position_ids"].dtype == torch.int64
    assert torch.equal(found.pop("embeddings.position_ids"), positions)
    merge_folders([models[2], models[0]], [0.5, 0.5], tmp_path / "without")
    assert found.keys() == weights_of(tmp_path / "without").keys()
    AutoModel.from_pretrained(tmp_path / "out")
    store(models[2], {**weights_of(models[2]), "flags": torch.tensor([True, False, True]), "n": torch.tensor(7)})
    merge_folders([models[2]], [1.0], tmp_path / "mixed")  # elements of 1, 4 and 8 bytes, a scalar
    assert weights_of(tmp_path / "mixed")["flags"].tolist() == [True, False, True]
    assert weights_of(tmp_path / "mixed")["n"].item() == 7
    assert torch.equal(
        weights_of(tmp_path / "mixed")["pooler.dense.weight"], weights_of(models[2])["pooler.dense.weight"]
    )
    store(models[1], {**weights_of(models[1]), "embeddings.position_ids": positions + 1})
    with pytest.raises(UserError, match="position_ids holds integers, and they differ"):
        merge_folders(models, [0.2, 0.5, 0.3], tmp_path / "other")
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------------------------------------------- what it writes


def test_the_result_loads_everywhere_with_the_same_vectors(models: list[Path], tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    settings = EncoderSettings("mean", True, 128, query_prompt="为这个句子:")
    write_settings(models[0], settings, 16)
    out = tmp_path / "out"
    merge_folders([models[1], models[0]], [0.5, 0.5], out)  # the first is float16 and states no pooling
    stored = read_settings(out)
    assert stored == settings

    encoder = load_encoder(out)
    ours = encode(encoder, TEXTS, prompt=stored.query_prompt or "")
    theirs = SentenceTransformer(str(out), device="cpu").encode(TEXTS, prompt_name="query")
    np.testing.assert_allclose(ours, theirs, atol=1e-5)

    model, tokenizer = AutoModel.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.float32
    with torch.no_grad():
        hidden = model(**tokenizer(["为这个句子:好"], return_tensors="pt")).last_hidden_state.mean(dim=1)
    np.testing.assert_allclose(torch.nn.functional.normalize(hidden, dim=-1).numpy(), ours[3:], atol=1e-5)


def test_settings_come_from_the_first_that_states_them(
    models: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first states nothing at all; a cosine is one with a Normalize module and without."""
    write_settings(models[1], EncoderSettings("last_token", False, 64, None, "b:"), 16)
    write_settings(models[2], EncoderSettings("last_token", True, 32, "a:", "", {"s2p": "c:"}, "s2p"), 16)
    merge_folders(models, [0.2, 0.5, 0.3], tmp_path / "out")
    merged = EncoderSettings("last_token", False, 64, "a:", "b:", {"s2p": "c:"}, "s2p")
    assert read_settings(tmp_path / "out") == merged
    assert "the models state other lengths (64, 32); the result has the first" in caplog.text


def test_two_prompts_of_one_name_need_a_choice(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_settings(models[0], EncoderSettings("cls", True, 64, "a:", other_prompts={"s2p": "x:"}), 16)
    write_settings(models[1], EncoderSettings("cls", True, 64, "c:", "b:"), 16)
    assert run(models[:2], tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{models[0]} and {models[1]} cannot be merged: the prompt 'query' is 'a:' and 'c:'; " in error
    assert f"--prompts_from {models[1]} takes that model's" in error and not (tmp_path / "out").exists()
    assert run(models[:2], tmp_path / "out", "--prompts_from", "m7") == 2
    assert "--prompts_from m7: is none of the models" in capsys.readouterr().err
    assert run(models[:2], tmp_path / "out", "--prompts_from", str(models[1])) == 0
    assert read_settings(tmp_path / "out") == EncoderSettings("cls", True, 64, "c:", "b:", {"s2p": "x:"})
    assert len(example_losses([str(model) for model in models[:2]], EXAMPLES)) == 2  # which adds no prompt


def test_what_changes_no_vector_may_differ(models: list[Path], tmp_path: Path) -> None:
    """Fields of training and of heads, where a file came from; lower case twice; a field that the class does not know."""
    change_json(
        models[2] / "config.json", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2, classifier_dropout=0.1,
        initializer_range=0.5, use_cache=False, id2label={"0": "x"}, label2id={"x": 0}, transformers_version="4.9.0",
        architectures=["BertForMaskedLM"], _name_or_path="elsewhere", torch_dtype="float16", directionality="bidi",
        eos_token_id=3, gradient_checkpointing=True, problem_type="regression",
    )  # fmt: skip
    write_settings(models[0], EncoderSettings("cls", True, do_lower_case=True), 16)
    write_settings(models[2], EncoderSettings("cls", True), 16)
    merge_folders([models[0], models[2]], [0.5, 0.5], tmp_path / "out")
    assert read_settings(tmp_path / "out").do_lower_case


DEEP = [
    ("Qwen3-Embedding", {"rope_theta": 7.0}, "rope_parameters.rope_theta is "),
    ("Qwen3-Embedding", {"use_sliding_window": True}, "use_sliding_window is False and True"),
    ("ModernBERT-embed", {"local_attention": 2}, "local_attention is "),
    ("multilingual-e5", {"pad_token_id": 2}, "pad_token_id is 1 and 2"),
]


@pytest.mark.parametrize(("family", "change", "message"), DEEP)
def test_what_stands_deep_in_a_configuration(family: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    one, other = (zoo.make_folder(family, tmp_path / name) for name in ("one", "other"))
    open_model_folders([str(one), str(other)])
    change_json(other / "config.json", **change)
    with pytest.raises(UserError, match=f"cannot be merged: {message}"):
        open_model_folders([str(one), str(other)])


def test_manifest(models: list[Path], tmp_path: Path) -> None:
    manifest = merge_folders(models[:2], [0.25, 0.75], tmp_path / "out")
    assert atomic.read_json(tmp_path / "out" / "manifest.json") == json.loads(json.dumps(manifest))
    assert manifest["stage"] == "merge" and manifest["weights"] == [0.25, 0.75]
    assert manifest["models"] == [str(model) for model in models[:2]]
    assert [entry["sha256"] for entry in manifest["inputs"]] == [
        atomic.sha256(model / "model.safetensors") for model in models[:2]
    ]


def test_overwriting_keeps_other_files_and_refuses_the_models(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_folders(models[:2], [0.5, 0.5], out)
    (out / "checkpoint-1").mkdir()
    (out / "checkpoint-1" / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(UserError, match="not empty"):
        merge_folders(models[:2], [0.1, 0.9], out)
    assert contents(out) == before
    merge_folders(models[:2], [0.1, 0.9], out, overwrite=True)
    merge_folders(models[:2], [0.1, 0.9], tmp_path / "fresh")
    after = contents(out)
    assert after.pop("checkpoint-1/notes.txt") == before["checkpoint-1/notes.txt"]
    fresh = contents(tmp_path / "fresh")
    assert after == fresh and after["model.safetensors"] != before["model.safetensors"]
    before = contents(models[1])
    with pytest.raises(UserError, match="one of the models"):
        merge_folders(models[:2], [0.5, 0.5], models[1], overwrite=True)
    assert contents(models[1]) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("failing", ["weights", "tokenizer"])
def test_full_disk_leaves_what_was_there(
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overwrite: bool,
    failing: str,
) -> None:
    out = tmp_path / "out"
    if overwrite:
        merge_folders(models[:2], [0.1, 0.9], out)
    before = contents(tmp_path)

    if failing == "weights":

        def half(*args: Any, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
            yield next(average(*args, **options))
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(merging_folders, "average", half)
    else:

        def full(*args: Any) -> None:
            raise Exception("No space left on device (os error 28)")  # as the tokenizers library does

        monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    assert run(models[:2], out, "--overwrite_output_dir", str(overwrite)) == 2
    assert "could not be written" in capsys.readouterr().err
    assert contents(tmp_path) == before and out.exists() == overwrite


# ---------------------------------------------------------------------------------------------------- what it refuses


def run(models: list[Path], out: Path, *more: str) -> int:
    return merge.main(["--models", *map(str, models), "--output_path", str(out), *more])


def other_vocabulary(folder: Path) -> None:
    """The same tokens with two ids exchanged: the same shapes."""
    file = folder / "tokenizer.json"
    value = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = value["model"]["vocab"]
    vocabulary["一"], vocabulary["人"] = vocabulary["人"], vocabulary["一"]
    file.write_text(json.dumps(value), encoding="utf-8")


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def lose_a_weight(folder: Path) -> None:
    store(folder, {key: value for key, value in weights_of(folder).items() if "layer.1.output.dense.b" not in key})


def remake(**arguments: Any) -> Callable[[Path], None]:
    return lambda folder: make_tiny_bert(shutil.rmtree(folder) or folder, **{**SIZE, **arguments}) and None


def lose_a_shard(folder: Path) -> None:
    shard(folder)
    next(folder.glob("model-00001-*")).unlink()


def make_nan(folder: Path) -> None:
    state = weights_of(folder)
    state["pooler.dense.bias"][0] = math.nan
    store(folder, state)


def configure(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", **values)


def wider_with_as_many_heads(folder: Path) -> None:
    make_tiny_bert(folder, hidden_size=24, num_layers=2)
    change_json(folder / "config.json", num_attention_heads=2)


def pool_by_mean(folder: Path) -> None:
    write_settings(folder, EncoderSettings("mean", True), 16)


def state(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        settings = replace(EncoderSettings("cls", True), **values)
        write_settings(folder, settings, 16)
        weights = {"0.linear.weight": torch.zeros(8, 16), "0.linear.bias": torch.zeros(8)}
        save_dense(folder, settings.dense, weights)

    return change


def read_cased(folder: Path) -> None:
    change_json(folder / "tokenizer_config.json", do_lower_case=False)


def cut_left(folder: Path) -> None:
    change_json(folder / "tokenizer_config.json", truncation_side="left")


def narrow_a_weight(folder: Path) -> None:
    tensors = weights_of(folder)
    store(folder, {**tensors, "embeddings.LayerNorm.bias": tensors["embeddings.LayerNorm.bias"][:8].clone()})


BOTH = "{0} and {1} cannot be merged: "
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "layers": (remake(num_layers=3), BOTH + "num_hidden_layers is 2 and 3"),
    "heads": (configure(num_attention_heads=4), BOTH + "num_attention_heads is 2 and 4"),
    "width": (wider_with_as_many_heads, BOTH + "hidden_size is 16 and 24"),
    "kind": (configure(model_type="roberta"), BOTH + "model_type is bert and roberta"),
    "vocabulary": (other_vocabulary, BOTH + "the tokenizer's id of '一' is"),
    "pooling": (pool_by_mean, BOTH + "pooling is cls and mean"),
    "similarity": (state(normalize=False, similarity="dot"), BOTH + "similarity is cosine and dot"),
    "prompt": (state(include_prompt=False), BOTH + "include_prompt is True and False"),
    "dense": (state(dense=(DenseSettings("2_Dense", 16, 8),)), BOTH + "dense is [] and [{{'path': ''"),
    "activation": (configure(hidden_act="relu"), BOTH + "hidden_act is gelu and relu"),
    "epsilon": (configure(layer_norm_eps=1e-5), BOTH + "layer_norm_eps is 1e-12 and 1e-05"),
    "padding": (configure(pad_token_id=3), BOTH + "pad_token_id is 0 and 3"),
    "lower case": (read_cased, BOTH + "the tokenizer's normalizer.lowercase is True and False"),
    "side": (cut_left, BOTH + "the tokenizer's truncation_side is right and left"),
    "the file's shape": (narrow_a_weight, BOTH + "the shape of embeddings.LayerNorm.bias is (16,) and (8,)"),
    "no model": (lambda folder: (folder / "config.json").unlink(), "{1}: is not a model folder"),
    "no folder": (shutil.rmtree, "{1}: no such folder"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "{1}: could not be loaded as a model"),
    "a weight lost": (lose_a_weight, "{1}: the checkpoint lacks weights of BertModel: encoder.layer.1.output.dense.b"),
    "damaged": (truncate, "{1}/model.safetensors is not a whole safetensors file"),
    "a shard lost": (lose_a_shard, "{1}: lacks model-00001-of-"),
    "NaN": (make_nan, BOTH.replace(" and ", ", ") + "pooler.dense.bias would be NaN or infinite"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_do_not_fit(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    change, message = REFUSED[kind]
    write_settings(models[0], EncoderSettings("cls", True), 16)
    change(models[2])
    before = contents(tmp_path)
    assert run([models[0], models[2]], tmp_path / "out") == 2
    output = capsys.readouterr()
    assert message.format(models[0], models[2]) in output.err.replace("\n", " ")
    assert output.err.count("error: ") == 1 and "Traceback" not in output.err and not output.out
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["0.5", "0.498"], "they sum to 0.998"),  # LM_Cocktail takes any sum below 1
        (["0.5", "0.502"], "they sum to 1.002"),
        (["0.5", "nan"], "they sum to nan"),
        (["1"], "give one a model (2)"),
        (["0.5", "0.5", "0"], "give one a model (2)"),
    ],
)
def test_weights_that_do_not_fit(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: list[str], message: str
) -> None:
    assert run(models[:2], tmp_path / "out", "--weights", *weights) == 2
    error = capsys.readouterr().err
    assert message in error and all(str(model) in error for model in models[:2])
    assert not (tmp_path / "out").exists()


def test_output_folder_is_checked_before_the_work(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "open_model_folder", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place, message in (
        (tmp_path / "full", "it holds thesis.txt"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "cannot be written"),
        (models[0], "one of the models"),
    ):
        assert run(models[:2], place) == 2
        assert message in capsys.readouterr().err
        examples = [{"query": "问", "pos": ["答"]}]
        with pytest.raises(UserError, match=message):
            mix_models_with_data([str(m) for m in models[:2]], "encoder", examples, output_path=str(place))
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]


# ---------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("case", GOLDEN["compute_weights"], ids=str)
def test_golden_weights_from_injected_losses(case: dict[str, Any]) -> None:
    found = weights_from_losses(case["losses"], case["temperature"])
    assert found == pytest.approx(case["expected"], abs=1e-7)
    assert sum(found) == pytest.approx(1, abs=1e-6)


def test_default_temperature_and_bad_ones() -> None:
    assert weights_from_losses([0.9, 1.3, 2.0]) == pytest.approx([0.36689, 0.33868, 0.29443], abs=1e-5)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="temperature"):
            weights_from_losses([1.0, 2.0], temperature)


def test_golden_loss_of_given_vectors() -> None:
    case = GOLDEN["embedder_loss"]
    queries = torch.cat([torch.tensor(batch["query"]) for batch in case["batches"]])
    passages = torch.cat([torch.tensor(batch["passage"]) for batch in case["batches"]])
    normalized = [torch.nn.functional.normalize(vectors, dim=-1) for vectors in (queries, passages)]
    assert mean_loss(*normalized, [3, 3, 3], 2) == pytest.approx(case["expected"], rel=1e-6)


def test_loss_of_uneven_groups_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    query, passage = (torch.nn.functional.normalize(torch.randn(n, 4, generator=generator)) for n in (4, 8))
    exp = (query.double() @ passage.double().T / 0.05).exp()  # passages of the batches: {0,1,2} {3} {4,5} | {6,7}
    first = [exp[row, positive] / exp[row, :6].sum() for row, positive in enumerate((0, 3, 4))]
    losses = [-sum(math.log(share) for share in first) / 3, -math.log(exp[3, 6] / exp[3, 6:].sum())]
    assert mean_loss(query, passage, [3, 1, 2, 2], 3) == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_golden_tiny_models(tmp_path: Path) -> None:
    """The whole of mix_models_with_data: losses, weights and merged tensors of LM_Cocktail."""
    case = GOLDEN["tiny_models"]
    folders = [str(make_tiny_bert(tmp_path / f"{seed}", seed=seed, **SIZE)) for seed in case["tiny_bert"]["seeds"]]
    settings = {name: case[name] for name in ("batch_size", "max_input_length", "neg_number")}
    losses = example_losses(folders, case["examples"], **settings)
    assert losses == pytest.approx(case["expected_losses"], rel=1e-4)
    assert weights_from_losses(losses, case["temperature"]) == pytest.approx(case["expected_weights"], abs=1e-5)
    merged = mix_models_with_data(folders, "encoder", case["examples"], case["temperature"], **settings)
    assert not merged.training
    sums = {name: float(value.double().sum()) for name, value in merged.state_dict().items()}
    assert sums == pytest.approx(case["expected_sums"], abs=2e-3)


def test_losses_use_the_models_own_pooling(models: list[Path]) -> None:
    cls = example_losses([str(models[0])], EXAMPLES)
    write_settings(models[2], EncoderSettings("mean", False), 16)
    mean = example_losses([str(models[0]), str(models[2])], EXAMPLES)
    write_settings(models[0], EncoderSettings("mean", False), 16)
    assert (
        example_losses([str(models[0])], EXAMPLES) == mean[:1] != cls
    )  # the merged model pools by mean, so the base does


def test_negatives_are_seeded_and_as_many_as_there_are(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def record(encoder: Any, texts: list[str], **_: Any) -> np.ndarray:
        seen.append(texts)
        return np.ones((len(texts), 2), dtype=np.float32)

    monkeypatch.setattr(lm_cocktail, "encode", record)
    negatives = [f"n{i}" for i in range(20)]
    rows = [{"query": "q0", "pos": ["p0", "other"], "neg": negatives}, {"query": "q1", "pos": ["p1"]}]
    paths = [str(model) for model in models[:2]]
    random.seed(1)
    example_losses(paths, rows, neg_number=3, seed=5)
    random.seed(2)
    example_losses(paths, rows, neg_number=3, seed=5)
    example_losses(paths, rows, neg_number=3, seed=6)
    example_losses(paths, rows, neg_number=99)
    assert seen[0] == seen[1] == seen[2] != seen[4]  # the same for both models, and in the second call
    assert seen[0][:3] == ["q0", "q1", "p0"] and len(set(seen[0][3:6]) & set(negatives)) == 3
    assert seen[0][6:] == ["p1"] and sorted(seen[6][3:-1]) == sorted(negatives)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"neg_number": -1}, "neg_number -1"),
        ({"max_input_length": 0}, "max_input_length 0"),
        ({"examples": []}, "holds no row"),
        ({"examples": [{"query": "q", "pos": ["p"]}, {"query": "q", "pos": "p"}]}, r"example_data\[1\]: field 'pos'"),
    ],
)
def test_bad_examples(models: list[Path], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        example_losses([str(models[0])], **{"examples": EXAMPLES, **arguments})


# ---------------------------------------------------------------------------------------------------- as users call it


def test_guide_call(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models[0].rename("base")
    models[1].rename("your_fine-tuned_model")
    model = mix_models(
        model_names_or_paths=["base", "your_fine-tuned_model"],
        model_type='encoder',
        weights=[0.5, 0.5],  # you can change the weights to get a better trade-off.
        output_path='./mixed_model_1')  # fmt: skip
    saved = weights_of(tmp_path / "mixed_model_1")
    in_memory = mix_models(["base", "your_fine-tuned_model"], "encoder", [0.5, 0.5])
    for result in (model, in_memory):
        assert not result.training and result.dtype == torch.float32
        state = result.state_dict()
        assert state.keys() == saved.keys() and all(torch.equal(state[key], value) for key, value in saved.items())
    assert not list(tmp_path.glob(".*"))


def test_signatures_are_those_of_lm_cocktail() -> None:
    def positional(function: Callable[..., Any]) -> list[tuple[str, Any]]:
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    empty = inspect.Parameter.empty
    start = [("model_names_or_paths", empty), ("model_type", empty)]
    assert positional(mix_models) == [*start, ("weights", empty), ("output_path", None)]
    settings = {"temperature": 5.0, "batch_size": 2, "max_input_length": 2048, "neg_number": 7, "output_path": None}
    # example_ata has a default here, because example_data may take its place
    assert positional(mix_models_with_data) == [*start, ("example_ata", None), *settings.items()]


def test_example_ata_and_example_data_are_the_same(models: list[Path], tmp_path: Path) -> None:
    paths = [str(model) for model in models[:2]]
    one = mix_models_with_data(paths, "encoder", EXAMPLES, 1.0, output_path=str(tmp_path / "out"))
    two = mix_models_with_data(paths, "encoder", example_data=EXAMPLES, temperature=1.0)
    assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())
    for both in ({}, {"example_ata": EXAMPLES, "example_data": EXAMPLES}):
        with pytest.raises(UserError, match="example_data"):
            mix_models_with_data(paths, "encoder", **both)


@pytest.mark.parametrize("model_type", ["decoder", "reranker", "encode"])
def test_other_model_types_are_refused(model_type: str) -> None:
    for call in (lambda: mix_models(["a"], model_type, [1.0]), lambda: mix_models_with_data(["a"], model_type, [])):
        with pytest.raises(UserError, match=f"'{model_type}': this project trains and merges encoders only"):
            call()


def test_command_line(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, test = tmp_path / "out put", tmp_path / "my test.jsonl"
    test.touch()
    atomic.write_json(models[1] / "manifest.json", {"stage": "train", "config": {"val_data": str(test)}})
    monkeypatch.chdir(tmp_path)
    assert run(models[:2], out, "--weights", "0.3", "0.7") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"0.3000  {models[0]}",
        f"0.7000  {models[1]}",
        f"model: {out}",
        f"next: python evaluate.py --encoder {models[0]} {models[1]} '{out}' --val_data '{test}' --add_instruction "
        f"--output_dir outputs/report",
    ]
    manifest = atomic.read_json(out / "manifest.json")
    assert manifest is not None and manifest["config"]["weights"] == [0.3, 0.7] and manifest["seed"] == 42
    assert load_encoder(out).settings.pooling == "cls"


def test_equal_weights_and_weights_from_a_file(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(models, tmp_path / "equal") == 0
    assert capsys.readouterr().out.startswith(f"0.3333  {models[0]}\n0.3333  {models[1]}\n0.3333  {models[2]}\n")
    examples = tmp_path / "examples.jsonl"
    atomic.write_jsonl(examples, EXAMPLES)
    assert run(models, tmp_path / "data", "--example_data", str(examples), "--temperature", "1") == 0
    expected = weights_from_losses(example_losses([str(m) for m in models], EXAMPLES, max_input_length=512), 1.0)
    manifest = atomic.read_json(tmp_path / "data" / "manifest.json")
    assert manifest is not None and manifest["weights"] == pytest.approx(expected, abs=1e-7)
    assert len(set(manifest["weights"])) == 3
    assert manifest["inputs"][-1] == {"path": str(examples), "sha256": atomic.sha256(examples), "rows": len(EXAMPLES)}
    capsys.readouterr()
    assert run(models[:2], tmp_path / "both", "--example_data", str(examples), "--weights", "0.5", "0.5") == 2
    assert "choose one" in capsys.readouterr().err


def test_three_checkpoints_are_compared_pairwise(models: list[Path]) -> None:
    """The second states nothing, so that only the first and the third contradict each other."""
    write_settings(models[0], EncoderSettings("cls", True), 16)
    write_settings(models[2], EncoderSettings("mean", True), 16)
    with pytest.raises(UserError, match=f"{models[0]} and {models[2]} cannot be merged: pooling is cls and mean"):
        open_model_folders([str(model) for model in models])
