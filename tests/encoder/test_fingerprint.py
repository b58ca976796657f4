"""What names an encoder: another name for whatever changes a vector, the same for what does not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

from bge_core.encoder.encode import encode
from bge_core.encoder.fingerprint import fingerprint
from bge_core.encoder.load import load_encoder
from bge_core.encoder.model import Encoder


def other_weight(encoder: Encoder) -> None:
    with torch.no_grad():
        encoder.backbone.encoder.layer[1].output.dense.bias.view(torch.int32)[3] ^= 1  # the last bit


def swap_weights(encoder: Encoder) -> None:
    layers = encoder.backbone.encoder.layer
    layers[0], layers[1] = layers[1], layers[0]


def reshape_weight(encoder: Encoder) -> None:
    weight = encoder.backbone.encoder.layer[1].output.dense.weight
    weight.data = weight.data.reshape(weight.shape[::-1])


def set_config(name: str, value: Any) -> Callable[[Encoder], None]:
    return lambda encoder: setattr(encoder.backbone.config, name, value)


def set_settings(name: str, value: Any) -> Callable[[Encoder], None]:
    return lambda encoder: object.__setattr__(encoder.settings, name, value)


def call_tokenizer(encoder: Encoder) -> None:
    encoder.tokenizer("快递" * 9, truncation=True, max_length=5, padding="max_length")


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (other_weight, False),
        (swap_weights, False),
        (reshape_weight, False),
        (lambda encoder: encoder.backbone.to(torch.float64), False),
        (lambda encoder: encoder.tokenizer.add_tokens(["快递"]), False),
        (lambda encoder: setattr(encoder.tokenizer, "truncation_side", "left"), False),
        (set_settings("pooling", "mean"), False),
        (set_settings("normalize", False), False),
        (set_config("layer_norm_eps", 1e-5), False),
        (set_config("hidden_act", "relu"), False),
        (set_settings("query_prompt", "问："), True),
        (set_config("_name_or_path", "elsewhere"), True),
        (set_config("attention_probs_dropout_prob", 0.1), True),
        (lambda encoder: encoder.train(), True),
        (lambda encoder: encoder.freeze(), True),
        (lambda encoder: encode(encoder, ["快递" * 9, "loan"], max_length=7), True),
        (call_tokenizer, True),
    ],
)
def test_fingerprint_is_of_what_determines_a_vector(
    change: Callable[[Encoder], Any], same: bool, tiny_bert: Path
) -> None:
    encoder = load_encoder(tiny_bert)
    before = fingerprint(encoder)
    assert len(before) == 32 and fingerprint(encoder) == before
    change(encoder)
    assert (fingerprint(encoder) == before) == same


def test_fingerprint_does_not_see_where_a_model_lies(tiny_bert: Path, tmp_path: Path) -> None:
    encoder = load_encoder(tiny_bert)
    encoder.save(tmp_path / "saved")
    for attention in ("auto", "padded"):
        assert fingerprint(load_encoder(tmp_path / "saved", attention=attention)) == fingerprint(encoder)


def test_fingerprint_leaves_the_tokenizer_as_it_is(tiny_bert: Path) -> None:
    encoder = load_encoder(tiny_bert)
    call_tokenizer(encoder)
    before = encoder.tokenizer.backend_tokenizer.to_str()
    assert '"max_length":5' in before
    fingerprint(encoder)
    assert encoder.tokenizer.backend_tokenizer.to_str() == before


def test_a_tokenizer_with_a_part_in_python_has_a_name_and_stays_as_it_is(tmp_path: Path) -> None:
    encoder = load_encoder(zoo.make_folder("RoFormer", tmp_path / "roformer"))
    text = "怎么办理信用卡"
    before = encoder.tokenizer(text)["input_ids"]
    assert len(fingerprint(encoder)) == 32 and encoder.tokenizer(text)["input_ids"] == before
