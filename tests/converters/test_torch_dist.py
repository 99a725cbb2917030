"""Distributed checkpoints against megatron-core's own loader and saver, in one process and over several ranks."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from converters import convert, dcp, naming, torch_dist
from converters.tensors import zeros
from hybrid.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Settings,
    TrainerConfig,
)
from hybrid.errors import CheckpointError

Saved = Callable[..., tuple[Path, dict[str, torch.Tensor]]]


def run_settings(model: ModelConfig, **parallel: Any) -> Settings:
    return Settings(
        name="test",
        model=model,
        parallel=ParallelConfig(**parallel),
        data=DataConfig(sequence_length=16),
        optimizer=OptimizerConfig(),
        trainer=TrainerConfig(precision="fp32", max_steps=2),
        checkpoint=CheckpointConfig(),
    )


@pytest.fixture
def build() -> Iterator[Callable[[ModelConfig], Any]]:
    """Build a model in this process, alone."""
    from hybrid.model.build import build_model, transformer_config
    from hybrid.training import distributed

    def make(model: ModelConfig) -> Any:
        settings = run_settings(model)
        distributed.start(settings.parallel, None, 1)
        return build_model(settings, transformer_config(settings, model.pattern), model.pattern)

    yield make
    distributed.stop()


@pytest.mark.parametrize("kind", ["hybrid", "swiglu", "tied", "layernorm", "mamba1", "latent", "moe", "mtp"])
def test_megatron_core_loads_strictly_what_is_written_here(
    saved: Saved, tmp_path: Path, build: Callable[[ModelConfig], Any], kind: str
) -> None:
    """Every key that the model asks for is there with its shape; what it loads is the weights."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    source, weights = saved(kind)
    convert.convert(source, tmp_path / "a", "torch_dist", tensor=2)
    opened = convert.open_checkpoint(tmp_path / "a")
    model = build(opened.model)
    loaded, missing, _ = dist_checkpointing.load(
        {"model": model.sharded_state_dict()},
        str(tmp_path / "a/iter_0000100"),
        strict=StrictHandling.RETURN_ALL,
    )
    # Megatron calls missing what the checkpoint has and the model does not ask for; those are transformer-engine's.
    assert all("_extra_state" in key for key in missing)
    assert loaded["iteration"] == 100 and loaded["args"].hidden_size == 32
    model.load_state_dict(loaded["model"])
    (state,) = convert.rank_state(opened, fused_norms=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name].float()), name
    assert len(list(model.parameters())) == len([name for name in weights if not name.endswith("expert_bias")])


@pytest.mark.parametrize("kind", ["hybrid", "swiglu", "tied", "mamba1", "latent", "moe", "mtp"])
def test_what_megatron_core_saves_is_read(
    tmp_path: Path, build: Callable[[ModelConfig], Any], make_model: Callable[..., ModelConfig], kind: str
) -> None:
    from megatron.core import dist_checkpointing

    model = build(make_model(kind))
    (tmp_path / "a").mkdir()
    dist_checkpointing.save({"model": model.sharded_state_dict(), "iteration": 7}, str(tmp_path / "a"))
    names = {"attention_head_dim": 8, "mamba_state_dim": 4, "activation": make_model(kind).activation}
    opened = convert.open_checkpoint(tmp_path / "a", names)
    assert not (opened.missing or opened.unknown) and opened.iteration == 7
    state = model.state_dict()
    (held,) = convert.rank_state(opened, fused_norms=False)
    for name, tensor in held.items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("kind", ["swiglu", "moe"])
def test_experts_and_halves_that_are_saved_one_by_one_are_read(
    tmp_path: Path, build: Callable[[ModelConfig], Any], make_model: Callable[..., ModelConfig], kind: str
) -> None:
    """Megatron's `singleton_local_shards`, as it saves for optimizers that are not reshardable."""
    from megatron.core import dist_checkpointing

    model = build(make_model(kind, activation="swiglu"))
    (tmp_path / "a").mkdir()
    state = model.sharded_state_dict(metadata={"singleton_local_shards": True})
    dist_checkpointing.save({"model": state, "iteration": 7}, str(tmp_path / "a"))
    opened = convert.open_checkpoint(tmp_path / "a", {"attention_head_dim": 8, "mamba_state_dim": 4})
    assert not (opened.missing or opened.unknown) and opened.model.activation == "swiglu"
    (held,) = convert.rank_state(opened, fused_norms=False)
    for name, tensor in held.items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_like_layers_on_top_of_one_another_are_read_with_their_experts() -> None:
    """As Megatron saves a stack of like layers: the layer is the first dimension, the expert the second."""
    prefix = "decoder.layers.mlp."
    entries = {
        f"{prefix}router.weight": zeros((2, 4, 8), "float32"),
        f"{prefix}experts.experts.linear_fc1.weight": zeros((2, 4, 6, 8), "float32"),
    }
    found, symbols = torch_dist.logical(entries)
    assert symbols == {"decoder": "EE"}
    assert found["decoder.layers.1.mlp.experts.linear_fc1.weight3"].shape == (6, 8)


def test_a_tensor_that_is_no_weight_is_said_to_be_left_out(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert.convert(saved("hybrid")[0], tmp_path / "a", "torch_dist")
    entries, objects = dcp.load(tmp_path / "a/iter_0000100")
    entries["rotary_pos_emb.inv_freq"] = zeros((4,), "float32")
    monkeypatch.setattr(dcp, "load", lambda *_: (entries, objects))
    assert "rotary_pos_emb.inv_freq" in convert.open_checkpoint(tmp_path / "a").left_out


def test_a_half_without_the_other_is_refused() -> None:
    """It would be the projection of an MLP that is not gated."""
    entries = {"decoder.layers.0.mlp.linear_fc1.weight_w": zeros((6, 8), "float32")}
    with pytest.raises(CheckpointError, match=r"mlp.linear_fc1.weight_w is there without its other half"):
        torch_dist.logical(entries)


@pytest.mark.parametrize("kind", ["hybrid", "swiglu", "tied", "mamba1", "latent", "moe", "mtp"])
def test_the_order_of_tensors_is_that_of_parameters(
    build: Callable[[ModelConfig], Any], make_model: Callable[..., ModelConfig], saved: Saved, kind: str
) -> None:
    """Optimizers number parameters in this order."""
    model = build(make_model(kind))
    (held,) = convert.rank_state(saved(kind)[0], fused_norms=False)
    parameters = [name for name in held if not name.endswith("expert_bias")]  # which is a buffer
    assert parameters == [name for name, _ in model.named_parameters()]


def test_experts_stand_on_top_of_one_another(saved: Saved, tmp_path: Path) -> None:
    source, weights = saved("moe")
    convert.convert(source, tmp_path / "a", "torch_dist")
    entries, objects = dcp.load(tmp_path / "a/iter_0000100")
    assert entries["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"].shape == (4, 24, 32)
    assert "decoder.layers.1.mlp.experts.experts.linear_fc2._extra_state/shard_3_4" in objects
    back = dict(convert.stream(tmp_path / "a"))
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


def test_settings_of_ours_are_written_beside(saved: Saved, tmp_path: Path) -> None:
    from hybrid import settings_file

    convert.convert(saved("hybrid")[0], tmp_path / "a", "torch_dist", tensor=2, pipeline=2)
    settings = settings_file.read(tmp_path / "a/iter_0000100")
    assert settings.model.layer_pattern == "M-|M*-" and settings.parallel.tensor == 2
    assert settings.model.padded_vocab_size == naming.parameters(settings.model)[naming.EMBEDDING].shape[0]


def test_any_checkpoint_as_what_training_loads(saved: Saved, tmp_path: Path) -> None:
    from hybrid.training import folder

    source, weights = saved("hybrid")
    convert.convert(source, tmp_path / "a", "hf")
    found = convert.as_torch_dist(f"hf:{tmp_path / 'a'}", tmp_path / "cache")
    assert folder.find_checkpoint(str(found)) == found
    assert dict(convert.stream(found)).keys() == weights.keys()
    before = found.stat().st_mtime_ns
    assert convert.as_torch_dist(tmp_path / "a", tmp_path / "cache") == found and found.stat().st_mtime_ns == before
    assert convert.as_torch_dist(found, tmp_path / "cache") == found


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_goes_along_is_converted_again_when_it_has_changed(saved: Saved, tmp_path: Path, name: str) -> None:
    convert.convert(saved("hybrid")[0], tmp_path / "a", "hf")
    before = convert.as_torch_dist(tmp_path / "a", tmp_path / "cache")
    changed = json.loads((tmp_path / "a" / name).read_text()) | {"eos_token_id": 17}
    (tmp_path / "a" / name).write_text(json.dumps(changed))
    after = convert.as_torch_dist(tmp_path / "a", tmp_path / "cache")
    assert after != before
    kept = "hf_config.json" if name == "config.json" else name
    assert json.loads((after / kept).read_text()) == changed
