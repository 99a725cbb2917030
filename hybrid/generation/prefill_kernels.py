"""The convolution and Mamba-1's scan over a piece of a prompt.

On CUDA mamba-ssm's and causal-conv1d's kernels, where they are installed; else this project's PyTorch.

Shapes: B sequences, L positions, C channels, W width of the convolution, N state, d inner width. A state that is None
is that of a sequence that has seen nothing.
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from hybrid.model.conv import causal_conv1d
from hybrid.model.selective_scan import selective_scan


@cache
def _installed(module: str) -> bool:
    try:
        import_module(module)
    except Exception:  # built for another torch, it fails in many ways
        return False
    return True


def conv(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x (B, L, C), weight (C, W), bias (C), state (B, W, C); returns y (B, L, C) and the state after it, or after the
    first `lengths` (B) of the positions."""
    after = _inputs_after(x, state, weight.shape[1], lengths)
    # Its kernel wants rows of channels that start at multiples of eight.
    if x.is_cuda and x.shape[2] % 8 == 0 and _installed("causal_conv1d"):
        fused: Any = import_module("causal_conv1d")
        x = x if x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 else x.contiguous()
        past = None if state is None else state[:, 1:].transpose(1, 2)
        y = fused.causal_conv1d_fn(x.transpose(1, 2), weight, bias, initial_states=past, activation="silu")
        return y.transpose(1, 2), after
    y = causal_conv1d(x, weight, bias, initial_state=None if state is None else state.transpose(1, 2))
    return y, after


def _inputs_after(x: Tensor, state: Tensor | None, width: int, lengths: Tensor | None) -> Tensor:
    """The last `width` inputs, of those before and of the first `lengths` (B), or all, of x."""
    before = x.new_zeros(x.shape[0], width, x.shape[2]) if state is None else state
    if lengths is None:
        return torch.cat([before, x[:, -width:]], dim=1)[:, -width:]
    places = lengths.unsqueeze(1) + torch.arange(-width, 0, device=x.device)  # below 0: among those before
    row = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    new, old = x[row, places.clamp(min=0)], before[row, (places + width).clamp(max=width - 1)]
    return torch.where(places.unsqueeze(-1) < 0, old, new)


def selective(
    x: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Mamba-1: x, dt (before bias and softplus) and z (B, L, d), B and C (B, L, N), state (B, d, N)."""
    if x.is_cuda and state is None and _installed("mamba_ssm.ops.selective_scan_interface"):
        fused: Any = import_module("mamba_ssm.ops.selective_scan_interface")
        channels_first = (tensor.transpose(1, 2) for tensor in (x, dt, B, C, z))
        x, dt, B, C, z = (tensor.contiguous() for tensor in channels_first)
        y, last = fused.selective_scan_fn(
            x, dt, A, B, C, D, z=z, delta_bias=dt_bias, delta_softplus=True, return_last_state=True
        )
        return y.transpose(1, 2), last
    return selective_scan(
        x, dt, A, B, C, D, z, dt_bias, delta_softplus=True, initial_state=state, return_final_state=True
    )
