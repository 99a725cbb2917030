"""A toy model of random weights, for the engine and for what serves it."""

from typing import Any

import torch

from converters import naming
from hybrid.config import ModelConfig
from hybrid.generation import weights


def make_weights(model: ModelConfig, **where: Any) -> weights.Weights:
    """Random weights, large enough for opinions."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, param in naming.parameters(model).items():
        tensor = torch.randn(param.shape, generator=generator) * 0.2
        if name.endswith(("norm.weight", "layer_norm_weight", "A_log", ".D")):
            tensor = 1 + tensor
        tensors[name.replace("mixer.conv1d.", "mixer.conv1d_")] = tensor
    return weights.build(model, tensors, **where)
