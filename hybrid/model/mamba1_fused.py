"""What Mamba-1 does between its projections, with the kernels of causal-conv1d and mamba-ssm.

mamba-ssm's own `mamba_inner_fn` ends with the output projection and knows nothing of other ranks. This stops before it,
sums the time step's low rank, B and C over the ranks that share the channels, and like it keeps neither the convolved x
nor the time steps for the backward pass, which makes them again.

Shapes: T positions, B batch, c channels of this rank, N state, R rank of the time step, W width of the convolution. The
kernels want positions innermost, (B, c, T), and T a multiple of 8: they then read 16 bytes at once, and do without the
other path of causal-conv1d 1.7's backward pass (`causal_conv1d_bwd.cu`). It forgets the last inputs before a chunk of
1024 positions (512 in float32) that holds fewer than 8 (4) of them, and gives wrong gradients there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from causal_conv1d.cpp_functions import (  # pyright: ignore[reportMissingImports]
    causal_conv1d_bwd_function,
    causal_conv1d_fwd_function,
)
from mamba_ssm.ops.selective_scan_interface import selective_scan_cuda  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.distributed import ProcessGroup

from hybrid.model.transpose import channels_first, positions_first

MULTIPLE = 8


def mix(
    xz: Tensor,
    conv: Tensor,
    conv_bias: Tensor,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    group: ProcessGroup,
) -> Tensor:
    """Convolve x, scan it, gate it with z.

    xz (T, B, 2c); conv (c, W), conv_bias (c), x_weight (R+2N, c) and dt_weight (c, R) in its type; dt_bias and D (c)
    and A (c, N), negative, in float32. Returns (T, B, c).
    """
    positions = len(xz)
    xz = F.pad(xz, (0, 0, 0, 0, 0, -positions % MULTIPLE)) if positions % MULTIPLE else xz
    mixed: Any = _Mix.apply(xz, conv, conv_bias, x_weight, dt_weight, dt_bias, A, D, group)
    return mixed[:positions]  # what was put behind them does not bear on them


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        xz: Tensor,
        conv: Tensor,
        conv_bias: Tensor,
        x_weight: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        group: ProcessGroup,
    ) -> Tensor:
        inner = channels_first(xz)
        x, z = inner.chunk(2, dim=1)
        u = causal_conv1d_fwd_function(x, conv, conv_bias, None, None, None, True)
        low = _product(x_weight, u)
        _sum(low, group)
        dt, B, C = _split(low, dt_weight.shape[1], A.shape[1])
        delta = _product(dt_weight, dt)
        out, states, gated = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, dt_bias, True)
        ctx.save_for_backward(inner, conv, conv_bias, x_weight, dt_weight, dt_bias, A, D, low, out, states)
        ctx.group = group
        return positions_first(gated)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inner, conv, conv_bias, x_weight, dt_weight, dt_bias, A, D, low, out, states = ctx.saved_tensors
        x, z = inner.chunk(2, dim=1)
        u = causal_conv1d_fwd_function(x, conv, conv_bias, None, None, None, True)
        dt, B, C = _split(low, dt_weight.shape[1], A.shape[1])
        delta = _product(dt_weight, dt)
        dinner = torch.empty_like(inner)
        dx, dz = dinner.chunk(2, dim=1)
        # The kernel fills dz in place; its last argument asks for the gated output again, which nobody here needs.
        du, ddelta, dA, dB, dC, dD, ddt_bias, _ = selective_scan_cuda.bwd(
            u, delta, A, B, C, D, z, dt_bias, channels_first(dy), states, out, dz, True, False
        )
        dlow = torch.cat([_product(dt_weight.t(), ddelta), dB.squeeze(1), dC.squeeze(1)], dim=1)
        _sum(dlow, ctx.group)
        ddt_weight = torch.bmm(ddelta, dt.transpose(1, 2)).sum(dim=0)
        dx_weight = torch.bmm(dlow, u.transpose(1, 2)).sum(dim=0)
        du.baddbmm_(x_weight.t().expand(len(du), -1, -1), dlow)
        _, dconv, dconv_bias, *_ = causal_conv1d_bwd_function(x, conv, conv_bias, du, None, None, None, dx, False, True)
        return positions_first(dinner), dconv, dconv_bias, dx_weight, ddt_weight, ddt_bias, dA, dD, None


def _product(weight: Tensor, tensor: Tensor) -> Tensor:
    """weight (m, k), tensor (B, k, T): (B, m, T), without a transposed copy of either."""
    return torch.bmm(weight.expand(len(tensor), -1, -1), tensor)


def _split(low: Tensor, rank: int, state: int) -> tuple[Tensor, Tensor, Tensor]:
    """The time step's low rank (B, R, T), and B and C (B, 1, N, T)."""
    dt, B, C = low.split([rank, state, state], dim=1)
    return dt, B.unsqueeze(1), C.unsqueeze(1)


def _sum(tensor: Tensor, group: ProcessGroup) -> None:
    if group.size() > 1:
        torch.distributed.all_reduce(tensor, group=group)
