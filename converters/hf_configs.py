"""The configs of Hugging Face's families: read into fields of ModelConfig, written, and what stands in the way.

Sources: transformers 5.23 (`models/{nemotron_h,mamba2,mamba,bamba}/configuration_*.py`), state-spaces/mamba
(`mamba_ssm/models/config_mamba.py`).
"""

import re
from collections.abc import Callable
from typing import Any

from converters.hf_checks import (
    fixed,
    gated_norm,
    mamba_biases,
    refuse,
    same_epsilon,
    silu,
    time_step_limit,
)
from hybrid.config import GATED_NORM_EPSILON, ModelConfig
from hybrid.errors import ConfigError, Problem

Json = dict[str, Any]


def _pick(config: Json, renamed: dict[str, str]) -> Json:
    return {field: config[name] for name, field in renamed.items() if config.get(name) is not None}


def _common(model: ModelConfig, base: Json, architecture: str, model_type: str) -> Json:
    """What every config of transformers holds; `base` is the config the model came from, if it did, whose settings of
    generation stay."""
    kept = {name: base[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in base}
    return kept | {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "use_cache": True,
    }


# --- NemotronH ---

_BLOCKS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_ACTIVATIONS = {"squared_relu": "relu2", "gelu": "gelu"}


def nemotron_h_fields(config: Json) -> Json:
    """What a config of NemotronH says of a model. Raises ConfigError for each setting that our model has not."""
    symbols = {**{block: symbol for symbol, block in _BLOCKS.items()}, "mamba": "M", "attention": "*"}
    blocks = config.get("layers_block_type") or config.get("layer_types")
    pattern = config.get("hybrid_override_pattern") or "".join(symbols.get(str(block), "?") for block in blocks or [])
    if "?" in pattern:
        strange = ", ".join(sorted({str(block) for block in blocks or []} - symbols.keys()))
        raise ConfigError(Problem("layers_block_type", f"has {strange}; the known ones are {', '.join(symbols)}"))
    activation = config.get("mlp_hidden_act") or "relu2"
    found = _pick(
        config,
        {
            "vocab_size": "vocab_size",
            "ssm_state_size": "mamba_state_dim",
            "n_groups": "mamba_num_groups",
            "chunk_size": "mamba_chunk_size",
            "rms_norm_eps": "norm_epsilon",
            "layer_norm_epsilon": "norm_epsilon",  # where both are there, transformers takes this one
            "initializer_range": "init_std",
        },
    )
    found |= {"layer_pattern": pattern, "position_embedding": "none", "mamba_version": 2}
    if "*" in pattern:
        found |= _pick(
            config,
            {
                "num_attention_heads": "num_attention_heads",
                "num_key_value_heads": "num_query_groups",
                "attention_head_dim": "attention_head_dim",
                "head_dim": "attention_head_dim",
            },
        )
    problems: list[Problem] = []
    if "M" in pattern:
        problems += silu(config, "mamba_hidden_act", "the Mamba layers")
        for name in ("time_step_limit", "mamba_dt_limit"):
            problems += time_step_limit(config, name)
        problems += mamba_biases(config, "use_conv_bias", "use_bias")
        problems += fixed(config, "mamba_conv_bias", (True,), "the convolutions of our Mamba layers always have a bias")
        problems += gated_norm(config, "layer_norm_epsilon", "rms_norm_eps")
    if "E" in pattern:
        found |= _pick(config, {"num_experts_per_tok": "moe_top_k", "routed_scaling_factor": "moe_routed_scale"})
        found |= {"moe_router_score": "sigmoid", "moe_expert_bias": True}
        for name, value in (("n_group", 1), ("topk_group", 1), ("norm_topk_prob", True)):
            problems += fixed(config, name, (value,), f"our router knows only {value}")
        problems += fixed(config, "moe_latent_size", (), "our experts take hidden states as wide as they are")
        for name in ("mlp_bias", *(["attention_bias"] if "*" in pattern else [])):
            problems += fixed(config, name, (False,), "experts of our model have no biases, and then no layer has")
    elif {"*", "-"} <= set(pattern):
        problems += _unequal_biases(config)
    if set(pattern) & set("-E"):
        found["activation"] = {hf: ours for ours, hf in _ACTIVATIONS.items()}.get(activation)
        if found["activation"] is None:
            problems.append(Problem("mlp_hidden_act", f"is '{activation}'; our config has gelu and squared_relu"))
    refuse(problems)
    return found


def nemotron_h_config(model: ModelConfig, base: Json) -> Json:
    """The config of a model as NemotronH."""
    layers = model.pattern.layers
    width = model.mamba_inner_size
    result = _common(model, base, "NemotronHForCausalLM", "nemotron_h") | {
        # Both forms of the pattern and of the head width: older code knows the first, transformers 5 the second.
        "hybrid_override_pattern": layers,
        "layers_block_type": [_BLOCKS[symbol] for symbol in layers],
        "num_hidden_layers": len(layers),
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "attention_head_dim": model.head_dim,
        "head_dim": model.head_dim,
        "attention_bias": model.add_linear_bias,
        "mlp_bias": model.add_linear_bias,
        "intermediate_size": model.ffn_size,
        "mlp_hidden_act": _ACTIVATIONS.get(model.activation, "relu2"),
        "mamba_num_heads": model.mamba_heads,
        "mamba_head_dim": model.mamba_head_dim,
        "ssm_state_size": model.mamba_state_dim,
        "n_groups": model.mamba_num_groups,
        "conv_kernel": model.mamba_conv_kernel,
        "chunk_size": model.mamba_chunk_size,
        "expand": max(1, width // model.hidden_size),
        "mamba_hidden_act": "silu",
        "use_conv_bias": True,
        "use_bias": False,
        "mamba_proj_bias": False,
        "layer_norm_epsilon": model.norm_epsilon,
        "residual_in_fp32": False,
        "max_position_embeddings": base.get("max_position_embeddings", 4096),
        # transformers clamps the time step to at least this (its issue 48989); the model has no such clamp.
        "time_step_min": 0.0,
    }
    if model.num_experts:
        result |= {
            "n_routed_experts": model.num_experts,
            "num_experts_per_tok": model.moe_top_k,
            "moe_intermediate_size": model.moe_ffn_size,
            "moe_shared_expert_intermediate_size": model.moe_shared_expert_size,
            "n_shared_experts": 1,
            "routed_scaling_factor": model.moe_routed_scale,
            "norm_topk_prob": True,
            "n_group": 1,
            "topk_group": 1,
        }
    return result


def nemotron_h_obstacles(model: ModelConfig) -> list[str]:
    """Why a model cannot be NemotronH."""
    layers = model.pattern.layers
    result = _rms_norm(model) + _gated_norm(model)
    if model.mamba_version == 1 and "M" in layers:
        result.append("its Mamba layers are Mamba-2, these are Mamba-1")
    if model.activation == "swiglu" and set(layers) & set("-E"):
        result.append("its MLPs have no gate, these are SwiGLU")
    if model.position_embedding != "none" and "*" in layers:
        result.append(f"its attention has no position embedding, this one has '{model.position_embedding}'")
    if "E" in layers and not model.moe_shared_expert_size:
        result.append("its MoE layers have a shared expert, these have none")
    if "E" in layers and not model.moe_expert_bias:
        result.append("its router has a bias per expert, this one has none")
    if "E" in layers and model.add_linear_bias:
        result.append("its experts have no biases, these have")
    if "E" in layers and model.moe_router_score != "sigmoid":
        result.append(f"its router scores with a sigmoid, this one with a {model.moe_router_score}")
    return result


# --- Mamba-2 and Mamba of transformers ---


def mamba_fields(config: Json) -> Json:
    """What a config of transformers' Mamba or Mamba-2 says of a model. Raises ConfigError as `nemotron_h_fields`."""
    names = {
        "vocab_size": "vocab_size",
        "state_size": "mamba_state_dim",
        "layer_norm_epsilon": "norm_epsilon",
        "initializer_range": "init_std",
    }
    version = 2 if config.get("model_type") == "mamba2" else 1
    if version == 2:
        names |= {"n_groups": "mamba_num_groups", "chunk_size": "mamba_chunk_size"}
    problems = silu(config, "hidden_act", "the Mamba layers") + mamba_biases(config, "use_conv_bias", "use_bias")
    if version == 2:
        problems += time_step_limit(config) + gated_norm(config, "layer_norm_epsilon")
    refuse(problems)
    layers = config.get("num_hidden_layers") or config.get("n_layer")
    pattern = "M" * layers if isinstance(layers, int) else None
    return _pick(config, names) | {"layer_pattern": pattern, "mamba_version": version, "position_embedding": "none"}


def mamba_config(model: ModelConfig, base: Json) -> Json:
    """The config of a model as Mamba or Mamba-2 of transformers."""
    version = model.mamba_version
    architecture = "Mamba2ForCausalLM" if version == 2 else "MambaForCausalLM"
    result = _common(model, base, architecture, "mamba2" if version == 2 else "mamba") | {
        "num_hidden_layers": model.pattern.num_layers,
        "state_size": model.mamba_state_dim,
        "conv_kernel": model.mamba_conv_kernel,
        "expand": model.mamba_inner_size // model.hidden_size,
        "layer_norm_epsilon": model.norm_epsilon,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": False,
    }
    if version == 2:
        return result | {
            "num_heads": model.mamba_heads,
            "head_dim": model.mamba_head_dim,
            "n_groups": model.mamba_num_groups,
            "chunk_size": model.mamba_chunk_size,
        }
    return result | {"time_step_rank": model.dt_rank, "intermediate_size": model.mamba_inner_size}


def pure_obstacles(version: int) -> Callable[[ModelConfig], list[str]]:
    """Why a model cannot be transformers' Mamba of this version."""

    def obstacles(model: ModelConfig) -> list[str]:
        result = _rms_norm(model) + _gated_norm(model) + _only("M", model)
        if model.mamba_version != version:
            result.append(f"its layers are Mamba-{version}, these are Mamba-{model.mamba_version}")
        if model.mamba_inner_size % model.hidden_size:
            result.append(f"its inner width is a multiple of the hidden size, this one is {model.mamba_inner_size}")
        return result

    return obstacles


# --- Bamba ---


def bamba_fields(config: Json) -> Json:
    """What a config of Bamba says of a model. Raises ConfigError as `nemotron_h_fields`."""
    attention = set(config.get("attn_layer_indices") or [])
    layers = config.get("num_hidden_layers")
    pattern = "".join("*-" if i in attention else "M-" for i in range(layers)) if isinstance(layers, int) else None
    found = _pick(
        config,
        {
            "vocab_size": "vocab_size",
            "mamba_d_state": "mamba_state_dim",
            "mamba_n_groups": "mamba_num_groups",
            "mamba_chunk_size": "mamba_chunk_size",
            "rms_norm_eps": "norm_epsilon",
            "initializer_range": "init_std",
        },
    )
    found |= {"layer_pattern": pattern, "mamba_version": 2, "activation": "swiglu", "position_embedding": "none"}
    problems = silu(config, "hidden_act", "the Mamba layers and gated MLPs")
    if not pattern or "M" in pattern:
        problems += time_step_limit(config) + mamba_biases(config, "mamba_conv_bias", "mamba_proj_bias")
        problems += gated_norm(config, "rms_norm_eps")
    if attention:
        problems += _unequal_biases(config)
        found |= _pick(
            config, {"num_attention_heads": "num_attention_heads", "num_key_value_heads": "num_query_groups"}
        )
        # transformers rotates half of each head, whatever the config says.
        found |= {"position_embedding": "rope", "rotary_percent": 0.5}
        for place in ("rope_parameters", "rope_scaling"):
            for name in ("rope_type", "type"):
                problems += fixed(config, f"{place}.{name}", ("default",), "our rotary positions are not scaled")
        base = (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta") or 10000
        if base != int(base):
            problems.append(Problem("rope_theta", f"is {base}; our config has whole numbers only (rotary_base)"))
        found["rotary_base"] = int(base)
    refuse(problems)
    return found


def bamba_config(model: ModelConfig, base: Json) -> Json:
    """The config of a model as Bamba."""
    pairs = model.pattern.layers[::2]
    return _common(model, base, "BambaForCausalLM", "bamba") | {
        "num_hidden_layers": len(pairs),
        "attn_layer_indices": [index for index, symbol in enumerate(pairs) if symbol == "*"],
        "intermediate_size": model.ffn_size,
        "hidden_act": "silu",
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "rms_norm_eps": model.norm_epsilon,
        "max_position_embeddings": base.get("max_position_embeddings", 262144),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(model.rotary_base),
            "partial_rotary_factor": 0.5,
        },
        "attn_rotary_emb": model.head_dim // 2,
        "attention_bias": model.add_linear_bias,
        "mlp_bias": model.add_linear_bias,
        "mamba_n_heads": model.mamba_heads,
        "mamba_d_head": model.mamba_head_dim,
        "mamba_n_groups": model.mamba_num_groups,
        "mamba_d_state": model.mamba_state_dim,
        "mamba_d_conv": model.mamba_conv_kernel,
        "mamba_expand": model.mamba_inner_size // model.hidden_size,
        "mamba_chunk_size": model.mamba_chunk_size,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }


def bamba_obstacles(model: ModelConfig) -> list[str]:
    """Why a model cannot be Bamba."""
    layers = model.pattern.layers
    result = _rms_norm(model) + _gated_norm(model)
    if not re.fullmatch(r"((M|\*)-)+", layers):
        result.append(f"its layers are pairs 'M-' and '*-', these are '{layers}'")
    if model.activation != "swiglu":
        result.append(f"its MLPs are SwiGLU, these are {model.activation}")
    if model.mamba_version != 2 or model.mamba_inner_size % model.hidden_size:
        result.append("its Mamba layers are Mamba-2 of an inner width that is a multiple of the hidden size")
    if "*" in layers and (model.position_embedding, model.rotary_percent) != ("rope", 0.5):
        result.append("its attention rotates half of each head (rope, rotary_percent 0.5)")
    if "*" in layers and model.head_dim * model.num_attention_heads != model.hidden_size:
        result.append("its attention heads together are as wide as the hidden size")
    return result


# --- state-spaces ---


def state_spaces_fields(config: Json) -> Json:
    """What a config of state-spaces/mamba says of a model. Raises ConfigError for more than Mamba layers."""
    ssm = config.get("ssm_cfg") or {}
    version = 2 if ssm.get("layer") == "Mamba2" else 1
    if config.get("attn_layer_idx") or config.get("d_intermediate"):
        raise ConfigError(
            Problem("config.json", "has attention or MLP layers of mamba-ssm; only its models of Mamba layers are read")
        )
    problems = mamba_biases(config, "ssm_cfg.conv_bias", "ssm_cfg.bias")
    if version == 2:
        problems += time_step_limit(config, "ssm_cfg.dt_limit")
        problems += fixed(config, "ssm_cfg.norm_before_gate", (False,), "our Mamba-2 layers norm what is gated")
    refuse(problems)
    layers = "M" * (config.get("n_layer") or 0)
    found: Json = {"layer_pattern": layers, "mamba_version": version, "position_embedding": "none"}
    if config.get("vocab_size"):
        found["vocab_size"] = config["vocab_size"]
        found["vocab_size_multiple"] = config.get("pad_vocab_size_multiple", 8)
    if version == 2:
        found |= {"mamba_num_groups": ssm.get("ngroups", 1), "mamba_state_dim": ssm.get("d_state", 128)}
        found["mamba_chunk_size"] = ssm.get("chunk_size", 256)
    return found


def state_spaces_config(model: ModelConfig, base: Json) -> Json:
    """The config of a model for state-spaces/mamba."""
    ssm: Json = {
        "layer": f"Mamba{model.mamba_version}",
        "d_state": model.mamba_state_dim,
        "d_conv": model.mamba_conv_kernel,
        "expand": model.mamba_inner_size // model.hidden_size,
    }
    if model.mamba_version == 2:
        ssm |= {
            "headdim": model.mamba_head_dim,
            "ngroups": model.mamba_num_groups,
            "chunk_size": model.mamba_chunk_size,
        }
    else:
        ssm |= {"dt_rank": model.dt_rank}
    return {
        "d_model": model.hidden_size,
        "d_intermediate": 0,
        "n_layer": model.pattern.num_layers,
        "vocab_size": model.vocab_size,
        "ssm_cfg": ssm,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": model.normalization == "RMSNorm",
        "residual_in_fp32": False,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": model.vocab_size_multiple,
        "tie_embeddings": model.tie_embeddings,
    }


def state_spaces_obstacles(model: ModelConfig) -> list[str]:
    """Why a model cannot be one of state-spaces/mamba."""
    result = _only("M", model)
    if not same_epsilon(model.norm_epsilon):
        result.append(f"its norms always add {GATED_NORM_EPSILON}, these {model.norm_epsilon} (norm_epsilon)")
    if model.mamba_inner_size % model.hidden_size:
        result.append(f"its inner width is a multiple of the hidden size, this one is {model.mamba_inner_size}")
    return result


def _unequal_biases(config: Json) -> list[Problem]:
    """Our one switch is for both; a config says it of each."""
    attention, mlp = (bool(config.get(name)) for name in ("attention_bias", "mlp_bias"))
    if attention == mlp:
        return []
    return [Problem("attention_bias", f"is {attention} and mlp_bias {mlp}; our model has biases in both or in neither")]


def _gated_norm(model: ModelConfig) -> list[str]:
    """transformers gives the gated norm the epsilon of the others; megatron-core's is fixed."""
    if "M" not in model.pattern.layers or model.mamba_version != 2 or same_epsilon(model.norm_epsilon):
        return []
    return [
        f"its gated norms add what the other norms add, these {GATED_NORM_EPSILON} and not {model.norm_epsilon} "
        "(norm_epsilon)"
    ]


def _rms_norm(model: ModelConfig) -> list[str]:
    return [] if model.normalization == "RMSNorm" else [f"its norms are RMSNorm, these are {model.normalization}"]


def _only(kind: str, model: ModelConfig) -> list[str]:
    layers = model.pattern.layers
    return [] if set(layers) == {kind} else [f"it has only '{kind}' layers, this model is '{layers}'"]
