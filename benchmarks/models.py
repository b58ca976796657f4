"""Models and batches that more than one benchmark measures: random BERTs, the padded way, a step and its data."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from harness import LENGTHS, NO_INSTRUCTION
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from bge_core.encoder import Encoder
from bge_core.encoder.settings import EncoderSettings
from bge_core.encoder.tokens import Tokens, pad_buckets
from bge_core.training.batch import Batch
from bge_core.training.optim import build_optimizer
from bge_core.training.step import StepSettings, forward_backward

if TYPE_CHECKING:
    from bge_core.training.data import TrainingData

Step = Callable[[Batch], None]
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
VOCABULARY = 21_128  # as BGE's Chinese models
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def random_bert(shape: dict[str, Any]) -> BertModel:
    """A BERT without pooler, its weights drawn with seed 0."""
    torch.manual_seed(0)
    return BertModel(BertConfig(**{"vocab_size": VOCABULARY} | shape), add_pooling_layer=False)


def random_encoder(shape: dict[str, Any], attention: str = "padded") -> Encoder:
    """The same as our encoder, with CLS pooling; it reads token ids, for it has no real tokenizer."""
    settings = EncoderSettings(pooling="cls", normalize=True)
    return Encoder(random_bert(shape), SimpleNamespace(pad_token_id=0), settings, attention).train()


class Padded(nn.Module):
    """The stock model as trainers without packing run it: a rectangle for each part, padded to its longest text."""

    def __init__(self, backbone: nn.Module, pooling: str, parts: Callable[[Tokens], list[Tokens]]) -> None:
        super().__init__()
        self.backbone, self.pooling, self.parts = backbone, pooling, parts

    def forward(self, tokens: Tokens) -> Tensor:
        vectors = []
        for part in self.parts(tokens):
            ((order, id_sL, mask_sL),) = pad_buckets(part, 0, max_waste=1.0)
            hidden_sLD = self.backbone(input_ids=id_sL, attention_mask=mask_sL).last_hidden_state.float()
            mean_sD = (hidden_sLD * mask_sL[..., None]).sum(1) / mask_sL.sum(1, keepdim=True)
            vector_sD = hidden_sLD[:, 0] if self.pooling == "cls" else mean_sD
            vectors.append(vector_sD[torch.tensor(order, device=vector_sD.device).argsort()])
        return F.normalize(torch.cat(vectors), dim=-1)


def random_batch(
    query_lengths: Sequence[int], passage_lengths: Sequence[int], vocabulary: int, seed: int, num_processes: int = 1
) -> Batch:
    """Random tokens in texts of these lengths; as many passages to each query, the first of them its positive."""
    generator, lengths = torch.Generator().manual_seed(seed), [*query_lengths, *passage_lengths]
    ids = torch.randint(5, vocabulary, (sum(lengths),), generator=generator)
    own_BG = torch.arange(len(passage_lengths)).view(len(query_lengths), -1)
    passage_ids = torch.arange(len(passage_lengths)) + seed * 10**6
    counts = [(len(query_lengths), len(passage_lengths))] * num_processes
    rows = list(range(len(query_lengths)))
    return Batch(Tokens(ids, lengths), own_BG, passage_ids, passage_ids[own_BG[:, :1]], None, counts, rows)


def training_data(encoder: Encoder, file: str, batch_size: int, **lengths: int) -> "TrainingData":
    """Rows as train.py reads them, group size 2."""
    from bge_core.runtime.config import TrainConfig
    from bge_core.training.data import TrainingData  # a GPU's machine may have no `datasets`

    settings = {"train_group_size": 2, "per_device_train_batch_size": batch_size, "num_train_epochs": 100}
    names = {"model_name_or_path": "unused", "output_dir": "unused", "train_data": [file]}
    config = TrainConfig(**names, **settings, **NO_INSTRUCTION, **(LENGTHS | lengths))
    return TrainingData(config, encoder.tokenizer, encoder.max_length, 0, 1, 1)


def make_step(model: nn.Module, settings: StepSettings, clip: bool = False) -> Step:
    """forward_backward and AdamW's update, as train.py does them."""
    optimizer = build_optimizer(model, 1e-6, 0.0, (0.9, 0.999), 1e-8)
    scaler = settings.scaler

    def step(batch: Batch) -> None:
        forward_backward(model, [batch], settings)
        scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step
