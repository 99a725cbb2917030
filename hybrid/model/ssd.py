"""Mamba-2's scan (state space duality) in PyTorch: the CPU path, and the oracle of the CUDA kernels.

The recurrence, for every head h with its own decay A[h] < 0 and for B, C shared by the heads of a group:

    state[t] = exp(dt[t] A) state[t-1] + dt[t] x[t] B[t]^T        y[t] = state[t] C[t] + D x[t]

`ssd_recurrence` is that, one position after the other. `ssd_scan` gives the same by chunks of positions, which turns
nearly all of the work into matrix products (Dao & Gu 2024, arXiv 2405.21060, section 6). `ssd_step` is one position of
it, for generation. All take any floating type, compute in float32 (float64 when x is float64) and run on any device.

Shapes, by letter: b batch, l length, h heads, p width of a head, g groups (h is a multiple of g), n state size,
c chunks, q positions of a chunk, k = h / g heads of a group.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 19  # of x, in what is computed at once on CPU


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    chunk_size: int,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
) -> Any:
    """Scan a sequence, in time linear in its length; differentiable once with respect to all floating inputs.

    x (b, l, h, p); dt (b, l, h), positive: softplus and bias are already in it; A (h), negative; B and C (b, l, g, n);
    D (h) or (h, p). `initial_state` (b, h, p, n) is the state before the first position. `seq_idx` (b, l), integer:
    the state starts again from zero wherever it changes along l, so that several sequences can share a row; the initial
    state belongs to the sequence of the first position, the final state to that of the last.

    Returns y (b, l, h, p) in x's type, or (y, final state (b, h, p, n) in the type computed in).

    The cost of a position is proportional to chunk_size for the products inside a chunk, and 1 / chunk_size for the
    states between chunks; the length need not be a multiple. On CPU 64 is best, or near it, for p and n of 32 to 128.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    length = x.shape[1]
    chunk = min(chunk_size, length)
    padding = -length % chunk
    segments = None if seq_idx is None else _segments(seq_idx)
    if padding:
        # A position with dt = 0 leaves the state as it is.
        x, B, C = (F.pad(tensor, (0, 0, 0, 0, 0, padding)) for tensor in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, padding))
        segments = None if segments is None else torch.cat([segments, segments[:, -1:].expand(-1, padding)], dim=1)
    y, final_state = _ChunkedScan.apply(
        x.to(dtype),
        dt.to(dtype),
        A.to(dtype),
        B.to(dtype),
        C.to(dtype),
        None if D is None else D.to(dtype),
        None if initial_state is None else initial_state.to(dtype),
        segments,
        chunk,
    )  # pyright: ignore[reportGeneralTypeIssues]
    y = y[:, :length].to(x.dtype)
    return (y, final_state) if return_final_state else y


def ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Take one position: state (b, h, p, n), x (b, h, p), dt (b, h), A (h), B and C (b, g, n), D (h) or (h, p).

    Returns y (b, h, p) in x's type and the state after the position; the given state is left as it is.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    b, h, p, n = state.shape
    g = B.shape[1]
    dt = dt.to(dtype)
    decay = torch.exp(dt * A.to(dtype)).view(b, h, 1, 1)
    inflow = (x.to(dtype) * dt.unsqueeze(-1)).view(b, g, h // g, p, 1) * B.to(dtype).view(b, g, 1, 1, n)
    state = torch.addcmul(inflow.view(b, h, p, n), state.to(dtype), decay)
    y = (state.view(b, g, (h // g) * p, n) @ C.to(dtype).unsqueeze(-1)).view(b, h, p)
    if D is not None:
        y = y + x.to(dtype) * _per_head(D.to(dtype))
    return y.to(x.dtype), state


def ssd_recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: `ssd_scan` one position at a time, differentiable by autograd. Returns (y, final state)."""
    b, length, h, p = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    state = x.new_zeros(b, h, p, B.shape[-1], dtype=dtype) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1]).view(b, 1, 1, 1)
        y, state = ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def _per_head(D: Tensor) -> Tensor:
    """D as (h, 1) or (h, p)."""
    return D.unsqueeze(-1) if D.dim() == 1 else D


def _segments(seq_idx: Tensor) -> Tensor:
    """Number the runs of equal values in (b, l) from 0 up, with one more 0 for the position before the first.

    A value that comes back later is another sequence.
    """
    return F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(dim=1), (2, 0))


@dataclass
class _Operands:
    """The inputs of the scan or their gradients; whole, or of a block: some rows of the batch, some of their chunks."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    segments: Tensor | None  # (b, 1 + l): that of the position before the block comes first

    def block(self, rows: slice, part: slice) -> "_Operands":
        """Return views of the inputs of a block."""
        x, dt, B, C = (tensor[rows, part] for tensor in (self.x, self.dt, self.B, self.C))
        segments = None if self.segments is None else self.segments[rows, part.start : part.stop + 1]
        return _Operands(x=x, dt=dt, A=self.A, B=B, C=C, D=self.D, segments=segments)


@dataclass
class _Chunks:
    """What the forward and the backward pass both need. Chunks come first: a step from chunk to chunk is contiguous."""

    x: Tensor  # (c, b, q, h, p), a view
    dt: Tensor  # (c, b, q, h), a view
    B: Tensor  # (c b g, q, n)
    C: Tensor  # (c b g, q, n)
    xdt: Tensor  # dt x (c, b, h, q, p): by heads, as the products within a head want it
    outgoing: Tensor  # dt x decayed to the end of the chunk (c, b, g, q, k, p): by groups, for B^T and C
    scores: Tensor  # C B^T within the chunk (c, b, g, 1, q, q), zero above the diagonal and between sequences
    keep: Tensor  # one where scores are kept, zero elsewhere (q, q) or (c, b, 1, 1, q, q)
    decay: Tensor  # from position j to i of the chunk (c, b, g, k, q, q); the upper triangle has no meaning
    decay_in: Tensor  # from the state before the chunk to i (c, b, q, h)
    decay_out: Tensor  # from j to the end of the chunk (c, b, q, h)
    decay_through: Tensor  # from the state before the chunk to that after it (c, b, h, 1, 1)
    bounded: Tensor  # where dt A was raised to the least logarithm (c, b, q, h)

    def own_scores(self) -> Tensor:
        """Return what a position takes of its own dt x, for every head (c, b, q, h)."""
        c, b, g, k, q, _ = self.decay.shape
        own = self.scores.diagonal(dim1=-2, dim2=-1).expand(c, b, g, k, q)
        return own.permute(0, 1, 4, 2, 3).reshape(c, b, q, g * k)

    def present(self, D: Tensor | None) -> Tensor:
        """Return what y takes of x of the same position, (c, b, q, h, 1 or p)."""
        own = (self.own_scores() * self.dt).unsqueeze(-1)
        return own if D is None else own + _per_head(D)

    def mix(self) -> Tensor:
        """Turn `decay` into what y takes of dt x of earlier positions of the chunk, (c b h, q, q)."""
        mixing = self.decay.mul_(self.scores)
        mixing.diagonal(dim1=-2, dim2=-1).zero_()
        return mixing.view(-1, *mixing.shape[-2:])


def _make_chunks(inputs: _Operands, q: int) -> _Chunks:
    """Cut chunks of q positions out of a block."""
    x, dt, A, B, C, segments = inputs.x, inputs.dt, inputs.A, inputs.B, inputs.C, inputs.segments
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    c, k = length // q, h // g
    x = x.reshape(b, c, q, h, p).transpose(0, 1)
    dt = dt.reshape(b, c, q, h).transpose(0, 1)
    B, C = (tensor.reshape(b, c, q, g, n).permute(1, 0, 3, 2, 4).reshape(-1, q, n) for tensor in (B, C))
    scores = torch.bmm(C, B.transpose(1, 2)).view(c, b, g, 1, q, q)
    keep = torch.ones(q, q, dtype=x.dtype, device=x.device).tril_()

    # Exponents stop at -44 in float32: what is weighted by 1e-19 cannot be seen beside a position's own share, and the
    # numbers too small for the normal format, which cost the processor a hundredfold, do not even arise in the product
    # of two weights. Bounding every single step as well keeps the sums short, and the digits of their differences.
    least = math.log(torch.finfo(dt.dtype).tiny) / 2
    steps = dt * A
    bounded = steps < least
    total = steps.clamp_(min=least).cumsum(dim=2)
    rows = total.transpose(2, 3).contiguous()
    # Above the diagonal, where scores are zero, the difference is positive: the upper bound keeps it from overflowing.
    decay = (rows.unsqueeze(-1) - rows.unsqueeze(-2)).clamp_(least, 0).exp_()
    decay_in = total.clamp(min=least).exp_()
    decay_out = (total[:, :, -1:] - total).clamp_(min=least).exp_()
    decay_through = decay_in[:, :, -1]
    if segments is not None:
        first, segments = segments[:, 0], segments[:, 1:].reshape(b, c, q).transpose(0, 1)
        keep = keep * (segments.unsqueeze(-1) == segments.unsqueeze(-2)).view(c, b, 1, 1, q, q)
        before, last = torch.cat([first.view(1, b, 1), segments[:-1, :, -1:]]), segments[:, :, -1:]
        decay_in = decay_in * (segments == before).unsqueeze(-1)
        decay_out = decay_out * (segments == last).unsqueeze(-1)
        decay_through = decay_through * (before == last)

    xdt = x.new_empty(c, b, h, q, p)
    torch.mul(x.transpose(2, 3), dt.transpose(2, 3).unsqueeze(-1), out=xdt)
    outgoing = x.new_empty(c, b, g, q, k, p)
    torch.mul(_by_group(xdt.transpose(2, 3), g), _by_group(decay_out.unsqueeze(-1), g), out=outgoing)
    return _Chunks(
        x=x,
        dt=dt,
        B=B,
        C=C,
        xdt=xdt,
        outgoing=outgoing,
        scores=scores.mul_(keep),
        keep=keep,
        decay=decay.view(c, b, g, k, q, q),
        decay_in=decay_in,
        decay_out=decay_out,
        decay_through=decay_through.view(c, b, h, 1, 1),
        bounded=bounded,
    )


class _ChunkedScan(torch.autograd.Function):
    """The scan over whole chunks, a block of them after the other; the backward pass goes through them in reverse."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial_state: Tensor | None,
        segments: Tensor | None,
        q: int,
    ) -> tuple[Tensor, Tensor]:
        b, length, h, p = x.shape
        inputs = _Operands(x=x, dt=dt, A=A, B=B, C=C, D=D, segments=segments)
        y = x.new_empty(b, length, h, p)
        state = x.new_zeros(b, h, p, B.shape[-1]) if initial_state is None else initial_state.clone()
        blocks = _blocks(x, q)
        kept = []
        for rows, part in blocks:
            states, past = _forward_block(inputs.block(rows, part), state[rows], q, y[rows, part])
            state[rows] = states[-1]
            kept += [states, past]

        ctx.set_materialize_grads(False)
        ctx.chunk_size = q
        ctx.blocks = blocks
        ctx.save_for_backward(x, dt, A, B, C, D, segments, *kept)
        return y, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor | None, dfinal: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, segments, *kept = ctx.saved_tensors
        inputs = _Operands(x=x, dt=dt, A=A, B=B, C=C, D=D, segments=segments)
        dy = torch.zeros_like(x) if dy is None else dy
        grads = _Operands(
            x=_empty_like(x),
            dt=_empty_like(dt),
            A=torch.zeros_like(A),
            B=_empty_like(B),
            C=_empty_like(C),
            D=None if D is None else torch.zeros_like(D),
            segments=None,
        )
        dstate = x.new_zeros(x.shape[0], *kept[0].shape[2:]) if dfinal is None else dfinal.clone()
        for (rows, part), states, past in zip(ctx.blocks[::-1], kept[-2::-2], kept[::-2], strict=True):
            dstate[rows] = _backward_block(
                inputs.block(rows, part),
                states,
                past,
                dy[rows, part],
                dstate[rows],
                ctx.chunk_size,
                grads.block(rows, part),
            )
        dinitial = dstate if ctx.needs_input_grad[6] else None
        return grads.x, grads.dt, grads.A, grads.B, grads.C, grads.D, dinitial, None, None


def _blocks(x: Tensor, q: int) -> list[tuple[slice, slice]]:
    """Cut (rows, positions) into blocks, those of a row in the order of its positions.

    On CPU, larger blocks leave the caches and take memory, smaller ones spend their time between operations.
    """
    b, length, h, p = x.shape
    positions = max(q, _BLOCK_ELEMENTS // (h * p)) if x.device.type == "cpu" else b * length
    part, rows = min(length, positions // q * q), max(1, positions // length)
    return [
        (slice(row, min(row + rows, b)), slice(start, min(start + part, length)))
        for row in range(0, b, rows)
        for start in range(0, length, part)
    ]


def _forward_block(inputs: _Operands, state: Tensor, q: int, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scan one block from its state (b, h, p, n) and write its y.

    With S the state before a chunk, past = (scores * decay) (dt x) + decay_in * (S C) and y = past + own dt x + D x,
    where own is the diagonal of the scores; the state after the chunk is decay_through * S + outgoing^T B. B and C meet
    all heads of a group in one product, and are never repeated.

    Returns the states before every chunk and after the last (c + 1, b, h, p, n), and past (c, b, q, h, p).
    """
    chunks = _make_chunks(inputs, q)
    c, b, g, _, k, p = chunks.outgoing.shape
    n = state.shape[-1]
    states = state.new_empty(c + 1, b, g * k, p, n)
    states[0] = state
    torch.bmm(chunks.outgoing.view(-1, q, k * p).transpose(1, 2), chunks.B, out=states[1:].view(-1, k * p, n))
    steps = states.unbind()
    for before, after, decay in zip(steps[:-1], steps[1:], chunks.decay_through.unbind(), strict=True):
        after.addcmul_(before, decay)

    inside = torch.bmm(chunks.mix(), chunks.xdt.view(-1, q, p)).view(c, b, g * k, q, p).transpose(2, 3)
    across = torch.bmm(chunks.C, states[:-1].view(-1, k * p, n).transpose(1, 2)).view(c, b, g, q, k, p)
    past = _empty_like(chunks.x)
    torch.addcmul(_by_group(inside, g), across, _by_group(chunks.decay_in.unsqueeze(-1), g), out=_by_group(past, g))
    torch.addcmul(past, chunks.x, chunks.present(inputs.D), out=y.unflatten(1, (c, q)).transpose(0, 1))
    return states, past


def _backward_block(
    inputs: _Operands, states: Tensor, past: Tensor, dy: Tensor, dstate: Tensor, q: int, grads: _Operands
) -> Tensor:
    """Write the gradients of one block, given those of y and of the state after it (b, h, p, n).

    The decays and products of the chunks are made again. Returns the gradient of the state before the block.
    """
    chunks = _make_chunks(inputs, q)
    c, b, g, _, k, p = chunks.outgoing.shape
    n, h = states.shape[-1], g * k
    dy, dx, ddt = (tensor.unflatten(1, (c, q)).transpose(0, 1) for tensor in (dy, grads.x, grads.dt))

    # Through the states, last chunk first.
    dacross = torch.empty_like(chunks.outgoing)
    torch.mul(_by_group(dy, g), _by_group(chunks.decay_in.unsqueeze(-1), g), out=dacross)
    dacross = dacross.view(-1, q, k * p)
    dstates = torch.empty_like(states)
    dstates[c] = dstate
    torch.bmm(dacross.transpose(1, 2), chunks.C, out=dstates[:-1].view(-1, k * p, n))
    steps = dstates.unbind()[::-1]
    for after, before, decay in zip(steps[:-1], steps[1:], chunks.decay_through.unbind()[::-1], strict=True):
        before.addcmul_(after, decay)
    dafter = dstates[1:].view(-1, k * p, n)
    dC = torch.bmm(dacross, states[:-1].view(-1, k * p, n))
    dB = torch.bmm(chunks.outgoing.view(-1, q, k * p), dafter)
    doutgoing = torch.bmm(chunks.B, dafter.transpose(1, 2)).view(c, b, g, q, k, p)

    # Within the chunks.
    dy_by_head = dy.transpose(2, 3).contiguous().view(-1, q, p)
    dmixing = torch.bmm(dy_by_head, chunks.xdt.view(-1, q, p).transpose(1, 2)).view(c, b, g, k, q, q)
    dscores = dmixing.mul_(chunks.decay).sum(dim=3, keepdim=True).mul_(chunks.keep).view(-1, q, q)
    dC.baddbmm_(dscores, chunks.B)
    dB.baddbmm_(dscores.transpose(1, 2), chunks.C)
    for grad, out in ((dB, grads.B), (dC, grads.C)):
        out.unflatten(1, (c, q)).copy_(grad.view(c, b, g, q, n).permute(1, 0, 3, 2, 4))
    inside = torch.bmm(chunks.mix().transpose(1, 2), dy_by_head).view(c, b, h, q, p).transpose(2, 3)
    dxdt = _empty_like(chunks.x)
    torch.addcmul(_by_group(inside, g), doutgoing, _by_group(chunks.decay_out.unsqueeze(-1), g), out=_by_group(dxdt, g))

    # The weight from j to i is exp(total[i] - total[j]): total[i] receives what row i makes of it (dy . past) less what
    # column i gave, and the end of the chunk, a row too, what the state after it carries on. No sums over (q, q) are
    # needed; the present, whose weight is one, is left out, as it would only cancel, in large numbers.
    torch.sum(dxdt * chunks.x, dim=-1, out=ddt)
    dtotal = (dy * past).sum(dim=-1).sub_(ddt * chunks.dt)
    dtotal[:, :, -1] += _dot(states[1:], dstates[1:]).view(c, b, h, p).sum(dim=-1)
    dsteps = dtotal.flip(2).cumsum(dim=2).flip(2).masked_fill_(chunks.bounded, 0)
    grads.A += (dsteps * chunks.dt).sum(dim=(0, 1, 2))
    products = dy * chunks.x
    sums = products.sum(dim=-1)
    if grads.D is not None:
        grads.D += (sums if grads.D.dim() == 1 else products).sum(dim=(0, 1, 2))
    ddt.addcmul_(dsteps, inputs.A).addcmul_(sums, chunks.own_scores())
    torch.addcmul(dxdt.mul_(chunks.dt.unsqueeze(-1)), dy, chunks.present(inputs.D), out=dx)
    return dstates[0]


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the products of the rows of two contiguous tensors (.., p) as one vector, without a (.., p) on the way."""
    p = left.shape[-1]
    return torch.bmm(left.view(-1, 1, p), right.view(-1, p, 1)).view(-1)


def _empty_like(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor of the same shape, type and device."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _by_group(tensor: Tensor, g: int) -> Tensor:
    """View (c, b, q, h, p) as (c, b, g, q, k, p)."""
    return tensor.unflatten(3, (g, -1)).transpose(2, 3)
