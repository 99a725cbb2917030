"""Optimizer state in legacy checkpoints: which of its tensors belongs to which parameter.

Without the distributed optimizer it lies beside the model, numbered by parameter group:
    optimizer: {optimizer: {state: {N: {exp_avg, exp_avg_sq}}, param_groups: [{params: [N]}]}, fp32_from_fp16_params}
With it, in `distrib_optim.pt`, as flat buffers in which the parameters lie in reverse order:
    {buffer: {(parameter dtype, gradient dtype): {param, exp_avg, exp_avg_sq, numel_unpadded}}}
Where experts are spread over ranks they have an optimizer, and buffers, of their own: both are then lists of two.
(megatron/core/optimizer/{optimizer,distrib_optimizer}.py)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from converters import naming
from converters.checkpoint import SLOTS, Optimizer
from converters.pickles import Global
from converters.tensors import Flat, Tensor, narrow, reshape, zeros
from hybrid.errors import CheckpointError

DISTRIBUTED_FILE = "distrib_optim.pt"
ALIGNMENT = 64
"""Elements at a multiple of which every parameter begins in a buffer."""

_FLAT_SLOTS = {"fp32_param": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


@dataclass(frozen=True)
class Parameter:
    """A parameter of one rank: canonical name with that rank's numbering, its tensor, the virtual stage it is in."""

    name: str
    tensor: Tensor
    chunk: int

    @property
    def decays(self) -> bool:
        """Whether weight decay applies to it: Megatron leaves out vectors and biases."""
        return len(self.tensor.shape) > 1 and not self.name.endswith(".bias")


def parameters(chunks: Iterable[Mapping[str, Tensor]]) -> list[Parameter]:
    """The parameters of a rank in the order of `named_parameters`, which is that of its tensors but for buffers."""
    return [
        Parameter(name, tensor, index)
        for index, chunk in enumerate(chunks)
        for name, tensor in chunk.items()
        if not name.endswith("mlp.router.expert_bias")
    ]


def _of_optimizers(chunks: Iterable[Mapping[str, Tensor]], apart: bool) -> list[list[Parameter]]:
    """The parameters of each optimizer of a rank: there is one for all, or experts have one `apart`."""
    every = parameters(chunks)
    return [[p for p in every if _is_expert(p.name) == expert] for expert in (False, True)] if apart else [every]


def read_rank(
    chunks: list[dict[str, Tensor]], content: Any, buffers: Any, args: Mapping[str, Any], rank: tuple[int, int, int]
) -> list[dict[str, dict[str, Tensor]]]:
    """Per virtual stage, the tensors of each slot by the parameter's name.

    `chunks` are the weights, `content` is the file's `optimizer`, `buffers` that of DISTRIBUTED_FILE or None, `rank`
    (tensor, pipeline, expert). Raises CheckpointError if they do not fit together.
    """
    optimizers = content if isinstance(content, list) else [content]
    sets = _of_optimizers(chunks, len(optimizers) > 1)
    if len(sets) != len(optimizers):
        raise CheckpointError(f"the optimizer state of {len(optimizers)} optimizers in one file is not understood")
    result: list[dict[str, dict[str, Tensor]]] = [{slot: {} for slot in SLOTS} for _ in chunks]
    states = buffers if isinstance(buffers, list) else [buffers] * len(sets)
    for owned, optimizer, state in zip(sets, optimizers, states, strict=True):
        found = _from_groups(owned, optimizer) if state is None else _from_buffers(owned, state, args, rank)
        for parameter, slot, tensor in found:
            result[parameter.chunk][slot][parameter.name] = tensor
    return result


def groups_of(content: Any) -> tuple[list[dict[str, Any]], bool]:
    """The settings of the parameter groups of a file's `optimizer` (without their parameters), and whether the step is
    kept per parameter; it is then put into the groups as `step`."""
    groups: list[dict[str, Any]] = []
    per_parameter = False
    for optimizer in content if isinstance(content, list) else [content]:
        inner = optimizer.get("optimizer", optimizer)
        steps = [
            state["step"] for state in inner.get("state", {}).values() if isinstance(state, dict) and "step" in state
        ]
        per_parameter |= bool(steps)
        for group in inner["param_groups"]:
            kept = {key: value for key, value in group.items() if key != "params"}
            groups.append(kept | ({"step": steps[0]} if steps else {}))
    return groups, per_parameter


def content(
    optimizer: Optimizer, chunks: list[dict[str, Tensor]], slots: Mapping[str, list[dict[str, Tensor]]], experts: int
) -> Any:
    """What a rank's file holds as `optimizer`. `slots` has each slot's tensors per virtual stage; `experts` is the
    expert parallel size."""
    sets = _of_optimizers(chunks, experts > 1)
    result: list[dict[str, Any]] = []
    for index, owned in enumerate(sets):
        groups = _templates(optimizer.groups, index == 1)
        members = [[p for p in owned if p.decays == _has_decay(group)] for group in groups]
        if optimizer.distributed:
            result.append({"optimizer": {"param_groups": groups}})
            continue
        numbers = iter(range(len(owned)))
        numbered = [[(next(numbers), p) for p in group] for group in members]
        state: dict[int, dict[str, Any]] = {}
        for group, settings in zip(numbered, groups, strict=True):
            for number, p in group:
                state[number] = {slot: slots[slot][p.chunk][p.name] for slot in ("exp_avg", "exp_avg_sq")}
                if optimizer.step_per_parameter:
                    state[number]["step"] = settings.get("step")
        if optimizer.step_per_parameter:
            groups = [{key: value for key, value in group.items() if key != "step"} for group in groups]
        inner = {
            "state": state,
            "param_groups": [
                group | {"params": [number for number, _ in found]}
                for group, found in zip(groups, numbered, strict=True)
            ],
        }
        originals = [
            [slots["fp32_param"][p.chunk][p.name] for p in group if p.tensor.dtype != "float32"] for group in members
        ]
        result.append({"optimizer": inner, "fp32_from_fp16_params": originals} if any(originals) else inner)
    return result[0] if len(result) == 1 else result


def buffers(
    chunks: list[dict[str, Tensor]],
    slots: Mapping[str, list[dict[str, Tensor]]],
    args: Mapping[str, Any],
    rank: tuple[int, int, int],
    experts: int,
) -> Any:
    """What a rank's DISTRIBUTED_FILE holds."""
    sets = _of_optimizers(chunks, experts > 1)
    result: list[dict[Any, Any]] = []
    for owned in sets:
        state: dict[Any, Any] = {"buckets_coalesced": True}
        for index, (members, key, bucket) in enumerate(_buffers(owned, args, rank)):
            places, total = place(members, bucket, _shared(args, rank))
            flat: dict[str, Any] = {"numel_unpadded": total}
            for slot, name in _FLAT_SLOTS.items():
                parts: list[Tensor] = []
                end = 0
                for p in sorted(members, key=lambda p: places[p.chunk, p.name]):
                    start = places[p.chunk, p.name]
                    if start > end:
                        parts.append(zeros((start - end,), "float32"))
                    parts.append(slots[slot][p.chunk][p.name])
                    end = start + p.tensor.size
                if total > end:
                    parts.append(zeros((total - end,), "float32"))
                flat[name] = Flat(tuple(parts), "float32")
            state[index] = {tuple(Global("torch", dtype) for dtype in key): flat}
        result.append(state)
    return result[0] if len(result) == 1 else result


def place(
    members: list[Parameter], bucket: int | None, shared: frozenset[str]
) -> tuple[dict[tuple[int, str], int], int]:
    """Where each parameter begins in a buffer without the padding between buckets, and the buffer's length.

    Parameters are laid down in reverse order, each at a multiple of ALIGNMENT from its bucket's start; a bucket ends
    when it holds `bucket` elements, and around a shared embedding (`_compute_per_buffer_param_layout`).
    """
    places: dict[tuple[int, str], int] = {}
    base = end = 0
    for p in reversed(members):
        start = -(-end // ALIGNMENT) * ALIGNMENT
        if p.name in shared and end:
            base, start = base + start, 0
        places[p.chunk, p.name] = base + start
        end = start + p.tensor.size
        if p.name in shared or (bucket is not None and end >= bucket):
            base, end = base + end, 0
    return places, base + end


def _from_groups(owned: list[Parameter], optimizer: Any) -> Iterable[tuple[Parameter, str, Tensor]]:
    """Assign numbered state to parameters: group by group, in order, checked by shape."""
    inner = optimizer.get("optimizer", optimizer)
    originals = optimizer.get("fp32_from_fp16_params") or [[] for _ in inner["param_groups"]]
    for group, copies in zip(inner["param_groups"], originals, strict=True):
        members = [p for p in owned if p.decays == _has_decay(group)]
        numbers = group["params"]
        shapes = [inner["state"][number]["exp_avg"].shape for number in numbers if number in inner["state"]]
        if len(numbers) != len(members) or shapes != [p.tensor.shape for p in members]:
            raise CheckpointError(
                f"the optimizer state cannot be assigned to the parameters: a group with weight decay multiplier "
                f"{group.get('wd_mult')} has {len(numbers)} tensors, the model has {len(members)} such parameters"
            )
        remaining = iter(copies)
        for number, p in zip(numbers, members, strict=True):
            state = inner["state"][number]
            yield p, "exp_avg", state["exp_avg"]
            yield p, "exp_avg_sq", state["exp_avg_sq"]
            # A parameter that is float32 itself has no copy in float32.
            yield p, "fp32_param", p.tensor if p.tensor.dtype == "float32" else next(remaining)


def _from_buffers(
    owned: list[Parameter], state: Mapping[Any, Any], args: Mapping[str, Any], rank: tuple[int, int, int]
) -> Iterable[tuple[Parameter, str, Tensor]]:
    """Cut the flat buffers into the parameters."""
    if not state.get("buckets_coalesced"):
        raise CheckpointError(f"{DISTRIBUTED_FILE} is of Megatron before February 2024, whose buckets are not read")
    for index, (members, _, bucket) in enumerate(_buffers(owned, args, rank)):
        (flat,) = state[index].values()
        total = flat["numel_unpadded"]
        # What the file was saved with may not be in its arguments; all ways that give its length give these places.
        ways = product((bucket, None, 40_000_000), (_shared(args, rank), frozenset[str]()))
        places = next((found for way in ways if (found := place(members, *way))[1] == total), None)
        if places is None:
            raise CheckpointError(
                f"{DISTRIBUTED_FILE}: a buffer has {total} elements, which the parameters of this rank do not explain"
            )
        for slot, name in _FLAT_SLOTS.items():
            for p in members:
                part = narrow(flat[name], 0, places[0][p.chunk, p.name], p.tensor.size)
                yield p, slot, reshape(part, p.tensor.shape)


def _buffers(
    owned: list[Parameter], args: Mapping[str, Any], rank: tuple[int, int, int]
) -> list[tuple[list[Parameter], tuple[str, str], int | None]]:
    """The buffers of a rank: parameters, (parameter dtype, gradient dtype), elements of a bucket (None: no limit)."""
    result: dict[tuple[int, str], list[Parameter]] = {}
    for p in owned:
        result.setdefault((p.chunk, p.tensor.dtype), []).append(p)
    ranks = args.get("data_parallel_size") or 1
    size = args.get("ddp_bucket_size") or max(40_000_000, 1_000_000 * ranks)
    bucketed = bool(args.get("overlap_grad_reduce")) and rank[1] == 0
    fp32 = args.get("accumulate_allreduce_grads_in_fp32", True)
    return [
        (members, (dtype, "float32" if fp32 else dtype), size if bucketed and chunk == 0 else None)
        for (chunk, dtype), members in result.items()
    ]


def _shared(args: Mapping[str, Any], rank: tuple[int, int, int]) -> frozenset[str]:
    """The parameters of which there is a copy on another pipeline stage."""
    stages = args.get("pipeline_model_parallel_size") or 1
    tied = args.get("untie_embeddings_and_output_weights") is False or args.get("mtp_num_layers")
    if stages == 1 or not tied or rank[1] not in (0, stages - 1):
        return frozenset()
    return frozenset({naming.EMBEDDING} if rank[1] == 0 or args.get("mtp_num_layers") else {naming.OUTPUT})


def _templates(groups: list[dict[str, Any]], of_expert: bool) -> list[dict[str, Any]]:
    """A group with weight decay and one without, for the experts' optimizer or the other one."""
    result: list[dict[str, Any]] = []
    for decays in (True, False):
        same = [group for group in groups if _has_decay(group) == decays]
        fitting = [group for group in same if bool(group.get("is_expert_parallel")) == of_expert] or same
        if fitting:
            result.append({**fitting[0], "is_expert_parallel": of_expert})
    return result


def _has_decay(group: Mapping[str, Any]) -> bool:
    return group.get("wd_mult", group.get("pre_wd_mult", 1.0)) != 0.0


def _is_expert(name: str) -> bool:
    match = naming.LAYER.match(name)
    return bool(match and naming.EXPERT.match(match[3]))
