"""Latent attention (MLA, `+`) and DeepSeek sparse attention (DSA, `D`): Megatron's modules on either backend.

Upstream builds the projections down to the low ranks, and the sparse attention's indexer, from transformer-engine's
`TELinear`, of which every tensor-parallel rank holds a whole copy. Its other choice, a projection whose rows are split
and whose output is gathered, gives wrong gradients: the rotated key is used by the heads of all ranks, and the
gradients that come back from the others' heads are lost. So there is a linear layer here that is copied, too, and it
stands in the same places where transformer-engine is not.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from megatron.core.transformer.experimental_attention_variant.absorbed_mla import AbsorbedMLASelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor, nn


class CopiedLinear(nn.Module):
    """A linear layer without bias, the same on every tensor-parallel rank; weight (output_size, input_size).

    Takes the place of `TELinear` with `parallel_mode="duplicated"`. Under sequence parallelism a rank has seen a part
    of the sequence, and the gradients are summed like a norm's.
    """

    def __init__(self, input_size: int, output_size: int, *, config: Any, init_method: Any, **_: Any):
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            tracker: Any = get_cuda_rng_tracker()
            with tracker.fork(get_data_parallel_rng_tracker_name()):
                init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x (..., input_size) to (..., output_size), and no bias."""
        return nn.functional.linear(x, self.weight), None


def _copy_projections_down(layer: Any, config: MLATransformerConfig) -> None:
    """Exchange the split projections, which upstream's constructor takes, for copied ones."""
    kept: dict[str, Any] = {"config": config, "init_method": config.init_method}
    assert isinstance(layer.linear_kv_down_proj, ColumnParallelLinear)
    layer.linear_q_down_proj = CopiedLinear(config.hidden_size, config.q_lora_rank, **kept)
    width = config.kv_lora_rank + config.qk_pos_emb_head_dim
    layer.linear_kv_down_proj = CopiedLinear(config.hidden_size, width, **kept)


class TorchLatentAttention(MLASelfAttention):
    """Megatron's latent attention from torch modules."""

    def __init__(self, config: MLATransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        _copy_projections_down(self, config)


class TorchSparseAttention(AbsorbedMLASelfAttention):
    """The latent attention that Megatron's sparse attention works in, from torch modules."""

    def __init__(self, config: MLATransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        _copy_projections_down(self, config)
