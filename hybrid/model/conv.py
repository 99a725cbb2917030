"""The short causal convolution of Mamba layers in PyTorch: the CPU path, and the oracle of causal-conv1d's kernels.

Shapes, by letter: b batch, l length, c channels, w width of the kernel (4 in practice). Channels come last: the input
projection gives them so, and so does oneDNN's depthwise convolution run several times faster than on (b, c, l).

The state between calls is (b, c, w), the last w inputs of every channel, oldest first, as causal-conv1d keeps it; zeros
before the first position. Only the newest w - 1 of them bear on the next output.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.model.sums import sum_products


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = "silu",
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
) -> Any:
    """Convolve every channel with its own kernel over the present and the w - 1 past positions.

    x (b, l, c), any strides; weight (c, w), the present position's last; bias (c). `seq_idx` (b, l), integer: positions
    before a change of it count as zero, as do those before the first one, whose past is otherwise `initial_state`
    (b, c, w). Differentiable once with respect to x, weight, bias and the initial state.

    Computes in float32 (float64 when x is float64). Returns y (b, l, c) in x's type and contiguous, or (y, final state
    (b, c, w) in x's type).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    width = weight.shape[1]
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    past = None if initial_state is None else initial_state[:, :, 1:].transpose(1, 2).to(dtype)
    if seq_idx is None:
        y: Any = _CausalConv.apply(x.to(dtype), weight, bias, past, activation)
    else:
        y = _packed_conv(x.to(dtype), weight, bias, past, seq_idx)
        y = F.silu(y) if activation == "silu" else y
    y = y.to(x.dtype)
    if not return_final_state:
        return y
    before = x.new_zeros(x.shape[0], x.shape[2], width) if initial_state is None else initial_state.to(x.dtype)
    return y, torch.cat([before, x[:, -width:].transpose(1, 2)], dim=2)[:, :, -width:]


def causal_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = "silu",
) -> tuple[Tensor, Tensor]:
    """Take one position: x (b, c), state (b, c, w), weight (c, w), bias (c).

    Returns y (b, c) in x's type and the state after the position; the given state is left as it is.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    state = torch.cat([state[:, :, 1:], x.unsqueeze(-1).to(state.dtype)], dim=-1)
    y = (state.to(dtype) * weight.to(dtype)).sum(dim=-1)
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype), state


def _packed_conv(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, seq_idx: Tensor) -> Tensor:
    """Convolve x (b, l, c) after past (b, w - 1, c) within the runs of equal values of seq_idx."""
    length, width = seq_idx.shape[1], weight.shape[1]
    inputs = F.pad(x, (0, 0, width - 1, 0)) if past is None else torch.cat([past, x], dim=1)
    runs = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(dim=1), (width, 0))  # the first goes on from the past
    y = x * weight[:, -1]
    for lag in range(1, width):
        first = width - 1 - lag
        same = runs[:, first : first + length] == runs[:, width - 1 :]
        y = y + inputs[:, first : first + length] * same.unsqueeze(-1) * weight[:, first]
    return y if bias is None else y + bias


class _CausalConv(torch.autograd.Function):
    """The convolution and its activation, of x (b, l, c) after past (b, w - 1, c).

    Torch's own gradient of the weight of a depthwise convolution takes longer on CPU than all the rest together.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, activation: str | None
    ) -> Tensor:
        b, length, c = x.shape
        width = weight.shape[1]
        inputs = x.new_empty(b, width - 1 + length, c)
        inputs[:, : width - 1] = 0 if past is None else past
        inputs[:, width - 1 :] = x
        conv = _depthwise(inputs, weight, bias)
        ctx.save_for_backward(inputs, weight, conv if activation else None)
        return F.silu(conv) if activation else conv

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, weight, conv = ctx.saved_tensors
        b, length, c = dy.shape
        width = weight.shape[1]
        # As long as the inputs, with zeros at the end: then rows of one are rows of the other, over the whole batch.
        dconv = torch.empty_like(inputs)
        dconv[:, length:] = 0
        if conv is None:
            dconv[:, :length] = dy
        else:
            torch.ops.aten.silu_backward.grad_input(dy, conv, grad_input=dconv[:, :length])

        rows = dconv.view(-1, c)[: b * (length + width - 1) - (width - 1)]
        sums = [sum_products(rows, inputs.view(-1, c)[tap : tap + len(rows)]) for tap in range(width)]
        dweight = torch.stack([products for products, _ in sums], dim=-1)
        dbias = sums[0][1] if ctx.needs_input_grad[2] else None

        backwards = weight.flip(1)
        dx = _depthwise(dconv, backwards)
        dpast = None
        if ctx.needs_input_grad[3]:
            dpast = _depthwise(F.pad(dconv[:, : width - 1], (0, 0, width - 1, 0)), backwards)
        return dx, dweight, dbias, dpast, None


def _depthwise(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve (b, l, c) with (c, w) to (b, l - w + 1, c), contiguous: images of height 1 with channels innermost."""
    image, kernel = inputs.transpose(1, 2).unsqueeze(2), weight[:, None, None]
    return F.conv2d(image, kernel, bias, groups=len(weight)).squeeze(2).transpose(1, 2).contiguous()
