"""Floating-point operations of a token, a multiplication and an addition counted apart.

The convention is megatron-core's (`num_floating_point_operations` in `megatron/training/training.py`): matrix products
and scans, nothing element by element; attention counts the half of the score matrix that the causal mask leaves;
recomputation does not count. Model FLOPs utilisation (MFU) is meant in these. Two things differ: the inner width of a
Mamba-2 layer is heads x head width (upstream: always 2 x hidden size), and routers and MTP projections count.
"""

from dataclasses import dataclass

from hybrid.config import ModelConfig, Settings

# Operations of the Mamba-2 scan for each of its d x N states and token; megatron-core's estimate.
MAMBA2_SCAN = 7
# Mamba-1: decay exp(dt A), dt B x, state update (2), C state (2), and the sums; 9 in the count that mamba-ssm's users
# have settled on (VMamba, arXiv 2401.10166, code of its analysis).
MAMBA1_SCAN = 9
# Gated delta rule, for each number of a value head's state: k k^T, v k^T, their sum into the state, the state times the
# query; megatron-core's count. Of the convolution, which its count has, nothing, as for the other layers.
DELTA_RULE = 8


@dataclass(frozen=True)
class Flops:
    """Operations of the forward pass per token, by part: a layer kind's symbol (MTP layers included) or a name."""

    parts: dict[str, float]

    @property
    def forward(self) -> float:
        """Operations of the forward pass."""
        return sum(self.parts.values())

    @property
    def backward(self) -> float:
        """Operations of the backward pass: each product has two gradients of the same size."""
        return 2 * self.forward

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


def per_token(settings: Settings) -> Flops:
    """Operations per token of a training sample of `data.sequence_length` tokens."""
    model, length = settings.model, settings.data.sequence_length
    pattern = model.pattern
    counts = pattern.counts()
    parts = {symbol: count * layer(model, symbol, length) for symbol, count in counts.items() if count}
    if counts["E"]:
        assert model.num_experts is not None
        parts["router"] = counts["E"] * 2.0 * model.hidden_size * model.num_experts
    if pattern.mtp_depths:
        parts["MTP projection"] = pattern.mtp_depths * 4.0 * model.hidden_size**2
    parts["output"] = (1 + pattern.mtp_depths) * 2.0 * model.hidden_size * model.padded_vocab_size
    return Flops(parts)


def layer(model: ModelConfig, symbol: str, length: int) -> float:
    """Operations of the forward pass of one layer per token, in a sequence of `length` tokens."""
    return projections(model, symbol) + core(model, symbol, length)


def projections(model: ModelConfig, symbol: str) -> float:
    """The matrix products with weights."""
    return 2.0 * sum(rows * columns * uses for rows, columns, uses in products(model, symbol))


def products(model: ModelConfig, symbol: str) -> list[tuple[int, int, int]]:
    """(inputs, outputs, how often) of a layer's matrix products with weights that a token takes part in."""
    h, d = model.hidden_size, model.mamba_inner_size
    gated = 2 if model.activation == "swiglu" else 1
    match symbol:
        case "M" if model.mamba_version == 2:
            bc = 2 * model.mamba_num_groups * model.mamba_state_dim
            return [(h, 2 * d + bc + model.mamba_heads, 1), (d, h, 1)]
        case "M":
            low_rank = model.dt_rank + 2 * model.mamba_state_dim
            return [(h, 2 * d, 1), (d, low_rank, 1), (model.dt_rank, d, 1), (d, h, 1)]
        case "*":
            query = model.num_attention_heads * model.head_dim
            return [(h, query + 2 * model.query_groups * model.head_dim, 1), (query, h, 1)]
        case "-":
            return [(h, gated * model.ffn_size, 1), (model.ffn_size, h, 1)]
        case "+" | "D":
            heads, value = model.num_attention_heads, model.mla_value_head_dim
            query, both = model.mla_query_head_dim, model.mla_head_dim + value
            down = model.mla_query_rank + model.mla_kv_rank + model.mla_rope_head_dim
            own = [
                (model.mla_query_rank, heads * query, 1),
                (heads * value, h, 1),
                (model.mla_kv_rank, heads * both, 1),
                (h, down, 1),
            ]
            index = model.dsa_index_heads * model.dsa_index_head_dim
            indexer = [(model.mla_query_rank, index, 1), (h, model.dsa_index_head_dim + model.dsa_index_heads, 1)]
            return own + (indexer if symbol == "D" else [])
        case "G":
            return [(h, model.gdn_projected, 1), (model.gdn_value_size, h, 1)]
        case "E":
            f, shared = model.moe_ffn_size, model.moe_shared_expert_size
            routed = [(h, gated * f, model.moe_top_k), (f, h, model.moe_top_k)]
            return routed + ([(h, gated * shared, 1), (shared, h, 1)] if shared else [])
        case _:
            raise AssertionError(f"no layer is written {symbol!r}")


def core(model: ModelConfig, symbol: str, length: int) -> float:
    """What a layer does without weights: the scan, or scores and values of causal attention.

    Sparse attention scores all earlier positions with the indexer, and those that it chooses with every head, in the
    low rank that keys and values share.
    """
    if symbol == "M":
        return float(MAMBA2_SCAN if model.mamba_version == 2 else MAMBA1_SCAN) * (
            model.mamba_inner_size * model.mamba_state_dim
        )
    if symbol == "*":
        return 2.0 * length * model.num_attention_heads * model.head_dim
    if symbol == "+":
        return float(length) * model.num_attention_heads * (model.mla_query_head_dim + model.mla_value_head_dim)
    if symbol == "D":
        chosen = min(model.dsa_top_k, length)
        seen = chosen - chosen**2 / (2 * length)  # on average: the first positions have fewer before them
        latent = 2 * model.mla_kv_rank + model.mla_rope_head_dim
        return model.dsa_index_heads * model.dsa_index_head_dim * length + 2.0 * seen * (
            model.num_attention_heads * latent
        )
    if symbol == "G":
        return float(DELTA_RULE) * model.gdn_value_size * model.gdn_key_head_dim
    assert symbol in "-E", f"no layer is written {symbol!r}"
    return 0.0
