"""The weights of a model as generation wants them: plain tensors by layer, on one device, in one number format.

Names are those of a live megatron-core `HybridModel` on transformer-engine's modules (`converters.convert.rank_state`
gives them, of any checkpoint). Building the model from them needs neither megatron-core nor a process group; under
tensor parallelism every rank has its own part of the tensors, cut as megatron-core cuts them.

Shapes, all of this rank: h hidden, V vocabulary (padded), d inner width of a Mamba layer, H SSM heads, P head width, G
groups, N state, W width of the convolution, R rank of the time step, Q query and K key-value heads, E head width of
attention, f ffn width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hybrid.config import ModelConfig

Take = Callable[[str], Tensor]


@dataclass(frozen=True)
class Norm:
    """An RMSNorm, or a LayerNorm if there is a bias: weight and bias (h)."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., h)."""
        if self.bias is None:
            return (
                rms_norm(x, self.eps) * self.weight
                if _plain(x)
                else F.rms_norm(x, self.weight.shape, self.weight, self.eps)
            )
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def _plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and not x.is_cuda


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x (..., h) in float32 over the root mean square of its last dimension: a third of F.rms_norm's time on CPU."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.addcmul(_scalar(eps), length, length, value=1 / x.shape[-1]).rsqrt_()


@cache
def _scalar(value: float) -> Tensor:
    return torch.tensor(value)


@dataclass(frozen=True)
class Linear:
    """weight (out, in), bias (out) or None."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        if self.has_kernel_for(x):
            from hybrid.generation import kernels

            return kernels.matvec(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def has_kernel_for(self, x: Tensor) -> bool:
        """Whether x is one position on CUDA, for which there is a faster kernel than the library's."""
        return x.is_cuda and x.numel() == x.shape[-1]


@dataclass(frozen=True)
class Mamba2:
    """conv (d+2GN, W), its transpose taps, conv_bias (d+2GN); dt_bias, A (negative) and D (H) in float32; gate_norm
    (d)."""

    norm: Norm
    in_proj: Linear
    conv: Tensor
    taps: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    gate_norm: Tensor
    out_proj: Linear
    head_dim: int
    groups: int
    state_dim: int
    chunk_size: int

    @property
    def heads(self) -> int:
        """SSM heads."""
        return self.A.shape[0]

    @property
    def inner(self) -> int:
        """Inner width d."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Mamba1:
    """conv (d, W), its transpose taps, conv_bias (d); A (d, N), negative, dt_bias and D (d) in float32."""

    norm: Norm
    in_proj: Linear
    conv: Tensor
    taps: Tensor
    conv_bias: Tensor
    x_proj: Linear
    dt_proj: Linear
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    out_proj: Linear

    @property
    def state_dim(self) -> int:
        """State size N."""
        return self.A.shape[1]


@dataclass(frozen=True)
class Attention:
    """qkv: per key-value head its queries, key, value."""

    norm: Norm
    qkv: Linear
    out: Linear
    out_bias: Tensor | None
    heads: int
    groups: int
    head_dim: int

    @property
    def value_dim(self) -> int:
        """Width of a value head."""
        return self.head_dim


@dataclass(frozen=True)
class Latent:
    """Latent attention: queries, and keys and values, by way of low ranks with norms of their own.

    query_up: per head its width without rotation, then the rotated one; kv_down: the low rank, then the rotated key
    that all heads share; kv_up: per head its key without rotation, then its value.
    """

    norm: Norm
    query_down: Linear
    query_norm: Norm
    query_up: Linear
    kv_down: Linear
    kv_norm: Norm
    kv_up: Linear
    out: Linear
    out_bias: Tensor | None
    heads: int
    plain_dim: int
    rotated_dim: int
    value_dim: int

    @property
    def groups(self) -> int:
        """Key-value heads: as many as query heads."""
        return self.heads

    @property
    def head_dim(self) -> int:
        """Width of a query and key head."""
        return self.plain_dim + self.rotated_dim


@dataclass(frozen=True)
class Mlp:
    """Up, activation, down. down_bias is added after the sum over ranks; an expert's, a rank's share of it, before."""

    norm: Norm | None
    up: Linear
    down: Linear
    down_bias: Tensor | None
    activation: str


@dataclass(frozen=True)
class Experts:
    """router (experts, h) and its bias in float32; the experts; the one that every token goes to."""

    norm: Norm
    router: Tensor
    router_bias: Tensor | None
    experts: list[Mlp]
    shared: Mlp | None
    top_k: int
    score: str
    scale: float


Layer = Mamba2 | Mamba1 | Attention | Latent | Mlp | Experts


@dataclass(frozen=True)
class Weights:
    """A whole model, or a tensor-parallel rank's part of it.

    embedding (V, h) of this rank; positions (positions, h) if they are learned; rotary: frequencies (rotated width / 2)
    in float32; output (V, h) of this rank. `vocab_size` is that of the tokens that may come out.
    """

    embedding: Tensor
    positions: Tensor | None
    rotary: Tensor | None
    layers: list[Layer]
    final_norm: Norm
    output: Linear
    vocab_size: int
    group: "dist.ProcessGroup | None" = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of activations."""
        return self.embedding.dtype


def build(
    model: ModelConfig,
    tensors: Mapping[str, Tensor] | Take,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    group: "dist.ProcessGroup | None" = None,
) -> Weights:
    """Put a model together from tensors by name, or from a function that gives a tensor for a name.

    Depths of multi-token prediction are left out. `group` are the tensor-parallel ranks, None where there is one.
    """
    given: Take = tensors if callable(tensors) else tensors.__getitem__
    ranks = group.size() if group is not None else 1

    def take(name: str, dtype: torch.dtype = dtype) -> Tensor:
        return given(name).to(device=device, dtype=dtype)

    def frequencies(width: int) -> Tensor:
        return model.rotary_base ** -(torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)

    embedding = take("embedding.word_embeddings.weight")
    rotary = None
    if model.position_embedding == "rope":
        width = int(model.head_dim * model.rotary_percent)
        rotary = frequencies(width)
    if model.pattern.counts()["+"]:  # which never stands beside other attention, and always rotates
        rotary = frequencies(model.mla_rope_head_dim)
    return Weights(
        embedding=embedding,
        positions=take("embedding.position_embeddings.weight") if model.position_embedding == "learned" else None,
        rotary=rotary,
        layers=[
            _layer(model, kind, f"decoder.layers.{i}.", take, ranks) for i, kind in enumerate(model.pattern.layers)
        ],
        final_norm=_norm(model, "decoder.final_norm.", take),
        output=Linear(embedding if model.tie_embeddings else take("output_layer.weight")),
        vocab_size=model.vocab_size,
        group=group if ranks > 1 else None,
    )


def _norm(model: ModelConfig, prefix: str, take: Any) -> Norm:
    bias = take(f"{prefix}bias") if model.normalization == "LayerNorm" else None
    return Norm(take(f"{prefix}weight"), bias, model.norm_epsilon)


def _layer(model: ModelConfig, kind: str, prefix: str, take: Any, ranks: int) -> Layer:
    if kind == "M":
        make = _mamba2 if model.mamba_version == 2 else _mamba1
        return make(model, f"{prefix}mixer.", take, ranks)
    if kind == "*":
        return _attention(model, f"{prefix}self_attention.", take, ranks)
    if kind == "+":
        return _latent(model, prefix, take, ranks)
    if kind == "-":
        return _mlp(model, f"{prefix}mlp.", take, norm=_norm(model, f"{prefix}mlp.linear_fc1.layer_norm_", take))
    assert kind == "E", f"generation knows no layer {kind!r}"
    return _experts(model, prefix, take, ranks)


def _mamba2(model: ModelConfig, prefix: str, take: Any, ranks: int) -> Mamba2:
    return Mamba2(
        norm=_norm(model, f"{prefix}in_proj.layer_norm_", take),
        in_proj=Linear(take(f"{prefix}in_proj.weight")),
        conv=(conv := take(f"{prefix}conv1d_weight").squeeze(1).contiguous()),
        taps=conv.t().contiguous(),
        conv_bias=take(f"{prefix}conv1d_bias"),
        dt_bias=take(f"{prefix}dt_bias", torch.float32),
        A=-torch.exp(take(f"{prefix}A_log", torch.float32)),
        D=take(f"{prefix}D", torch.float32),
        gate_norm=take(f"{prefix}norm.weight"),
        out_proj=Linear(take(f"{prefix}out_proj.weight")),
        head_dim=model.mamba_head_dim,
        groups=model.mamba_num_groups // ranks,
        state_dim=model.mamba_state_dim,
        chunk_size=model.mamba_chunk_size,
    )


def _mamba1(model: ModelConfig, prefix: str, take: Any, ranks: int) -> Mamba1:
    return Mamba1(
        norm=_norm(model, f"{prefix}in_proj.layer_norm_", take),
        in_proj=Linear(take(f"{prefix}in_proj.weight")),
        conv=(conv := take(f"{prefix}conv1d.weight").squeeze(1).contiguous()),
        taps=conv.t().contiguous(),
        conv_bias=take(f"{prefix}conv1d.bias"),
        x_proj=Linear(take(f"{prefix}x_proj.weight")),
        dt_proj=Linear(take(f"{prefix}dt_proj.weight")),
        dt_bias=take(f"{prefix}dt_proj.bias", torch.float32),
        A=-torch.exp(take(f"{prefix}A_log", torch.float32)),
        D=take(f"{prefix}D", torch.float32),
        out_proj=Linear(take(f"{prefix}out_proj.weight")),
    )


def _attention(model: ModelConfig, prefix: str, take: Any, ranks: int) -> Attention:
    bias = model.add_linear_bias
    return Attention(
        norm=_norm(model, f"{prefix}linear_qkv.layer_norm_", take),
        qkv=Linear(take(f"{prefix}linear_qkv.weight"), take(f"{prefix}linear_qkv.bias") if bias else None),
        out=Linear(take(f"{prefix}linear_proj.weight")),
        out_bias=take(f"{prefix}linear_proj.bias") if bias else None,
        heads=model.num_attention_heads // ranks,
        groups=model.query_groups // ranks,
        head_dim=model.head_dim,
    )


def _latent(model: ModelConfig, prefix: str, take: Any, ranks: int) -> Latent:
    own = f"{prefix}self_attention."
    return Latent(
        norm=_norm(model, f"{prefix}input_layernorm.", take),
        query_down=Linear(take(f"{own}linear_q_down_proj.weight")),
        query_norm=_norm(model, f"{own}linear_q_up_proj.layer_norm_", take),
        query_up=Linear(take(f"{own}linear_q_up_proj.weight")),
        kv_down=Linear(take(f"{own}linear_kv_down_proj.weight")),
        kv_norm=_norm(model, f"{own}linear_kv_up_proj.layer_norm_", take),
        kv_up=Linear(take(f"{own}linear_kv_up_proj.weight")),
        out=Linear(take(f"{own}linear_proj.weight")),
        out_bias=take(f"{own}linear_proj.bias") if model.add_linear_bias else None,
        heads=model.num_attention_heads // ranks,
        plain_dim=model.mla_head_dim,
        rotated_dim=model.mla_rope_head_dim,
        value_dim=model.mla_value_head_dim,
    )


def _mlp(
    model: ModelConfig,
    prefix: str,
    take: Any,
    *,
    norm: Norm | None = None,
    number: str = "",
    bias: bool = True,
    shares: int = 1,
) -> Mlp:
    bias = bias and model.add_linear_bias
    up = Linear(take(f"{prefix}linear_fc1.weight{number}"), take(f"{prefix}linear_fc1.bias{number}") if bias else None)
    return Mlp(
        norm=norm,
        up=up,
        down=Linear(take(f"{prefix}linear_fc2.weight{number}")),
        down_bias=take(f"{prefix}linear_fc2.bias{number}") / shares if bias else None,
        activation=model.activation,
    )


def _experts(model: ModelConfig, prefix: str, take: Any, ranks: int) -> Experts:
    shared, count = model.moe_shared_expert_size, model.num_experts or 0
    return Experts(
        norm=_norm(model, f"{prefix}pre_mlp_layernorm.", take),
        router=take(f"{prefix}mlp.router.weight", torch.float32),
        router_bias=take(f"{prefix}mlp.router.expert_bias", torch.float32) if model.moe_expert_bias else None,
        experts=[_mlp(model, f"{prefix}mlp.experts.", take, number=str(i), shares=ranks) for i in range(count)],
        shared=_mlp(model, f"{prefix}mlp.shared_experts.", take, bias=False) if shared else None,
        top_k=model.moe_top_k,
        score=model.moe_router_score,
        scale=model.moe_routed_scale,
    )
