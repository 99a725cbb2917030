"""One position of a Mamba-2 or attention layer on CUDA, as Triton kernels; `hybrid.generation.ops` has their oracles.

At decoding, a layer is a few products of a matrix with few rows, and a pass over the sequence's state: what counts is
bytes moved, and how many kernels there are. The recurrence here takes a whole head's state in a program or two, reads
and writes it once with wide accesses, and has softplus, decay, skip and the types' conversions in it.

From Hopper on, kernels that follow each other overlap (programmatic dependent launch): one is put onto the GPU while
the one before it still runs, and waits for its end in `follow`; a product with one row has its first weights by then.

Shapes: B sequences, C channels of the convolution, W its width, d inner width, H SSM heads, P head width, G groups, N
state, K key-value heads, Q query heads, T positions of the cache, E head width of attention.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_jit: Any = triton.jit
_PROGRAMS = 1024  # about eight for each multiprocessor of a large GPU


@cache
def _overlaps(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launched(x: Tensor) -> dict[str, Any]:
    """How a kernel on x's device is launched: overlapping with the one before it, where that can be."""
    overlap = _overlaps(x.device)
    return {"OVERLAP": overlap, "launch_pdl": True} if overlap else {"OVERLAP": False}


@_jit
def follow(OVERLAP: tl.constexpr):
    """Wait for what the kernel before this one writes, and let the next one be put onto the GPU."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@_jit
def softplus(x):
    """log(1 + exp(x)), to the last digits where that is small, too: what is lost in 1 + exp(x) is divided out again
    (Higham, Accuracy and Stability of Numerical Algorithms, problem 1.5)."""
    grown = tl.exp(x)
    whole = 1.0 + grown
    small = tl.where(whole == 1.0, grown, grown * tl.log(whole) / tl.where(whole == 1.0, 1.0, whole - 1.0))
    return tl.where(x > 20.0, x, small)


# Rows of the weight a program takes, columns of it at once, warps: measured on an H200, benchmarks/generation_gpu.md.
_MATVEC = (2, 2048, 4)


@_jit
def _matvec(
    x, weight, bias, y, rows,
    COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Some rows of the weight. While a block of them is added up, the next one is on its way."""
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    place = weight + n[:, None].to(tl.int64) * COLUMNS + k[None, :]
    inside = n[:, None] < rows
    if EVEN:
        block = tl.load(place)
    else:
        block = tl.load(place, mask=inside & (k[None, :] < COLUMNS), other=0.0)
    follow(OVERLAP)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, COLUMNS, BLOCK_K):
        value = tl.load(x + start + k, mask=start + k < COLUMNS, other=0.0).to(tl.float32)
        following = start + BLOCK_K + k[None, :]
        if EVEN:
            coming = tl.load(place + start + BLOCK_K, mask=following < COLUMNS, other=0.0)
        else:
            coming = tl.load(place + start + BLOCK_K, mask=inside & (following < COLUMNS), other=0.0)
        total += block.to(tl.float32) * value[None, :]
        block = coming
    out = tl.sum(total, axis=1)
    if HAS_BIAS:
        out += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu":
        out = out * 0.5 * (1.0 + tl.erf(out * 0.7071067811865476))
    if ACTIVATION == "squared_relu":
        out = tl.where(out > 0, out * out, 0.0)
    tl.store(y + n, out.to(y.dtype.element_ty), mask=n < rows)


def matvec(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "") -> Tensor:
    """weight (N, K) times x, K elements in a row (or more dimensions of size 1 before it), plus bias (N); then the
    activation (gelu, squared_relu, or none). Sums are in float32. Returns (..., N) of x's type.

    On Hopper the weight is read before the kernel launched before this one has ended: that must not be what writes it.
    """
    rows, columns = weight.shape
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], rows, device=x.device, dtype=x.dtype)
    block_n, block_k, warps = _MATVEC
    block_k = min(block_k, int(triton.next_power_of_2(columns)))
    _matvec[(triton.cdiv(rows, block_n),)](
        x, weight, weight if bias is None else bias, y, rows,
        COLUMNS=columns, HAS_BIAS=bias is not None, ACTIVATION=activation,
        EVEN=rows % block_n == 0 and columns % block_k == 0, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=warps, **launched(x),
    )  # fmt: skip
    return y


@_jit
def _conv_step(
    x, state, taps, bias, y, channels, x_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """A block of channels of one sequence."""
    follow(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    past = state + row * channels * WIDTH + channel
    own = taps + channel
    new = tl.load(x + row * x_row + channel, mask=inside, other=0.0)
    total = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    for tap in tl.static_range(WIDTH - 1):  # pyright: ignore[reportGeneralTypeIssues]
        value = tl.load(past + (tap + 1) * channels, mask=inside, other=0.0)
        tl.store(past + tap * channels, value, mask=inside)
        total += value.to(tl.float32) * tl.load(own + tap * channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(past + (WIDTH - 1) * channels, new, mask=inside)
    total += new.to(tl.float32) * tl.load(own + (WIDTH - 1) * channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * channels + channel, (total * tl.sigmoid(total)).to(y.dtype.element_ty), mask=inside)


def conv_step(x: Tensor, state: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """As `ops.conv_step`: x (B, C), state (B, W, C), taps (W, C), bias (C)."""
    batch, channels = x.shape
    y = torch.empty(batch, channels, device=x.device, dtype=x.dtype)
    block = 256
    grid = (batch, triton.cdiv(channels, block))
    _conv_step[grid](
        x, state, taps, bias, y, channels, x.stride(0), WIDTH=taps.shape[0], BLOCK=block, **launched(x)
    )  # fmt: skip
    return y


@_jit
def _ssm_step(
    state, x, dt, dt_bias, A, B, C, D, y,
    heads, groups, x_row, dt_row, B_row, C_row,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some of the P rows of the state of one head of one sequence."""
    follow(OVERLAP)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    group = head // (heads // groups)
    own = tl.load(dt + row * dt_row + head).to(tl.float32) + tl.load(dt_bias + head)
    step = softplus(own)
    decay = tl.exp(step * tl.load(A + head))
    inside_p, inside_n = p < P, n < N
    inside = inside_p[:, None] & inside_n[None, :]
    value = tl.load(x + row * x_row + head * P + p, mask=inside_p, other=0.0).to(tl.float32)
    key = tl.load(B + row * B_row + group * N + n, mask=inside_n, other=0.0).to(tl.float32)
    read = tl.load(C + row * C_row + group * N + n, mask=inside_n, other=0.0).to(tl.float32)
    place = state + ((row * heads + head) * P + p[:, None]) * N + n[None, :]
    new = tl.load(place, mask=inside, other=0.0).to(tl.float32) * decay + (value * step)[:, None] * key[None, :]
    tl.store(place, new.to(state.dtype.element_ty), mask=inside)
    out = tl.sum(new * read[None, :], axis=1) + value * tl.load(D + head)
    tl.store(y + (row * heads + head) * P + p, out.to(y.dtype.element_ty), mask=inside_p)


def ssm_step(
    state: Tensor, x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """As `ops.ssm_step`: state (B, H, P, N) contiguous; x (B, H, P), dt (B, H), B and C (B, G, N), any row stride."""
    batch, heads, width, size = state.shape
    y = torch.empty(batch, heads, width, device=x.device, dtype=x.dtype)
    # A few thousand elements a program: enough programs for one sequence, wide enough accesses for many.
    block_n = triton.next_power_of_2(size)
    block_p = max(1, min(triton.next_power_of_2(width), 4096 // block_n))
    grid = (batch, heads, triton.cdiv(width, block_p))
    _ssm_step[grid](
        state, x, dt, dt_bias, A, B, C, D, y,
        heads, B.shape[1], x.stride(0), dt.stride(0), B.stride(0), C.stride(0),
        P=width, N=size, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=4, **launched(x),
    )  # fmt: skip
    return y


@_jit
def _gated_norm(y, z, weight, out, inner, size, y_row, z_row, eps, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One group of one sequence."""
    follow(OVERLAP)
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offset = tl.arange(0, BLOCK)
    inside = offset < size
    channel = group * size + offset
    gate = tl.load(z + row * z_row + channel, mask=inside, other=0.0).to(tl.float32)
    gated = tl.load(y + row * y_row + channel, mask=inside, other=0.0).to(tl.float32) * gate * tl.sigmoid(gate)
    scale = tl.rsqrt(tl.sum(gated * gated, axis=0) / size + eps)
    scaled = gated * scale * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * inner + channel, scaled.to(out.dtype.element_ty), mask=inside)


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """As `ops.gated_norm`: y and z (B, d), weight (d)."""
    batch, inner = y.shape
    out = torch.empty(batch, inner, device=y.device, dtype=y.dtype)
    size = inner // groups
    block = triton.next_power_of_2(size)
    _gated_norm[(batch, groups)](
        y, z, weight, out, inner, size, y.stride(0), z.stride(0), eps, BLOCK=block, **launched(y)
    )  # fmt: skip
    return out


@_jit
def _add_norm(hidden, mixed, weight, total, out, size, mixed_row, eps, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One row. The sum is rounded to its type before it is normed, as it is in two steps."""
    follow(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    inside = offset < size
    before = tl.load(hidden + row * size + offset, mask=inside, other=0.0).to(tl.float32)
    both = before + tl.load(mixed + row * mixed_row + offset, mask=inside, other=0.0).to(tl.float32)
    rounded = both.to(total.dtype.element_ty)
    tl.store(total + row * size + offset, rounded, mask=inside)
    both = rounded.to(tl.float32)
    scaled = both * tl.rsqrt(tl.sum(both * both, axis=0) / size + eps)
    scaled *= tl.load(weight + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + offset, scaled.to(out.dtype.element_ty), mask=inside)


def add_norm(hidden: Tensor, mixed: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `ops.add_norm`, for an RMSNorm: hidden (..., h) contiguous; mixed likewise, or (B, h) with any row stride."""
    size = hidden.shape[-1]
    batch = hidden.numel() // size
    mixed = mixed if mixed.ndim == 2 else mixed.contiguous().view(batch, size)
    total, out = torch.empty_like(hidden), torch.empty_like(hidden)
    block = triton.next_power_of_2(size)
    warps = max(4, min(16, block // 512))
    _add_norm[(batch,)](
        hidden, mixed, weight, total, out, size, mixed.stride(0), eps,
        BLOCK=block, num_warps=warps, **launched(hidden),
    )  # fmt: skip
    return total, out


@_jit
def _keep(
    new_key, new_value, key, value, positions, row_stride, head_stride, new_row, new_head,
    E: tl.constexpr, BLOCK_E: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One key-value head of one sequence."""
    follow(OVERLAP)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    e = tl.arange(0, BLOCK_E)
    source = row * new_row + head * new_head + e
    target = row * row_stride + head * head_stride + tl.load(positions + row) * E + e
    tl.store(key + target, tl.load(new_key + source, mask=e < E), mask=e < E)
    tl.store(value + target, tl.load(new_value + source, mask=e < E), mask=e < E)


def keep(new_key: Tensor, new_value: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> None:
    """As `ops.keep`: the new ones lie alike, key and value are contiguous."""
    batch, heads, width = new_key.shape
    if new_key.stride() != new_value.stride() or new_key.stride(2) != 1:  # one of them was turned
        new_key, new_value = new_key.contiguous(), new_value.contiguous()
    _keep[(batch, heads)](
        new_key, new_value, key, value, positions, key.stride(0), key.stride(1), new_key.stride(0), new_key.stride(1),
        E=width, BLOCK_E=triton.next_power_of_2(width), **launched(key),
    )  # fmt: skip


@_jit
def _taken(
    state, rows, starts, out, size, rows_stride, starts_stride, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """A block of one sequence's state; one that has seen nothing is not read."""
    follow(OVERLAP)
    sequence = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, seen = offset < size, tl.load(starts + sequence * starts_stride) > 0
    row = tl.load(rows + sequence * rows_stride)
    values = tl.load(state + row * size + offset, mask=inside & seen, other=0.0)
    tl.store(out + sequence * size + offset, values, mask=inside)


@_jit
def _put(values, state, rows, size, values_row, rows_stride, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """A block of one sequence's state."""
    follow(OVERLAP)
    sequence = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + sequence * rows_stride)
    new = tl.load(values + sequence * values_row + offset, mask=offset < size)
    tl.store(state + row * size + offset, new.to(state.dtype.element_ty), mask=offset < size)


_STATE_BLOCK = 4096  # elements, 8 to 16 KiB


def taken(state: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    """As `ops.taken`: state (S, ...) contiguous, rows and starts (B) of any stride."""
    out = torch.empty(len(rows), *state.shape[1:], device=state.device, dtype=state.dtype)
    size = out[0].numel()
    _taken[(len(rows), triton.cdiv(size, _STATE_BLOCK))](
        state, rows, starts, out, size, rows.stride(0), starts.stride(0), BLOCK=_STATE_BLOCK, **launched(state)
    )  # fmt: skip
    return out


def put(values: Tensor, state: Tensor, rows: Tensor) -> None:
    """As `ops.put`: state (S, ...) contiguous, rows (B) of any stride."""
    values = values.contiguous()
    size = values[0].numel()
    _put[(len(rows), triton.cdiv(size, _STATE_BLOCK))](
        values, state, rows, size, values.stride(0), rows.stride(0), BLOCK=_STATE_BLOCK, **launched(state)
    )  # fmt: skip


@_jit
def _attend_block(asked, key, value, t, e, end, until, scale, largest, total, result, E: tl.constexpr):
    """Some more keys and values, at positions t before `end`, into an online softmax of queries that see those up to
    `until`."""
    block, mask = t[:, None] * E + e[None, :], (t < end)[:, None] & (e[None, :] < E)
    keys = tl.load(key + block, mask=mask, other=0.0)
    scores = tl.dot(asked, tl.trans(keys), input_precision="ieee") * scale
    seen = t[None, :] <= until[:, None]
    scores = tl.where(seen, scores, -1.0e30)
    larger = tl.maximum(largest, tl.max(scores, axis=1))
    shares, kept = tl.where(seen, tl.exp(scores - larger[:, None]), 0.0), tl.exp(largest - larger)
    values = tl.load(value + block, mask=mask, other=0.0)
    result = result * kept[:, None] + tl.dot(shares.to(values.dtype), values, input_precision="ieee")
    return larger, total * kept + tl.sum(shares, axis=1), result


@_jit
def _attend(
    query, key, value, lengths, out, largest_out, total_out, scale, groups, positions, q_row, row_stride,
    PER_GROUP: tl.constexpr, E: tl.constexpr, SPLITS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The queries that share one key-value head, of one sequence, over one of SPLITS parts of its keys (online
    softmax): what they add up to, not divided yet, and by what it is to be divided and scaled."""
    follow(OVERLAP)
    row, group, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    q, e, t = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_T)
    inside = (q[:, None] < PER_GROUP) & (e[None, :] < E)
    asked = tl.load(query + row * q_row + (group * PER_GROUP + q[:, None]) * E + e[None, :], mask=inside, other=0.0)
    largest = tl.full([BLOCK_Q], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    result = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    base = row * row_stride + group.to(tl.int64) * positions * E
    part = (length + SPLITS * BLOCK_T - 1) // (SPLITS * BLOCK_T) * BLOCK_T
    begin = split * part
    end = tl.minimum(begin + part, length)
    until = tl.full([BLOCK_Q], -1, tl.int32) + end
    if OVERLAP:
        for start in range(begin, end, BLOCK_T):  # which the compiler overlaps with the loads
            largest, total, result = _attend_block(
                asked, key + base, value + base, start + t, e, end, until, scale, largest, total, result, E
            )
    else:
        start = begin
        while start < end:  # Triton's interpreter knows no ranges that are read from memory
            largest, total, result = _attend_block(
                asked, key + base, value + base, start + t, e, end, until, scale, largest, total, result, E
            )
            start += BLOCK_T
    head = (row * groups + group) * PER_GROUP + q
    tl.store(out + (head[:, None] * SPLITS + split) * E + e[None, :], result, mask=inside)
    tl.store(largest_out + head * SPLITS + split, largest, mask=q < PER_GROUP)
    tl.store(total_out + head * SPLITS + split, total, mask=q < PER_GROUP)


@_jit
def _combine(
    parts, largest, total, out, E: tl.constexpr, SPLITS: tl.constexpr, BLOCK_E: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """The parts of one head. One without keys has a total of 0, and the smallest maximum."""
    follow(OVERLAP)
    head = tl.program_id(0).to(tl.int64)
    split, e = tl.arange(0, SPLITS), tl.arange(0, BLOCK_E)
    own = tl.load(largest + head * SPLITS + split)
    share = tl.exp(own - tl.max(own, axis=0))
    inside = (e < E)[None, :] & (split >= 0)[:, None]
    values = tl.load(parts + (head * SPLITS + split[:, None]) * E + e[None, :], mask=inside, other=0.0)
    result = tl.sum(values * share[:, None], axis=0) / tl.sum(tl.load(total + head * SPLITS + split) * share, axis=0)
    tl.store(out + head * E + e, result.to(out.dtype.element_ty), mask=e < E)


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
    """As `ops.attend`: query (B, Q, E), key and value (B, K, T, E) contiguous, lengths (B), each at least 1."""
    batch, heads, width = query.shape
    groups, positions = key.shape[1:3]
    query = query.contiguous()
    out = torch.empty_like(query)
    per_group = heads // groups
    # Products of matrices want sixteen rows and columns at least; most rows of queries are empty, which costs nothing.
    block_q = max(16, triton.next_power_of_2(per_group))
    block_e = max(16, triton.next_power_of_2(width))
    block_t = max(16, min(64, 16384 // (block_e * query.element_size())))
    # Few sequences would leave most of a GPU idle for as long as one of them takes: then several programs share one.
    splits = next(n for n in (16, 8, 4, 2, 1) if n * batch * groups <= _PROGRAMS or n == 1)
    parts = torch.empty(batch, heads, splits, width, device=query.device, dtype=torch.float32)
    largest, total = torch.empty(2, batch, heads, splits, device=query.device, dtype=torch.float32)
    _attend[(batch, groups, splits)](
        query, key, value, lengths, parts, largest, total, width**-0.5, groups, positions,
        query.stride(0), key.stride(0),
        PER_GROUP=per_group, E=width, SPLITS=splits, BLOCK_Q=block_q, BLOCK_T=block_t, BLOCK_E=block_e,
        **launched(query),
    )  # fmt: skip
    _combine[(batch * heads,)](
        parts, largest, total, out, E=width, SPLITS=splits, BLOCK_E=block_e, **launched(query)
    )  # fmt: skip
    return out


@_jit
def _attend_piece(
    query, key, value, rows, starts, out, scale, heads, groups, length, positions, q_row, q_position, row_stride,
    E: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q positions of one head of one sequence (online softmax)."""
    follow(OVERLAP)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.program_id(2) * BLOCK_Q
    start = tl.load(starts + row).to(tl.int32)
    q, e, t = first + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_T)
    inside = (q[:, None] < length) & (e[None, :] < E)
    asked = tl.load(query + row * q_row + q[:, None] * q_position + head * E + e[None, :], mask=inside, other=0.0)
    largest = tl.full([BLOCK_Q], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    result = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    base = tl.load(rows + row) * row_stride + (head // (heads // groups)).to(tl.int64) * positions * E
    end = tl.minimum(start + tl.minimum(first + BLOCK_Q, length), positions)
    if OVERLAP:
        for begin in range(0, end, BLOCK_T):
            largest, total, result = _attend_block(
                asked, key + base, value + base, begin + t, e, end, start + q, scale, largest, total, result, E
            )
    else:
        begin = 0
        while begin < end:
            largest, total, result = _attend_block(
                asked, key + base, value + base, begin + t, e, end, start + q, scale, largest, total, result, E
            )
            begin += BLOCK_T
    place = ((row * length + q[:, None]) * heads + head) * E + e[None, :]
    tl.store(out + place, (result / total[:, None]).to(out.dtype.element_ty), mask=inside)


def attend_piece(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    """As `ops.attend_piece`: query (B, L, Q, E), key and value (S, K, T, E) contiguous, rows and starts (B)."""
    batch, length, heads, width = query.shape
    groups, positions = key.shape[1:3]
    query, rows, starts = query.contiguous(), rows.contiguous(), starts.contiguous()
    out = torch.empty_like(query)
    block_e = max(16, int(triton.next_power_of_2(width)))
    block_t = max(16, min(64, 16384 // (block_e * query.element_size())))
    block_q = max(16, min(block_t, int(triton.next_power_of_2(length))))
    _attend_piece[(batch, heads, triton.cdiv(length, block_q))](
        query, key, value, rows, starts, out, width**-0.5, heads, groups, length, positions,
        query.stride(0), query.stride(1), key.stride(0),
        E=width, BLOCK_Q=block_q, BLOCK_T=block_t, BLOCK_E=block_e, **launched(query),
    )  # fmt: skip
    return out
