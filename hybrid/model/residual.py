"""The end of every layer: bias, dropout, and the sum with the residual stream."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Output = tuple[Tensor, Tensor | None]


def bias_dropout_add(training: bool, fused: bool) -> Callable[[Output, Tensor, float], Tensor]:
    """Stands for Megatron's `get_bias_dropout_add`, with the same arguments.

    Upstream's runs a dropout of probability 0 as if it were one (a pass over the layer's output, and a mask that is
    kept), unless torch.compile takes it out, which costs seconds at the start of every process. Here the sum is one
    kernel as it is.
    """

    def add(output: Output, residual: Tensor, probability: float) -> Tensor:
        x, bias = output
        if bias is not None:
            x = x + bias
        if training and probability > 0:
            x = F.dropout(x, p=probability, training=True)
        return torch.add(residual, x)

    return add
