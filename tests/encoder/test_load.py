"""Folders of every kind: other architectures and layouts are loaded right, or refused by a sentence that helps."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tiny_model import tiny_vocabulary
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import PreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bge_core import UserError
from bge_core.encoder.fingerprint import fingerprint
from bge_core.encoder.load import load_encoder
from bge_core.encoder.reranker import load_reranker
from bge_core.encoder.settings import EncoderSettings, copy_tokenizer, save_tokenizer, write_settings
from bge_core.encoder.tokens import Tokens

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "pad_token_id": 0}
XLNET = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32, "pad_token_id": 0}
BEHIND_PADDING = SIZES | {"max_position_embeddings": 36, "pad_token_id": 1}


def make(folder: Path, tiny_bert: Path, kind: str, settings: dict[str, Any]) -> Any:
    """A random model of another architecture with the tiny BERT's tokenizer."""
    config = getattr(transformers, f"{kind.removesuffix('Encoder')}Config")(
        vocab_size=len(tiny_vocabulary()), **settings
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return model


# Camembert and MPNet number positions from 2, and their names do not say so; RoFormer has a table that never learns.
@pytest.mark.parametrize(
    ("kind", "settings", "longest", "frozen"),
    [
        ("MPNet", BEHIND_PADDING, 34, {"pooler.dense.weight", "pooler.dense.bias"}),
        ("Camembert", BEHIND_PADDING, 34, {"pooler.dense.weight", "pooler.dense.bias"}),
        ("RoFormer", SIZES | {"max_position_embeddings": 64}, 64, {"encoder.embed_positions.weight"}),
        ("Electra", SIZES | {"embedding_size": 8}, 512, set()),
        ("Albert", SIZES | {"embedding_size": 8}, 512, {"pooler.weight", "pooler.bias"}),
    ],
)
def test_positions_and_what_learns_nothing_are_asked_of_the_model(
    kind: str,
    settings: dict[str, Any],
    longest: int,
    frozen: set[str],
    tiny_bert: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stock = make(tmp_path, tiny_bert, kind, settings)
    encoder = load_encoder(tmp_path, pooling="mean", normalize=False)
    assert encoder.max_length == longest
    ids = encoder.tokenizer("快递" * 300, truncation=True, max_length=longest)["input_ids"]
    want = stock(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
    torch.testing.assert_close(torch.from_numpy(encoder.encode(["快递" * 300, "a"])[0]), want, rtol=1e-4, atol=1e-5)

    encoder.freeze()
    assert {name for name, p in encoder.backbone.named_parameters() if not p.requires_grad} == frozen
    assert ("1 weights get no gradient and stay as they are, as encoder.embed_positions" in caplog.text) == (
        kind == "RoFormer"
    )
    encoder(Tokens.from_lists([[5, 6, 7], [8, 9]])).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("T5", T5, "a T5Model is no encoder that can be trained here .it has a decoder"),
        ("T5Encoder", T5, "a T5Model is no encoder that can be trained here .it does not run on tokens alone"),
        ("XLNet", XLNET, "a XLNetModel is no encoder that can be trained here .it states no longest text"),
    ],
)
def test_what_is_no_encoder(kind: str, settings: dict[str, Any], why: str, tiny_bert: Path, tmp_path: Path) -> None:
    make(tmp_path, tiny_bert, kind, settings)
    with pytest.raises(UserError, match=why) as error:
        load_encoder(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_a_model_that_wants_more_than_tokens_is_no_encoder(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.BertModel, "forward", lambda self, input_ids, pixels, **more: None)
    with pytest.raises(
        UserError, match="a BertModel is no encoder .*does not run on tokens alone: TypeError: .*'pixels'"
    ):
        load_encoder(tiny_bert)


@pytest.mark.parametrize("special", [False, True])
def test_tokens_without_a_vector(
    special: bool, tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """EmbeddingGemma's tokenizer has a special token for images, of which its text model knows nothing."""
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=special)
    tokenizer.save_pretrained(folder)
    rows = len(tiny_vocabulary())
    if special:
        load_encoder(folder)
        assert "texts with <image> cannot be read" in caplog.text
        return
    with pytest.raises(
        UserError, match=f"its tokenizer has {rows + 1} tokens, as '<image>', and its embedding {rows} "
    ):
        load_encoder(folder)


@pytest.mark.parametrize("load", [load_encoder, load_reranker])
@pytest.mark.parametrize("with_base", [False, True])
def test_an_adapter_is_refused_with_the_remedy(
    load: Callable[[Path], Any], with_base: bool, tiny_bert: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "adapter")) if with_base else tmp_path
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "BAAI/bge-m3"}))
    with pytest.raises(UserError, match=r"is a LoRA adapter .*(?s:.)*from_pretrained\('BAAI/bge-m3'\)"):
        load(folder)


def test_an_old_layout_gives_the_vectors_of_the_new(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "0_Transformer")
    kinds = {"Transformer": "0_Transformer", "Pooling": "1_Pooling"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds.items()]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    old, new = load_encoder(tmp_path), load_encoder(tiny_bert, pooling="mean", normalize=False)
    old.save(tmp_path / "saved")
    for encoder in (old, load_encoder(tmp_path / "saved")):
        assert torch.equal(torch.from_numpy(encoder.encode(["快递"])), torch.from_numpy(new.encode(["快递"])))
    shutil.rmtree(tmp_path / "0_Transformer")
    with pytest.raises(UserError, match="no 0_Transformer/config.json"):
        load_encoder(tmp_path)


def test_do_lower_case_is_as_in_sentence_transformers(tiny_bert: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.backend_tokenizer.normalizer = BertNormalizer(lowercase=False)
    tokenizer.save_pretrained(folder)
    for stated in (False, True):
        write_settings(folder, EncoderSettings("mean", True, do_lower_case=stated), 32)
        want = SentenceTransformer(str(folder), device="cpu").encode(["A Loan", "a loan"])
        encoder = load_encoder(folder)
        encoder.save(tmp_path / f"saved {stated}")
        for of in (encoder, load_encoder(tmp_path / f"saved {stated}")):
            got = of.encode(["A Loan", "a loan"])
            np.testing.assert_allclose(got, want, atol=1e-6)
            assert np.allclose(got[0], got[1]) == stated


# ------------------------------------------------------------------------------------------------------- own code

CONFIG = """from transformers import BertConfig


class OwnConfig(BertConfig):
    model_type = "own"

    def __init__(self, rope_scaling=None, **others):  # as code of before transformers 5, which calls it rope_parameters
        super().__init__(**others)
        self.rope_scaling = rope_scaling
"""
MODEL = """from transformers import BertModel

from .configuration_own import OwnConfig
from .scale import scale


class OwnModel(BertModel):
    config_class = OwnConfig

    def forward(self, *args, **more):
        output = super().forward(*args, **more)
        output.last_hidden_state = scale(output.last_hidden_state, (self.config.rope_scaling or {}).get("factor", 1.0))
        return output
"""
SCALE = "def scale(x, factor):\n    return x.roll(1, -1) * factor\n"
CODE = {"configuration_own.py": CONFIG, "modeling_own.py": MODEL, "scale.py": SCALE}
REVISION = "0" * 40


def with_code(tiny_bert: Path, folder: Path, hub: Path | None = None, scale: str = SCALE) -> Path:
    """A BERT that does something else; its code lies in the folder, or in a repository of the hub's cache."""
    shutil.copytree(tiny_bert, folder)
    home = folder
    if hub:
        home = hub / "models--owner--code" / "snapshots" / REVISION
        home.mkdir(parents=True)
        (home.parents[1] / "refs").mkdir()
        (home.parents[1] / "refs" / "main").write_text(REVISION)
    for name, text in (CODE | {"scale.py": scale}).items():
        (home / name).write_text(text)
    at = "owner/code--" if hub else ""
    auto_map = {"AutoConfig": f"{at}configuration_own.OwnConfig", "AutoModel": f"{at}modeling_own.OwnModel"}
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_scaling": {"type": "ntk", "factor": 3.0}, "rope_theta": 20000.0}
    (folder / "config.json").write_text(json.dumps(config | rope | {"model_type": "own", "auto_map": auto_map}))
    return folder


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_saved_folder_has_all_its_code_and_computes_the_same(
    elsewhere: bool, tiny_bert: Path, tmp_path: Path
) -> None:
    hub = tmp_path / "hub" if elsewhere else None
    folder = with_code(tiny_bert, tmp_path / f"model_{elsewhere}", hub)
    told: dict[str, Any] = {"trust_remote_code": True, "cache_dir": str(hub) if hub else None, "normalize": False}
    encoder = load_encoder(folder, **told)
    want = load_encoder(tiny_bert, normalize=False).encode(["快递"])
    np.testing.assert_allclose(encoder.encode(["快递"]), 3 * np.roll(want, 1), atol=1e-5)
    encoder.save(tmp_path / "saved")
    if hub:
        shutil.rmtree(hub)
    again = load_encoder(tmp_path / "saved", trust_remote_code=True)
    assert (again.encode(["快递"]) == encoder.encode(["快递"])).all()
    assert fingerprint(again) == fingerprint(encoder)
    assert set(CODE) <= {file.name for file in (tmp_path / "saved").iterdir()}
    with pytest.raises(UserError, match="model code of its own; read it, and if you trust it, add --trust_remote_code"):
        load_encoder(tmp_path / "saved")


def test_other_code_is_another_model(tiny_bert: Path, tmp_path: Path) -> None:
    one, other = (
        load_encoder(with_code(tiny_bert, tmp_path / name, scale=text), trust_remote_code=True)
        for name, text in (("one", SCALE), ("other", SCALE.replace("1,", "2,")))
    )
    assert fingerprint(one) != fingerprint(other)


def test_weights_that_need_the_code_name_the_flag(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A stock model type with code: without the flag transformers takes its own class, which fits or does not."""
    folder = with_code(tiny_bert, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(config))
    load_encoder(folder)
    assert "comes with model code of its own, which is not run; --trust_remote_code runs it" in caplog.text
    for change in ({"num_hidden_layers": 3}, {"intermediate_size": 64}):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match="; it comes with model code of its own, which --trust_remote_code runs"):
            load_encoder(folder)


def test_a_word_splitter_in_python_survives_saving_and_copying(tiny_bert: Path, tmp_path: Path) -> None:
    """RoFormer's, which transformers leaves out of the tokenizer that it saves, and cannot copy."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = PreTokenizer.custom(SimpleNamespace(pre_tokenize=lambda text: None))
    save_tokenizer(tokenizer, tmp_path)
    assert type(backend.pre_tokenizer) is PreTokenizer
    assert copy_tokenizer(tokenizer) is not tokenizer and type(backend.pre_tokenizer) is PreTokenizer


@pytest.mark.parametrize("attention", ["auto", "padded"])
def test_a_text_of_no_tokens_is_zero(attention: Any, tiny_bert: Path) -> None:
    """As in sentence-transformers, of a tokenizer without special tokens (tests/zoo.py has SGPT's)."""
    encoder = load_encoder(tiny_bert, pooling="mean", attention=attention)
    encoder.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    assert encoder.encode(["快递", ""]).any(axis=1).tolist() == [True, False]
