"""How context-parallel ranks share a sequence, as Megatron's batches and transformer-engine's attention have it.

With C ranks a sequence is cut into 2C chunks; rank r has chunks r and 2C - 1 - r, so that all ranks have about the same
share of causal attention. A Mamba layer trades it for its own sharing: the whole sequence, in order, of a part of the
channels.

Shapes: S positions of a rank, T = S C positions of the sequence, B batch, D channels.
"""

import torch
from megatron.core.tensor_parallel.mappings import all_to_all_hp2sp, all_to_all_sp2hp
from torch import Tensor
from torch.distributed import ProcessGroup


def own_part(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """What a rank has of a batch (B, T): its two chunks one after the other, (B, S)."""
    if ranks == 1:
        return tensor
    chunks = tensor.chunk(2 * ranks, dim=1)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]], dim=1)


def in_order(tensor: Tensor, ranks: int) -> Tensor:
    """(T, ...), the parts of the ranks one after the other, in the order of the sequence."""
    chunks = tensor.chunk(2 * ranks, dim=0)
    return torch.cat([*chunks[0::2], *reversed(chunks[1::2])])


def by_rank(tensor: Tensor, ranks: int) -> Tensor:
    """(T, ...) in the order of the sequence, as the parts of the ranks one after the other."""
    chunks = tensor.chunk(2 * ranks, dim=0)
    return torch.cat([chunks[index] for rank in range(ranks) for index in (rank, 2 * ranks - 1 - rank)])


def to_channels(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """(S, B, D), this rank's positions of all channels, to (T, B, D/C): all positions, in order, of its channels."""
    ranks = group.size()
    exchanged = all_to_all_sp2hp(tensor, group=group)
    return in_order(exchanged.reshape(len(tensor) * ranks, tensor.shape[1], -1), ranks)


def to_positions(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """The way back: (T, B, D/C) to (S, B, D)."""
    ranks = group.size()
    exchanged = all_to_all_hp2sp(by_rank(tensor, ranks), group=group)
    return exchanged.reshape(len(tensor) // ranks, tensor.shape[1], -1)
