"""Mamba-2 on the PyTorch reference: Megatron's mixer with the scan, the convolution and the gated norm of this project.

Parameters, their names, their initialisation and the distributed checkpoint are Megatron's own (`MambaMixer`); only
what computes is replaced, so that a checkpoint of one loads into the other.

Shapes: S sequence, B batch, d inner width, G groups, N state, H heads, P head width, all of this rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm import mamba_mixer
from torch import Tensor

from hybrid.model.conv import causal_conv1d
from hybrid.model.norms import GatedRMSNorm
from hybrid.model.ssd import ssd_scan


@contextmanager
def _without_mamba_ssm() -> Iterator[None]:
    """Let `MambaMixer` be built where mamba-ssm is not installed: its constructor asks for it, and takes its norm."""
    module: Any = mamba_mixer
    saved = module.HAVE_MAMBA_SSM, module.ExtendedRMSNorm
    module.HAVE_MAMBA_SSM, module.ExtendedRMSNorm = True, GatedRMSNorm
    try:
        yield
    finally:
        module.HAVE_MAMBA_SSM, module.ExtendedRMSNorm = saved


class ReferenceMamba2Mixer(mamba_mixer.MambaMixer):
    """Megatron's Mamba-2 mixer, computed in PyTorch."""

    def __init__(self, *args: Any, **kwargs: Any):
        with _without_mamba_ssm():
            super().__init__(*args, **kwargs)

    def _ssm_training(self, zxBCdt: Tensor, packed_seq_params: PackedSeqParams | None = None) -> Tensor:
        """zxBCdt (S, B, 2d+2GN+H), the input projection; returns (S, B, d), gated and normed."""
        cp = self.cp
        inner, groups, heads = cp.d_inner_local_tpcp, cp.ngroups_local_tpcp, cp.nheads_local_tpcp
        seq_idx = packed_seq_params.seq_idx if packed_seq_params is not None else None

        # Split before they are transposed: their gradients then meet in the projection's own layout.
        parts = zxBCdt.split([inner, inner + 2 * groups * self.d_state, heads], dim=-1)
        z, xBC, dt = (part.transpose(0, 1) for part in parts)
        xBC = causal_conv1d(xBC, cp.get_conv1d_weight().squeeze(1), cp.get_conv1d_bias(), seq_idx=seq_idx)
        x, B, C = xBC.split([inner, groups * self.d_state, groups * self.d_state], dim=-1)
        y = ssd_scan(
            x.unflatten(-1, (heads, self.headdim)),
            F.softplus(dt.float() + cp.get_dt_bias().float()),
            -torch.exp(cp.get_A_log().float()),
            B.unflatten(-1, (groups, self.d_state)),
            C.unflatten(-1, (groups, self.d_state)),
            cp.get_D(),
            chunk_size=self.chunk_size,
            seq_idx=seq_idx,
        )
        if cp.cp_size == 1:
            return self.norm(y.flatten(2), z).transpose(0, 1)
        # The channels of a group can be on several ranks: they are gated here, normed together.
        gated = (y.flatten(2) * F.silu(z)).transpose(0, 1).contiguous()
        return self.norm(cp.post_conv_ssm(gated, packed_seq_params))


class FusedMamba2Mixer(mamba_mixer.MambaMixer):
    """Megatron's Mamba-2 mixer with mamba-ssm's and causal-conv1d's kernels, in an order that copies less.

    The kernels want the batch before the sequence. Upstream turns the wide output of the input projection around, and
    the scan's output back; here the narrow residual stream is, once on each side. The gate and the norm are done in the
    same kernel after the scan, so that one of the tensors that upstream keeps for the backward pass is not made.
    """

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (S, B, h), under sequence parallelism a part of S; returns the same shape, and no bias."""
        assert inference_context is None
        if self.cp.cp_size > 1:
            return super().forward(hidden_states, packed_seq_params=packed_seq_params)
        seq_idx = packed_seq_params.seq_idx if packed_seq_params is not None else None
        if self.config.sequence_parallel:
            # The projections gather and scatter along the first dimension, which has to be the sequence.
            zxBCdt = self.in_proj(hidden_states)[0].transpose(0, 1).contiguous()
            return self.out_proj(self._mix(zxBCdt, seq_idx).transpose(0, 1).contiguous())
        zxBCdt, _ = self.in_proj(hidden_states.transpose(0, 1).contiguous())
        output, bias = self.out_proj(self._mix(zxBCdt, seq_idx))
        return output.transpose(0, 1), bias

    def _mix(self, zxBCdt: Tensor, seq_idx: Tensor | None) -> Tensor:
        """zxBCdt (B, S, 2d+2GN+H), the input projection; returns (B, S, d), gated and normed."""
        from mamba_ssm.ops.triton import ssd_combined  # pyright: ignore[reportMissingImports]

        return ssd_combined.mamba_split_conv1d_scan_combined(
            zxBCdt,
            self.conv1d_weight.squeeze(1),
            self.conv1d_bias,
            self.dt_bias.float(),
            -torch.exp(self.A_log.float()),
            D=self.D,
            chunk_size=self.chunk_size,
            seq_idx=seq_idx,
            activation="silu",
            rmsnorm_weight=self.norm.weight,
            rmsnorm_eps=self.norm.eps,
            headdim=self.headdim,
            ngroups=self.ngroups_local_tp,
            norm_before_gate=False,
        )
