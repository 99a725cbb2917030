"""Mamba-2's scan over a piece of a prompt on CUDA, as Triton kernels; `hybrid.generation.ops.scan` is their oracle.

`hybrid.model.ssd` has the recurrence, and how blocks of positions turn it into products of matrices. mamba-ssm's
kernels, made for training, write the states between blocks to memory, so that all blocks can be computed at once. Here
a program goes over the blocks of one head with the state in its registers: it takes the state from the sequence's row,
and puts it back there at the end. There are programs enough, since a model has many heads.

Shapes: B sequences, L positions, H SSM heads, P head width, G groups, N state, S rows of the state.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid.generation.kernels import follow, launched, softplus

_jit: Any = triton.jit
# Of 16-bit types; positions of a block, elements of a program's state: benchmarks/generation_gpu.md.
_POSITIONS, _STATE = 64, 8192
_HEADS = 16
_LOG2_E = tl.constexpr(1.4426950408889634)


@_jit
def _decays(
    dt, dt_bias, A, lengths, read, written, length, heads, dt_row, dt_position, lengths_stride,
    BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A block of positions of some heads. What position j brings, dt[j] x[j] B[j], is at position i of the same block
    left as exp2(read[i] - written[j]) x[j] B[j], and what was there before the block as exp2(read[i]) of it."""
    follow(OVERLAP)
    sequence = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    head = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    known = head < heads
    inside = (position < length)[:, None] & known[None, :]
    place = dt + sequence * dt_row + position[:, None].to(tl.int64) * dt_position + head[None, :]
    own = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    own += tl.load(dt_bias + head, mask=known, other=0.0)[None, :]
    step = softplus(own)
    # A position that does not count has no time: it leaves the state as it is, and brings nothing (log2(0) is -inf).
    counts = position < tl.load(lengths + sequence * lengths_stride)
    step = tl.where(counts[:, None], step, 0.0)
    decay = tl.cumsum(step * (tl.load(A + head, mask=known, other=0.0) * _LOG2_E)[None, :], axis=0)
    target = (sequence * heads + head[None, :]) * length + position[:, None]
    tl.store(read + target, decay, mask=inside)
    tl.store(written + target, decay - tl.log2(step), mask=inside)


@_jit
def _scan_block(
    x, B, C, y, read, written, d, state, start, length, x_position, B_position, C_position, y_position, p, n,
    P: tl.constexpr, N: tl.constexpr, BLOCK_L: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The block of positions from `start`: writes y, returns the state after it."""
    t = tl.arange(0, BLOCK_L)
    inside, row = start + t < length, (start + t)[:, None]
    if WIDE:
        row = row.to(tl.int64)
    inside_p, inside_n = inside[:, None] & (p < P)[None, :], inside[:, None] & (n < N)[None, :]
    reads = tl.load(read + start + t, mask=inside, other=0.0)
    writes = tl.load(written + start + t, mask=inside, other=float("inf"))
    end = tl.load(read + tl.minimum(start + BLOCK_L, length) - 1)
    asked = tl.load(C + row * C_position + n[None, :], mask=inside_n, other=0.0)
    keys = tl.load(B + row * B_position + n[None, :], mask=inside_n, other=0.0)
    values = tl.load(x + row * x_position + p[None, :], mask=inside_p, other=0.0)
    out = tl.dot(asked, tl.trans(state.to(asked.dtype)), input_precision="ieee") * tl.exp2(reads)[:, None]
    shares = tl.dot(asked, tl.trans(keys), input_precision="ieee")
    shares = tl.where(t[:, None] >= t[None, :], shares * tl.exp2(reads[:, None] - writes[None, :]), 0.0)
    out = tl.dot(shares.to(values.dtype), values, out, input_precision="ieee")
    wide = values.to(tl.float32)
    target = y + row * y_position + p[None, :]
    tl.store(target, (out + wide * d).to(y.dtype.element_ty), mask=inside_p)
    left = (wide * tl.exp2(end - writes)[:, None]).to(values.dtype)
    return tl.dot(tl.trans(left), keys, state * tl.exp2(end), input_precision="ieee")


@_jit
def _scan(
    x, B, C, read, written, D, states, rows, starts, y,
    length, heads, groups, x_row, x_position, B_row, B_position, C_row, C_position, rows_stride, starts_stride,
    P: tl.constexpr, N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_P rows of the state of one head of one sequence, over all blocks of positions."""
    follow(OVERLAP)
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group = head // (heads // groups)
    n, p = tl.arange(0, BLOCK_N), tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    row, seen = tl.load(rows + sequence * rows_stride), tl.load(starts + sequence * starts_stride) > 0
    place = states + ((row * heads + head) * P + p[:, None]) * N + n[None, :]
    inside = (p < P)[:, None] & (n < N)[None, :]
    state = tl.load(place, mask=inside & seen, other=0.0).to(tl.float32)
    d, y_position = tl.load(D + head), heads * P
    x, y = x + sequence * x_row + head * P, y + sequence * length * y_position + head * P
    B, C = B + sequence * B_row + group * N, C + sequence * C_row + group * N
    read, written = read + (sequence * heads + head) * length, written + (sequence * heads + head) * length
    if OVERLAP:
        for start in range(0, length, BLOCK_L):
            state = _scan_block(
                x, B, C, y, read, written, d, state, start, length, x_position, B_position, C_position, y_position,
                p, n, P, N, BLOCK_L, WIDE,
            )  # fmt: skip
    else:
        start = 0
        while start < length:  # Triton's interpreter knows no ranges that are given
            state = _scan_block(
                x, B, C, y, read, written, d, state, start, length, x_position, B_position, C_position, y_position,
                p, n, P, N, BLOCK_L, WIDE,
            )  # fmt: skip
            start += BLOCK_L
    tl.store(place, state.to(states.dtype.element_ty), mask=inside)


def scan(
    state: Tensor, rows: Tensor, starts: Tensor, lengths: Tensor, x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor,
    B: Tensor, C: Tensor, D: Tensor,
) -> Tensor:  # fmt: skip
    """As `ops.scan`: state (S, H, P, N) contiguous; x (B, L, H, P), dt (B, L, H), B and C (B, L, G, N), contiguous but
    for the first two dimensions; rows, starts and lengths (B) of any stride."""
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    y = torch.empty(batch, length, heads, width, device=x.device, dtype=x.dtype)
    read, written = torch.empty(2, batch, heads, length, device=x.device)
    positions, elements = (_POSITIONS, _STATE) if x.element_size() <= 2 else (_POSITIONS // 2, _STATE // 4)
    farthest = (length + positions) * max(x.stride(1), y.stride(1), B.stride(1), C.stride(1))
    block_n = max(16, int(triton.next_power_of_2(size)))
    block_p = max(16, min(int(triton.next_power_of_2(width)), elements // block_n))
    _decays[(batch, triton.cdiv(length, positions), triton.cdiv(heads, _HEADS))](
        dt, dt_bias, A, lengths, read, written, length, heads, dt.stride(0), dt.stride(1), lengths.stride(0),
        BLOCK_L=positions, BLOCK_H=_HEADS, **launched(x),
    )  # fmt: skip
    _scan[(heads, batch, triton.cdiv(width, block_p))](
        x, B, C, read, written, D, state, rows, starts, y,
        length, heads, groups, x.stride(0), x.stride(1), B.stride(0), B.stride(1), C.stride(0), C.stride(1),
        rows.stride(0), starts.stride(0),
        P=width, N=size, BLOCK_L=positions, BLOCK_P=block_p, BLOCK_N=block_n, WIDE=farthest >= 2**31, num_warps=4,
        num_stages=1,
        **launched(x),
    )  # fmt: skip
    return y
