"""Which module stands for each symbol of a layer pattern.

The stack is the same on either backend; only the parts differ. Transformer-engine's column linears hold the norm of
their input. Megatron's own do not, so a torch norm stands before them, and the maps of checkpoint names give it the
name that it has inside the fused layer: one checkpoint loads into either.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from hybrid.config import ModelConfig
from hybrid.model.attention import SdpaAttention
from hybrid.model.kernels import Choice
from hybrid.model.mamba1 import Mamba1Mixer
from hybrid.model.mamba2 import FusedMamba2Mixer, ReferenceMamba2Mixer
from hybrid.model.norms import norm
from hybrid.model.residual import bias_dropout_add


@dataclass(frozen=True)
class Parts:
    """What the two backends give: modules, or functions that make them."""

    stack: Any
    norm: Any  # one that stands alone
    input_norm: Any  # before `normed_column`: nothing where that has its own
    normed_column: Any  # the first linear of a layer
    column: Any
    row: Any
    attention: Any
    mlp: Any  # of an MoE layer


class TorchHybridStack(HybridStack):
    """Megatron's stack of layers with a torch norm at its end; upstream's is transformer-engine's."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        post_process: bool = True,
        post_layer_norm: bool = True,
        **kwargs: Any,
    ):
        super().__init__(config, submodules, post_process=post_process, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if post_process and post_layer_norm:
            self.final_norm = norm(config, config.hidden_size, config.layernorm_epsilon)


def stack_spec(model: ModelConfig, choice: Choice) -> ModuleSpec:
    """The stack of layers of a `HybridModel`, from the parts and the mixer that were chosen."""
    parts = _transformer_engine(model) if choice.transformer_engine else _torch(model)

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


def _torch(model: ModelConfig) -> Parts:
    """Megatron's parallel linears, torch norms and scaled_dot_product_attention: runs on any device."""
    return Parts(
        stack=TorchHybridStack,
        norm=norm,
        input_norm=norm,
        normed_column=ColumnParallelLinear,
        column=ColumnParallelLinear,
        row=RowParallelLinear,
        attention=SdpaAttention,
        mlp=get_moe_module_spec(use_te=False, num_experts=model.num_experts or 1),
    )


def _transformer_engine(model: ModelConfig) -> Parts:
    """The parts of Megatron's own `hybrid_stack_spec`."""
    from megatron.core.extensions import transformer_engine as te

    return Parts(
        stack=HybridStack,
        norm=te.TENorm,
        input_norm=IdentityOp,
        normed_column=te.TELayerNormColumnParallelLinear,
        column=te.TEColumnParallelLinear,
        row=te.TERowParallelLinear,
        attention=te.TEDotProductAttention,
        mlp=get_moe_module_spec(use_te=True, num_experts=model.num_experts or 1, moe_grouped_gemm=True),
    )
