"""The distributed optimizer's state on its way into a checkpoint.

megatron-core gathers it through memory of the CPU that is not pinned, on every data parallel rank: seconds in which a
GPU does nothing. Here it stays on the GPU where there is room for it, and only the first data parallel rank, which
writes it, gets it.

And megatron-core 0.19 puts buckets together without the padding between them, then takes each parameter's state from
where it is with the padding (`sharded_param_state_fully_reshardable`): after a bucket that ends in padding, every
parameter was saved with a part of its neighbour's state. Tied embeddings under pipeline parallelism, which have a
bucket of their own, met that, and so may any model with several buckets. Here the padding stays.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

# Share of the GPU's free memory that the gathered state may take.
_SHARE = 0.7


@contextmanager
def kept_on_device(optimizer: Any) -> Iterator[None]:
    """While entered, the optimizer's sharded state is made this way."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    parts = [part for part in parts if isinstance(part, DistributedOptimizer)]
    for part in parts:
        part.get_parameter_state_dp_zero = partial(gather, part)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for part in parts:
            del part.get_parameter_state_dp_zero


def gather(optimizer: Any, **_: Any) -> dict[Any, Any] | None:
    """`DistributedOptimizer.get_parameter_state_dp_zero`: each buffer's parameters and moments as one tensor each, as
    they lie in the buffer."""
    group = optimizer.data_parallel_group
    first, size = dist.get_process_group_ranks(group)[0], group.size()
    is_first = group.rank() == 0
    keys = ("param", *optimizer.optimizer_state_keys)
    device = optimizer.buffers[0].grad_data.device
    wanted = sum(buffer.numel for buffer in optimizer.buffers) * 4 * len(keys)
    fits = device.type == "cpu" or wanted < _SHARE * _free_memory(device)
    target = device if fits else torch.device("cpu")
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for index, ranges in enumerate(optimizer.gbuf_ranges):
        buffer = optimizer.buffers[index]
        ((dtype, bucket_ranges),) = ranges.items()
        whole = {}
        if is_first:
            whole = {key: torch.zeros(buffer.numel, dtype=torch.float32, device=target) for key in keys}
        for bucket, bucket_range, (begin, end) in zip(
            buffer.buckets, bucket_ranges, buffer.bucket_indices, strict=True
        ):
            numel = bucket.grad_data.numel()
            shards = {key: torch.zeros(numel // size, dtype=torch.float32, device=device) for key in keys}
            for parameter, places in bucket_range["param_map"].items():
                tensors = optimizer._get_main_param_and_optimizer_states(parameter)
                place = places["gbuf_local"]
                for key, shard in shards.items():
                    shard[place.start : place.end].copy_(tensors[key].detach().flatten())
            for key, shard in shards.items():
                gathered = shard
                if size > 1:
                    gathered = torch.empty(numel if is_first else 0, dtype=torch.float32, device=device)
                    dist.gather(shard, list(gathered.chunk(size)) if is_first else None, dst=first, group=group)
                if is_first:
                    whole[key][begin:end].copy_(gathered)
        state[index] = {dtype: {**whole, "numel_unpadded": buffer.numel_unpadded}}
    return state if is_first else None


def _free_memory(device: torch.device) -> int:
    """Bytes that can still be taken, those that PyTorch holds without using them included."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
