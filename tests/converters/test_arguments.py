"""Arguments of Megatron that change what a model computes: seen, kept, and refused where our model would compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from converters import arguments, convert
from hybrid.config import ModelConfig
from hybrid.errors import ConfigError

Make = Callable[..., Any]

CHANGING: list[tuple[str, dict[str, Any]]] = [
    ("hybrid", {"position_embedding_type": "yarn"}),
    ("hybrid", {"position_embedding_type": "relative"}),
    ("hybrid", {"position_embedding_type": "rope", "no_rope_freq": 4}),
    ("hybrid", {"position_embedding_type": "rope", "no_rope_freq": [0, 1, 0, 0, 0]}),
    ("hybrid", {"softmax_type": "off-by-one"}),
    ("hybrid", {"softmax_scale": 0.5}),
    ("hybrid", {"window_size": (128, 0)}),
    ("hybrid", {"qk_l2_norm": True}),
    ("hybrid", {"attention_output_gate": True}),
    ("hybrid", {"openai_gelu": True}),
    ("hybrid", {"activation_func_clamp_value": 7.0}),
    ("swiglu", {"quick_geglu": True, "swiglu": False}),
    ("swiglu", {"glu_linear_offset": 1.0}),
    ("moe", {"moe_router_score_function": "sqrtsoftplus"}),
    ("moe", {"moe_router_score_function": "softmax", "moe_router_pre_softmax": True}),
    ("moe", {"moe_router_load_balancing_type": ["sinkhorn"]}),
    ("moe", {"moe_router_num_groups": 4, "moe_router_group_topk": 2}),
    ("moe", {"moe_expert_capacity_factor": 1.25}),
    ("moe", {"moe_apply_probs_on_input": True}),
    ("moe", {"moe_mlp_glu_interleave_size": 32}),
    ("latent", {"rope_type": "yarn"}),
    ("latent", {"rope_type": None}),  # of which Megatron makes yarn
    ("latent", {"mscale_all_dim": 1.0, "rotary_scaling_factor": 40}),
    ("mtp", {"mtp_use_repeated_layer": True}),
]
SILENT: list[tuple[str, dict[str, Any]]] = [
    ("hybrid", {"position_embedding_type": "none", "no_rope_freq": 4, "rotary_interleaved": True}),
    ("hybrid", {"position_embedding_type": "rope", "no_rope_freq": [0, 0, 0, 0, 0]}),
    ("hybrid", {"softmax_type": "vanilla", "window_size": None}),
    ("hybrid", {"window_size": (-1, 0)}),
    ("hybrid", {"moe_router_pre_softmax": True}),
    ("mamba2", {"position_embedding_type": "yarn", "softmax_type": "learnable", "window_size": (128, 0)}),
    ("moe", {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": True}),
    ("moe", {"moe_router_num_groups": 1, "moe_router_group_topk": 1}),
    ("moe", {"moe_router_load_balancing_type": "aux_loss"}),
    ("latent", {"mscale_all_dim": 1.0, "rotary_scaling_factor": 1.0}),
]


@pytest.fixture
def foreign(tmp_path: Path, make_model: Make, make_weights: Make, make_legacy: Make) -> Callable[..., Path]:
    """Write a checkpoint of Megatron's whose arguments say more than ours could."""

    def write(kind: str = "hybrid", **args: Any) -> Path:
        model: ModelConfig = make_model(kind)
        return make_legacy(tmp_path / "foreign", model, make_weights(model), **args)

    return write


@pytest.mark.parametrize(("kind", "args"), CHANGING)
def test_what_changes_the_computation_is_seen_and_kept(
    foreign: Callable[..., Path], tmp_path: Path, kind: str, args: dict[str, Any]
) -> None:
    """Another layout of the same format is Megatron's again, which must find the arguments that it computes with."""
    source = foreign(kind, **args)
    opened = convert.open_checkpoint(source)
    assert len(opened.unexpressed) == 1 and opened.unexpressed[0].split("=")[0] in args
    convert.convert(source, tmp_path / "again", "megatron", pipeline=2)
    again = convert.open_checkpoint(tmp_path / "again")
    assert again.unexpressed == opened.unexpressed
    assert {name: again.args[name] for name in args} == args


@pytest.mark.parametrize(("kind", "args"), SILENT)
def test_what_changes_nothing_in_this_model_is_passed_over(
    foreign: Callable[..., Path], kind: str, args: dict[str, Any]
) -> None:
    assert convert.open_checkpoint(foreign(kind, **args)).unexpressed == []


def test_every_argument_is_one_of_megatron_core() -> None:
    """Names change from version to version; those of earlier ones, and of the command alone, are listed here."""
    from dataclasses import fields

    from megatron.core.transformer.transformer_config import MLATransformerConfig

    of_the_command = {"apply_layernorm_1p", "position_embedding_type", "rotary_seq_len_interpolation_factor"}
    of_the_command |= {"use_rope_scaling", "openai_gelu", "quick_geglu"}
    known = {field.name for field in fields(MLATransformerConfig)} | of_the_command
    assert set(arguments._UNEXPRESSED) <= known


def test_our_model_computes_with_none_of_it(foreign: Callable[..., Path], tmp_path: Path) -> None:
    """Neither a rank's state, nor what training loads, nor transformers' model; the weights can be laid out anew."""
    source = foreign(position_embedding_type="yarn")
    says = r"foreign/iter_0000100: has position_embedding_type=yarn \(positions are of another kind\), which our model"
    with pytest.raises(ConfigError, match=says):
        convert.rank_state(source)
    with pytest.raises(ConfigError, match=says):
        convert.as_torch_dist(source, tmp_path / "cache")
    with pytest.raises(ConfigError, match="which no family of hf has"):
        convert.convert(source, tmp_path / "hf", "hf")
    convert.convert(source, tmp_path / "dist", "torch_dist")
    with pytest.raises(ConfigError, match="which our model does not compute; these weights can be converted"):
        convert.as_torch_dist(tmp_path / "dist", tmp_path / "cache")  # which would be its own
    assert not (tmp_path / "cache").exists()


def test_an_offset_of_the_softmax_is_a_weight(
    tmp_path: Path, make_model: Make, make_weights: Make, make_legacy: Make
) -> None:
    """What attention has learned does not vanish among what can be computed."""
    model = make_model("hybrid")
    name = "decoder.layers.3.self_attention.core_attention.softmax_offset"
    source = make_legacy(tmp_path / "a", model, make_weights(model) | {name: torch.ones(8)}, softmax_type="learnable")
    opened = convert.open_checkpoint(source)
    assert list(opened.unknown) == [name] and "softmax_type=learnable" in opened.unexpressed[0]
