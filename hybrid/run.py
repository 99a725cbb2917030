"""What a recipe is a configuration of: the functions that run. Importing this is cheap; calling it imports torch."""

from hybrid.config import (
    CheckpointConfig,
    DataConfig,
    FaultsConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Settings,
    TrainerConfig,
)
from hybrid.errors import ConfigError, Problem


def pretrain(
    *,
    name: str,
    model: ModelConfig,
    parallel: ParallelConfig,
    data: DataConfig,
    optimizer: OptimizerConfig,
    trainer: TrainerConfig,
    checkpoint: CheckpointConfig,
    faults: FaultsConfig | None = None,
    folder: str = "runs",
    plugins: list[str] | None = None,
) -> None:
    """Train from random weights, or go on from the newest checkpoint in the run's folder.

    Runs in this process, as one rank of however many the environment says there are (torchrun's RANK and WORLD_SIZE).
    The run's files are in `folder/name`. What `plugins` name is arranged by whoever starts this process. Raises
    ConfigError for settings that cannot work, before anything is built.
    """
    from hybrid.training.loop import train

    train(
        Settings(
            name=name,
            model=model,
            parallel=parallel,
            data=data,
            optimizer=optimizer,
            trainer=trainer,
            checkpoint=checkpoint,
            faults=faults or FaultsConfig(),
            folder=folder,
            plugins=plugins or [],
        )
    )


def finetune(
    *,
    name: str,
    model: ModelConfig,
    parallel: ParallelConfig,
    data: DataConfig,
    optimizer: OptimizerConfig,
    trainer: TrainerConfig,
    checkpoint: CheckpointConfig,
    faults: FaultsConfig | None = None,
    folder: str = "runs",
    plugins: list[str] | None = None,
) -> None:
    """Train from the weights in `checkpoint.load`, or go on from the newest checkpoint in the run's folder.

    Raises ConfigError without `checkpoint.load`, and like `pretrain`, which runs it, for all else.
    """
    if not checkpoint.load:
        raise ConfigError(NO_CHECKPOINT)
    pretrain(
        name=name,
        model=model,
        parallel=parallel,
        data=data,
        optimizer=optimizer,
        trainer=trainer,
        checkpoint=checkpoint,
        faults=faults,
        folder=folder,
        plugins=plugins,
    )


NO_CHECKPOINT = Problem("checkpoint.load", "is not set, but fine-tuning starts from a checkpoint; give checkpoint=PATH")
