"""megatron-core's distributed optimizer around torch's AdamW, which it takes where transformer-engine is missing.

Its checkpoints were made for transformer-engine's FusedAdam, which keeps one step count for a group of parameters.
AdamW keeps one for each parameter; three things in megatron-core 0.19 stumble over that and are mended here.
"""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from hybrid.training.setup import Training


def prepare_to_load(training: Training) -> None:
    """Call before the optimizer's sharded state is made for loading."""
    for optimizer in _adams(training):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                # `DistributedOptimizer.state_dict` asks for the step count even before the first step.
                if not optimizer.state[parameter]:
                    optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
    _let_step_be_missing()


def finish_loading(training: Training) -> None:
    """Call after the optimizer's state is loaded: it comes with one step tensor for all parameters, which AdamW would
    then count up once for each of them in every step."""
    for optimizer in _adams(training):
        for state in optimizer.state.values():
            state["step"] = state["step"].clone()


def _adams(training: Training) -> list[torch.optim.Optimizer]:
    chained: Any = training.optimizer
    inner = [part.optimizer for part in getattr(chained, "chained_optimizers", [chained])]
    return [optimizer for optimizer in inner if isinstance(optimizer, torch.optim.AdamW)]


def _let_step_be_missing() -> None:
    """The per-parameter tensors of a checkpoint hold no step count, but the code that copies them looks for one."""
    cls: Any = DistributedOptimizer
    name = "_set_main_param_and_optimizer_states"
    original = getattr(cls, name)
    if getattr(original, "step_may_be_missing", False):
        return

    def copy(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        original(self, model_param, {"step": None, **tensors})

    copy.step_may_be_missing = True  # type: ignore[attr-defined]
    setattr(cls, name, copy)
