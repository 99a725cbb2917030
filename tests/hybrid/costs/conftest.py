from collections.abc import Callable
from typing import Any

import pytest

from hybrid.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Settings,
    TrainerConfig,
)

HYBRID: dict[str, Any] = {"num_layers": 56, "attention_ratio": 0.08, "mlp_ratio": 0.5, "hidden_size": 4096}
MODELS: dict[str, dict[str, Any]] = {
    "hybrid_8b": {**HYBRID, "num_attention_heads": 32, "num_query_groups": 8},
    "hybrid_800m": {**HYBRID, "num_layers": 48, "hidden_size": 1024, "num_query_groups": 8},
    "mamba2_8b": {"num_layers": 56, "hidden_size": 4096},
    "mamba_8b": {"num_layers": 56, "hidden_size": 4096, "mamba_version": 1},
    "mamba_8b_n16": {"num_layers": 56, "hidden_size": 4096, "mamba_version": 1, "mamba_state_dim": 16},
    "transformer_8b": {
        "layer_pattern": "*-" * 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "activation": "squared_relu",
        "normalization": "LayerNorm",
        "position_embedding": "rope",
        "rotary_percent": 0.5,
    },
    "small": {
        "layer_pattern": "M*-M-*",
        "hidden_size": 128,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "mamba_head_dim": 16,
        "mamba_num_groups": 4,
        "mamba_state_dim": 32,
        "mamba_chunk_size": 64,
        "vocab_size": 1000,
    },
    "small_moe": {
        "layer_pattern": "M*E-E",
        "hidden_size": 128,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "mamba_head_dim": 16,
        "mamba_num_groups": 4,
        "vocab_size": 1000,
        "num_experts": 8,
        "moe_top_k": 2,
        "moe_ffn_hidden_size": 192,
    },
    # nvidia/Nemotron-H-56B-Base-8K, config.json
    "nemotron_h_56b": {
        "layer_pattern": "M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-",
        "hidden_size": 8192,
        "ffn_hidden_size": 32768,
        "num_attention_heads": 64,
        "num_query_groups": 8,
        "attention_head_dim": 128,
        "mamba_state_dim": 256,
        "mamba_num_heads": 256,
        "mamba_head_dim": 64,
        "activation": "squared_relu",
        "vocab_size": 131072,
    },
}


def make_settings(name: str, sequence_length: int = 4096, **changes: Any) -> Settings:
    """Settings of one of MODELS, with `changes` such as parallel__tensor=2."""
    made = Settings(
        name=name,
        model=ModelConfig(**MODELS[name]),
        parallel=ParallelConfig(),
        data=DataConfig(sequence_length=sequence_length),
        optimizer=OptimizerConfig(),
        trainer=TrainerConfig(max_steps=100),
        checkpoint=CheckpointConfig(),
    )
    for place, value in changes.items():
        section, _, field = place.partition("__")
        assert hasattr(getattr(made, section), field), place
        setattr(getattr(made, section), field, value)
    return made


@pytest.fixture(scope="session")
def settings_of() -> Callable[..., Settings]:
    return make_settings
