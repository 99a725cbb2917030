"""A hybrid model one piece of text at a time: each layer's own weights, with the state it carries from piece to piece.

A Mamba layer carries the last inputs of its convolution and its SSM state, an attention layer the keys and values so
far, an MLP layer nothing. Pieces of any length give the same as the whole at once: a prompt is one long piece, each new
token a piece of one.

Shapes: B batch, L length of the piece, T positions so far and in the piece, h hidden, d inner width, G groups, N state,
H SSM heads, P head width, Q query and K key-value heads, E head width of attention, W width of the convolution.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import apply_rotary_pos_emb
from torch import Tensor

from hybrid.model.conv import causal_conv1d, causal_conv1d_step
from hybrid.model.mamba1 import Mamba1Mixer
from hybrid.model.selective_scan import selective_scan, selective_scan_step
from hybrid.model.ssd import ssd_scan, ssd_step


@dataclass
class MambaState:
    """Mamba-2: conv (B, d+2GN, W), ssm (B, H, P, N). Mamba-1: conv (B, d, W), ssm (B, d, N)."""

    conv: Tensor
    ssm: Tensor


@dataclass
class AttentionState:
    """key and value (B, K, T, E)."""

    key: Tensor
    value: Tensor


@dataclass
class ModelState:
    """The states of the layers by index, and the positions they have seen."""

    layers: dict[int, MambaState | AttentionState] = field(default_factory=dict)
    length: int = 0


@torch.inference_mode()
def advance(model: Any, tokens: Tensor, state: ModelState) -> Tensor:
    """Read tokens (B, L) that follow what `state` has seen; returns the last position's logits (B, vocabulary, padded).

    `model` is a whole HybridModel in evaluation mode, on one pipeline stage. The state is changed in place.
    """
    length = tokens.shape[1]
    positions = torch.arange(state.length, state.length + length, device=tokens.device).expand_as(tokens)
    hidden = model.embedding(input_ids=tokens, position_ids=positions)
    rotary = None
    if model.position_embedding_type == "rope":
        rotary = model.rotary_pos_emb(state.length + length)[state.length :]
    stack = model.decoder
    for index, (kind, layer) in enumerate(zip(stack.layer_type_list, stack.layers, strict=True)):
        if kind == "M":
            mamba = _mamba1 if isinstance(layer.mixer, Mamba1Mixer) else _mamba2
            hidden = hidden + mamba(layer, hidden, state.layers, index)
        elif kind == "*":
            hidden = hidden + _attention(layer, hidden, state.layers, index, rotary)
        else:
            hidden = layer(hidden, attention_mask=None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    state.length += length
    hidden = stack.final_norm(hidden[-1:])
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    logits, _ = model.output_layer(hidden, weight=weight, runtime_gather_output=True)
    return logits[0].float()


def _mamba2(layer: Any, hidden: Tensor, states: dict[int, Any], index: int) -> Tensor:
    """hidden (L, B, h) -> (L, B, h)."""
    mixer = layer.mixer
    inner, groups, heads = mixer.d_inner_local_tp, mixer.ngroups_local_tp, mixer.nheads_local_tp
    channels = inner + 2 * groups * mixer.d_state
    projected, _ = mixer.in_proj(layer.norm(hidden))
    z, xBC, dt = projected.transpose(0, 1).split([inner, channels, heads], dim=-1)
    weight, bias = mixer.conv1d_weight.squeeze(1), mixer.conv1d_bias
    A, D = -torch.exp(mixer.A_log.float()), mixer.D.float()
    dt = F.softplus(dt.float() + mixer.dt_bias.float())
    state = states.get(index)
    if xBC.shape[1] == 1 and state is not None:
        xBC, conv = causal_conv1d_step(xBC[:, 0], state.conv, weight, bias)
    else:
        xBC, conv = causal_conv1d(
            xBC, weight, bias, initial_state=state.conv if state else None, return_final_state=True
        )
    x, B, C = xBC.split([inner, groups * mixer.d_state, groups * mixer.d_state], dim=-1)
    x = x.unflatten(-1, (heads, mixer.headdim))
    B, C = B.unflatten(-1, (groups, mixer.d_state)), C.unflatten(-1, (groups, mixer.d_state))
    if xBC.dim() == 2:
        assert state is not None
        y, ssm = ssd_step(state.ssm, x, dt[:, 0], A, B, C, D)
        y = y.unsqueeze(1)
    else:
        y, ssm = ssd_scan(
            x,
            dt,
            A,
            B,
            C,
            D,
            chunk_size=mixer.chunk_size,
            initial_state=state.ssm if state else None,
            return_final_state=True,
        )
    states[index] = MambaState(conv, ssm)
    gated = (y.flatten(2) * F.silu(z)).transpose(0, 1)
    return mixer.out_proj(mixer.norm(gated))[0]


def _mamba1(layer: Any, hidden: Tensor, states: dict[int, Any], index: int) -> Tensor:
    """hidden (L, B, h) -> (L, B, h)."""
    mixer: Mamba1Mixer = layer.mixer
    own = mixer.weights()
    projected, _ = mixer.in_proj(layer.norm(hidden))
    x, z = projected.transpose(0, 1).chunk(2, dim=-1)
    state = states.get(index)
    step = x.shape[1] == 1 and state is not None
    if step:
        assert state is not None
        x, conv = causal_conv1d_step(x[:, 0], state.conv, own.conv, own.conv_bias)
        z = z[:, 0]
    else:
        before = state.conv if state else None
        x, conv = causal_conv1d(x, own.conv, own.conv_bias, initial_state=before, return_final_state=True)
    low, B, C = mixer.split_low(F.linear(x, own.x), -1)
    inputs = (x, F.linear(low, own.dt), own.A, B, C, own.D, z, own.dt_bias)
    if step:
        assert state is not None
        y, ssm = selective_scan_step(state.ssm, *inputs, delta_softplus=True)
        y = y.unsqueeze(1)
    else:
        before = state.ssm if state else None
        y, ssm = selective_scan(*inputs, delta_softplus=True, initial_state=before, return_final_state=True)
    states[index] = MambaState(conv, ssm)
    return mixer.out_proj(y.transpose(0, 1))[0]


def _attention(layer: Any, hidden: Tensor, states: dict[int, Any], index: int, rotary: Tensor | None) -> Tensor:
    """hidden (L, B, h) -> (L, B, h)."""
    attention = layer.self_attention
    query, key, value = attention.get_query_key_value_tensors(layer.input_layernorm(hidden), None)[:3]
    if rotary is not None:
        query = apply_rotary_pos_emb(query, rotary, config=attention.config)
        key = apply_rotary_pos_emb(key, rotary, config=attention.config)
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    past = states.get(index)
    if past is not None:
        key, value = torch.cat([past.key, key], dim=2), torch.cat([past.value, value], dim=2)
    states[index] = AttentionState(key, value)
    length, total = query.shape[2], key.shape[2]
    mask = None
    if past is not None and length > 1:
        # Query i of the piece is position total - length + i of the whole.
        mask = torch.ones(length, total, dtype=torch.bool, device=query.device).tril(total - length)
    context = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=past is None and length > 1,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    output, bias = attention.linear_proj(context.permute(2, 0, 1, 3).flatten(2))
    return output if bias is None else output + bias
