"""Toy models of every layer kind: megatron-core's, and the same weights as generation takes them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid.quiet  # noqa: F401
from converters import aliases, megatron
from hybrid.costs.pipeline import stage_pattern
from hybrid.generation import weights
from hybrid.generation.runner import Room, Runner
from hybrid.model.build import build_model, transformer_config
from hybrid.training.distributed import start, stop
from tests import toy
from tests.parity import LATENT

EXPERTS = {"num_experts": 4, "moe_top_k": 2, "moe_ffn_hidden_size": 48, "moe_shared_expert_size": 32}
SIGMOID = {"moe_router_score": "sigmoid", "moe_expert_bias": True, "moe_routed_scale": 2.5}
KINDS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "rotary positions on half of each head": {"position_embedding": "rope", "rotary_percent": 0.5},
    "learned positions, tied embeddings": {"position_embedding": "learned", "tie_embeddings": True},
    "pure Mamba": {"layer_pattern": "MM"},
    "Mamba-1": {"layer_pattern": "M-M*", "mamba_version": 1},
    "experts, and depths of multi-token prediction": {"layer_pattern": "MEM*/ME/ME", **EXPERTS},
    "experts chosen by sigmoids": {"layer_pattern": "MEM*", **EXPERTS, **SIGMOID},
    "transformer": {"layer_pattern": "*-*-", "activation": "swiglu", "normalization": "LayerNorm"},
    "latent attention": {"layer_pattern": "M+-+", **LATENT, "rotary_base": 100},
    "squared ReLU with biases": {"activation": "squared_relu", "add_linear_bias": True},
}


class Toy:
    """One kind of model, twice: `theirs` is megatron-core's, `weights` are what generation computes with."""

    def __init__(self, folder: Path, changes: dict[str, Any]):
        # Weights larger than at the start of a training, so that the model has opinions.
        self.settings = toy.settings(folder, model={"init_std": 0.2, **changes})
        pattern = stage_pattern(self.settings)
        self.theirs: Any = build_model(self.settings, transformer_config(self.settings, pattern), pattern).eval()
        state = {name: t for name, t in self.theirs.state_dict().items() if isinstance(t, torch.Tensor)}
        generator = torch.Generator().manual_seed(5)
        for name, tensor in state.items():
            if name.endswith("expert_bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        names, _ = aliases.canonical(name for name in state if aliases.is_weight(name))
        model = self.settings.model
        named = {megatron.live_name(new, model): state[old] for old, new in names.items()}
        self.tensors = {name: tensor.detach().clone() for name, tensor in named.items()}
        self.weights = weights.build(model, self.tensors)

    def whole(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, vocabulary) of megatron-core's forward pass, the one that training takes."""
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.no_grad():
            return self.theirs(tokens, positions, None)[..., : self.weights.vocab_size].float()

    def runner(self, **room: Any) -> Runner:
        return Runner(self.weights, Room(**{"slots": 4, "max_length": 64, "prefill_chunk": 16, **room}))


@pytest.fixture(params=KINDS)
def toy_model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Toy]:
    """A model of each kind."""
    start(toy.settings(tmp_path).parallel, None, seed=7)
    yield Toy(tmp_path, KINDS[request.param])
    stop()


@pytest.fixture(scope="module")
def hybrid_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    """The usual kind, for what does not depend on it."""
    folder = tmp_path_factory.mktemp("toy")
    start(toy.settings(folder).parallel, None, seed=7)
    yield Toy(folder, {})
    stop()
