"""The value of each field against its type, its range, and what it must be a multiple of.

A value that comes over the command line is typed when it is read; one set in Python is not typed by anyone else.
"""

import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from math import isfinite
from typing import Any, Literal, Union, get_type_hints

from hybrid.config import Settings
from hybrid.errors import Problem

# (what a value must be, the test of it, fields by section); None is left to the rules between fields.
_RANGES: list[tuple[str, Callable[[float], bool], dict[str, str]]] = [
    (
        "at least 1",
        lambda value: value >= 1,
        {
            "model": """hidden_size ffn_hidden_size num_attention_heads num_query_groups attention_head_dim
                rotary_base mamba_state_dim mamba_head_dim mamba_num_heads mamba_num_groups mamba_dt_rank mamba_expand
                mamba_conv_kernel mamba_chunk_size
                mla_query_rank mla_kv_rank mla_head_dim mla_rope_head_dim mla_value_head_dim
                dsa_index_heads dsa_index_head_dim dsa_top_k gdn_num_key_heads gdn_num_value_heads
                gdn_key_head_dim gdn_value_head_dim gdn_conv_kernel
                num_experts moe_top_k moe_ffn_hidden_size moe_shared_expert_size
                vocab_size vocab_size_multiple""",
            "parallel": "tensor pipeline context expert",
            "data": "sequence_length",
            "optimizer": "decay_samples wsd_decay_samples",
            "trainer": "max_steps max_samples micro_batch_size global_batch_size log_interval memory_snapshot",
            "checkpoint": "save_interval",
            "faults": "limit",
        },
    ),
    (
        "at least 0",
        lambda value: value >= 0,
        {
            "model": "moe_aux_loss_coeff mtp_loss_coeff",
            "data": "num_workers",
            "optimizer": "min_lr warmup_samples warmup_steps warmup_tokens weight_decay clip_grad",
            "trainer": "eval_interval eval_steps z_loss_coeff",
            "checkpoint": "keep_last keep_every",
            "faults": "spike_factor hang_seconds",
        },
    ),
    (
        "above 0",
        lambda value: value > 0,
        {"model": "norm_epsilon init_std moe_routed_scale dsa_loss_coeff", "optimizer": "lr eps"},
    ),
    (
        "at least 0 and below 1",
        lambda value: 0 <= value < 1,
        {"model": "hidden_dropout attention_dropout", "optimizer": "beta1 beta2"},
    ),
    (
        "from 1 to 2147483647",  # NumPy's takes 32 bits; 100 are added for each pipeline stage
        lambda value: 1 <= value < 2**31,
        {"trainer": "seed"},
    ),
    ("above 0 and at most 1", lambda value: 0 < value <= 1, {"model": "rotary_percent"}),
]
# Sizes that are tried when the nearest ones that fit are looked for.
LARGEST_TRIED = 4096
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", types.NoneType: "None"}


def out_of_range(settings: Settings) -> list[Problem]:
    """Return a problem for each number that its field cannot mean. The types must be right."""
    problems: list[Problem] = []
    for bound, holds, sections in _RANGES:
        for section, names in sections.items():
            for name in names.split():
                value = getattr(getattr(settings, section), name)
                if value is not None and not holds(value):
                    problems.append(Problem(f"{section}.{name}", f"is {value}, but must be {bound}"))
    return problems


def wrong_types(settings: Settings) -> list[Problem]:
    """Return a problem for each value that is not of its field's type; a whole number is also a number."""
    problems: list[Problem] = []
    for name, hint in _hints(Settings).items():
        section = getattr(settings, name)
        if not is_dataclass(hint):
            if not fits(section, hint):
                problems.append(Problem(name, f"is {section!r}, but must be {type_name(hint)}"))
            continue
        assert isinstance(hint, type)
        if not isinstance(section, hint):
            problems.append(Problem(name, f"is {section!r}, but must be a {hint.__name__}"))
            continue
        hints = _hints(hint)
        for field in fields(hint):
            value = getattr(section, field.name)
            if not fits(value, hints[field.name]):
                wanted = type_name(hints[field.name])
                problems.append(Problem(f"{name}.{field.name}", f"is {value!r}, but must be {wanted}"))
    return problems


@cache
def _hints(section: type) -> dict[str, Any]:
    return get_type_hints(section)


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type that the annotation `hint` says. True and False are no numbers here."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value == argument and type(value) is type(argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(fits(entry, arguments[0]) for entry in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def type_name(hint: Any) -> str:
    """The annotation in words: 'a whole number or None', "one of 'gelu', 'swiglu'"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(type_name, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is list:
        return f"a list, each entry {type_name(arguments[0])}"
    return _NAMES.get(hint, str(hint))


def multiple_of(place: str, value: int, divisor: int, what: str, way_out: str = "") -> Iterator[Problem]:
    """Yield the problem that `value` of the field `place` is no multiple of `divisor`, with the nearest that are.

    `what` says what the divisor is, with its number: 'parallel.tensor (4)'.
    """
    if value % divisor:
        below, above = value // divisor * divisor, (value // divisor + 1) * divisor
        nearest = f"{below} or {above}" if below else f"{above}"
        yield Problem(place, f"is {value}, but must be a multiple of {what}; nearest: {nearest}{way_out}")


def sizes_that(fit: Callable[[int], bool], wanted: int, place: str) -> str:
    """Return '; or set PLACE to 2, 4 or 8' with the sizes nearest to `wanted` (up to four of them) that `fit`."""
    found = sorted(
        sorted(filter(fit, range(1, min(4 * wanted, LARGEST_TRIED) + 1)), key=lambda size: (abs(size - wanted), size))[
            :4
        ]
    )
    if not found:
        return ""
    *first, last = map(str, found)
    return f"; or set {place} to {', '.join(first) + ' or ' if first else ''}{last}"
