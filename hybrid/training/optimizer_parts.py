"""An optimizer's state in another optimizer than the one that saved it.

transformer-engine's Adam and torch's keep different settings beside their tensors: see `complete`.

With expert parallelism megatron-core has two optimizers, one for the experts, and numbers their states; without it
there is one, whose state stands alone. The tensors are saved by the names of the weights and fit either way, but what
is not a tensor (parameter groups with learning rate and step count) is saved as it stands.
"""

from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer


def fit(optimizer: MegatronOptimizer, loaded: dict[Any, Any]) -> dict[Any, Any]:
    """Return what a checkpoint gave for `optimizer`, in the parts that this optimizer has.

    All parameter groups have one schedule and one step count, so that each takes them from any saved group of the same
    weight decay.
    """
    chained: Any = optimizer
    own = getattr(chained, "chained_optimizers", [chained])
    saved = [part for key, part in loaded.items() if isinstance(key, int) and "optimizer" in part]
    saved = saved or [loaded]
    if len(saved) == len(own) or not all(isinstance(part, DistributedOptimizer) for part in own):
        return loaded
    groups = {group["wd_mult"]: group for part in saved for group in part["optimizer"]["param_groups"]}
    if len(own) == 1:
        tensors = [{key: value for key, value in loaded.items() if not isinstance(key, int)}]
    else:
        tensors = [loaded[index] for index in range(len(own))]
    parts = [
        {**saved[0], **tensor, "optimizer": {"param_groups": [_like(group, groups) for group in part.param_groups]}}
        for part, tensor in zip(own, tensors, strict=True)
    ]
    return parts[0] if len(parts) == 1 else dict(enumerate(parts))


def _like(group: dict[str, Any], saved: dict[float, dict[str, Any]]) -> dict[str, Any]:
    return {**saved[group["wd_mult"]], "is_expert_parallel": group["is_expert_parallel"]}


def complete(optimizer: MegatronOptimizer) -> None:
    """Give the parameter groups that were loaded what this optimizer has beyond the one that saved them.

    torch takes a loaded group as it stands, and transformer-engine's Adam then misses its `bias_correction`; and it
    wants a whole number of steps, where torch's Adam counts in float32.
    """
    chained: Any = optimizer
    for part in getattr(chained, "chained_optimizers", [chained]):
        for group in part.optimizer.param_groups:
            group.update({name: value for name, value in part.optimizer.defaults.items() if name not in group})
            if isinstance(group.get("step"), float):
                group["step"] = int(group["step"])
