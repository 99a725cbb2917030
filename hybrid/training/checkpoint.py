"""What a distributed checkpoint (torch_dist) holds, and taking it up again; `saving.py` writes it.

It holds weights, optimizer, schedule, random state, how many samples have been read, and the settings. It is
megatron-core's own format: the global names and shapes do not depend on the layout it was saved from.
"""

import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from hybrid import settings_file
from hybrid.config import Settings
from hybrid.errors import ConfigError, Problem
from hybrid.model import extra_state
from hybrid.training import folder, optimizer_parts, torch_adam
from hybrid.training.setup import Training


@dataclass(frozen=True)
class Position:
    """How far a run has come, the fingerprint of the data it has read, and its recent gradient norms."""

    step: int = 0
    samples: int = 0
    data: str = ""
    norms: list[float] = field(default_factory=list)


def load(path: Path, settings: Settings, training: Training) -> Position:
    """Take everything up again from a checkpoint of any parallel layout. Raises ConfigError if it is damaged."""
    saved = settings_file.read(path).parallel
    same_layout = (saved.pipeline, saved.tensor) == (settings.parallel.pipeline, settings.parallel.tensor)
    try:
        metadata = dist_checkpointing.load_content_metadata(str(path)) or {}
        metadata = {**metadata, **content_metadata(settings)}
        torch_adam.prepare_to_load(training)
        found = state(training, metadata, Position(), load_from=path, with_random_state=same_layout)
        loaded: Any = dist_checkpointing.load(found, str(path))
    except (Exception, CheckpointException) as problem:
        raise _damaged(path, problem, _way_on(path)) from problem
    for index, chunk in enumerate(training.chunks):
        extra_state.load(unwrap(chunk), loaded[_model_key(index, len(training.chunks))], own=True)
    training.optimizer.load_state_dict(optimizer_parts.fit(training.optimizer, loaded["optimizer"]))
    optimizer_parts.complete(training.optimizer)
    torch_adam.finish_loading(training)
    training.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if same_layout:
        _set_random_state(loaded["rng_state"][0])
    return Position(
        loaded["iteration"],
        loaded["consumed_samples"],
        loaded.get("data_fingerprint", ""),
        loaded.get("gradient_norms", []),
    )


def load_weights(path: Path, chunks: list[MegatronModule]) -> None:
    """Load the weights alone. Raises ConfigError if the checkpoint is damaged."""
    metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    try:
        state = {
            _model_key(index, len(chunks)): extra_state.without(chunk.sharded_state_dict(metadata=metadata))
            for index, chunk in enumerate(chunks)
        }
        loaded: Any = dist_checkpointing.load(state, str(path))
    except (Exception, CheckpointException) as problem:
        raise _damaged(path, problem, "start from another one (checkpoint=PATH)") from problem
    for index, chunk in enumerate(chunks):
        extra_state.load(chunk, loaded[_model_key(index, len(chunks))])


def unwrap(chunk: Any) -> MegatronModule:
    """The model inside DDP and the mixed-precision wrapper."""
    model: Any = unwrap_model(chunk)
    return model


def state(
    training: Training,
    metadata: dict[str, Any],
    position: Position,
    *,
    load_from: Path | None = None,
    with_random_state: bool = True,
) -> dict[str, Any]:
    """What is saved, or with `load_from` what is asked of that checkpoint, in megatron-core's sharded form."""
    count = len(training.chunks)
    models = {}
    for index, chunk in enumerate(training.chunks):
        model = unwrap(chunk).sharded_state_dict(metadata=metadata)
        if load_from is None:
            model = extra_state.to_save(model, training.config)
        else:
            model = extra_state.to_go_on(model, training.config, str(load_from))
        models[_model_key(index, count)] = model
    optimizer: Any = training.optimizer
    found = {
        **models,
        "optimizer": optimizer.sharded_state_dict(
            models if count > 1 else models["model"], is_loading=load_from is not None, metadata=metadata
        ),
        "opt_param_scheduler": training.scheduler.state_dict(),
        "iteration": position.step,
        "consumed_samples": position.samples,
        "data_fingerprint": position.data,
        "gradient_norms": position.norms,
        "checkpoint_version": 3.0,
    }
    if with_random_state:
        found["rng_state"] = _random_state()
    return found


def _model_key(index: int, count: int) -> str:
    return "model" if count == 1 else f"model{index}"


def content_metadata(settings: Settings) -> dict[str, Any]:
    """What megatron-core's modules and optimizer ask about the format."""
    metadata: dict[str, Any] = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }
    if settings.parallel.distributed_optimizer:
        metadata["distrib_optim_sharding_type"] = "fully_reshardable"
    return metadata


def serialisable(metadata: dict[str, Any]) -> dict[str, Any]:
    """What of it is written into a checkpoint."""
    return {key: value for key, value in metadata.items() if key != "dp_cp_group"}


def _random_state() -> ShardedObject:
    state = {
        "device": _device(),
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": _rng_tracker().get_states(),
    }
    return ShardedObject(
        "rng_state",
        [state],
        (mpu.get_pipeline_model_parallel_world_size(), mpu.get_tensor_model_parallel_world_size()),
        (mpu.get_pipeline_model_parallel_rank(), mpu.get_tensor_model_parallel_rank()),
        replica_id=mpu.get_data_parallel_rank(with_context_parallel=True),
    )


def _device() -> str:
    """The kind of device whose random numbers the model takes."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _rng_tracker() -> Any:
    return get_cuda_rng_tracker()


def _set_random_state(state: dict[str, Any]) -> None:
    if state.get("device", _device()) != _device():
        # Generators of different kinds have nothing in common; these stay as they were seeded.
        if mpu.get_data_parallel_rank(with_context_parallel=True) == 0:
            print("random numbers start anew: the checkpoint has those of another kind of device", flush=True)
        return
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    _rng_tracker().set_states(state["rng_tracker_states"])


def _damaged(path: Path, problem: BaseException, way_out: str) -> ConfigError:
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    reason = lines[-1] if isinstance(problem, CheckpointException) else lines[0]
    if system := re.search(r"\[Errno \d+\] (.+): '(.+)'", reason):  # as Python writes an OSError within other errors
        reason = f"{Path(system[2]).name}: {system[1]}"
    return ConfigError(Problem(str(path), f"this checkpoint is damaged ({reason}); {way_out}"))


def _way_on(path: Path) -> str:
    """How a run goes on without its checkpoint at `path`."""
    before = [step for step in folder.checkpoint_steps(path.parent) if step < folder.step_of(path)]
    if before:
        return f"remove it to go on from the one before it, of step {before[-1]}"
    return f"there is none before it: remove '{path.parent}' to begin anew"
