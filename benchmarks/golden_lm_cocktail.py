"""Record what LM_Cocktail computes when it merges models, as tests/golden/lm_cocktail.json.

To rerun, in the environment of benchmarks/requirements.txt, from the repository root:

    python benchmarks/golden_lm_cocktail.py

Three of its functions are run as they are: `merge_param` on small state dicts and on tiny BERT models that are saved
and loaded, `compute_weights` with injected losses, and `embedder_loss` on given embeddings and on a tiny model.
"""

import json
import random
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import harness
import torch
from harness import ROOT, Row
from LM_Cocktail import utils as their
from transformers import AutoTokenizer

SOURCE = {
    "package": "LM_Cocktail",
    "functions": ["merge_param", "compute_weights", "embedder_loss", "preprocess_data_for_embedder"],
    "generator": "benchmarks/golden_lm_cocktail.py",
}
EXAMPLES = [
    {"query": "怎么忘记密码", "pos": ["密码忘记后可以在登录页找回"], "neg": ["今天天气很好", "银行卡在哪办理"]},
    {"query": "信用卡额度", "pos": ["额度在账单页查询"], "neg": ["快递三天到", "面包怎么做"]},
    {"query": "how to refund", "pos": ["refunds take 3 days"], "neg": ["bus lines", "退货"]},
]


def to_json(tensor: torch.Tensor) -> Row:
    """A tensor with its type; float32 values survive JSON exactly."""
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "values": tensor.tolist()}


def merge_cases() -> list[Row]:
    """`merge_param` on small dicts: equal and unequal weights, weights that do not sum to 1, an int64 buffer."""
    generator = torch.Generator().manual_seed(0)
    models = [
        {
            "layer.weight": torch.randn(2, 3, generator=generator),
            "layer.bias": torch.randn(3, generator=generator),
            "half": torch.randn(3, generator=generator).to(torch.float16),
            "position_ids": torch.arange(4) + 10 * index,  # int64: not averaged
            "counts": torch.full((2,), index, dtype=torch.int32),
        }
        for index in range(3)
    ]
    mixes = [(2, [0.5, 0.5]), (2, [0.3, 0.7]), (3, [0.2, 0.3, 0.5]), (2, [0.4, 0.4]), (1, [1.0])]
    return [
        {
            "models": [{name: to_json(value) for name, value in model.items()} for model in models[:count]],
            "weights": weights,
            "expected": {name: to_json(value) for name, value in their.merge_param(models[:count], weights).items()},
        }
        for count, weights in mixes
    ]


def weight_cases() -> list[Row]:
    """`compute_weights` with injected losses: what remains is its softmax."""
    cases = []
    for losses, temperature in (([0.9, 1.3, 2.0], 5.0), ([0.9, 1.3, 2.0], 1.0), ([0.4, 0.4], 5.0), ([0.1, 9.0], 0.5)):
        injected = iter(losses)
        model = SimpleNamespace(load_state_dict=lambda state: None)
        model.to = lambda device, model=model: model
        with (
            mock.patch.object(their, "preprocess_data_for_embedder", lambda **_: []),
            mock.patch.object(their, "embedder_loss", lambda injected=injected, **_: next(injected)),
        ):
            weights = their.compute_weights(
                model, None, [{}] * len(losses), model_type="encoder", example_data=[], temperature=temperature
            )
        cases.append({"losses": losses, "temperature": temperature, "expected": weights})
    return cases


class GivenEmbeddings:
    """Stands in for a model: its inputs already are the hidden states."""

    def __call__(self, hidden: torch.Tensor, return_dict: bool) -> SimpleNamespace:
        """Return the hidden states where a transformers model has them."""
        return SimpleNamespace(last_hidden_state=hidden)


def loss_case() -> Row:
    """`embedder_loss` on given CLS vectors, in batches of 2 and 1, with 3 passages per query, the positive first."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(size, 4) for count in (2, 1) for size in (count, 3 * count)]
    drawn = iter([torch.randn(*size, generator=generator) for size in sizes])
    batches = [{"query": query, "passage": passage} for query, passage in zip(drawn, drawn, strict=True)]
    inputs = [[{"hidden": batch["query"][:, None]}, {"hidden": batch["passage"][:, None]}] for batch in batches]
    given = [{name: vectors.tolist() for name, vectors in batch.items()} for batch in batches]
    return {"batches": given, "expected": their.embedder_loss(GivenEmbeddings(), inputs)}


def tiny_model_case() -> Row:
    """Everything together on two tiny models: losses on examples, weights from them, the sum of the merged tensors."""
    settings: Row = {"hidden_size": 16, "num_layers": 2}
    seeds = [0, 1]
    with tempfile.TemporaryDirectory() as folder:
        paths = [harness.tiny_bert(f"{folder}/{seed}", seed=seed, **settings) for seed in seeds]
        tokenizer = AutoTokenizer.from_pretrained(paths[0])
        params = their.get_model_param_list(paths, model_type="encoder")
        model = their.load_model(paths[0], model_type="encoder").eval()
        losses = []
        # neg_number is the length of `neg`: its random.sample then only permutes them, which a loss hardly sees.
        inputs = {"example_data": EXAMPLES, "tokenizer": tokenizer, "batch_size": 2, "neg_number": 2}
        for state in params:
            model.load_state_dict(state)
            data = their.preprocess_data_for_embedder(device=torch.device("cpu"), max_input_length=64, **inputs)
            losses.append(their.embedder_loss(model, data))
        weights = their.compute_weights(
            model, param_list=params, model_type="encoder", temperature=5.0, max_input_length=64, **inputs
        )
        merged = their.merge_param(params, weights)
    settings = {"tiny_bert": {**settings, "seeds": seeds}, "examples": EXAMPLES, "batch_size": 2, "neg_number": 2}
    sums = {name: float(value.double().sum()) for name, value in sorted(merged.items())}
    expected = {"expected_losses": losses, "expected_weights": weights, "expected_sums": sums}
    return {**settings, "max_input_length": 64, "temperature": 5.0, **expected}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "tests/golden/lm_cocktail.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)  # the order of negatives may change the last bit of a loss
    versions = {name: version(name) for name in ("torch", "transformers")}
    result = {
        "source": {**SOURCE, "version": version("LM_Cocktail"), "versions": versions},
        "merge_param": merge_cases(),
        "compute_weights": weight_cases(),
        "embedder_loss": loss_case(),
        "tiny_models": tiny_model_case(),
    }
    args.output.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
