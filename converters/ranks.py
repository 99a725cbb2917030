"""The rank files of a legacy checkpoint: loaded, checked against one another, and put together to logical tensors."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from converters import aliases, arguments, layout, naming, torchfile
from converters.tensors import Shape, Tensor
from hybrid.errors import CheckpointError

FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_MODEL = re.compile(r"model(\d*)")

Key = tuple[int, int, int]
"""Tensor-, pipeline- and expert-parallel rank."""


@dataclass(frozen=True)
class Rank:
    """What one file holds, its tensors still in the file.

    `chunks` are the weights of each virtual stage by canonical name, numbered as the rank numbers them, `symbols` the
    layers of each; `left_out` says what is no weight.
    """

    key: Key
    path: Path
    content: dict[str, Any]
    chunks: list[dict[str, Tensor]]
    symbols: list[dict[str, str]]
    left_out: frozenset[str]


@dataclass(frozen=True)
class Whole:
    """A model put together: logical tensors by canonical name, and the layers of every pipeline segment and stack."""

    tensors: dict[str, Tensor]
    segments: tuple[str, ...]
    stacks: dict[str, str]


def is_rank_folder(path: Path) -> bool:
    """Whether a folder is one rank's."""
    return bool(_RANK.fullmatch(path.name)) and (path / FILE).is_file()


def folders(folder: Path) -> dict[tuple[int, ...], str]:
    """The rank folders in a folder, by the numbers in their names."""
    if not folder.is_dir():
        return {}
    matches = [match for path in folder.iterdir() if (match := _RANK.fullmatch(path.name))]
    return {tuple(int(number) for number in match.groups() if number is not None): match[0] for match in matches}


def sizes(ranks: Iterable[Key]) -> Key:
    """How many ranks of each kind there are."""
    tensor, pipeline, expert = (1 + max(column) for column in zip(*ranks, strict=True))
    return tensor, pipeline, expert


def load(folder: Path, allow: Iterable[str]) -> dict[Key, Rank]:
    """Every rank's file by (tensor, pipeline, expert). Raises CheckpointError if one is missing or they disagree."""
    names = folders(folder)
    width = max(map(len, names))
    if any(len(numbers) != width for numbers in names):
        raise CheckpointError(f"{folder} mixes rank folders of different layouts: {', '.join(sorted(names.values()))}")
    contents = {numbers: _content(folder / name / FILE, allow) for numbers, name in names.items()}
    first = contents[min(contents)]
    args = arguments.to_dict(first.get("args"))
    experts = args.get("expert_model_parallel_size") or 1
    expert_parallel = width == 3 or (
        width == 2 and experts > 1 and (args.get("pipeline_model_parallel_size") or 1) == 1
    )
    ranks: dict[Key, Rank] = {}
    for numbers, content in contents.items():
        t, *others = numbers
        p = others[0] if others and not (width == 2 and expert_parallel) else 0
        e = others[-1] if expert_parallel else 0
        ranks[t, p, e] = _rank((t, p, e), folder / names[numbers] / FILE, content)
    stated = [args.get(f"{name}_model_parallel_size") for name in ("tensor", "pipeline", "expert")]
    needed = tuple(max(n, size) if isinstance(size, int) else n for n, size in zip(sizes(ranks), stated, strict=True))
    missing = [rank_name(key, needed) for key in product(*map(range, needed)) if key not in ranks]
    if missing:
        text = " x ".join(f"{n} {s}" for n, s in zip(("tensor", "pipeline", "expert"), needed, strict=True) if s > 1)
        raise CheckpointError(f"{folder} lacks {', '.join(missing[:8])} of a checkpoint that is {text} parallel")
    iterations = {rank.content.get("iteration") for rank in ranks.values()}
    if len(iterations) > 1:
        raise CheckpointError(f"{folder}: the ranks are of different iterations: {', '.join(map(str, iterations))}")
    return ranks


def rank_name(key: tuple[int, ...], sizes: tuple[int, ...]) -> str:
    """The folder of a rank: pipeline and expert rank are in its name where there are several."""
    (tensor, pipeline, expert), (_, stages, experts) = key, sizes
    name = f"mp_rank_{tensor:02d}" + (f"_{pipeline:03d}" if stages > 1 else "")
    return name + (f"_{expert:03d}" if experts > 1 else "")


def assemble(ranks: Mapping[Key, Rank]) -> Whole:
    """Put the tensors of all ranks together. Raises CheckpointError where two ranks disagree."""
    tensor, pipeline, expert = sizes(ranks)
    virtual = max(len(rank.chunks) for rank in ranks.values())
    result: dict[str, Tensor] = {}
    segments: list[str] = []
    stacks: dict[str, str] = {}
    offset = 0
    for segment in range(virtual * pipeline):
        stage, p = divmod(segment, pipeline)
        group = [ranks[t, p, e] for t in range(tensor) for e in range(expert)]
        if len({len(rank.chunks) for rank in group}) > 1 or stage >= len(group[0].chunks):
            raise CheckpointError(f"{group[0].path.parent.parent}: the ranks have different numbers of virtual stages")
        symbols = group[0].symbols[stage]
        segments.append(symbols.get("decoder", ""))
        stacks |= {stack: layers for stack, layers in symbols.items() if stack != "decoder"}
        for name, merged in _merge_stage(group, stage, expert).items():
            match = naming.LAYER.match(name)
            if match and match[1] == "decoder":
                name = f"decoder.layers.{int(match[2]) + offset}.{match[3]}"
            # The embedding is there twice if the last stage needs it too; the first one counts.
            result.setdefault(name, merged)
        offset += len(segments[-1])
    return Whole(result, tuple(segments), stacks)


def _rank(key: Key, path: Path, content: dict[str, Any]) -> Rank:
    keys = sorted((int(match[1] or 0), name) for name in content if (match := _MODEL.fullmatch(str(name))))
    chunks: list[dict[str, Tensor]] = []
    symbols: list[dict[str, str]] = []
    left_out: set[str] = set()
    for _, name in keys:
        every = _flat(content[name])
        weights = {name: tensor for name, tensor in every.items() if aliases.is_weight(name)}
        left_out |= {aliases.what(name) for name in every.keys() - weights.keys()}
        try:
            names, layers = aliases.canonical(weights)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        chunks.append({names[name]: tensor for name, tensor in weights.items()})
        symbols.append(layers)
    return Rank(key, path, content, chunks, symbols, frozenset(left_out))


def _content(path: Path, allow: Iterable[str]) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    content = torchfile.load(path, allow)
    if not isinstance(content, dict) or not any(_MODEL.fullmatch(str(key)) for key in content):
        raise CheckpointError(f"{path} holds no 'model'; it is no checkpoint of Megatron")
    return content


def _flat(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dicts, with dotted names."""
    result: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            result |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            result[f"{prefix}{key}"] = value
    return result


def _merge_stage(group: list[Rank], stage: int, experts: int) -> dict[str, Tensor]:
    """One pipeline stage of all its ranks: logical tensors by canonical name, layers counted from 0. `group` has the
    ranks (tensor, expert), expert running fastest."""
    named = [rank.chunks[stage] for rank in group]
    for rank, tensors in zip(group, named, strict=True):
        first = group[rank.key[2]]
        reference = first.chunks[stage]
        for name in sorted(reference.keys() ^ tensors.keys()):
            raise CheckpointError(f"{rank.path} and {first.path} disagree: only one of them has {name}")
        for name, tensor in tensors.items():
            if tensor.shape != reference[name].shape or tensor.dtype != reference[name].dtype:
                raise CheckpointError(
                    f"{rank.path} and {first.path} disagree: {name} is {list(tensor.shape)} {tensor.dtype} in one, "
                    f"{list(reference[name].shape)} {reference[name].dtype} in the other"
                )
    symbols = group[0].symbols[stage]
    merged: dict[str, Tensor] = {}
    for expert_rank in range(experts):
        merged |= _merge_tensor_ranks(named[expert_rank::experts], symbols, expert_rank)
    return merged


def _merge_tensor_ranks(shards: list[dict[str, Tensor]], symbols: dict[str, str], expert: int) -> dict[str, Tensor]:
    """The logical tensors of one expert-parallel rank; from the second on only its experts."""
    shapes: dict[str, dict[str, Shape]] = {}
    for name, tensor in shards[0].items():
        if match := naming.LAYER.match(name):
            shapes.setdefault(f"{match[1]}.layers.{match[2]}", {})[match[3]] = tensor.shape
    result: dict[str, Tensor] = {}
    for name in shards[0]:
        match = naming.LAYER.match(name)
        parts = [tensors[name] for tensors in shards]
        if not match:
            if expert == 0:
                result[name] = layout.merge(parts, layout.cut_of_other(name))
            continue
        layer = shapes[f"{match[1]}.layers.{match[2]}"]
        of_expert = naming.EXPERT.match(match[3])
        if expert and not of_expert:
            continue
        try:
            dim, lengths = layout.cut_of(symbols[match[1]][int(match[2])], match[3], layer)
        except KeyError:  # an unknown tensor, or one that tells its parts is missing: reported later, by name
            dim, lengths = None, ()
        if of_expert:
            local = 1 + max(int(m[3]) for suffix in layer if (m := naming.EXPERT.match(suffix)))
            name = f"{name.removesuffix(of_expert[3])}{int(of_expert[3]) + expert * local}"
        result[name] = layout.merge(parts, dim, lengths)
    return result
