"""Latent attention, sparse attention and gated delta nets, as Megatron's modules compute them from torch parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import hybrid.quiet  # noqa: F401
from hybrid.costs.pipeline import stage_pattern
from hybrid.model.build import build_model, transformer_config
from hybrid.training.distributed import start, stop
from tests import toy
from tests.parity import DELTA, LATENT, SPARSE

LENGTH = 70  # more than a chunk (64) of the delta rule


@contextmanager
def made(folder: Path, pattern: str, **model: Any) -> Iterator[Any]:
    """A model in float32, with weights large enough for every part of a layer to show."""
    sizes = {**LATENT, **DELTA, **SPARSE, "layer_pattern": pattern, "activation": "swiglu", "init_std": 0.3, **model}
    settings = toy.settings(folder, model=sizes, data={"sequence_length": LENGTH})
    device = start(settings.parallel, None, seed=5).device
    try:
        split = stage_pattern(settings)
        yield build_model(settings, transformer_config(settings, split), split).to(device)
    finally:
        stop()


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(257, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, torch.arange(LENGTH).expand_as(ids), None)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-5)


def rotated(x: torch.Tensor, base: float = 10000) -> torch.Tensor:
    """Turn pairs of neighbours, and lay the first of all pairs before the second: x (S, B, heads, E)."""
    length, width = x.shape[0], x.shape[-1]
    angles = torch.outer(torch.arange(length), base ** (-torch.arange(0, width, 2) / width))[:, None, None]
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)


def test_latent_attention_is_what_the_paper_says(tmp_path: Path) -> None:
    """arXiv 2405.04434, section 2.1, in float64."""
    with made(tmp_path, "+") as model:
        layer = model.decoder.layers[0].self_attention
        x = torch.randn(LENGTH, 2, 32, generator=torch.Generator().manual_seed(0))
        actual, _ = layer(x, None)
        weights = {name: value.double() for name, value in layer.state_dict().items() if value is not None}
    heads, head, rope, value = 4, LATENT["mla_head_dim"], LATENT["mla_rope_head_dim"], LATENT["mla_value_head_dim"]
    x = x.double()
    query = rms_norm(x @ weights["linear_q_down_proj.weight"].T, weights["q_layernorm.weight"])
    query = (query @ weights["linear_q_up_proj.weight"].T).unflatten(-1, (heads, head + rope))
    low, turned = (x @ weights["linear_kv_down_proj.weight"].T).split([LATENT["mla_kv_rank"], rope], dim=-1)
    both = rms_norm(low, weights["kv_layernorm.weight"]) @ weights["linear_kv_up_proj.weight"].T
    key, values = both.unflatten(-1, (heads, head + value)).split([head, value], dim=-1)
    query = torch.cat([query[..., :head], rotated(query[..., head:])], dim=-1)
    key = torch.cat([key, rotated(turned.unsqueeze(2)).expand(-1, -1, heads, -1)], dim=-1)
    scores = torch.einsum("sbhe,tbhe->bhst", query, key) / (head + rope) ** 0.5
    scores = scores.masked_fill(~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), -torch.inf)
    mixed = torch.einsum("bhst,tbhe->sbhe", scores.softmax(-1), values).flatten(2)
    expected = mixed @ weights["linear_proj.weight"].T
    # float32 against float64; the largest values are a few tens.
    torch.testing.assert_close(actual.double(), expected, atol=5e-5, rtol=1e-4)


def test_sparse_attention_that_may_choose_all_positions_is_latent_attention(tmp_path: Path) -> None:
    with made(tmp_path, "+-+") as model:
        weights, expected = model.state_dict(), logits(model, tokens())
    with made(tmp_path, "D-D", dsa_top_k=LENGTH) as model:
        unknown = model.load_state_dict(weights, strict=False)
        assert not unknown.unexpected_keys and all("indexer" in name for name in unknown.missing_keys)
        # The same sums in another order: keys and values stay in the low rank, queries come down to it.
        torch.testing.assert_close(logits(model, tokens()), expected, atol=1e-3, rtol=1e-3)
    with made(tmp_path, "D-D", dsa_top_k=4) as model:
        model.load_state_dict(weights, strict=False)
        apart = (logits(model, tokens()) - expected).abs().amax(dim=(0, 2))
    assert (apart[:4] < 1e-3).all() and (apart[10:] > 0.1).all()


def test_a_gated_delta_net_is_the_recurrence(tmp_path: Path) -> None:
    """S <- a S + b k (v - a S k)^T, o = S^T q (arXiv 2412.06464), a position at a time in float64."""
    with made(tmp_path, "G") as model:
        layer = model.decoder.layers[0].self_attention
        x = torch.randn(LENGTH, 2, 32, generator=torch.Generator().manual_seed(0))
        actual, _ = layer(x, None)
        weights = {name: value.double() for name, value in layer.state_dict().items() if value is not None}
    keys, values, wide, narrow = 4, 8, DELTA["gdn_key_head_dim"], DELTA["gdn_value_head_dim"]
    parts = [2 * keys * wide + values * narrow, values * narrow, values, values]
    projected = x.double().transpose(0, 1) @ weights["in_proj.weight"].T
    qkv, gate, beta, alpha = projected.split(parts, dim=-1)
    convolution = weights["conv1d.weight"]
    padded = F.pad(qkv.transpose(1, 2), (convolution.shape[-1] - 1, 0))
    qkv = F.silu(F.conv1d(padded, convolution, groups=len(convolution))).transpose(1, 2)
    query, key, value = qkv.split([keys * wide, keys * wide, values * narrow], dim=-1)
    query, key = (
        (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(values // keys, dim=2)
        for t in (part.unflatten(-1, (keys, wide)) for part in (query, key))
    )
    value = value.unflatten(-1, (values, narrow))
    decay = torch.exp(-weights["A_log"].exp() * F.softplus(alpha + weights["dt_bias"]))
    strength = beta.sigmoid()
    state, outputs = torch.zeros(2, values, wide, narrow, dtype=torch.float64), []
    for t in range(LENGTH):
        state = state * decay[:, t, :, None, None]
        error = value[:, t] - torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], error * strength[:, t, :, None])
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]) / wide**0.5)
    normed = rms_norm(torch.stack(outputs, dim=1), weights["out_norm.weight"]) * F.silu(
        gate.unflatten(-1, (values, narrow))
    )
    expected = (normed.flatten(2) @ weights["out_proj.weight"].T).transpose(0, 1)
    torch.testing.assert_close(actual.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pattern", ["+", "D", "G", "GD+/G"])
def test_no_position_sees_a_later_one(pattern: str, tmp_path: Path) -> None:
    with made(tmp_path, pattern) as model:
        model.eval()
        ids = tokens()
        before = logits(model, ids)
        ids[:, 40:] = tokens(seed=2)[:, 40:]
        after = logits(model, ids)
    torch.testing.assert_close(after[:, :40], before[:, :40], atol=1e-5, rtol=1e-5)
    assert (after[:, 40:] - before[:, 40:]).abs().amax() > 0.1
