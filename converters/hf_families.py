"""The model families of Hugging Face that the layer-pattern language expresses: their tensor names and their configs.

A family gives, for a canonical name, the name or names on disk: three for a query-key-value projection (query, key and
value heads), two for a SwiGLU projection (gate and up), one otherwise. Both directions come from this one map.
Sources: transformers 5.23 (`models/{nemotron_h,mamba2,mamba,bamba}`), state-spaces/mamba
(`mamba_ssm/models/{config_mamba,mixer_seq_simple}.py`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from converters import hf_configs as configs
from converters import naming
from hybrid.config import ModelConfig

Json = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """`names` maps (canonical name, model) to the names on disk; `fields` reads a config into fields of ModelConfig,
    `config` writes one; `obstacles` says why a model cannot be written as this family."""

    names: Callable[[str, ModelConfig], tuple[str, ...]]
    fields: Callable[[Json], Json]
    config: Callable[[ModelConfig, Json], Json]
    obstacles: Callable[[ModelConfig], list[str]]


_MIXER = {
    name: name
    for name in (
        "mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.A_log", "mixer.D", "mixer.dt_bias",
        "mixer.norm.weight", "mixer.out_proj.weight", "mixer.x_proj.weight", "mixer.dt_proj.weight",
        "mixer.dt_proj.bias",
    )
}  # fmt: skip

_NEMOTRON_H = {
    **_MIXER,
    "self_attention.linear_qkv": ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
    "self_attention.linear_proj": "mixer.o_proj",
    "mlp.linear_fc1": "mixer.up_proj",
    "mlp.linear_fc2": "mixer.down_proj",
    "mlp.router.weight": "mixer.gate.weight",
    "mlp.router.expert_bias": "mixer.gate.e_score_correction_bias",
    "mlp.experts.linear_fc1": "mixer.experts.{expert}.up_proj",
    "mlp.experts.linear_fc2": "mixer.experts.{expert}.down_proj",
    "mlp.shared_experts.linear_fc1": "mixer.shared_experts.up_proj",
    "mlp.shared_experts.linear_fc2": "mixer.shared_experts.down_proj",
    **{norm.rsplit("weight", 1)[0]: "norm." for norm in naming.INPUT_NORMS.values()},
}

_BAMBA = {
    **{name: name.replace("mixer.", "mamba.", 1) for name in _MIXER},
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": "self_attn.o_proj",
    "mlp.linear_fc1": ("feed_forward.gate_proj", "feed_forward.up_proj"),
    "mlp.linear_fc2": "feed_forward.down_proj",
    "mixer.in_proj.layer_norm_": "input_layernorm.",
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_ff_layernorm.",
}


def _named(table: dict[str, Any], top: dict[str, str], prefix: str, per_layer: int = 1) -> Any:
    """The `names` of a family from its table of endings, its names outside of layers, and its prefix of layers."""

    def names(name: str, model: ModelConfig) -> tuple[str, ...]:
        if name in top:
            return (top[name],)
        match = naming.LAYER.match(name)
        if not match or match[1] != "decoder":
            raise KeyError(name)
        suffix = match[3]
        start = f"{prefix}{int(match[2]) // per_layer}."
        if expert := naming.EXPERT.match(suffix):
            return (start + table[expert[1]].format(expert=expert[3]) + f".{expert[2]}",)
        for key in (suffix, re.sub(r"(weight|bias)$", "", suffix), suffix.rsplit(".", 1)[0]):
            if key in table:
                targets = (table[key],) if isinstance(table[key], str) else table[key]
                return tuple(f"{start}{target}{suffix.removeprefix(key)}" for target in targets)
        raise KeyError(name)

    return names


def _top(prefix: str, embedding: str, norm: str) -> dict[str, str]:
    return {
        naming.EMBEDDING: f"{prefix}{embedding}.weight",
        naming.FINAL_NORM: f"{prefix}{norm}.weight",
        naming.FINAL_NORM.replace("weight", "bias"): f"{prefix}{norm}.bias",
        naming.OUTPUT: "lm_head.weight",
    }


FAMILIES = {
    "mamba": Family(
        _named(_NEMOTRON_H, _top("backbone.", "embeddings", "norm_f"), "backbone.layers."),
        configs.mamba_fields, configs.mamba_config, configs.pure_obstacles(1),
    ),
    "mamba2": Family(
        _named(_NEMOTRON_H, _top("backbone.", "embeddings", "norm_f"), "backbone.layers."),
        configs.mamba_fields, configs.mamba_config, configs.pure_obstacles(2),
    ),
    "bamba": Family(
        _named(_BAMBA, _top("model.", "embed_tokens", "final_layernorm"), "model.layers.", per_layer=2),
        configs.bamba_fields, configs.bamba_config, configs.bamba_obstacles,
    ),
    "nemotron_h": Family(
        _named(_NEMOTRON_H, _top("backbone.", "embeddings", "norm_f"), "backbone.layers."),
        configs.nemotron_h_fields, configs.nemotron_h_config, configs.nemotron_h_obstacles,
    ),
    "state_spaces": Family(
        _named(_NEMOTRON_H, _top("backbone.", "embedding", "norm_f"), "backbone.layers."),
        configs.state_spaces_fields, configs.state_spaces_config, configs.state_spaces_obstacles,
    ),
}  # fmt: skip
"""By name; of several that can hold a model the first is taken (never state_spaces, which must be asked for)."""

REFUSED = {
    "falcon_h1": "its layers run attention and Mamba side by side on the same input; a symbol of the layer pattern is "
    "one of them",
    "zamba2": "one attention block is shared by many layers; in the layer pattern every layer has weights of its own",
    "zamba": "one attention block is shared by many layers; in the layer pattern every layer has weights of its own",
    "jamba": "its Mamba-1 layers have norms of the time step, B and C inside, which megatron-core's and ours do not",
    "falcon_mamba": "its Mamba-1 layers have norms of the time step, B and C inside, which megatron-core's and ours do "
    "not",
    "granitemoehybrid": "it multiplies embeddings, residuals and logits by constants, which megatron-core's model does "
    "not",
}
"""Model types that the pattern language cannot express, and why."""
