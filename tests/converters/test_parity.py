"""The same logits from transformers' models and from ours, on converted weights, both ways."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from converters import convert
from hybrid.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Settings,
    TrainerConfig,
)

pytestmark = pytest.mark.slow  # imports both transformers and megatron-core
TOKENS = torch.randint(0, 120, (2, 37), generator=torch.Generator().manual_seed(1))
TOLERANCE = 1e-4
"""On logits of magnitude 1 to 10 in float32; both sides sum in other orders, and the scan in chunks of other sizes."""

SIZES: dict[str, Any] = {
    "vocab_size": 120, "vocab_size_multiple": 8, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2,
    "ffn_hidden_size": 48, "mamba_head_dim": 8, "mamba_num_heads": 8, "mamba_num_groups": 2, "mamba_state_dim": 8,
    "mamba_chunk_size": 16,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "moe_ffn_hidden_size": 24, "moe_shared_expert_size": 16, "moe_router_score": "sigmoid",
    "moe_expert_bias": True, "moe_routed_scale": 2.5,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "nemotron_h": ("NemotronHForCausalLM", {
        "layer_pattern": "M-M*-M-", "activation": "squared_relu", "attention_head_dim": 16, "mamba_num_heads": 6,
    }),
    "nemotron_h moe": ("NemotronHForCausalLM", {
        "layer_pattern": "ME*EM-", "activation": "squared_relu", "attention_head_dim": 16, **EXPERTS,
    }),
    "nemotron_h tied gelu": ("NemotronHForCausalLM", {"layer_pattern": "M-*-", "tie_embeddings": True}),
    "mamba2": ("Mamba2ForCausalLM", {"layer_pattern": "MMM"}),
    "mamba": ("MambaForCausalLM", {"layer_pattern": "MMM", "mamba_version": 1, "tie_embeddings": True}),
    "bamba": ("BambaForCausalLM", {
        "layer_pattern": "M-*-M-", "activation": "swiglu", "position_embedding": "rope", "rotary_percent": 0.5,
        "mamba_num_groups": 1,
    }),
}  # fmt: skip


@pytest.fixture
def ours() -> Iterator[Callable[..., Any]]:
    """Build a model of ours in this process, in float32."""
    from hybrid.model.build import build_model, transformer_config
    from hybrid.training import distributed

    def build(model: ModelConfig) -> Any:
        settings = Settings(
            name="test",
            model=model,
            parallel=ParallelConfig(),
            data=DataConfig(sequence_length=64),
            optimizer=OptimizerConfig(),
            trainer=TrainerConfig(precision="fp32", max_steps=1),
            checkpoint=CheckpointConfig(),
        )
        distributed.stop()
        distributed.start(settings.parallel, None, 1)
        return build_model(settings, transformer_config(settings, model.pattern), model.pattern).eval()

    yield build
    distributed.stop()


def randomize(state: dict[str, torch.Tensor]) -> None:
    """Weights that make every part count."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in state.items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("A_log"):
                tensor.copy_(torch.log(1 + noise.abs() * 3))
            elif "norm" in name:
                tensor.copy_(1 + 0.3 * noise)
            elif name.endswith(("dt_bias", ".D", "dt_proj.bias")):
                tensor.copy_(noise)
            else:
                tensor.copy_(0.2 * noise)


def our_logits(model: Any) -> torch.Tensor:
    positions = torch.arange(TOKENS.shape[1])[None].expand_as(TOKENS)
    with torch.no_grad():
        return model(TOKENS, positions, None)[..., :120]


def their_logits(name: str, folder: Path) -> tuple[Any, torch.Tensor]:
    model_class = getattr(transformers, FAMILIES[name][0])
    model, report = model_class.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        return model.eval(), model(TOKENS).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_logits(tmp_path: Path, ours: Callable[..., Any], name: str) -> None:
    """Ours, saved by megatron-core -> transformers -> saved by transformers -> ours."""
    from megatron.core import dist_checkpointing

    model = ours(ModelConfig(**{**SIZES, **FAMILIES[name][1]}))
    randomize({key: t for key, t in model.state_dict().items() if isinstance(t, torch.Tensor)})
    expected = our_logits(model)
    (tmp_path / "ours").mkdir()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(tmp_path / "ours"))
    said = {key: value for key, value in {**SIZES, **FAMILIES[name][1]}.items() if key != "layer_pattern"}
    convert.convert(tmp_path / "ours", tmp_path / "theirs", "hf", family=name.split()[0], overrides=said)
    theirs, logits = their_logits(name, tmp_path / "theirs")
    assert (logits - expected).abs().max() < TOLERANCE
    assert expected.abs().max() > 1

    theirs.save_pretrained(tmp_path / "saved")
    opened = convert.open_checkpoint(tmp_path / "saved")
    assert not (opened.missing or opened.unknown or opened.assumed)
    again = ours(opened.model)
    (state,) = convert.rank_state(opened, fused_norms=False)
    missing = again.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all("_extra_state" in key for key in missing.missing_keys)
    assert (our_logits(again) - expected).abs().max() < TOLERANCE


def test_time_steps_are_not_clamped(tmp_path: Path, ours: Callable[..., Any]) -> None:
    """transformers clamps NemotronH's time step from below by time_step_min (its issue 48989); what is written here
    says 0, so that small steps stay what they are."""
    from megatron.core import dist_checkpointing

    model = ours(ModelConfig(**{**SIZES, **FAMILIES["nemotron_h"][1]}))
    state = {key: tensor for key, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    randomize(state)
    for key, tensor in state.items():
        if key.endswith("dt_bias"):
            tensor.fill_(-12.0)  # steps of about 6e-6
    (tmp_path / "ours").mkdir()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(tmp_path / "ours"))
    said = {"activation": "squared_relu", "attention_head_dim": 16, "mamba_state_dim": 8, "vocab_size": 120}
    convert.convert(tmp_path / "ours", tmp_path / "theirs", "hf", overrides=said)
    _, logits = their_logits("nemotron_h", tmp_path / "theirs")
    assert (logits - our_logits(model)).abs().max() < TOLERANCE
    config = tmp_path / "theirs/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"time_step_min": 0.001}))
    _, clamped = their_logits("nemotron_h", tmp_path / "theirs")
    assert (clamped - our_logits(model)).abs().max() > 10 * TOLERANCE
