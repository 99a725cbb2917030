"""Which fields of a model its weights depend on: those that two models share where one can take the other's weights."""

from typing import Any

from hybrid.config import ModelConfig

_EVERY = ("hidden_size", "normalization", "tie_embeddings")
_LATENT = ("num_attention_heads", "mla_query_rank", "mla_kv_rank", "mla_head_dim", "mla_rope_head_dim")
_LATENT += ("mla_value_head_dim", "rotary_base", "add_linear_bias")
_MAMBA = ("mamba_version", "mamba_state_dim", "mamba_conv_kernel")
_OF_KIND = {
    "*": ("num_attention_heads", "num_query_groups", "attention_head_dim", "position_embedding", "add_linear_bias"),
    "+": _LATENT,
    "D": (*_LATENT, "dsa_index_heads", "dsa_index_head_dim"),
    "G": (*("gdn_num_key_heads", "gdn_num_value_heads", "gdn_key_head_dim", "gdn_value_head_dim", "gdn_conv_kernel"),),
    "-": ("ffn_hidden_size", "activation", "add_linear_bias"),
    "E": (
        *("num_experts", "moe_ffn_hidden_size", "moe_shared_expert_size", "moe_router_score", "moe_expert_bias"),
        *("activation", "add_linear_bias"),
    ),
    "M1": (*_MAMBA, "mamba_expand", "mamba_dt_rank"),
    "M2": (*_MAMBA, "mamba_head_dim", "mamba_num_heads", "mamba_num_groups"),
}
# The property that says what a None stands for.
_DERIVED = {
    "ffn_hidden_size": "ffn_size",
    "num_query_groups": "query_groups",
    "attention_head_dim": "head_dim",
    "mamba_num_heads": "mamba_heads",
    "mamba_dt_rank": "dt_rank",
    "moe_ffn_hidden_size": "moe_ffn_size",
}


def differing(model: ModelConfig, other: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """The fields in which the two differ, of those that matter to the layer kinds of `model`: (value, the other's).

    Layer pattern and vocabulary are not among them.
    """
    kinds = sorted(set(model.pattern.layers + model.pattern.mtp))
    names = [*_EVERY, *(["position_embedding"] if model.position_embedding == "learned" else [])]
    for kind in kinds:
        names += _OF_KIND[f"M{model.mamba_version}" if kind == "M" else kind]
    pairs = {name: tuple(getattr(it, _DERIVED.get(name, name)) for it in (model, other)) for name in names}
    return {name: (here, there) for name, (here, there) in pairs.items() if here != there}
