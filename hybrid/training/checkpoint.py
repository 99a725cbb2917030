"""Distributed checkpoints (torch_dist): written beside and renamed, so that a reader never sees half of one.

A checkpoint holds weights, optimizer, schedule, random state, how many samples have been read, and the settings. It is
megatron-core's own format: the global names and shapes do not depend on the layout it was saved from.
"""

import os
import queue
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from hybrid import settings_file
from hybrid.config import Settings
from hybrid.errors import ConfigError, Problem, UserError
from hybrid.model import extra_state
from hybrid.training import folder, optimizer_parts, torch_adam
from hybrid.training.distributed import World
from hybrid.training.setup import Training


@dataclass(frozen=True)
class Position:
    """How far a run has come, and the fingerprint of the data it has read."""

    step: int = 0
    samples: int = 0
    data: str = ""


def save(checkpoints: Path, settings: Settings, training: Training, position: Position, world: World) -> Path:
    """Save everything as `checkpoints/iter_NNNNNNN` and remove the oldest ones past `keep_last`.

    Raises UserError on every rank when the disk is full or not writable; checkpoints saved before stay as they are.
    """
    final = folder.checkpoint_folder(checkpoints, position.step)
    unfinished = checkpoints / f".saving-{final.name}"
    error = ""
    if world.is_main:
        try:
            folder.remove_unfinished(checkpoints)
            unfinished.mkdir(parents=True)
            settings_file.write(settings, unfinished)
        except OSError as problem:
            error = _say(problem)
    if not world.any(bool(error)):
        try:
            metadata = _metadata(settings)
            state = _state(training, metadata, position)
            # A save in this process hands its results over in it; upstream would start a manager process for that.
            filesystem_async._results_queue = queue.Queue()  # type: ignore[assignment]
            dist_checkpointing.save(
                state, str(unfinished), content_metadata=_serialisable(metadata), async_strategy="mcore"
            )
        except (OSError, RuntimeError, CheckpointException) as problem:
            error = _why_not_writable(unfinished) or _say(problem)
    if world.any(bool(error)):
        world.barrier()
        if world.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        reason = error or "another process could not write"
        raise UserError(f"{final}: this checkpoint was not saved ({reason}); earlier ones are intact")
    if world.is_main:
        if final.exists():
            shutil.rmtree(final)
        unfinished.rename(final)
        tracker = checkpoints / folder.TRACKER_FILE
        beside = tracker.with_suffix(".new")
        beside.write_text(str(position.step))
        os.replace(beside, tracker)
        if settings.checkpoint.keep_last:
            for step in folder.checkpoint_steps(checkpoints)[: -settings.checkpoint.keep_last]:
                shutil.rmtree(folder.checkpoint_folder(checkpoints, step))
    world.barrier()
    return final


def load(path: Path, settings: Settings, training: Training) -> Position:
    """Take everything up again from a checkpoint of any parallel layout. Raises ConfigError if it is damaged."""
    saved = settings_file.read(path).parallel
    same_layout = (saved.pipeline, saved.tensor) == (settings.parallel.pipeline, settings.parallel.tensor)
    try:
        metadata = dist_checkpointing.load_content_metadata(str(path)) or {}
        metadata = {**metadata, **_metadata(settings)}
        torch_adam.prepare_to_load(training)
        state = _state(training, metadata, Position(), load_from=path, with_random_state=same_layout)
        loaded: Any = dist_checkpointing.load(state, str(path))
    except (Exception, CheckpointException) as problem:
        raise _damaged(path, problem) from problem
    for index, chunk in enumerate(training.chunks):
        extra_state.load(unwrap(chunk), loaded[_model_key(index, len(training.chunks))], own=True)
    training.optimizer.load_state_dict(optimizer_parts.fit(training.optimizer, loaded["optimizer"]))
    torch_adam.finish_loading(training)
    training.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if same_layout:
        _set_random_state(loaded["rng_state"][0])
    return Position(loaded["iteration"], loaded["consumed_samples"], loaded.get("data_fingerprint", ""))


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
        raise _damaged(path, problem) from problem
    for index, chunk in enumerate(chunks):
        extra_state.load(chunk, loaded[_model_key(index, len(chunks))])


def unwrap(chunk: Any) -> MegatronModule:
    """The model inside DDP and the mixed-precision wrapper."""
    model: Any = unwrap_model(chunk)
    return model


def _state(
    training: Training,
    metadata: dict[str, Any],
    position: Position,
    *,
    load_from: Path | None = None,
    with_random_state: bool = True,
) -> dict[str, Any]:
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
    state = {
        **models,
        "optimizer": optimizer.sharded_state_dict(
            models if count > 1 else models["model"], is_loading=load_from is not None, metadata=metadata
        ),
        "opt_param_scheduler": training.scheduler.state_dict(),
        "iteration": position.step,
        "consumed_samples": position.samples,
        "data_fingerprint": position.data,
        "checkpoint_version": 3.0,
    }
    if with_random_state:
        state["rng_state"] = _random_state()
    return state


def _model_key(index: int, count: int) -> str:
    return "model" if count == 1 else f"model{index}"


def _metadata(settings: Settings) -> dict[str, Any]:
    """What megatron-core's modules and optimizer ask about the format."""
    metadata: dict[str, Any] = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }
    if settings.parallel.distributed_optimizer:
        metadata["distrib_optim_sharding_type"] = "fully_reshardable"
    return metadata


def _serialisable(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key != "dp_cp_group"}


def _random_state() -> ShardedObject:
    state = {
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


def _rng_tracker() -> Any:
    return get_cuda_rng_tracker()


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    _rng_tracker().set_states(state["rng_tracker_states"])


def _why_not_writable(path: Path) -> str:
    """What the system says to a small write; megatron-core's writer keeps it to itself. Empty if it says nothing."""
    try:
        with (path / "probe").open("wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        (path / "probe").unlink()
    except OSError as problem:
        return _say(problem)
    return ""


def _damaged(path: Path, problem: BaseException) -> ConfigError:
    message = f"this checkpoint is damaged ({_say(problem)}); remove it to go on from the one before it"
    return ConfigError(Problem(str(path), message))


def _say(problem: BaseException) -> str:
    """One line of an exception; torch's CheckpointException ends with the one that caused it."""
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return lines[-1] if isinstance(problem, CheckpointException) else lines[0]
