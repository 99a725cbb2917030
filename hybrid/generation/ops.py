"""What is not a matrix product, for a batch of sequences, with the states changed in place: of one position each, or of
a piece of a prompt.

Each runs as a Triton kernel on CUDA (`hybrid.generation.kernels`, `scan_kernels`) and as plain PyTorch elsewhere; the
latter is the kernel's oracle. What a row gives does not depend on the other rows of the batch.

Shapes: B sequences, C channels of the convolution, W its width, d inner width, H SSM heads, P head width, G groups, N
state, K key-value heads, Q query heads, T positions of the cache, E head width of attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.generation.weights import Linear, Norm, rms_norm
from hybrid.model.ssd import ssd_scan


def conv_step(x: Tensor, state: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """Convolve and activate: x (B, C), any row stride; state (B, W, C), changed; taps (W, C); returns (B, C) of x's
    type."""
    if x.is_cuda:
        from hybrid.generation import kernels

        return kernels.conv_step(x, state, taps, bias)
    state.copy_(torch.cat([state[:, 1:], x.unsqueeze(1)], dim=1))
    return silu((state.float() * taps.float()).sum(dim=1).add_(bias)).to(x.dtype)


def ssm_step(
    state: Tensor, x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """Mamba-2's recurrence: state (B, H, P, N), changed; x (B, H, P); dt (B, H); B and C (B, G, N).

    dt is taken before bias and softplus; dt_bias, A and D (H) in float32. Computes in float32, whatever the state's
    type. Returns y (B, H, P) of x's type.
    """
    if x.is_cuda:
        from hybrid.generation import kernels

        return kernels.ssm_step(state, x, dt, dt_bias, A, B, C, D)
    b, h, p, n = state.shape
    g = B.shape[1]
    step = softplus(dt.float() + dt_bias)
    wide = state if state.dtype == torch.float32 else state.float()
    wide.mul_(torch.exp(step * A).view(b, h, 1, 1))
    grouped = wide.view(b, g, h // g * p, n)
    inflow = (x.float() * step.unsqueeze(-1)).view(b, g, -1, 1)
    grouped.addcmul_(inflow, B.float().unsqueeze(2))
    if wide is not state:
        state.copy_(wide)
    y = torch.linalg.vecdot(grouped, C.float().unsqueeze(2)).view(b, h, p)
    return y.addcmul_(x.float(), D.unsqueeze(-1)).to(x.dtype)


def scan(
    state: Tensor,
    rows: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    x: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_size: int,
) -> Tensor:
    """Mamba-2's recurrence over a piece of each of some sequences: x (B, L, H, P), dt (B, L, H) before bias and
    softplus, B and C (B, L, G, N), of which the first `lengths` (B) positions count; dt_bias, A and D (H) in float32.

    state (S, H, P, N), changed in `rows` (B): it is zeros where a row has seen `starts` (B) of 0, whatever is there.
    `starts` of None are all 0, `lengths` of None all L. Computes in float32, in chunks of `chunk_size` positions where
    the kernel does not choose them. Returns y (B, L, H, P) of x's type, of which nobody uses what does not count.
    """
    if x.is_cuda:
        from hybrid.generation import scan_kernels

        starts = torch.zeros_like(rows) if starts is None else starts
        lengths = torch.full_like(rows, x.shape[1]) if lengths is None else lengths
        return scan_kernels.scan(state, rows, starts, lengths, x, dt, dt_bias, A, B, C, D)
    step = softplus(dt.float() + dt_bias)
    if lengths is not None:  # without time a state stays as it is
        counts = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
        step = step * counts.unsqueeze(-1)
    before = None if starts is None else taken(state, rows, starts)
    y, after = ssd_scan(x, step, A, B, C, D, chunk_size=chunk_size, initial_state=before, return_final_state=True)
    put(after, state, rows)
    return y


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """Gate, then norm each of the groups: y and z (B, d), any row stride; weight (d); returns (B, d) of y's type."""
    if y.is_cuda:
        from hybrid.generation import kernels

        return kernels.gated_norm(y, z, weight, groups, eps)
    gated = (y.float() * silu(z.float())).unflatten(-1, (groups, -1))
    return (rms_norm(gated, eps).flatten(-2) * weight.float()).to(y.dtype)


def add_norm(hidden: Tensor, mixed: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """A layer's result to what came before it, and the norm of both: hidden and mixed (..., h); returns
    (..., h) twice."""
    if hidden.is_cuda and norm.bias is None:
        from hybrid.generation import kernels

        return kernels.add_norm(hidden, mixed, norm.weight, norm.eps)
    hidden = hidden + mixed
    return hidden, norm(hidden)


def keep(new_key: Tensor, new_value: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> None:
    """Put new keys and values (B, K, E), any strides, where they belong in key and value (B, K, T, E)."""
    if key.is_cuda and key.shape[-1] == value.shape[-1]:
        from hybrid.generation import kernels

        kernels.keep(new_key, new_value, key, value, positions)
        return
    rows = torch.arange(positions.shape[0], device=key.device)
    key[rows, :, positions] = new_key
    value[rows, :, positions] = new_value


def taken(state: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    """The state (S, ...) of some rows (B), as (B, ...): zeros where a row has seen `starts` (B) of 0, whatever is
    there."""
    if state.is_cuda:
        from hybrid.generation import kernels

        return kernels.taken(state, rows, starts)
    return state[rows].where((starts > 0).view(-1, *[1] * (state.ndim - 1)), 0)


def put(values: Tensor, state: Tensor, rows: Tensor) -> None:
    """Make values (B, ...), of any type, the state (S, ...) of some rows (B)."""
    if state.is_cuda:
        from hybrid.generation import kernels

        kernels.put(values, state, rows)
        return
    state[rows] = values.to(state.dtype)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); of torch's own an element's last bits depend on where it is, as on `silu`'s."""
    return -F.logsigmoid(-x)


# What torch's own functions on CPU compute without vector instructions: the elements after the last full vectors. They
# get other last bits there, and a row's bits would depend on how many rows come after it.
_VECTORS = 32


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x) of x (..., width): a row's bits depend on nothing but the row."""
    return F.silu(x) if x.is_cuda or x.shape[-1] % _VECTORS == 0 else x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution's function of x (..., width), likewise."""
    if x.is_cuda or x.shape[-1] % _VECTORS == 0:
        return F.gelu(x)
    return x * (1 + torch.erf(x * 0.5**0.5)) * 0.5


def activated(linear: Linear, x: Tensor, activation: str) -> Tensor:
    """What `linear` makes of x (..., in), through gelu, squared_relu or nothing; at one position one kernel on CUDA."""
    if linear.has_kernel_for(x):
        from hybrid.generation import kernels

        return kernels.matvec(x, linear.weight, linear.bias, activation)
    y = linear(x)
    return F.relu(y).square() if activation == "squared_relu" else gelu(y) if activation == "gelu" else y


def scan_step(state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Mamba-1's recurrence: state (B, d, N), changed; u (B, d); dt (B, d) after bias and softplus, in float32;
    B, C (B, N); A (d, N) and D (d) in float32. Returns y (B, d) in float32."""
    wide = state if state.dtype == torch.float32 else state.float()
    wide.mul_(torch.exp(dt.unsqueeze(-1) * A)).addcmul_((dt * u.float()).unsqueeze(-1), B.float().unsqueeze(1))
    if wide is not state:
        state.copy_(wide)
    return torch.linalg.vecdot(wide, C.float().unsqueeze(1)).addcmul_(u.float(), D)


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], device_lengths: Tensor) -> Tensor:
    """Attention of one query position: query (B, Q, E); key and value (B, K, T, E), of which a row has its length.
    Values may be of another width than keys.

    `lengths` are of the rows that count, `device_lengths` (B) of all; the positions asked for are among them.
    Returns (B, Q, the width of a value).
    """
    if query.is_cuda and key.shape[-1] != value.shape[-1]:
        seen = torch.arange(key.shape[2], device=key.device) < device_lengths.unsqueeze(1)
        return F.scaled_dot_product_attention(query.unsqueeze(2), key, value, attn_mask=seen[:, None, None])[:, :, 0]
    if query.is_cuda:
        from hybrid.generation import kernels

        return kernels.attend(query, key, value, device_lengths)
    # Row by row, over its own keys alone: a batch would have to be masked, and sums would be cut as the longest row is.
    context = query.new_zeros(*query.shape[:2], value.shape[-1])
    for row, length in enumerate(lengths):
        keys, values = key[row : row + 1, :, :length], value[row : row + 1, :, :length]
        context[row] = F.scaled_dot_product_attention(
            query[row : row + 1].unsqueeze(2), keys, values, enable_gqa=query.shape[1] != key.shape[1]
        )[0, :, 0]
    return context


def attend_piece(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    """Attention of a piece of each of some sequences: query (B, L, Q, E), of which i is at position starts (B) + i, to
    all positions up to its own of key and value (S, K, T, E) in `rows` (B) of them. Returns (B, L, Q, E)."""
    if query.is_cuda:
        from hybrid.generation import kernels

        return kernels.attend_piece(query, key, value, rows, starts)
    positions = torch.arange(key.shape[2], device=key.device)
    until = starts.unsqueeze(1) + torch.arange(query.shape[1], device=key.device)
    seen = positions <= until.unsqueeze(-1)  # (B, L, T)
    return F.scaled_dot_product_attention(
        query.transpose(1, 2), key[rows], value[rows], attn_mask=seen.unsqueeze(1),
        enable_gqa=query.shape[2] != key.shape[1],
    ).transpose(1, 2)  # fmt: skip
