"""Small models of every kind, their weights, and legacy checkpoints of them that torch.save has written."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from converters import arguments, layout, megatron, naming
from converters.checkpoint import Checkpoint
from hybrid.config import ModelConfig

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "attention_head_dim": 8,
    "mamba_head_dim": 4,
    "mamba_num_heads": 16,
    "mamba_num_groups": 8,
    "mamba_state_dim": 4,
    "vocab_size": 250,
    "vocab_size_multiple": 8,
}
KINDS: dict[str, dict[str, Any]] = {
    "mamba2": {"layer_pattern": "MMMM"},
    "mamba1": {"layer_pattern": "MMMM", "mamba_version": 1},
    "hybrid": {"layer_pattern": "M-M*-", "activation": "squared_relu"},
    "swiglu": {"layer_pattern": "M-*-", "activation": "swiglu", "add_linear_bias": True},
    "layernorm": {"layer_pattern": "M*-M", "normalization": "LayerNorm"},
    "tied": {"layer_pattern": "M-M*", "tie_embeddings": True},
    "learned": {"layer_pattern": "*-*-", "position_embedding": "learned"},
    "moe": {
        "layer_pattern": "ME*E",
        "num_experts": 4,
        "moe_ffn_hidden_size": 24,
        "moe_shared_expert_size": 16,
        "moe_expert_bias": True,
        "moe_router_score": "sigmoid",
    },
    "latent": {
        "layer_pattern": "M+-+",
        "mla_query_rank": 24,
        "mla_kv_rank": 16,
        "mla_head_dim": 6,
        "mla_rope_head_dim": 4,
        "mla_value_head_dim": 8,
    },
    "mtp": {"layer_pattern": "M-M*/M*/M*"},
}


def small_model(kind: str, **changes: Any) -> ModelConfig:
    return ModelConfig(**{**SMALL, **KINDS[kind], **changes})


def random_weights(model: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Weights of a model by canonical name."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: [16 if n == -1 else n for n in param.shape] for name, param in naming.parameters(model).items()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def save_legacy(
    folder: Path, model: ModelConfig, weights: dict[str, torch.Tensor], iteration: int = 100, **args: Any
) -> Path:
    """Write a checkpoint of one rank as Megatron does."""
    rank = folder / f"iter_{iteration:07d}" / "mp_rank_00"
    rank.mkdir(parents=True)
    source = Checkpoint(path=folder, format="megatron", model=model, tensors={})
    stored = arguments.from_model(source, layout.target(model), model.vocab_size_multiple)
    for name, value in args.items():
        setattr(stored, name, value)
    state = {megatron.live_name(name, model): tensor for name, tensor in weights.items()}
    content = {"args": stored, "checkpoint_version": 3.0, "iteration": iteration, "model": state}
    torch.save(content, rank / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written files are synced, which takes a test of many small files far longer than all the rest."""
    monkeypatch.setattr("converters.output.os.fsync", lambda descriptor: None)


@pytest.fixture
def kinds() -> list[str]:
    """The kinds of small models."""
    return list(KINDS)


@pytest.fixture
def make_model() -> Callable[..., ModelConfig]:
    """Give a small model of a kind, with changes to its fields."""
    return small_model


@pytest.fixture
def make_weights() -> Callable[..., dict[str, torch.Tensor]]:
    """Give random weights of a model."""
    return random_weights


@pytest.fixture
def make_legacy() -> Callable[..., Path]:
    """Write a legacy checkpoint of one rank with torch.save."""
    return save_legacy


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, torch.Tensor]]]:
    """Write a legacy checkpoint of a kind of model: (folder, weights)."""

    def make(kind: str, **changes: Any) -> tuple[Path, dict[str, torch.Tensor]]:
        model = small_model(kind, **changes)
        weights = random_weights(model)
        return save_legacy(tmp_path / f"{kind}-source", replace(model), weights), weights

    return make
