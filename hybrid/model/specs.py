"""Which module stands for each symbol of a layer pattern.

Where a norm stands before a linear layer that would have it inside on transformer-engine's side, the maps of checkpoint
names give it the name that it has there: one checkpoint loads into either.
"""

from functools import partial
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.experimental_attention_variant.absorbed_mla import AbsorbedMLASelfAttentionSubmodules
from megatron.core.transformer.experimental_attention_variant.dsa import (
    DSAIndexer,
    DSAIndexerSubmodules,
    DSAttention,
    DSAttentionSubmodules,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from hybrid.config import ModelConfig, Settings
from hybrid.model.delta import ReferenceGatedDeltaNet
from hybrid.model.kernels import Choice
from hybrid.model.mamba1 import Mamba1Mixer
from hybrid.model.mamba2 import FusedMamba2Mixer, ReferenceMamba2Mixer
from hybrid.model.parts import Parts, engine_parts, torch_parts
from hybrid.model.residual import bias_dropout_add

# Upstream has the norms of the low ranks inside the linears that follow them.
_LATENT_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


def stack_spec(settings: Settings, choice: Choice) -> ModuleSpec:
    """The stack of layers of a `HybridModel`, from the parts and the mixer that were chosen."""
    model = settings.model
    parts = engine_parts(settings) if choice.transformer_engine else torch_parts(model)

    def renamed(name: str, to: str) -> dict[str, str]:
        return {} if parts.input_norm is IdentityOp else {name: to}

    mixers = MambaMixerSubmodules(in_proj=parts.normed_column, out_proj=parts.row)
    return ModuleSpec(
        module=parts.stack,
        submodules=HybridStackSubmodules(
            mamba_layer=ModuleSpec(
                module=MambaLayer,
                submodules=MambaLayerSubmodules(
                    norm=parts.input_norm,
                    mixer=_mixer(model, choice, mixers),
                    mamba_bda=bias_dropout_add,  # type: ignore[arg-type]
                    sharded_state_dict_keys_map=renamed("norm.", "mixer.in_proj.layer_norm_"),
                ),
            ),
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=parts.input_norm,
                    self_attention=ModuleSpec(
                        module=SelfAttention,
                        params={"attn_mask_type": AttnMaskType.causal},
                        submodules=SelfAttentionSubmodules(
                            linear_qkv=parts.normed_column,
                            core_attention=parts.attention,
                            linear_proj=parts.row,
                        ),
                    ),
                    self_attn_bda=bias_dropout_add,  # type: ignore[arg-type]
                    sharded_state_dict_keys_map=renamed("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
                ),
            ),
            gdn_layer=_layer(
                _delta_net(parts, fused=choice.delta),
                parts.input_norm,
                renamed("input_layernorm.", "self_attention.in_proj.layer_norm_"),
            ),
            mla_layer=_layer(_latent_attention(parts), parts.norm, _LATENT_NORMS),
            dsa_layer=_layer(_sparse_attention(parts), parts.norm, {}),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=parts.input_norm,
                    mlp=partial(
                        MLP.as_mlp_submodule,
                        submodules=MLPSubmodules(linear_fc1=parts.normed_column, linear_fc2=parts.row),
                    ),
                    mlp_bda=bias_dropout_add,  # type: ignore[arg-type]
                    sharded_state_dict_keys_map=renamed("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
                ),
            ),
            moe_layer=ModuleSpec(
                module=MoETransformerLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=parts.norm,
                    mlp=parts.mlp,
                    mlp_bda=bias_dropout_add,  # type: ignore[arg-type]
                ),
            ),
            mtp_block_spec=ModuleSpec(
                module=MultiTokenPredictionBlock,
                submodules=MultiTokenPredictionBlockSubmodules(
                    layer_specs=[
                        ModuleSpec(
                            module=MultiTokenPredictionLayer,
                            submodules=MultiTokenPredictionLayerSubmodules(
                                enorm=parts.norm,
                                hnorm=parts.norm,
                                eh_proj=parts.column,
                                mtp_model_layer=None,  # type: ignore[arg-type]: made from the pattern
                                layer_norm=parts.norm,
                            ),
                        )
                    ]
                ),
            ),
        ),
    )


def _layer(attention: ModuleSpec, norm: Any, renamed: dict[str, str]) -> ModuleSpec:
    """A layer of one of the other kinds of attention."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=bias_dropout_add,  # type: ignore[arg-type]
            sharded_state_dict_keys_map=renamed,
        ),
    )


def _delta_net(parts: Parts, *, fused: bool) -> ModuleSpec:
    return ModuleSpec(
        module=GatedDeltaNet if fused else ReferenceGatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(in_proj=parts.normed_column, out_norm=parts.norm, out_proj=parts.row),
    )


def _latent_attention(parts: Parts) -> ModuleSpec:
    return ModuleSpec(
        module=parts.latent,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_down_proj=parts.down,
            linear_q_up_proj=parts.column,
            linear_kv_down_proj=parts.down,
            linear_kv_up_proj=parts.column,
            core_attention=parts.attention,
            linear_proj=parts.row,
            q_layernorm=parts.norm,
            kv_layernorm=parts.norm,
        ),
    )


def _sparse_attention(parts: Parts) -> ModuleSpec:
    indexer = DSAIndexerSubmodules(
        linear_wq_b=parts.copied, linear_wk=parts.copied, k_norm=parts.norm, linear_weights_proj=parts.copied
    )
    attention = DSAttentionSubmodules(indexer=ModuleSpec(module=DSAIndexer, submodules=indexer))
    return ModuleSpec(
        module=parts.sparse,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=AbsorbedMLASelfAttentionSubmodules(
            linear_q_down_proj=parts.down,
            linear_q_up_proj=parts.column,
            linear_kv_down_proj=parts.down,
            linear_kv_up_proj=parts.column,
            core_attention=ModuleSpec(module=DSAttention, submodules=attention),
            linear_proj=parts.row,
            q_layernorm=parts.norm,
            kv_layernorm=parts.norm,
        ),
    )


def _mixer(model: ModelConfig, choice: Choice, submodules: MambaMixerSubmodules) -> ModuleSpec:
    if model.mamba_version == 1:
        params = {
            "state_dim": model.mamba_state_dim,
            "conv_kernel": model.mamba_conv_kernel,
            "inner_size": model.mamba_inner_size,
            "dt_rank": model.dt_rank,
            "fused": choice.mamba,
        }
        return ModuleSpec(module=Mamba1Mixer, params=params, submodules=submodules)
    return ModuleSpec(
        module=FusedMamba2Mixer if choice.mamba else ReferenceMamba2Mixer,
        params={"d_conv": model.mamba_conv_kernel, "chunk_size": model.mamba_chunk_size},
        submodules=submodules,
    )
