"""TensorBoard and Weights & Biases, where a recipe asks for them. Neither is needed to run."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybrid import installing, settings_file
from hybrid.config import Settings
from hybrid.errors import ConfigError, Problem
from hybrid.training.report import Sink


def wanted(settings: Settings) -> list[str]:
    """The trackers of a run: those of `trainer.log_to`, and wandb if its plug-in is there."""
    named: list[str] = list(settings.trainer.log_to)
    if any(plugin.partition("(")[0] == "wandb" for plugin in settings.plugins):
        named.append("wandb")
    return list(dict.fromkeys(named))


def require(settings: Settings) -> None:
    """Raise ConfigError for each tracker whose package is not installed."""
    problems = [
        Problem(
            "trainer.log_to",
            f"{name} is not installed here; `{installing.command(name)}`, or take it out of the list",
        )
        for name in wanted(settings)
        if importlib.util.find_spec(name) is None
    ]
    if problems:
        raise ConfigError(problems)


def connect(settings: Settings, run: Path) -> list[Sink]:
    """Open the trackers of a run. A run that goes on goes on there, too. Raises ConfigError if one refuses."""
    return [TensorBoard(run) if name == "tensorboard" else Wandb(settings, run) for name in wanted(settings)]


class TensorBoard:
    """Scalars in `RUN/tensorboard`."""

    def __init__(self, run: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Take the values of a step."""
        for name, value in _numbers(values):
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it on this machine, in `RUN/wandb`."""

    def __init__(self, settings: Settings, run: Path):
        import wandb

        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "hybrid-recipes"),
                name=os.environ.get("WANDB_NAME", settings.name),
                id=os.environ.get("WANDB_RUN_ID", settings.name),
                resume="allow",
                dir=os.environ.get("WANDB_DIR", str(run)),
                config=settings_file.to_dict(settings),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:  # no key, no network
            message = f"names wandb, which does not begin ({error}); WANDB_MODE=offline keeps it on this machine"
            raise ConfigError(Problem("trainer.log_to", message)) from None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Take the values of a step."""
        self._run.log(dict(_numbers(values)), step=step)

    def close(self) -> None:
        """Write out what is left."""
        self._run.finish()


def _numbers(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value
