"""Dropout whose random numbers are fast on a CPU: four entries from one draw of 64 bits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dropout(x: Tensor, p: float) -> Tensor:
    """Set entries of x to 0 with probability p, independently, and scale the others so that the expectation stays.

    Args:
        x: any shape, floating point.
        p: 0 to below 1.

    Returns:
        A new tensor like x. Its randomness comes from torch's generator: the same state, the same entries.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # no compiler traces what follows
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    threshold = max(1, round((1 - p) * 2**16))
    keep = bits.view(torch.int16)[: x.numel()].view(x.shape) <= threshold - 1 - 2**15  # within int16 for any p
    return x * keep.to(x.dtype).mul_(2**16 / threshold)


class Dropout(nn.Dropout):
    """nn.Dropout by `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Dropout."""
        return dropout(x, self.p) if self.training and self.p else x


def replace_dropout(model: nn.Module) -> None:
    """Put a `Dropout` in the place of every nn.Dropout; there are no weights in it."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p).train(child.training))
