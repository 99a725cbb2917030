"""Gated delta net (`G`) in PyTorch: Megatron's module with its own PyTorch rule, for where fla-core's kernels are not.

Upstream has the rule and the convolution in PyTorch (`deterministic_mode`), but asks for fla-core all the same, for the
normalisation of queries and keys. That is done here. Parameters and checkpoints are Megatron's own on either path.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, common
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

EPSILON = 1e-6  # added to the squared length of a query or key: fla-core's


@contextmanager
def _without_fla() -> Iterator[None]:
    """Let `GatedDeltaNet` be built where fla-core is not installed: its constructor asks for it."""
    module: Any = common
    saved = module.HAVE_FLA
    module.HAVE_FLA = True
    try:
        yield
    finally:
        module.HAVE_FLA = saved


class ReferenceGatedDeltaNet(GatedDeltaNet):
    """Megatron's gated delta net, computed in PyTorch."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        own = copy.copy(config)
        own.deterministic_mode = True
        with _without_fla():
            super().__init__(own, *args, use_qk_l2norm=False, **kwargs)

    def _prepare_input_for_gated_delta_rule(
        self, qkv: Tensor, gate: Tensor, batch: int, seq_len: int, *gate_feats: Any
    ) -> tuple[Tensor, ...]:
        """qkv (B, S, queries, keys and values of this rank's heads): queries and keys come out with length 1."""
        width = 2 * self.qk_dim_local_tp // self.cp_size
        query_key, value = qkv.split([width, qkv.shape[-1] - width], dim=-1)
        heads = query_key.unflatten(-1, (-1, self.key_head_dim))
        scale = torch.rsqrt(heads.float().square().sum(-1, keepdim=True) + EPSILON)
        query_key = (heads * scale).to(qkv.dtype).flatten(-2)
        qkv = torch.cat([query_key, value], dim=-1)
        return super()._prepare_input_for_gated_delta_rule(qkv, gate, batch, seq_len, *gate_feats)
