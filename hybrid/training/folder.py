"""Where a run keeps its files, and how a checkpoint is found from what a user says. Imports no torch.

runs/NAME/settings.json        what is run
runs/NAME/metrics.jsonl        one line a step
runs/NAME/log.txt              what was said
runs/NAME/checkpoints/latest_checkpointed_iteration.txt
runs/NAME/checkpoints/iter_0000100/   torch_dist, with settings.json
"""

import re
import shutil
from pathlib import Path

from hybrid import settings_file
from hybrid.config import Settings
from hybrid.errors import ConfigError, Problem
from hybrid.settings_file import FILE_NAME as SETTINGS_FILE

METRICS_FILE = "metrics.jsonl"
LOG_FILE = "log.txt"
CHECKPOINTS = "checkpoints"
TRACKER_FILE = "latest_checkpointed_iteration.txt"

# What may change between two starts of one run; anything else makes it another run.
_MAY_CHANGE = (
    "folder",
    "plugins",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.context",
    "parallel.expert",
    "parallel.sequence",
    "parallel.overlap_",
    "checkpoint.",
    "data.cache",
    "data.num_workers",
    "model.kernels",
    "trainer.max_",
    "trainer.micro_batch_size",
    "trainer.eval_",
    "trainer.log_",
    "trainer.profile",
    "trainer.memory_snapshot",
    "faults.",
    "trainer.recompute",
)

_STEP = re.compile(r"iter_(\d{7,})")


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """The folder of one step's checkpoint; Megatron's own naming."""
    return checkpoints / f"iter_{step:07d}"


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """Steps of which there is a finished checkpoint, oldest first. A save in progress has another name."""
    if not checkpoints.is_dir():
        return []
    matches = [_STEP.fullmatch(path.name) for path in checkpoints.iterdir()]
    return sorted(int(match[1]) for match in matches if match)


def latest_step(checkpoints: Path) -> int | None:
    """The newest finished checkpoint's step."""
    return max(checkpoint_steps(checkpoints), default=None)


def remove_unfinished(checkpoints: Path) -> None:
    """Remove what a save that was cut off left behind."""
    for path in checkpoints.glob(".saving-*"):
        shutil.rmtree(path, ignore_errors=True)


def refuse_other_run(settings: Settings) -> None:
    """Raise ConfigError if the run's folder holds checkpoints of a run with other settings, for each that differs."""
    run = Path(settings.folder) / settings.name
    if latest_step(run / CHECKPOINTS) is None or not (run / SETTINGS_FILE).is_file():
        return
    changed = settings_file.differences(settings_file.read(run), settings)
    problems = [
        Problem(field, f"is {new!r}, but the run in '{run}' has {old!r}; name this run otherwise (name=...)")
        for field, (old, new) in changed.items()
        if not field.startswith(_MAY_CHANGE)
    ]
    if problems:
        raise ConfigError(problems)


def find_checkpoint(reference: str, runs: str = "runs") -> Path:
    """The checkpoint folder that a run's name, a run's folder or a checkpoint's folder means: the newest of several.

    Raises ConfigError, with the runs there are, if there is none.
    """
    for base in (Path(reference), Path(runs) / reference):
        for checkpoints in (base / CHECKPOINTS, base):
            step = latest_step(checkpoints)
            if step is not None:
                return checkpoint_folder(checkpoints, step)
        if (base / "metadata.json").is_file() and (base / SETTINGS_FILE).is_file():
            return base
    if (Path(reference) / SETTINGS_FILE).is_file() or (Path(runs) / reference / SETTINGS_FILE).is_file():
        raise ConfigError(
            Problem(reference, "this run has no finished checkpoint yet; run the same `hybrid pretrain` again to go on")
        )
    there = sorted(path.parent.parent.name for path in Path(runs).glob(f"*/{CHECKPOINTS}/{TRACKER_FILE}"))
    names = f"runs here: {', '.join(there)}" if there else f"there are no runs in '{runs}' here"
    raise ConfigError(Problem(reference, f"is neither a run nor a checkpoint folder; {names}"))
