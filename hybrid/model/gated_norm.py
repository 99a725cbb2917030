"""The gate and the RMSNorm that end a Mamba-2 layer, in one differentiable operation without intermediate results.

Beside mamba-ssm's `layernorm_gated.rmsnorm_fn(x, weight, z=z, group_size=..., norm_before_gate=False)`.

Shapes, by letter: d inner width; any dimensions before it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.model.sums import sum_products


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, *, group_size: int, eps: float) -> Tensor:
    """Return `rms_norm(x * silu(z)) * weight`, with one root mean square for every group_size channels.

    x and z (..., d) of any strides, weight (d), d a multiple of group_size. Computes in float32 (float64 when x is
    float64). Returns (..., d) in x's type, laid out in memory as z is; differentiable once.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    y: Any = _GatedNorm.apply(x.to(dtype), z.to(dtype), weight.to(dtype), group_size, eps)
    return y.to(x.dtype)


class _GatedNorm(torch.autograd.Function):
    """Keeps its inputs and the scale of every group; the backward pass makes the gate and the normed values again."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float
    ) -> Tensor:
        gated = F.silu(z).mul_(x)
        groups = gated.unflatten(-1, (-1, group_size))
        scale = torch.linalg.vector_norm(groups, dim=-1, keepdim=True).square_().div_(group_size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, z, weight, scale)
        groups.mul_(scale)
        return gated.mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, z, weight, scale = ctx.saved_tensors
        d, groups = weight.numel(), scale.shape[-2]
        gate = F.silu(z)
        normed = (gate * x).unflatten(-1, (groups, -1)).mul_(scale)
        # Rows in the order in which they lie in memory, so that they are not copied.
        order = [*sorted(range(gate.dim() - 1), key=gate.stride, reverse=True), -1]
        rows = (tensor.permute(order).reshape(-1, d) for tensor in (dy, normed.flatten(-2)))
        dweight, _ = sum_products(*rows)
        dnormed = (dy * weight).unflatten(-1, (groups, -1))
        mean = (dnormed * normed).sum(dim=-1, keepdim=True).div_(d // groups)
        dgated = dnormed.addcmul_(normed, mean, value=-1).mul_(scale).flatten(-2)
        dx = gate.mul_(dgated)
        dz = torch.ops.aten.silu_backward(dgated.mul_(x), z)
        return dx, dz, dweight, None, None
