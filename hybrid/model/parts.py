"""What the two backends make layers of: torch modules, which run on any device, or transformer-engine's.

The stack is the same on either; only the parts differ. Transformer-engine's column linears hold the norm of their
input. Megatron's own do not, so a torch norm stands before them.
"""

from dataclasses import dataclass
from typing import Any

from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.experimental_attention_variant.absorbed_mla import AbsorbedMLASelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from hybrid.config import ModelConfig, Settings
from hybrid.model.attention import SdpaAttention
from hybrid.model.latent import CopiedLinear, TorchLatentAttention, TorchSparseAttention
from hybrid.model.norms import TorchNorm


@dataclass(frozen=True)
class Parts:
    """What the two backends give: modules, or functions that make them."""

    stack: Any
    norm: Any  # one that stands alone
    input_norm: Any  # before `normed_column`: nothing where that has its own
    normed_column: Any  # the first linear of a layer
    column: Any
    row: Any
    copied: Any  # a linear that is the same on every tensor-parallel rank
    down: Any  # the linears to the low ranks of latent attention
    attention: Any
    latent: Any  # attention whose keys and values come from a low rank
    sparse: Any  # the same, around sparse attention
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
            self.final_norm = TorchNorm(config, config.hidden_size, config.layernorm_epsilon)


def torch_parts(model: ModelConfig) -> Parts:
    """Megatron's parallel linears, torch norms and scaled_dot_product_attention: runs on any device."""
    return Parts(
        stack=TorchHybridStack,
        norm=TorchNorm,
        input_norm=TorchNorm,
        normed_column=ColumnParallelLinear,
        column=ColumnParallelLinear,
        row=RowParallelLinear,
        copied=CopiedLinear,
        down=ColumnParallelLinear,  # what upstream's constructors take; exchanged for copied ones at once
        attention=SdpaAttention,
        latent=TorchLatentAttention,
        sparse=TorchSparseAttention,
        mlp=get_moe_module_spec(use_te=False, num_experts=model.num_experts or 1),
    )


def engine_parts(settings: Settings) -> Parts:
    """The parts of Megatron's own `hybrid_stack_spec`.

    Of transformer-engine's attentions only flash and cuDNN's share a sequence among ranks, and neither takes float32.
    """
    from megatron.core.extensions import transformer_engine as te

    shared_float32 = settings.parallel.context > 1 and settings.trainer.precision == "fp32"
    return Parts(
        stack=HybridStack,
        norm=te.TENorm,
        input_norm=IdentityOp,
        normed_column=te.TELayerNormColumnParallelLinear,
        column=te.TEColumnParallelLinear,
        row=te.TERowParallelLinear,
        copied=te.TELinear,
        down=te.TELinear,
        attention=SdpaAttention if shared_float32 else te.TEDotProductAttention,
        latent=MLASelfAttention,
        sparse=AbsorbedMLASelfAttention,
        mlp=get_moe_module_spec(use_te=True, num_experts=settings.model.num_experts or 1, moe_grouped_gemm=True),
    )
