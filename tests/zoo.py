"""Tiny random folders with the layout of model families that people fine-tune: what their public files state, in small.

A folder has the real model type, the real modules, names of files, prompts and switches, and sizes that a test can
afford: two layers of 32, every length an eighth (at most 128 tokens), 1792 dimensions become 48. Weights are drawn by
numpy's RandomState, whose numbers are the same everywhere, so what sentence-transformers makes of a folder
(golden/zoo.json, by benchmarks/golden_zoo.py) holds on any machine. The code of folders with code of their own is
written here.
"""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_model import tiny_vocabulary
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel

Json = dict[str, Any]
HIDDEN = 32
DENSE = 48
WEB_SEARCH = "Instruct: Given a web search query, retrieve relevant passages that answer the query"
ST = "sentence_transformers.models."
IDENTITY, TANH = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Tanh"
POOLING_FLAGS = {
    "cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens", "lasttoken": "lasttoken",
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A folder.

    Args:
        like: a public model with this layout.
        config: config.json, without what all share.
        tokenizer: one of TOKENIZERS.
        modules: what follows the transformer, by kind; None: no files of sentence-transformers.
        max_length: max_seq_length; None: not stated there.
        st: config_sentence_transformers.json, beyond the version; None: no such file.
        code: names of files of code of its own -> text.
        prompts: (query, passage) that its users write; encoding and evaluation use them.
        flags, training_flags: what each stage, and training alone, needs to be told.
        refused: it is no encoder that can be trained here.
    """

    like: str
    config: Json = field(default_factory=dict)
    tokenizer: str = "bert"
    modules: tuple[Json, ...] | None = ()
    max_length: int | None = 64
    do_lower_case: bool = False
    st: Json | None = field(default_factory=dict)
    layout: str = ""
    weights: str = "model.safetensors"
    dense_weights: str = "pytorch_model.bin"
    prefix: str = ""
    extra: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    code: dict[str, str] = field(default_factory=dict)
    prompts: tuple[str, str] = ("", "")
    flags: tuple[str, ...] = ()
    training_flags: tuple[str, ...] = ()
    write: Callable[[Path], None] | None = None
    refused: bool = False


# ------------------------------------------------------------------------------------------------------- modules


def pooling(mode: str, size: int = HIDDEN, **more: Any) -> Json:
    """1_Pooling, in the flags of sentence-transformers 2 to 5."""
    flags = {f"pooling_mode_{flag}": mode == name for name, flag in POOLING_FLAGS.items()}
    return {"kind": "Pooling", "word_embedding_dimension": size, **flags, **more}


def dense(inputs: int = HIDDEN, outputs: int = DENSE, *, bias: bool = True, activation: str = IDENTITY) -> Json:
    """2_Dense: a linear layer after the pooling."""
    return {"kind": "Dense", "in_features": inputs, "out_features": outputs, "bias": bias,
            "activation_function": activation}  # fmt: skip


NORMALIZE: Json = {"kind": "Normalize"}
CLS, MEAN = (pooling("cls"), NORMALIZE), (pooling("mean"), NORMALIZE)


# ------------------------------------------------------------------------------------------------------ tokenizers


def _wordpiece(
    *, lowercase: bool, specials: tuple[str, ...], start: str, end: str, unknown: str = "[UNK]"
) -> Tokenizer:
    pieces = [piece for piece in tiny_vocabulary() if not piece.startswith("[") or len(piece) == 1]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*specials, *pieces]))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _framed(tokenizer, start, end)


def _framed(tokenizer: Tokenizer, start: str | None, end: str | None) -> Tokenizer:
    """With its special tokens around each text."""
    text = " ".join(filter(None, [start, "$A", end]))
    used = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(filter(None, [start, end]))]
    tokenizer.post_processor = processors.TemplateProcessing(single=text, special_tokens=used)
    return tokenizer


def _characters() -> list[str]:
    return [piece for piece in tiny_vocabulary() if len(piece) == 1]


def _unigram(specials: tuple[str, ...], last: tuple[str, ...] = ("<mask>",)) -> Tokenizer:
    """As XLM-R's: pieces with a word's start, unknown where none fits."""
    pieces = dict.fromkeys([*specials, "▁", *_characters(), *(f"▁{c}" for c in _characters()[:94]), *last])
    scored = [(piece, 0.0 if piece in specials else -2.0 - len(piece) % 3) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=list(pieces).index("<unk>"), byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return _framed(tokenizer, "<s>", "</s>")


def _byte_level(specials: tuple[str, ...], start: str | None, end: str | None, normalizer: Any = None) -> Tokenizer:
    """As GPT-2's: every byte is a token, and a few pairs are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("o", "n"), ("e", "r"), ("a", "n"), ("Ġ", "t"), ("o", "w")]
    pieces = [*specials, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _framed(tokenizer, start, end)


def _gemma() -> Tokenizer:
    """As Gemma's: characters, a blank is written ▁, and what is unknown falls into bytes."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces = dict.fromkeys([*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *_characters(), "on"])
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("o", "n")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _framed(tokenizer, "<bos>", "<eos>")


BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BERT_NAMES = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), BERT_SPECIALS, strict=True))
XLMR_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>", "unk_token": "<unk>",
              "pad_token": "<pad>", "mask_token": "<mask>"}  # fmt: skip
LLM = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
TOKENIZERS: dict[str, tuple[Callable[[], Tokenizer], Json]] = {
    "bert": (
        lambda: _wordpiece(lowercase=True, specials=BERT_SPECIALS, start="[CLS]", end="[SEP]"),
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **BERT_NAMES},
    ),
    "bert_cased": (
        lambda: _wordpiece(lowercase=False, specials=BERT_SPECIALS, start="[CLS]", end="[SEP]"),
        {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "strip_accents": False, **BERT_NAMES},
    ),
    "mpnet": (
        lambda: _wordpiece(
            lowercase=True, specials=("<s>", "<pad>", "</s>", "[UNK]", "<mask>"), start="<s>", end="</s>"
        ),
        {"tokenizer_class": "MPNetTokenizer", "do_lower_case": True, **XLMR_NAMES, "unk_token": "[UNK]"},
    ),
    "roformer": (
        lambda: _wordpiece(lowercase=True, specials=BERT_SPECIALS, start="[CLS]", end="[SEP]"),
        {"tokenizer_class": "RoFormerTokenizer", "do_lower_case": True, **BERT_NAMES},
    ),
    "xlm-r": (
        lambda: _unigram(("<s>", "<pad>", "</s>", "<unk>")),
        {"tokenizer_class": "XLMRobertaTokenizer", **XLMR_NAMES},
    ),
    "camembert": (
        lambda: _unigram(("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>")),
        {"tokenizer_class": "CamembertTokenizer", **XLMR_NAMES},
    ),
    "xlnet": (
        lambda: _unigram(("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>"), last=()),
        {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "unk_token": "<unk>"},
    ),
    "t5": (
        lambda: _framed(_unigram(("<pad>", "</s>", "<unk>", "<s>"), last=()), None, "</s>"),
        {"tokenizer_class": "T5Tokenizer", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
    "roberta": (
        lambda: _byte_level(("<s>", "<pad>", "</s>", "<unk>", "<mask>"), "<s>", "</s>"),
        {"tokenizer_class": "RobertaTokenizer", **XLMR_NAMES},
    ),
    "modernbert": (
        lambda: _byte_level(BERT_SPECIALS, "[CLS]", "[SEP]", normalizers.NFC()),
        {"tokenizer_class": "PreTrainedTokenizerFast", **BERT_NAMES},
    ),
    "qwen": (
        lambda: _byte_level(
            ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|endoftext|>", normalizers.NFC()
        ),
        {"tokenizer_class": "Qwen2Tokenizer", "padding_side": "left", "split_special_tokens": False, **LLM},
    ),
    "mistral": (
        lambda: _framed(_unigram(("<unk>", "<s>", "</s>", "<pad>"), last=()), "<s>", "</s>"),
        {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", "bos_token": "<s>",
         "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"},
    ),
    "gpt": (
        lambda: _byte_level(("<|endoftext|>",), None, None),
        {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    ),
    "gemma": (
        _gemma,
        {"tokenizer_class": "GemmaTokenizer", "pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>",
         "unk_token": "<unk>", "padding_side": "right"},
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------ code of a folder's own

CONFIGURATION = """
from transformers import PretrainedConfig


class CLASSConfig(PretrainedConfig):
    model_type = "MODEL_TYPE"
    ATTRIBUTE_MAP

    def __init__(
        self, vocab_size=1000, SIZE=32, LAYERS=2, HEADS=4, INNER=64, MAX_POSITIONS=128, positions="rotary",
        rope_theta=10000.0, rope_scaling=None, layer_norm_eps=1e-12, pad_token_id=0, **others,
    ):
        super().__init__(pad_token_id=pad_token_id, **others)
        self.pad_token_id = pad_token_id
        self.vocab_size, self.layer_norm_eps, self.positions = vocab_size, layer_norm_eps, positions
        self.SIZE, self.LAYERS, self.HEADS, self.INNER = SIZE, LAYERS, HEADS, INNER
        self.MAX_POSITIONS, self.rope_theta, self.rope_scaling = MAX_POSITIONS, rope_theta, rope_scaling
"""

MODELING = """
import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .CONFIG_FILE import CLASSConfig
from .positions import alibi, rotate


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.out = nn.Linear(size, size)
        self.up_gate = nn.Linear(size, 2 * inner, bias=False)
        self.down = nn.Linear(inner, size)
        self.norm1 = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def forward(self, hidden, bias, positions, config):
        batch, length, size = hidden.shape
        split = self.qkv(hidden).view(batch, length, 3, self.heads, size // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = split
        if config.positions == "rotary":
            query, key = rotate(query, positions, config), rotate(key, positions, config)
        scores = query @ key.transpose(-1, -2) / math.sqrt(size // self.heads) + bias
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, size)
        hidden = self.norm1(hidden + self.out(mixed))
        up, gate = self.up_gate(hidden).chunk(2, dim=-1)
        return self.norm2(hidden + self.down(up * nn.functional.gelu(gate)))


class CLASSModel(PreTrainedModel):
    config_class = CLASSConfig
    base_model_prefix = "model"

    def __init__(self, config, add_pooling_layer=False):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids, attention_mask=None, position_ids=None, **others):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden = self.norm(self.embeddings(input_ids))
        bias = (1.0 - attention_mask[:, None, None, :].to(hidden.dtype)) * torch.finfo(hidden.dtype).min
        if self.config.positions == "alibi":
            bias = bias + alibi(self.config.num_attention_heads, input_ids.shape[1]).to(hidden)
        for layer in self.layers:
            hidden = layer(hidden, bias, position_ids, self.config)
        return BaseModelOutput(last_hidden_state=hidden)
"""

POSITIONS = """
import torch


def rotate(x, positions, config):
    half = x.shape[-1] // 2
    base = config.rope_theta * (config.rope_scaling or {}).get("factor", 1.0)
    angle = positions[:, None, :, None].to(x) / base ** (torch.arange(half).to(x) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def alibi(heads, length):
    slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
    place = torch.arange(length)
    return -slopes[:, None, None] * (place[:, None] - place[None, :]).abs()
"""
STOCK_NAMES = {"SIZE": "hidden_size", "LAYERS": "num_hidden_layers", "HEADS": "num_attention_heads",
               "INNER": "intermediate_size", "MAX_POSITIONS": "max_position_embeddings"}  # fmt: skip
GPT_NAMES = {
    "SIZE": "n_embd",
    "LAYERS": "n_layer",
    "HEADS": "n_head",
    "INNER": "n_inner",
    "MAX_POSITIONS": "n_positions",
}


def own_code(model: str, model_type: str, config_file: str, model_file: str, names: dict[str, str]) -> dict[str, str]:
    """The three files of a model of its own: configuration, modeling, and what modeling imports beside it."""
    mapped = {stock: names[key] for key, stock in STOCK_NAMES.items() if names[key] != stock}
    words = {"MODEL_TYPE": model_type, "ATTRIBUTE_MAP": f"attribute_map = {mapped!r}" if mapped else ""}
    words |= {"CONFIG_FILE": config_file, "CLASS": model} | dict(sorted(names.items(), key=lambda item: -len(item[0])))
    texts = {f"{config_file}.py": CONFIGURATION, f"{model_file}.py": MODELING, "positions.py": POSITIONS}
    for file, text in texts.items():
        for word, value in words.items():
            text = text.replace(word, value)
        texts[file] = text.lstrip()
    return texts


def auto_map(model: str, config_file: str, model_file: str) -> Json:
    """The field of config.json that names the code."""
    return {"AutoConfig": f"{config_file}.{model}Config", "AutoModel": f"{model_file}.{model}Model"}


# -------------------------------------------------------------------------------------------------------- families

BERT = {
    "model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu", "hidden_size": HIDDEN,
    "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "layer_norm_eps": 1e-12, "pad_token_id": 0,
    "type_vocab_size": 2, "position_embedding_type": "absolute", "torch_dtype": "float32",
    "transformers_version": "4.30.0",
}  # fmt: skip
XLMR = BERT | {
    "model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"], "max_position_embeddings": 66,
    "layer_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1,
}  # fmt: skip
DECODER = {
    "hidden_act": "silu", "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "attention_dropout": 0.0, "torch_dtype": "float32",
    "transformers_version": "4.51.3", "use_cache": True, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
OWN = {"positions": "rotary", "layer_norm_eps": 1e-12, "pad_token_id": 0, "torch_dtype": "float32"}
SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GTE_CODE = own_code("New", "new", "configuration", "modeling", STOCK_NAMES)
GTE = {
    "model_type": "new", "architectures": ["NewModel"], "auto_map": auto_map("New", "configuration", "modeling"),
    "max_position_embeddings": 128, "rope_theta": 20000, "rope_scaling": {"factor": 8.0, "type": "ntk"}, **SIZES, **OWN,
}  # fmt: skip
JINA_CODE = own_code("JinaBert", "bert", "configuration_bert", "modeling_bert", STOCK_NAMES)
NOMIC_CODE = own_code("NomicBert", "nomic_bert", "configuration_hf_nomic_bert", "modeling_hf_nomic_bert", GPT_NAMES)
TRUSTED = ("--trust_remote_code",)
DENSE_AFTER_MEAN = (pooling("mean"), dense())


def _adapter(folder: Path) -> None:
    base = {"peft_type": "LORA", "base_model_name_or_path": "BAAI/bge-base-zh-v1.5", "r": 8, "lora_alpha": 16,
            "target_modules": ["query", "value"], "task_type": "FEATURE_EXTRACTION"}  # fmt: skip
    write_json(folder / "adapter_config.json", base)
    save_file({"base_model.model.encoder.layer.0.attention.self.query.lora_A.weight": torch.zeros(8, HIDDEN)},
              folder / "adapter_model.safetensors")  # fmt: skip


def _adapter_alone(folder: Path) -> None:
    _adapter(folder)
    for file in ("config.json", "model.safetensors"):
        (folder / file).unlink()


def _modules_of(*kinds: tuple[str, str]) -> Callable[[Path], None]:
    """A folder whose modules are others; (path, type) each."""

    def write(folder: Path) -> None:
        modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(kinds)]
        write_json(folder / "modules.json", modules)

    return write


def _clip(folder: Path) -> None:
    _modules_of(("0_CLIPModel", ST + "CLIPModel"))(folder)
    (folder / "config.json").unlink()
    write_json(folder / "0_CLIPModel/config.json", {"model_type": "clip", "architectures": ["CLIPModel"]})


def _static(folder: Path) -> None:
    _modules_of(("", ST + "StaticEmbedding"), ("1_Normalize", ST + "Normalize"))(folder)
    for file in ("config.json", "tokenizer_config.json", "sentence_bert_config.json"):
        (folder / file).unlink()
    save_file({"embedding.weight": torch.zeros(500, HIDDEN)}, folder / "model.safetensors")


def _model2vec(folder: Path) -> None:
    _static(folder)
    (folder / "modules.json").unlink()
    config = {"model_type": "model2vec", "architectures": ["StaticModel"], "hidden_dim": HIDDEN, "normalize": True}
    write_json(folder / "config.json", config)
    save_file({"embeddings": torch.zeros(500, HIDDEN)}, folder / "model.safetensors")


FAMILIES: dict[str, Family] = {
    "bge-zh-v1.5": Family("BAAI/bge-large-zh-v1.5", BERT, modules=CLS, do_lower_case=True),
    "bge-m3": Family(
        "BAAI/bge-m3", XLMR | {"max_position_embeddings": 130}, "xlm-r", CLS, 128, weights="pytorch_model.bin"
    ),
    "m3e": Family(
        "moka-ai/m3e-base", BERT, modules=(pooling("mean"),), st=None, extra=("embeddings.position_ids",)
    ),
    "text2vec": Family(
        "shibing624/text2vec-base-chinese", BERT, modules=(pooling("mean"),), max_length=16, st=None,
        weights="pytorch_model.bin", extra=("embeddings.position_ids",),
    ),
    "gte-zh": Family("thenlper/gte-base-zh", BERT, modules=CLS),
    "gte-multilingual": Family(
        "Alibaba-NLP/gte-multilingual-base", GTE, "xlm-r", CLS, 128, code=GTE_CODE, flags=TRUSTED
    ),
    "stella-zh-v3": Family("infgrad/stella-base-zh-v3-1792d", BERT, modules=DENSE_AFTER_MEAN),
    "stella-en-v5": Family(
        "dunzhang/stella_en_400M_v5", GTE, "bert", DENSE_AFTER_MEAN, 128, code=GTE_CODE, flags=TRUSTED,
        st={"prompts": {"s2p_query": f"{WEB_SEARCH}.\nQuery: ",
                        "s2s_query": "Instruct: Retrieve semantically similar text.\nQuery: "},
            "default_prompt_name": None, "similarity_fn_name": "cosine"},
        prompts=(f"{WEB_SEARCH}.\nQuery: ", ""), dense_weights="model.safetensors",
    ),
    "piccolo-v2": Family("sensenova/piccolo-large-zh-v2", BERT, modules=DENSE_AFTER_MEAN),
    "Conan": Family(
        "TencentBAC/Conan-embedding-v1", BERT, modules=DENSE_AFTER_MEAN, dense_weights="model.safetensors",
        st={"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    ),
    "zpoint": Family(
        "iampanda/zpoint_large_embedding_zh", BERT | {"torch_dtype": "float16"}, modules=DENSE_AFTER_MEAN,
        dtype=torch.float16,
    ),
    "jina-v2-zh": Family(
        "jinaai/jina-embeddings-v2-base-zh",
        BERT | OWN | {"architectures": ["JinaBertModel"], "position_embedding_type": "alibi", "positions": "alibi",
                      "auto_map": auto_map("JinaBert", "configuration_bert", "modeling_bert"), "pad_token_id": 1,
                      "max_position_embeddings": 128},
        "roberta", (pooling("mean"),), 128, code=JINA_CODE, flags=TRUSTED,
    ),
    "multilingual-e5": Family(
        "intfloat/multilingual-e5-base", XLMR, "xlm-r", MEAN,
        st={"prompts": {"query": "query: ", "passage": "passage: "}, "default_prompt_name": None},
        prompts=("query: ", "passage: "),
    ),
    "e5-mistral": Family(
        "intfloat/e5-mistral-7b-instruct",
        DECODER | {"model_type": "mistral", "architectures": ["MistralModel"], "sliding_window": 16,
                   "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "pad_token_id": 2, "bos_token_id": 1,
                   "eos_token_id": 2},
        "mistral", (pooling("lasttoken"), NORMALIZE), 128,
        st={"prompts": {"web_search_query": f"{WEB_SEARCH}\nQuery: ",
                        "sts_query": "Instruct: Retrieve semantically similar text\nQuery: "},
            "default_prompt_name": None, "similarity_fn_name": None},
        prompts=(f"{WEB_SEARCH}\nQuery: ", ""),
    ),
    "Qwen3-Embedding": Family(
        "Qwen/Qwen3-Embedding-0.6B",
        DECODER | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "torch_dtype": "bfloat16",
                   "max_window_layers": 2, "sliding_window": None, "use_sliding_window": False,
                   "attention_bias": False, "tie_word_embeddings": True, "eos_token_id": 2},
        "qwen", (pooling("lasttoken", include_prompt=True), NORMALIZE), None, dtype=torch.bfloat16,
        st={"prompts": {"query": f"{WEB_SEARCH}\nQuery:", "document": ""}, "default_prompt_name": None,
            "similarity_fn_name": "cosine"},
        prompts=(f"{WEB_SEARCH}\nQuery:", ""),
    ),
    "EmbeddingGemma": Family(
        "google/embeddinggemma-300m",
        {key: value for key, value in DECODER.items() if key not in ("hidden_act", "use_cache")}
        | {"model_type": "gemma3_text", "architectures": ["Gemma3TextModel"], "num_key_value_heads": 1,
           "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 8, "sliding_window": 16,
           "use_bidirectional_attention": True, "rope_local_base_freq": 10000.0, "eos_token_id": 1, "bos_token_id": 2,
           "layer_types": ["sliding_attention", "full_attention"], "attention_bias": False},
        "gemma",
        (pooling("mean", include_prompt=True), dense(HIDDEN, 128, bias=False), dense(128, HIDDEN, bias=False), NORMALIZE),
        128, dense_weights="model.safetensors",
        st={"prompts": {"query": "task: search result | query: ", "document": "title: none | text: ",
                        "STS": "task: sentence similarity | query: ",
                        "Retrieval-query": "task: search result | query: "},
            "default_prompt_name": None, "similarity_fn_name": "cosine"},
        prompts=("task: search result | query: ", "title: none | text: "),
    ),
    "ModernBERT-embed": Family(
        "nomic-ai/modernbert-embed-base",
        {"model_type": "modernbert", "architectures": ["ModernBertModel"], "max_position_embeddings": 128,
         "global_attn_every_n_layers": 2, "local_attention": 16, "global_rope_theta": 160000.0,
         "local_rope_theta": 10000.0, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2,
         "eos_token_id": 3, "classifier_pooling": "mean", "torch_dtype": "float32", "norm_eps": 1e-5, **SIZES},
        "modernbert", MEAN, 128,
        st={"prompts": {"search_query": "search_query: ", "search_document": "search_document: "},
            "default_prompt_name": None, "similarity_fn_name": "cosine"},
        prompts=("search_query: ", "search_document: "),
    ),
    "nomic-v1.5": Family(
        "nomic-ai/nomic-embed-text-v1.5",
        {"model_type": "nomic_bert", "architectures": ["NomicBertModel"], "n_embd": HIDDEN, "n_layer": 2, "n_head": 4,
         "n_inner": 64, "n_positions": 128, "auto_map": auto_map(
             "NomicBert", "configuration_hf_nomic_bert", "modeling_hf_nomic_bert"), **OWN},
        "bert", (pooling("mean"),), 128, code=NOMIC_CODE, flags=TRUSTED,
        prompts=("search_query: ", "search_document: "),
    ),
    "arctic-embed": Family(
        "Snowflake/snowflake-arctic-embed-m", BERT, modules=CLS,
        st={"prompts": {"query": "Represent this sentence for searching relevant passages: "}},
        prompts=("Represent this sentence for searching relevant passages: ", ""),
    ),
    "LaBSE": Family(
        "sentence-transformers/LaBSE", BERT, "bert_cased",
        (pooling("cls"), dense(HIDDEN, HIDDEN, activation=TANH), NORMALIZE), 32,
    ),
    "all-MiniLM": Family("sentence-transformers/all-MiniLM-L6-v2", BERT, modules=MEAN, max_length=32),
    "paraphrase-multilingual": Family(
        "sentence-transformers/paraphrase-multilingual-mpnet-base-v2", XLMR, "xlm-r", (pooling("mean"),), 16
    ),
    "all-mpnet": Family(
        "sentence-transformers/all-mpnet-base-v2",
        {key: value for key, value in BERT.items() if key not in ("type_vocab_size", "position_embedding_type")}
        | {"model_type": "mpnet", "architectures": ["MPNetForMaskedLM"], "max_position_embeddings": 66,
           "layer_norm_eps": 1e-5, "relative_attention_num_buckets": 32, "pad_token_id": 1, "bos_token_id": 0,
           "eos_token_id": 2},
        "mpnet", MEAN, 48,
    ),
    "distiluse": Family(
        "sentence-transformers/distiluse-base-multilingual-cased-v2",
        {"model_type": "distilbert", "architectures": ["DistilBertModel"], "dim": HIDDEN, "hidden_dim": 64,
         "n_heads": 4, "n_layers": 2, "max_position_embeddings": 64, "dropout": 0.1, "attention_dropout": 0.1,
         "activation": "gelu", "pad_token_id": 0, "sinusoidal_pos_embds": False, "tie_weights_": True},
        "bert_cased", (pooling("mean"), dense(HIDDEN, 24, activation=TANH)), 16,
    ),
    "nli-max": Family(
        "sentence-transformers/bert-base-nli-max-tokens", BERT, modules=(pooling("max"),), max_length=16, st=None
    ),
    "sentence-camembert": Family(
        "dangvantuan/sentence-camembert-base",
        XLMR | {"model_type": "camembert", "architectures": ["CamembertModel"], "bos_token_id": 5, "eos_token_id": 6},
        "camembert", (pooling("mean"),), 64,
    ),
    "raw BERT": Family(
        "google-bert/bert-base-chinese", BERT | {"architectures": ["BertForMaskedLM"]}, modules=None, st=None,
        prefix="bert.", extra=("cls.predictions.bias",), flags=("--sentence_pooling_method", "mean"),
    ),
    "0_Transformer": Family(
        "sentence-transformers v0.3 to v1", BERT, modules=(pooling("mean"),), max_length=16, do_lower_case=True,
        tokenizer="bert_cased", layout="0_Transformer", weights="pytorch_model.bin",
    ),
    "RoFormer": Family(
        "junnyu/roformer_chinese_base",
        {key: value for key, value in BERT.items() if key != "position_embedding_type"}
        | {"model_type": "roformer", "architectures": ["RoFormerForMaskedLM"], "embedding_size": HIDDEN,
           "rotary_value": False},
        "roformer", None, st=None, prefix="roformer.", flags=("--sentence_pooling_method", "mean"),
    ),
    "ERNIE": Family(
        "nghuyong/ernie-3.0-base-zh",
        {key: value for key, value in BERT.items() if key != "position_embedding_type"}
        | {"model_type": "ernie", "architectures": ["ErnieModel"], "task_type_vocab_size": 3, "use_task_id": True,
           "hidden_act": "relu", "layer_norm_eps": 1e-5},
        modules=None, st=None, flags=("--sentence_pooling_method", "mean"),
    ),
    "SGPT": Family(
        "Muennighoff/SGPT-125M-weightedmean-nli-bitfit",
        {"model_type": "gpt_neo", "architectures": ["GPTNeoModel"], "hidden_size": HIDDEN, "num_layers": 2,
         "num_heads": 4, "intermediate_size": 64, "max_position_embeddings": 128, "window_size": 16,
         "attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"],
         "activation_function": "gelu_new", "attention_dropout": 0.0, "embed_dropout": 0.0, "resid_dropout": 0.0,
         "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "float32"},
        "gpt", (pooling("weightedmean"),), 16,
    ),
    "include_prompt false": Family(
        "its Pooling says include_prompt: false, as of INSTRUCTOR", BERT,
        modules=(pooling("mean", include_prompt=False), NORMALIZE),
        st={"prompts": {"query": "Represent the question: ", "passage": ""}, "default_prompt_name": None,
            "similarity_fn_name": "cosine"},
        prompts=("Represent the question: ", ""),
    ),
    "default_prompt_name": Family(
        "its config names one of its prompts as the default", BERT, modules=(pooling("cls"),),
        st={"prompts": {"retrieval.query": "query: ", "retrieval.passage": "passage: "},
            "default_prompt_name": "retrieval.query", "similarity_fn_name": "dot"},
        prompts=("query: ", "passage: "), training_flags=("--normalize_embeddings", "False"),
    ),
    "sentence-t5": Family(
        "sentence-transformers/sentence-t5-base",
        {"model_type": "t5", "architectures": ["T5EncoderModel"], "d_model": HIDDEN, "d_kv": 8, "d_ff": 64,
         "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 32, "pad_token_id": 0, "eos_token_id": 1,
         "decoder_start_token_id": 0, "is_encoder_decoder": True, "dropout_rate": 0.1},
        "t5", (pooling("mean"), dense(HIDDEN, HIDDEN, bias=False), NORMALIZE), 32, refused=True,
    ),
    "XLNet": Family(
        "xlnet/xlnet-base-cased",
        {"model_type": "xlnet", "architectures": ["XLNetLMHeadModel"], "d_model": HIDDEN, "n_layer": 2, "n_head": 4,
         "d_inner": 64, "ff_activation": "gelu", "pad_token_id": 5, "bos_token_id": 1, "eos_token_id": 2},
        "xlnet", None, st=None, refused=True,
    ),
    "LoRA adapter": Family("an adapter alone", BERT, modules=None, st=None, write=_adapter_alone, refused=True),
    "LoRA beside its base": Family(
        "an adapter with base weights beside it", BERT, modules=CLS, write=_adapter, refused=True
    ),
    "CLIP": Family("sentence-transformers/clip-ViT-B-32", BERT, modules=None, st=None, write=_clip, refused=True),
    "SPLADE": Family(
        "naver/splade-v3", BERT | {"architectures": ["BertForMaskedLM"]}, modules=None, prefix="bert.",
        write=_modules_of(("", "sentence_transformers.sparse_encoder.models.MLMTransformer"),
                          ("1_SpladePooling", "sentence_transformers.sparse_encoder.models.SpladePooling")),
        refused=True,
    ),
    "StaticEmbedding": Family(
        "sentence-transformers/static-similarity-mrl-multilingual-v1", BERT, write=_static, refused=True
    ),
    "model2vec": Family("minishlab/potion-base-8M", BERT, write=_model2vec, refused=True),
    "jina-v3": Family(
        "jinaai/jina-embeddings-v3", XLMR, "xlm-r", MEAN, 128,
        write=_modules_of(("", "custom_st.Transformer"), ("1_Pooling", ST + "Pooling"), ("2_Normalize", ST + "Normalize")),
        refused=True,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- writing


def write_json(file: Path, value: Any) -> None:
    """A JSON file, its folder made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def make_folder(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the family's folder; another seed: other weights."""
    family = FAMILIES[name]
    root = folder / family.layout
    root.mkdir(parents=True)
    vocabulary_size = _write_tokenizer(family, root)
    write_json(root / "config.json", family.config | {"vocab_size": vocabulary_size})
    for file, text in family.code.items():
        (root / file).write_text(text, encoding="utf-8")
    stem = f"{name} {seed}"
    _write_weights(family, root, stem)
    if family.modules is not None:
        _write_modules(family, folder, stem)
        if family.max_length is not None:
            stated = {"max_seq_length": family.max_length, "do_lower_case": family.do_lower_case}
            write_json(root / "sentence_bert_config.json", stated)
    if family.st is not None:
        version = {"sentence_transformers": "3.0.0", "transformers": "4.41.0", "pytorch": "2.3.0"}
        write_json(folder / "config_sentence_transformers.json", {"__version__": version, **family.st})
    if family.write:
        family.write(folder)
    return folder


def _write_tokenizer(family: Family, folder: Path) -> int:
    """tokenizer.json, tokenizer_config.json and, for BERT's kin, vocab.txt; how many tokens there are."""
    build, names = TOKENIZERS[family.tokenizer]
    tokenizer = build()
    special = {value for key, value in names.items() if key.endswith("_token")}
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in sorted(special)])
    tokenizer.save(str(folder / "tokenizer.json"))
    limit = 512 if family.tokenizer == "qwen" else family.max_length or 64
    write_json(folder / "tokenizer_config.json", {**names, "model_max_length": limit})
    if isinstance(tokenizer.model, models.WordPiece):
        vocabulary = tokenizer.get_vocab()
        (folder / "vocab.txt").write_text("".join(f"{t}\n" for t in sorted(vocabulary, key=vocabulary.get)), "utf-8")  # type: ignore[arg-type]
    return int(tokenizer.get_vocab_size())


def _noise(name: str, shape: Any, stem: str) -> torch.Tensor:
    """Numbers that the name and the seed alone decide: of a matrix of size 2 / sqrt(columns), else small; norms near 1."""
    random = np.random.RandomState(zlib.crc32(f"{stem} {name}".encode()))
    noise = torch.from_numpy(random.standard_normal(tuple(shape)))
    if len(shape) > 1:
        return 2.0 * noise / shape[-1] ** 0.5
    is_norm = name.endswith("weight") and "norm" in name.lower()
    return 0.1 * noise + float(is_norm)


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_file(tensors, file, {"format": "pt"})


def _write_weights(family: Family, folder: Path, stem: str) -> None:
    trust = {"trust_remote_code": bool(family.code)}
    config = AutoConfig.from_pretrained(folder, **trust)
    with torch.random.fork_rng(devices=[]):
        model = AutoModel.from_config(config, **trust)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensors[family.prefix + name] = _noise(name, tensor.shape, stem).to(family.dtype).contiguous()
    for name in family.extra:
        ids = name.endswith("position_ids")
        tensors[name] = torch.arange(config.max_position_embeddings)[None] if ids else torch.zeros(config.vocab_size)
    _save(tensors, folder / family.weights)


def _write_modules(family: Family, folder: Path, stem: str) -> None:
    modules = [(family.layout, ST + "Transformer")]
    for module in family.modules or ():
        path = f"{len(modules)}_{module['kind']}"
        stated = {key: value for key, value in module.items() if key != "kind"}
        modules.append((path, ST + module["kind"]))
        (folder / path).mkdir()
        if stated:
            write_json(folder / path / "config.json", stated)
        if module["kind"] == "Dense":
            shapes = {"linear.weight": (module["out_features"], module["in_features"])}
            shapes |= {"linear.bias": (module["out_features"],)} if module["bias"] else {}
            tensors = {key: _noise(f"{path}.{key}", shape, stem).float() for key, shape in shapes.items()}
            _save(tensors, folder / path / family.dense_weights)
    listed = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)]
    write_json(folder / "modules.json", listed)


# ------------------------------------------------------------------------------------------------------- the data

TEXTS = [
    "信用卡怎么申请？",
    "How do I reset my PASSWORD, Zoë?",
    "",
    "退款需要三天，请到服务点办理。" * 12,
    "Loan 贷款 额度",
    "a",
]
WORDS = ["信用卡", "贷款", "密码", "快递", "退款", "酒店", "签证", "机票", "会员", "物流", "账户", "订单"]
QUESTIONS = [f"{word}怎么办理？" for word in WORDS]
ANSWERS = [f"{word}在{place}办理，请带{thing}。" for word, place, thing in zip(
    WORDS, ["网点", "线上", "首页", "服务点"] * 3, ["证件", "合同", "密码"] * 4, strict=True)]  # fmt: skip
OTHERS = ["今天天气很好", "怎样做面包", "感冒发烧吃什么药", "How to refund?", "Bus Lines"]
CORPUS = [*ANSWERS, *OTHERS]


def write_rows(folder: Path) -> tuple[Path, Path]:
    """Training rows (query, pos, neg) and the corpus, as files."""
    rows = [
        {"query": q, "pos": [a], "neg": [OTHERS[i % 5]]}
        for i, (q, a) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
    ]
    files = folder / "rows.jsonl", folder / "corpus.jsonl"
    for file, lines in zip(files, (rows, [{"text": text} for text in CORPUS]), strict=True):
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return files
