"""One row of all texts against each text alone: value and gradient, for every architecture and kernel that runs here."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import load
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from bge_core.encoder import kernels, packing, rectangles, selfcheck
from bge_core.encoder.fixed import FixedRows
from bge_core.encoder.kernels import choose_kernel, dropout_error, kernel_error, usable_kernels
from bge_core.encoder.load import load_encoder, set_attention_dropout
from bge_core.encoder.packing import fixed_hidden, packed_hidden
from bge_core.encoder.rectangles import Packed, Rule, relative_error, sdpa
from bge_core.encoder.selfcheck import packed_or_padded, packing_error
from bge_core.encoder.tokens import Tokens
from bge_core.encoder.varlen import varlen

SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 80, "pad_token_id": 1,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
WINDOWED = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
MODELS = {
    "bert": (BertModel, BertConfig(**SIZES)),
    "roberta": (RobertaModel, RobertaConfig(**SIZES)),
    "xlm_roberta": (XLMRobertaModel, XLMRobertaConfig(**SIZES)),
    "modernbert": (
        ModernBertModel,
        ModernBertConfig(**SIZES, local_attention=8, global_attn_every_n_layers=2, cls_token_id=2, sep_token_id=3),
    ),
    "qwen2": (Qwen2Model, Qwen2Config(**GROUPED)),
    "qwen2_window": (Qwen2Model, Qwen2Config(**GROUPED, **WINDOWED)),
    "qwen3": (Qwen3Model, Qwen3Config(**GROUPED, head_dim=8)),
}  # fmt: skip
LENGTHS = [7, 1, 3, 30, 3, 78, 1, 12]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A random model in training mode without dropout."""
    kind, config = MODELS[name]
    torch.manual_seed(0)
    config = type(config).from_dict(config.to_dict())
    for dropout in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    return kind(config).to(dtype).train()


def texts_of(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, 99, (length,), generator=generator) for length in lengths]


def differentiate(backbone: Any, vectors: list[Tensor]) -> list[Tensor]:
    """The token vectors, and every parameter's gradient of a fixed sum of them."""
    generator = torch.Generator().manual_seed(1)
    loss = sum((v * torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v)).sum() for v in vectors)
    used = [p for name, p in backbone.named_parameters() if not name.startswith("pooler.")]
    return [*(v.detach() for v in vectors), *torch.autograd.grad(loss, used)]


def alone(backbone: Any, texts: list[Tensor]) -> list[Tensor]:
    return differentiate(backbone, [backbone(input_ids=text[None]).last_hidden_state[0] for text in texts])


def together(backbone: Any, texts: list[Tensor], *, first_only: bool = False, fixed: bool = False) -> list[Tensor]:
    """As `alone`, on one row, by rectangles or of fixed shape; with `first_only` of the first tokens."""
    stock = backbone.config._attn_implementation
    packing.enable(backbone)
    try:
        tokens, counts = Tokens(torch.cat(texts), [len(text) for text in texts]), [1] * len(texts)
        if fixed:
            row = FixedRows("", packing.first_position(backbone), 1, distinct=False).row(tokens)
            hidden, order = fixed_hidden(backbone, row, first_only=first_only), range(len(texts))
            vectors = hidden[: len(texts) if first_only else len(tokens.input_id_T)]
            counts = counts if first_only else tokens.lengths
        else:
            vectors, counts, order = packed_hidden(backbone, tokens, first_only=first_only)
        parts = dict(zip(order, vectors.split(counts), strict=True))
        return differentiate(backbone, [parts[i][: 1 if first_only else None] for i in range(len(texts))])
    finally:
        backbone.config._attn_implementation = stock


def assert_close(got: list[Tensor], want: list[Tensor], bound: float) -> None:
    """Relative to each tensor's largest entry; a bias of keys, whose gradient is but rounding, to the largest of all."""
    assert len(got) == len(want)
    floor = 1e-3 * max(float(b.abs().max()) for b in want)
    for a, b in zip(got, want, strict=True):
        assert float((a - b).abs().max()) < bound * max(float(b.abs().max()), floor)


@pytest.fixture(params=[0.0, 0.125, 0.9], ids=lambda waste: f"waste{waste}")
def waste(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Rectangles of equal lengths, as on a CPU; of nearly equal ones, as on a GPU; of all texts together."""
    monkeypatch.setitem(rectangles.MAX_WASTE, "cpu", request.param)
    return float(request.param)


@pytest.fixture(params=[0.0, 0.125, 0.9, "fixed"])
def fixed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """`waste`, or a row of fixed shape."""
    if request.param != "fixed":
        monkeypatch.setitem(rectangles.MAX_WASTE, "cpu", request.param)
    return bool(request.param == "fixed")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 3e-5)])
def test_a_packed_row_is_every_text_alone(name: str, dtype: torch.dtype, bound: float, fixed: bool) -> None:
    backbone, texts = make(name, dtype), texts_of(LENGTHS)
    assert_close(together(backbone, texts, fixed=fixed), alone(backbone, texts), bound)


@pytest.mark.parametrize("name", ["bert", "xlm_roberta"])
@pytest.mark.parametrize("lengths", [LENGTHS, [1, 1, 1], [5]])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 3e-5)])
def test_first_tokens_alone_have_the_same_vectors(
    name: str, lengths: list[int], dtype: torch.dtype, bound: float, fixed: bool
) -> None:
    """The last layer of a BERT leaves out the other tokens: value and every parameter's gradient stay."""
    backbone, texts = make(name, dtype), texts_of(lengths)
    hidden = [backbone(input_ids=text[None]).last_hidden_state[0, :1] for text in texts]
    want = differentiate(backbone, hidden)
    got = together(backbone, texts, first_only=True, fixed=fixed)
    assert_close(got, want, bound)


@pytest.mark.parametrize("name", ["bert", "xlm_roberta"])
def test_the_last_layer_works_on_first_tokens(name: str) -> None:
    backbone, rows = make(name), []
    layers = backbone.encoder.layer
    hooks = [layer.output.register_forward_hook(lambda *args: rows.append(args[2].shape[1])) for layer in layers]
    together(backbone, texts_of(LENGTHS), first_only=True)
    assert rows == [sum(LENGTHS)] * (len(layers) - 1) + [len(LENGTHS)]
    for hook in hooks:
        hook.remove()
    alone(backbone, texts_of([3]))  # and afterwards the model is the stock one again
    assert all("forward" not in vars(layer) for layer in layers)


def test_a_decoder_keeps_all_tokens() -> None:
    backbone = make("bert")
    assert packing.has_bert_layers(backbone) and not packing.has_bert_layers(make("qwen3"))
    backbone.config.is_decoder = True
    assert not packing.has_bert_layers(backbone)


@pytest.mark.parametrize("seed", range(5))
def test_neighbours_change_nothing(seed: int) -> None:
    """A text's vectors do not depend on what else is in the row, nor on the order."""
    backbone = make("modernbert")
    first, *others = texts_of([9, 30, 2, 9], seed)
    packing.enable(backbone)

    def of_first(texts: list[Tensor]) -> Tensor:
        tokens = Tokens(torch.cat(texts), [len(text) for text in texts])
        hidden_TD, _, order = packed_hidden(backbone, tokens)
        place = next(i for i, text in enumerate(texts) if text is first)
        return hidden_TD.detach().split([len(texts[i]) for i in order])[order.index(place)]

    assert_close([of_first([*others, first])], [of_first([first])], 1e-12)
    assert_close([of_first([others[1], first, others[0]])], [of_first([first])], 1e-12)


def test_a_caller_who_knows_nothing_gets_the_stock_attention(tiny_bert: Path) -> None:
    """What transformers' users do with `encoder.backbone`: padding, a mask, no word about packing."""
    packed, padded = load_encoder(tiny_bert), load_encoder(tiny_bert, attention="padded")
    assert packed.attention == "auto" and packed.backbone.config._attn_implementation == packing.IMPLEMENTATION
    batch = packed.tokenizer(["信用卡", "快递怎么退款"], padding=True, return_tensors="pt")
    got, want = (encoder.backbone(**batch).last_hidden_state for encoder in (packed, padded))
    assert torch.equal(got, want)
    packed.save(tiny_bert.parent / "saved_packed")
    assert "bge_packed" not in (tiny_bert.parent / "saved_packed" / "config.json").read_text()


def test_the_way_with_dropout_is_the_formula_with_dropped_weights() -> None:
    """A share too small for 16 bits drops nothing; with all values 1 the mean of a row's sum of weights is 1."""
    packed = Packed([1, 4, 4, 9], torch.tensor([0, 1, 5, 9, 18], dtype=torch.int32))
    query, key, value = (torch.randn(2, 18, 8, dtype=torch.float64) for _ in range(3))
    want, got = (sdpa(query, key, value, packed, Rule(0.3, dropout=p)) for p in (0.0, 2**-20))
    assert relative_error(got, want) < 1e-12
    ones, p = torch.ones(2, 18, 8, dtype=torch.float64), 0.4
    sums = torch.stack([sdpa(query, key, ones, packed, Rule(0.3, dropout=p)) for _ in range(4000)])
    spread = sums.std(0) / 4000**0.5
    assert ((sums.mean(0) - 1).abs() < 5 * spread + 1e-3).all()


def test_dropout_of_attention_is_honoured() -> None:
    packed = Packed([4, 4, 9], torch.tensor([0, 4, 8, 17], dtype=torch.int32))
    query = torch.randn(2, 17, 8)
    out = [sdpa(query, query, query, packed, Rule(0.3, dropout=p)) for p in (0.0, 0.5, 0.5)]
    assert not torch.allclose(out[0], out[1]) and not torch.allclose(out[1], out[2])


@pytest.mark.parametrize("wanted", [0.0, 0.3])
def test_attention_dropout_of_the_flag_is_that_of_the_model(wanted: float, tiny_bert_dropout: Path) -> None:
    encoder = load_encoder(tiny_bert_dropout, attention_dropout=wanted)
    assert {layer.attention.self.dropout.p for layer in encoder.backbone.encoder.layer} == {wanted}
    config = Qwen2Config(**GROUPED)
    set_attention_dropout(config, wanted)
    assert config.attention_dropout == wanted


def test_no_text_is_no_vector(tiny_bert: Path) -> None:
    encoder = load(tiny_bert, torch.float32)
    vectors = encoder(Tokens.from_lists([]))
    assert vectors.shape == (0, 32)
    vectors.sum().backward()  # and yet the ranks may average
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


# --- kernels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device, dtype, attention, want",
    [
        ("cpu", torch.bfloat16, "auto", []),
        ("mps", torch.float16, "auto", []),
        ("cuda", torch.float32, "auto", []),
        ("cuda", torch.bfloat16, "auto", ["torch"]),
        ("cuda", torch.float16, "varlen", ["torch"]),
        ("cuda", torch.float16, "flash", ["torch"]),
        ("cuda", torch.float16, "sdpa", []),
    ],
)
def test_where_a_kernel_may_run(device: str, dtype: torch.dtype, attention: Any, want: list[str]) -> None:
    found = usable_kernels(attention, device, dtype)
    assert [kernel for kernel in found if kernel != "flash_attn"] == want


RULES = {
    "full": Rule(0.2),
    "causal": Rule(0.2, causal=True),
    "window": Rule(0.2, window=6),
    "causal_window": Rule(0.2, causal=True, window=6),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_kernel_for_all_is_the_formula(rule: str, key_heads: int, waste: float) -> None:
    """sdpa against the softmax written out for every token, float64, value and gradient."""
    lengths, generator = [1, 3, 3, 20, 22], torch.Generator().manual_seed(0)
    packed = Packed(lengths, torch.tensor([0, 1, 4, 7, 27, 49], dtype=torch.int32))
    assert len(packed.rectangles) == {0.0: 4, 0.125: 3, 0.9: 1}[waste]
    shapes = [(heads, 49, 8) for heads in (4, key_heads, key_heads)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    query, key, value = inputs
    text, position = packed.text_T, torch.cat([torch.arange(n) for n in lengths])
    distance = position[:, None] - position
    sees = (text[:, None] == text) & (
        distance.abs() <= (math.inf if RULES[rule].window is None else RULES[rule].window)
    )
    if RULES[rule].causal:
        sees &= distance >= 0
    score = query @ key.repeat_interleave(4 // key_heads, 0).mT * RULES[rule].scale
    want = (score.masked_fill(~sees, -math.inf).softmax(-1) @ value.repeat_interleave(4 // key_heads, 0)).transpose(
        0, 1
    )
    got = sdpa(query, key, value, packed, RULES[rule])
    weight = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    results = [[out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)] for out in (got, want)]
    assert_close(results[0], results[1], 1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_operator_is_the_formula(rule: str, key_heads: int) -> None:
    """The definition on a CPU against sdpa, in float64 and with dropout against the formula, value and gradient."""
    cpu = torch.device("cpu")
    with torch.inference_mode():  # as where an encoder's first texts are an evaluation's
        assert kernel_error("", cpu, torch.float64, (4, key_heads), 8, RULES[rule]) < 1e-5  # sdpa's is float32
        assert dropout_error("", cpu, torch.float64, (4, key_heads), 32, replace(RULES[rule], dropout=0.3)) < 1e-5
    lengths = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    inputs = [torch.randn(1, 9, h, 8, dtype=torch.float64, requires_grad=True) for h in (4, key_heads, key_heads)]
    torch.library.opcheck(varlen, (*inputs, lengths, lengths, 5, 5, *RULES[rule].numbers, ""))


@CUDA
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["torch", "flash_attn"])
def test_kernels_of_the_gpu(kernel: str, dtype: torch.dtype, rule: str, dropout: float) -> None:
    """Against float32: 2 % of the largest entry, value and gradient."""
    if kernel == "flash_attn":
        pytest.importorskip("flash_attn")
    error = dropout_error if dropout else kernel_error
    assert error(kernel, torch.device("cuda"), dtype, (4, 2), 64, replace(RULES[rule], dropout=dropout)) < kernels.BOUND


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | None]:
    """`choose_kernel` on a CPU, as if the kernel "torch" could run there."""
    monkeypatch.setattr(kernels, "usable_kernels", lambda *args: ["torch"])
    return partial(choose_kernel.__wrapped__, "auto", torch.device("cpu"), torch.float32, (4, 4), 8)


WRONG: dict[str, tuple[str, Callable[[Rule], Rule]]] = {
    "ignores the window": ("window", lambda rule: replace(rule, window=None)),
    "looks ahead": ("causal", lambda rule: replace(rule, causal=False)),
    "drops nothing": ("dropout", lambda rule: replace(rule, dropout=0.0)),
    "drops more": ("dropout", lambda rule: replace(rule, dropout=2 * rule.dropout)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_kernel_that_computes_otherwise_is_not_used(
    wrong: str, choose: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rules, right = RULES | {"dropout": Rule(0.2, dropout=0.3)}, kernels.varlen
    name, change = WRONG[wrong]
    assert choose(rules[name]) == "torch" and "not used" not in caplog.text

    def computes(*args: Any) -> Any:
        scale, causal, window, dropout = args[7:11]
        rule = change(Rule(scale, causal, None if window < 0 else window, dropout))
        return right(*args[:7], *rule.numbers, args[11])

    monkeypatch.setattr(kernels, "varlen", computes)
    assert choose(rules["full"]) == "torch"
    assert choose(rules[name]) is None
    assert "attention kernel torch differs by" in caplog.text


def test_what_dropout_costs_is_said(
    choose: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = kernels.varlen
    monkeypatch.setattr(kernels, "varlen", lambda *args: right(*args[:10], 0.0, args[11]))
    caplog.set_level("INFO")
    assert choose(Rule(0.2, dropout=0.3)) is None
    assert "attention: sdpa, slower than torch" in caplog.text and "--attention_dropout 0 would give it" in caplog.text


def test_a_kernel_that_does_not_run_is_not_used(
    choose: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any) -> Tensor:
        raise RuntimeError("no kernel image is available\nfor this GPU")

    monkeypatch.setattr(kernels, "varlen", fails)
    assert choose(RULES["full"]) is None
    assert "torch does not run here: no kernel image is available" in caplog.text


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_what_layers_say_of_their_attention(name: str, training: bool) -> None:
    """The rules that the check of the kernels is made for are those that a run asks for."""
    backbone, asked = make(name).train(training), set()
    if packing.has_bert_layers(backbone):
        for layer in backbone.encoder.layer:
            layer.attention.self.dropout.p = 0.25
    else:
        set_attention_dropout(backbone.config, 0.25)
        for module in backbone.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.25
    packing.enable(backbone)
    row = FixedRows("", packing.first_position(backbone), 1, distinct=False).row(Tokens(*[torch.arange(9), [9]]))
    right = packing.varlen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "varlen", lambda *args: asked.add(args[7:11]) or right(*args))
        fixed_hidden(backbone, row)
    calls = packing._attention_calls(backbone)
    assert {rule.numbers for _, _, rule in calls} == asked
    assert {rule.dropout for _, _, rule in calls} == {0.25 if training else 0.0}
    assert {heads for heads, *_ in calls} == {(4, 2) if "qwen" in name else (4, 4)}


# --- the check at load ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_check_passes_and_leaves_no_trace(name: str) -> None:
    backbone = make(name, torch.float32)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    random_state = torch.get_rng_state()
    assert packing_error(backbone) < selfcheck.PACKING_BOUND
    assert torch.equal(torch.get_rng_state(), random_state) and backbone.training
    assert backbone.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())
    assert len(next(m for m in backbone.modules() if isinstance(m, torch.nn.ModuleList))) == 3


def test_a_model_that_ignores_positions_is_padded(caplog: pytest.LogCaptureFixture) -> None:
    backbone = make("bert", torch.float32)
    forward = backbone.forward
    backbone.forward = lambda **arguments: forward(**{k: v for k, v in arguments.items() if k != "position_ids"})
    assert packed_or_padded("mine", backbone, "auto") == "padded"
    assert "mine: on texts in one row a BertModel computes otherwise than on single ones (by " in caplog.text


def test_a_kernel_that_ignores_the_window_is_caught_by_the_model_check(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packing, "sdpa", lambda *args: sdpa(*args[:4], replace(args[4], window=None)))
    assert packed_or_padded("bert", make("bert", torch.float32), "auto") == "auto"
    for name in ("modernbert", "qwen2_window"):
        assert packed_or_padded(name, make(name, torch.float32), "auto") == "padded"
        assert f"{name}: on texts in one row" in caplog.text


def test_a_model_that_looks_across_texts_is_padded() -> None:
    """One whose attention is its own, so that it never asks ours."""
    backbone = make("bert", torch.float32)
    for layer in backbone.encoder.layer:
        layer.attention.self.config = type(backbone.config).from_dict(
            {**backbone.config.to_dict()}, attn_implementation="eager"
        )
    assert packed_or_padded("own", backbone, "auto") == "padded"


def test_what_the_kernels_do_not_know_is_refused() -> None:
    backbone = make("bert", torch.float32)
    query = torch.randn(1, 4, 3, 8)
    packed = Packed([3], torch.tensor([0, 3], dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="BertModel asks for softcap"):
        packing.packed_attention(backbone, query, query, query, None, packed=packed, softcap=30.0)


@pytest.mark.parametrize("attention", ["padded", "sdpa"])
def test_encoders_agree_however_they_compute(attention: Any, tiny_bert_float64: Path) -> None:
    texts = Tokens.from_lists([[2, 5, 9, 3], [2, 3], [2, *range(10, 70), 3], [2, 7, 3]])
    for pooling in ("cls", "mean", "last_token"):
        got, want = (
            load_encoder(tiny_bert_float64, dtype=torch.float64, pooling=pooling, attention=a)(texts)
            for a in (attention, "auto")
        )
        assert relative_error(got, want) < 1e-9
