"""The one naming of weights that every format is read into and written from.

A canonical name is the one megatron-core gives the tensor in a distributed checkpoint, with the layer's index in the
whole model. The logical tensor is the uncut one; where megatron-core stores named parts of it apart, or cuts it over
tensor-parallel ranks part by part, the parts are listed here.

Shapes: h hidden, V padded vocabulary, d inner width of a Mamba layer, H SSM heads, G groups, N state, K convolution
kernel, R rank of the time step, Q query heads, J key-value heads, e head width, f ffn width, E experts. Of latent
attention: rq and rk the low ranks, n, p and v the widths of a head without rotation, of its rotated part, of a value.

| name, after `decoder.layers.I.` where it has no dot-free stem | shape | cut over tensor-parallel ranks |
|---|---|---|
| `embedding.word_embeddings.weight`, `output_layer.weight` | (V, h) | rows |
| `embedding.position_embeddings.weight` | (positions, h) | no |
| `decoder.final_norm.weight` | (h) | no |
| M (Mamba-2) `mixer.in_proj.weight` | (2d+2GN+H, h) | rows of each of z d, x d, B GN, C GN, dt H |
| M (Mamba-2) `mixer.conv1d.weight`, `.bias` | (d+2GN, 1, K), (d+2GN) | rows of each of x d, B GN, C GN |
| M (Mamba-2) `mixer.A_log`, `mixer.D`, `mixer.dt_bias` | (H) | rows |
| M (Mamba-2) `mixer.norm.weight` | (d) | rows |
| M (Mamba-1) `mixer.in_proj.weight` | (2d, h) | rows of each of x d, z d |
| M (Mamba-1) `mixer.conv1d.weight`, `.bias`, `mixer.D` | (d, 1, K), (d), (d) | rows |
| M (Mamba-1) `mixer.x_proj.weight` | (R+2N, d) | columns |
| M (Mamba-1) `mixer.dt_proj.weight`, `.bias`, `mixer.A_log` | (d, R), (d), (d, N) | rows |
| M `mixer.out_proj.weight` | (h, d) | columns |
| * `self_attention.linear_qkv.weight`, `.bias` | ((Q+2J)e, h), per key-value head its queries, key, value | rows |
| * `self_attention.linear_proj.weight`, `.bias` | (h, Qe), (h) | columns, no |
| + `self_attention.linear_q_down_proj.weight`, `linear_kv_down_proj.weight` | (rq, h), (rk+p, h) | no |
| + `self_attention.linear_q_up_proj.weight`, `linear_kv_up_proj.weight` | (Q(n+p), rq), (Q(n+v), rk) | rows |
| + `self_attention.linear_q_up_proj.layer_norm_weight`, `linear_kv_up_proj.layer_norm_weight` | (rq), (rk) | no |
| + `self_attention.linear_proj.weight`, `.bias` | (h, Qv), (h) | columns, no |
| - `mlp.linear_fc1.weight`, `.bias` | (f, h), SwiGLU (2f, h) | rows; SwiGLU rows of each of gate f, up f |
| - `mlp.linear_fc2.weight`, `.bias` | (h, f), (h) | columns, no |
| E `mlp.router.weight`, `mlp.router.expert_bias` | (E, h), (E) | no |
| E `mlp.experts.linear_fc1.weightJ`, `linear_fc2.weightJ` | as an MLP's, one expert | as an MLP's |
| E `mlp.shared_experts.linear_fc1.weight`, `linear_fc2.weight` | as an MLP's | as an MLP's |
| norm of the input: M `mixer.in_proj.layer_norm_weight`, * `self_attention.linear_qkv.layer_norm_weight`, - `mlp.linear_fc1.layer_norm_weight`, E `pre_mlp_layernorm.weight`, + `input_layernorm.weight` | (h) | no |
| `mtp.layers.D.enorm.weight`, `hnorm.weight`, `final_layernorm.weight` | (h) | no |
| `mtp.layers.D.eh_proj.weight` | (h, 2h) | rows |
| `mtp.layers.D.mtp_model_layer.layers.I.` | as above, by layer kind | |

A LayerNorm has a bias beside each weight (`layer_norm_bias`, `.bias`).
"""  # noqa: E501

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from converters.tensors import Shape
from hybrid.config import ModelConfig

EMBEDDING = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
FINAL_NORM = "decoder.final_norm.weight"
OUTPUT = "output_layer.weight"

LAYER = re.compile(r"^(decoder|mtp\.layers\.\d+\.mtp_model_layer)\.layers\.(\d+)\.(.+)$")
EXPERT = re.compile(r"^(mlp\.experts\.linear_fc[12])\.(weight|bias)(\d+)$")

FLOAT32 = re.compile(r"\.(A_log|D|dt_bias|expert_bias)$")
"""Parameters that lose too much in 16 bits: a request for a 16-bit format leaves them in float32 if they are."""

INPUT_NORMS = {
    "M": "mixer.in_proj.layer_norm_weight",
    "*": "self_attention.linear_qkv.layer_norm_weight",
    "-": "mlp.linear_fc1.layer_norm_weight",
    "E": "pre_mlp_layernorm.weight",
    "+": "input_layernorm.weight",
}
"""The norm at the input of a layer, by its kind."""


@dataclass(frozen=True)
class Param:
    """A logical tensor: its shape, and how tensor parallelism cuts it.

    `dim` is the dimension that is cut (None: every rank has all of it). `parts` are (name, length) along dimension 0,
    each cut on its own and joined again per rank; without parts the dimension is cut as a whole. A dimension of length
    -1 may have any length.
    """

    shape: Shape
    dim: int | None = None
    parts: tuple[tuple[str, int], ...] = ()


def parameters(model: ModelConfig) -> dict[str, Param]:
    """Every tensor of a model by canonical name, in the order in which megatron-core's `named_parameters` has them."""
    h = model.hidden_size
    pattern = model.pattern
    rows = model.padded_vocab_size
    result = {EMBEDDING: Param((rows, h), 0)}
    if model.position_embedding == "learned":
        result[POSITIONS] = Param((-1, h))
    for index, kind in enumerate(pattern.layers):
        result |= {f"decoder.layers.{index}.{name}": param for name, param in layer_parameters(kind, model).items()}
    result |= _norm(FINAL_NORM.removesuffix("weight"), model)
    for depth in range(pattern.mtp_depths):
        prefix = f"mtp.layers.{depth}."
        result |= _norm(f"{prefix}enorm.", model) | _norm(f"{prefix}hnorm.", model)
        result[f"{prefix}eh_proj.weight"] = Param((h, 2 * h), 0)
        for index, kind in enumerate(pattern.mtp):
            inner = f"{prefix}mtp_model_layer.layers.{index}."
            result |= {f"{inner}{name}": param for name, param in layer_parameters(kind, model).items()}
        result |= _norm(f"{prefix}final_layernorm.", model)
    if not model.tie_embeddings:
        result[OUTPUT] = Param((rows, h), 0)
    return result


def layer_parameters(kind: str, model: ModelConfig) -> dict[str, Param]:
    """The tensors of one layer by what its names end with; `kind` is its symbol in the pattern."""
    h = model.hidden_size
    norm = _norm(INPUT_NORMS[kind].removesuffix("weight"), model)
    if kind == "M":
        return _mamba2(model, norm) if model.mamba_version == 2 else _mamba1(model, norm)
    if kind == "*":
        width, rows = model.num_attention_heads * model.head_dim, model.query_groups * model.head_dim
        name = "self_attention.linear_proj."
        result = {f"{name}weight": Param((h, width), 1)}
        result |= {f"{name}bias": Param((h,))} if model.add_linear_bias else {}
        name = "self_attention.linear_qkv."
        result |= norm | {f"{name}weight": Param((width + 2 * rows, h), 0)}
        result |= {f"{name}bias": Param((width + 2 * rows,), 0)} if model.add_linear_bias else {}
        return result
    if kind == "-":
        return _mlp("mlp.", model.ffn_size, model, norm)
    if kind == "+":
        return norm | _latent(model)
    assert kind == "E" and model.num_experts, kind
    router = Param((model.num_experts, h))
    result = norm | {"mlp.router.weight": router}
    if model.moe_expert_bias:
        result["mlp.router.expert_bias"] = Param((model.num_experts,))
    for expert in range(model.num_experts):
        result |= _mlp("mlp.experts.", model.moe_ffn_size, model, {}, str(expert))
    if model.moe_shared_expert_size:
        result |= _mlp("mlp.shared_experts.", model.moe_shared_expert_size, model, {})
    # All experts' first projections come before the second ones, as in a grouped matrix product.
    return dict(sorted(result.items(), key=lambda item: _expert_order(item[0])))


def parts(kind: str, name: str, sizes: dict[str, int]) -> tuple[tuple[str, int], ...]:
    """The named parts of dimension 0 of the tensor of a layer of `kind` whose name ends with `name`; () if it has none.

    `sizes` gives d, GN and H (M), or f and gated (the others), of the whole model or of one rank.
    """
    if kind == "M":
        d = sizes["d"]
        if name == "mixer.in_proj.weight" and "H" not in sizes:
            return ("x", d), ("z", d)
        if name == "mixer.in_proj.weight":
            return ("z", d), ("x", d), ("B", sizes["GN"]), ("C", sizes["GN"]), ("dt", sizes["H"])
        if name.startswith("mixer.conv1d.") and "H" in sizes:
            return ("x", d), ("B", sizes["GN"]), ("C", sizes["GN"])
    elif sizes.get("gated") and re.search(r"\.linear_fc1\.(weight|bias)\d*$", name):
        return ("gate", sizes["f"]), ("up", sizes["f"])
    return ()


def layers(names: Iterable[str]) -> Iterator[tuple[str, int, str]]:
    """(stack, index, ending) of the names that belong to a layer."""
    for name in names:
        if match := LAYER.match(name):
            yield match[1], int(match[2]), match[3]


def _norm(prefix: str, model: ModelConfig, width: int | None = None) -> dict[str, Param]:
    shape = (width or model.hidden_size,)
    result = {f"{prefix}weight": Param(shape)}
    if model.normalization == "LayerNorm":
        result[f"{prefix}bias"] = Param(shape)
    return result


def _latent(model: ModelConfig) -> dict[str, Param]:
    h, heads, value, prefix = model.hidden_size, model.num_attention_heads, model.mla_value_head_dim, "self_attention."
    query_rank, kv_rank = model.mla_query_rank, model.mla_kv_rank
    bias = {f"{prefix}linear_proj.bias": Param((h,))} if model.add_linear_bias else {}
    return {
        f"{prefix}linear_proj.weight": Param((h, heads * value), 1),
        **bias,
        f"{prefix}linear_q_down_proj.weight": Param((query_rank, h)),
        **_norm(f"{prefix}linear_q_up_proj.layer_norm_", model, query_rank),
        f"{prefix}linear_q_up_proj.weight": Param((heads * model.mla_query_head_dim, query_rank), 0),
        f"{prefix}linear_kv_down_proj.weight": Param((kv_rank + model.mla_rope_head_dim, h)),
        **_norm(f"{prefix}linear_kv_up_proj.layer_norm_", model, kv_rank),
        f"{prefix}linear_kv_up_proj.weight": Param((heads * (model.mla_head_dim + value), kv_rank), 0),
    }


def _mamba2(model: ModelConfig, norm: dict[str, Param]) -> dict[str, Param]:
    h, d, heads = model.hidden_size, model.mamba_inner_size, model.mamba_heads
    sizes = {"d": d, "GN": model.mamba_num_groups * model.mamba_state_dim, "H": heads}
    in_proj, conv = parts("M", "mixer.in_proj.weight", sizes), parts("M", "mixer.conv1d.weight", sizes)
    channels = d + 2 * sizes["GN"]
    return {
        "mixer.conv1d.weight": Param((channels, 1, model.mamba_conv_kernel), 0, conv),
        "mixer.conv1d.bias": Param((channels,), 0, conv),
        "mixer.dt_bias": Param((heads,), 0),
        "mixer.A_log": Param((heads,), 0),
        "mixer.D": Param((heads,), 0),
        **norm,
        "mixer.in_proj.weight": Param((channels + d + heads, h), 0, in_proj),
        "mixer.norm.weight": Param((d,), 0),
        "mixer.out_proj.weight": Param((h, d), 1),
    }


def _mamba1(model: ModelConfig, norm: dict[str, Param]) -> dict[str, Param]:
    h, d, state, rank = model.hidden_size, model.mamba_inner_size, model.mamba_state_dim, model.dt_rank
    return {
        "mixer.A_log": Param((d, state), 0),
        "mixer.D": Param((d,), 0),
        **norm,
        "mixer.in_proj.weight": Param((2 * d, h), 0, parts("M", "mixer.in_proj.weight", {"d": d})),
        "mixer.out_proj.weight": Param((h, d), 1),
        "mixer.conv1d.weight": Param((d, 1, model.mamba_conv_kernel), 0),
        "mixer.conv1d.bias": Param((d,), 0),
        "mixer.x_proj.weight": Param((rank + 2 * state, d), 1),
        "mixer.dt_proj.weight": Param((d, rank), 0),
        "mixer.dt_proj.bias": Param((d,), 0),
    }


def _mlp(prefix: str, width: int, model: ModelConfig, norm: dict[str, Param], suffix: str = "") -> dict[str, Param]:
    gated = model.activation == "swiglu"
    halves = parts("-", f"{prefix}linear_fc1.weight", {"f": width, "gated": gated})
    rows = 2 * width if gated else width
    result = {**norm, f"{prefix}linear_fc1.weight{suffix}": Param((rows, model.hidden_size), 0, halves)}
    if model.add_linear_bias and prefix != "mlp.shared_experts.":
        result[f"{prefix}linear_fc1.bias{suffix}"] = Param((rows,), 0, halves)
    result[f"{prefix}linear_fc2.weight{suffix}"] = Param((model.hidden_size, width), 1)
    if model.add_linear_bias and prefix != "mlp.shared_experts.":
        result[f"{prefix}linear_fc2.bias{suffix}"] = Param((model.hidden_size,))
    return result


def _expert_order(name: str) -> tuple[int, str, int]:
    match = EXPERT.match(name)
    if not match:
        return (2 if "shared" in name else 0, "", 0)
    return (1, f"{match[1]} {match[2] == 'bias'}", int(match[3]))  # False sorts before True
