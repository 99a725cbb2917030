"""Norms in plain PyTorch, for the layer specs without transformer-engine.

Shapes: S sequence, B batch, D inner width, G groups.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from hybrid.model.gated_norm import gated_rms_norm


class TorchNorm:
    """Makes the RMSNorm or LayerNorm that `config.normalization` names, over the last `hidden_size` elements.

    Megatron's own wrapper of the torch norms refuses sequence parallelism. It only needs the parameters to be marked,
    so that their gradients are summed over the tensor-parallel ranks, each of which has seen a part of the sequence.
    A class, because Megatron's specs call classes and hand functions on.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> nn.Module:
        """A norm with weights of 1."""
        kind = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}[config.normalization]
        module = kind(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        for parameter in module.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return module


class GatedRMSNorm(nn.Module):
    """The RMSNorm inside a Mamba-2 mixer, one root mean square a group, beside mamba-ssm's `layernorm_gated.RMSNorm`.

    `forward(x, z)` with x, z (..., D) gives `rms_norm(x * silu(z)) * weight`; without z the input is taken as gated.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        assert not norm_before_gate, "Mamba-2 as Megatron trains it gates first"
        self.eps = eps
        self.group_size = group_size or hidden_size
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.tp_group: Any = None

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x, z: (..., D); returns (..., D) in x's type."""
        if z is not None:
            return gated_rms_norm(x, z, self.weight, group_size=self.group_size, eps=self.eps)
        grouped = x.unflatten(-1, (-1, self.group_size))
        return F.rms_norm(grouped, (self.group_size,), eps=self.eps).flatten(-2) * self.weight

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Split along D over tensor-parallel ranks, as Megatron's ExtendedRMSNorm does."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
