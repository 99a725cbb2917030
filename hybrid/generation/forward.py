"""A model's forward pass for generation: a piece of a prompt at once, or one position of many sequences.

Both work on the rows of `Slots`. Pieces of any length give the same as the whole at once, within rounding: a prompt is
one or more pieces, each new token a position of its sequence.

Shapes: B sequences, L positions of a piece, V vocabulary (padded), h hidden, d inner width, H SSM heads, P head width,
G groups, N state, Q query and K key-value heads, E head width of attention.
"""

from types import EllipsisType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hybrid.config import GATED_NORM_EPSILON
from hybrid.generation import ops, prefill_kernels
from hybrid.generation.state import AttentionState, MambaState, Slots, to_device
from hybrid.generation.weights import (
    Attention,
    Experts,
    Latent,
    Layer,
    Linear,
    Mamba1,
    Mamba2,
    Mlp,
    Norm,
    Weights,
)


@torch.inference_mode()
def prefill(weights: Weights, slots: Slots, rows: list[int], tokens: Tensor) -> Tensor:
    """Read tokens (B, L) that follow what the `rows`, B of them, have seen: as many positions in each.

    Returns the hidden states after the last norm (B, L, h), from which `logits` makes logits.
    """
    start, length = slots.lengths[rows[0]], tokens.shape[1]
    assert all(slots.lengths[row] == start for row in rows)
    positions = torch.arange(start, start + length, device=tokens.device)
    hidden = _embed(weights, tokens, positions)
    rotary = _rotary(weights, positions)
    batch = slice(rows[0], rows[0] + 1) if len(rows) == 1 else to_device(rows, torch.int64, tokens.device)
    chosen, starts = to_device([rows, [start] * len(rows)], torch.int64, tokens.device).unbind()
    for layer, state in zip(weights.layers, slots.layers, strict=True):
        normed = layer_norm(layer)(hidden)
        match layer, state:
            case Mamba2(), MambaState():
                mixed = _mamba2(layer, normed, state, chosen, starts if start else None)
            case Mamba1(), MambaState():
                mixed = _mamba1(weights, layer, normed, state, batch, start)
            case Attention() | Latent(), AttentionState():
                mixed = _attention(layer, normed, state, batch, start, rotary)
            case _:
                mixed = _mlp_or_experts(layer, normed.flatten(0, 1)).view_as(hidden)
        hidden = hidden + _summed(weights, layer, mixed)
    slots.advance(rows, length)
    return weights.final_norm(hidden)


def pads(weights: Weights) -> bool:
    """Whether `prefill_padded` knows all layers."""
    return all(isinstance(layer, Mamba2 | Attention | Mlp) for layer in weights.layers)


@torch.inference_mode()
def prefill_padded(
    weights: Weights, slots: Slots, rows: Tensor, starts: Tensor, lengths: Tensor, tokens: Tensor
) -> Tensor:
    """As `prefill`, of sequences that have seen different numbers of positions and read different numbers of them.

    tokens (B, L), of which the first `lengths` (B) count, at least one, go into `rows` (B) that have seen `starts` (B).
    The padding after them changes nothing: a state stays as it is where the time step is 0. All of it is on the device,
    and nothing depends on it but values, so that this can be a graph. Lengths of the slots are left to the caller.
    Returns logits (B, V) of the last position that counts; from the last layer that mixes positions on, only it is
    computed.
    """
    offsets = torch.arange(tokens.shape[1], device=tokens.device)
    positions = (starts.unsqueeze(1) + offsets).clamp(max=slots.max_length - 1)
    kept = torch.minimum(offsets, lengths.unsqueeze(1) - 1)
    hidden = _embed(weights, tokens, positions)
    rotary = _rotary(weights, positions)
    ends = (torch.arange(len(rows), device=rows.device), lengths - 1)
    last_mixer = max((i for i, layer in enumerate(weights.layers) if isinstance(layer, Mamba2 | Attention)), default=-1)
    if last_mixer < 0:
        hidden = hidden[ends]
    norms = [*map(layer_norm, weights.layers), weights.final_norm]
    normed = norms[0](hidden)
    for i, (layer, state, norm) in enumerate(zip(weights.layers, slots.layers, norms[1:], strict=True)):
        only = ends if i == last_mixer else ...
        match layer, state:
            case Mamba2(), MambaState():
                mixed = _mamba2(layer, normed, state, rows, starts, lengths, only)
            case Attention(), AttentionState():
                query, key, value = _heads(layer, normed, rotary)
                # What is past the end becomes the last position once more.
                source = kept[..., None, None].expand(-1, -1, *key.shape[2:])
                target = (starts.unsqueeze(1) + kept).clamp(max=slots.max_length - 1)
                state.key[rows.unsqueeze(1), :, target] = key.gather(1, source)
                state.value[rows.unsqueeze(1), :, target] = value.gather(1, source)
                mixed = layer.out(ops.attend_piece(query, state.key, state.value, rows, starts).flatten(2)[only])
            case _:
                mixed = _mlp_or_experts(layer, normed.flatten(0, -2)).view_as(normed)
        hidden, normed = ops.add_norm(hidden[only], _summed(weights, layer, mixed), norm)
    return logits(weights, normed)


@torch.inference_mode()
def decode(weights: Weights, slots: Slots, count: int, tokens: Tensor) -> Tensor:
    """Read one token of each of the first rows: tokens (B), of which the first `count` are sequences.

    The other rows compute nothing that anybody uses: B is such that the rows do not depend on one another
    (`hybrid.generation.runner`), or that of a graph. Host lengths are left to the caller, who may replay a graph.
    Returns logits (B, V).
    """
    seen = slots.device_lengths[: tokens.shape[0]]
    positions = seen.clamp(max=slots.max_length - 1)
    lengths = [length + 1 for length in slots.lengths[:count]]
    hidden = _embed(weights, tokens, positions)
    rotary = _rotary(weights, positions)
    norms = [*map(layer_norm, weights.layers), weights.final_norm]
    normed = norms[0](hidden)
    for layer, state, norm in zip(weights.layers, slots.layers, norms[1:], strict=True):
        match layer, state:
            case Mamba2(), MambaState():
                mixed = _mamba2_step(layer, normed, state, count)
            case Mamba1(), MambaState():
                mixed = _mamba1_step(weights, layer, normed, state)
            case Attention() | Latent(), AttentionState():
                mixed = _attention_step(layer, normed, state, positions, lengths, rotary)
            case _:
                mixed = _mlp_or_experts(layer, normed)
        hidden, normed = ops.add_norm(hidden, _summed(weights, layer, mixed), norm)
    seen += 1
    return logits(weights, normed)


def layer_norm(layer: Layer) -> Norm:
    """What the input of a layer goes through."""
    assert layer.norm is not None  # an expert has none, and is no layer
    return layer.norm


def logits(weights: Weights, hidden: Tensor) -> Tensor:
    """hidden (..., h) to logits (..., V) of its type, of all ranks."""
    own = weights.output(hidden)
    if weights.group is None:
        return own
    parts = [torch.empty_like(own) for _ in range(weights.group.size())]
    dist.all_gather(parts, own, group=weights.group)
    return torch.cat(parts, dim=-1)


def _embed(weights: Weights, tokens: Tensor, positions: Tensor) -> Tensor:
    """tokens (..., L or B) to (..., h)."""
    if weights.group is None:
        hidden = F.embedding(tokens, weights.embedding)
    else:
        rows = weights.embedding.shape[0]
        own = tokens - weights.group.rank() * rows
        here = (own >= 0) & (own < rows)
        hidden = F.embedding(own.clamp(0, rows - 1), weights.embedding) * here.unsqueeze(-1)
        dist.all_reduce(hidden, group=weights.group)
    if weights.positions is not None:
        hidden = hidden + F.embedding(positions, weights.positions)
    return hidden


def _summed(weights: Weights, layer: Layer, mixed: Tensor) -> Tensor:
    """The ranks' shares together, with the bias that all have."""
    if weights.group is not None:
        mixed = mixed.contiguous()
        dist.all_reduce(mixed, group=weights.group)
    bias = (
        layer.out_bias if isinstance(layer, Attention | Latent) else layer.down_bias if isinstance(layer, Mlp) else None
    )
    return mixed if bias is None else mixed + bias


def _rotary(weights: Weights, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    """Cosine and sine (positions..., 1, rotated width): both halves of it turn by the same angles."""
    if weights.rotary is None:
        return None
    angles = positions.float().unsqueeze(-1) * weights.rotary
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(-2)
    return angles.cos().to(weights.dtype), angles.sin().to(weights.dtype)


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Turn the first part of each head: x (..., positions, heads, E)."""
    if rotary is None:
        return x
    cos, sin = rotary
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


def _mamba2(
    layer: Mamba2,
    normed: Tensor,
    state: MambaState,
    rows: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None = None,
    only: tuple[Tensor, Tensor] | EllipsisType = ...,
) -> Tensor:
    """normed (B, L, h) to (B, L, h), and the state's `rows` (B), which have seen `starts` (B), to what they are then.

    Of each row the first `lengths` (B) positions count. `starts` of None are all 0, `lengths` of None all L. `only` is
    an index of (B, L) that says which positions are given out.
    """
    inner, channels, heads = layer.inner, layer.conv.shape[0], layer.heads
    if only is ...:
        z, xBC, dt = layer.in_proj(normed).split([inner, channels, heads], dim=-1)
    else:
        z = Linear(layer.in_proj.weight[:inner])(normed[only])
        xBC, dt = Linear(layer.in_proj.weight[inner:])(normed).split([channels, heads], dim=-1)
    before = None if starts is None else ops.taken(state.conv, rows, starts)
    xBC, after = prefill_kernels.conv(xBC, layer.conv, layer.conv_bias, before, lengths)
    ops.put(after, state.conv, rows)
    x, B, C = xBC.split([inner, layer.groups * layer.state_dim, layer.groups * layer.state_dim], dim=-1)
    B, C = (tensor.unflatten(-1, (layer.groups, layer.state_dim)) for tensor in (B, C))
    x = x.unflatten(-1, (heads, layer.head_dim))
    y = ops.scan(state.ssm, rows, starts, lengths, x, dt, layer.dt_bias, layer.A, B, C, layer.D, layer.chunk_size)
    y = y.flatten(2)[only]
    # Normed as rows of their own, as one position is.
    gated = ops.gated_norm(
        y.reshape(-1, inner), z.reshape(-1, inner), layer.gate_norm, layer.groups, GATED_NORM_EPSILON
    )
    return layer.out_proj(gated).view(*y.shape[:-1], -1)


def _mamba2_step(layer: Mamba2, normed: Tensor, state: MambaState, count: int) -> Tensor:
    """normed (B, h) to (B, h), of which `count` rows are looked at: between the two products no others are computed."""
    inner, channels, heads = layer.inner, layer.conv.shape[0], layer.heads
    projected = layer.in_proj(normed)[:count]
    z, xBC, dt = projected.split_with_sizes((inner, channels, heads), -1)
    xBC = ops.conv_step(xBC, state.conv[:count], layer.taps, layer.conv_bias)
    x, BC = xBC.split_with_sizes((inner, channels - inner), -1)
    x = x.view(count, heads, layer.head_dim)
    B, C = BC.view(count, 2, layer.groups, layer.state_dim).unbind(1)
    y = ops.ssm_step(state.ssm[:count], x, dt, layer.dt_bias, layer.A, B, C, layer.D)
    gated = ops.gated_norm(y.flatten(1), z, layer.gate_norm, layer.groups, GATED_NORM_EPSILON)
    beside = normed.shape[0] - count
    return layer.out_proj(F.pad(gated, (0, 0, 0, beside)) if beside else gated)


def _mamba1(
    weights: Weights, layer: Mamba1, normed: Tensor, state: MambaState, rows: slice | Tensor, start: int
) -> Tensor:
    """normed (B, L, h) to (B, L, h)."""
    x, z = layer.in_proj(normed).chunk(2, dim=-1)
    before = (state.conv[rows], state.ssm[rows]) if start else (None, None)
    x, conv = prefill_kernels.conv(x, layer.conv, layer.conv_bias, before[0])
    low, B, C = _low(weights, layer, x)
    y, last = prefill_kernels.selective(x, layer.dt_proj(low), layer.dt_bias, layer.A, B, C, layer.D, z, before[1])
    state.keep(rows, conv, last)
    return layer.out_proj(y)


def _mamba1_step(weights: Weights, layer: Mamba1, normed: Tensor, state: MambaState) -> Tensor:
    """normed (B, h) to (B, h)."""
    batch = len(normed)
    x, z = layer.in_proj(normed).chunk(2, dim=-1)
    x = ops.conv_step(x, state.conv[:batch], layer.taps, layer.conv_bias)
    low, B, C = _low(weights, layer, x)
    dt = ops.softplus(layer.dt_proj(low).float() + layer.dt_bias)
    y = ops.scan_step(state.ssm[:batch], x, dt, layer.A, B, C, layer.D)
    return layer.out_proj((y * ops.silu(z.float())).to(normed.dtype))


def _low(weights: Weights, layer: Mamba1, x: Tensor) -> tuple[Tensor, ...]:
    """The time step's low rank, B and C: of all channels, so summed over the ranks."""
    low = layer.x_proj(x)
    if weights.group is not None:
        dist.all_reduce(low, group=weights.group)
    rank = low.shape[-1] - 2 * layer.state_dim
    return low.split([rank, layer.state_dim, layer.state_dim], dim=-1)


def _heads(
    layer: Attention | Latent, normed: Tensor, rotary: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """normed (..., h) to query (..., Q, E), key and value (..., K, E)."""
    if isinstance(layer, Latent):
        return _latent_heads(layer, normed, rotary)
    per_group = layer.heads // layer.groups
    grouped = layer.qkv(normed).unflatten(-1, (layer.groups, per_group + 2, layer.head_dim))
    query, key, value = grouped.split([per_group, 1, 1], dim=-2)
    query, key, value = query.flatten(-3, -2), key.squeeze(-2), value.squeeze(-2)
    return _rotate(query, rotary), _rotate(key, rotary), value


def _latent_heads(layer: Latent, normed: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """normed (..., h) to query and key (..., Q, E) and value (..., Q, its width); neighbours turn together."""
    query = layer.query_up(layer.query_norm(layer.query_down(normed))).unflatten(-1, (layer.heads, layer.head_dim))
    low, shared = layer.kv_down(normed).split([layer.kv_up.weight.shape[1], layer.rotated_dim], dim=-1)
    both = layer.kv_up(layer.kv_norm(low)).unflatten(-1, (layer.heads, layer.plain_dim + layer.value_dim))
    key, value = both.split([layer.plain_dim, layer.value_dim], dim=-1)
    plain, turned = query.split([layer.plain_dim, layer.rotated_dim], dim=-1)
    turned, shared = (
        _rotate(torch.cat([x[..., ::2], x[..., 1::2]], dim=-1), rotary) for x in (turned, shared.unsqueeze(-2))
    )
    shared = shared.expand(*shared.shape[:-2], layer.heads, -1)
    return torch.cat([plain, turned], dim=-1), torch.cat([key, shared], dim=-1), value


def _attention(
    layer: Attention | Latent,
    normed: Tensor,
    state: AttentionState,
    rows: slice | Tensor,
    start: int,
    rotary: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """normed (B, L, h) to (B, L, h)."""
    query, key, value = (tensor.transpose(1, 2) for tensor in _heads(layer, normed, rotary))
    length, end = query.shape[2], start + query.shape[2]
    state.key[rows, :, start:end] = key
    state.value[rows, :, start:end] = value
    if start:
        key, value = state.key[rows, :, :end], state.value[rows, :, :end]
    # Query i of the piece is position start + i of the whole.
    mask = torch.ones(length, end, dtype=torch.bool, device=query.device).tril(start) if start else None
    context = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=layer.heads != layer.groups
    )
    return layer.out(context.transpose(1, 2).flatten(2))


def _attention_step(
    layer: Attention | Latent,
    normed: Tensor,
    state: AttentionState,
    positions: Tensor,
    lengths: list[int],
    rotary: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """normed (B, h) to (B, h); positions (B) are those of the tokens."""
    batch = len(normed)
    query, key, value = _heads(layer, normed, rotary)
    ops.keep(key, value, state.key[:batch], state.value[:batch], positions)
    context = ops.attend(query, state.key[:batch], state.value[:batch], lengths, positions + 1)
    return layer.out(context.flatten(1))


def _mlp_or_experts(layer: Layer, normed: Tensor) -> Tensor:
    """normed (tokens, h) to (tokens, h)."""
    if isinstance(layer, Mlp):
        return _mlp(layer, normed)
    assert isinstance(layer, Experts)
    routed = _experts(layer, normed)
    return routed if layer.shared is None else routed + _mlp(layer.shared, normed)


def _mlp(layer: Mlp, x: Tensor) -> Tensor:
    if layer.activation == "swiglu":
        gate, up = layer.up(x).chunk(2, dim=-1)
        return layer.down(ops.silu(gate) * up)
    return layer.down(ops.activated(layer.up, x, layer.activation))


def _experts(layer: Experts, x: Tensor) -> Tensor:
    """Each token through the experts of its choice: x (tokens, h) to (tokens, h)."""
    scores = F.linear(x.float(), layer.router)
    if layer.score == "softmax":
        chosen, experts = scores.topk(layer.top_k, dim=-1)
        shares = chosen.softmax(-1)
    else:
        scores = 1 / (1 + torch.exp(-scores))  # torch's sigmoid, as its softplus, minds where an element is
        biased = scores if layer.router_bias is None else scores + layer.router_bias
        experts = biased.topk(layer.top_k, dim=-1).indices
        shares = scores.gather(-1, experts)
        if layer.top_k > 1:
            shares = shares / (shares.sum(-1, keepdim=True) + 1e-20)
    shares = shares * layer.scale
    result = torch.zeros_like(x, dtype=torch.float32)
    for index in experts.unique().tolist():
        tokens, choice = (experts == index).nonzero(as_tuple=True)
        # As many rows as make a row's sums independent of their number, see `hybrid.generation.runner`.
        given = F.pad(x[tokens], (0, 0, 0, -len(tokens) % 4))
        expert = layer.experts[index]
        output = _mlp(expert, given)[: len(tokens)]
        if expert.down_bias is not None:
            output = output + expert.down_bias
        result.index_add_(0, tokens, output.float() * shares[tokens, choice].unsqueeze(-1))
    return result.to(x.dtype)
