"""A toy model of random weights, for the engine and for what serves it."""

from typing import Any

import torch

from converters import naming
from hybrid.config import ModelConfig
from hybrid.generation import weights

MODEL = ModelConfig(
    layer_pattern="M-M*",
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    mamba_state_dim=16,
    mamba_head_dim=16,
    mamba_num_groups=2,
    mamba_chunk_size=16,
    vocab_size=257,
    vocab_size_multiple=4,
)


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
