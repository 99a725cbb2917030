"""From the settings of a run to megatron-core's `HybridModel`."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

import hybrid.model.mtp  # noqa: F401  (in the place of upstream's loss)
from hybrid.config import Settings
from hybrid.model import kernels
from hybrid.model.specs import stack_spec
from hybrid.pattern import Pattern

_ACTIVATIONS = {"gelu": F.gelu, "squared_relu": squared_relu, "swiglu": F.silu}
_POSITIONS = {"none": "none", "rope": "rope", "learned": "learned_absolute"}


def transformer_config(settings: Settings, pattern: Pattern) -> TransformerConfig:
    """Translate the settings into megatron-core's own config, which every layer reads."""
    model, parallel, trainer = settings.model, settings.parallel, settings.trainer
    dtype = torch.float32 if trainer.precision == "fp32" else torch.bfloat16
    virtual = len(pattern.segments) // parallel.pipeline
    cuda, engine = torch.cuda.is_available(), kernels.of(settings).transformer_engine
    latent = _latent(settings, pattern, engine)
    return (MLATransformerConfig if latent else TransformerConfig)(
        num_layers=pattern.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_attention_heads if latent else model.query_groups,
        kv_channels=model.head_dim,
        activation_func=_ACTIVATIONS[model.activation],
        gated_linear_unit=model.activation == "swiglu",
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=model.add_linear_bias,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_std,
        is_hybrid_model=True,
        mamba_state_dim=model.mamba_state_dim,
        mamba_head_dim=model.mamba_head_dim,
        mamba_num_groups=model.mamba_num_groups,
        mamba_num_heads=model.mamba_heads,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        # With virtual stages on two ranks, a batch of messages between them has two each way, which would be mistaken
        # for one another. Sent singly, they are told apart, and overlap with the computation.
        overlap_p2p_comm=virtual > 1,
        batch_p2p_comm=virtual == 1,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # A mean over all tokens of the global batch, however they are spread over micro batches and ranks.
        calculate_per_token_loss=True,
        use_cpu_initialization=not cuda,
        # Megatron's own linears would need Apex for it; transformer-engine's are told in `build_model`.
        gradient_accumulation_fusion=False,
        # GELU is left out: fused, it is the tanh approximation, and only there with a bias.
        bias_activation_fusion=cuda and model.activation == "swiglu",
        apply_rope_fusion=engine and model.position_embedding == "rope" and not latent,
        cross_entropy_loss_fusion=engine,
        cross_entropy_fusion_impl="te" if engine else "native",
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        linear_key_head_dim=model.gdn_key_head_dim,
        linear_value_head_dim=model.gdn_value_head_dim,
        linear_num_key_heads=model.gdn_num_key_heads,
        linear_num_value_heads=model.gdn_num_value_heads,
        linear_conv_kernel_dim=model.gdn_conv_kernel,
        **latent,
        **_experts(settings, pattern, engine),
        **_multi_token(settings, pattern),
        **_recomputation(settings, pattern),
        **_fp8(settings),
    )


def _latent(settings: Settings, pattern: Pattern, engine: bool) -> dict[str, Any]:
    """Latent attention, with or without sparse attention: its own widths and its own rotation."""
    model, counts = settings.model, pattern.counts()
    if not counts["+"] and not counts["D"]:
        return {}
    values: dict[str, Any] = {
        "transformer_impl": "transformer_engine" if engine else "local",
        "qk_layernorm": True,  # of the low ranks
        "q_lora_rank": model.mla_query_rank,
        "kv_lora_rank": model.mla_kv_rank,
        "qk_head_dim": model.mla_head_dim,
        "qk_pos_emb_head_dim": model.mla_rope_head_dim,
        "v_head_dim": model.mla_value_head_dim,
        "rope_type": "rope",
        "rotary_base": model.rotary_base,
        "rotary_scaling_factor": 1.0,  # would change the scale of the scores, which is YaRN's doing
    }
    if counts["D"]:
        values |= {
            "experimental_attention_variant": "dsa",
            "dsa_indexer_n_heads": model.dsa_index_heads,
            "dsa_indexer_head_dim": model.dsa_index_head_dim,
            "dsa_indexer_topk": model.dsa_top_k,
            "dsa_indexer_loss_coeff": model.dsa_loss_coeff,
            # A rotation of both queries and keys, which changes no product of them: for sums in 8 bits.
            "dsa_indexer_rotate_activation": False,
            "cp_comm_type": "all_gather",
        }
    return values


def _experts(settings: Settings, pattern: Pattern, engine: bool) -> dict[str, Any]:
    model = settings.model
    if not pattern.counts()["E"]:
        return {}
    return {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.moe_ffn_size,
        "moe_router_topk": model.moe_top_k,
        "moe_router_score_function": model.moe_router_score,
        "moe_router_enable_expert_bias": model.moe_expert_bias,
        "moe_router_topk_scaling_factor": model.moe_routed_scale,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_size,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": engine,
        "moe_permute_fusion": engine,
    }


def _multi_token(settings: Settings, pattern: Pattern) -> dict[str, Any]:
    if not pattern.mtp_depths:
        return {}
    return {"mtp_num_layers": pattern.mtp_depths, "mtp_loss_scaling_factor": settings.model.mtp_loss_coeff}


def _recomputation(settings: Settings, pattern: Pattern) -> dict[str, Any]:
    """Full: every layer from its input. Selective: MLPs and experts.

    Of a Mamba layer, the kernels make all again that lies between its projections in any case.
    """
    match settings.trainer.recompute:
        case "full":
            return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        case "selective":
            counts = pattern.counts()
            modules = [name for name, symbol in (("mlp", "-"), ("moe", "E")) if counts[symbol]]
            return {"recompute_granularity": "selective", "recompute_modules": modules}
        case _:
            return {}


def _fp8(settings: Settings) -> dict[str, Any]:
    """E4M3 forward, E5M2 backward. Delayed scaling takes the largest value of the last 1024 steps."""
    match settings.trainer.precision:
        case "fp8_delayed":
            history = {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
            return {"fp8": "hybrid", "fp8_recipe": "delayed", **history}
        case "fp8_current":
            return {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
        case _:
            return {}


def build_model(
    settings: Settings,
    config: TransformerConfig,
    pattern: Pattern,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    groups: ProcessGroupCollection | None = None,
) -> HybridModel:
    """Build the part of the model that one rank holds; megatron-core's parallel state must be initialised.

    `pattern` has as many segments as there are pipeline stages, virtual ones counted.
    """
    model = settings.model
    position: Any = _POSITIONS[model.position_embedding]
    return HybridModel(
        config=config,
        hybrid_stack_spec=stack_spec(settings, kernels.of(settings)),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=settings.data.sequence_length,
        hybrid_layer_pattern=str(pattern),
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type=position,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        pg_collection=groups,
        vp_stage=vp_stage,
    )
