"""Distributed checkpoints of megatron-core (`torch_dist`): one set of global tensors, whatever the layout.

FOLDER/metadata.json       which format
FOLDER/common.pt           what is no tensor; in newer ones it is the object `common_state` among the others
FOLDER/settings.json       the settings of the run, if it was one of ours
and the files of `converters.dcp` (megatron/core/dist_checkpointing/serialization.py).
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters import aliases, arguments, dcp, naming, torchfile
from converters.checkpoint import (
    SLOTS,
    Checkpoint,
    Optimizer,
    companion_files,
    companions_of,
    complete,
    hf_config_of,
    in_order,
)
from converters.layout import Layout
from converters.megatron import TRACKER, is_mamba1
from converters.tensors import Blob, Tensor, cat, select, split, stack
from converters.torchfile import Files, Plan, bytes_plan
from hybrid import settings_file
from hybrid.config import ModelConfig, Settings
from hybrid.errors import CheckpointError

HEAD = "metadata.json"
COMMON = "common_state/shard_0_1"
"""The key of the object that holds what is no tensor."""

# The order in which the parts of a tensor are joined; with dt it is Mamba-2's.
_PART_ORDER = {True: ("z", "x", "B", "C", "dt"), False: ("x", "z", "B", "C")}
_PART = re.compile(r"^(.+\.(?:in_proj\.weight|conv1d\.weight|conv1d\.bias))\.(z|x|B|C|dt)$")
_HALF = re.compile(r"^(.+\.linear_fc1\.(?:weight|bias))_(w|v)$")
_EXPERTS = re.compile(r"^(.+\.mlp\.experts)\.experts\.(?:(\d+)\.)?(linear_fc[12])\.(weight|bias)$")
_STACKED = re.compile(r"^(decoder\.layers)\.(?!\d)(.+)$")
_OPTIMIZER = re.compile(r"^(?:chained_\d+\.)?optimizer\.state\.(fp32_param|param|exp_avg_sq|exp_avg)\.(.+)$")


def find(path: Path) -> Path | None:
    """The folder with `.metadata` that `path` means, or None if it is no such checkpoint."""
    if (path / dcp.INDEX).is_file():
        return path
    tracker = path / TRACKER
    word = tracker.read_text().strip() if tracker.is_file() else ""
    folder = path / (f"iter_{int(word):07d}" if word.isdigit() else word or "release")
    return folder if (folder / dcp.INDEX).is_file() else None


def read(path: Path, overrides: Mapping[str, Any], allow: Iterable[str] = ()) -> Checkpoint:
    """Open a distributed checkpoint. Raises CheckpointError for missing, damaged or contradictory files, ConfigError
    for settings that contradict the tensors."""
    folder = find(path)
    assert folder is not None
    head = _json(folder / HEAD) if (folder / HEAD).is_file() else {}
    if head.get("sharded_backend", "torch_dist") != "torch_dist":
        raise CheckpointError(
            f"{folder} is a distributed checkpoint of the kind '{head['sharded_backend']}', not torch_dist"
        )
    entries, objects = dcp.load(folder, allow)
    common = _common(folder, objects, allow)
    args = arguments.to_dict(common.get("args"))
    weights = {name: tensor for name, tensor in entries.items() if not name.startswith(("optimizer.", "chained_"))}
    tensors, symbols = logical(weights)
    settings = _settings(folder)
    if settings is not None:
        known = {name: value for name, value in vars(settings.model).items() if name not in _DERIVED}
        known["layer_pattern"] = str(settings.model.pattern)
    else:
        known = arguments.known_fields(args, "".join(symbols.values()), is_mamba1(tensors))
        divisor, ranks = args.get("make_vocab_size_divisible_by"), args.get("tensor_model_parallel_size")
        if isinstance(divisor, int) and isinstance(ranks, int):
            known["vocab_size_multiple"] = divisor * ranks
    model, assumed, missing, unknown = complete(tensors, symbols, known | dict(overrides))
    left_out = {aliases.what(name.split("/")[0]) for name in objects if name != COMMON}
    left_out |= {aliases.what(name.split("/")[0]) for name in weights if not aliases.is_weight(name)}
    state = {name: tensor for name, tensor in entries.items() if name not in weights}
    return Checkpoint(
        path=folder,
        format="torch_dist",
        model=model,
        tensors=in_order(tensors, model),
        iteration=_number(common.get("iteration")),
        samples=_number(common.get("consumed_samples")) or _number(args.get("consumed_train_samples")),
        args=args,
        settings=settings,
        hf_config=hf_config_of(folder),
        companions=companions_of(folder),
        unexpressed=arguments.unexpressed(args, model),
        assumed=assumed,
        missing=missing,
        unknown=unknown,
        left_out=sorted(left_out),
        optimizer=(lambda: _optimizer(folder, state, common)) if state and common.get("optimizer") else None,
    )


def logical(entries: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Canonical tensors, and the layers' symbols of each stack, from the global tensors by their keys."""
    # One step after the other: an expert that is saved on its own can be in parts, and layers can be stacked experts.
    tensors = _experts_apart(_parts_joined(_layers_apart(entries)))
    names, symbols = aliases.canonical(tensors)
    return {names[name]: tensor for name, tensor in tensors.items()}, symbols


def _layers_apart(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, with those of all layers on top of one another (a stack of like layers) taken apart."""
    result: dict[str, Tensor] = {}
    for name, tensor in entries.items():
        if not aliases.is_weight(name):
            continue
        if match := _STACKED.match(name):
            result |= {f"{match[1]}.{layer}.{match[2]}": select(tensor, layer) for layer in range(tensor.shape[0])}
        else:
            result[name] = tensor
    return result


def _parts_joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the parts of a projection that were saved one by one put together. Raises CheckpointError if a half of a
    gated one is missing; of the others the shapes tell."""
    result: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _PART.match(name) or _HALF.match(name):
            parts.setdefault(match[1], {})[match[2]] = tensor
        else:
            result[name] = tensor
    for name, found in parts.items():
        halves = found.keys() & {"w", "v"}
        if len(halves) == 1:
            raise CheckpointError(f"{name}_{halves.pop()} is there without its other half")
        order = ("w", "v") if halves else _PART_ORDER["dt" in found or ".conv1d." in name]
        result[name] = cat([found[part] for part in order if part in found], 0)
    return result


def _experts_apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With each expert under a name of its own, be they saved on top of one another or one by one."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := _EXPERTS.match(name):
            stem = f"{match[1]}.{match[3]}.{match[4]}"
            experts = {int(match[2]): tensor} if match[2] else {j: select(tensor, j) for j in range(tensor.shape[0])}
            result |= {f"{stem}{expert}": one for expert, one in experts.items()}
        else:
            result[name] = tensor
    return result


def global_tensors(tensors: Mapping[str, Tensor], params: Mapping[str, naming.Param]) -> dict[str, Tensor]:
    """The global tensors by key of canonical ones: parts apart, experts on top of one another; undoes `logical`."""
    result: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        layer = naming.LAYER.match(name)
        expert = naming.EXPERT.match(layer[3]) if layer else None
        param = params[name]
        if expert and layer:
            stem = name.removesuffix(layer[3]) + expert[1].replace("mlp.experts.", "mlp.experts.experts.")
            experts.setdefault(f"{stem}.{expert[2]}", {})[int(expert[3])] = tensor
        elif param.parts and param.parts[0][0] != "gate":
            lengths = [length for _, length in param.parts]
            for (part, _), piece in zip(param.parts, split(tensor, 0, lengths), strict=True):
                result[f"{name}.{part}"] = piece
        else:
            result[name] = tensor
    return result | {name: stack([found[j] for j in sorted(found)]) for name, found in experts.items()}


def plan(source: Checkpoint, target: Layout, optimizer: Optimizer | None = None) -> Files:
    """Plan the folder of `source`; `target` says into how many chunks tensors are cut, so that as many ranks read their
    own, and what is written into the arguments."""
    iteration = source.iteration or 0
    folder = f"iter_{iteration:07d}"
    params = naming.parameters(source.model)
    common: dict[str, Any] = {
        "args": arguments.from_model(source, target, source.model.vocab_size_multiple),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "consumed_samples": source.samples or 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    entries = global_tensors(source.tensors, params)
    dims = {key: _chunk_dim(key, params) for key in entries}
    if optimizer is not None:
        common["optimizer"] = _optimizer_settings(optimizer)
        if optimizer.distributed:
            common["content_metadata"]["distrib_optim_sharding_type"] = "fully_reshardable"
        if optimizer.scheduler is not None:
            common["opt_param_scheduler"] = optimizer.scheduler
        for slot, tensors in optimizer.slots.items():
            prefix = f"optimizer.state.{'param' if optimizer.distributed and slot == 'fp32_param' else slot}."
            state = global_tensors(tensors, params)
            entries |= {f"{prefix}{key}": tensor for key, tensor in state.items()}
            dims |= {f"{prefix}{key}": dims[key] for key in state}
    objects = {COMMON: common, **dict.fromkeys(extra_states(source.model))}
    written = dcp.plan(entries, dims, objects, target.tensor)
    files = {f"{folder}/{name}": file for name, file in written.items()}
    files[f"{folder}/{HEAD}"] = bytes_plan(b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    files |= companion_files(source, f"{folder}/")
    files[f"{folder}/{settings_file.FILE_NAME}"] = _settings_plan(source, target)
    files[TRACKER] = bytes_plan(str(iteration).encode())
    return files


def _optimizer(folder: Path, state: Mapping[str, Tensor], common: Mapping[str, Any]) -> Optimizer:
    """The optimizer state, if it is stored by parameter."""
    slots: dict[str, dict[str, Tensor]] = {slot: {} for slot in SLOTS}
    for name, tensor in state.items():
        match = _OPTIMIZER.match(name)
        if not match:
            raise CheckpointError(
                f"{folder}: its optimizer state ({name}) is cut as the ranks held it, not by parameter; save it with "
                "--dist-ckpt-optim-fully-reshardable, or convert without --optimizer"
            )
        slots["fp32_param" if match[1] == "param" else match[1]][match[2]] = tensor
    settings = common["optimizer"]
    chained = all(isinstance(key, int) for key in settings) if isinstance(settings, dict) else True
    parts = [settings] if not chained else list(settings.values() if isinstance(settings, dict) else settings)
    distributed = any("param_state_sharding_type" in part for part in parts)
    groups: list[dict[str, Any]] = []
    per_parameter = False
    for part in parts:
        inner = part.get("optimizer", part)
        step = inner.get("state", {}).get("common_step")
        per_parameter |= step is not None
        for group in inner["param_groups"]:
            kept = {key: value for key, value in group.items() if key != "params"}
            groups.append(kept | ({} if step is None else {"step": step}))
    logicals = {slot: logical(tensors)[0] for slot, tensors in slots.items()}
    return Optimizer(logicals, groups, common.get("opt_param_scheduler"), distributed, per_parameter)


def _optimizer_settings(optimizer: Optimizer) -> Any:
    """What the common state holds as `optimizer`."""

    def settings(groups: list[dict[str, Any]]) -> dict[str, Any]:
        if optimizer.distributed:
            return {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"}
        inner: dict[str, Any] = {"state": {}, "param_groups": groups}
        if optimizer.step_per_parameter and groups:
            inner["state"]["common_step"] = groups[0].get("step")
            inner["param_groups"] = [{k: v for k, v in group.items() if k != "step"} for group in groups]
        return {"optimizer": inner}

    dense = [group for group in optimizer.groups if not group.get("is_expert_parallel")]
    expert = [group for group in optimizer.groups if group.get("is_expert_parallel")]
    return {0: settings(dense), 1: settings(expert)} if expert else settings(dense)


def extra_states(model: ModelConfig) -> list[str]:
    """The keys of the objects that megatron-core asks for beside the tensors: fp8 statistics, None without fp8.

    With transformer-engine every projection, norm of its own and core attention has one, with Megatron's layers every
    projection; what is not asked for does no harm.
    """
    result: list[str] = []
    whole = "_extra_state/shard_0_1"
    for name in naming.parameters(model):
        match = naming.LAYER.match(name)
        expert = naming.EXPERT.match(match[3]) if match else None
        stem = name.rpartition(".")[0]
        if expert:
            stem = stem.replace(".mlp.experts.", ".mlp.experts.experts.")
            if expert[2] == "weight":
                result.append(f"{stem}._extra_state/shard_{expert[3]}_{model.num_experts}")
        elif name.endswith(".weight") and not re.search(r"(conv1d|mixer\.norm|router|embeddings)\.weight$", name):
            result.append(f"{stem}.{whole}")
            if stem.endswith((".linear_qkv", ".linear_kv_up_proj")):
                result.append(f"{stem.rpartition('.')[0]}.core_attention.{whole}")
    return result


def _chunk_dim(key: str, params: Mapping[str, naming.Param]) -> int | None:
    """The dimension in which tensor parallelism cuts the global tensor of a key."""
    if match := _EXPERTS.match(key):
        dim = params[f"{match[1]}.{match[3]}.{match[4]}0"].dim
        return None if dim is None else dim + 1  # after the dimension of the experts
    match = _PART.match(key)
    return params[match[1] if match and key not in params else key].dim


def _common(folder: Path, objects: Mapping[str, Blob], allow: Iterable[str]) -> dict[str, Any]:
    if (folder / "common.pt").is_file():
        content = torchfile.load(folder / "common.pt", allow)
    else:
        content = dcp.load_object(objects[COMMON], allow) if COMMON in objects else {}
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder}: its common state is no dict")
    return content


def _settings(folder: Path) -> Settings | None:
    """The settings of the run that saved it, if it was one of ours."""
    return settings_file.read(folder) if (folder / settings_file.FILE_NAME).is_file() else None


def _settings_plan(source: Checkpoint, target: Layout) -> Plan:
    """Settings with this model, so that the checkpoint says what it is to everything that reads ours."""
    settings = source.settings or Settings(name=source.path.name, model=source.model)
    model = replace(source.model, layer_pattern=str(target.pattern), num_layers=None)
    parallel = replace(
        settings.parallel,
        tensor=target.tensor,
        pipeline=target.pipeline,
        expert=target.expert,
        sequence=target.tensor > 1,
    )
    data = settings.data
    if source.settings is None and source.tokenizer_folder:
        data = replace(data, tokenizer=str(source.tokenizer_folder.resolve()))
    settings = replace(settings, model=model, parallel=parallel, data=data)
    return bytes_plan((json.dumps(settings_file.to_dict(settings), indent=1) + "\n").encode())


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError:
        raise CheckpointError(f"{path} is damaged") from None
    return content if isinstance(content, dict) else {}


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


# What the tensors say themselves; settings that leave it to be derived say it in another way.
_DERIVED = {"num_layers", "attention_ratio", "mlp_ratio"}
