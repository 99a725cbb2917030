"""What a config.json must be to be read: every field of its type, and nothing that our model computes otherwise."""

from collections.abc import Callable, Iterable, Mapping
from math import inf, isclose, isfinite
from typing import Any

from hybrid.config import GATED_NORM_EPSILON
from hybrid.errors import ConfigError, Problem


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and value > 0


# (what a field must be, the test of it, names); a dot is a field of a field. Null says nothing, as if it was not there.
# What only layers of one kind have may be 0 in a model without them.
_TYPES: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        "a text",
        lambda value: isinstance(value, str),
        "model_type hybrid_override_pattern hidden_act mlp_hidden_act mamba_hidden_act ssm_cfg.layer",
    ),
    ("True or False", lambda value: isinstance(value, bool), "tie_word_embeddings tie_embeddings"),
    (
        "a whole number of at least 1",
        _whole(1),
        """vocab_size num_hidden_layers n_layer attention_head_dim head_dim ssm_state_size state_size n_groups
        chunk_size mamba_d_state mamba_n_groups mamba_chunk_size pad_vocab_size_multiple ssm_cfg.ngroups
        ssm_cfg.d_state ssm_cfg.chunk_size""",
    ),
    (
        "a whole number",
        _whole(0),
        "num_attention_heads num_key_value_heads n_routed_experts num_experts_per_tok",
    ),
    (
        "a number above 0",
        _number,
        """layer_norm_epsilon rms_norm_eps initializer_range routed_scaling_factor rope_theta
        rope_parameters.rope_theta""",
    ),
    ("a list", lambda value: isinstance(value, list), "layers_block_type layer_types"),
    (
        "a list of whole numbers",
        lambda value: isinstance(value, list) and all(map(_whole(0), value)),
        "attn_layer_indices",
    ),
    ("an object", lambda value: isinstance(value, dict), "rope_parameters rope_scaling ssm_cfg"),
]


def check_types(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for each field of a config.json that is read and not of its type."""
    refuse(
        Problem(name, f"is {value!r} in config.json, but must be {words}")
        for words, fits, names in _TYPES
        for name in names.split()
        if (value := _at(config, name)) is not None and not fits(value)
    )


def refuse(problems: Iterable[Problem]) -> None:
    """Raise ConfigError if there are problems."""
    if found := list(problems):
        raise ConfigError(found)


def fixed(config: Mapping[str, Any], name: str, allowed: tuple[Any, ...], ours: str) -> list[Problem]:
    """The problem of a field that says other than what our model always does, if it says anything."""
    value = _at(config, name)
    return [] if value is None or value in allowed else [Problem(name, f"is {value!r}; {ours}")]


def silu(config: Mapping[str, Any], name: str, where: str) -> list[Problem]:
    """The problem of an activation other than SiLU, which transformers also calls swish."""
    return fixed(config, name, ("silu", "swish"), f"{where} of our model have silu only")


def mamba_biases(config: Mapping[str, Any], conv: str, projections: str) -> list[Problem]:
    """The problems of biases that our Mamba layers have not, or have always, by the names of a family."""
    return fixed(config, conv, (True,), "the convolutions of our Mamba layers always have a bias") + fixed(
        config, projections, (False,), "the projections of our Mamba layers have no bias"
    )


def time_step_limit(config: Mapping[str, Any], name: str = "time_step_limit") -> list[Problem]:
    """The problem of a time step that is kept between bounds, other than 0 and infinity."""
    value = _at(config, name)
    if value is None or (isinstance(value, list) and len(value) == 2 and value[0] == 0 and _infinite(value[1])):
        return []
    return [Problem(name, f"is {value!r}; our Mamba layers do not limit the time step: only [0.0, Infinity] is read")]


def gated_norm(config: Mapping[str, Any], *names: str) -> list[Problem]:
    """The problem of an epsilon that our Mamba-2 layers' gated norm has not; the first name that is there says it."""
    name = next((name for name in names if config.get(name) is not None), None)
    if name is None or same_epsilon(config[name]):
        return []
    ours = f"transformers' gated norm in Mamba-2 layers adds this, too, and ours always {GATED_NORM_EPSILON}"
    return [Problem(name, f"is {config[name]}; {ours}")]


def same_epsilon(epsilon: float) -> bool:
    """Whether an epsilon is that of the gated norm, be it written with the digits of float32 only."""
    return isclose(epsilon, GATED_NORM_EPSILON, rel_tol=1e-6)


def _at(config: Mapping[str, Any], name: str) -> Any:
    outer, dot, inner = name.partition(".")
    value = config.get(outer)
    return (value.get(inner) if isinstance(value, dict) else None) if dot else value


def _infinite(value: Any) -> bool:
    """json reads Infinity as a float; transformers 5 writes {"__float__": "Infinity"}, other tools a text."""
    if isinstance(value, dict):
        value = value.get("__float__")
    try:
        return float(value) == inf
    except (TypeError, ValueError):
        return False
