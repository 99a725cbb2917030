"""Megatron's arguments, as its checkpoints hold them, to and from the fields of our config."""

import argparse
from typing import Any

from converters.checkpoint import Checkpoint
from converters.layout import Layout
from converters.pickles import Inert
from hybrid.config import ModelConfig

_SAME = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "attention_head_dim",
    "normalization": "normalization",
    "norm_epsilon": "norm_epsilon",
    "rotary_percent": "rotary_percent",
    "rotary_base": "rotary_base",
    "mamba_state_dim": "mamba_state_dim",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_num_groups": "mamba_num_groups",
    "mamba_chunk_size": "mamba_chunk_size",  # ours: no argument of Megatron, which has 128 always
    "num_experts": "num_experts",
    "moe_router_topk": "moe_top_k",
    "moe_ffn_hidden_size": "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size": "moe_shared_expert_size",
    "moe_aux_loss_coeff": "moe_aux_loss_coeff",
    "moe_router_score_function": "moe_router_score",
    "moe_router_topk_scaling_factor": "moe_routed_scale",
    "mtp_loss_scaling_factor": "mtp_loss_coeff",
    "init_method_std": "init_std",
    "hidden_dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
}
"""Megatron's name: the field of ModelConfig of the same meaning."""

_LATENT = {
    "q_lora_rank": "mla_query_rank",
    "kv_lora_rank": "mla_kv_rank",
    "qk_head_dim": "mla_head_dim",
    "qk_pos_emb_head_dim": "mla_rope_head_dim",
    "v_head_dim": "mla_value_head_dim",
}
"""The same of latent attention."""

_POSITIONS = {"none": "none", "rope": "rope", "learned_absolute": "learned"}
_SCORES = ("softmax", "sigmoid")

# What a layer kind does not have says nothing: Megatron fills these in for every model.
_OF_KIND = {
    "*": ("num_attention_heads", "kv_channels", "rotary_percent", "rotary_base"),
    "-": ("ffn_hidden_size",),
    "M": ("mamba_state_dim", "mamba_head_dim", "mamba_num_heads", "mamba_num_groups"),
    "E": (
        "num_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
        "moe_aux_loss_coeff", "moe_router_score_function", "moe_router_topk_scaling_factor",
    ),
}  # fmt: skip


def to_dict(stored: Any) -> dict[str, Any]:
    """Whatever held the arguments, as a dict."""
    if stored is None:
        return {}
    if isinstance(stored, dict):
        return dict(stored)
    if isinstance(stored, Inert):
        return dict(stored.state) if isinstance(stored.state, dict) else {}
    return dict(vars(stored))


def known_fields(args: dict[str, Any], symbols: str, mamba1: bool = False) -> dict[str, Any]:
    """The fields of ModelConfig that these arguments tell about a model with these layers."""
    absent = {name for kind, names in _OF_KIND.items() if kind not in symbols for name in names}
    if mamba1:
        absent |= {"mamba_head_dim", "mamba_num_heads", "mamba_num_groups"}
    known = {
        field: args[name]
        for name, field in _SAME.items()
        if name not in absent and isinstance(args.get(name), int | float | str) and not isinstance(args[name], bool)
    }
    if "+" in symbols:
        known |= {field: args[name] for name, field in _LATENT.items() if isinstance(args.get(name), int)}
        known |= {"rotary_base": args["rotary_base"]} if isinstance(args.get("rotary_base"), int) else {}
    if "*" in symbols and args.get("group_query_attention") and isinstance(args.get("num_query_groups"), int):
        known["num_query_groups"] = args["num_query_groups"]
    if args.get("swiglu"):
        known["activation"] = "swiglu"
    elif args.get("squared_relu"):
        known["activation"] = "squared_relu"
    elif "swiglu" in args and not args.get("quick_geglu"):  # which is gated, too; `unexpressed` says the rest
        known["activation"] = "gelu"
    position = args.get("position_embedding_type")
    if position in _POSITIONS:
        known["position_embedding"] = _POSITIONS[position]
    if not known.get("position_embedding") and args.get("use_rotary_position_embeddings"):
        known["position_embedding"] = "rope"
    if isinstance(args.get("vocab_size"), int):
        known["vocab_size"] = args["vocab_size"]
    if args.get("moe_router_score_function") not in _SCORES:
        known.pop("moe_router_score", None)
    known["layer_pattern"] = _pattern(args)
    return {name: value for name, value in known.items() if value is not None}


# Megatron's name: the layer kinds whose computation it changes ("" for all), and how.
_UNEXPRESSED = {
    "apply_layernorm_1p": ("", "norms hold their weight less 1"),
    "use_mup": ("", "widths scale the layers (muP)"),
    "position_embedding_type": ("*", "positions are of another kind"),
    "rotary_interleaved": ("*+", "rotary positions rotate neighbouring dimensions"),
    "rotary_seq_len_interpolation_factor": ("*", "rotary positions are stretched"),
    "use_rope_scaling": ("*", "rotary positions are scaled"),
    "no_rope_freq": ("*", "some layers rotate nothing"),
    "rope_type": ("+", "latent attention's rotary positions are stretched"),
    "mscale_all_dim": ("+", "attention scores are scaled with the rotary positions"),
    "softmax_type": ("*+", "the softmax of attention has an offset"),
    "softmax_scale": ("*+", "attention scores are scaled"),
    "window_size": ("*+", "attention sees a window"),
    "qk_l2_norm": ("*", "queries and keys are normalized"),
    "attention_output_gate": ("*", "attention's output is gated"),
    "openai_gelu": ("-E", "GELU is approximated"),
    "quick_geglu": ("-E", "MLPs are gated with an approximated GELU"),
    "glu_linear_offset": ("-E", "gated MLPs have an offset"),
    "activation_func_clamp_value": ("-E", "activations are clamped"),
    "moe_router_pre_softmax": ("E", "the router's softmax comes before the choice of experts"),
    "moe_router_score_function": ("E", "the router scores otherwise than by softmax or sigmoid"),
    "moe_router_load_balancing_type": ("E", "experts are chosen by their balance"),
    "moe_router_group_topk": ("E", "experts are chosen from groups"),
    "moe_router_topk_limited_devices": ("E", "experts are chosen from groups"),
    "moe_expert_capacity_factor": ("E", "experts drop tokens"),
    "moe_apply_probs_on_input": ("E", "the router weighs the experts' inputs"),
    "moe_mlp_glu_interleave_size": ("E", "rows of gate and up lie in turns"),
    "moe_shared_expert_glu_interleave_size": ("E", "rows of gate and up lie in turns"),
    "mtp_use_repeated_layer": ("", "one layer predicts all tokens further ahead"),
}
_ROTARY = {"rotary_interleaved", "rotary_seq_len_interpolation_factor", "use_rope_scaling", "no_rope_freq"}


def unexpressed(args: dict[str, Any], model: ModelConfig) -> list[str]:
    """What these arguments say of the model that the fields of ModelConfig cannot."""
    return [f"{name}={args.get(name)} ({_UNEXPRESSED[name][1]})" for name in _changing(args, model)]


def _changing(args: dict[str, Any], model: ModelConfig) -> list[str]:
    """The names of the arguments that change what layers of this model compute."""
    layers = set(model.pattern.layers + model.pattern.mtp)
    rotated = layers & ({"*", "+"} if model.position_embedding == "rope" else {"+"})
    return [
        name
        for name, (kinds, _) in _UNEXPRESSED.items()
        if (not kinds or set(kinds) & (rotated if name in _ROTARY else layers)) and _changes(name, args)
    ]


def _changes(name: str, args: dict[str, Any]) -> bool:
    """Whether an argument has a value other than that of what our model computes."""
    value = args.get(name)
    match name:
        case "position_embedding_type":
            return value is not None and value not in _POSITIONS
        case "no_rope_freq":
            return any(value) if isinstance(value, list | tuple) else bool(value)
        case "rope_type":  # latent attention takes yarn where nothing is said
            return bool(args.get("multi_latent_attention")) and value != "rope"
        case "mscale_all_dim":
            return bool(value) and (args.get("rotary_scaling_factor") or 1) > 1
        case "softmax_type":
            return value not in (None, "vanilla")
        case "window_size":  # what comes later is never seen; -1 is no limit
            return (value[0] if isinstance(value, list | tuple) and value else value) not in (None, -1)
        case "moe_router_pre_softmax":
            return bool(value) and args.get("moe_router_score_function") in (None, "softmax")
        case "moe_router_score_function":
            return value not in (None, *_SCORES)
        case "moe_router_load_balancing_type":
            return value == "sinkhorn" or (isinstance(value, list | tuple) and "sinkhorn" in value)
        case "moe_router_group_topk":  # all groups of them are no choice
            return bool(value) and value != args.get("moe_router_num_groups")
        case "mtp_use_repeated_layer":
            return bool(value) and (args.get("mtp_num_layers") or 1) > 1
        case _:
            return bool(value)


def from_model(source: Checkpoint, layout: Layout, divisor: int) -> argparse.Namespace:
    """Megatron's arguments for a checkpoint in a layout: those it has, corrected and completed.

    `divisor` is what the vocabulary is padded to, before Megatron multiplies it with the tensor parallel size.
    """
    model, pattern = source.model, source.model.pattern
    stored = {name: value for name, value in source.args.items() if _plain(value)}
    args = dict(stored)
    if source.samples is not None:
        args["consumed_train_samples"] = source.samples
    args |= {name: getattr(model, field) for name, field in _SAME.items()}
    if pattern.counts()["+"]:
        args |= {name: getattr(model, field) for name, field in _LATENT.items()}
        args |= {"multi_latent_attention": True, "rope_type": "rope", "qk_layernorm": True}
    args |= {
        "hybrid_layer_pattern": str(layout.pattern),
        "hybrid_override_pattern": None,
        "hybrid_attention_ratio": 0.0,
        "hybrid_mlp_ratio": 0.0,
        "num_layers": pattern.num_layers,
        "mtp_num_layers": pattern.mtp_depths or None,
        "ffn_hidden_size": model.ffn_size,
        "kv_channels": model.head_dim,
        "group_query_attention": model.query_groups != model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "mamba_num_heads": model.mamba_heads if model.mamba_version == 2 else None,
        "moe_ffn_hidden_size": model.moe_ffn_size if model.num_experts else None,
        "moe_router_enable_expert_bias": model.moe_expert_bias,
        "swiglu": model.activation == "swiglu" and not source.args.get("quick_geglu"),
        "squared_relu": model.activation == "squared_relu",
        "add_bias_linear": model.add_linear_bias,
        "position_embedding_type": {ours: name for name, ours in _POSITIONS.items()}[model.position_embedding],
        "untie_embeddings_and_output_weights": not model.tie_embeddings,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": model.padded_vocab_size,
        "make_vocab_size_divisible_by": divisor,
        "is_hybrid_model": True,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual if layout.virtual > 1 else None,
        "expert_model_parallel_size": layout.expert,
        "transformer_pipeline_model_parallel_size": layout.pipeline,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
    }
    # What our fields cannot say stays as it was said: Megatron computes with it.
    args |= {name: stored.get(name) for name in _changing(source.args, model)}
    return argparse.Namespace(**args)


def _pattern(args: dict[str, Any]) -> str | None:
    """The layer pattern that the arguments state, in the words of any version; ratios say less than the tensors do."""
    pattern = args.get("hybrid_layer_pattern") or args.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        depths = args.get("mtp_num_layers")
        mtp = args.get("mtp_hybrid_override_pattern")
        return pattern + f"/{mtp}" * depths if isinstance(mtp, str) and isinstance(depths, int) else pattern
    return None


def _plain(value: Any) -> bool:
    """Whether a value can be written again: numbers, text, lists of such, and the enums and paths that were read."""
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, Inert):
        return value.state is None and not value.items and _plain(list(value.args))
    if isinstance(value, type):
        return issubclass(value, Inert)
    return value is None or isinstance(value, bool | int | float | str | bytes)
