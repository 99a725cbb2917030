"""Megatron's legacy checkpoints: a file of torch.save per tensor-, pipeline- and expert-parallel rank.

DIR/latest_checkpointed_iteration.txt      an integer, or `release`
DIR/iter_0000100/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt      (or DIR/release/...)

The file name's parts are there only where that kind of parallelism is used (megatron/training/checkpointing.py).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from converters import arguments, layout, legacy_optimizer, naming, torchfile
from converters import ranks as rank_files
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
from converters.naming import LAYER
from converters.ranks import Rank
from converters.tensors import Tensor
from converters.torchfile import Files, bytes_plan
from hybrid.config import ModelConfig
from hybrid.errors import CheckpointError
from hybrid.pattern import Pattern

_LOW_RANK_NORMS = ("self_attention.linear_q_up_proj.layer_norm_", "self_attention.linear_kv_up_proj.layer_norm_")
TRACKER = "latest_checkpointed_iteration.txt"


def find(path: Path) -> Path | None:
    """The folder with the `mp_rank` folders that `path` means, or None if it is no such checkpoint."""
    if path.is_file():
        path = path.parent
    if rank_files.is_rank_folder(path):
        path = path.parent
    if rank_files.folders(path):
        return path
    tracker = path / TRACKER
    if tracker.is_file():
        word = tracker.read_text().strip()
        if word == "release":
            folder = path / "release"
        elif word.isdigit():
            folder = path / f"iter_{int(word):07d}"
        else:
            raise CheckpointError(f"{tracker} says '{word[:40]}', neither an iteration nor 'release'")
        if not folder.is_dir():
            raise CheckpointError(f"{tracker} says '{word}', but there is no folder {folder}")
        return folder if rank_files.folders(folder) else None
    return None


def read(path: Path, overrides: Mapping[str, Any], allow: Iterable[str] = ()) -> Checkpoint:
    """Open a legacy checkpoint. Raises CheckpointError for missing, damaged or contradictory files, ConfigError for
    arguments that contradict the tensors."""
    folder = find(path)
    assert folder is not None
    ranks = rank_files.load(folder, allow)
    first = next(iter(ranks.values()))
    args = arguments.to_dict(first.content.get("args"))
    sizes = rank_files.sizes(ranks)
    whole = rank_files.assemble(ranks)
    tensors, tied = whole.tensors, args.get("untie_embeddings_and_output_weights") is False
    if tied:
        tensors.pop(naming.OUTPUT, None)
    symbols = {"decoder": "".join(whole.segments), **whole.stacks}
    known = arguments.known_fields(args, "".join(symbols.values()), is_mamba1(tensors))
    if isinstance(divisor := args.get("make_vocab_size_divisible_by"), int):
        known["vocab_size_multiple"] = divisor * sizes[0]
    model, assumed, missing, unknown = complete(tensors, symbols, known | dict(overrides))
    left_out = {what for rank in ranks.values() for what in rank.left_out} | ({"rng_state"} & first.content.keys())
    buffers = (first.path.parent / legacy_optimizer.DISTRIBUTED_FILE).is_file()
    has_optimizer = isinstance(first.content.get("optimizer"), dict | list) and (buffers or _has_state(first.content))
    return Checkpoint(
        path=folder,
        format="megatron",
        model=model,
        tensors=in_order(tensors, model),
        layout=Layout(Pattern(whole.segments, model.pattern.mtp, model.pattern.mtp_depths), *sizes),
        iteration=_iteration(folder, first.content),
        samples=args.get("consumed_train_samples"),
        args=args,
        hf_config=hf_config_of(folder.parent),
        companions=companions_of(folder.parent),
        unexpressed=arguments.unexpressed(args, model),
        assumed=assumed,
        missing=missing,
        unknown=unknown,
        left_out=sorted(left_out),
        optimizer=(lambda: _optimizer(ranks, args, tied, allow)) if has_optimizer else None,
    )


def _optimizer(
    ranks: Mapping[rank_files.Key, Rank], args: dict[str, Any], tied: bool, allow: Iterable[str]
) -> Optimizer:
    """The optimizer state of all ranks, put together as the weights are."""
    first = next(iter(ranks.values()))
    slots: dict[str, dict[rank_files.Key, Rank]] = {slot: {} for slot in SLOTS}
    distributed = False
    for key, rank in ranks.items():
        path = rank.path.parent / legacy_optimizer.DISTRIBUTED_FILE
        buffers = torchfile.load(path, allow) if path.is_file() else None
        distributed |= buffers is not None
        try:
            found = legacy_optimizer.read_rank(rank.chunks, rank.content["optimizer"], buffers, args, key)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{rank.path}: its optimizer state is not understood ({error!r})") from None
        except CheckpointError as error:
            raise CheckpointError(f"{rank.path}: {error}") from None
        for slot in SLOTS:
            slots[slot][key] = replace(rank, chunks=[chunk[slot] for chunk in found])
    whole = {slot: rank_files.assemble(group).tensors for slot, group in slots.items()}
    if tied:
        for tensors in whole.values():
            tensors.pop(naming.OUTPUT, None)
    groups, per_parameter = legacy_optimizer.groups_of(first.content["optimizer"])
    return Optimizer(whole, groups, first.content.get("opt_param_scheduler"), distributed, per_parameter)


def _has_state(content: dict[str, Any]) -> bool:
    optimizers = content["optimizer"] if isinstance(content["optimizer"], list) else [content["optimizer"]]
    return all(isinstance(o, dict) and o.get("optimizer", o).get("state") for o in optimizers)


def plan(source: Checkpoint, target: Layout, fused_norms: bool = True, optimizer: Optimizer | None = None) -> Files:
    """Plan the files of `source` in a layout: name in the destination folder -> file.

    `fused_norms`: names as transformer-engine's layers have them; otherwise as Megatron's own layers do.
    """
    model = source.model
    shards = layout.shards(source.tensors, model, target)
    args = arguments.from_model(source, target, max(1, model.vocab_size_multiple // target.tensor))
    slots = {slot: layout.shards(of, model, target) for slot, of in optimizer.slots.items()} if optimizer else {}
    folder = "release" if source.iteration is None else f"iter_{source.iteration:07d}"
    files: Files = {TRACKER: bytes_plan(b"release" if source.iteration is None else str(source.iteration).encode())}
    files |= companion_files(source)
    sizes = (target.tensor, target.pipeline, target.expert)
    for t, p, e in product(*map(range, sizes)):
        content: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": source.iteration or 0}
        segments = target.segments(p)
        chunks = [live_order(shards[t, segment, e], fused_norms) for segment in segments]
        for index, chunk in enumerate(chunks):
            named = {live_name(name, model, fused_norms): tensor for name, tensor in chunk.items()}
            content["model" if len(chunks) == 1 else f"model{index}"] = named
        name = f"{folder}/{rank_files.rank_name((t, p, e), sizes)}"
        if optimizer is not None:
            parts = {slot: [of[t, segment, e] for segment in segments] for slot, of in slots.items()}
            content["optimizer"] = legacy_optimizer.content(optimizer, chunks, parts, target.expert)
            if optimizer.scheduler is not None:
                content["opt_param_scheduler"] = optimizer.scheduler
            if optimizer.distributed:
                buffers = legacy_optimizer.buffers(chunks, parts, vars(args), (t, p, e), target.expert)
                files[f"{name}/{legacy_optimizer.DISTRIBUTED_FILE}"] = torchfile.plan(buffers)
        files[f"{name}/{rank_files.FILE}"] = torchfile.plan(content)
    return files


def live_name(name: str, model: ModelConfig, fused_norms: bool = True) -> str:
    """The name that a running model's parameter has; without transformer-engine norms and experts are modules of their
    own."""
    if model.mamba_version == 2:
        name = re.sub(r"\.mixer\.conv1d\.(weight|bias)$", r".mixer.conv1d_\1", name)
    if not fused_norms:
        name = re.sub(r"\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$", r".experts.local_experts.\3.\1.\2", name)
        name = re.sub(r"\.mixer\.in_proj\.layer_norm_", ".norm.", name)
        name = re.sub(r"\.self_attention\.linear_qkv\.layer_norm_", ".input_layernorm.", name)
        name = re.sub(r"\.mlp\.linear_fc1\.layer_norm_", ".pre_mlp_layernorm.", name)
        name = re.sub(r"\.linear_(q|kv)_up_proj\.layer_norm_", r".\1_layernorm.", name)
    return name


def live_order(chunk: Mapping[str, Tensor], fused_norms: bool) -> dict[str, Tensor]:
    """The tensors of a chunk in the order in which a running model has its parameters, in which optimizers number them.

    Canonical order is transformer-engine's. As modules of their own norms come after a Mamba mixer and before
    attention, and one expert after the other.
    """
    if fused_norms:
        return dict(chunk)

    def key(name: str) -> tuple[str, int, int]:
        match = LAYER.match(name)
        if not match:
            return name, 0, 0
        layer = f"{match[1]}.{match[2]}"
        if expert := naming.EXPERT.match(match[3]):
            return layer, 1, int(expert[3])
        if match[3].startswith("self_attention.linear_qkv.layer_norm_"):
            return layer, -1, 0
        behind = ("mixer.in_proj.layer_norm_", "mlp.shared_experts.", *_LOW_RANK_NORMS)
        return layer, 2 * match[3].startswith(behind), 0

    first: dict[str, int] = {}
    for index, name in enumerate(chunk):
        first.setdefault(key(name)[0], index)
    return dict(sorted(chunk.items(), key=lambda item: (first[key(item[0])[0]], *key(item[0])[1:])))


def is_mamba1(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the Mamba layers among these tensors are Mamba-1's."""
    return any(name.endswith("mixer.x_proj.weight") for name in tensors)


def _iteration(folder: Path, content: dict[str, Any]) -> int | None:
    if folder.name == "release":
        return None
    iteration = content.get("iteration")
    if isinstance(iteration, int):
        return iteration
    number = folder.name.removeprefix("iter_")
    return int(number) if number.isdigit() else None
