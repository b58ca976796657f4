"""A tiny seeded BERT on disk, so that no test and no benchmark has to download a model.

It is a normal Hugging Face folder (config.json, model.safetensors, tokenizer.json) of the architecture of
`BAAI/bge-*-zh-v1.5`, and the same arguments give the same bytes on every run with the same library versions.
"""

from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

from bge_core.encoder.dense import save_dense
from bge_core.encoder.fixed import FixedRows
from bge_core.encoder.packing import FixedRowsOf, first_position
from bge_core.encoder.settings import DenseSettings, EncoderSettings, write_settings

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

# Frequent characters of written Chinese; what is missing becomes [UNK], as it would with a real vocabulary.
CHINESE_CHARACTERS = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里"
    "用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实"
    "日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政"
    "美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员"
    "解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件"
    "计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基眼书非则听白却界达光放强即像难且权思王象"
    "完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确传师观清今切院让识候带导争运笔始器吗"
    "银卡借贷款息额度账户密码忘号转账支付费率申请办理退换货单查询订购物流快递登录注册绑定证验码服务客热线"
    "医药病症疗检查感冒发烧儿童食谱菜做饭汤鱼肉米面包旅游签证机票酒店天气温度下雨怎怎样哪谁为啥请您谢帮助"
)


def tiny_vocabulary() -> dict[str, int]:
    """Token -> id: special tokens, printable ASCII as whole and as continuation pieces, Chinese characters."""
    ascii_characters = [chr(code) for code in range(33, 127)]
    pieces = [*SPECIAL_TOKENS, *ascii_characters, *("##" + c for c in ascii_characters), *CHINESE_CHARACTERS]
    return {token: index for index, token in enumerate(dict.fromkeys(pieces))}


DENSE = (
    DenseSettings("2_Dense", 32, 48, activation="torch.nn.modules.activation.Tanh"),
    DenseSettings("3_Dense", 48, 24, bias=False, activation="torch.nn.modules.linear.Identity", residual=True),
    DenseSettings("4_Dense", 24, 24, residual=True),
)


def add_dense(folder: Path, dtype: torch.dtype = torch.float32, **settings: object) -> Path:
    """Put DENSE behind a tiny BERT of hidden size 32, with random weights: three layers, 24 dimensions at the end."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for i, dense in enumerate(DENSE):
        shapes = {"linear.weight": (dense.out_features, dense.in_features), "linear.bias": (dense.out_features,)}
        if not dense.bias:
            del shapes["linear.bias"]
        if dense.residual and dense.in_features != dense.out_features:
            shapes["residual.weight"] = shapes["linear.weight"]
        for name, shape in shapes.items():
            noise = torch.randn(shape, generator=generator, dtype=torch.float64) / dense.in_features**0.5
            weights[f"{i}.{name}"] = noise.to(dtype)
    save_dense(folder, DENSE, weights)
    stated = EncoderSettings(**{"pooling": "cls", "normalize": True, **settings}, dense=DENSE)  # type: ignore[arg-type]
    write_settings(folder, stated, embedding_size=24)
    return folder


def make_tiny_bert(
    folder: str | Path,
    *,
    seed: int = 0,
    hidden_size: int = 32,
    num_layers: int = 2,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a small random BERT encoder with its fast tokenizer into `folder` and return the folder.

    The weights are drawn here, name by name in sorted order, and not by transformers' initialization: its order and
    its 0.02 may change, and with 0.02 all CLS vectors of so small a model are nearly parallel, so that a test would
    not see a mistake. With 2/sqrt(hidden_size) the cosines of unrelated texts lie between about 0.1 and 0.9. They are
    drawn in float64 and then rounded, so a float32 folder is the rounded float64 folder of the same seed.

    Args:
        folder: Created if needed; files of the same names are overwritten.
        seed: Seed of the weights.
        hidden_size: Size of the embedding, a multiple of 8 (each attention head has 8).
        num_layers: Number of transformer layers.
        dropout: Both of BERT's dropouts, hidden and attention.
        dtype: Type of the saved weights; `from_pretrained` of transformers 5 keeps it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = tiny_vocabulary()
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 8,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=512,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=vocabulary["[PAD]"],
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws weights too; the caller's generator stays untouched
        model = BertModel(config).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() == 2:
                parameter.copy_(2.0 * noise / hidden_size**0.5)
            else:
                parameter.copy_(0.1 * noise + (1.0 if name.endswith("LayerNorm.weight") else 0.0))
        model.embeddings.word_embeddings.weight[config.pad_token_id].zero_()
    model.to(dtype).save_pretrained(folder)
    BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=512).save_pretrained(folder)
    return folder


def fixed_rows_always(of: FixedRowsOf, *, distinct: bool) -> FixedRows | None:
    """`FixedRowsOf.now` as on a GPU in half precision: put in its place, rows have fixed shape on a CPU, too."""
    if of.attention == "padded":
        return None
    return FixedRows("", first_position(of.backbone), of.pad_id, distinct)
