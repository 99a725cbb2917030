"""Mamba-1's selective scan in PyTorch: the CPU path, and the oracle of the CUDA kernel.

The recurrence, for every channel with its own row of A < 0 and for B, C shared by all channels:

    state[t] = exp(delta[t] A) * state[t-1] + delta[t] u[t] B[t]        y[t] = (state[t] C[t] + D u[t]) * silu(z[t])

(Gu & Dao 2023, arXiv 2312.00752, section 3.3; mamba-ssm's `selective_scan_fn`, whose tensors are (b, d, l) where these
are (b, l, d)). `selective_scan_recurrence` is that, one position after the other; `selective_scan_step` is one position
of it, for generation. All take any floating type, compute in float32 (float64 when u is float64) and run on any device.

A decay of its own for every channel and state leaves no matrix products as Mamba-2 has them: l d n states have to be
made one from the other. `selective_scan` makes them a chunk of positions at a time, small enough for a CPU's cache, and
keeps only one state a chunk for the backward pass, which makes the others again.

Shapes, by letter: b batch, l length, d channels, n state size, q positions of a chunk, r rows of the batch in it.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of a chunk's states, and of one step of them, for every thread: three chunks fit the second-level cache, and
# a step is worth its call.
_CHUNK_ELEMENTS = 1 << 18
_STEP_ELEMENTS = 1 << 15


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
) -> Any:
    """Scan a sequence; differentiable once with respect to all floating inputs.

    u, delta and the gate z (b, l, d), any strides; A (d, n), negative; B and C (b, l, n); D and delta_bias (d), the
    bias added to delta before the softplus. `initial_state` (b, d, n) is the state before the first position. `seq_idx`
    (b, l), integer: the state starts again from zero wherever it changes along l; the initial state belongs to the
    sequence of the first position, the final state to that of the last.

    Returns y (b, l, d) in u's type, or (y, final state (b, d, n) in the type computed in).
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    u_, delta, A, B, C = (tensor.to(dtype) for tensor in (u, _step_size(delta, delta_bias, delta_softplus), A, B, C))
    state = None if initial_state is None else initial_state.to(dtype)
    keep = None if seq_idx is None else F.pad(seq_idx[:, 1:] == seq_idx[:, :-1], (1, 0), value=True).to(dtype)
    scanned: Any = _SelectiveScan.apply(u_, delta, A, B, C, state, keep)
    y, state = scanned
    if D is not None:
        y = torch.addcmul(y, u_, D.to(dtype))
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(u.dtype)
    return (y, state) if return_final_state else y


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Take one position: state (b, d, n), u, delta and z (b, d), A (d, n), B and C (b, n), D and delta_bias (d).

    Returns y (b, d) in u's type and the state after the position; the given state is left as it is.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    u_, delta, A, B, C = (tensor.to(dtype) for tensor in (u, _step_size(delta, delta_bias, delta_softplus), A, B, C))
    inflow = (delta * u_).unsqueeze(-1) * B.unsqueeze(1)
    state = torch.addcmul(inflow, state.to(dtype), torch.exp(delta.unsqueeze(-1) * A))
    y = (state @ C.unsqueeze(-1)).squeeze(-1)
    if D is not None:
        y = y + u_ * D.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), state


def selective_scan_recurrence(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: `selective_scan` one position at a time, differentiable by autograd. Returns (y, final state)."""
    b, length, d = u.shape
    dtype = torch.promote_types(u.dtype, torch.float32)
    state = u.new_zeros(b, d, A.shape[1], dtype=dtype) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1]).view(b, 1, 1)
        z_t = None if z is None else z[:, t]
        y, state = selective_scan_step(
            state, u[:, t], delta[:, t], A, B[:, t], C[:, t], D, z_t, delta_bias, delta_softplus=delta_softplus
        )
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def _step_size(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """delta with its bias and softplus, which want at least float32."""
    delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
    if bias is not None:
        delta = delta + bias
    return F.softplus(delta) if softplus else delta


class _SelectiveScan(torch.autograd.Function):
    """The scan without skip and gate. Inside, positions come first and channels last: (l, b, d), states (b, n, d)."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        initial_state: Tensor | None,
        keep: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        b, _, d = u.shape
        n = A.shape[1]
        u, delta, B, C = (tensor.transpose(0, 1).contiguous() for tensor in (u, delta, B, C))
        keep = None if keep is None else keep.t().contiguous()
        A = A.t().contiguous()
        inputs, y = delta * u, torch.empty_like(u)
        state = u.new_zeros(b, n, d) if initial_state is None else initial_state.transpose(1, 2).contiguous()
        chunks = list(_chunks(u, n))
        buffers = _buffers(chunks[0], n * d, u, count=2)
        kept = []
        for chunk in chunks:
            rows = chunk[1]
            kept.append(state[rows].clone())
            states, _ = _states(kept[-1], inputs[chunk], delta[chunk], A, B[chunk], keep, chunk, buffers)
            y[chunk] = _rows_times_matrices(C[chunk], states[1:].view(-1, n, d))
            state[rows] = states[-1]

        ctx.set_materialize_grads(False)
        ctx.chunks = chunks
        ctx.save_for_backward(u, delta, A, B, C, keep, *kept)
        return y.transpose(0, 1), state.transpose(1, 2).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, keep, *kept = ctx.saved_tensors
        n, d = A.shape
        dy = torch.zeros_like(u) if grad_y is None else grad_y.transpose(0, 1).contiguous()
        inputs = delta * u
        dinputs, ddelta, dB, dC, dA = (torch.empty_like(tensor) for tensor in (u, delta, B, C, A))
        dA.zero_()
        # Of the state before the chunk that was taken last, for every row.
        dstate = u.new_zeros(u.shape[1], n, d) if grad_final is None else grad_final.transpose(1, 2).contiguous()
        *buffers, buffer = _buffers(ctx.chunks[0], n * d, u, count=3)
        for chunk, first in zip(reversed(ctx.chunks), reversed(kept), strict=True):
            rows = chunk[1]
            states, decay = _states(first, inputs[chunk], delta[chunk], A, B[chunk], keep, chunk, buffers)
            q, r = decay.shape[:2]
            dstates = buffer[: decay.numel()].view(decay.shape)
            torch.mul(dy[chunk].unsqueeze(2), C[chunk].unsqueeze(3), out=dstates)
            dsteps, decays = dstates.unbind(), decay.unbind()
            dsteps[-1].add_(dstate[rows])
            for t in reversed(range(q - 1)):
                dsteps[t].addcmul_(dsteps[t + 1], decays[t + 1])

            flat = dstates.view(q * r, n, d)
            dC[chunk] = _rows_times_matrices(dy[chunk], states[1:].view(q * r, n, d).transpose(1, 2))
            dB[chunk] = _rows_times_matrices(inputs[chunk], flat.transpose(1, 2))
            dinputs[chunk] = _rows_times_matrices(B[chunk], flat)

            # decay becomes the gradient of the state before it, then that of its own logarithm.
            decay.mul_(dstates)
            dstate[rows] = decay[0]
            decay.mul_(states[:-1])
            dA += torch.mul(decay, delta[chunk].unsqueeze(2), out=dstates).sum(dim=(0, 1))
            torch.sum(decay.mul_(A), dim=2, out=ddelta[chunk])

        du = dinputs * delta
        ddelta.addcmul_(dinputs, u)
        dinitial = dstate.transpose(1, 2) if ctx.needs_input_grad[5] else None
        du, ddelta, dB, dC = (grad.transpose(0, 1) for grad in (du, ddelta, dB, dC))
        return du, ddelta, dA.t(), dB, dC, dinitial, None


def _chunks(u: Tensor, n: int) -> Iterator[tuple[slice, slice]]:
    """Cut u (l, b, d) into (positions, rows), those of a row in the order of its positions, the largest first."""
    length, b, d = u.shape
    threads = torch.get_num_threads() if u.device.type == "cpu" else 1 << 6
    rows = min(b, max(1, threads * _STEP_ELEMENTS // (n * d)))
    positions = min(length, max(1, threads * _CHUNK_ELEMENTS // (rows * n * d)))
    for row in range(0, b, rows):
        for start in range(0, length, positions):
            yield slice(start, min(start + positions, length)), slice(row, min(row + rows, b))


def _buffers(largest: tuple[slice, slice], step: int, like: Tensor, count: int) -> list[Tensor]:
    """Return flat buffers, each for the states of a chunk and one more."""
    positions, rows = (part.stop - part.start for part in largest)
    return [like.new_empty((positions + 1) * rows * step) for _ in range(count)]


def _states(
    first: Tensor,
    inputs: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    keep: Tensor | None,
    chunk: tuple[slice, slice],
    buffers: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the states before every position and after the last (q + 1, r, n, d), and the decays (q, r, n, d).

    first (r, n, d), inputs and delta (q, r, d), A (n, d), B (q, r, n); keep (l, b) is zero where a state starts again.
    Both results lie in the buffers, where the next call overwrites them.
    """
    q, r, d = delta.shape
    n = A.shape[0]
    decay = buffers[0][: q * r * n * d].view(q, r, n, d)
    states = buffers[1][: (q + 1) * r * n * d].view(q + 1, r, n, d)
    # Exponents stop at -44 in float32: 1e-19 of an old state cannot be seen beside a new one, and the numbers too small
    # for the normal format, which cost the processor a hundredfold, do not even arise in the product of two decays.
    least = math.log(torch.finfo(A.dtype).tiny) / 2
    torch.mul(delta.unsqueeze(2), A, out=decay).clamp_(min=least).exp_()
    if keep is not None:
        decay.mul_(keep[chunk].view(q, r, 1, 1))
    states[0] = first
    torch.mul(inputs.unsqueeze(2), B.unsqueeze(3), out=states[1:])
    steps = states.unbind()
    for before, after, factor in zip(steps[:-1], steps[1:], decay.unbind(), strict=True):
        after.addcmul_(before, factor)
    return states, decay


def _rows_times_matrices(rows: Tensor, matrices: Tensor) -> Tensor:
    """Multiply (q, r, i) by (q r, i, j) to (q, r, j). A row from the left is the faster way round on CPU."""
    q, r, i = rows.shape
    return torch.bmm(rows.reshape(q * r, 1, i), matrices).view(q, r, -1)
