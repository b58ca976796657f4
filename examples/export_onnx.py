"""A model folder as ONNX: one graph from token ids to vectors, with the folder's pooling and normalization in it.

    pip install onnx onnxscript onnxruntime
    python examples/export_onnx.py outputs/model outputs/onnx

Writes <output>/model.onnx, its weights beside it and the tokenizer, and runs them on two texts. Inputs: input_ids and
attention_mask, int64 (texts, tokens), padded on the right; output: vectors, float32 (texts, D).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from bge_core.encoder.load import load_encoder
from bge_core.encoder.settings import EncoderSettings

INPUTS = ["input_ids", "attention_mask"]


class Padded(torch.nn.Module):
    """Backbone, pooling and normalization of a padded batch: what is exported."""

    def __init__(self, backbone: torch.nn.Module, pooling: str, normalize: bool) -> None:
        super().__init__()
        self.backbone, self.pooling, self.normalize = backbone, pooling, normalize

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(S, L) each -> (S, D)."""
        hidden_SLD = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask_SL1 = attention_mask[..., None].to(hidden_SLD.dtype)
        if self.pooling == "mean":
            vector_SD = (hidden_SLD * mask_SL1).sum(1) / mask_SL1.sum(1)
        elif self.pooling == "cls":
            vector_SD = hidden_SLD[:, 0]
        else:
            last_S11 = (attention_mask.sum(1) - 1)[:, None, None]
            vector_SD = hidden_SLD.gather(1, last_S11.expand(-1, 1, hidden_SLD.shape[-1]))[:, 0]
        return torch.nn.functional.normalize(vector_SD, dim=-1) if self.normalize else vector_SD


class Vectors:
    """The vectors of texts by onnxruntime, from the folder that `export` wrote; longer texts are cut."""

    def __init__(self, folder: str | Path, max_length: int = 512) -> None:
        import onnxruntime  # type: ignore[import-not-found,unused-ignore]

        self.tokenizer, self.max_length = AutoTokenizer.from_pretrained(folder), max_length
        self.session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])

    def __call__(self, texts: Sequence[str], prompt: str = "") -> np.ndarray:
        """(texts, D) float32."""
        found = self.tokenizer(
            [prompt + text for text in texts], padding=True, truncation=True, max_length=self.max_length,
            return_tensors="np",
        )  # fmt: skip
        vectors: np.ndarray = self.session.run(None, {name: found[name].astype(np.int64) for name in INPUTS})[0]
        return vectors


def export(model: str, output: str | Path) -> EncoderSettings:
    """Write model.onnx and the tokenizer to `output`, by torch's exporter, for any number of texts and tokens.

    Returns:
        What the model's folder states: its prompts and its length.
    """
    encoder, tokenizer = load_encoder(model), AutoTokenizer.from_pretrained(model)
    settings = encoder.settings
    if settings.dense or settings.pooling not in ("cls", "mean", "last_token") or not settings.include_prompt:
        raise SystemExit(f"{model}: has Dense modules or a pooling that this example does not write: add it to Padded")
    padded = Padded(AutoModel.from_pretrained(model, dtype=torch.float32), settings.pooling, settings.normalize).eval()
    example: Any = tokenizer(["什么是向量检索？", "信用卡在境外取现怎么收费"], padding=True, return_tensors="pt")
    shape = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens", max=encoder.max_length)}
    Path(output).mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        padded, tuple(example[name] for name in INPUTS), f"{output}/model.onnx", dynamo=True, input_names=INPUTS,
        output_names=["vectors"], dynamic_shapes=(shape, shape), verbose=False,
    )  # fmt: skip
    tokenizer.save_pretrained(output)
    return settings


def main() -> None:
    """Export, and use it once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder")
    parser.add_argument("output")
    args = parser.parse_args()
    settings = export(args.model, args.output)
    vectors = Vectors(args.output)(["如何开通网上银行？", "怎样办理网银"], settings.query_prompt or "")
    print(f"written: {args.output}; two questions: {vectors.shape}, inner product {vectors[0] @ vectors[1]:.4f}")


if __name__ == "__main__":
    main()
