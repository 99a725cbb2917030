"""Parameters of a model and of each rank that holds a part of it, equal to those of the megatron-core modules.

Letters: h hidden size, t tensor parallel size. Per Mamba-2 layer: d inner width, G groups, N state, H heads, K width of
the convolution. Per Mamba-1 layer also R, the rank of the time step. What every tensor-parallel rank has whole is not
divided by t: norms, routers, the projections to the low ranks of latent attention.
"""

from collections import Counter
from dataclasses import dataclass, field

from hybrid.config import ModelConfig, Settings
from hybrid.pattern import Pattern


@dataclass(frozen=True)
class Parameters:
    """Parameters by part; of a whole model, or of what one rank holds.

    `layers` counts the main layers by symbol, their norms included. `mtp` is the MTP depths: their layers, norms and
    projections. `output` is 0 where the output layer uses the embedding's weights.
    """

    embedding: int = 0
    layers: dict[str, int] = field(default_factory=dict)
    mtp: int = 0
    final_norm: int = 0
    output: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.non_embedding + self.output

    @property
    def non_embedding(self) -> int:
        """Without the embedding and the output layer."""
        return sum(self.layers.values()) + self.mtp + self.final_norm


def whole(settings: Settings) -> Parameters:
    """Parameters of the model, whatever the layout."""
    return _part(settings, settings.model.pattern.layers, first=True, last=True, tensor=1, expert=1)


def active(settings: Settings) -> int:
    """Parameters that a token passes through: all but the experts it is not sent to."""
    model = settings.model
    idle = (model.num_experts or 0) - model.moe_top_k
    moe_layers = model.pattern.counts()["E"]
    return whole(settings).total - (moe_layers * idle * one_expert(model) if moe_layers else 0)


def rank(settings: Settings, pattern: Pattern, stage: int) -> Parameters:
    """Parameters that each rank of pipeline stage `stage` holds; `pattern` has its pipeline segments.

    Ranks of one stage hold equally many. Where the output layer (tied) or the MTP depths are on another stage than the
    embedding, they bring a copy of it.
    """
    parallel = settings.parallel
    count = len(pattern.segments)
    chunks = range(stage, count, parallel.pipeline)
    parts = [
        _part(
            settings,
            pattern.segments[chunk],
            first=chunk == 0,
            last=chunk == count - 1,
            tensor=parallel.tensor,
            expert=parallel.expert,
        )
        for chunk in chunks
    ]
    layers: Counter[str] = Counter()
    for part in parts:
        layers.update(part.layers)
    return Parameters(
        embedding=sum(part.embedding for part in parts),
        layers=dict(layers),
        mtp=sum(part.mtp for part in parts),
        final_norm=sum(part.final_norm for part in parts),
        output=sum(part.output for part in parts),
    )


def experts_of_rank(settings: Settings, pattern: Pattern, stage: int) -> int:
    """How many of `rank`'s parameters are routed experts: their gradients are reduced over fewer ranks."""
    model, parallel = settings.model, settings.parallel
    chunks = range(stage, len(pattern.segments), parallel.pipeline)
    layers = sum(pattern.segments[chunk].count("E") for chunk in chunks)
    if chunks[-1] == len(pattern.segments) - 1:
        layers += pattern.mtp.count("E") * pattern.mtp_depths
    if not layers:
        return 0
    return layers * (model.num_experts or 0) // parallel.expert * one_expert(model, parallel.tensor)


def layer(model: ModelConfig, symbol: str, tensor: int = 1, expert: int = 1) -> int:
    """Parameters of one layer on one rank, the norm of its input included."""
    match symbol:
        case "M":
            mixer = _mamba2(model, tensor) if model.mamba_version == 2 else _mamba1(model, tensor)
        case "*":
            mixer = _attention(model, tensor)
        case "-":
            mixer = _mlp(model, model.ffn_size, tensor)
        case "E":
            mixer = _experts(model, tensor, expert)
        case "+":
            mixer = _latent(model, tensor)
        case "D":
            mixer = _latent(model, tensor) + _indexer(model)
        case "G":
            mixer = _delta(model, tensor)
        case _:
            raise AssertionError(f"no layer is written {symbol!r}")
    return _norm(model) + mixer


def one_expert(model: ModelConfig, tensor: int = 1) -> int:
    """Parameters of one routed expert."""
    return _mlp(model, model.moe_ffn_size, tensor)


def _part(settings: Settings, layers: str, *, first: bool, last: bool, tensor: int, expert: int) -> Parameters:
    """Parameters of one model chunk: some layers, with the embedding before and the output layer behind them."""
    model = settings.model
    pattern = model.pattern
    words = model.padded_vocab_size // tensor * model.hidden_size
    positions = settings.data.sequence_length * model.hidden_size if model.position_embedding == "learned" else 0
    mtp_layers = sum(layer(model, symbol, tensor, expert) for symbol in pattern.mtp)
    # Each depth norms the embedding and the hidden states, joins them (2h to h), and norms what its layers give.
    mtp_depth = mtp_layers + 3 * _norm(model) + 2 * model.hidden_size * model.hidden_size // tensor
    has_embedding = first or (last and pattern.mtp_depths > 0)
    return Parameters(
        embedding=words + positions if has_embedding else 0,
        layers={symbol: layers.count(symbol) * layer(model, symbol, tensor, expert) for symbol in sorted(set(layers))},
        mtp=pattern.mtp_depths * mtp_depth if last and pattern.mtp_depths else 0,
        final_norm=_norm(model) if last else 0,
        output=words if last and not (model.tie_embeddings and first) else 0,
    )


def _norm(model: ModelConfig, width: int | None = None) -> int:
    return (width or model.hidden_size) * (2 if model.normalization == "LayerNorm" else 1)


def _mamba2(model: ModelConfig, t: int) -> int:
    h, d, heads = model.hidden_size, model.mamba_inner_size, model.mamba_heads
    bc = 2 * model.mamba_num_groups * model.mamba_state_dim
    in_proj = h * (2 * d + bc + heads) // t
    convolution = (d + bc) // t * (model.mamba_conv_kernel + 1)
    return in_proj + convolution + 3 * heads // t + d // t + d // t * h


def _mamba1(model: ModelConfig, t: int) -> int:
    h, d, rank_, state = model.hidden_size, model.mamba_inner_size // t, model.dt_rank, model.mamba_state_dim
    in_proj, out_proj = h * 2 * d, d * h
    convolution = d * (model.mamba_conv_kernel + 1)
    x_proj, dt_proj = d * (rank_ + 2 * state), d * (rank_ + 1)
    return in_proj + convolution + x_proj + dt_proj + d * state + d + out_proj


def _attention(model: ModelConfig, t: int) -> int:
    h, query = model.hidden_size, model.num_attention_heads * model.head_dim
    qkv = (query + 2 * model.query_groups * model.head_dim) // t
    biases = qkv + h if model.add_linear_bias else 0
    return h * qkv + query // t * h + biases


def _latent(model: ModelConfig, t: int) -> int:
    h, heads, value = model.hidden_size, model.num_attention_heads, model.mla_value_head_dim
    query_rank, kv_rank = model.mla_query_rank, model.mla_kv_rank
    down = h * (query_rank + kv_rank + model.mla_rope_head_dim)
    up = (query_rank * model.mla_query_head_dim + kv_rank * (model.mla_head_dim + value)) * heads // t
    bias = h if model.add_linear_bias else 0
    return down + _norm(model, query_rank) + _norm(model, kv_rank) + up + heads * value // t * h + bias


def _indexer(model: ModelConfig) -> int:
    h, heads, width = model.hidden_size, model.dsa_index_heads, model.dsa_index_head_dim
    layer_norm = 2 * width  # whatever the model's own norm is
    return model.mla_query_rank * heads * width + h * width + layer_norm + h * heads


def _delta(model: ModelConfig, t: int) -> int:
    h, value = model.hidden_size, model.gdn_value_size
    convolution = (2 * model.gdn_key_size + value) // t * model.gdn_conv_kernel
    gates = 2 * model.gdn_num_value_heads // t
    return h * model.gdn_projected // t + convolution + gates + _norm(model, model.gdn_value_head_dim) + value // t * h


def _mlp(model: ModelConfig, width: int, t: int) -> int:
    h = model.hidden_size
    inner = width // t
    fan_in = 2 * inner if model.activation == "swiglu" else inner
    biases = fan_in + h if model.add_linear_bias else 0
    return h * fan_in + inner * h + biases


def _experts(model: ModelConfig, t: int, expert: int) -> int:
    assert model.num_experts is not None
    router = model.num_experts * (model.hidden_size + (1 if model.add_linear_bias else 0))
    shared = _mlp(model, model.moe_shared_expert_size, t) if model.moe_shared_expert_size else 0
    return router + model.num_experts // expert * one_expert(model, t) + shared
