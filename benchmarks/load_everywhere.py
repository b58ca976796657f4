"""Do transformers, sentence-transformers and FlagEmbedding give a saved model the vectors that we give it?

    PYTHONPATH=. BENCH_ENV/bin/python benchmarks/load_everywhere.py outputs/demo/trained [MORE FOLDERS]

Prints the largest difference of any number of any vector, for each library; exit code 1 above 1e-5.
"""

import argparse
import sys

import numpy as np
import torch
from FlagEmbedding import FlagModel
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from bge_core.encoder.encode import encode
from bge_core.encoder.load import load_encoder

TEXTS = ["什么是向量检索？", "信用卡在境外取现怎么收费", "hello world", "长" * 600, "1"]


def with_transformers(folder: str, pooling: str, normalize: bool, max_length: int) -> np.ndarray:
    """The vectors by AutoModel and a hand-written pooling, all texts padded together."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    with torch.no_grad():
        hidden_BTD, mask_BT1 = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    lengths = mask_BT1.sum(1)
    vectors = {
        "cls": hidden_BTD[:, 0],
        "mean": (hidden_BTD * mask_BT1).sum(1) / lengths,
        "last_token": hidden_BTD[torch.arange(len(TEXTS)), lengths[:, 0] - 1],
    }[pooling]
    return (torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors).numpy()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    worst = 0.0
    for folder in parser.parse_args().folders:
        encoder = load_encoder(folder)
        settings = encoder.settings
        length = settings.max_length or 512
        ours = encode(encoder, TEXTS, max_length=length)
        flag_model = FlagModel(
            folder,
            use_fp16=False,
            pooling_method=settings.pooling,
            normalize_embeddings=settings.normalize,
            devices="cpu",
        )
        theirs = {
            "transformers": with_transformers(folder, settings.pooling, settings.normalize, length),
            "sentence-transformers": SentenceTransformer(folder, device="cpu").encode(TEXTS),
            "FlagEmbedding": flag_model.encode(TEXTS, max_length=length),
        }
        for name, vectors in theirs.items():
            difference = float(np.abs(vectors - ours).max())
            worst = max(worst, difference)
            print(f"{folder}  {name:<22} {difference:.1e}")
    return int(worst > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
