"""From the names that megatron-core and its forerunners gave their tensors to the canonical ones of `naming`."""

import re
from collections.abc import Iterable

from hybrid.errors import CheckpointError
from hybrid.pattern import CONVERTED, LAYER_KINDS

# (old, new), applied in this order to every name. Live parameters and 2024's modules, fused and separate norms, grouped
# and sequential experts, GPT's stack and the hybrid one.
_RENAMED = [
    (r"^(module\.)+", ""),
    (r"^language_model\.(?=decoder\.|embedding\.|output_layer\.)", ""),
    (r"^model\.(?=decoder\.|embedding\.|output_layer\.|mtp\.)", ""),
    (r"^decoder\.final_layernorm\.", "decoder.final_norm."),
    (r"^(mtp\.layers\.\d+\.)transformer_layer\.", r"\1mtp_model_layer.layers.0."),
    (r"\.mixer\.conv1d_(weight|bias)$", r".mixer.conv1d.\1"),
    (r"(layers\.\d+)\.norm\.(weight|bias)$", r"\1.mixer.in_proj.layer_norm_\2"),
    (r"(layers\.\d+)\.input_layernorm\.(weight|bias)$", r"\1.self_attention.linear_qkv.layer_norm_\2"),
    (r"\.mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)$", r".mlp.experts.\2.\3\1"),
]
_RENAMED_COMPILED = [(re.compile(old), new) for old, new in _RENAMED]
_LAYER = re.compile(r"^(.*?\blayers\.)(\d+)(\..+)$")
_INNER = re.compile(r"^(mtp\.layers\.\d+\.mtp_model_layer\.layers\.)(\d+)(\..+)$")
_NO_WEIGHT = re.compile(r"(_extra_state(/shard.*)?|inv_freq|local_tokens_per_expert)$")


def is_weight(name: str) -> bool:
    """Whether a name is one of a weight, and not of fp8 statistics or of what can be computed."""
    return not _NO_WEIGHT.search(name)


def what(name: str) -> str:
    """What a name that is no weight's stands for, for a list of what is left out."""
    return "fp8 statistics (_extra_state)" if "_extra_state" in name else name


def canonical(names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the canonical name of every name of one pipeline stage, and the layers' symbols of each stack.

    Layers of GPT's kind (attention and MLP in one) become two. The stacks are `decoder` and
    `mtp.layers.D.mtp_model_layer`; a layer that is missing in between, or of a kind that the converters do not know,
    raises CheckpointError.
    """
    renamed = {name: _rename(name) for name in names}
    suffixes: dict[str, dict[int, set[str]]] = {}
    for new in renamed.values():
        if place := _place(new):
            suffixes.setdefault(place[0], {}).setdefault(place[1], set()).add(place[2])
    symbols: dict[str, list[str]] = {}
    for stack, layers in suffixes.items():
        gaps = sorted(set(range(len(layers))) - set(layers))
        if gaps:
            raise CheckpointError(f"{stack} has {len(layers)} layers, but none of the number {gaps[0]}")
        symbols[stack] = [_symbols(f"{stack}{index}", layers[index]) for index in range(len(layers))]
    result: dict[str, str] = {}
    for name, new in renamed.items():
        place = _place(new)
        if place is None:
            result[name] = new
            continue
        stack, index, suffix = place
        kinds = symbols[stack][index]
        before = sum(map(len, symbols[stack][:index]))
        second = len(kinds) > 1 and re.match(r"mlp\.|pre_mlp_layernorm\.", suffix)
        kind = kinds[-1] if second else kinds[0]
        if kind == "-":
            suffix = re.sub(r"^pre_mlp_layernorm\.", "mlp.linear_fc1.layer_norm_", suffix)
        elif kind == "+":
            suffix = re.sub(r"^self_attention\.linear_qkv\.layer_norm_", "input_layernorm.", suffix)
            suffix = re.sub(r"\.(q|kv)_layernorm\.", r".linear_\1_up_proj.layer_norm_", suffix)
        result[name] = f"{stack}{before + bool(second)}.{suffix}"
    seen: dict[str, str] = {}
    for name, new in result.items():
        if new in seen:
            raise CheckpointError(f"{seen[new]} and {name} are two names of one tensor, {new}")
        seen[new] = name
    return result, {stack.removesuffix(".layers."): "".join(kinds) for stack, kinds in symbols.items()}


def _rename(name: str) -> str:
    for old, new in _RENAMED_COMPILED:
        name = old.sub(new, name)
    return name


def _place(name: str) -> tuple[str, int, str] | None:
    match = _INNER.match(name) or (None if name.startswith("mtp.") else _LAYER.match(name))
    return (match[1], int(match[2]), match[3][1:]) if match else None


def _symbols(layer: str, suffixes: set[str]) -> str:
    starts = {suffix.split(".")[0] for suffix in suffixes}
    result = ""
    if "mixer.A_log" in suffixes:
        result += "M"
    if "self_attention" in starts:
        if any(re.match(r"self_attention\.(A_log|in_proj|conv1d)", suffix) for suffix in suffixes):
            raise _unknown_kind(layer, "a gated delta net")
        if any(".core_attention.indexer." in suffix for suffix in suffixes):
            raise _unknown_kind(layer, "sparse attention (DSA)")
        if "self_attention.linear_q_proj.weight" in suffixes:
            raise _unknown_kind(layer, "latent attention without a low rank of the queries")
        result += "+" if "self_attention.linear_kv_down_proj.weight" in suffixes else "*"
    if "mlp" in starts:
        result += "E" if any(suffix.startswith(("mlp.router.", "mlp.experts.")) for suffix in suffixes) else "-"
    if not result:
        raise CheckpointError(f"{layer} is of no known kind; its tensors are {', '.join(sorted(suffixes)[:5])}")
    return result


def _unknown_kind(layer: str, what: str) -> CheckpointError:
    known = ", ".join(f"{LAYER_KINDS[symbol]} ({symbol})" for symbol in CONVERTED)
    return CheckpointError(
        f"{layer} is {what}; the converters and generation know the layers {known}. "
        "Training goes on from such a checkpoint (checkpoint.load)"
    )
