"""A tiny cross-encoder on disk with a known answer: the share of the query's characters that the passage has.

Its weights are set by hand, so nothing is trained and nothing depends on a library's initialization. With t = -1 for
tokens of the query, +1 for the passage's, and x = 1 for special tokens, [UNK] among them, -1 for others:

    embedding   a vector of signs for each character, and t, x                      (token, token type)
    layer 1     a token looks for its own character, in the passage first           (attention; the value is t)
                -> m = 1 for a query's character that the passage has, 0 for another
    layer 2     each token looks at the query's characters alone                    (t = x = -1; the value is m)
                -> the first token has the mean of m
    head        32 tanh(m / 4) - 4                                                  (pooler, classifier)
"""

from pathlib import Path

import torch
from tiny_model import SPECIAL_TOKENS, tiny_vocabulary
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

SIZE = 128
CHARACTER = slice(0, SIZE - 6)  # where in a vector the parts are; two entries each that sum to 0, as the norms want it
TYPE, SPECIAL, MATCH = SIZE - 6, SIZE - 4, SIZE - 2


def make_tiny_reranker(folder: str | Path) -> Path:
    """Write the model and its tokenizer, that of `make_tiny_bert`, into `folder` and return the folder."""
    folder, vocabulary = Path(folder), tiny_vocabulary()
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=SIZE, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=512, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=1,
        pad_token_id=vocabulary["[PAD]"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # transformers draws weights; the caller's generator stays untouched
        model = BertForSequenceClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("LayerNorm.weight") else 0.0)
        generator = torch.Generator().manual_seed(0)
        word = model.bert.embeddings.word_embeddings.weight
        for row in word:
            signs = torch.ones(SIZE - 6)
            signs[torch.randperm(SIZE - 6, generator=generator)[::2]] = -1
            row[CHARACTER] = signs
        put(word, SPECIAL, -1.0)
        put(word[: len(SPECIAL_TOKENS)], SPECIAL, 1.0)  # the vocabulary begins with them
        put(model.bert.embeddings.token_type_embeddings.weight, TYPE, torch.tensor([-1.0, 1.0]))

        first, second = model.bert.encoder.layer
        scale = SIZE**0.5  # attention divides by it
        own = first.attention.self
        own.query.weight[CHARACTER, CHARACTER] = torch.eye(SIZE - 6) * 25 * scale / (SIZE - 6)
        own.query.bias[TYPE] = 2.5 * scale
        own.key.weight.copy_(torch.eye(SIZE))
        own.value.weight[MATCH, TYPE], own.value.bias[MATCH] = 0.5, 0.5
        put(first.attention.output.dense.weight.T[MATCH], MATCH, 1.0)
        own = second.attention.self
        own.query.bias[[TYPE, SPECIAL]] = -6.0 * scale
        own.key.weight.copy_(torch.eye(SIZE))
        own.value.weight[MATCH, MATCH] = 1.0
        put(second.attention.output.dense.weight.T[MATCH], MATCH, 1.0)
        model.bert.pooler.dense.weight[0, MATCH] = 0.25
        model.classifier.weight[0, 0], model.classifier.bias[0] = 32.0, -4.0
    model.save_pretrained(folder)
    BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=512).save_pretrained(folder)
    return folder


def put(vectors: Tensor, place: int, value: float | Tensor) -> None:
    """Write a value and its negative into all vectors."""
    vectors[..., place] = value
    vectors[..., place + 1] = -value
