"""The cross-encoder: packed and padded against stock transformers, pair by pair; what is no cross-encoder is refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import CHINESE_CHARACTERS, fixed_rows_always
from tiny_reranker import make_tiny_reranker
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    ElectraConfig,
    ElectraForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaTokenizer,
)

import bge_core.encoder.encode as encode_module
from bge_core import UserError
from bge_core.encoder.packing import FixedRowsOf, first_position
from bge_core.encoder.reranker import Reranker, load_reranker
from bge_core.encoder.tokens import Tokens

PAIRS = [
    ("信用卡年费", "年费是三百元"),
    ("怎么退货", "七天之内"),
    ("a", "面包和米" * 20),
    ("", ""),
    ("信用卡" * 3, "密码"),
    ("怎么退货", "面"),
    ("怎么退货", "七天之内"),  # once more
    ("密码忘了", "请点找回密码，再输入手机号码" * 4),
    ("卡", ""),
    *((f"第{i}号账户", "密码在第几页" * (i % 5 + 1)) for i in range(12)),
]
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "num_labels": 1,
}  # fmt: skip
MAX_LENGTH = 64
KINDS = ["bert", "xlm-roberta", "electra", "modernbert"]


def make_random_reranker(kind: str, folder: Path) -> Path:
    """A random cross-encoder of an architecture, with weights large enough for a mistake to show."""
    tokenizer: Any
    if kind == "xlm-roberta":  # <s> q </s></s> p </s>, no token types
        pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *sorted({*CHINESE_CHARACTERS, "a"}), "<mask>"]
        tokenizer = XLMRobertaTokenizer(vocab=[(piece, -float(i > 3)) for i, piece in enumerate(pieces)])
    else:
        tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces_of_bert())}, do_lower_case=True)
    common = SIZES | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    model: Any
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "bert":
            model = BertForSequenceClassification(BertConfig(**common, max_position_embeddings=MAX_LENGTH))
        elif kind == "xlm-roberta":
            model = XLMRobertaForSequenceClassification(
                XLMRobertaConfig(**common, max_position_embeddings=MAX_LENGTH + 2, type_vocab_size=1)
            )
        elif kind == "electra":
            model = ElectraForSequenceClassification(
                ElectraConfig(**common, embedding_size=16, max_position_embeddings=MAX_LENGTH)
            )
        else:
            special: dict[str, Any] = {f"{name}_token_id": 0 for name in ("bos", "eos", "cls", "sep")}
            model = ModernBertForSequenceClassification(
                ModernBertConfig(**common, **special, local_attention=8, max_position_embeddings=MAX_LENGTH)
            )
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 2:
                    weight.normal_(std=0.25)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pieces_of_bert() -> list[str]:
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", *sorted(set(CHINESE_CHARACTERS))]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of each kind. Read only."""
    root = tmp_path_factory.mktemp("rerankers")

    def folder_of(kind: str) -> Path:
        if not (root / kind).exists():
            (make_tiny_reranker if kind == "known" else lambda folder: make_random_reranker(kind, folder))(root / kind)
        return root / kind

    return folder_of


def one_by_one(folder: Path, pairs: list[tuple[str, str]], max_length: int = MAX_LENGTH) -> np.ndarray:
    """The slow reference: stock transformers, eager attention, a pair at a time, nothing padded; float64."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    with torch.no_grad():
        for query, passage in pairs:
            # In lists: an empty passage alone would count as none, and the pair as one text.
            encoded = tokenizer(
                [query], [passage], truncation="only_second", max_length=max_length, return_tensors="pt"
            )
            found.append(model(**encoded).logits[0, 0].item())
    return np.array(found)


def assert_close(found: np.ndarray, want: np.ndarray, bound: float = 1e-5) -> None:
    assert found.dtype == np.float32 and found.shape == want.shape
    assert np.abs(found - want).max() <= bound * np.abs(want).max()


@pytest.mark.parametrize("way", ["auto", "padded", "fixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_is_the_stock_model_pair_by_pair(
    kind: str, way: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    attention: Any = "padded" if way == "padded" else "auto"
    if way == "fixed":
        monkeypatch.setattr(FixedRowsOf, "now", fixed_rows_always)
    want = one_by_one(folder_of(kind), PAIRS)
    assert np.ptp(want) > 0.1 * np.abs(want).max()  # else a mistake would not show
    reranker = load_reranker(folder_of(kind), attention=attention)
    assert reranker.max_length == MAX_LENGTH and not reranker.training
    assert reranker.attention == ("auto" if attention == "auto" and kind in ("bert", "xlm-roberta") else "padded")
    options: dict[str, Any]
    for options in ({}, {"max_tokens": 100}, {"max_tokens": 1}, {"batch_size": 1}, {"batch_size": 4}):
        assert_close(reranker.score(PAIRS, **options), want)


def test_token_types_matter_and_go_with_their_tokens(folder_of: Callable[[str], Path]) -> None:
    """A batch in which the types are right in the order of the texts, not of the packed row, must not come out."""
    reranker = load_reranker(folder_of("bert"))
    pairs = reranker.tokenize(PAIRS)
    assert all(len(pair.ids) == len(pair.types) for pair in pairs)
    with torch.no_grad():
        tokens, flat = Tokens.from_lists([pair.ids for pair in pairs]), [t for pair in pairs for t in pair.types]
        right = reranker(tokens, torch.tensor(flat))
        assert_close(right.numpy(), one_by_one(folder_of("bert"), PAIRS))
        for wrong in (None, torch.tensor(flat[::-1])):
            assert (reranker(tokens, wrong) - right).abs().max() > 0.1


def test_the_known_answer_wins(folder_of: Callable[[str], Path]) -> None:
    reranker = load_reranker(folder_of("known"))
    query = "信用卡年费"
    passages = ["今天天气好", "信息", "信用好", "信用卡很好", "办理信用卡的年", "年费信用卡是多少我不知道", "信信信信"]
    score = reranker.score([(query, passage) for passage in passages])
    share = np.array([sum(character in passage for character in query) / 5 for passage in passages])
    np.testing.assert_allclose(score, 32 * np.tanh(share / 4) - 4, atol=0.3)
    assert score[:6].tolist() == sorted(score[:6]) and score[5] > 3 and score[0] < -3.9
    # the passage in the query is something else than the query in the passage
    assert reranker.score([("年费信用卡是多少我不知道", query)])[0] < 0
    # more than a position away, behind what is cut off
    far = "今天天气好" * 50 + query
    assert load_reranker(folder_of("known"), max_length=512).score([(query, far)])[0] > 3
    assert load_reranker(folder_of("known"), max_length=64).score([(query, far)])[0] < -3.9


def test_a_random_ranking_of_many_is_found(folder_of: Callable[[str], Path]) -> None:
    """Over several blocks and batches each query's own passage wins over those of all other queries."""
    rng = np.random.default_rng(0)
    letters = sorted(set(CHINESE_CHARACTERS))
    queries = ["".join(rng.choice(letters, 5, replace=False)) for _ in range(16)]
    passages = [query[::-1] + "".join(rng.choice(letters, i)) for i, query in enumerate(queries)]
    score = load_reranker(folder_of("known")).score([(query, passage) for query in queries for passage in passages])
    np.testing.assert_array_equal(score.reshape(16, 16).argmax(axis=1), np.arange(16))


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_the_passage_is_cut_and_a_long_query_alone_fails_nothing(kind: str, folder_of: Callable[[str], Path]) -> None:
    reranker = load_reranker(folder_of(kind), max_length=20)
    room, prefix = (16, 1) if kind == "xlm-roberta" else (17, 0)  # XLM-R has 4 special tokens, and "▁" before a text
    longest = room - prefix - 1  # query that leaves a token to the passage
    pairs = [("一" * n, "二" * m) for n in (1, longest - 1, longest, longest + 1, 50) for m in (0, 1, 17, 50)]
    ids = [pair.ids for pair in reranker.tokenize(pairs)]
    one, two = reranker.tokenizer.convert_tokens_to_ids(["一", "二"])
    assert all(len(pair) <= 20 for pair in ids)
    for (query, passage), pair in zip(pairs, ids, strict=True):
        if len(query) <= longest:
            assert pair.count(one) == len(query)
            assert pair.count(two) == len(passage) or len(pair) == 20
        elif len(passage) == 50:
            assert pair.count(one) and pair.count(two) and len(pair) == 20
    assert np.isfinite(reranker.score(pairs)).all()
    # What stands beside a pair does not change how it is cut.
    for texts, want in zip(pairs, ids, strict=True):
        assert reranker.tokenize([texts])[0].ids == want
    cut = [pair for pair in pairs if len(pair[0]) <= longest]
    assert_close(reranker.score(pairs)[: len(cut)], one_by_one(folder_of(kind), cut, max_length=20))


def test_max_length_is_what_the_model_takes(folder_of: Callable[[str], Path]) -> None:
    assert load_reranker(folder_of("xlm-roberta"), max_length=10**6).max_length == MAX_LENGTH
    assert load_reranker(folder_of("bert"), max_length=5).score([("怎么", "退货"), ("", "")]).shape == (2,)
    with pytest.raises(UserError, match="--reranker_max_length 5: .* 4 special tokens .*; use 6 or more"):
        load_reranker(folder_of("xlm-roberta"), max_length=5)


def test_blocks_are_put_together_in_order(folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = load_reranker(folder_of("bert"))
    want = reranker.score(PAIRS).astype(np.float64)
    monkeypatch.setattr(encode_module, "BLOCK", 4)
    assert_close(reranker.score(PAIRS), want)
    assert reranker.score([]).shape == (0,) and reranker.score([]).dtype == np.float32


@pytest.mark.parametrize("world_size", [2, 3, 50])
def test_every_batch_is_computed_by_one_rank(
    world_size: int, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reranker = load_reranker(folder_of("bert"))
    alone = reranker.score(PAIRS, batch_size=4)
    shares, beats = [], []
    monkeypatch.setattr(encode_module, "sum_over_ranks", lambda share: share)
    monkeypatch.setattr(encode_module, "heartbeat", lambda: beats.append(1))
    for rank in range(world_size):
        monkeypatch.setattr(encode_module, "world", lambda rank=rank: (rank, world_size))
        shares.append(reranker.score(PAIRS, batch_size=4))
    assert ((np.array(shares) != 0).sum(axis=0) == 1).all()
    np.testing.assert_array_equal(np.sum(shares, axis=0), alone)  # not a single bit
    assert len(beats) == world_size * math.ceil(len(PAIRS) / 4 / world_size)  # a turn each


def test_half_precision_is_near(folder_of: Callable[[str], Path]) -> None:
    for kind in ("bert", "electra"):
        reranker = load_reranker(folder_of(kind))
        difference = np.abs(reranker.score(PAIRS, precision="bf16") - reranker.score(PAIRS)).max()
        assert 1e-4 < difference < 0.1 * np.abs(reranker.score(PAIRS)).max()
        assert next(reranker.parameters()).dtype == torch.float32


def test_weights_are_float32_whatever_was_saved(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    half = load_reranker(folder_of("bert"), dtype=torch.float16)
    half.model.save_pretrained(tmp_path)
    half.tokenizer.save_pretrained(tmp_path)
    assert next(load_reranker(tmp_path).parameters()).dtype == torch.float32
    assert next(half.parameters()).dtype == torch.float16


def test_a_model_that_packing_changes_is_padded(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bge_core.encoder.selfcheck.packing_error", lambda *args, **more: 1.0)
    assert load_reranker(folder_of("bert")).attention == "padded"


def test_the_longest_pair_has_the_last_position(folder_of: Callable[[str], Path]) -> None:
    reranker = load_reranker(folder_of("xlm-roberta"))
    assert first_position(reranker.model) == 2
    pairs = [("怎么", "面" * 500), ("怎么", "面")]
    assert len(reranker.tokenize(pairs)[0]) == MAX_LENGTH
    assert_close(reranker.score(pairs), one_by_one(folder_of("xlm-roberta"), pairs))


@pytest.mark.parametrize("attention", ["auto", "padded"])
def test_a_logit_that_is_not_a_number_names_the_pair(attention: Any, folder_of: Callable[[str], Path]) -> None:
    reranker = load_reranker(folder_of("bert"), attention=attention)
    with torch.no_grad():
        word = reranker.tokenizer.convert_tokens_to_ids("酒")
        reranker.model.bert.embeddings.word_embeddings.weight[word] = float("nan")
    with pytest.raises(UserError, match="--reranker_name_or_path: .* NaN for 2 of 4 pairs, first '怎么' and '酒店'"):
        reranker.score([("卡", "年费"), ("怎么", "酒店"), ("酒", ""), ("面", "米")])
    with torch.no_grad():
        reranker.model.classifier.bias.fill_(float("inf"))
    with pytest.raises(UserError, match="NaN for 1 of 1 pairs"):
        reranker.score([("面", "米")])


def refused(name: str | Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_reranker(name, **options)
    message = str(caught.value)
    assert message.startswith(f"--reranker_name_or_path {name}: ")
    return message


def test_what_is_no_cross_encoder_is_refused(tiny_bert: Path, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    message = refused(tiny_bert)
    assert "lacks classifier.bias, classifier.weight" in message and "BAAI/bge-reranker-v2-m3" in message

    def changed(folder: Path, **values: Any) -> Path:
        shutil.copytree(folder, tmp_path / "changed", dirs_exist_ok=True)
        config = json.loads((tmp_path / "changed/config.json").read_text()) | values
        (tmp_path / "changed/config.json").write_text(json.dumps(config))
        return tmp_path / "changed"

    one = {"id2label": {"0": "L0"}, "label2id": {"L0": 0}}
    assert "lacks classifier.bias, classifier.weight" in refused(changed(tiny_bert, **one))  # it only says so
    three = {"id2label": {str(i): f"L{i}" for i in range(3)}, "label2id": {f"L{i}": i for i in range(3)}}
    assert "lacks classifier.bias, classifier.weight" in refused(
        changed(folder_of("bert"), **three)
    )  # a head of another shape
    model = BertForSequenceClassification(BertConfig(**SIZES | {"num_labels": 3, "vocab_size": 99}))
    model.save_pretrained(tmp_path / "three")
    load_reranker(folder_of("bert")).tokenizer.save_pretrained(tmp_path / "three")
    assert "it has 3 labels" in refused(tmp_path / "three")


def test_what_is_no_model_is_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    assert "no config.json" in refused(tmp_path)
    assert "no such folder" in refused(tmp_path / "nowhere")
    assert "could not be loaded as a cross-encoder" in refused("nobody/has-such-a-model")
    shutil.copytree(folder_of("bert"), tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "could not be loaded as a cross-encoder" in refused(tmp_path / "cut")
    (tmp_path / "cut" / "config.json").write_text('{"model_type": "no such type"}')
    assert "it is no cross-encoder that can be run here" in refused(tmp_path / "cut")


def test_the_maker_is_a_function_of_nothing(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first, second = (make_tiny_reranker(tmp_path / name) for name in "ab")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(load_reranker(first), Reranker)
