"""Dense modules behind the pooling: the vectors of sentence-transformers before and after saving, or refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tiny_model import DENSE, add_dense

from bge_core import UserError
from bge_core.encoder.fingerprint import fingerprint
from bge_core.encoder.load import load_encoder
from bge_core.encoder.settings import read_settings

TEXTS = ["信用卡怎么申请？", "loan", "快递" * 15, ""]


@pytest.fixture
def folder(tiny_bert: Path, tmp_path: Path) -> Path:
    return add_dense(Path(shutil.copytree(tiny_bert, tmp_path / "model")), pooling="mean", normalize=False)


def test_vectors_are_those_of_sentence_transformers_and_stay_so(folder: Path, tmp_path: Path) -> None:
    theirs = SentenceTransformer(str(folder), device="cpu")
    want = theirs.encode(TEXTS, convert_to_tensor=True)
    encoder = load_encoder(folder)
    encoder.save(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    for saved in (folder, tmp_path / "ours", tmp_path / "theirs"):
        again = load_encoder(saved)
        assert again.embedding_size == 24 and again.settings.dense == DENSE
        torch.testing.assert_close(torch.from_numpy(again.encode(TEXTS)), want, rtol=1e-5, atol=1e-5)
    reopened = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    torch.testing.assert_close(reopened.encode(TEXTS, convert_to_tensor=True), want, rtol=0, atol=0)
    assert read_settings(tmp_path / "ours") == replace(read_settings(folder), max_length=512)
    files = [f"{dense.path}/model.safetensors" for dense in DENSE]
    assert [load_file(tmp_path / "ours" / file).keys() for file in files] == [
        load_file(folder / f).keys() for f in files
    ]


def test_other_weights_behind_the_pooling_are_another_model(folder: Path) -> None:
    encoder = load_encoder(folder)
    before = fingerprint(encoder)
    with torch.no_grad():
        encoder.dense[1].linear.weight[0, 0] += 1e-3
    assert fingerprint(encoder) != before


def test_old_weights_and_half_precision(folder: Path) -> None:
    """As versions before 2.3 kept them; and what half a precision of weights computes is float32."""
    want = load_encoder(folder).encode(TEXTS)
    file = folder / "2_Dense" / "model.safetensors"
    torch.save(load_file(file), folder / "2_Dense" / "pytorch_model.bin")
    file.unlink()
    assert (load_encoder(folder).encode(TEXTS) == want).all()
    half = load_encoder(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert abs(half.encode(TEXTS) - want).max() < 0.1 * abs(want).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_features": 64}, "2_Dense: takes vectors of 64 dimensions and gets 32"),
        ({"activation_function": "my_code.Swish"}, "2_Dense: the activation my_code.Swish is not one of torch.nn"),
        ({"activation_function": "torch.hub.load"}, "the activation torch.hub.load is not one of torch.nn"),
        ({"bias": False}, "2_Dense.model.safetensors: are not the weights of DenseSettings"),
        ({"module_input_name": "token_embeddings"}, "a Dense module with module_input_name 'token_embeddings'"),
        (None, "2_Dense: has no weights"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object] | None, message: str, folder: Path) -> None:
    config = folder / "2_Dense" / "config.json"
    if change is None:
        (folder / "2_Dense" / "model.safetensors").unlink()
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_encoder(folder)


def test_damaged_weights_are_named(folder: Path) -> None:
    save_file({"linear.weight": torch.zeros(3, 3)}, folder / "3_Dense" / "model.safetensors")
    with pytest.raises(UserError, match="3_Dense/model.safetensors: are not the weights of DenseSettings"):
        load_encoder(folder)
