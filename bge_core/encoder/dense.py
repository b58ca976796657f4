"""Linear layers behind the pooling, as sentence-transformers keeps them: a folder each, with its own weights."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bge_core import UserError
from bge_core.encoder.settings import DenseSettings, find_file


class Dense(nn.Module):
    """activation(W x + b), with + x or + R x where `settings` says so, in the input's precision.

    Args:
        settings: see there; the weights are on the meta device until they are loaded.
    """

    def __init__(self, settings: DenseSettings) -> None:
        super().__init__()
        sizes = settings.in_features, settings.out_features
        self.linear = nn.Linear(*sizes, bias=settings.bias, device="meta")
        if settings.residual:
            self.residual = nn.Linear(*sizes, bias=False, device="meta") if sizes[0] != sizes[1] else nn.Identity()
        self.activation = activation_of(settings)

    def forward(self, vector_SD: Tensor) -> Tensor:
        """Vectors (S, in_features), float32 or wider, to (S, out_features); autocast does not round here."""
        with torch.autocast(vector_SD.device.type, enabled=False):
            result: Tensor = self.activation(_product(vector_SD, self.linear))
            if not hasattr(self, "residual"):
                return result
            return result + (
                vector_SD if isinstance(self.residual, nn.Identity) else _product(vector_SD, self.residual)
            )


def _product(x: Tensor, linear: nn.Linear) -> Tensor:
    return F.linear(x, linear.weight.to(x.dtype), None if linear.bias is None else linear.bias.to(x.dtype))


def activation_of(settings: DenseSettings) -> nn.Module:
    """The activation, a module of torch.nn without arguments. UserError for others, whose code would have to be run."""
    kind = getattr(nn, settings.activation.rpartition(".")[2], None)
    if not settings.activation.startswith("torch.nn.") or not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(f"{settings.path}: the activation {settings.activation} is not one of torch.nn")
    return kind()


def load_dense(
    name: str | Path, stated: tuple[DenseSettings, ...], hidden_size: int, dtype: torch.dtype, **access: Any
) -> nn.Sequential:
    """The Dense modules of a folder or hub model, with their weights.

    Args:
        name: hub name or folder.
        stated: what it states of them, in order.
        hidden_size: of the vectors that the pooling gives.
        dtype: of the weights.
        access: cache_dir, token.

    Raises:
        UserError: sizes that do not follow each other, weights missing, damaged or of another shape.
    """
    modules = []
    for settings in stated:
        if settings.in_features != hidden_size:
            raise UserError(
                f"{name}/{settings.path}: takes vectors of {settings.in_features} dimensions and gets {hidden_size}"
            )
        hidden_size = settings.out_features
        module = Dense(settings)
        file = dense_file(name, settings.path, **access)
        try:
            weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
            module.load_state_dict({key: value.to(dtype) for key, value in weights.items()}, assign=True)
        except Exception as error:  # of torch, pickle or safetensors, each with its own types for a damaged file
            raise UserError(f"{file}: are not the weights of {settings}: {str(error).splitlines()[0]}") from None
        modules.append(module)
    return nn.Sequential(*modules)


def dense_file(name: str | Path, path: str, **access: Any) -> Path:
    """The weights of the Dense module at `path` in a folder or hub model. UserError where it has none."""
    files = (find_file(name, f"{path}/{file}", **access) for file in ("model.safetensors", "pytorch_model.bin"))
    if found := next(filter(None, files), None):
        return found
    raise UserError(f"{name}/{path}: has no weights (model.safetensors)")


def save_dense(folder: Path, stated: tuple[DenseSettings, ...], weights: dict[str, Tensor]) -> None:
    """Write the modules' weights, each into its folder, where `write_settings` writes what it is.

    Args:
        folder: of the model.
        stated: what it states of the modules, in order.
        weights: by the names in the encoder's `dense`, as "0.linear.weight".
    """
    for i, settings in enumerate(stated):
        own = {name.removeprefix(f"{i}."): tensor for name, tensor in weights.items() if name.startswith(f"{i}.")}
        (folder / settings.path).mkdir(parents=True, exist_ok=True)
        save_file(own, folder / settings.path / "model.safetensors", {"format": "pt"})
