"""What model a set of tensors is: a `ModelConfig` from their names and shapes, and from what else is known."""

from collections.abc import Mapping
from dataclasses import fields
from math import gcd
from typing import Any, get_type_hints

from converters import naming
from converters.tensors import Shape
from hybrid.config import ModelConfig
from hybrid.errors import ConfigError, Problem

FIELDS = {field.name for field in fields(ModelConfig)}
GUESSES = {"mamba_state_dim": 128, "attention_head_dim": 128}
"""What is taken where neither the shapes nor anything else says it: Megatron's defaults of the hybrid example."""


# Compared elsewhere, or no contradiction: a vocabulary is padded in more than one way.
_SETTLED = {"layer_pattern", "vocab_size", "vocab_size_multiple"}

_COUNTS = {name for name, hint in get_type_hints(ModelConfig).items() if hint in (int, int | None)}


def infer(shapes: Mapping[str, Shape], pattern: str, known: Mapping[str, Any]) -> tuple[ModelConfig, list[str]]:
    """Return the architecture of tensors with these canonical names and shapes, and what of it had to be assumed.

    `known` holds fields of ModelConfig that something else says (arguments, a config file, the user). Raises
    ConfigError where it contradicts a shape, with the numbers, or where a tensor is missing that everything hangs on.
    """
    if naming.EMBEDDING not in shapes:
        raise ConfigError(Problem(naming.EMBEDDING, "is missing; it is the first thing that a language model has"))
    # Shapes are divided by them.
    if low := [name for name in _COUNTS & known.keys() if isinstance(known[name], int) and known[name] < 1]:
        raise ConfigError(
            [Problem(f"model.{name}", f"is {known[name]}, but must be at least 1") for name in sorted(low)]
        )
    rows, hidden = shapes[naming.EMBEDDING]
    found: dict[str, Any] = {"layer_pattern": pattern, "hidden_size": hidden}
    assumed: list[str] = []
    problems: list[Problem] = []
    by_kind: dict[str, dict[str, Shape]] = {}
    for stack, index, suffix in naming.layers(shapes):
        if stack == "decoder":
            kind = _layers(pattern)[index]
            by_kind.setdefault(kind, {}).setdefault(suffix, shapes[f"{stack}.layers.{index}.{suffix}"])
    for kind, infer_kind in (("M", _mamba), ("*", _attention), ("+", _latent), ("-", _mlp), ("E", _moe)):
        if kind in by_kind:
            try:
                found |= infer_kind(by_kind[kind], hidden, known, assumed)
            except KeyError as missing:
                problems.append(Problem(str(missing.args[0]), f"is in none of the '{kind}' layers; they all need it"))
    found["add_linear_bias"] = any(_is_linear_bias(name) for name in shapes)
    biased = f"{naming.FINAL_NORM.removesuffix('weight')}bias" in shapes
    found["normalization"] = "LayerNorm" if biased else "RMSNorm"
    found["tie_embeddings"] = naming.OUTPUT not in shapes
    if naming.POSITIONS in shapes:
        found["position_embedding"] = "learned"
    found |= _vocabulary(rows, known)
    for name, value in known.items():
        if name not in FIELDS or value is None:
            continue
        if name in found and found[name] != value and name not in _SETTLED:
            problems.append(Problem(f"model.{name}", f"is said to be {value}, but the tensors are of {found[name]}"))
        found.setdefault(name, value)
    if problems:
        raise ConfigError(problems)
    return ModelConfig(**found), assumed


def check(shapes: Mapping[str, Shape], model: ModelConfig) -> tuple[list[str], list[str], list[Problem]]:
    """Compare tensors with those of a model: (missing, unknown, problems with shapes)."""
    expected = naming.parameters(model)
    missing = [name for name, param in expected.items() if name not in shapes]
    unknown = [name for name in shapes if name not in expected]
    problems = [
        Problem(name, f"has the shape {list(shapes[name])}, but {_place(model)} makes it {list(param.shape)}")
        for name, param in expected.items()
        if name in shapes and not _same(shapes[name], param.shape)
    ]
    return missing, unknown, problems


def _mamba(shapes: dict[str, Shape], hidden: int, known: Mapping[str, Any], assumed: list[str]) -> dict[str, Any]:
    d = shapes["mixer.out_proj.weight"][1]
    kernel = shapes["mixer.conv1d.weight"][-1]
    found: dict[str, Any] = {"mamba_conv_kernel": kernel}
    if len(shapes["mixer.A_log"]) == 2:
        rank = shapes["mixer.dt_proj.weight"][1]
        if d % hidden:
            raise ConfigError(
                Problem("mixer.out_proj.weight", f"has {d} columns, no multiple of the hidden size {hidden}")
            )
        return found | {
            "mamba_version": 1,
            "mamba_state_dim": shapes["mixer.A_log"][1],
            "mamba_expand": d // hidden,
            "mamba_dt_rank": rank,
        }
    heads = shapes["mixer.A_log"][0]
    both = (shapes["mixer.conv1d.weight"][0] - d) // 2  # G x N
    state = known.get("mamba_state_dim")
    groups = known.get("mamba_num_groups")
    if state is None:
        state = both // groups if groups else gcd(both, GUESSES["mamba_state_dim"])
        if not groups:
            assumed.append(f"mamba_state_dim={state} and mamba_num_groups={both // state} (their product is {both})")
    if both % state:
        raise ConfigError(
            Problem("model.mamba_state_dim", f"is said to be {state}, but mixer.conv1d.weight has {both} rows for B")
        )
    if groups and state * groups != both:
        said = f"is said to be {state}, and mamba_num_groups {groups}, but mixer.conv1d.weight has {both} rows for B"
        raise ConfigError(Problem("model.mamba_state_dim", f"{said}, which is their product"))
    return found | {
        "mamba_version": 2,
        "mamba_num_heads": heads,
        "mamba_head_dim": d // heads,
        "mamba_state_dim": state,
        "mamba_num_groups": both // state,
    }


def _attention(shapes: dict[str, Shape], hidden: int, known: Mapping[str, Any], assumed: list[str]) -> dict[str, Any]:
    width = shapes["self_attention.linear_proj.weight"][1]
    rows = shapes["self_attention.linear_qkv.weight"][0]
    heads, head = known.get("num_attention_heads"), known.get("attention_head_dim")
    if head is None:
        head = width // heads if heads else gcd(gcd(width, (rows - width) // 2), GUESSES["attention_head_dim"])
        if not heads:
            assumed.append(f"attention_head_dim={head} (all heads together have {width} columns)")
    if width % head or (rows - width) % (2 * head):
        raise ConfigError(
            Problem(
                "model.attention_head_dim",
                f"is taken to be {head}, but self_attention.linear_proj.weight has {width} columns and "
                f"linear_qkv.weight {rows} rows, no multiples of it",
            )
        )
    return {
        "num_attention_heads": width // head,
        "num_query_groups": (rows - width) // (2 * head),
        "attention_head_dim": head,
    }


def _latent(shapes: dict[str, Shape], hidden: int, known: Mapping[str, Any], assumed: list[str]) -> dict[str, Any]:
    """Rows of a projection are of all heads; the rotated width, which heads share, tells how many there are."""
    width = shapes["self_attention.linear_proj.weight"][1]
    queries, query_rank = shapes["self_attention.linear_q_up_proj.weight"]
    both, kv_rank = shapes["self_attention.linear_kv_up_proj.weight"]
    rotated = shapes["self_attention.linear_kv_down_proj.weight"][0] - kv_rank
    heads = (queries - (both - width)) // rotated if rotated > 0 else 0
    if heads < 1 or width % heads or (both - width) % heads or queries != both - width + heads * rotated:
        name = "self_attention.linear_q_up_proj.weight"
        raise ConfigError(
            Problem(name, f"has {queries} rows, which do not fit the {both} and {width} of keys and values")
        )
    return {
        "num_attention_heads": heads,
        "mla_query_rank": query_rank,
        "mla_kv_rank": kv_rank,
        "mla_head_dim": (both - width) // heads,
        "mla_rope_head_dim": rotated,
        "mla_value_head_dim": width // heads,
    }


def _mlp(shapes: dict[str, Shape], hidden: int, known: Mapping[str, Any], assumed: list[str]) -> dict[str, Any]:
    width = shapes["mlp.linear_fc2.weight"][1]
    return {"ffn_hidden_size": width} | _activation(shapes["mlp.linear_fc1.weight"][0], width, known, assumed)


def _moe(shapes: dict[str, Shape], hidden: int, known: Mapping[str, Any], assumed: list[str]) -> dict[str, Any]:
    width = shapes["mlp.experts.linear_fc2.weight0"][1]
    found: dict[str, Any] = {"num_experts": shapes["mlp.router.weight"][0], "moe_ffn_hidden_size": width}
    found["moe_expert_bias"] = "mlp.router.expert_bias" in shapes
    if "mlp.shared_experts.linear_fc2.weight" in shapes:
        found["moe_shared_expert_size"] = shapes["mlp.shared_experts.linear_fc2.weight"][1]
    return found | _activation(shapes["mlp.experts.linear_fc1.weight0"][0], width, known, assumed)


def _activation(rows: int, width: int, known: Mapping[str, Any], assumed: list[str]) -> dict[str, Any]:
    if rows == 2 * width:
        return {"activation": "swiglu"}
    activation = known.get("activation")
    if activation is None:
        activation = "gelu"
        if (note := "activation=gelu (no shape tells it from squared_relu)") not in assumed:
            assumed.append(note)
    return {"activation": activation} if activation != "swiglu" else {"activation": "gelu"}


def _vocabulary(rows: int, known: Mapping[str, Any]) -> dict[str, int]:
    """The true vocabulary, if it is known, and a multiple that pads it to the rows there are."""
    size = known.get("vocab_size") or rows
    if size > rows:
        raise ConfigError(
            Problem(
                "model.vocab_size",
                f"is said to be {size}, but the embedding has {rows} rows; if that is true, say vocab_size={rows}",
            )
        )
    asked = known.get("vocab_size_multiple")
    # The largest power of two that explains the padding: Megatron pads to 128 x tensor parallel size.
    for multiple in (asked, *(2**power for power in range(14, -1, -1)), rows):
        if multiple and -(-size // multiple) * multiple == rows:
            return {"vocab_size": size, "vocab_size_multiple": multiple}
    raise AssertionError((rows, size))


def _layers(pattern: str) -> str:
    return pattern.split("/")[0].replace("|", "")


def _is_linear_bias(name: str) -> bool:
    return name.endswith(("linear_proj.bias", "linear_qkv.bias", "linear_fc1.bias", "linear_fc2.bias"))


def _same(shape: Shape, expected: Shape) -> bool:
    return len(shape) == len(expected) and all(e in (-1, n) for n, e in zip(shape, expected, strict=True))


def _place(model: ModelConfig) -> str:
    return f"a model of hidden size {model.hidden_size}"
