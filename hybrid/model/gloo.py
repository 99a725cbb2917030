"""Collectives over parts of unequal length, which NCCL has and gloo lacks.

Experts under tensor parallelism exchange as many tokens as each rank's router has sent. Shapes: N elements of the first
dimension, whatever is behind it.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def enable() -> None:
    """Let `torch.distributed` take parts of unequal length from here on."""
    functions: Any = dist
    functions.all_gather = partial(_all_gather, dist.all_gather)
    functions.reduce_scatter = partial(_reduce_scatter, dist.reduce_scatter)


def _all_gather(
    original: Any, tensor_list: list[Tensor], tensor: Tensor, group: ProcessGroup | None = None, **kwargs: Any
) -> Any:
    """Fill `tensor_list`, (N of rank i, ...) each, with the ranks' tensors."""
    longest = max(len(part) for part in tensor_list)
    if all(len(part) == longest for part in tensor_list):
        return original(tensor_list, tensor, group=group, **kwargs)
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    gathered = [torch.empty_like(padded) for _ in tensor_list]
    original(gathered, padded, group=group)
    for part, found in zip(tensor_list, gathered, strict=True):
        part.copy_(found[: len(part)])
    return None


def _reduce_scatter(
    original: Any,
    output: Tensor,
    input_list: list[Tensor],
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    **kwargs: Any,
) -> Any:
    """Sum part i of all ranks' lists, (N of rank i, ...), into the output of rank i."""
    if len({len(part) for part in input_list}) == 1:
        return original(output, input_list, op=op, group=group, **kwargs)
    whole = torch.cat(input_list)
    dist.all_reduce(whole, op=op, group=group)
    output.copy_(whole.split([len(part) for part in input_list])[dist.get_rank(group)])
    return None
