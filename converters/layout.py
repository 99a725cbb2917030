"""Cutting a model over ranks and putting it together again: tensor, pipeline and expert parallelism.

Tensors here are lazy (`converters.tensors`), so this is arithmetic on shapes; no data moves.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from converters import naming
from converters.naming import LAYER, Param
from converters.tensors import Shape, Tensor, cat, narrow, split
from hybrid import layer_checks, pattern
from hybrid.config import ModelConfig, ParallelConfig, Settings
from hybrid.errors import ConfigError, Problem
from hybrid.pattern import Pattern

Place = tuple[int, int, int]
"""Tensor-parallel rank, pipeline segment, expert-parallel rank."""


@dataclass(frozen=True)
class Layout:
    """Over how many ranks a checkpoint is cut. `pattern` has a segment per pipeline stage, virtual ones counted."""

    pattern: Pattern
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    @property
    def virtual(self) -> int:
        """Virtual stages of a pipeline rank."""
        return len(self.pattern.segments) // self.pipeline

    def segments(self, rank: int) -> list[int]:
        """The segments of a pipeline rank, in the order of its virtual stages (segment = virtual stage * P + rank)."""
        return [stage * self.pipeline + rank for stage in range(self.virtual)]

    def __str__(self) -> str:
        names = {"tensor": self.tensor, "pipeline": self.pipeline, "virtual": self.virtual, "expert": self.expert}
        return ", ".join(f"{name} parallel {size}" for name, size in names.items() if size > 1) or "one rank"


def target(model: ModelConfig, tensor: int = 1, pipeline: int = 1, expert: int = 1, cut: str | None = None) -> Layout:
    """The layout of a model to be written.

    `cut` is the model's pattern with the '|' where the stages are to end; without it, stages of several layers are cut
    so that they hold about as many parameters each. Raises ConfigError with every rule that the layout breaks.
    """
    if cut is not None:
        stages = pattern.parse(cut)
        if replace(stages, segments=(stages.layers,)) != replace(model.pattern, segments=(model.pattern.layers,)):
            raise ConfigError(
                Problem("--layer-pattern", f"'{cut}' has other layers than the checkpoint: '{model.pattern}'")
            )
    else:
        stages = replace(model.pattern, segments=(model.pattern.layers,))
        if 1 < pipeline <= stages.num_layers:
            rows = model.padded_vocab_size * model.hidden_size
            costs = {kind: float(_size(kind, model)) for kind in set(stages.layers)}
            stages = pattern.split(stages, pipeline, costs, first=rows, last=rows)
    settings = Settings(
        name="",
        model=replace(model, layer_pattern=str(stages), num_layers=None),
        parallel=ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert, sequence=tensor > 1),
    )
    problems = [*layer_checks.model(settings), *layer_checks.layers(settings, stages)]
    # megatron-core cannot save this from a running model; a file is another matter.
    problems = [_of_options(problem) for problem in problems if problem.place != "model.tie_embeddings"]
    if stages.num_layers < pipeline:
        layers = f"the model has {stages.num_layers} layers and every stage holds at least one"
        problems.append(Problem("--pipeline-parallel", f"is {pipeline}, but {layers}"))
    elif len(stages.segments) % pipeline:
        count = len(stages.segments)
        problems.append(
            Problem("--layer-pattern", f"has {count} segments, no multiple of --pipeline-parallel ({pipeline})")
        )
    if problems:
        raise ConfigError(problems)
    return Layout(stages, tensor, pipeline, expert)


def _of_options(problem: Problem) -> Problem:
    """A recipe's problem in the words of who converts: of layouts there are options, and a model is as it is."""
    message = re.sub(r"parallel\.(tensor|pipeline|expert)", r"--\1-parallel", problem.message)
    return replace(problem, message=re.sub(r"; nearest: \d+; or set", "; set", message))


def shard(tensor: Tensor, param: Param, rank: int, size: int) -> Tensor:
    """What tensor-parallel rank `rank` of `size` holds of a logical tensor."""
    if param.dim is None or size == 1:
        return tensor
    pieces = split(tensor, 0, [length for _, length in param.parts]) if param.parts else [tensor]
    lengths = [piece.shape[param.dim] // size for piece in pieces]
    assert all(length * size == piece.shape[param.dim] for length, piece in zip(lengths, pieces, strict=True))
    return cat(
        [narrow(piece, param.dim, rank * n, n) for piece, n in zip(pieces, lengths, strict=True)],
        param.dim,
    )


def merge(shards: Sequence[Tensor], dim: int | None, lengths: Sequence[int] = ()) -> Tensor:
    """The logical tensor of the shards of all tensor-parallel ranks; `lengths` are those of its parts in one shard."""
    if dim is None or len(shards) == 1:
        return shards[0]
    if not lengths:
        return cat(shards, dim)
    columns = [split(shard, 0, lengths) for shard in shards]
    return cat([column[part] for part in range(len(lengths)) for column in columns], 0)


def cut_of(kind: str, name: str, shapes: Mapping[str, Shape]) -> tuple[int | None, tuple[int, ...]]:
    """How the tensor of a layer of `kind` that ends with `name` is cut: its dimension and the lengths of its parts.

    `shapes` are those of all tensors of the layer, on one rank or uncut; the lengths are of the same. Raises KeyError
    for a name that no layer of this kind has.
    """
    dim = _dims(kind)[naming.EXPERT.sub(r"\1.\g<2>0", name)]
    return dim, tuple(length for _, length in naming.parts(kind, name, sizes(kind, name, shapes)))


def sizes(kind: str, name: str, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """The sizes that `naming.parts` asks for, from the shapes of a layer's tensors."""
    if kind == "M":
        d = shapes["mixer.out_proj.weight"][1]
        if len(shapes["mixer.A_log"]) == 2:
            return {"d": d}
        return {"d": d, "GN": (shapes["mixer.conv1d.weight"][0] - d) // 2, "H": shapes["mixer.A_log"][0]}
    if ".linear_fc1." in name:
        first = name.replace(".bias", ".weight")
        width = shapes[first.replace("linear_fc1", "linear_fc2")][1]
        return {"f": width, "gated": int(shapes[first][0] == 2 * width)}
    return {}


def cut_of_other(name: str) -> int | None:
    """The dimension in which a tensor that belongs to no layer is cut."""
    return 0 if name in (naming.EMBEDDING, naming.OUTPUT) or name.endswith(".eh_proj.weight") else None


def shards(tensors: Mapping[str, Tensor], model: ModelConfig, target: Layout) -> dict[Place, dict[str, Tensor]]:
    """What every rank holds: (tensor rank, segment, expert rank) -> canonical name, with layers and experts counted as
    the rank counts them -> its part of the tensor."""
    params = naming.parameters(model)
    result: dict[Place, dict[str, Tensor]] = {
        place: {} for place in product(range(target.tensor), range(len(target.pattern.segments)), range(target.expert))
    }
    for name, tensor in tensors.items():
        expert = expert_of(name, model.num_experts, target.expert) if model.num_experts else None
        holders = range(target.expert) if expert is None else [expert[0]]
        stages = stage_of(name if expert is None else expert[1], target, model.tie_embeddings)
        for t in range(target.tensor):
            part = shard(tensor, params[name], t, target.tensor)
            for (segment, local), e in product(stages, holders):
                result[t, segment, e][local] = part
    for held in result.values():  # the copy of a tied embedding comes first here, but last in the model
        if naming.OUTPUT in held:
            held[naming.OUTPUT] = held.pop(naming.OUTPUT)
    return result


def stage_of(name: str, layout: Layout, tied: bool) -> list[tuple[int, str]]:
    """The segments that hold a tensor, each with the name it has there (layers count from 0 in every segment)."""
    last = len(layout.pattern.segments) - 1
    match = LAYER.match(name)
    if match and match[1] == "decoder":
        index = int(match[2])
        for segment, layers in enumerate(layout.pattern.segments):
            if index < len(layers):
                return [(segment, f"decoder.layers.{index}.{match[3]}")]
            index -= len(layers)
        raise AssertionError(name)
    if name == naming.EMBEDDING:
        if layout.pattern.mtp and last:
            return [(0, name), (last, name)]  # MTP embeds its inputs itself
        return [(0, name), (last, naming.OUTPUT)] if tied and last else [(0, name)]
    return [(0 if name == naming.POSITIONS else last, name)]


def expert_of(name: str, experts: int, size: int) -> tuple[int, str] | None:
    """The expert-parallel rank that holds an expert's tensor and the name it has there; None for another tensor."""
    match = LAYER.match(name)
    expert = naming.EXPERT.match(match[3]) if match else None
    if not match or not expert:
        return None
    per_rank = experts // size
    rank, local = divmod(int(expert[3]), per_rank)
    return rank, f"{name.removesuffix(expert[3])}{local}"


@cache
def _dims(kind: str) -> dict[str, int | None]:
    """The dimension that is cut, for every name that a layer of this kind can have."""
    result: dict[str, int | None] = {}
    for version in (1, 2):
        model = ModelConfig(
            mamba_version=version,
            normalization="LayerNorm",
            add_linear_bias=True,
            num_experts=1,
            moe_shared_expert_size=1,
            moe_expert_bias=True,
        )
        result |= {name: param.dim for name, param in naming.layer_parameters(kind, model).items()}
    return result


def _size(kind: str, model: ModelConfig) -> int:
    total = 0
    for param in naming.layer_parameters(kind, model).values():
        count = 1
        for length in param.shape:
            count *= length
        total += count
    return total
