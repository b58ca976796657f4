"""The encoder against hand-written pooling and single texts; what it saves, others load, and the other way round."""

import functools
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import Gradients, gradients_of
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st_modules
from tiny_model import fixed_rows_always
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, XLMRobertaConfig, XLMRobertaModel

from bge_core import UserError
from bge_core.encoder.load import load_encoder
from bge_core.encoder.model import Encoder, compile_layers, pool
from bge_core.encoder.packing import FixedRowsOf
from bge_core.encoder.settings import DenseSettings, EncoderSettings, read_settings, write_settings
from bge_core.encoder.tokens import Tokens, tokenize
from bge_core.runtime.flags import POOLINGS

TEXTS = ["信用卡怎么申请？", "loan", "快递" * 15, "退款，退款", "", "a b c d e f g", "退款，退款"]


def tokens_of(encoder: Encoder, texts: list[str] = TEXTS) -> Tokens:
    return Tokens.from_lists(tokenize(encoder.tokenizer, texts, 512))


def by_hand(hidden_LD: Tensor, pooling: str, normalize: bool) -> Tensor:
    """The vector of one text from its token vectors, without padding."""
    length = len(hidden_LD)
    vector_D = {
        "cls": hidden_LD[0],
        "last_token": hidden_LD[-1],
        "mean": sum(hidden_LD) / length,
        "max": functools.reduce(torch.maximum, hidden_LD),
        "mean_sqrt_len": sum(hidden_LD) / length**0.5,
        "weightedmean": sum((i + 1) * h for i, h in enumerate(hidden_LD)) / (length * (length + 1) / 2),
    }[pooling]
    return vector_D / vector_D.dot(vector_D).sqrt() if normalize else vector_D


def encode_and_differentiate(encoder: Encoder, vector_SD: Tensor) -> tuple[Tensor, Gradients]:
    """The vectors, and the gradient of a product in which every number has a weight of its own."""
    weight_SD = torch.randn(vector_SD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (vector_SD * weight_SD).sum().backward()
    return vector_SD.detach(), gradients_of(encoder)


def assert_same(got: tuple[Tensor, Gradients], want: tuple[Tensor, Gradients], rtol: float = 1e-12) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=rtol, atol=rtol)
    for name, gradient in want[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=rtol, atol=rtol * float(gradient.abs().max() + 1))


@pytest.mark.parametrize("attention", ["padded", "auto"])
def test_a_text_that_comes_twice_is_computed_once_with_the_gradient_of_both(
    attention: Any, tiny_bert_float64: Path
) -> None:
    encoder = load_encoder(tiny_bert_float64, attention=attention, pooling="mean", normalize=True, dtype=torch.float64)
    encoder.freeze()
    encoder.train()
    tokens = tokens_of(encoder, [*TEXTS, *TEXTS[::-1]])
    seen = []
    handle = encoder.backbone.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    got = encode_and_differentiate(encoder, encoder(tokens))
    handle.remove()
    assert sum(seen) < sum(tokens.lengths) / 2 + 10
    encoder.zero_grad()
    assert_same(got, encode_and_differentiate(encoder, encoder(replace(tokens, numbers=None))), 1e-10)


def test_dropout_makes_equal_texts_differ_in_training_alone(tiny_bert_dropout: Path) -> None:
    encoder = load_encoder(tiny_bert_dropout)
    tokens = tokens_of(encoder, ["退款，退款", "退款，退款"])
    for mode, same in ((True, False), (False, True)):
        encoder.train(mode)
        first_D, second_D = encoder(tokens)
        assert torch.equal(first_D, second_D) == same


# --- vectors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_buckets_equal_one_padded_batch_and_single_texts(
    pooling: Any, normalize: bool, tiny_bert_float64: Path
) -> None:
    encoder = load_encoder(tiny_bert_float64, pooling=pooling, normalize=normalize, dtype=torch.float64)
    encoder.freeze()
    tokens = tokens_of(encoder)
    got = encode_and_differentiate(encoder, encoder(tokens))
    assert got[0].shape == (len(TEXTS), 32) and got[0].dtype == torch.float64

    singles = [encoder.backbone(input_ids=text[None]).last_hidden_state[0] for text in tokens.texts()]
    want = encode_and_differentiate(encoder, torch.stack([by_hand(h, pooling, normalize) for h in singles]))
    assert_same(got, want)

    padded = encoder.tokenizer(TEXTS, padding=True, return_tensors="pt")
    hidden_SLD = encoder.backbone(**padded).last_hidden_state
    rows = [hidden_LD[: len(ids)] for hidden_LD, ids in zip(hidden_SLD, tokens.texts(), strict=True)]
    assert_same(encode_and_differentiate(encoder, torch.stack([by_hand(h, pooling, normalize) for h in rows])), want)


def test_pooling_by_hand() -> None:
    hidden_TD = torch.tensor([[1.0, 2.0], [3.0, 6.0], [4.0, 0.0], [5.0, 0.0], [6.0, 3.0]])
    length_S = torch.tensor([2, 3])
    assert pool(hidden_TD, length_S, "cls").tolist() == [[1, 2], [4, 0]]
    assert pool(hidden_TD, length_S, "mean").tolist() == [[2, 4], [5, 1]]
    assert pool(hidden_TD, length_S, "last_token").tolist() == [[3, 6], [6, 3]]
    assert pool(hidden_TD.bfloat16(), length_S, "mean").dtype == torch.float32


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_prompt_left_out_of_the_pooling_is_as_in_sentence_transformers(
    pooling: Any, fixed: bool, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fixed:
        monkeypatch.setattr(FixedRowsOf, "now", fixed_rows_always)
    encoder = load_encoder(tiny_bert, pooling=pooling, normalize=False)
    encoder.settings = replace(encoder.settings, include_prompt=False, max_length=40)
    encoder.save(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    for attention, prompt in (("auto", "检索："), ("padded", "检索："), ("auto", "快递" * 40), ("auto", "")):
        got = load_encoder(tmp_path, attention=attention).encode(TEXTS, prompt=prompt, max_length=40)
        want = theirs.encode(TEXTS, prompt=prompt, convert_to_tensor=True)
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-5, atol=1e-5)


def test_equal_tokens_with_other_prompts_are_other_texts(tiny_bert: Path) -> None:
    encoder = load_encoder(tiny_bert, pooling="mean")
    tokens = Tokens.from_lists([[2, 7, 8, 3]] * 3, [0, 2, 2])
    with torch.no_grad():
        first_D, second_D, third_D = encoder(tokens)
        parts = [encoder(part)[0] for part in tokens.split(1)]
    assert torch.equal(second_D, third_D) and not torch.equal(first_D, second_D)
    torch.testing.assert_close(torch.stack(parts), torch.stack([first_D, second_D, third_D]), rtol=1e-5, atol=1e-6)


def test_no_text_takes_part_in_the_backward(tiny_bert: Path) -> None:
    encoder = load_encoder(tiny_bert)
    encoder.freeze()
    vector_SD = encoder(Tokens.from_lists([]))
    assert vector_SD.shape == (0, 32)
    vector_SD.sum().backward()
    assert all(float(gradient.abs().max()) == 0.0 for gradient in gradients_of(encoder).values())


def test_freeze_leaves_the_pooler_and_on_request_the_positions(tiny_bert: Path) -> None:
    encoder = load_encoder(tiny_bert)
    assert not encoder.training
    encoder.freeze()
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"backbone.pooler.dense.weight", "backbone.pooler.dense.bias"}
    encoder.freeze(position_embeddings=True)
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad} - frozen
    assert frozen == {"backbone.embeddings.position_embeddings.weight"}


def test_an_encoder_needs_its_pooling(tiny_bert: Path) -> None:
    encoder = load_encoder(tiny_bert)
    with pytest.raises(UserError, match="pooling"):
        Encoder(encoder.backbone, encoder.tokenizer, EncoderSettings(pooling=None, normalize=True))
    with pytest.raises(UserError, match="'median'"):
        load_encoder(tiny_bert, pooling="median")  # type: ignore[arg-type]


# --- saved for others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_saved_model_opens_everywhere_with_the_same_vectors(
    pooling: Any, normalize: bool, tiny_bert: Path, tmp_path: Path
) -> None:
    encoder = load_encoder(tiny_bert, pooling=pooling, normalize=normalize)
    encoder.settings = replace(encoder.settings, max_length=40, query_prompt="问题：", passage_prompt="段落：")
    encoder.save(tmp_path)
    with torch.no_grad():
        want = encoder(tokens_of(encoder))
        want_query = encoder(tokens_of(encoder, ["问题：信用卡"]))[0]
        cut = encoder(Tokens.from_lists(tokenize(encoder.tokenizer, ["快递" * 60], 40)))[0]

    again = load_encoder(tmp_path)
    assert again.settings == encoder.settings
    with torch.no_grad():
        assert torch.equal(again(tokens_of(again)), want)

    backbone, tokenizer = AutoModel.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text, vector_D in zip(TEXTS, want, strict=True):
        with torch.no_grad():
            hidden_LD = backbone(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(by_hand(hidden_LD, pooling, normalize), vector_D, rtol=0, atol=1e-5)

    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    torch.testing.assert_close(theirs.encode(TEXTS, convert_to_tensor=True), want, rtol=0, atol=1e-5)
    query = theirs.encode("信用卡", prompt_name="query", convert_to_tensor=True)
    torch.testing.assert_close(query, want_query, rtol=0, atol=1e-5)
    assert theirs.prompts == {"query": "问题：", "passage": "段落：", "document": "段落："}
    assert theirs.max_seq_length == 40
    torch.testing.assert_close(theirs.encode("快递" * 60, convert_to_tensor=True), cut, rtol=0, atol=1e-5)
    assert theirs.similarity_fn_name == ("cosine" if normalize else "dot")
    assert sum(isinstance(module, st_modules.Normalize) for module in theirs) == normalize


@pytest.mark.parametrize("pooling, mode", [("cls", "cls"), ("mean", "mean"), ("last_token", "lasttoken")])
@pytest.mark.parametrize("normalize", [True, False])
def test_what_sentence_transformers_saves_is_read(
    pooling: str, mode: str, normalize: bool, tiny_bert: Path, tmp_path: Path
) -> None:
    """By the installed version: the pooling may stand there as flags or as one name."""
    transformer = st_modules.Transformer(str(tiny_bert))
    pooler = st_modules.Pooling(32, pooling_mode=mode)
    theirs = SentenceTransformer(
        modules=[transformer, pooler] + [st_modules.Normalize()] * normalize,
        prompts={"query": "问：", "document": "文："},
        device="cpu",
    )
    theirs.save_pretrained(str(tmp_path))
    settings = read_settings(tmp_path)
    assert (settings.pooling, settings.normalize) == (pooling, normalize)
    assert (settings.query_prompt, settings.passage_prompt) == ("问：", "文：")
    encoder = load_encoder(tmp_path)
    with torch.no_grad():
        got = encoder(tokens_of(encoder))
    torch.testing.assert_close(got, theirs.encode(TEXTS, convert_to_tensor=True), rtol=0, atol=1e-5)


def test_the_length_that_sentence_transformers_saves_is_read(tiny_bert: Path, tmp_path: Path) -> None:
    transformer = st_modules.Transformer(str(tiny_bert))
    transformer.max_seq_length = 77
    theirs = SentenceTransformer(modules=[transformer, st_modules.Pooling(32)], device="cpu")
    theirs.save_pretrained(str(tmp_path))
    assert SentenceTransformer(str(tmp_path), device="cpu").max_seq_length == 77
    assert read_settings(tmp_path).max_length == 77


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def write_files(folder: Path, modules: Any, pooling: Any = None, **files: Any) -> Path:
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    for name, value in {"modules": modules, "1_Pooling/config": pooling, **files}.items():
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "config, want",
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last_token"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last_token"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode": ["mean_sqrt_len_tokens"]}, "mean_sqrt_len"),
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ({}, "mean"),
    ],
)
def test_the_pooling_is_read_as_flags_and_as_a_name(config: dict[str, Any], want: Any, tmp_path: Path) -> None:
    assert read_settings(write_files(tmp_path, MODULES, config)) == EncoderSettings(pooling=want, normalize=True)


def test_what_is_not_stated_stays_open(tiny_bert: Path) -> None:
    assert read_settings(tiny_bert) == EncoderSettings()
    assert (load_encoder(tiny_bert).settings.pooling, load_encoder(tiny_bert).settings.normalize) == ("cls", True)


def module(kind: str, path: str = "") -> dict[str, str]:
    return {"type": f"sentence_transformers.{kind}", "path": path}


@pytest.mark.parametrize(
    ("modules", "pooling", "stated", "message"),
    [
        (None, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, {}, "the pooling cls . mean, which"),
        (None, {"pooling_mode": "attention"}, {}, "the pooling attention, which is not known here"),
        (
            None,
            {},
            {"similarity_fn_name": "maxsim"},
            "the similarity 'maxsim', and scores here are cosines or inner products",
        ),
        (None, {}, {"truncate_dim": 64}, "state truncate_dim 64"),
        (
            [*MODULES[:2], module("models.LayerNorm")],
            {},
            {},
            "the module sentence_transformers.models.LayerNorm, which",
        ),
        ([{"type": "custom_st.Transformer", "path": ""}], {}, {}, "the module custom_st.Transformer, which cannot be"),
        (MODULES[:1], {}, {}, "modules Transformer; this order cannot be run here"),
        ([*MODULES, module("models.Dense", "3_Dense")], {}, {}, "Pooling, Normalize, Dense; this order cannot"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(
    modules: Any, pooling: Any, stated: Any, message: str, tmp_path: Path
) -> None:
    folder = write_files(tmp_path, modules or MODULES, pooling, config_sentence_transformers=stated)
    with pytest.raises(UserError, match=message):
        read_settings(folder)


SETTINGS = EncoderSettings(
    pooling="weightedmean",
    normalize=False,
    max_length=40,
    query_prompt="问：",
    passage_prompt="",
    other_prompts={"s2p_query": "检索：", "retrieval.query": "找："},
    default_prompt_name="s2p_query",
    similarity="dot",
    do_lower_case=True,
    include_prompt=False,
    dense=(
        DenseSettings("2_Dense", 32, 8, bias=False, activation="torch.nn.modules.linear.Identity"),
        DenseSettings("3_Dense", 8, 8, residual=True),
    ),
)


@pytest.mark.parametrize("settings", [SETTINGS, EncoderSettings("cls", True, 512)])
def test_what_is_written_states_the_same_again(settings: EncoderSettings, tmp_path: Path) -> None:
    write_settings(tmp_path, settings, embedding_size=8)
    assert read_settings(tmp_path) == settings


@pytest.mark.parametrize(
    ("prompts", "query", "passage", "others"),
    [
        ({"query": "q: ", "passage": "p: "}, "q: ", "p: ", {}),
        ({"query": "", "document": "", "passage": "p: "}, "", "p: ", {}),
        ({"document": "d: ", "passage": "p: "}, None, "d: ", {"passage": "p: "}),
        ({"search_query": "q: ", "query": None}, None, None, {"search_query": "q: "}),
        (None, None, None, {}),
    ],
)
def test_prompts_of_any_name(prompts: Any, query: str, passage: str, others: Any, tmp_path: Path) -> None:
    files = {"config_sentence_transformers": {"prompts": prompts, "similarity_fn_name": None}}
    settings = read_settings(write_files(tmp_path, MODULES, {}, **files))
    assert (settings.query_prompt, settings.passage_prompt, settings.other_prompts) == (query, passage, others)
    assert settings.similarity == "cosine"
    write_settings(tmp_path, settings, 32)
    assert read_settings(tmp_path) == replace(settings, max_length=512)


def test_an_old_layout_has_the_transformer_in_its_own_folder(tmp_path: Path) -> None:
    old = [module("models.Transformer", "0_Transformer"), module("models.Pooling", "1_Pooling")]
    (tmp_path / "0_Transformer").mkdir()
    length = {"max_seq_length": 128, "do_lower_case": True}
    settings = read_settings(write_files(tmp_path, old, {}, **{"0_Transformer/sentence_roberta_config": length}))
    assert (settings.transformer_path, settings.max_length, settings.do_lower_case) == ("0_Transformer", 128, True)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target, dirs_exist_ok=True))


def test_a_chosen_pooling_that_contradicts_the_checkpoint_warns(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_encoder(tiny_bert, pooling="mean").save(tmp_path)
    caplog.set_level(logging.WARNING)
    assert load_encoder(tmp_path).settings.pooling == "mean"
    assert load_encoder(tmp_path, pooling="mean").settings.pooling == "mean"
    assert not caplog.records
    assert load_encoder(tmp_path, pooling="cls", normalize=False).settings.pooling == "cls"
    assert "was trained with mean pooling; you chose cls" in caplog.text


def test_half_precision_checkpoints_become_float32_masters(tiny_bert: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny_bert).half()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    want = model.embeddings.word_embeddings.weight.float()
    assert torch.equal(encoder.backbone.embeddings.word_embeddings.weight, want)


def test_a_missing_pooler_is_left_out_and_other_missing_weights_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny_bert)
    weights = {name: w for name, w in model.state_dict().items() if not name.startswith("pooler.")}
    folder = copy_of(tiny_bert, tmp_path / "without_pooler")
    model.save_pretrained(folder, state_dict=weights)
    encoder = load_encoder(folder)
    assert encoder.backbone.pooler is None
    encoder.save(tmp_path / "saved")
    theirs = SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS, convert_to_tensor=True)
    with torch.no_grad():
        torch.testing.assert_close(encoder(tokens_of(encoder)), theirs, rtol=0, atol=1e-5)

    del weights["encoder.layer.1.output.dense.weight"]
    model.save_pretrained(folder, state_dict=weights)
    with pytest.raises(UserError, match="lacks weights of BertModel: encoder.layer.1.output.dense.weight"):
        load_encoder(folder)


def test_the_pooler_of_a_checkpoint_is_kept_on_save(tiny_bert: Path, tmp_path: Path) -> None:
    load_encoder(tiny_bert).save(tmp_path)
    old, new = (AutoModel.from_pretrained(folder).pooler.dense.weight for folder in (tiny_bert, tmp_path))
    assert torch.equal(old, new)


def test_a_name_that_is_no_model(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a model folder"):
        load_encoder(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        load_encoder(tmp_path / "absent")
    with pytest.raises(UserError, match="no such folder"):
        load_encoder("./absent")
    with pytest.raises(UserError, match="could not be loaded as a model"):
        load_encoder("no-such-owner/no-such-model")
    broken = copy_of(tiny_bert, tmp_path / "broken_config")
    (broken / "config.json").write_text("{")
    with pytest.raises(UserError, match="could not be loaded as a model"):
        load_encoder(broken)


@pytest.mark.parametrize("content", [b"not weights", b""], ids=["garbage", "empty"])
def test_weights_cut_off_or_not_weights_at_all(content: bytes, tiny_bert: Path, tmp_path: Path) -> None:
    """As an interrupted download leaves them."""
    broken = copy_of(tiny_bert, tmp_path)
    (broken / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="could not be loaded as a model"):
        load_encoder(broken)


@pytest.mark.parametrize("file", ["modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"])
def test_broken_settings_files_are_the_users_error(file: str, tiny_bert: Path, tmp_path: Path) -> None:
    load_encoder(tiny_bert).save(tmp_path)
    (tmp_path / file).write_text("{broken", encoding="utf-8")
    with pytest.raises(UserError, match=f"{Path(file).name}: not JSON"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("modules", ['{"a": 1}', "[1]", '[{"path": ""}]', '"text"'])
def test_settings_files_of_another_shape_are_the_users_error(modules: str, tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_files(copy_of(tiny_bert, tmp_path), modules)
    with pytest.raises(UserError, match="modules.json"):
        load_encoder(folder)


# --- other models -----------------------------------------------------------------------------------------------------


def test_roberta_counts_positions_from_behind_its_padding_id(tiny_bert: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=22,
        pad_token_id=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    backbone = XLMRobertaModel(config).eval().double()
    encoder = Encoder(backbone, tokenizer, EncoderSettings("mean", True))
    assert encoder.max_length == 20
    assert load_encoder(tiny_bert).max_length == 512
    lists = [[2, *[9] * 18, 3], [2, 8, 3], [2, 3]]
    with torch.no_grad():
        got = encoder(Tokens.from_lists(lists))
        singles = [backbone(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in lists]
    torch.testing.assert_close(got, torch.stack([by_hand(h, "mean", True) for h in singles]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_compiled_layers_compute_the_same(
    pooling: Any, tiny_bert_float64: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced once, for texts of any number and length; the backend is the one that needs no C++ compiler."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **k: compile_module(self, backend="aot_eager", **k))
    plain, compiled = (load_encoder(tiny_bert_float64, dtype=torch.float64, pooling=pooling) for _ in range(2))
    compile_layers(compiled.backbone)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for texts in (
        [[2, 5, 9, 3], [2, 3]],
        [[2, 7, 3], [2, *range(10, 40), 3], [2, 8, 3]],
        [[2, 3]] * 7,
        [[2, 4, 3]] * 9,
    ):
        gradients = []
        for encoder in (plain, compiled):
            encoder.zero_grad()
            vectors = encoder(Tokens.from_lists(texts))
            vectors[:, 0].sum().backward()
            gradients.append([vectors, *(p.grad for p in encoder.parameters() if p.grad is not None)])
        for got, want in zip(*gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[-1]
    assert compiled.backbone.state_dict().keys() == plain.backbone.state_dict().keys()
